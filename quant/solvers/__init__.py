"""Solvers: how a weight becomes codes. One algorithm a file, named in one dict."""

from .clip import Clip as Clip
from .gptaq import Gptaq as Gptaq
from .gptq import Gptq as Gptq
from .moments import Moments as Moments
from .moments import Solution as Solution
from .rtn import Rtn as Rtn

Solver = Rtn | Gptq | Gptaq
"""Any solver: `solve(w_OI, fmt, moments, scale_dtype) -> Solution`, `needs_moments`, `needs_cross`, `held_share`, `attention`."""

SOLVERS: dict[str, type[Solver]] = {"rtn": Rtn, "gptq": Gptq, "gptaq": Gptaq}
