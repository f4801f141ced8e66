"""Models that take images besides text: a language model of a known family inside, and beside it what makes embeddings of images.

planish quantizes the language model and leaves all else as it is. Written from the model definitions of transformers 5.23.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from transformers import PreTrainedConfig

from .families import FAMILIES
from .family import LLAMA, NORMED, Family

SECTIONS = "a RoPE of time, height and width"


@dataclass(frozen=True, slots=True)
class Wrapper:
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


WRAPPERS = {
    "gemma3": Wrapper("Gemma3ForConditionalGeneration"),
    "mistral3": Wrapper("Mistral3ForConditionalGeneration", _projected),
    "llava": Wrapper("LlavaForConditionalGeneration", _projected),
    "llava_next": Wrapper("LlavaNextForConditionalGeneration"),
    "llava_onevision": Wrapper("LlavaOnevisionForConditionalGeneration"),
    "internvl": Wrapper("InternVLForConditionalGeneration", _projected),
    "qwen2_vl": Wrapper("Qwen2VLForConditionalGeneration", _merged, text=replace(LLAMA, obstacle=SECTIONS)),
    "qwen2_5_vl": Wrapper("Qwen2_5_VLForConditionalGeneration", _merged, text=replace(LLAMA, obstacle=SECTIONS)),
    "qwen3_vl": Wrapper("Qwen3VLForConditionalGeneration", _deep, text=replace(LLAMA, obstacle=NORMED)),
    "qwen3_5": Wrapper("Qwen3_5ForConditionalGeneration", _deep),
    "qwen3_5_moe": Wrapper("Qwen3_5MoeForConditionalGeneration", _deep),
    "smolvlm": Wrapper("SmolVLMForConditionalGeneration", lambda _config: ("model.connector.modality_projection.proj",), body="model.text_model"),
    "lfm2_vl": Wrapper("Lfm2VlForConditionalGeneration", _projected),
}
"""By config.model_type."""


def family_of(config: PreTrainedConfig) -> Family | None:
    """The table of a model of this config, with its paths; None where there is none."""
    if config.model_type in FAMILIES:
        return FAMILIES[config.model_type]
    wrapper = WRAPPERS.get(config.model_type)
    text = None if wrapper is None else wrapper.text or FAMILIES.get(config.get_text_config().model_type)
    if wrapper is None or text is None or text.input != "input_ids" or not text.blocks.startswith("model."):
        return None
    return replace(
        text,
        architecture=wrapper.architecture,
        wrappers=(),
        body=wrapper.body,
        images=wrapper.images(config),
        blocks=_inside(wrapper.body, text.blocks),
        embeddings=tuple(_inside(wrapper.body, path) for path in text.embeddings),
        norm=None if text.norm is None else _inside(wrapper.body, text.norm),
        last_reader=None if text.last_reader is None else _inside(wrapper.body, text.last_reader),
    )


def is_mixture(config: PreTrainedConfig) -> bool:
    """Whether models of this config are mixtures of experts, as far as planish knows them."""
    family = family_of(config)
    return family is not None and family.experts is not None


def around_unknown(config: PreTrainedConfig) -> str:
    """What to say of a model that takes images and that planish has no table of; empty for any other."""
    if family_of(config) is not None or not config.sub_configs or not hasattr(config, "text_config"):
        return ""
    text = config.text_config.model_type
    return f"this is a multimodal model around a {text} language model. Save that one as a checkpoint of its own and give planish that."


def _inside(body: str, path: str) -> str:
    return f"{body}.{path.removeprefix('model.')}" if path.startswith("model.") else path
