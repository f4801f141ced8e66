"""Steps that bring a model into the form in which its residual stream can be rotated (QuaRot, Ashkboos et al. 2024, arXiv:2404.00456, section 3).

What they do to which weights is in calib/blocks/fusing.py; they have no settings.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class FoldNorms:
    """The norms' weights go into the linear layers that read them, and the norms multiply by 1. Of a LayerNorm also the subtraction of the mean,
    into what writes to the stream, and the bias, into the readers' biases; a reader without one leaves it in the norm, divided by the weight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Untie:
    """The head gets its own copy of the embeddings."""
