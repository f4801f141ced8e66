"""The quantized stream's way through one block: at each site the Hessian of what really arrives there, then the solver.

Shape suffixes: T tokens of a batch, C = I in channels, O out channels, R channels that are kept out of the codes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..calib.blocks.sites import Site, reader_bias, reader_weight
from ..calib.compressed.packing import Packed, pack
from ..calib.compressed.side import kept_formats
from ..calib.machine.precision import bfloat16_products
from ..calib.walk.site_walk import Pass, Prepared, SiteWalk
from ..quant.formats import ActivationFormat, Factored, QuantizedWeight, ScaleType, WeightFormat, fitted
from ..quant.linear import Kept, QuantizedInput, QuantizedLinear, Side, StaticGrid, quantize_input, without_first
from ..quant.low_rank import LowRank
from ..quant.solvers import Moments, Rtn, Solution, Solver
from ..quant.solvers.attention import Heads, solve_among
from ..quant.solvers.search import choose
from ..quant.transforms.factors import Chain, on_input, on_weight

ERROR_ROWS = 256
STRIP = 512  # rows of a Hessian that are added up at once


@dataclass(slots=True, eq=False)
class Readers:
    """The linear layers of one site in float32, and what became of them. packed None: the site stays in full precision.

    factored: of NVFP4, what the scales of all of them are, for servers multiply them as one matrix.
    weights: what the codes are to stand for: the whole without low, the low-rank paths beside them, and with 0 for the channels in kept. Paths and
    kept weights are as they will be stored.
    """

    site: Site
    packed: Packed | None
    static: StaticGrid | None
    weights: dict[str, Tensor]
    biases: dict[str, Tensor | None]
    solved: dict[str, QuantizedWeight]
    chain: Chain = ()
    low: dict[str, LowRank] = field(default_factory=dict)
    kept: dict[str, Kept] = field(default_factory=dict)
    factored: Factored | None = None

    @classmethod
    def of(cls, block: nn.Module, site: Site, packed: Packed | None, static: StaticGrid | None, stored: torch.dtype) -> "Readers":
        """The readers of a float32 block; biases as they will be stored."""
        modules = {path: block.get_submodule(path) for path in site.readers}
        found = {path: reader_bias(module) for path, module in modules.items()}
        biases = {path: None if bias is None else bias.detach().to(stored) for path, bias in found.items()}
        return cls(site, packed, static, {path: reader_weight(module).detach() for path, module in modules.items()}, biases, {})

    def take(self, block: nn.Module) -> None:
        """From here on only this object holds the weights that are to be quantized."""
        if self.packed is not None and self.packed.scheme.weights is not None:
            for path in self.weights:
                block.get_submodule(path)._parameters["weight"] = nn.Parameter(self.weights[path].to("meta"), requires_grad=False)

    def transform(self, chain: Chain, stored: torch.dtype) -> None:
        """Let the input go through the chain: weights and biases become those that go with it. A bias that a shift made stays in float32."""
        for path, w_OI in self.weights.items():
            self.weights[path], offset_O = on_weight(chain, w_OI)
            self._gain(path, offset_O)
            if (low := self.low.pop(path, None)) is not None:
                moved, offset_O = low.through(chain)
                self._gain(path, offset_O)
                self.weights[path] = (self.weights[path].double() + moved.product()).float()
                self.put_beside(path, moved, stored)
        self.chain = chain

    def _gain(self, path: str, offset_O: Tensor | None) -> None:
        bias_O = self.biases[path]
        if offset_O is not None:
            self.biases[path] = offset_O if bias_O is None else bias_O.float() + offset_O

    def put_beside(self, path: str, low: LowRank, stored: torch.dtype) -> None:
        """Let a reader have this path too, rounded to what will be stored, beside its codes; its weight becomes what is left."""
        low = low.to(stored).to(torch.float32)
        self.weights[path] = (self.weights[path].double() - low.product()).float()
        self.low[path] = low.plus(self.low.get(path))

    def keep(self, channels: int, bits: int | None, stored: torch.dtype) -> None:
        """Keep the first channels out of the codes: in full precision, or (bits) in codes of their own, rounded to nearest."""
        assert self.packed is not None
        for path, w_OI in self.weights.items():
            w_OR = w_OI[:, :channels]
            if bits is None:
                self.kept[path] = Kept(w_OR.to(stored).float())
            else:
                fmt, act = kept_formats(bits, self.packed.scheme)
                self.kept[path] = Kept(Rtn().solve(w_OR, fmt, None, stored).weight, act)
            self.weights[path] = without_first(w_OI, channels)

    def whole(self, path: str, some: slice = slice(None)) -> Tensor:
        """Some rows of what a reader's codes and low-rank paths are to make together: (rows, I)."""
        w_OI, low = self.weights[path][some], self.low.get(path)
        return w_OI if low is None else w_OI + low.up_OR[some] @ low.down_RC

    @property
    def kept_channels(self) -> int:
        """How many first channels are kept out of the codes."""
        return next((kept.channels for kept in self.kept.values()), 0)

    def side(self, path: str) -> Side | None:
        """What runs beside a reader's codes, if anything."""
        low, kept = self.low.get(path), self.kept.get(path)
        return None if low is None and kept is None else Side(low, kept)

    def coded(self, x_TC: Tensor) -> Tensor:
        """What is to become codes of an input of the site: transformed, 0 in the channels that are kept."""
        return without_first(on_input(self.chain, x_TC), self.kept_channels)

    def quantize(self, x_TC: Tensor) -> QuantizedInput:
        """An input of the site as codes, as the readers will get it."""
        assert self.activations is not None
        return quantize_input(self.coded(x_TC), self.activations, self.static)

    def together(self, paths: list[str]) -> Tensor:
        """The weights of these readers in one matrix, which then is where they lie."""
        if len(paths) == 1:
            return self.weights[paths[0]]
        w_OI = torch.cat([self.weights[path] for path in paths])
        start = 0
        for path in paths:
            rows = slice(start, start + len(self.weights[path]))
            self.weights[path], start = w_OI[rows], rows.stop
        return w_OI

    def layers(self, dtype: torch.dtype) -> dict[str, QuantizedLinear]:
        """The solved readers as modules, as they will run."""
        return {
            path: QuantizedLinear(weight, self.biases[path], self.activations, self.static, self.chain, dtype, self.side(path))
            for path, weight in self.solved.items()
        }

    def whole_layers(self, dtype: torch.dtype, stored: torch.dtype) -> dict[str, nn.Linear]:
        """The readers that stay in full precision as modules, as they will run."""
        layers: dict[str, nn.Linear] = {}
        for path in self.weights.keys() - self.solved.keys():
            w_OI, bias_O = self.weights[path].to(stored).to(dtype), self.biases[path]
            layers[path] = nn.Linear(w_OI.shape[1], len(w_OI), bias=bias_O is not None, device="meta")
            layers[path].weight = nn.Parameter(w_OI, requires_grad=False)
            if bias_O is not None:
                layers[path].bias = nn.Parameter(bias_O.to(dtype), requires_grad=False)
        return layers

    def stored(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors of the solved readers as a checkpoint holds them, by their names in the block."""
        assert self.packed is not None
        found: dict[str, Tensor] = {}
        for path, weight in self.solved.items():
            tensors = pack(weight, self.packed.layout, self.factored or dtype, self.static)
            found |= {f"{path}.{local}": tensor for local, tensor in tensors.items()}
        return found

    def drop_solved(self) -> int:
        """Give back the float32 weights that have become codes, and say how many bytes that is."""
        dropped = sum(self.weights[path].nbytes for path in self.solved)
        self.weights |= {path: self.weights[path].to("meta") for path in self.solved}
        return dropped

    @property
    def width(self) -> int:
        """Input channels of the site."""
        return int(next(iter(self.weights.values())).shape[1])

    @property
    def activations(self) -> ActivationFormat | None:
        """How the site's input is quantized, if it is."""
        return None if self.packed is None else self.packed.scheme.activations


def gather(readers: Readers, walk: SiteWalk, keep_T: list[Tensor], full: SiteWalk | None, held_share: float = 0.0) -> Moments:
    """Bring all batches to the site and add up the moments of its input as the readers will get it.

    Sink tokens (not in keep_T) count: their outputs are what all other tokens attend to, and a Hessian without them lets the solver spoil the few
    weights that make them. They do not set the damping. full: the full-precision walk that goes along; its inputs give the cross moment of GPTAQ.
    held_share: the part of the batches, the last ones, that is held out.
    """
    name = readers.site.name
    act = readers.activations
    full_arrivals = None if full is None else full.arrivals(name)
    held = held_batches(len(keep_T), held_share)
    sums = [_Sums(readers.width, full is not None, keep_T[0].device) for _ in range(2 if held else 1)]

    def prepare(pass_: Pass) -> None:
        assert pass_.x is not None
        pass_.prepared = None if act is None else Prepared(name, readers.quantize(pass_.x))

    for i, (pass_, keep) in enumerate(zip(walk.arrivals(name, prepare), keep_T, strict=True)):
        assert pass_.x is not None
        x_TC = readers.coded(pass_.x).float() if pass_.prepared is None else pass_.prepared.quantized.dequantize()
        full_TC = None
        if full_arrivals is not None:
            twin = next(full_arrivals).x
            assert twin is not None
            full_TC = readers.coded(twin).float()
        sums[-1 if i >= len(keep_T) - held else 0].add(x_TC, full_TC, keep)
    moments = sums[0].moments()
    return replace(moments, held_out=sums[1].moments()) if held else moments


def held_batches(batches: int, share: float) -> int:
    """How many of the batches are held out: at least one where any are, and never all."""
    return max(1, min(batches - 1, round(share * batches))) if share else 0


class _Sums:
    """The moments of a site's input as they are added up, batch by batch."""

    def __init__(self, width: int, cross: bool, device: torch.device) -> None:
        self.second_II = torch.zeros(width, width, device=device)  # its upper triangle, in strips
        self.cross_II = torch.zeros(width, width, device=device) if cross else None
        self.sink_trace, self.tokens = 0.0, 0

    def add(self, x_TC: Tensor, full_TC: Tensor | None, keep_T: Tensor) -> None:
        """A batch of the readers' inputs, and what they are in the full-precision model."""
        for start in range(0, x_TC.shape[1], STRIP):
            self.second_II[start : start + STRIP, start:].addmm_(x_TC[:, start : start + STRIP].T, x_TC[:, start:])
        self.sink_trace += x_TC[~keep_T].double().square().sum().item()
        self.tokens += len(keep_T)
        if full_TC is not None and self.cross_II is not None:
            self.cross_II.addmm_((full_TC - x_TC).T, x_TC)

    def moments(self) -> Moments:
        """Of all batches so far. To be called once."""
        for start in range(STRIP, len(self.second_II), STRIP):
            self.second_II[start:, start - STRIP : start] = self.second_II[start - STRIP : start, start:].T
        trace = self.second_II.diagonal().double().sum().item()
        ordinary = max(0.0, 1 - self.sink_trace / trace) if trace > 0 else 1.0
        return Moments(second_II=self.second_II, tokens=self.tokens, cross_II=self.cross_II, ordinary=ordinary)


def solve(readers: Readers, solver: Solver, moments: Moments | None, scale_dtype: ScaleType, heads: Heads | None = None) -> Solution | None:
    """Quantize the site's readers, all in one matrix unless the format has one scale per tensor. Returns the last solution, for the record.

    heads: of attention among the rows, where they are to be rounded by what it makes of them.
    """
    if readers.packed is None or readers.packed.scheme.weights is None:
        return None
    with bfloat16_products(False):
        return _solve(readers, readers.packed.scheme.weights, solver, moments, scale_dtype, heads)


def _solve(
    readers: Readers, fmt: WeightFormat, solver: Solver, moments: Moments | None, scale_dtype: ScaleType, heads: Heads | None
) -> Solution | None:
    whole = fmt.granularity == "tensor"
    solution = None
    for paths in [[path] for path in readers.weights] if whole else [list(readers.weights)]:
        w_OI = readers.together(paths)
        scale_type = fitted(w_OI, fmt, scale_dtype)
        readers.factored = scale_type if isinstance(scale_type, Factored) else None
        solution = _chosen(solver, w_OI, fmt, moments, scale_type, heads)
        found, start = solution.weight, 0
        for path in paths:
            rows = slice(start, start + len(readers.weights[path]))
            grid = slice(None) if whole else rows
            zero = None if found.zero is None else found.zero[grid]
            readers.solved[path] = QuantizedWeight(found.codes[rows], found.scale[grid], zero, fmt)
            start = rows.stop
    return solution


def _chosen(solver: Solver, w_OI: Tensor, fmt: WeightFormat, moments: Moments | None, scale_dtype: ScaleType, heads: Heads | None) -> Solution:
    """The solution with the settings that held-out text chooses, where there are any to choose from."""
    if moments is None or isinstance(solver, Rtn):
        return solver.solve(w_OI, fmt, moments, scale_dtype)
    choice = choose(solver, w_OI, fmt, moments, scale_dtype)
    if heads is None:
        solution = choice.solver.solve(w_OI, fmt, moments, scale_dtype)
    else:
        solution = solve_among(w_OI, fmt, moments, heads, choice.solver, scale_dtype)
    return replace(solution, settings=choice.settings, judged=choice.judged)


def output_error(readers: Readers, moments: Moments) -> float:
    """Relative error of the readers' outputs on the inputs seen, of at most about ERROR_ROWS evenly spaced outputs of each reader.

    sqrt(tr(E H Eᵀ) / tr(W H Wᵀ)), E = Ŵ - W, low-rank paths counted in both; channels kept out of the codes are left out.
    """
    off = size = 0.0
    for path, solved in readers.solved.items():
        some = slice(None, None, -(-len(solved.codes) // ERROR_ROWS))
        w_OI = readers.whole(path, some)
        e_OI = solved.rows(some).dequantize() - readers.weights[path][some]
        off += ((e_OI @ moments.second_II) * e_OI).sum().item()
        size += ((w_OI @ moments.second_II) * w_OI).sum().item()
    return (max(off, 0.0) / size) ** 0.5 if size > 0 else 0.0


def settle(readers: Readers, walk: SiteWalk, dtype: torch.dtype, stored: torch.dtype) -> None:
    """Let the batches go on: the site's readers compute as they will at run time."""
    act = readers.activations
    layers: Mapping[str, QuantizedLinear] = {
        path: QuantizedLinear(weight, readers.biases[path], act, readers.static, dtype=dtype, side=readers.side(path))
        for path, weight in readers.solved.items()
    }
    kept = {path: weight.to(stored).to(dtype) for path, weight in readers.weights.items() if path not in layers}
    biases = {path: None if bias is None else bias.to(dtype) for path, bias in readers.biases.items()}
    name, beside = readers.site.name, bool(readers.low or readers.kept)

    def reader(path: str, x_TC: Tensor, pass_: Pass) -> Tensor:
        if path in kept:
            return nn.functional.linear(on_input(readers.chain, x_TC), kept[path], biases[path])
        if act is None:
            whole_TO: Tensor = layers[path](on_input(readers.chain, x_TC))
            return whole_TO
        if pass_.prepared is None or pass_.prepared.site != name:
            pass_.prepared = Prepared(name, readers.quantize(x_TC))
        prepared = pass_.prepared
        if prepared.left is None:
            prepared.left = layers[path].left(prepared.quantized)
        y_TO = layers[path].multiply(prepared.quantized, prepared.left)
        if beside:
            if prepared.whole is None:
                prepared.whole = on_input(readers.chain, x_TC)
            y_TO = layers[path].beside(prepared.whole, y_TO)
        if path == readers.site.readers[-1]:
            pass_.prepared = None
        return y_TO

    walk.settle(name, reader)
