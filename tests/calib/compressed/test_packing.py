"""Packing: what is stored comes back exactly, by planish's own reading and by the compressed-tensors library's; so do configurations."""

from typing import Literal

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from helpers_solvers import format_name, weights
from pydantic import ValidationError

from planish.calib.compressed.packing import (
    Layout,
    Packed,
    clipped,
    default_layout,
    is_own,
    pack,
    quantization_config,
    read_config,
    stored_names,
    stored_size,
    unpack,
)
from planish.quant.errors import PlanishError
from planish.quant.formats import ActivationFormat, QuantizedWeight, Scheme, WeightFormat, fitted
from planish.quant.linear import StaticGrid
from planish.quant.solvers import Rtn

FORMATS = [
    WeightFormat(bits=bits, symmetric=symmetric, granularity=granularity, group_size=16 if granularity == "group" else None)
    for bits in (2, 3, 4, 8)
    for symmetric in (True, False)
    for granularity in ("tensor", "channel", "group")
]
LAYOUTS: tuple[Layout, ...] = ("int-quantized", "pack-quantized")
GROUPS = ActivationFormat(bits=4, granularity="group", group_size=32)
FOURS = WeightFormat(bits=4, type="float", granularity="group", group_size=16)
TOKEN, STATIC = ActivationFormat(bits=8), ActivationFormat(bits=8, symmetric=False, granularity="tensor", dynamic=False)


def rounded(fmt: WeightFormat, rows: int = 10, columns: int = 48) -> QuantizedWeight:
    return Rtn().solve(weights(rows, columns).float(), fmt, None, torch.bfloat16).weight


def same(one: QuantizedWeight, other: QuantizedWeight) -> bool:
    zeros = (one.zero is None and other.zero is None) or (one.zero is not None and other.zero is not None and torch.equal(one.zero, other.zero))
    return torch.equal(one.codes.float(), other.codes.float()) and torch.equal(one.scale, other.scale) and zeros and one.format == other.format


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fmt", FORMATS, ids=format_name)
def test_unpack_is_the_inverse(fmt: WeightFormat, layout: Layout) -> None:
    weight = rounded(fmt)
    packed = Packed(Scheme(weights=fmt), layout)
    tensors = pack(weight, layout, torch.bfloat16, None)
    assert set(tensors) == set(stored_names(packed))
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    found, static = unpack(tensors, packed)
    assert same(found, weight)
    assert static is None


@pytest.mark.parametrize("rows", [1, 7, 33])
@pytest.mark.parametrize("columns", [1, 5, 31, 33])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_odd_sizes(rows: int, columns: int, bits: int) -> None:
    for symmetric in (True, False):
        weight = rounded(WeightFormat(bits=bits, symmetric=symmetric), rows, columns)
        for layout in LAYOUTS:
            assert same(unpack(pack(weight, layout, torch.bfloat16, None), Packed(Scheme(weights=weight.format), layout))[0], weight)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fmt", FORMATS, ids=format_name)
def test_the_library_unpacks_the_same_weight(fmt: WeightFormat, layout: Layout) -> None:
    weight = rounded(fmt)
    config = QuantizationConfig.model_validate(quantization_config({"a": Packed(Scheme(weights=fmt), layout)}, []))
    scheme = config.config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(layout)
    tensors = pack(weight, layout, torch.bfloat16, None)
    tensors["weight_scale"] = tensors["weight_scale"].float()
    assert torch.equal(compressor.decompress(tensors, scheme)["weight"], weight.dequantize())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_static_grids(symmetric: bool, layout: Layout) -> None:
    act = ActivationFormat(bits=8, symmetric=symmetric, granularity="tensor", dynamic=False)
    grid = StaticGrid(torch.tensor([[0.5]]), None if symmetric else torch.tensor([[-128.0]]))
    packed = Packed(Scheme(weights=FORMATS[0], activations=act), layout)
    tensors = [pack(rounded(FORMATS[0]), layout, torch.bfloat16, grid) for _ in range(2)]
    assert set(tensors[0]) == set(stored_names(packed))
    assert tensors[0]["input_scale"].data_ptr() != tensors[1]["input_scale"].data_ptr()
    found = unpack(tensors[0], packed)[1]
    assert found is not None
    assert torch.equal(found.scale, grid.scale)
    assert (found.zero is None and grid.zero is None) or (found.zero is not None and grid.zero is not None and torch.equal(found.zero, grid.zero))


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_floats_come_back_and_the_library_reads_them(granularity: Literal["channel", "tensor"]) -> None:
    weight = rounded(WeightFormat(bits=8, type="float", granularity=granularity))
    act = ActivationFormat(bits=8, type="float", granularity="tensor", dynamic=False)
    packed, grid = Packed(Scheme(weights=weight.format, activations=act), "float-quantized"), StaticGrid(torch.tensor([[0.5]]), None)
    tensors = pack(weight, packed.layout, torch.bfloat16, grid)
    assert set(tensors) == set(stored_names(packed)) == {"weight", "weight_scale", "input_scale"}
    assert tensors["weight"].dtype == torch.float8_e4m3fn
    found, static = unpack(tensors, packed)
    assert same(found, weight)
    assert static is not None
    assert torch.equal(static.scale, grid.scale)
    scheme = QuantizationConfig.model_validate(quantization_config({"a": packed}, [])).config_groups["group_0"]
    library = BaseCompressor.get_value_from_registry("float-quantized")
    values = library.decompress({**tensors, "weight_scale": tensors["weight_scale"].float()}, scheme)["weight"]
    assert torch.equal(values.float(), weight.dequantize())


