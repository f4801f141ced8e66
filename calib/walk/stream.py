"""The activation streams: the hidden states of every calibration batch between two blocks, in memory or on disk."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


class Stream:
    """Hidden states by batch. folder None: held in memory, where they are; else each batch is a file there, replaced as a whole, and comes back to
    its device."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._held: dict[int, Tensor] = {}
        self._count = 0
        self._device = torch.device("cpu")
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(self._count))

    def _file(self, index: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{index:06d}.safetensors"

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self._held[index] if self._folder is None else load_file(self._file(index))["hidden"].clone().to(self._device)

    def __setitem__(self, index: int, hidden: Tensor) -> None:
        self._count = max(self._count, index + 1)
        if self._folder is None:
            self._held[index] = hidden
            return
        self._device = hidden.device
        new = self._file(index).with_suffix(".new")
        save_file({"hidden": hidden.contiguous().cpu()}, new)
        new.replace(self._file(index))


def relative_error(reference: Tensor, other: Tensor) -> float:
    """||other - reference|| / ||reference||, Frobenius norms in float32; 0 where both are zero."""
    size = torch.linalg.vector_norm(reference.float()).item()
    off = torch.linalg.vector_norm(other.float() - reference.float()).item()
    return off / size if size else float(off > 0)


def squares(hidden: Tensor, keep_T: Tensor) -> float:
    """The sum of the squares of the tokens kept. hidden: (B, L, D) of T = B * L tokens."""
    norms_T = torch.linalg.vector_norm(hidden, dim=-1, dtype=torch.float32).flatten()
    return float(norms_T[keep_T].square().sum(dtype=torch.float64))
