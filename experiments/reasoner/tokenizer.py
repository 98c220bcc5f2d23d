"""A tokenizer of single characters, as an ordinary one of `transformers`."""

from __future__ import annotations

import string

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from experiments.workloads.chained_arithmetic import NAMES

PAD, END, USER, ASSISTANT, UNKNOWN = SPECIAL = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|unknown|>")
CHARACTERS = "".join(dict.fromkeys("\n" + string.printable[:95] + NAMES))
"""Printable ASCII, the line end, and the other letters that name quantities."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ['user', 'assistant'] %}"
    "{{ raise_exception('the model knows the roles user and assistant, not ' + message.role) }}{% endif %}"
    "<|{{ message.role }}|>{{ message.content }}{% if message.role == 'assistant' %}<|end|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
VOCABULARY = {token: number for number, token in enumerate([*SPECIAL, *CHARACTERS])}

_TABLE = np.full(0x10000, VOCABULARY[UNKNOWN], dtype=np.int16)
_TABLE[[ord(character) for character in CHARACTERS]] = range(len(SPECIAL), len(VOCABULARY))


def build_tokenizer(model_max_length: int) -> PreTrainedTokenizerFast:
    """The tokenizer with its chat template; `save_pretrained` makes a folder of it."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=[USER, ASSISTANT],
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def encode(text: str) -> np.ndarray:
    """Token ids int16 [characters] of a text without special tokens: the tokenizer's own, many times as fast."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    return _TABLE[np.minimum(codes, len(_TABLE) - 1)]
