"""A stored model on packed kernels: what users run. Verification and the walk run the reference, QuantizedLinear, whose arithmetic is exact.

Linears become PackedLinear, the readers of one site one product; RMS norms, attention's parts and gated MLPs of the standard form become single
passes over memory, those but attention itself after they were held against the model's own on random tokens. What no kernel expresses stays as it
is, layer by layer; `kernels_used` says what runs on what.

Shape suffixes: T tokens, C channels, I a gated MLP's inner ones.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from ...quant.errors import PlanishError
from ...quant.kernels import cpu, native, tiles
from ...quant.kernels.floats import FloatLinear, runs_floats
from ...quant.kernels.joined import JoinedLinear, Part, join, joinable
from ...quant.kernels.modules import PackedLinear, WideLinear, few_tokens_group
from ...quant.linear import Parts, QuantizedLinear, share_input
from ...quant.transforms.factors import Blocks, on_input
from ..blocks.experts import Experts
from ..blocks.families import family_of
from ..blocks.fusing import norm_readers
from ..blocks.sites import BlockTopology, Site, Topology
from ..blocks.topology import topology
from .attention_passes import passes, put_passes
from .quantized import put
from .stored import StoredCheckpoint

Kernels = Literal["auto", "packed", "reference"]
ENVIRONMENT = "PLANISH_KERNELS"  # what auto means, for programs that do not ask
_PROBES = 4  # random tokens
_COUNTS = (1, 24, 64, 65)  # of tokens: each takes another tile
_MANY = 2049  # from so many on block transforms have a kernel of their own
_TESTED = ("cpu",)  # devices whose kernels the tests run; on others each layer is held against the reference first
_CLOSE = 0.1  # of the output's norm: single 4-bit codes may go another way, but a wrong layout is off by its whole length


def pick_kernels(kernels: Kernels, dtype: torch.dtype, device: torch.device | str) -> bool:
    """Whether packed kernels are to run. auto: where float32 does not ask for exact numbers, on a CPU whose products of codes are quick, in
    bfloat16, unless there is a GPU to which the model may be moved yet, which packed weights cannot be; on CUDA from capability 8.0 on, with Triton,
    for codes take a quarter of the memory there. PlanishError: no such kernels."""
    kernels, where = _asked(kernels), torch.device(device)
    if kernels != "auto":
        return kernels == "packed"
    if where.type == "cuda":
        return dtype != torch.float32 and find_spec("triton") is not None and torch.cuda.get_device_capability(where) >= (8, 0)
    integers = tiles.engine() > 0 or bool(torch.cpu.get_capabilities().get("avx512_vnni"))
    return where.type == "cpu" and dtype == torch.bfloat16 and integers and not torch.cuda.is_available()


def _asked(kernels: Kernels) -> Kernels:
    known = ", ".join(get_args(Kernels))
    if kernels not in get_args(Kernels):
        raise PlanishError(f"kernels is {kernels!r}. Give one of {known}.")
    asked: Any = os.environ.get(ENVIRONMENT, "auto") if kernels == "auto" else kernels
    if asked not in get_args(Kernels):
        raise PlanishError(f"The environment has {ENVIRONMENT}={asked}. Give one of {known}, or unset it.")
    chosen: Kernels = asked
    return chosen


def put_linears(module: nn.Module, checkpoint: StoredCheckpoint, root: str, dtype: torch.dtype, device: torch.device | str) -> None:
    """Let them stand in the module, whose attention holds keys and values as declared. root: what the checkpoint's names begin with, and paths in the
    module do not."""
    names = [name for name in checkpoint.packed if name.startswith(root)]
    for readers in checkpoint.sites(names) if family_of(checkpoint.config) is not None else [[name] for name in names]:
        layers = packed_readers([found for _, found in checkpoint.parts(readers, dtype, device)])
        for name, layer in zip(readers, layers, strict=True):
            put(module, name.removeprefix(root), layer)
    checkpoint.hold_key_values(module, root)


def packed_readers(parts: Sequence[Parts]) -> list[nn.Module]:
    """The readers of one input, ready to run: each a Part of one product; or PackedLinear; or QuantizedLinear, where no kernel expresses the layer,
    wins, or computes what it should."""
    if len(parts) > 1 and all(map(_wins, parts)) and joinable(parts):
        joined = JoinedLinear(parts)
        if _trusted(joined.linear, join(parts)):
            return [joined.part(index) for index in range(len(parts))]
    alone = [_alone(part) for part in parts]
    share_input([layer for layer in alone if isinstance(layer, QuantizedLinear)])
    return list(alone)


def _alone(parts: Parts) -> PackedLinear | FloatLinear | QuantizedLinear:
    if runs_floats(parts) and _trusted(floats := FloatLinear(parts), parts):
        return floats
    if _wins(parts) and _trusted(packed := PackedLinear(*parts), parts):
        return packed
    return QuantizedLinear(*parts)


@torch.no_grad()
def _trusted(packed: PackedLinear | FloatLinear, parts: Parts) -> bool:
    """Whether the layer computes what QuantizedLinear does, few tokens and many; only asked on devices whose kernels the tests do not run."""
    device = parts.weight.codes.device
    if device.type in _TESTED:
        return True
    counts = (*_COUNTS, _MANY) if parts.chain and isinstance(parts.chain[-1], Blocks) else _COUNTS
    reference, shape = QuantizedLinear(*parts), f"{packed.out_features} x {packed.in_features}"
    for count in counts:
        x_TI = _random(count, packed.in_features, device, parts.dtype)
        expected, found = reference(x_TI).float(), _attempt(partial(packed, x_TI), f"A packed layer of {shape}", device)
        if found is None:
            return False
        error = float((found.float() - expected).norm() / expected.norm())
        if not error <= _CLOSE:
            warnings.warn(
                f"A packed layer of {shape} is off by {error:.3g} of its output on this {device.type}: the reference runs instead. Please report it.",
                stacklevel=2,
            )
            return False
    return True


def _random(tokens: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The same tokens on every device, whatever torch's default is."""
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(0), device="cpu").to(device, dtype)


