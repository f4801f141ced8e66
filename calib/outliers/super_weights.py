"""Super weights (Yu, Wang, Shan, Reed and Wan, "The Super Weight in Large Language Models", 2024, section 3).

A few single weights, in the MLPs' last layers ("down"), without which a model writes nonsense: each multiplies a spike of its input into a spike of
the output, v[t, j] = sum_k u[t, k] W[j, k] + b[j], which then stays in the residual stream. The paper looks for spikes of both in one pass over any
short prompt, takes W[j, k] where they meet, sets it to 0 and repeats until nothing is left.

The criterion here. W[j, k] is a super weight if, at the token t where row j is largest,
1. |v[t, j]| and |u[t, k]| are spikes: above spike_floor (the paper's 50), and above spike_ratio times their medians;
2. the product does it: without u[t, k] W[j, k] at most 1 - spike_share of v[t, j] is left;
3. |v[t, j]| is at least spike_left of the layer's largest output. Without this every weight in the column of an input spike would count in the end:
   setting a super weight to 0 leaves its input as it is, and what an input of 3,000 times an ordinary weight makes is large too.
A weight that is itself an outlier, above weight_ratio times the layer's median weight, needs no spike of its input, and may be small beside another:
it is one if 2. holds and v[t, j] is above weight_spike times the median.

All this must hold twice: in the model as it is, and with the super weights of the blocks before set to 0. So neither what an earlier super weight
brings about in a later block is reported, nor what goes wrong there without it.

The input of "down" does not depend on its weights, so one pass through the block shows all there is: what a row is without the weights found in it
is computed anew from the input.

Shape suffixes: T tokens, I in channels, O out channels, R the rows with large outputs.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ...quant.linear import QuantizedLinear
from ..blocks.sites import Topology, reader_bias, reader_weight
from ..walk.runner import BlockRunner
from .diagnosis import SuperWeight, Thresholds

PROBE = (4, 64)  # samples and tokens in which super weights are sought
_MEDIAN_VALUES = 1 << 16
_INDEX = Path(__file__).with_name("super_weights.json")


Place = tuple[int, int]
"""Row (output channel) and column (input channel) of a weight."""
Places = dict[Place, tuple[float, float]]
"""Those of a layer's super weights, each with its input and output."""


