"""Models that take images besides text: a language model of a known family inside, and beside it what makes embeddings of images.

planish quantizes the language model and leaves all else as it is. Written from the model definitions of transformers 5.23.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from transformers import PreTrainedConfig

from .family import LLAMA, NORMED, Family

SECTIONS = "a RoPE of time, height and width"


@dataclass(frozen=True, slots=True)
class Multimodal:
    """One kind. architecture: its class. images: the linears whose outputs enter the stream for images, all that do; empty: not linears alone. body:
    where the language model is, without its head. text: that one's table, where it has no class of its own."""

    architecture: str
    images: Callable[[PreTrainedConfig], tuple[str, ...]] = lambda config: ()
    body: str = "model.language_model"
    text: Family | None = None


def _projected(_config: PreTrainedConfig) -> tuple[str, ...]:
    return ("model.multi_modal_projector.linear_2",)


def _merged(_config: PreTrainedConfig) -> tuple[str, ...]:
    return ("model.visual.merger.mlp.2",)


def _deep(config: PreTrainedConfig) -> tuple[str, ...]:
    """Also those that are added to the stream behind the first blocks."""
    layers = len(getattr(config.vision_config, "deepstack_visual_indexes", None) or ())
    return ("model.visual.merger.linear_fc2", *(f"model.visual.deepstack_merger_list.{n}.linear_fc2" for n in range(layers)))


MULTIMODAL = {
    "gemma3": Multimodal("Gemma3ForConditionalGeneration"),
    "mistral3": Multimodal("Mistral3ForConditionalGeneration", _projected),
    "llava": Multimodal("LlavaForConditionalGeneration", _projected),
    "llava_next": Multimodal("LlavaNextForConditionalGeneration"),
    "llava_onevision": Multimodal("LlavaOnevisionForConditionalGeneration"),
    "internvl": Multimodal("InternVLForConditionalGeneration", _projected),
    "qwen2_vl": Multimodal("Qwen2VLForConditionalGeneration", _merged, text=replace(LLAMA, obstacle=SECTIONS)),
    "qwen2_5_vl": Multimodal("Qwen2_5_VLForConditionalGeneration", _merged, text=replace(LLAMA, obstacle=SECTIONS)),
    "qwen3_vl": Multimodal("Qwen3VLForConditionalGeneration", _deep, text=replace(LLAMA, obstacle=NORMED)),
    "qwen3_5": Multimodal("Qwen3_5ForConditionalGeneration", _deep),
    "qwen3_5_moe": Multimodal("Qwen3_5MoeForConditionalGeneration", _deep),
    "smolvlm": Multimodal("SmolVLMForConditionalGeneration", lambda _config: ("model.connector.modality_projection.proj",), body="model.text_model"),
    "lfm2_vl": Multimodal("Lfm2VlForConditionalGeneration", _projected),
}
"""By config.model_type."""


def around(text: Family, kind: Multimodal, config: PreTrainedConfig) -> Family:
    """The table of a model of this kind and config around a language model with that table."""
    return replace(
        text,
        architecture=kind.architecture,
        wrappers=(),
        body=kind.body,
        images=kind.images(config),
        blocks=_inside(kind.body, text.blocks),
        embeddings=tuple(_inside(kind.body, path) for path in text.embeddings),
        norm=None if text.norm is None else _inside(kind.body, text.norm),
        last_reader=None if text.last_reader is None else _inside(kind.body, text.last_reader),
    )


def _inside(body: str, path: str) -> str:
    return f"{body}.{path.removeprefix('model.')}" if path.startswith("model.") else path