def _attempt(layer: Callable[[], Tensor], what: str, device: torch.device) -> Tensor | None:
    """Its output; None, and a warning, where it does not run on a device whose kernels the tests do not run. PlanishError as it is: something
    is missing that can be installed."""
    try:
        return layer()
    except PlanishError:
        raise
    except Exception as failed:
        if device.type in _TESTED:
            raise
        reason = f"{type(failed).__name__}: {failed}"  # of Triton, its compiler or CUDA: too little shared memory, no C compiler
        warnings.warn(f"{what} fails on this {device.type} ({reason}): the reference runs instead. Please report it.", stacklevel=2)
        return None


def _wins(parts: Parts) -> bool:
    """Weight-only layers on a CPU need a kernel for few tokens: dequantizing at every token costs more than the reference."""
    if not PackedLinear.supports(parts.weight, parts.activations, parts.side):
        return False
    if parts.activations is not None or parts.weight.codes.device.type != "cpu":
        return True
    return cpu.decodes(parts.weight.codes.shape[1], parts.weight.scale.shape[1]) or few_tokens_group(parts.weight, parts.dtype) is not None


def fuse(model: nn.Module, config: PretrainedConfig, root: str, dtype: torch.dtype) -> None:
    """Fewer passes for the gated MLPs and norms of a loaded model, on a CPU for its attention modules too, where they compute what its own do; in
    float32 the products of what is in full precision, where bfloat16's are slow.

    root: as in put_linears.
    """
    device = next(model.parameters()).device
    if device.type == "cpu" and dtype == torch.bfloat16 and not cpu.multiplies_bfloat16():
        _widen(model)
    if family_of(config) is None or (device.type == "cpu" and native.found().library is None):
        return
    known = topology(config)
    for index in range(known.block_count):
        block, mine = known.block_name(index).removeprefix(root), known.block(index)
        for path in _mlps(mine):
            _replace(model, f"{block}.{path}", GatedMlp.of, dtype, device)
        for site in mine.sites if known.norm_kind == "rms" else ():
            _join_norm(model.get_submodule(block), site, dtype)
        if mine.attention is not None and device.type == "cpu":
            put_passes(model.get_submodule(f"{block}.{mine.attention.module}"), dtype)
    for path in _norms(known):
        _replace(model, path.removeprefix(root), RmsNorm.of, dtype, device)


