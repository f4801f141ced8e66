"""Whether the operators are right on a device: fresh random odd shapes, results in memory that was full of NaN before.

Part of kernels.py, which runs it before it measures. Linears against float64, quantizers against the CPU's.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from planish.quant.kernels import pack_nibbles

LINEARS = ("linear_w8a8", "linear_w4a8", "linear_w4a4", "linear_w4a16", "linear_fp8")


def operands(op: str, tokens: int, out: int, inputs: int, device: str, seed: int = 0) -> tuple[list[object], Tensor]:
    """Random operands of a linear operator, and its result in float64 on the CPU."""
    g = torch.Generator().manual_seed(seed)
    if op == "linear_fp8":
        x, w = (
            torch.ops.planish.quantize_fp8(torch.randn(tokens, inputs, generator=g)),
            torch.ops.planish.quantize_fp8(torch.randn(out, inputs, generator=g)),
        )
        twin = (x[0].double() * x[1]) @ (w[0].double() * w[1]).T
        values: list[object] = [*x, w[0], w[1].flatten(), None, torch.bfloat16]
    elif op == "linear_w4a16":
        x_TC, w_OI = torch.randn(tokens, inputs, generator=g).bfloat16(), torch.randint(-8, 8, (out, inputs), generator=g).to(torch.int8)
        groups = inputs // 32 if inputs % 32 == 0 else inputs // 6 if inputs % 6 == 0 else 1
        scale = torch.rand(out, groups, generator=g) * 0.01
        twin = x_TC.double() @ (w_OI.reshape(out, groups, -1) * scale[:, :, None]).bfloat16().flatten(1).double().T
        values = [x_TC, pack_nibbles(w_OI), scale, None, None]
    else:
        x_bits, w_bits = (4 if op == "linear_w4a4" else 8), (8 if op == "linear_w8a8" else 4)
        q_TC = torch.randint(-(1 << x_bits - 1), 1 << x_bits - 1, (tokens, inputs), generator=g).to(torch.int8)
        w_OI = torch.randint(-(1 << w_bits - 1), 1 << w_bits - 1, (out, inputs), generator=g).to(torch.int8)
        zero, x_scale, w_scale = (
            torch.randint(-8, 8, (tokens, 1), generator=g).int(),
            torch.rand(tokens, 1, generator=g),
            torch.rand(out, generator=g),
        )
        twin = (q_TC.double() - zero) * x_scale.double() @ (w_OI.double() * w_scale[:, None]).T
        packed_x, packed_w = pack_nibbles(q_TC) if x_bits == 4 else q_TC, pack_nibbles(w_OI) if w_bits == 4 else w_OI
        values = [packed_x, x_scale, zero, packed_w, w_scale, w_OI.sum(1, dtype=torch.int32), None, None, None, torch.bfloat16]
    return [value.to(device) if isinstance(value, Tensor) else value for value in values], twin


def poison(values: int, device: str) -> None:
    """Leave memory full of NaN behind, where the next result of so many values will probably lie."""
    torch.full((max(1, values),), torch.nan, dtype=torch.bfloat16, device=device)


def relative_error(op: str, tokens: int, out: int, inputs: int, device: str, seed: int) -> float:
    """Of the operator against float64, the largest difference over the largest value; infinite if any result is not finite."""
    values, twin = operands(op, tokens, out, inputs, device, seed)
    poison(tokens * out, device)
    y = getattr(torch.ops.planish, op)(*values).double().cpu()
    return float((y - twin).abs().max() / twin.abs().max()) if bool(y.isfinite().all()) else float("inf")


def odd_shapes(op: str, seed: int) -> tuple[int, int, int]:
    """(tokens, out, in) that no tile divides, fresh for every seed; float8 takes multiples of 16."""
    g = torch.Generator().manual_seed(seed)
    tokens, out, half = (int(torch.randint(1, top, (), generator=g)) for top in (300, 600, 400))
    return (tokens, 16 * (out // 16 + 1), 16 * (half // 8 + 1)) if op == "linear_fp8" else (tokens, out, 2 * half)


def quantizers(tokens: int, device: str, seed: int) -> list[tuple[str, tuple[object, ...]]]:
    """Every quantizer and operands, for so many tokens of widths that are none of a tile's, and those of models; 4 and 8 bits, symmetric or not."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).bfloat16().to(device)

    eight, four = (8, False, 1.0, False), (4, True, 0.9, True)
    return [
        ("quantize_per_token", (draw(tokens, 1003), *eight)),
        ("rms_norm_quantize", (draw(tokens, 1002), draw(1002), 1e-5, *four)),
        ("silu_mul_quantize", (draw(tokens, 3000), draw(tokens, 3000), *eight)),
        *(("hadamard_quantize", (draw(tokens, width), draw(width).sign(), width, *four)) for width in (1536, 4096, 14336)),
        ("blocks_quantize", (draw(tokens, 576), draw(6, 96, 96) / 10, *eight)),
        ("quantize_fp8", (draw(tokens, 1003),)),
    ]


def check_quantizers(device: str, seeds: Sequence[int]) -> list[str]:
    """What went wrong, a line each: against the CPU's, single codes may be 1 off, for sums have another order. The first seed's tokens are many."""
    wrong = []
    for index, seed in enumerate(seeds):
        g = torch.Generator().manual_seed(seed)
        tokens = int(torch.randint(1, 300, (), generator=g)) if index else int(torch.randint(2049, 2500, (), generator=g))
        for op, values in quantizers(tokens, device, seed):
            function = getattr(torch.ops.planish, op)
            expected = function(*(value.cpu() if isinstance(value, Tensor) else value for value in values))
            poison(expected[0].numel() // 2, device)
            try:
                codes, scale = (made.cpu() for made in function(*values)[:2])
            except Exception as failed:  # noqa: BLE001, of Triton, its compiler or CUDA
                wrong.append(f"{op}, {tokens} tokens: {type(failed).__name__}: {failed}")
                continue
            share = float((codes.view(torch.int8) != expected[0].view(torch.int8)).float().mean())
            if share > 0.02 or not torch.allclose(scale, expected[1], rtol=0.01, atol=0):
                wrong.append(f"{op}, {tokens} tokens: {100 * share:.2g} % of the codes differ")
    return wrong


def check(device: str, seeds: Sequence[int], tolerance: float = 0.01) -> list[str]:
    """What went wrong, a line each."""
    wrong = []
    for op in LINEARS:
        for seed in seeds:
            shape = odd_shapes(op, seed)
            try:
                error = relative_error(op, *shape, device, seed)
            except Exception as failed:  # noqa: BLE001, of Triton, its compiler or CUDA
                wrong.append(f"{op} {shape}: {type(failed).__name__}: {failed}")
                continue
            if not error <= tolerance:
                wrong.append(f"{op} {shape}: relative error {error:.3g}")
    return wrong