@pytest.mark.parametrize("with_inputs", [True, False])
def test_fours_come_back_and_the_library_reads_them(with_inputs: bool) -> None:
    weight = rounded(FOURS)
    act = ActivationFormat(bits=4, type="float", granularity="group", group_size=16) if with_inputs else None
    packed = Packed(Scheme(weights=FOURS, activations=act), default_layout(Scheme(weights=FOURS, activations=act)))
    grid = StaticGrid(torch.tensor([[2.0**-7]]), None) if with_inputs else None
    tensors = pack(weight, packed.layout, fitted(weights(10, 48).float(), FOURS, torch.bfloat16), grid)
    assert set(tensors) == set(stored_names(packed))
    assert sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith("weight")) == stored_size(packed, 10, 48, 2)
    found, static = unpack(tensors, packed)
    assert same(found, weight)
    assert (static is None) == (grid is None)
    assert static is None or torch.equal(static.scale, torch.tensor([[2.0**-7]]))
    scheme = QuantizationConfig.model_validate(quantization_config({"a": packed}, [])).config_groups["group_0"]
    library = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    assert torch.equal(library.decompress(tensors, scheme)["weight"], weight.dequantize().bfloat16())
    again = library.compress({"weight": weight.dequantize(), "weight_scale": tensors["weight_scale"].float(), **_global(tensors)}, scheme)
    assert torch.equal(again["weight_packed"] & 0x77, tensors["weight_packed"] & 0x77)  # but for the sign of zeros
    assert torch.equal(again["weight_scale"].float(), tensors["weight_scale"].float())


def _global(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"weight_global_scale": tensors["weight_global_scale"]}


def test_what_the_library_calls_nvfp4() -> None:
    """Its preset is what planish declares; one of its checkpoints, whose factors are no powers of two, is read as the library reads it."""
    act = ActivationFormat(bits=4, type="float", granularity="group", group_size=16)
    packed = Packed(Scheme(weights=FOURS, activations=act), "nvfp4-pack-quantized")
    mine = QuantizationConfig.model_validate(quantization_config({"a": packed}, [])).config_groups["group_0"]
    theirs = preset_name_to_scheme("NVFP4", ["Linear"])
    for one, other in ((mine.weights, theirs.weights), (mine.input_activations, theirs.input_activations)):
        what = ("num_bits", "type", "symmetric", "group_size", "strategy", "dynamic", "scale_dtype")
        assert [getattr(one, name) for name in what] == [getattr(other, name) for name in what]
    w_OI = weights(10, 48).float()
    factor = 2688 / w_OI.abs().max()
    scale = (w_OI.unflatten(1, (3, 16)).abs().amax(2) / 6 * factor).to(torch.float8_e4m3fn)
    library = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    tensors = library.compress({"weight": w_OI, "weight_scale": scale.float(), "weight_global_scale": factor.reshape(1)}, theirs)
    found, static = unpack({**tensors, "input_global_scale": torch.tensor([3.0])}, packed)
    assert torch.equal(found.dequantize().bfloat16(), library.decompress(tensors, theirs)["weight"])
    assert static is not None
    assert static.scale.item() == pytest.approx(1 / 3)


def test_default_layouts() -> None:
    assert default_layout(Scheme(weights=FOURS)) == "nvfp4-pack-quantized"
    assert default_layout(Scheme(weights=WeightFormat(bits=8, type="float"))) == "float-quantized"
    four = WeightFormat(bits=4)
    assert default_layout(Scheme(weights=four)) == "pack-quantized"
    assert default_layout(Scheme(weights=four, activations=TOKEN)) == "int-quantized"
    assert default_layout(Scheme(weights=four, activations=TOKEN), own=True) == "pack-quantized"


