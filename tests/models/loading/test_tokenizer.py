import io
import json

import pytest
from gguf import GGMLQuantizationType as Type
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.models.loading.gguf_writer import write_gguf
from tests.models.tiny import make_model
from zipage.models.loading.hf_config import hf_config, spec_from_config
from zipage.models.loading.tokenizer import end_of_sequence_ids, load_tokenizer

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["Ċ Ċ", "Ġ Ġ", "1 2", "l o", "Ġ lo"]
TOKENS = [
    "<|im_start|>",
    "<pad>",
    "<|im_end|>",
    *ALPHABET,
    *(merge.replace(" ", "") for merge in MERGES),
    "<think>",
    "[PAD9]",
]
TEXTS = ["lo lo", "a\n\n12", "x  1", "naïve 日本語 😀", "<think>lo<|im_end|>", "it's  lo"]


def metadata(pre: str, **options) -> dict:
    types = [3, 3, 3] + [1] * (len(TOKENS) - 5) + [4, 1]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.padding_token_id": 1,
        "tokenizer.chat_template": TEMPLATE,
    } | {f"tokenizer.ggml.{key}": value for key, value in options.items()}


@pytest.fixture
def gguf_with(tmp_path):
    def write(pre, **options):
        path = tmp_path / "model.gguf"
        write_gguf(path, make_model("Llama"), Type.F32, metadata(pre, **options))
        return load_tokenizer(str(path))

    return write


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["a", "ĊĊ", "1", "2", "ĠĠ", "3"]),
        ("gpt-2", ["a", "Ċ", "Ċ", "12", "Ġ", "Ġ", "3"]),
        ("qwen2", ["a", "ĊĊ", "1", "2", "Ġ", "Ġ", "3"]),
        ("llama-bpe", ["a", "ĊĊ", "12", "Ġ", "Ġ", "3"]),
        ("gpt-4o", ["a", "ĊĊ", "12", "Ġ", "Ġ", "3"]),
    ],
)
def test_gguf_cuts_text_as_its_vocabulary_was_trained(gguf_with, pre, pieces):
    tokenizer = gguf_with(pre, add_bos_token=False)
    assert tokenizer.tokenize("a\n\n12  3") == pieces


def test_words_of_gpt_oss(gguf_with):
    """Capitals begin a word, an ending stays with its word, a slash with what is before it (tiktoken's o200k_base)."""
    cut = gguf_with("gpt-4o", add_bos_token=False).backend_tokenizer.pre_tokenizer.pre_tokenize_str
    text = "HelloWorld it's DON'T 12345 a/b://\n  x"
    pieces = ["Hello", "World", "Ġit's", "ĠDON'T", "Ġ", "123", "45", "Ġa", "/b", "://Ċ", "Ġ", "Ġx"]
    assert [piece for piece, _ in cut(text)] == pieces


@pytest.mark.parametrize("pre", ["smollm", "qwen2", "llama-bpe", "gpt-2", "gpt-4o"])
def test_gguf_text_comes_back(gguf_with, pre):
    tokenizer = gguf_with(pre, add_bos_token=False)
    assert [tokenizer.decode(tokenizer.encode(text)) for text in TEXTS] == TEXTS
    assert tokenizer.decode(tokenizer.encode("lo<|im_end|>"), skip_special_tokens=True) == "lo"


def test_gguf_special_tokens_and_template(gguf_with):
    tokenizer = gguf_with("smollm")
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", "<|im_end|>", "<pad>")
    assert (tokenizer.eos_token_id, len(tokenizer), tokenizer.unk_token) == (2, len(TOKENS), None)
    assert tokenizer.model_max_length == 128
    text = tokenizer.apply_chat_template([{"role": "user", "content": "lo"}], tokenize=False)
    assert text == "<|im_start|>user\nlo<|im_end|>\n"
    ids = tokenizer.encode(text)
    assert (ids[0], ids[-2]) == (0, 2)
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("<think>lo")) == ["<think>", "lo"]


def test_gguf_begin_of_sequence(gguf_with):
    assert gguf_with("llama-bpe").encode("lo")[0] == 0
    assert gguf_with("smollm", add_bos_token=True).encode("lo")[0] == 0
    assert gguf_with("smollm").encode("lo", add_special_tokens=True)[0] != 0


def test_gguf_tokenizers_that_are_not_known(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, make_model("Llama"), Type.F32)
    with pytest.raises(ValueError, match="holds no tokenizer: pass skip_tokenizer_init=True"):
        load_tokenizer(str(path))
    write_gguf(path, make_model("Llama"), Type.F32, metadata("jais"))
    with pytest.raises(ValueError, match=r"pre-tokenizer 'jais' is not supported.*skip_tokenizer_init=True"):
        load_tokenizer(str(path))


