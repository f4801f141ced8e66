"""Transforms that flatten outliers: one algorithm a file, named in one dict."""

from .inputs import Cat as Cat
from .inputs import Center as Center
from .inputs import ClipSearch as ClipSearch
from .inputs import Duquant as Duquant
from .inputs import Hadamard as Hadamard
from .inputs import Wush as Wush
from .prefix import Prefix as Prefix
from .smooth import Smooth as Smooth

Step = Prefix | Smooth | Center | Hadamard | Duquant | Cat | Wush | ClipSearch
"""Any step of a recipe."""

STEPS: dict[str, type[Step]] = {
    "prefix": Prefix,
    "smooth": Smooth,
    "shift": Center,
    "hadamard": Hadamard,
    "duquant": Duquant,
    "cat": Cat,
    "wush": Wush,
    "clip": ClipSearch,
}
