"""Rounding to nearest against plain arithmetic."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from helpers_solvers import FORMATS, all_codes, format_name, weights

from planish.quant.errors import PlanishError
from planish.quant.formats import WeightFormat
from planish.quant.solvers import SOLVERS, Clip, Rtn
from planish.quant.solvers.clip import fit_grid


@pytest.mark.parametrize("clip", [None, Clip()], ids=["plain", "clip"])
@pytest.mark.parametrize("fmt", FORMATS, ids=format_name)
def test_every_weight_goes_to_the_nearest_point_of_its_grid(fmt, clip):
    w_OI = weights(5, 48).float()
    weight = Rtn(clip=clip).solve(w_OI, fmt, None, torch.bfloat16).weight
    assert torch.equal(weight.scale, fit_grid(w_OI, fmt, clip, torch.bfloat16)[0])
    for o in range(5):
        for i in range(48):
            row, group = (0, 0) if fmt.granularity == "tensor" else (o, 0 if fmt.group_size is None else i // fmt.group_size)
            zero = 0 if weight.zero is None else weight.zero[row, group]
            points = (all_codes(fmt.kind) - zero) * weight.scale[row, group]
            assert (weight.dequantize()[o, i] - w_OI[o, i]).abs() <= (points - w_OI[o, i]).abs().min() * (1 + 1e-5) + 1e-9


@hypothesis.given(out=st.integers(1, 4), groups=st.integers(1, 3), size=st.integers(2, 9), bits=st.integers(2, 8), symmetric=st.booleans())
@hypothesis.settings(max_examples=30, deadline=None)
def test_error_is_at_most_half_a_step(out, groups, size, bits, symmetric):
    w_OI = weights(out, groups * size).float()
    w_OI[-1] = 0
    fmt = WeightFormat(bits=bits, symmetric=symmetric, granularity="group", group_size=size)
    weight = Rtn().solve(w_OI, fmt, None, torch.float32).weight
    step = weight.scale.repeat_interleave(size, dim=1)
    # Rounding the zero point moves the ends of an asymmetric grid by up to half a step.
    assert ((weight.dequantize() - w_OI).abs() <= step * (0.5 if symmetric else 1.0) * (1 + 1e-5)).all()
    assert not weight.dequantize()[-1].any()
    assert weight.codes.dtype == torch.int8
    assert weight.codes.is_contiguous()


def test_a_group_that_does_not_divide_is_refused():
    with pytest.raises(PlanishError, match="does not divide"):
        Rtn().solve(weights(2, 10), WeightFormat(bits=4, granularity="group", group_size=4), None, torch.float32)


def test_solvers_say_what_they_need():
    assert {name: (solver.needs_moments, solver.needs_cross) for name, solver in SOLVERS.items()} == {
        "rtn": (False, False),
        "gptq": (True, False),
        "gptaq": (True, True),
    }