def _widen(model: nn.Module) -> None:
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = WideLinear


def fuse_experts(experts: Experts, dtype: torch.dtype, device: torch.device) -> None:
    """Fewer passes for each, where they compute what its own do."""
    for number in range(len(experts)):
        _replace(experts, str(number), GatedMlp.of, dtype, device)


def _replace(model: nn.Module, path: str, make: "Callable[[nn.Module], RmsNorm | GatedMlp | None]", dtype: torch.dtype, device: torch.device) -> None:
    whole = model.get_submodule(path)
    if (fused := make(whole)) is not None and agree(whole, fused, fused.width, dtype, device):
        put(model, path, fused)


def _join_norm(block: nn.Module, site: Site, dtype: torch.dtype) -> None:
    """Where all readers of a norm's output are one product that can, it norms its input and quantizes it in one pass, and the norm lets all pass."""
    if site.host is None or site.host.kind != "norm":
        return
    plain, linear = block.get_submodule(site.host.module), _product([block.get_submodule(path) for path in site.readers])
    norm = RmsNorm.of(plain)
    if norm is None or linear is None or not linear.takes_norm:
        return
    behind = linear.behind(norm.weight.detach(), norm.eps)
    if agree(lambda x: linear(plain(x)), behind, norm.width, dtype, norm.weight.device):
        linear.norm = behind.norm
        put(block, site.host.module, Passed())


def _product(readers: Sequence[nn.Module]) -> PackedLinear | None:
    """What computes all of these readers, if it is one packed linear."""
    first = readers[0]
    if isinstance(first, Part):
        whole = len(readers) == len(first.joined.sizes) and all(isinstance(reader, Part) and reader.joined is first.joined for reader in readers)
        return first.joined.linear if whole else None
    return first if len(readers) == 1 and isinstance(first, PackedLinear) else None


def _norms(known: Topology) -> list[str]:
    if known.norm_kind != "rms":
        return []
    found = [f"{known.block_name(index)}.{path}" for index in range(known.block_count) for path in norm_readers(known.block(index))]
    return found if known.norm is None else [*found, known.norm]


def _mlps(known: BlockTopology) -> list[str]:
    """From the block."""
    paths = (site.readers[0].rpartition(".")[0] for site in known.inside)
    return [path for path in paths if path]


