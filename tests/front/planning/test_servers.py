"""Who is said to run a checkpoint, by format: what vLLM 0.32 has kernels for, scheme by scheme."""

import itertools

import pytest
from tiny_models import CONFIGS
from transformers import AutoConfig

from planish.calib.blocks.topology import topology
from planish.calib.compressed.packing import Layout, Packed
from planish.planning.servers import servers
from planish.quant.formats import ActivationFormat, Scheme, WeightFormat

EIGHT, FOUR = WeightFormat(bits=8), WeightFormat(bits=4)
TOKEN, OWN_RANGE = ActivationFormat(bits=8), ActivationFormat(bits=8, symmetric=False)
STATIC = ActivationFormat(bits=8, symmetric=False, granularity="tensor", dynamic=False)
FLOAT, FLOATS = WeightFormat(bits=8, type="float"), ActivationFormat(bits=8, type="float")
FOUR_FLOAT = WeightFormat(bits=4, type="float", granularity="group", group_size=16)
FOUR_FLOATS = ActivationFormat(bits=4, type="float", granularity="group", group_size=16)
PLAIN: Layout = "int-quantized"
CASES: dict[str, tuple[WeightFormat, ActivationFormat | None, Layout, str | None]] = {
    "w8a8": (EIGHT, TOKEN, PLAIN, "vLLM"),
    "w8a8, asymmetric": (EIGHT, OWN_RANGE, PLAIN, "vLLM"),
    "w8a8, weights per tensor": (WeightFormat(bits=8, granularity="tensor"), TOKEN, PLAIN, "vLLM"),
    "w8a8, static": (EIGHT, STATIC, PLAIN, "vLLM"),
    "w8a8, static and symmetric": (EIGHT, ActivationFormat(bits=8, granularity="tensor", dynamic=False), PLAIN, "vLLM (GPU)"),
    "w8a8, dynamic per tensor": (EIGHT, ActivationFormat(bits=8, granularity="tensor"), PLAIN, None),
    "w8a8, activations in groups": (EIGHT, ActivationFormat(bits=8, granularity="group", group_size=32), PLAIN, None),
    "w8a8, weights in groups": (WeightFormat(bits=8, granularity="group", group_size=32), TOKEN, PLAIN, None),
    "w8a8, asymmetric weights": (WeightFormat(bits=8, symmetric=False), TOKEN, PLAIN, None),
    "w8a8, packed": (EIGHT, TOKEN, "pack-quantized", None),
    "w4a8": (FOUR, OWN_RANGE, PLAIN, "vLLM (CPU)"),
    "w4a8, symmetric activations": (FOUR, TOKEN, PLAIN, None),
    "w4a8, static": (FOUR, STATIC, PLAIN, None),
    "w4a8, weights per tensor": (WeightFormat(bits=4, granularity="tensor"), OWN_RANGE, PLAIN, None),
    "w4a4": (FOUR, ActivationFormat(bits=4), PLAIN, None),
    "w4a4, asymmetric": (FOUR, ActivationFormat(bits=4, symmetric=False), PLAIN, None),
    "w4a16": (FOUR, None, "pack-quantized", "vLLM"),
    "w4a16, asymmetric": (WeightFormat(bits=4, symmetric=False), None, "pack-quantized", "vLLM"),
    "w4a16, groups of 64": (WeightFormat(bits=4, granularity="group", group_size=64), None, "pack-quantized", "vLLM"),
    "w4a16, groups of 48": (WeightFormat(bits=4, granularity="group", group_size=48), None, "pack-quantized", None),
    "w4a16, not packed": (FOUR, None, PLAIN, None),
    "w8a16": (EIGHT, None, "pack-quantized", "vLLM (GPU)"),
    "w8a16, asymmetric": (WeightFormat(bits=8, symmetric=False), None, "pack-quantized", None),
    "fp8": (FLOAT, FLOATS, "float-quantized", "vLLM"),
    "fp8, weights per tensor": (WeightFormat(bits=8, type="float", granularity="tensor"), FLOATS, "float-quantized", "vLLM (GPU)"),
    "fp8, static": (FLOAT, ActivationFormat(bits=8, type="float", granularity="tensor", dynamic=False), "float-quantized", "vLLM (GPU)"),
    "fp8, dynamic per tensor": (FLOAT, ActivationFormat(bits=8, type="float", granularity="tensor"), "float-quantized", None),
    "fp8, weights alone": (FLOAT, None, "float-quantized", "vLLM (GPU)"),
    "nvfp4": (FOUR_FLOAT, FOUR_FLOATS, "nvfp4-pack-quantized", "vLLM (GPU)"),
    "nvfp4, weights alone": (FOUR_FLOAT, None, "nvfp4-pack-quantized", "vLLM (GPU)"),
    "w3a16": (WeightFormat(bits=3), None, "pack-quantized", None),
}