def byte_level() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(TOKENS)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", chat_template=TEMPLATE)


def test_folder(tmp_path):
    saved = byte_level()
    saved.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert [loaded.encode(text) for text in TEXTS] == [saved.encode(text) for text in TEXTS]
    assert (loaded.eos_token_id, loaded.chat_template) == (2, TEMPLATE)


def test_folder_without_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer .*skip_tokenizer_init=True"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"cannot be read .*skip_tokenizer_init=True"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("mapped", ["tokenizer_config.json", "config.json", "both"])
def test_code_in_a_folder_is_never_run_nor_asked_about(tmp_path, mapped, monkeypatch, capsys):
    auto_map = {"AutoConfig": "own.Config", "AutoTokenizer": ["own.Tokenizer", None]}
    for name in ("tokenizer_config.json", "config.json"):
        own = {"model_type": "own", "tokenizer_class": "Tokenizer", "auto_map": auto_map}
        (tmp_path / name).write_text(json.dumps(own if mapped in (name, "both") else {"model_type": "llama"}))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2}')
    (tmp_path / "merges.txt").write_text("a b\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with pytest.raises(
        ValueError, match=r"code, which is never run: save it as tokenizer\.json|cannot be read"
    ) as caught:
        load_tokenizer(str(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert not (tmp_path / "ran").exists()
    assert "Do you wish to run" not in capsys.readouterr().out
    for file in ("vocab.json", "merges.txt"):
        (tmp_path / file).unlink()
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[1]"),
        ("tokenizer_config.json", "[" * 100_000),
        ("tokenizer_config.json", {"model_input_names": 5}),
        ("tokenizer.json", {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}),  # Rust panics
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}),
    ],
)
def test_errors_of_a_broken_tokenizer_name_the_folder(tmp_path, name, content):
    byte_level().save_pretrained(tmp_path)
    if isinstance(content, dict):
        content = json.dumps(json.loads((tmp_path / name).read_text()) | content)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match="the tokenizer cannot be read") as caught:
        load_tokenizer(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def save_with_template(folder, template) -> None:
    byte_level().save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": template}))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, None),
        (TEMPLATE, TEMPLATE),
        ({"default": TEMPLATE}, {"default": TEMPLATE}),
        ([{"name": "default", "template": TEMPLATE}, {"name": "b", "template": ""}], {"default": TEMPLATE, "b": ""}),
    ],
)
def test_a_chat_template_is_a_text_or_several_by_name(tmp_path, template, expected):
    save_with_template(tmp_path, template)
    assert load_tokenizer(str(tmp_path)).chat_template == expected


@pytest.mark.parametrize("template", [5, True, 1.5, [5], {"a": 5}, [{"name": "a"}], [{"name": 5, "template": "x"}]])
def test_a_chat_template_that_is_none_is_named(tmp_path, template):
    save_with_template(tmp_path, template)
    with pytest.raises(ValueError, match=r"chat_template=.*: must be a text") as caught:
        load_tokenizer(str(tmp_path))
    assert str(tmp_path / "tokenizer_config.json") in str(caught.value)


def test_ends_of_a_sequence_are_the_union():
    spec = spec_from_config(hf_config({"model_type": "qwen2", "eos_token_id": [7, 8]}))
    assert end_of_sequence_ids(spec.eos_token_ids) == {7, 8}
    assert end_of_sequence_ids(spec.eos_token_ids, byte_level()) == {2, 7, 8}


def test_gguf_sentencepiece(tmp_path):
    path = tmp_path / "model.gguf"
    pieces = ["▁", "l", "o", "lo", "▁lo"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    keys = {
        "model": "llama",
        "tokens": tokens,
        "scores": [0.0] * 259 + [-5.0, -4.0, -3.0, -2.0, -1.0],
        "token_type": [2, 3, 3] + [6] * 256 + [1] * 5,
        "bos_token_id": 1,
    }
    write_gguf(path, make_model("Llama"), Type.F32, {f"tokenizer.ggml.{key}": value for key, value in keys.items()})
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("lo lo  o")) == ["<s>", "▁lo", "▁lo", "▁", "▁", "o"]
    assert tokenizer.decode(tokenizer.encode("lo é lo"), skip_special_tokens=True) == "lo é lo"
    assert tokenizer.eos_token_id == 2
