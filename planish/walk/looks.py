"""What one run saw of a block in full precision, kept for other runs that would see the same: most recipes differ only in what comes after.

A file for each block, named by the SHA-256 of all that decides what is seen: the block's weights, the hidden states that enter it, the prefix and the
arithmetic. So a recipe that turns the model before the walk finds what recipes that turn it alike have left, and nothing else; and it makes no
difference to the result, bit for bit, who looked.

Shape suffixes: B samples, L tokens of a sample, D width, T = B * L tokens of a batch, C channels of a site.
"""

import hashlib
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..calib.walk.observe import Observation
from ..calib.walk.statistics import Extremes
from ..calib.walk.stream import Stream
from ..common.files import sync
from ..quant.transforms import FoldNorms, Prefix, Rotate, Step, Untie

BEFORE_THE_WALK = (FoldNorms, Untie, Rotate, Prefix)  # steps that change what a block is, or what it is given, in full precision


def alike(steps: Sequence[Step]) -> tuple[Step, ...]:
    """What two recipes must have in common to see the same, beside text, batches and arithmetic."""
    return tuple(step for step in steps if isinstance(step, BEFORE_THE_WALK))


class Looks:
    """A folder of looks. arithmetic: what else decides them: dtype, device, prefix."""

    def __init__(self, folder: Path, arithmetic: str) -> None:
        self.folder, self.arithmetic = folder, arithmetic

    def observe(
        self, block: nn.Module, index: int, full: Stream, before: Stream | None, squares: Collection[str], look: Callable[[], Observation]
    ) -> Observation:
        """What `look` finds, which moves `full` past the block and lets `before` keep what entered; from an earlier look where there is one.

        squares: the sites whose sums of squares are wanted; a look without them is done again."""
        file = self.folder / f"{index:05d}-{self._key(block, index, full)}.safetensors"
        found = load_file(file) if file.is_file() else None
        if found is None or any(f"square {name}" not in found for name in squares):
            observation = look()
            self._keep(file, observation, full)
            return observation
        for batch in range(len(full)):
            if before is not None:
                before[batch] = full[batch]
            full[batch] = found[f"out {batch}"].to(full[batch].device)
        return _observation(found, index, len(full), full[0].device)

    def _key(self, block: nn.Module, index: int, full: Stream) -> str:
        key = hashlib.sha256(f"{index} {self.arithmetic}".encode())
        for name, tensor in (*block.named_parameters(), *((str(batch), hidden) for batch, hidden in enumerate(full))):
            key.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            key.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return key.hexdigest()[:32]

    def _keep(self, file: Path, observation: Observation, full: Stream) -> None:
        tensors = {f"keep {batch}": keep_T for batch, keep_T in enumerate(observation.keep_T)}
        tensors |= {f"out {batch}": hidden for batch, hidden in enumerate(full)}
        for name, seen in observation.seen.items():
            tensors |= {f"tokens {name}": torch.tensor(seen.tokens), f"minimum {name}": seen.minimum_C, f"maximum {name}": seen.maximum_C}
        tensors |= {f"sinks {name}": sinks_C for name, sinks_C in observation.sinks_C.items()}
        tensors |= {f"square {name}": square_C for name, square_C in observation.square_C.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        new = file.with_name(f"{file.name}.{os.getpid()}.new")  # others may be at it too
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, new)
        sync(new)
        new.replace(file)


def _observation(found: Mapping[str, Tensor], index: int, batches: int, device: torch.device) -> Observation:
    names = [name.removeprefix("tokens ") for name in found if name.startswith("tokens ")]
    observation = Observation(keep_T=[found[f"keep {batch}"].to(device) for batch in range(batches)])
    for name in names:
        seen = observation.seen[name] = Extremes(len(found[f"minimum {name}"]), f"{index}.{name}")
        seen.widen(int(found[f"tokens {name}"]), found[f"minimum {name}"].to(device), found[f"maximum {name}"].to(device))
        observation.sinks_C[name] = found[f"sinks {name}"].to(device)
        if f"square {name}" in found:
            observation.square_C[name] = found[f"square {name}"].to(device)
    return observation
