"""The tokenizer of the project's own reasoner, as it is built and as the clone ships it."""

# ruff: noqa: F811

from __future__ import annotations

import json
import string
from random import Random

import numpy as np
import pytest
from jinja2 import TemplateError
from transformers import AutoTokenizer

from experiments.paths import REASONER
from experiments.reasoner import network, training
from experiments.reasoner.tokenizer import (
    ASSISTANT,
    CHARACTERS,
    CHAT_TEMPLATE,
    END,
    PAD,
    SPECIAL,
    UNKNOWN,
    USER,
    VOCABULARY,
    encode,
)
from experiments.workloads.chained_arithmetic import NAMES
from tests.experiments.reasoner.small_training import (
    CHAT,
    tokenizer,  # noqa: F401
)
from zipage.engine.detokenizer import Detokenizer

CHAT_TEXT = "<|user|>a=1<|assistant|>Answer: 1<|end|><|user|>b=2\nΩ<|assistant|>"


@pytest.fixture(scope="module")
def shipped():
    return AutoTokenizer.from_pretrained(REASONER)


class TestTokenizer:
    def test_characters(self):
        assert len(set(CHARACTERS)) == len(CHARACTERS) == len(VOCABULARY) - len(SPECIAL)
        assert set(NAMES) | set(string.ascii_letters + string.digits + string.punctuation + " \n") == set(CHARACTERS)

    def test_round_trip(self, tokenizer):
        shuffled = list(CHARACTERS * 3)
        Random(0).shuffle(shuffled)
        for text in (CHARACTERS, "".join(shuffled), " \n  \n\n ", "  two  spaces ", "\n"):
            ids = tokenizer(text)["input_ids"]
            assert len(ids) == len(text)
            assert tokenizer.decode(ids) == text
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
            assert encode(text).tolist() == ids
        assert len(set(tokenizer(CHARACTERS)["input_ids"])) == len(CHARACTERS)

    def test_encode_equals_the_tokenizer(self, tokenizer):
        texts = [problem.question + problem.solution for make in training.FAMILIES.values() for problem in make(0, 5)]
        for text in [*texts, "", "ab漢c\té", "a🙂b", "\r\n"]:
            assert encode(text).tolist() == tokenizer(text)["input_ids"]
        assert encode("x").dtype == np.int16

    def test_unknown_characters(self, tokenizer):
        unknown = VOCABULARY[UNKNOWN]
        assert tokenizer("漢\t")["input_ids"] == [unknown, unknown]
        assert encode("a漢🙂b").tolist() == [VOCABULARY["a"], unknown, unknown, VOCABULARY["b"]]

    def test_chat_template(self, tokenizer):
        text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
        assert text == CHAT_TEXT
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        plain = CHAT_TEXT
        for token in SPECIAL:
            plain = plain.replace(token, "")
        assert len(ids) == len(plain) + 5, "each special token is a single one"
        assert [i for i in ids if i < len(SPECIAL)] == [
            VOCABULARY[token] for token in (USER, ASSISTANT, END, USER, ASSISTANT)
        ]
        assert tokenizer.decode(ids, skip_special_tokens=True) == plain
        without = tokenizer.apply_chat_template(CHAT, tokenize=False)
        assert without == CHAT_TEXT.removesuffix(ASSISTANT)

    def test_special_tokens(self, tokenizer):
        assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL] == [0, 1, 2, 3, 4]
        assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.unk_token) == (PAD, END, UNKNOWN)
        assert tokenizer("a")["input_ids"] == [VOCABULARY["a"]], "no token is added"

    def test_other_roles_are_refused(self, tokenizer):
        system = [{"role": "system", "content": "Think."}, *CHAT]
        with pytest.raises(TemplateError, match="knows the roles user and assistant, not system"):
            tokenizer.apply_chat_template(system, tokenize=False)

    def test_shipped_tokenizer_is_the_one_built(self, shipped, tokenizer):
        assert shipped.get_vocab() == tokenizer.get_vocab() == VOCABULARY
        assert json.loads(shipped.backend_tokenizer.to_str()) == json.loads(tokenizer.backend_tokenizer.to_str())
        assert shipped.chat_template == CHAT_TEMPLATE
        assert shipped.model_max_length == network.LONGEST
        for name in ("eos_token_id", "pad_token_id", "unk_token_id", "bos_token_id"):
            assert getattr(shipped, name) == getattr(tokenizer, name)
        assert shipped(CHAT_TEXT)["input_ids"] == tokenizer(CHAT_TEXT)["input_ids"]
        assert shipped.decode(encode(CHARACTERS)) == CHARACTERS

    def test_streamed_text_is_the_same(self, shipped):
        for text in (CHARACTERS, " a  b\n\n c ", "k=417 k:417\nл=@k\n"):
            detokenizer = Detokenizer(shipped, ())
            pieces = []
            for token in [*encode(text).tolist(), VOCABULARY[END]]:
                detokenizer.add(token)
                pieces.append(detokenizer.take(False))
            detokenizer.finish()
            pieces.append(detokenizer.take(True))
            assert "".join(pieces) == detokenizer.text == text
