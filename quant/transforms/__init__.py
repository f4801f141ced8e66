"""Transforms that flatten outliers: one algorithm a file, named in one dict."""

from .smooth import Smooth as Smooth

STEPS: dict[str, type[Smooth]] = {"smooth": Smooth}
