"""What has been done, on disk: finished blocks and their records, so that a killed run goes on where it was.

Layout of the working folder OUT.partial: journal.json, found-*.safetensors, block-00000.safetensors and on, streams/ (activations that do not fit in
memory), checkpoint/ (the result, which becomes OUT by one rename).
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ..common.files import save_tensors, write_text
from ..quant.errors import PlanishError
from .records import BlockRecord


@dataclass(slots=True)
class Journal:
    """The journal of one run. fingerprint: of recipe, model, versions and arithmetic; a folder with another one is not resumed."""

    folder: Path
    fingerprint: str
    blocks: list[BlockRecord] = field(default_factory=list)

    @classmethod
    def open(cls, folder: Path, fingerprint: str) -> "Journal":
        """Start a journal in a new folder, or go on with the one there. Raises PlanishError if that belongs to another run."""
        file = folder / "journal.json"
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            journal = cls(folder, fingerprint)
            journal._write()
            return journal
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            known, blocks = data["fingerprint"], [BlockRecord.read(block) for block in data["blocks"]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PlanishError(f"{file}: damaged ({error!r}). Delete the folder {folder}, or choose another output folder.") from error
        if known != fingerprint:
            raise PlanishError(
                f"{folder}: the remains of an unfinished run with another recipe, model, setting or version. "
                "Repeat that run's command to finish it, delete the folder, or choose another output folder."
            )
        return cls(folder, fingerprint, blocks)

    def block_file(self, index: int) -> Path:
        """Where the tensors of block `index` lie."""
        return self.folder / f"block-{index:05d}.safetensors"

    def add(self, record: BlockRecord, tensors: Mapping[str, Tensor]) -> None:
        """Note a finished block: first its tensors, then its record."""
        save_tensors(tensors, self.block_file(record.index))
        self.blocks.append(record)
        self._write()

    def _write(self) -> None:
        data = {"fingerprint": self.fingerprint, "blocks": [dataclasses.asdict(block) for block in self.blocks]}
        write_text(self.folder / "journal.json", json.dumps(data))
