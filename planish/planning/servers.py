"""Who runs a checkpoint as it was measured: read in the sources of transformers 5.23 and vLLM 0.32, seen where tests have it (docs/serving.md)."""

from collections.abc import Mapping

from ..calib.blocks.sites import Topology, kind_of
from ..calib.compressed.packing import Packed, other_grid
from ..quant.formats import NVFP4, Scheme
from ..recipe.resolve import SERVED_GROUPS, Address

PLAIN_LINEARS = ("gpt2",)  # families whose linear layers are transposed Conv1D modules, which servers and transformers refuse quantized
RENAMED = ("gpt_neox",)  # whose layers have other names inside vLLM, so that formats by name meet none
INSIDE = ("gate_up", "down")  # the sites of an MLP
BOTH = frozenset({"CPU", "GPU"})


def servers(packed: Mapping[Address, Packed | None], known: Topology) -> tuple[str, ...]:
    """planish, then transformers and vLLM if they do; "vLLM (CPU)" or "vLLM (GPU)" where it does on these only."""
    schemes, family = {how for how in packed.values() if how is not None}, known.family
    if family in PLAIN_LINEARS or misread_experts(schemes_of(packed)):
        return ("planish",)
    everywhere = all(map(runs_in_transformers, schemes)) and (not known.routers or (len(schemes) == 1 and _dequantized_right(*schemes)))
    found = ["planish", "transformers"] if everywhere else ["planish"]
    devices = BOTH.intersection(*map(vllm_devices, schemes))
    if known.routers:
        inside = {how for (_, name), how in packed.items() if how is not None and kind_of(name) in INSIDE}
        devices &= {"GPU"} if all(map(runs_experts, inside)) else set()
    if devices and (family not in RENAMED or len(schemes) == 1):
        found.append("vLLM" if devices == BOTH else f"vLLM ({min(devices)})")
    return tuple(found)


def schemes_of(packed: Mapping[Address, Packed | None]) -> dict[Address, Scheme | None]:
    """The formats alone."""
    return {address: None if how is None else how.scheme for address, how in packed.items()}


def misread_experts(schemes: Mapping[Address, Scheme | None]) -> bool:
    """Whether vLLM would run a mixture otherwise than it is stored: it takes the format of a block's first expert for all, and leaves fixed scales of
    integer activations aside where that expert has none."""
    kinds: dict[int, set[Scheme | None]] = {}
    mixtures = {block for block, name in schemes if name.startswith("down.")}
    for (block, name), scheme in schemes.items():
        if block in mixtures and kind_of(name) in INSIDE:
            kinds.setdefault(block, set()).add(scheme)
    acts = [scheme.activations for found in kinds.values() for scheme in found if scheme is not None]
    return any(len(found) > 1 for found in kinds.values()) or any(act is not None and act.type == "int" and not act.dynamic for act in acts)


def runs_experts(how: Packed) -> bool:
    """Whether vLLM's GPU build has a kernel for experts that are stored like this; on CPUs it has some for those with AMX alone."""
    fmt, act = how.scheme.weights, how.scheme.activations
    assert fmt is not None
    if act is None or fmt.kind == NVFP4:
        return fmt.type == "int" or fmt.kind == NVFP4
    return act.dynamic and act.symmetric and act.granularity == "token" and fmt.granularity == "channel" and act.bits == fmt.bits == 8


def _dequantized_right(how: Packed) -> bool:
    """Whether transformers (5.23) has right experts where all of a mixture is stored like this: it makes ordinary weights of their codes, by one
    format for all, and fails at zero points; NVFP4's come out wrong, and experts' activations it leaves in full precision."""
    fmt = how.scheme.weights
    assert fmt is not None
    return how.scheme.activations is None and fmt.symmetric and fmt.kind != NVFP4


def runs_in_transformers(how: Packed) -> bool:
    """Whether transformers runs linears that are stored like this, with the arithmetic that planish measures."""
    fmt = how.scheme.weights
    assert fmt is not None
    if other_grid(how.scheme.activations):
        return False
    return how.layout == "int-quantized" or fmt.symmetric or fmt.granularity == "tensor"  # it has no room for packed zero points (5.23)


def vllm_devices(how: Packed) -> frozenset[str]:
    """On which of CPU and GPU vLLM runs linears that are stored like this, with the arithmetic that planish measures."""
    fmt, act = how.scheme.weights, how.scheme.activations
    assert fmt is not None
    if fmt.type == "float":
        return _devices_of_floats(how.scheme)
    if act is None:
        served = how.layout == "pack-quantized" and (fmt.granularity == "channel" or fmt.group_size in SERVED_GROUPS)
        if served and fmt.bits == 4:
            return BOTH
        return frozenset({"GPU"}) if served and fmt.bits == 8 and fmt.symmetric else frozenset()
    if how.layout != "int-quantized" or act.bits != 8 or not fmt.symmetric:
        return frozenset()
    if fmt.bits == 4 and fmt.granularity == "channel" and act.granularity == "token" and not act.symmetric:
        return frozenset({"CPU"})  # its kernel's grid is each token's own range; on GPUs it has none
    if fmt.bits != 8 or fmt.granularity not in ("tensor", "channel"):
        return frozenset()
    if act.granularity == "token":
        return BOTH
    if act.dynamic or act.granularity != "tensor":
        return frozenset()
    return frozenset({"GPU"}) if act.symmetric else BOTH  # on CPUs with AMX it leaves a static symmetric scale aside


def _devices_of_floats(scheme: Scheme) -> frozenset[str]:
    """GPUs below Ada leave activations in full precision, those below Blackwell also NVFP4's. Its CPU build has one kernel, for fp8 per channel
    and token."""
    fmt, act = scheme.weights, scheme.activations
    assert fmt is not None
    if fmt.kind == NVFP4:
        return frozenset({"GPU"})
    if act is not None and act.dynamic and act.granularity != "token":
        return frozenset()  # it scales them per token
    return BOTH if fmt.granularity == "channel" and act is not None and act.dynamic else frozenset({"GPU"})
