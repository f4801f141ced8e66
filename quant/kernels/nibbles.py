"""Two 4-bit codes a byte: of a row of C codes, code c is the low nibble of byte c and code c + C / 2 its high nibble.

Halves of a row, not neighbours: a kernel that has unpacked a run of bytes holds two runs of neighbouring codes, and needs no shuffle. Both nibbles
are two's complement. Shifted to the top of its byte a nibble is 16 times its code, which costs one shift or one mask; kernels multiply those, and
divide the sum by 16.

Shape suffixes: N rows, C codes.
"""

import torch
from torch import Tensor

from ..errors import PlanishError


def pack_nibbles(codes_NC: Tensor) -> Tensor:
    """codes_NC: (N, C) int8 of -8 to 7, C even. Returns (N, C / 2) int8. Raises PlanishError for an odd C."""
    width = codes_NC.shape[-1]
    if width % 2:
        raise PlanishError(f"{width} codes of 4 bits in a row cannot be packed two per byte. Keep them one per byte.")
    low, high = codes_NC[..., : width // 2], codes_NC[..., width // 2 :]
    return torch.bitwise_or(low & 15, high << 4)


def unpack_nibbles(packed_NC: Tensor) -> Tensor:
    """(N, C / 2) int8 as pack_nibbles made it. Returns the codes, (N, C) int8."""
    half = packed_NC.shape[-1]
    codes_NC = packed_NC.new_empty((*packed_NC.shape[:-1], 2 * half))
    torch.bitwise_right_shift(packed_NC << 4, 4, out=codes_NC[..., :half])
    torch.bitwise_right_shift(packed_NC, 4, out=codes_NC[..., half:])
    return codes_NC
