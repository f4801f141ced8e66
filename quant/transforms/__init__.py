"""Transforms that flatten outliers: one algorithm a file, named in one dict."""

from .auto import Auto as Auto
from .flat import Flat as Flat
from .fold import FoldNorms as FoldNorms
from .fold import Untie as Untie
from .inputs import Cat as Cat
from .inputs import Center as Center
from .inputs import ClipSearch as ClipSearch
from .inputs import Duquant as Duquant
from .inputs import Hadamard as Hadamard
from .inputs import Wush as Wush
from .permute import Permute as Permute
from .polish import Polish as Polish
from .prefix import Prefix as Prefix
from .raising import RaiseActivations as RaiseActivations
from .rotate import Rotate as Rotate
from .scale_rms import ScaleRms as ScaleRms
from .side import Lorc as Lorc
from .side import Quad as Quad
from .side import Resq as Resq
from .side import SuperWeights as SuperWeights
from .side import Svdquant as Svdquant
from .smooth import Smooth as Smooth

SideStep = Lorc | Svdquant | SuperWeights
"""A step that runs something beside the codes and leaves the input as it is."""
Keeping = Quad | Resq
"""A step that transforms the input and keeps its first channels out of the codes."""
InputChoice = Center | Hadamard | Duquant | Cat | Wush | Flat | Auto
"""A step that transforms the input at run time."""
Step = Prefix | FoldNorms | Untie | Rotate | Smooth | ScaleRms | Permute | InputChoice | ClipSearch | Keeping | SideStep | RaiseActivations | Polish
"""Any step of a recipe."""

STEPS: dict[str, type[Step]] = {
    "prefix": Prefix,
    "fold_norms": FoldNorms,
    "untie": Untie,
    "rotate": Rotate,
    "smooth": Smooth,
    "scale_rms": ScaleRms,
    "permute": Permute,
    "shift": Center,
    "hadamard": Hadamard,
    "duquant": Duquant,
    "cat": Cat,
    "wush": Wush,
    "flat": Flat,
    "auto": Auto,
    "quad": Quad,
    "resq": Resq,
    "clip": ClipSearch,
    "low_rank": Lorc,
    "svdquant": Svdquant,
    "super_weight": SuperWeights,
    "raise_activations": RaiseActivations,
    "polish": Polish,
}