class SuperWeightSearch:
    """Follows a short probe through a model, block by block. found: the super weights so far, the largest spike of a block first."""

    def __init__(self, thresholds: Thresholds | None = None) -> None:
        self.thresholds = thresholds or Thresholds()
        self.found: list[SuperWeight] = []
        self._cleaned: Tensor | None = None

    @torch.no_grad()
    def step(self, linears: Mapping[str, nn.Module], run: Callable[[Tensor], Tensor], hidden: Tensor, *, layer: int) -> Tensor:
        """Look at the next block; its output for `hidden`, with all its weights.

        linears: the last layers of the block's MLPs (of every expert), by full name: nn.Linear, Conv1D or QuantizedLinear; as they were, afterwards.
        run: the block. hidden: the probe's hidden states (B, L, D) that enter it, in the model as it is. layer: the block's number, for the records.
        Runs the block once; from the first super weight on twice, and in blocks that have one a third time.
        """
        output, found = self._look(linears, run, hidden)
        before, cleaned = hidden, output
        if self._cleaned is not None:
            before = self._cleaned
            cleaned, again = self._look(linears, run, before)
            found = {name: {place: spike for place, spike in places.items() if place in again.get(name, {})} for name, places in found.items()}
        if any(found.values()):
            with ExitStack() as stack:
                for name, places in found.items():
                    stack.enter_context(without(linears[name], places))
                cleaned = run(before)
            for name, places in found.items():
                self._note(linears[name], places, layer, name)
        self._cleaned = cleaned if self._cleaned is not None or any(found.values()) else None
        return output

    def _note(self, linear: nn.Module, found: Places, layer: int, module: str) -> None:
        matrix_OI = _dequantized(linear)
        for (row, column), (activation, output) in found.items():
            value = float(matrix_OI[row, column])
            weight = SuperWeight(module=module, layer=layer, row=row, column=column, value=value, activation=activation, output=output)
            self.found.append(weight)

    def _look(self, linears: Mapping[str, nn.Module], run: Callable[[Tensor], Tensor], hidden: Tensor) -> tuple[Tensor, dict[str, Places]]:
        """The block's output, and the super weights of its layers, without experts that no token is sent to."""
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def note(name: str, _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = inputs[0], output

        handles = [linear.register_forward_hook(partial(note, name)) for name, linear in linears.items()]
        try:
            output = run(hidden)
        finally:
            for handle in handles:
                handle.remove()
        return output, {name: dict(_Rows.of(linears[name], u.flatten(0, -2), v.flatten(0, -2), self.thresholds)) for name, (u, v) in seen.items()}


@torch.no_grad()
def search(runner: BlockRunner, ids_NL: Tensor, report: Callable[[int], None]) -> tuple[SuperWeight, ...]:
    """The super weights of a model, in a pass of its own over the first of these tokens (PROBE of them). report: told how many blocks are done."""
    samples, length = PROBE
    ((hidden, call),) = runner.start([ids_NL[:samples, :length]])
    found = SuperWeightSearch()
    for index in range(runner.topology.block_count):
        block = runner.load_block(index)
        run = partial(call.run, block, index)
        try:
            hidden = found.step(last_layers(block, runner.topology, index), run, hidden, layer=index)
        finally:
            runner.release_block(index)
        report(index + 1)
    return tuple(found.found)


def last_layers(block: nn.Module, known: Topology, index: int) -> dict[str, nn.Module]:
    """The last layers of the MLPs of block `index`, by full name."""
    return {f"{known.block_name(index)}.{path}": block.get_submodule(path) for site in known.block(index).inside for path in site.readers}


@contextmanager
def without(linear: nn.Module, places: Collection[Place]) -> Iterator[None]:
    """While the `with` lasts, the weights of `linear` at these places are 0. Restored bit for bit, also after an error."""
    matrix_OI = (linear.matrix if isinstance(linear, QuantizedLinear) else reader_weight(linear)).detach()
    before = [matrix_OI[place].clone() for place in places]
    for place in places:
        matrix_OI[place] = 0
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            matrix_OI[place] = value


def published(config: PreTrainedConfig) -> frozenset[tuple[int, int, int]] | None:
    """(layer, row, column) of the super weights that were published for the model with this config, None if nothing was.

    A model is known by its sizes: fine-tuned ones keep their base's super weights (Yu et al. 2024, section 3). Where paper and code disagree, both.
    """
    for model in json.loads(_INDEX.read_text(encoding="utf-8"))["models"]:
        if all(getattr(config, name, None) == value for name, value in model["config"].items()):
            return frozenset((layer, row, column) for layer, row, column in model["weights"])
    return None


@dataclass(slots=True, eq=False)
class _Rows:
    """The rows of one layer that may hold a spike; iterated, the super weights in them, each with its input and output.

    rows_R: their numbers. W_RI, b_R: their weights, those found set to 0. u_RI, v_R: input and output at the token where the row is largest.
    """

    thresholds: Thresholds
    u_TI: Tensor
    rows_R: Tensor
    W_RI: Tensor
    b_R: Tensor
    u_RI: Tensor
    v_R: Tensor
    medians: tuple[float, float, float]
    largest: float

    @classmethod
    def of(cls, linear: nn.Module, u_TI: Tensor, v_TO: Tensor, thresholds: Thresholds) -> "_Rows":
        W_OI = _dequantized(linear)
        medians = (_median(u_TI), _median(v_TO), _median(W_OI))
        peak_O, token_O = v_TO.abs().max(0)
        least = min(thresholds.weight_spike, thresholds.spike_ratio) * medians[1]
        rows_R = (peak_O > least).nonzero()[:, 0]
        bias = linear.bias if isinstance(linear, QuantizedLinear) else reader_bias(linear)
        return cls(
            thresholds=thresholds,
            u_TI=u_TI,
            rows_R=rows_R,
            W_RI=W_OI[rows_R].float(),
            b_R=torch.zeros(len(rows_R), device=v_TO.device) if bias is None else bias.detach()[rows_R].float(),
            u_RI=u_TI[token_O[rows_R]].float(),
            v_R=v_TO[token_O[rows_R], rows_R].float(),
            medians=medians,
            largest=float(peak_O.max()),
        )

    def __iter__(self) -> Iterator[tuple[Place, tuple[float, float]]]:
        while len(self.rows_R):
            product_R, column_R = _largest(self.u_RI * self.W_RI)
            hit_R = self._hits(product_R, column_R)
            if not bool(hit_R.any()):
                return
            r = int((self.v_R.abs() * hit_R).argmax())
            column = int(column_R[r])
            yield (int(self.rows_R[r]), column), (float(self.u_RI[r, column]), float(self.v_R[r]))
            self._clear(r, column)

    def _hits(self, product_R: Tensor, column_R: Tensor) -> Tensor:
        """Whether the weight in each row's largest product is a super weight: (R,) bool."""
        limits = self.thresholds
        median_u, median_v, median_W = self.medians
        u_R = self.u_RI.gather(1, column_R[:, None])[:, 0].abs()
        W_R = self.W_RI.gather(1, column_R[:, None])[:, 0].abs()
        v_R = self.v_R.abs()
        spikes_R = (u_R > max(limits.spike_floor, limits.spike_ratio * median_u)) & (v_R > max(limits.spike_floor, limits.spike_ratio * median_v))
        spikes_R &= v_R >= limits.spike_left * self.largest
        outlier_R = (limits.weight_ratio * median_W < W_R) & (v_R > limits.weight_spike * median_v)
        explained_R = (self.v_R - product_R).abs() <= (1 - limits.spike_share) * v_R
        return explained_R & (spikes_R | outlier_R)

    def _clear(self, r: int, column: int) -> None:
        """Set a weight found to 0: row r anew."""
        self.W_RI[r, column] = 0
        v_T = self.u_TI.float() @ self.W_RI[r] + self.b_R[r]
        token = v_T.abs().argmax()
        self.u_RI[r], self.v_R[r] = self.u_TI[token].float(), v_T[token]


def _largest(x_RI: Tensor) -> tuple[Tensor, Tensor]:
    """The value of largest size in each row, and where it is: (R,) each."""
    where_R = x_RI.abs().argmax(1)
    return x_RI.gather(1, where_R[:, None])[:, 0], where_R


def _dequantized(linear: nn.Module) -> Tensor:
    """The layer's weight as real numbers: (O, I)."""
    if not isinstance(linear, QuantizedLinear):
        return reader_weight(linear).detach()
    return linear.matrix if linear.factor is None else linear.matrix * linear.factor.T


def _median(x: Tensor) -> float:
    """Median of |x| where x is not 0 (behind a ReLU most are); of more than 2^16 values, of those in evenly spaced rows. 0 if all are."""
    rows = x[:: -(-x.numel() // _MEDIAN_VALUES) or 1]
    sizes = rows[rows != 0].abs().float()
    return float(sizes.median()) if len(sizes) else 0.0
