"""A tokenizer built from scratch: byte-level BPE with 400 entries, <s> and </s>, a chat template."""

from pydoc_data.topics import topics

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHAT = (
    "{% for m in messages %}{% if m['role'] not in ('system', 'user', 'assistant') %}{{ raise_exception('unknown role ' + m['role']) }}{% endif %}"
    "<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
)


def build_tokenizer(*, bos: bool = False, eos: bool = True, chat: bool = True) -> PreTrainedTokenizerFast:
    """bos: a text starts with <s> by itself. eos: there is an end-of-sequence token. chat: there is a chat template."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        [topics["assert"], topics["if"]],
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False),
    )
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>" if eos else None, model_max_length=64)
    tokenizer.chat_template = CHAT if chat else None
    return tokenizer
