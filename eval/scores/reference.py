"""A base model's final hidden states on several texts, computed once and kept in a file, to hold any number of compressed checkpoints against.

The numbers are those of score.compare: the same batches, arithmetic and order.

Shapes: ids (N, L) windows of one text, where every text may have its own N and L; hidden (N, L, D) in float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...calib.files.checkpoint import Checkpoint
from ...calib.walk.runner import BlockRunner
from .score import Comparison, Report, arithmetic, check_vocabularies, final_hidden, hidden_comparisons, window_batches


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """Texts as ids, and the hidden states that the base model ends in on each of them, all in the same order."""

    ids: tuple[Tensor, ...]
    hidden: tuple[Tensor, ...]

    def save(self, file: Path) -> None:
        """Write to a safetensors file: whole or not at all."""
        new = file.with_name(file.name + ".new")
        pairs = [("ids", self.ids), ("hidden", self.hidden)]
        save_file({f"{kind}.{i}": tensor.contiguous() for kind, tensors in pairs for i, tensor in enumerate(tensors)}, new)
        new.replace(file)

    @classmethod
    def load(cls, file: Path) -> "Reference":
        """What `save` wrote."""
        tensors = load_file(file)
        count = len(tensors) // 2
        return cls(tuple(tensors[f"ids.{i}"] for i in range(count)), tuple(tensors[f"hidden.{i}"] for i in range(count)))


def make_reference(base: Checkpoint, texts: Sequence[Tensor], *, device: torch.device | str = "cpu", report: Report | None = None) -> Reference:
    """Run the base model over the texts, one block in memory at a time. report(done, total): so many blocks of all are done."""
    batches = [window_batches(ids_NL) for ids_NL in texts]
    with arithmetic(torch.float32):
        runner = BlockRunner(base, torch.float32, torch.device(device))
        hidden = iter(final_hidden(runner, [batch for text in batches for batch in text], report))
        return Reference(tuple(texts), tuple(torch.cat([next(hidden).cpu() for _ in text]) for text in batches))


def compare_with(
    reference: Reference, base: Checkpoint, quantized: Checkpoint, *, device: torch.device | str = "cpu", report: Report | None = None
) -> list[Comparison]:
    """For each text what score.compare finds, with the base model's blocks left out: report counts those of the quantized model, and the heads.

    Errors: the models have different vocabularies.
    """
    check_vocabularies(base, quantized)
    where, batches = torch.device(device), [window_batches(ids_NL) for ids_NL in reference.ids]
    with arithmetic(torch.float32):
        one, two = (BlockRunner(checkpoint, torch.float32, where) for checkpoint in (base, quantized))
        total = two.topology.block_count + 1
        second = iter(
            final_hidden(two, [batch for text in batches for batch in text], None if report is None else lambda done, _all: report(done, total))
        )
        sides = []
        for text, hidden_NLD in zip(batches, reference.hidden, strict=True):
            first = [hidden_BLD.to(where) for hidden_BLD in torch.split(hidden_NLD, [len(batch) for batch in text])]
            sides.append((text, first, [next(second) for _ in text]))
        found = hidden_comparisons(one, two, sides)
    if report is not None:
        report(total, total)
    return found
