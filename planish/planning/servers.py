"""Who runs a checkpoint as it was measured: read in the sources of transformers 5.23 and vLLM 0.32, seen where tests have it (docs/serving.md)."""

from collections.abc import Iterable

from ..calib.compressed.packing import Packed, other_grid
from ..quant.formats import NVFP4, Scheme
from ..recipe.resolve import SERVED_GROUPS

PLAIN_LINEARS = ("gpt2",)  # families whose linear layers are transposed Conv1D modules, which servers and transformers refuse quantized
RENAMED = ("gpt_neox",)  # whose layers have other names inside vLLM, so that formats by name meet none
BOTH = frozenset({"CPU", "GPU"})


def servers(packed: Iterable[Packed | None], family: str) -> tuple[str, ...]:
    """planish, then transformers and vLLM if they do; "vLLM (CPU)" or "vLLM (GPU)" where it does on these only."""
    schemes = {how for how in packed if how is not None}
    if family in PLAIN_LINEARS:
        return ("planish",)
    found = ["planish", "transformers"] if all(map(runs_in_transformers, schemes)) else ["planish"]
    devices = BOTH.intersection(*map(vllm_devices, schemes))
    if devices and (family not in RENAMED or len(schemes) == 1):
        found.append("vLLM" if devices == BOTH else f"vLLM ({min(devices)})")
    return tuple(found)


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
