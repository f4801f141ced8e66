"""What attention makes of a block's queries and keys, for solvers that round them by it (quant/solvers/attention.py).

Queries and keys are those of the weights before they are rounded, on the inputs that really arrive; a prefix's keys are attended to as well.

Shape suffixes: B samples of a batch, L tokens of one, P of the prefix, T = B L, C channels, N heads, K key heads, D channels of a head.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..calib.blocks.sites import Attention, Rows, Topology
from ..calib.compressed.packing import Packed
from ..calib.machine.precision import bfloat16_products
from ..calib.walk.site_walk import SiteWalk
from ..quant.errors import PlanishError
from ..quant.solvers import Solver
from ..quant.solvers.attention import Heads, softmax_metrics
from ..recipe.resolve import Address
from .solving import Readers

QUERIES = 1024  # of all calibration tokens, evenly spaced, whose probabilities are looked at


def check_attention(solver: Solver, topology: Topology, packed: Mapping[Address, Packed | None]) -> None:
    """Refuse attention-aware rounding where scores are something else than it counts with, or no q and k are quantized row by row. PlanishError."""
    known = topology.attention
    if not solver.attention or known is None:
        return
    if known.obstacle:
        raise PlanishError(
            f"solver.attention: in {topology.family} models there is {known.obstacle} between the rows of q and k and the softmax, which "
            "attention-aware rounding does not count with. Leave attention out."
        )
    name = next(site.name for kind in topology.kinds for site in kind.sites if known.q.module in site.readers)
    formats = [how.scheme.weights for (_, site), how in packed.items() if site == name and how is not None]
    if not formats:
        raise PlanishError(f"solver.attention: no site {name} is quantized, so there are no q and k to round. Leave attention out.")
    if any(fmt is not None and fmt.granularity == "tensor" for fmt in formats):
        raise PlanishError(
            f"solver.attention: weights.granularity is tensor at site {name}, but rows are rounded one after the other. Use channel or group."
        )


def heads_of(
    plain: Readers, known: Attention, walk: SiteWalk, scaling: float, arguments: Sequence[Mapping[str, Any]], before_PKD: Tensor | None
) -> Heads:
    """Bring all batches to the site that q and k read and see what attention makes of them. The heads' rows are those of all readers together.

    plain: the readers as they were before anything was done to them. scaling: of the scores. arguments: of the block's forward, by name, for each
    batch. before_PKD: the prefix's keys, None if there is none.
    """
    rows_ND = torch.tensor([*_rows(plain, known.q), *_rows(plain, known.k)]).view(-1, known.size)
    metric_NDD = torch.zeros(len(rows_ND), known.size, known.size, dtype=torch.float64)
    for pass_, given in zip(walk.arrivals(plain.site.name), arguments, strict=True):
        assert pass_.x is not None
        x_BLC = pass_.x.float().view(-1, given["position_ids"].shape[-1], pass_.x.shape[-1])
        every = max(1, len(arguments) * len(pass_.x) // QUERIES)
        metric_NDD = metric_NDD.to(x_BLC.device)
        with bfloat16_products(False):
            for b, x_LC in enumerate(x_BLC):
                q_LND, k_LKD = (_made(plain, rows, x_LC).view(len(x_LC), -1, known.size) for rows in (known.q, known.k))
                cos_LD, sin_LD = _turn(known, given, b, x_LC)
                seen = _seen(given, b)
                metric_NDD += torch.cat(softmax_metrics(q_LND, k_LKD, cos_LD, sin_LD, scaling, before_PKD=before_PKD, seen_TS=seen, every=every))
    return Heads(rows_ND.to(metric_NDD.device), metric_NDD)


def _rows(plain: Readers, rows: Rows) -> list[int]:
    """Where these rows are among those of all readers."""
    before = 0
    for path, w_OC in plain.weights.items():
        if path == rows.module:
            return [before + row for row in rows.index]
        before += len(w_OC)
    raise KeyError(rows.module)


def _made(plain: Readers, rows: Rows, x_LC: Tensor) -> Tensor:
    """What these rows make of an input: (L, O)."""
    index_O = torch.tensor(rows.index, device=x_LC.device)
    bias_O = plain.biases[rows.module]
    return nn.functional.linear(x_LC, plain.weights[rows.module][index_O], None if bias_O is None else bias_O.float()[index_O])


def _turn(known: Attention, given: Mapping[str, Any], sample: int, x_LC: Tensor) -> tuple[Tensor, Tensor]:
    """RoPE's cosines and sines for a sample: (L, channels that it turns)."""
    if not known.rotary:
        return x_LC.new_zeros(len(x_LC), 0), x_LC.new_zeros(len(x_LC), 0)
    cos_BLD, sin_BLD = given["position_embeddings"]
    return _of_sample(cos_BLD, sample).float(), _of_sample(sin_BLD, sample).float()


def _seen(given: Mapping[str, Any], sample: int) -> Tensor | None:
    """Which keys a sample's queries attend to: (L, P + L); None: all before them. Masks are of truth values, or 0 for what is seen."""
    mask = given.get("attention_mask")
    if mask is None:
        return None
    seen: Tensor = _of_sample(mask, sample)[0]
    return seen if seen.dtype == torch.bool else seen == 0


def _of_sample(tensor_B: Tensor, sample: int) -> Tensor:
    return tensor_B[sample if len(tensor_B) > 1 else 0]
