"""Quantized arithmetic as operators: one schema each in torch's namespace `planish`, one implementation for CPUs and one for CUDA.

Importing it registers them: torch.ops.planish.linear_w8a8 and so on, see `schemas`. They need no Triton on a CPU.
"""

from . import cpu as cpu  # registers
from . import gpu as gpu  # registers
from .joined import JoinedLinear as JoinedLinear
from .modules import PackedLinear as PackedLinear
from .nibbles import pack_nibbles as pack_nibbles
from .nibbles import unpack_nibbles as unpack_nibbles
from .schemas import NAMES as NAMES
