import random

import pytest

from tests.tiny_models import save_tiny_tokenizer
from zipage.detokenizer import Detokenizer, decode


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def feed(tokenizer, text, stop=()):
    """Run a text through; returns the detokenizer, the pieces as they became certain, and tokens consumed."""
    detokenizer = Detokenizer(tokenizer, stop)
    pieces = []
    ids = tokenizer.encode(text, add_special_tokens=False)
    for used, token in enumerate(ids, start=1):
        found = detokenizer.add(token)
        pieces.append(detokenizer.take(found is not None))
        if found:
            return detokenizer, pieces, used
    detokenizer.finish()
    pieces.append(detokenizer.take(True))
    return detokenizer, pieces, len(ids)


def test_text_equals_decoding_all_at_once(tokenizer):
    rng = random.Random(0)
    for _ in range(50):
        text = "".join(rng.choice("ab \n\té漢🙂'.,") for _ in range(30))
        detokenizer, pieces, _ = feed(tokenizer, text)
        assert detokenizer.text == "".join(pieces) == text


def test_no_piece_holds_half_a_character(tokenizer):
    _, pieces, _ = feed(tokenizer, "a🙂b")
    assert [piece for piece in pieces if piece] == ["a", "🙂", "b"]


def test_unfinished_character_at_the_end_shows_as_in_decode(tokenizer):
    ids = tokenizer.encode("a🙂")[:-1]
    detokenizer = Detokenizer(tokenizer)
    for token in ids:
        detokenizer.add(token)
    assert detokenizer.finish() == decode(tokenizer, ids)


@pytest.mark.parametrize("stop", [("END",), ("xx", "END"), ("ENDE", "END"), ("D",)])
def test_stop_string_across_token_borders(tokenizer, stop):
    text = "some words E EN ENX then END and more"
    detokenizer, pieces, used = feed(tokenizer, text, stop)
    first = min(at for s in stop if (at := text.find(s)) >= 0)
    assert detokenizer.text == "".join(pieces) == text[:first]
    assert detokenizer.stop_reason in stop
    assert used < len(text)


def test_nothing_of_a_stop_string_is_ever_shown(tokenizer):
    _, pieces, _ = feed(tokenizer, "abENc ENDx", ("END",))
    assert "".join(pieces) == "abENc "
    shown = ""
    for piece in pieces:
        shown += piece
        assert "abENc ".startswith(shown)


def test_stop_string_that_never_comes_holds_nothing_back_at_the_end(tokenizer):
    detokenizer, pieces, _ = feed(tokenizer, "the EN", ("END",))
    assert "".join(pieces) == detokenizer.text == "the EN"


def test_special_tokens_are_left_out_or_kept(tokenizer):
    ids = tokenizer.encode("hi<|im_end|>")
    for skip, text in ((True, "hi"), (False, "hi<|im_end|>")):
        detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
        for token in ids:
            detokenizer.add(token)
        assert detokenizer.finish() == decode(tokenizer, ids, skip) == text
