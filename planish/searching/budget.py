"""How much a choice of weight formats may take: bits per weight, the checkpoint's size, or the speed of writing text.

Speed is modelled, not measured. While one text is written, every weight but the table of token embeddings is read once for each token, and that is
what takes the time. So a token takes (bytes read) / (what the memory gives in a second), and a model is as many times quicker as it has fewer bytes
to read. Left out are the keys and values of the text, several texts at once and the work of unpacking: each makes the gain smaller.
"""

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..quant.errors import PlanishError

if TYPE_CHECKING:
    from ..calib.walk.runner import BlockRunner

_NUMBER = r"(\d+(?:\.\d+)?)"
_BUDGET = re.compile(rf"{_NUMBER} ?(bpw|kB|MB|GB|TB|x|tok/s)", re.IGNORECASE)
_RATE = re.compile(rf"{_NUMBER} ?(MB|GB|TB)/s", re.IGNORECASE)
_BYTES = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


@dataclass(frozen=True, slots=True)
class Weights:
    """What a model's weights are. chosen: numbers at the sites that formats are chosen for, itemsize: bytes of each in full precision; fixed: bytes
    of all else, read: those of them that are read for every token."""

    chosen: int
    itemsize: int
    fixed: int
    read: int

    @classmethod
    def of(cls, runner: "BlockRunner", chosen: int) -> "Weights":
        """Of a runner's model. The table of token embeddings is read only where it is the head too."""
        checkpoint, table = runner.checkpoint, runner.model.get_input_embeddings()
        fixed = checkpoint.nbytes - chosen * checkpoint.dtype.itemsize
        name = next(name for name, module in runner.model.named_modules() if module is table)
        only = 0 if checkpoint.tied else checkpoint.info(f"{name}.weight").nbytes
        return cls(chosen, checkpoint.dtype.itemsize, fixed, fixed - only)

    @property
    def full(self) -> int:
        """Bytes that the model in full precision reads for a token."""
        return self.read + self.chosen * self.itemsize

    def bits(self, stored: int) -> float:
        """Bits per weight where the chosen formats take so many bytes."""
        return 8 * stored / self.chosen

    def whole(self, stored: int) -> int:
        """Bytes of the checkpoint."""
        return self.fixed + stored

    def speedup(self, stored: int) -> float:
        """How many times quicker than in full precision a token is written."""
        return self.full / (self.read + stored)


@dataclass(frozen=True, slots=True)
class Budget:
    """text: as it was given. kind: bpw (bits per weight), bytes (of the checkpoint), x (times as quick as in full precision) or tok/s
    (tokens a second), for which rate is what the memory gives: bytes a second."""

    text: str
    kind: Literal["bpw", "bytes", "x", "tok/s"]
    number: float
    rate: float = 0.0

    @classmethod
    def of(cls, text: str, bandwidth: str | None = None) -> "Budget":
        """4.5bpw, 80MB, 1.5x, or 60tok/s where the memory gives `bandwidth`, such as 50GB/s. Raises PlanishError for anything else."""
        found = _BUDGET.fullmatch(text.strip())
        if found is None or not float(found[1]):
            raise PlanishError(
                f"budget {text!r} is none. Write bits per weight, such as 4.5bpw, the checkpoint's size, such as 80MB, or the speed of writing, such "
                "as 1.5x (times as quick as in full precision) or 60tok/s."
            )
        number, unit = float(found[1]), found[2].lower()
        if unit == "tok/s":
            if bandwidth is None:
                raise PlanishError(f"budget {text}: say what the memory gives where the model will run, such as --bandwidth 50GB/s.")
            return cls(text, "tok/s", number, _rate(bandwidth))
        if bandwidth is not None:
            raise PlanishError(f"budget {text}: bandwidth {bandwidth} is for budgets such as 60tok/s. Leave it out.")
        if unit in _BYTES:
            return cls(text, "bytes", int(number * _BYTES[unit]))
        return cls(text, "x" if unit == "x" else "bpw", number)

    def allowance(self, weights: Weights) -> int:
        """Bytes that the chosen formats may take. Negative where even all else takes more."""
        if self.kind == "bpw":
            return int(self.number * weights.chosen / 8)
        if self.kind == "bytes":
            return int(self.number) - weights.fixed
        token = weights.full / self.number if self.kind == "x" else self.rate / self.number
        return int(token) - weights.read

    def least(self, weights: Weights, stored: int) -> str:
        """The budget of this kind that formats of so many bytes keep, in words."""
        if self.kind in ("bpw", "bytes"):
            return f"at least {math.ceil(100 * weights.bits(stored)) / 100:g}bpw or {math.ceil(weights.whole(stored) / 1e5) / 10:g}MB"
        if self.kind == "x":
            return f"no more than {math.floor(100 * weights.speedup(stored)) / 100:g}x"
        return f"no more than {math.floor(100 * self.rate / (weights.read + stored)) / 100:g}tok/s"


def _rate(text: str) -> float:
    found = _RATE.fullmatch(text.strip())
    if found is None or not float(found[1]):
        raise PlanishError(f"bandwidth {text!r} is none. Write what the memory gives in a second, such as 50GB/s.")
    return float(found[1]) * _BYTES[found[2].lower()]
