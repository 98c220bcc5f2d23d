"""Text as it arrives is the text of all tokens at once, whatever the tokenizer makes of them."""

import random
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from zipage.engine.detokenizer import Detokenizer, decode

SPECIALS = ["<s>", "</s>"]
UNKNOWN = 5000
"""An id that no tokenizer here knows, as of the padding of an embedding."""


def byte_level() -> PreTrainedTokenizerFast:
    """As of Qwen and Llama 3. Some tokens end in the middle of a character, or begin there."""
    byte_of = dict(zip(sorted(range(256), key=_order), sorted(pre_tokenizers.ByteLevel.alphabet())))
    pieces = [b"he", b" he", b"\xf0\x9f", b"\x98\x81\xf0", b"\xe6\xbc", b"\xa2\xe6", b"\xff\xff", b"'s", b"\n\n"]
    tokens = [*byte_of.values(), *("".join(byte_of[b] for b in piece) for piece in pieces)]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return _with_specials(backend)


def _order(byte: int) -> int:
    """Of the character that stands for a byte: printable ones stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return byte if byte in printable else 256 + [b for b in range(256) if b not in printable].index(byte)


def byte_fallback() -> PreTrainedTokenizerFast:
    """As of Llama 2, Mistral and Gemma: what is not in the vocabulary is spelled in tokens of a byte."""
    pieces = ["▁", "h", "e", "he", "▁he", "▁END", "E", "N", "D", "xE", "\ufffd", "漢", ".", "▁▁"]
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    backend = Tokenizer(
        models.BPE({t: i for i, t in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return _with_specials(backend)


def metaspace() -> PreTrainedTokenizerFast:
    tokens = ["<unk>", "▁", "▁he", "he", "llo", "▁▁", "é", "END", "\ufffd"]
    backend = Tokenizer(models.Unigram([(token, -1.0) for token in tokens], unk_id=0))
    backend.decoder = decoders.Metaspace()
    return _with_specials(backend)


def word_piece() -> PreTrainedTokenizerFast:
    tokens = ["[UNK]", "he", "##llo", "END", "##END", ".", "'", "s", "é"]
    backend = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    return _with_specials(backend)


def _with_specials(backend: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens(["<think>"])
    return tokenizer


TOKENIZERS = {make.__name__: make() for make in (byte_level, byte_fallback, metaspace, word_piece)}


@pytest.fixture
def tokenizer():
    return TOKENIZERS["byte_level"]


def run(tokenizer, ids, stop=(), skip_special_tokens=True):
    """Feed tokens; returns the detokenizer, the pieces as they became certain, and tokens consumed."""
    detokenizer = Detokenizer(tokenizer, stop, skip_special_tokens)
    pieces = []
    for used, token in enumerate(ids, start=1):
        found = detokenizer.add(token)
        pieces.append(detokenizer.take(found is not None))
        if found:
            return detokenizer, pieces, used
    detokenizer.finish()
    pieces.append(detokenizer.take(True))
    return detokenizer, pieces, len(ids)


def feed(tokenizer, text, stop=()):
    return run(tokenizer, tokenizer.encode(text, add_special_tokens=False), stop)


def ids_of(tokenizer, *tokens):
    """Bytes are given as ints."""
    return [tokenizer.convert_tokens_to_ids(f"<0x{t:02X}>" if isinstance(t, int) else t) for t in tokens]


every_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)


def any_tokens(tokenizer):
    """Runs of bytes and of whole characters, pieces, specials and ids that nobody knows."""
    size = len(tokenizer)
    some = st.sampled_from([0, size - 1, size - 2, size - 3, UNKNOWN]) | st.integers(0, size - 1)
    if tokenizer is TOKENIZERS["byte_fallback"]:
        some |= st.integers(1 + 0x78, 1 + 0xFF) | st.integers(257, size - 1)
        characters = st.text(min_size=1, max_size=4).map(lambda text: [1 + byte for byte in text.encode()])
    elif tokenizer is TOKENIZERS["byte_level"]:
        some |= st.integers(256, size - 1)
        characters = st.text(min_size=1, max_size=4).map(tokenizer.encode)
    else:
        return st.lists(some, max_size=60)
    return st.lists(st.lists(some, max_size=6) | characters, max_size=20).map(lambda parts: [*chain(*parts)])


@every_tokenizer
@given(data=st.data(), skip=st.booleans())
@settings(max_examples=150, deadline=None)
def test_any_tokens_give_the_text_of_all_at_once(name, data, skip):
    tokenizer = TOKENIZERS[name]
    ids = data.draw(any_tokens(tokenizer))
    detokenizer, pieces, _ = run(tokenizer, ids, skip_special_tokens=skip)
    assert detokenizer.text == "".join(pieces) == decode(tokenizer, ids, skip)


@every_tokenizer
@given(data=st.data(), skip=st.booleans())
@settings(max_examples=150, deadline=None)
def test_any_tokens_stop_at_the_first_that_completes_a_stop_string(name, data, skip):
    tokenizer = TOKENIZERS[name]
    ids = data.draw(any_tokens(tokenizer))
    whole = decode(tokenizer, ids, skip)
    # A piece of the text most often, or it never stops.
    at = data.draw(st.integers(0, max(0, len(whole) - 1)))
    stop = whole[at : at + data.draw(st.integers(1, 4))].strip("\ufffd") or "END"
    texts = [decode(tokenizer, ids[: i + 1], skip) for i in range(len(ids))]
    detokenizer, pieces, used = run(tokenizer, ids, (stop,), skip)
    if detokenizer.stop_reason is None:
        assert detokenizer.text == "".join(pieces) == whole
        assert stop not in whole
    else:
        assert detokenizer.text == "".join(pieces)
        assert texts[used - 1].startswith(detokenizer.text + stop)
        assert texts[used - 1].index(stop) == len(detokenizer.text)
        assert all(stop not in text for text in texts[: used - 1])


def test_text_equals_decoding_all_at_once(tokenizer):
    rng = random.Random(0)
    for _ in range(50):
        text = "".join(rng.choice("ab \n\té漢🙂'.,") for _ in range(30))
        detokenizer, pieces, _ = feed(tokenizer, text)
        assert detokenizer.text == "".join(pieces) == text


@pytest.mark.parametrize("run_of_bytes", [[0xFF], [0xE6, 0xBC, 0xA2, 0xFF], [0xC3, 0x28], [0xE6, 0xBC], [0x0A]])
def test_bytes_that_form_no_utf8_are_replaced_one_by_one_and_the_text_goes_on(run_of_bytes):
    tokenizer = TOKENIZERS["byte_fallback"]
    ids = ids_of(tokenizer, "▁he", *run_of_bytes, "▁he", 0xE6, 0xBC, 0xA2, "he", *run_of_bytes)
    try:
        middle = bytes(run_of_bytes).decode()
    except UnicodeDecodeError:
        middle = "\ufffd" * len(run_of_bytes)
    detokenizer, pieces, _ = run(tokenizer, ids)
    assert detokenizer.text == "".join(pieces) == f"he{middle} he漢he{middle}"


def test_a_stop_string_of_bytes_ends_with_its_last_byte():
    tokenizer = TOKENIZERS["byte_fallback"]
    newlines = ids_of(tokenizer, "he", 0x0A, 0x0A, 0x0A, "he")
    detokenizer, pieces, used = run(tokenizer, newlines, ("\n\n",))
    assert (detokenizer.text, "".join(pieces), used) == ("he", "he", 3)
    detokenizer, _, used = run(tokenizer, ids_of(tokenizer, "he", 0xE6, 0xBC, 0xA2, "he"), ("e漢",))
    assert (detokenizer.text, used) == ("h", 4)
    # Behind an ill-formed byte the whole run is replaced, so its other bytes spell nothing.
    detokenizer, _, used = run(tokenizer, ids_of(tokenizer, "he", 0xFF, 0x0A, 0x0A, "he"), ("\n",))
    assert (detokenizer.text, used) == ("he\ufffd\ufffd\ufffdhe", 5)


def test_no_piece_holds_half_a_character(tokenizer):
    _, pieces, _ = feed(tokenizer, "a🙂b")
    assert [piece for piece in pieces if piece] == ["a", "🙂", "b"]


@every_tokenizer
def test_text_is_shown_as_it_comes(name):
    tokenizer = TOKENIZERS[name]
    word = ids_of(tokenizer, "he")
    _, pieces, _ = run(tokenizer, word * 50)
    assert all(pieces[:50])


def test_unfinished_character_at_the_end_shows_as_in_decode(tokenizer):
    ids = tokenizer.encode("a🙂")[:-1]
    detokenizer = Detokenizer(tokenizer)
    for token in ids:
        detokenizer.add(token)
    detokenizer.finish()
    assert detokenizer.text == decode(tokenizer, ids) == "a\ufffd"


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


@every_tokenizer
def test_special_tokens_are_left_out_or_kept(name):
    tokenizer = TOKENIZERS[name]
    ids = ids_of(tokenizer, "he", "</s>", "<think>", "he")
    for skip in (True, False):
        detokenizer, _, _ = run(tokenizer, ids, skip_special_tokens=skip)
        assert detokenizer.text == decode(tokenizer, ids, skip)
        assert ("</s>" in detokenizer.text) == (not skip)


RUNS = {
    "bytes that form no UTF-8": ("byte_fallback", (0xFF,)),
    "bytes that form characters": ("byte_fallback", (0xE6, 0xBC, 0xA2)),
    "letters spelled in bytes": ("byte_fallback", (0x41,)),
    "letters behind a byte that forms none": ("byte_fallback", ("he", 0xFF, *[0x41] * 200)),
    "no character is ever complete": ("byte_level", ("ÿÿ",)),
    "tokens that begin and end inside a character": ("byte_level", ("ĺģð", "Ł")),
    "words": ("byte_level", ("Ġhe",)),
}


@pytest.mark.parametrize("stop", [(), ("A漢",), ("AB", "\ufffdx")], ids=["free", "stop", "stops"])
@pytest.mark.parametrize("kind", RUNS)
def test_a_new_token_costs_the_decoding_of_a_few(kind, stop):
    name, tokens = RUNS[kind]
    tokenizer = TOKENIZERS[name]
    ids = (ids_of(tokenizer, *tokens) * 2000)[:2000]
    detokenizer = Detokenizer(tokenizer, stop)
    counter = detokenizer._backend = CountingTokenizer(tokenizer.backend_tokenizer)
    for token in ids:
        detokenizer.add(token)
    detokenizer.finish()
    assert detokenizer.text == decode(tokenizer, ids)
    assert counter.decoded < 20 * len(ids)


class CountingTokenizer:
    """Counts the tokens that are decoded."""

    def __init__(self, backend):
        self.decoded = 0
        self.id_to_token = backend.id_to_token
        self._backend = backend

    def decode(self, ids, **options):
        self.decoded += len(ids)
        return self._backend.decode(ids, **options)
