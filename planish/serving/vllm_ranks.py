"""Tensor parallelism: which outputs of a linear each rank computes.

Every layer is cut by its outputs. Those that vLLM cuts so (q, k and v, gate and up) are cut as vLLM does it, head by head. Those that it cuts by
their inputs (o, down) too: the transform of an input and the scale of its codes are of the whole of it, so every rank gathers that, computes its
share of the outputs, and leaves the others zero for vLLM's sum over the ranks. So the ranks compute what one device would.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import tensor_model_parallel_all_gather  # pyright: ignore[reportMissingImports]
from vllm.model_executor.layers.linear import QKVParallelLinear, ReplicatedLinear, RowParallelLinear  # pyright: ignore[reportMissingImports]

from ..quant.errors import PlanishError
from ..quant.linear import Parts


def own_rows(layer: Any, name: str, sizes: Sequence[int], total: int) -> list[range]:
    """The outputs of one of vLLM's layers that are this rank's, in their order. sizes: of the parts of what vLLM takes for the rank's. total: outputs
    of the whole layer. PlanishError: a checkpoint with another number of outputs."""
    ranks, rank = layer.tp_size, layer.tp_rank
    whole, own = 0, []
    if isinstance(layer, ReplicatedLinear | RowParallelLinear):
        whole, split = sum(sizes), isinstance(layer, RowParallelLinear)
        own = [range(rank * whole // ranks, (rank + 1) * whole // ranks) if split else range(whole)]
    else:
        for size, copies in zip(sizes, _copies(layer, len(sizes)), strict=True):
            start = whole + rank // copies * size
            own.append(range(start, start + size))
            whole += ranks // copies * size
    if whole != total:
        raise PlanishError(f"{name}: the checkpoint has {total} rows, vLLM {whole}.")
    return own


def _copies(layer: Any, parts: int) -> list[int]:
    """How many ranks compute the same outputs of each part: more than one where there are fewer key-value heads than ranks."""
    return [1, *[layer.num_kv_head_replicas] * 2] if isinstance(layer, QKVParallelLinear) else [1] * parts


def cut(parts: Sequence[Parts], own: Sequence[range]) -> list[Parts]:
    """Of linears whose outputs lie side by side those outputs; linears that have none of them are left out."""
    return list(_cut(parts, own))


def _cut(parts: Sequence[Parts], own: Sequence[range]) -> Iterator[Parts]:
    start = 0
    for part in parts:
        end = start + len(part.weight.codes)
        rows = [row - start for some in own for row in range(max(start, some.start), min(end, some.stop))]
        if len(rows) == end - start:
            yield part
        elif rows:
            yield part.rows(torch.tensor(rows, device=part.weight.codes.device))
        start = end


def whole_input(layer: Any, x: Tensor) -> Tensor:
    """What arrives at the layer, where each rank has a part of the channels: all of it."""
    if isinstance(layer, RowParallelLinear) and layer.tp_size > 1:
        gathered: Tensor = tensor_model_parallel_all_gather(x)
        return gathered
    return x


def first_row(layer: Any, own: Sequence[range]) -> int:
    """Where the rank's outputs begin in what the layer returns."""
    return own[0].start if isinstance(layer, RowParallelLinear) else 0