@torch.no_grad()
def agree(plain: Callable[[Tensor], Tensor], fused: Callable[[Tensor], Tensor], width: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether both make the same of random tokens of so many channels, but for rounding to dtype."""
    x_TC = _random(_PROBES, width, device, dtype)
    found, expected = _attempt(lambda: fused(x_TC), "A fused pass", device), plain(x_TC).float()
    return found is not None and bool((found.float() - expected).norm() <= 8 * torch.finfo(dtype).eps * expected.norm())


class Passed(nn.Identity):
    """Where a norm was that its readers do now."""


class RmsNorm(nn.Module):
    """x / sqrt(mean(x²) + eps), rounded to x's dtype, times weight (C,), rounded: x (..., C). In one pass; on a GPU rounded once."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps
        self.width = len(weight)

    @staticmethod
    def of(norm: nn.Module) -> "RmsNorm | None":
        """In the place of a norm with one weight, if it looks like one of this kind."""
        weight, eps = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        return RmsNorm(weight, eps) if isinstance(weight, nn.Parameter) and weight.dim() == 1 and isinstance(eps, float) else None

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., C). Returns the same shape."""
        if not torch.compiler.is_compiling() and (y_TC := native.rms_norm(x.reshape(-1, self.width), self.weight, self.eps)) is not None:
            return y_TC.view(x.shape)
        if x.is_cuda:
            return nn.functional.rms_norm(x, (self.width,), self.weight, self.eps)
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class GatedMlp(nn.Module):
    """down(act(gate(x)) * up(x)), x (..., C), where gate and up are one product and act is SiLU: SiLU, product and quantization in one pass."""

    def __init__(self, gate: Part, up: Part, down: PackedLinear, act: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = gate, up, down, act
        self.width, self.inner = gate.in_features, gate.out_features

    @staticmethod
    def of(mlp: nn.Module) -> "GatedMlp | None":
        """In the place of an MLP of these four parts, if they are of this kind."""
        if set(dict(mlp.named_children())) != {"gate_proj", "up_proj", "down_proj", "act_fn"}:
            return None
        gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        if not (isinstance(gate, Part) and isinstance(up, Part) and isinstance(down, PackedLinear) and gate.joined is up.joined):
            return None
        fmt = down.activations
        both = gate.joined.linear.activations
        plain = (
            fmt is not None
            and fmt.granularity == "token"
            and both is not None
            and both.granularity == "token"
            and not down.chain
            and down.low is None
        )
        assert isinstance(mlp.act_fn, nn.Module)
        alike = gate.joined.linear.tiled == down.tiled and (not down.tiled or gate.out_features % 16 == 0)
        both_first = gate.index == 0 and up.index == 1 and len(gate.joined.sizes) == 2
        return GatedMlp(gate, up, down, mlp.act_fn) if plain and alike and both_first else None

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., C). Returns the same shape."""
        fmt, both, down = self.down_proj.activations, self.gate_proj.joined.linear, self.down_proj
        assert fmt is not None
        if down.tiled:
            x_TC = on_input(both.chain, x.reshape(-1, self.width))
            y_TC: Tensor = torch.ops.planish.mlp_tiles(x_TC, *both.tiles_operands(), *down.tiles_operands(), cpu.LEAST)
            return y_TC.view(x.shape)
        if torch.compiler.is_compiling() and x.device.type == "cpu":
            y: Tensor = down(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
            return y
        x_TC = x.reshape(-1, self.width)
        grid = cpu.grid(fmt.bits, fmt.symmetric, fmt.clip)
        read = both.codes(x_TC)
        codes = cpu.gated_codes(read, both.weight, both.w_scale, both.w_sum, both.bias, x.dtype, grid)
        if codes is None:
            gate_TI, up_TI = both.product(read, x.dtype).chunk(2, -1)
            codes = torch.ops.planish.silu_mul_quantize(gate_TI, up_TI, fmt.bits, fmt.symmetric, fmt.clip, down.packed_input)
        return down.product(codes, x.dtype).view(x.shape)


def kernels_used(model: nn.Module) -> dict[str, str]:
    """What each quantized linear and each fused module of a loaded model runs on, by its path."""
    kinds = {Part: "packed, one product with its site's other readers", PackedLinear: "packed", FloatLinear: "packed"}
    kinds |= {QuantizedLinear: "reference", RmsNorm: "one pass"}
    kinds |= {WideLinear: "full precision, products in float32"}
    kinds |= {Passed: "in one pass with its readers' quantization"}
    kinds |= {GatedMlp: "SiLU, product and quantization in one pass"}
    named = {name: kinds[type(module)] for name, module in model.named_modules() if type(module) in kinds}
    named |= {name: said for name, module in model.named_modules() if (said := passes(module))}
    return {name: kind for name, kind in named.items() if not name.endswith(".joined.linear")}