def packed(name: str) -> Packed:
    weights, activations, layout, _ = CASES[name]
    return Packed(Scheme(weights=weights, activations=activations), layout)


def run_by(*kinds: Packed | None, family: str = "llama") -> tuple[str, ...]:
    """Of a model whose sites are stored like these, one after the other."""
    known = topology(AutoConfig.for_model(**CONFIGS[family]))
    return servers({(0, site.name): kind for site, kind in zip(known.block(0).sites, itertools.cycle(kinds), strict=False)}, known)


@pytest.mark.parametrize("name", CASES)
def test_of_one_format(name: str) -> None:
    found = [server for server in run_by(packed(name), None) if server.startswith("vLLM")]
    assert found == ([] if CASES[name][3] is None else [CASES[name][3]])


def test_of_several() -> None:
    assert run_by(packed("w8a8"), packed("w4a16")) == ("planish", "transformers", "vLLM")
    assert run_by(packed("w8a8"), packed("w4a8"))[-1] == "vLLM (CPU)"
    assert run_by(packed("w4a8"), packed("w8a16")) == ("planish", "transformers")
    assert run_by(packed("w8a8"), packed("w4a4, asymmetric")) == ("planish", "transformers")
    assert run_by(packed("w8a8"), packed("w4a4")) == ("planish",)  # transformers has another grid
    assert run_by(packed("w4a16, asymmetric")) == ("planish", "vLLM")  # transformers has no room for packed zero points
    one = Packed(Scheme(weights=WeightFormat(bits=4, symmetric=False, granularity="tensor")), "pack-quantized")  # whose zero point is not packed
    assert run_by(one) == ("planish", "transformers")
    assert run_by(packed("w8a8"), family="gpt2") == ("planish",)
    assert run_by(packed("w8a8"), family="gpt_neox")[-1] == "vLLM"
    assert run_by(packed("w8a8"), packed("w4a16"), family="gpt_neox")[-1] == "transformers"


MIXTURES_SERVED = {
    "w8a8": ("planish", "vLLM (GPU)"),
    "w8a8, asymmetric": ("planish",),
    "w8a8, static": ("planish",),
    "w4a8": ("planish",),
    "w4a16": ("planish", "transformers", "vLLM (GPU)"),
    "w4a16, asymmetric": ("planish", "vLLM (GPU)"),
    "w8a16": ("planish", "transformers", "vLLM (GPU)"),
    "fp8": ("planish", "vLLM (GPU)"),
    "fp8, weights alone": ("planish", "transformers"),
    "nvfp4": ("planish", "vLLM (GPU)"),
    "nvfp4, weights alone": ("planish", "vLLM (GPU)"),
    "w3a16": ("planish", "transformers"),
}


@pytest.mark.parametrize("name", MIXTURES_SERVED)
def test_of_mixtures(name: str) -> None:
    assert run_by(packed(name), family="mixtral") == MIXTURES_SERVED[name]


def test_of_mixtures_with_several() -> None:
    known = topology(AutoConfig.for_model(**CONFIGS["mixtral"]))
    kinds = {(0, site.name): packed("w8a8") for site in known.block(0).sites}
    assert servers({**kinds, (0, "qkv"): None}, known) == ("planish", "vLLM (GPU)")
    assert servers({**kinds, (0, "down.2"): None}, known) == ("planish",)
    assert servers({**kinds, (0, "down.2"): packed("w4a16")}, known) == ("planish",)
    assert servers({**kinds, (0, "qkv"): packed("w4a16")}, known) == ("planish", "vLLM (GPU)")
    weights = {(0, site.name): packed("w4a16") for site in known.block(0).sites}
    assert servers({**weights, (0, "qkv"): packed("w8a16")}, known) == ("planish", "vLLM (GPU)")  # transformers reads all by one format
