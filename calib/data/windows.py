"""Text to token windows: documents are joined to one stream of tokens, which is cut into windows of equal length.

The stream of a single text is what the tokenizer makes of it (with its BOS token first, where it writes one). Several texts stand in their
order with the EOS token between them, where the tokenizer has one; conversations go through the chat template, which writes its own ends.

Which windows: with a seed, drawn without replacement from all windows, in the order of the text; with seed None, the first ones.
Large sources are not read to the end, but for 16 characters for each token asked for; where windows are drawn, for 2 million characters if that
is more. Of the built-in text 8 characters for each token, for its most varied part comes first. Where that makes too few tokens, more is read.
"""

import random
from dataclasses import dataclass

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...quant.errors import PlanishError
from ...quant.seeds import check_seed
from .documents import Document, Part, take

_DRAWN_FROM = 2_000_000
_CHARACTERS_PER_TOKEN, _BUILTIN_CHARACTERS = 16, 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """The text a model is calibrated on.

    source: see documents.py; model: the model writes it (own_text.py). samples: windows. length: tokens of each. seed: None takes the windows in
    order; where the model writes them it is 0. batch_size: windows run at once.
    """

    source: str = "builtin"
    samples: int = 32
    length: int = 512
    seed: int | None = 0
    batch_size: int = 2

    def __post_init__(self) -> None:
        if not self.source:
            raise PlanishError("calibration.source is empty. Give builtin, model, a .txt, .jsonl or .parquet file, or hub:NAME.")
        for name, value, least in (("samples", self.samples, 1), ("length", self.length, 2), ("batch_size", self.batch_size, 1)):
            if value < least:
                raise PlanishError(f"calibration.{name} is {value}, but must be at least {least}.")
        if self.seed is not None:
            check_seed("calibration.seed", self.seed, ", or null for the first windows in order")

    def tokens(self, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        """(samples, length) int64. Errors as of tokens()."""
        return tokens(self.source, tokenizer, samples=self.samples, length=self.length, seed=self.seed)


def tokens(
    source: str, tokenizer: PreTrainedTokenizerBase, *, samples: int | None, length: int, seed: int | None = None, part: Part = "calibration"
) -> Tensor:
    """Windows of a text: (samples, length) int64; samples None: all of them, in order.

    Equivalent, for a .txt and seed None, to torch.tensor(tokenizer(text).input_ids)[: samples * length].view(samples, length).
    part: which half of the builtin text, see documents.builtin. Raises PlanishError for bad sources and for those that hold too little.
    """
    needed = None if samples is None else (samples + 1) * length  # one window more: the last one may end where reading did, amid a word
    characters = needed and _BUILTIN_CHARACTERS * needed
    if needed and source != "builtin":
        characters = max(_CHARACTERS_PER_TOKEN * needed, 0 if seed is None else _DRAWN_FROM)
    while True:
        documents, complete = take(source, part, characters)
        ids = _stream(documents, tokenizer)
        if complete or needed is None or characters is None or len(ids) >= needed:
            return _choose(windows(ids, length), len(ids), samples, seed, source, part)
        characters *= 4


def windows(ids: Tensor, length: int) -> Tensor:
    """Non-overlapping windows from the start of ids (T,): (T // length, length). What is left over at the end is dropped."""
    return ids[: len(ids) // length * length].view(-1, length)


def _choose(all_NL: Tensor, held: int, samples: int | None, seed: int | None, source: str, part: Part) -> Tensor:
    count, length = all_NL.shape
    if count < (samples or 1):
        found = (
            f"{count} window{'' if count == 1 else 's'} of {length} tokens"
            if count
            else f"{held} tokens, not one window of {length}"
            if held
            else "no text"
        )
        if part == "evaluation":
            asked = f", but {samples} are asked for" if samples and count else ""
            raise PlanishError(f"--text {source} holds {found}{asked}. {'Lower --length, or give' if held else 'Give'} a larger text.")
        raise PlanishError(
            f"calibration.source {source} holds {found}, calibration.samples asks for {samples or 'all'}. Lower samples or length, or give a larger "
            "source."
        )
    if samples is None or seed is None:
        return all_NL[:samples].clone()
    return all_NL[sorted(random.Random(seed).sample(range(count), samples))]


def _stream(documents: list[Document], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """One stream of the tokens of all documents: (T,) int64."""
    texts = [document if isinstance(document, str) else _conversation(document, tokenizer) for document in documents]
    if not any(texts):
        return torch.empty(0, dtype=torch.int64)
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    between = _beginning(tokenizer)
    stream: list[int] = []
    for document, ids in zip(documents, encoded, strict=True):
        stream += (between if isinstance(document, str) else []) + ids
        between = end if isinstance(document, str) else []
    return torch.tensor(stream, dtype=torch.int64)


def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The BOS token, where the tokenizer puts one before a text."""
    return [token for token in tokenizer("").input_ids[:1] if token == tokenizer.bos_token_id]


def _conversation(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.chat_template is None:
        raise PlanishError("The text source holds conversations, but the model's tokenizer has no chat template. Give plain text.")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages[:8])
        raise PlanishError(f"The model's chat template refuses a conversation with the roles {roles}: {error}") from error


def start_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that begins a text: BOS, or EOS, which ends the text before."""
    return next((token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if isinstance(token, int)), None)