MIXED = {
    "m.0.q": Packed(Scheme(weights=WeightFormat(bits=8), activations=TOKEN), "int-quantized"),
    "m.0.d": Packed(Scheme(weights=WeightFormat(bits=8), activations=STATIC), "int-quantized"),
    "m.1.q": Packed(Scheme(weights=WeightFormat(bits=4, granularity="group", group_size=32)), "pack-quantized"),
    "m.11.q": Packed(Scheme(weights=WeightFormat(bits=4, symmetric=False)), "pack-quantized"),
    "m.1.d": Packed(Scheme(weights=WeightFormat(bits=4, symmetric=False)), "pack-quantized"),
    "m.2.d": Packed(Scheme(weights=WeightFormat(bits=4, granularity="tensor"), activations=GROUPS), "int-quantized"),
    "m.3.q": Packed(Scheme(weights=WeightFormat(bits=8, type="float"), activations=ActivationFormat(bits=8, type="float")), "float-quantized"),
}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("linears", [MIXED, {"m.0.q": MIXED["m.0.q"], "m.1.q": MIXED["m.0.q"]}], ids=["mixed", "alone"])
def test_configurations_round_trip(linears: dict[str, Packed], transposed: bool) -> None:
    """Mixed schemes, names that are prefixes of others, layers left alone."""
    kept = ["lm_head", "m.2.q"]
    data = quantization_config(linears, kept, transposed=transposed)
    assert data["ignore"] == kept
    assert data["quantization_status"] == "compressed"
    before = str(data)
    assert read_config(data, [*linears, *kept]) == linears
    assert str(data) == before
    assert is_own(data) == transposed
    if transposed:
        with pytest.raises(ValidationError, match="conv1d-"):
            QuantizationConfig.model_validate(data)
    else:
        QuantizationConfig.model_validate(data)


def test_formats_of_the_whole() -> None:
    assert quantization_config(MIXED, [])["format"] == "mixed-precision"
    alone = quantization_config({"a": MIXED["m.1.q"]}, [])
    assert alone["format"] == "pack-quantized"
    assert alone["config_groups"]["group_0"]["targets"] == ["Linear"]


def test_foreign_formats_are_refused() -> None:
    data = quantization_config({"a": MIXED["m.0.q"]}, [])
    group = data["config_groups"]["group_0"]
    for changes, words in (
        (
            {"format": "nvfp4-pack-quantized", "weights": {**group["weights"], "type": "float"}},
            "a: fp8 stored as nvfp4-pack-quantized; planish reads float-quantized of them",
        ),
        ({"format": "float-quantized", "weights": {"num_bits": 4, "type": "float"}}, "a: floats of 4 bits per tensor; planish runs fp8"),
        ({"format": "int-quantized", "weights": {"num_bits": 8, "type": "float"}}, "a: fp8 stored as int-quantized"),
        (
            {"format": "mxfp4-pack-quantized", "weights": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}},
            r"a: floats of 4 bits per group in groups of 32; planish runs fp8 \(e4m3\) and NVFP4",
        ),
        ({"format": "pack-quantized", "weights": {"num_bits": 4, "strategy": "tensor_group", "group_size": 16}}, "strategy tensor_group is none of"),
    ):
        with pytest.raises(PlanishError, match=words):
            read_config({**data, "config_groups": {"group_0": {**group, **changes}}}, ["a"])


FLOAT = {"num_bits": 8, "type": "float"}


@pytest.mark.parametrize(
    ("whole", "group", "message"),
    [
        ({"kv_cache_scheme": FLOAT}, {}, r"^quantization_config\.kv_cache_scheme: planish runs quantized weights and inputs of linear layers alone"),
        ({"transform_config": {"config_groups": {"R4": {}}}}, {}, r"quantization_config\.transform_config: planish runs"),
        ({}, {"output_activations": FLOAT}, r"config_groups\.group_0\.output_activations: planish runs"),
        ({}, {"targets": ["LlamaAttention"]}, r"config_groups\.group_0\.targets \['LlamaAttention'\]: planish runs"),
        ({}, {"input_activations": {**FLOAT, "strategy": "token", "dynamic": True}}, "weights are of type int, activations of type float"),
    ],
)
def test_what_planish_would_leave_out_is_refused(whole: dict[str, object], group: dict[str, object], message: str) -> None:
    """Measured without it, the checkpoint would be another model than the one that its servers run."""
    data = quantization_config({"a": Packed(Scheme(weights=WeightFormat(bits=4)), "pack-quantized")}, ["b"])
    first = data["config_groups"]["group_0"]
    assert read_config({**data, "kv_cache_scheme": None, "transform_config": {}}, ["a", "b"])
    with pytest.raises(PlanishError, match=message):
        read_config({**data, **whole, "config_groups": {"group_0": {**first, **group}}}, ["a", "b"])


def test_a_clip_of_activations_is_not_the_librarys_to_know() -> None:
    plain = Packed(Scheme(weights=WeightFormat(bits=4), activations=ActivationFormat(bits=4)), "pack-quantized")
    tight = clipped(plain, 0.9)
    assert tight.scheme.activations is not None
    assert tight.scheme.activations.clip == 0.9
    data = quantization_config({"a": plain, "b": tight}, [], extended=True)
    assert len(data["config_groups"]) == 1
    assert data["format"] == "planish-pack-quantized"
    assert read_config(data, ["a", "b"]) == {"a": plain, "b": plain}
