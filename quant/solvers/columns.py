# pyright: reportCallIssue=false
# (a launch takes num_warps and the like, which Triton's types do not know)
"""The columns of a block of a weight, rounded one after the other: the part of GPTQ (gptq.py) that no matrix product does.

On a GPU in one launch for all of them where Triton is there (kernels/triton_columns.py), else in a dozen for each. The kernel is tried there before
it is taken.

Shape suffixes: K columns of the block, O out channels.
"""

import warnings
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..formats import Kind, code_range, to_codes

LAUNCHED = 128  # columns of a launch at most: their deviations are in registers
_LAUNCHES = 12  # about: for a column without such a kernel; with it for a block, or as long as its steps take
_ROWS = 32  # of a program, one warp


class Block(NamedTuple):
    """Columns of a weight as contiguous rows, all current but for what they owe each other, and where results go.

    weights_KO, original_KO: what is to be rounded, and what it was. shares_KK: what column k takes of each deviation before it. scale_KO, zero_KO:
    the grid. deviations_KO, codes_KO: to be filled.
    """

    weights_KO: Tensor
    original_KO: Tensor
    deviations_KO: Tensor
    codes_KO: Tensor
    shares_KK: Tensor
    scale_KO: Tensor
    zero_KO: Tensor | None


def round_block(block: Block, kind: Kind) -> None:
    """Each column takes what those before it owe it, then is rounded as formats.to_codes does. What the weights then hold is of no matter."""
    if isinstance(kind, str):
        floats_one_by_one(block, kind)
    elif launched(block.weights_KO):
        launch(block, kind)
    else:
        one_by_one(block, kind)


def launched(weights_KO: Tensor) -> bool:
    """Whether blocks of such weights, of LAUNCHED columns at most, are rounded in one launch."""
    return weights_KO.device.type == "cuda" and weights_KO.dtype == torch.float32 and _works(weights_KO.device)


def launches(columns: int, device: torch.device) -> int:
    """In whose time so many columns are rounded there, about, however few their rows; 0 on a CPU, which launches nothing."""
    if device.type == "cpu":
        return 0
    return _LAUNCHES * (-(-columns // LAUNCHED) if device.type == "cuda" and find_spec("triton") is not None else columns)


def one_by_one(block: Block, bits: int) -> None:
    """As `round_block`, on any device, of integers."""
    w_KO, original_KO, deviations_KO, codes_KO, shares_KK, scale_KO = map(_quick, block[:6])
    zero_KO = None if block.zero_KO is None else _quick(block.zero_KO)
    lowest, highest = code_range(bits)
    for k in range(len(w_KO)):
        w_O, scale_O = w_KO[k], scale_KO[k]
        w_O += shares_KK[k, :k] @ deviations_KO[:k]
        zero_O = 0 if zero_KO is None else zero_KO[k]
        codes_O = (w_O / scale_O + zero_O).round().clip(lowest, highest)
        codes_KO[k] = codes_O
        deviations_KO[k] = original_KO[k] - (codes_O - zero_O) * scale_O


def floats_one_by_one(block: Block, kind: Kind) -> None:
    """As `round_block`, of floats."""
    codes_KO = torch.empty_like(block.weights_KO)
    for k, (w_O, original_O, scale_O) in enumerate(zip(block.weights_KO, block.original_KO, block.scale_KO, strict=True)):
        w_O += block.shares_KK[k, :k] @ block.deviations_KO[:k]
        codes_KO[k] = to_codes(w_O, scale_O, None, kind)
        block.deviations_KO[k] = original_O - codes_KO[k] * scale_O
    block.codes_KO.copy_(codes_KO)


def _quick(tensor: Tensor) -> Any:
    """The same memory as a numpy array, whose calls on one column cost a third of torch's; the tensor itself where it is not on the CPU."""
    return tensor.numpy() if tensor.device.type == "cpu" else tensor


def launch(block: Block, bits: int) -> None:
    """A block of LAUNCHED columns at most; of tensors of any device, for tests run the kernel in Triton's interpreter."""
    from ..kernels.triton_columns import columns_kernel

    columns, rows = block.weights_KO.shape
    scale_KO, zero_KO = (part if part is None or part.stride(1) == 1 else part.contiguous() for part in (block.scale_KO, block.zero_KO))
    assert scale_KO is not None
    with torch.cuda.device_of(block.weights_KO):  # type: ignore[no-untyped-call]
        columns_kernel[(-(-rows // _ROWS),)](
            *block[:5],
            scale_KO,
            scale_KO if zero_KO is None else zero_KO,
            rows,
            block.shares_KK.stride(0),
            scale_KO.stride(0),
            scale_KO.stride(0) if zero_KO is None else zero_KO.stride(0),
            count=columns,
            ZERO=zero_KO is not None,
            BITS=bits,
            COLUMNS=LAUNCHED,
            BLOCK_R=_ROWS,
            num_warps=1,
            num_stages=1,
            enable_fp_fusion=False,
        )


@lru_cache(maxsize=16)
def _works(device: torch.device) -> bool:
    """Whether the kernel is there, and rounds a block as one column after the other does; a warning where it is and does not."""
    if find_spec("triton") is None:
        return False
    tried, plain = trial(device), trial(device)
    one_by_one(plain, 4)
    try:
        launch(tried, 4)
        off = float((tried.codes_KO != plain.codes_KO).float().mean())
        reason = f"{100 * off:.2g} % of a trial's codes differ" if off > 0.01 else ""  # sums have another order
    except Exception as failed:  # noqa: BLE001, of Triton, its compiler or CUDA
        reason = f"{type(failed).__name__}: {failed}"
    if reason:
        warnings.warn(f"The kernel that rounds columns fails on this {device.type} ({reason}): it is left out. Please report it.", stacklevel=2)
    return not reason


def trial(device: torch.device) -> Block:
    """A block of as many columns as a launch takes, less one; the same everywhere."""
    generator, columns, rows = torch.Generator().manual_seed(0), LAUNCHED - 1, 2 * _ROWS + 1
    w_KO = torch.randn(columns, rows, generator=generator, device="cpu")
    shares_KK = (0.1 * torch.randn(columns, columns, generator=generator, device="cpu")).tril(-1) + torch.eye(columns, device="cpu")
    scale_1O = 0.1 + 0.3 * torch.rand(1, rows, generator=generator, device="cpu")
    zero_KO = torch.randint(-8, 8, (columns, rows), generator=generator, device="cpu").float()
    codes_KO = torch.zeros_like(w_KO, dtype=torch.int8)
    scale_KO = scale_1O.to(device).expand(columns, rows)
    parts = [part.to(device) for part in (w_KO.clone(), w_KO, torch.zeros_like(w_KO), codes_KO, shares_KK)]
    return Block._make([*parts, scale_KO, zero_KO.to(device)])
