"""Files that lie: every fault is a ValueError that names the file and the field, before anything large is allocated."""

import json
import resource
import struct
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.models.loading.fp8_writer import write_fp8
from tests.models.loading.gguf_writer import write_gguf
from tests.models.loading.test_tokenizer import metadata as vocabulary
from tests.models.tiny import make_model
from zipage.models.loading.gguf_file import GgufFile
from zipage.models.loading.loader import load_model
from zipage.models.loading.tokenizer import load_tokenizer

REPEATABLE = settings(
    max_examples=150, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
INDEX = "model.safetensors.index.json"
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32}
DEEP = "[" * 100_000 + "]" * 100_000


@contextmanager
def memory(gibibytes: float):
    """Fails any allocation that takes the process beyond its present size and so much."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + int(gibibytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def load(path: Path, load_format: str = "auto") -> None:
    with memory(0.75):
        load_model(str(path), device="cpu", load_format=load_format)


def loads_or_names(path: Path, act) -> None:
    """See that a file is loaded, or refused by an error of the right kind that names it."""
    refusal = None
    try:
        act()
    except (ValueError, FileNotFoundError) as error:
        refusal = error
    assert refusal is None or str(path) in str(refusal)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("malformed") / "folder"
    make_model("Qwen3", num_hidden_layers=1).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def fp8(folder, tmp_path_factory) -> Path:
    return write_fp8(folder, tmp_path_factory.mktemp("malformed") / "fp8", (20, 24))


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("malformed") / "model.gguf"
    write_gguf(path, make_model("Llama", num_hidden_layers=1), Type.Q8_0, vocabulary("smollm"))
    return path


@contextmanager
def edited(path: Path, content: bytes | str):
    before = path.read_bytes()
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    try:
        yield path
    finally:
        path.write_bytes(before)


def config_with(folder: Path, **fields) -> str:
    return json.dumps(json.loads((folder / "config.json").read_text()) | fields)


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dtype", 5, "dtype=5: must be a text"),
        ("dtype", "int8", "dtype=.*int8.? is not supported"),
        ("architectures", 5, "architectures=5: must be a list of texts"),
        ("architectures", "Qwen3ForCausalLM", "architectures='Qwen3ForCausalLM': must be a list of texts"),
        ("model_type", ["qwen3"], r"unknown architecture \['qwen3'\]"),
        ("hidden_size", 10**400, "hidden_size=10+...: must be an integer, at most"),
        ("hidden_size", 2**30, "wrong shape: .*embed_tokens|takes .* GiB"),
        ("hidden_size", -64, "width=-64: must be an integer, at least 1"),
        ("vocab_size", 2**31 - 1, "wrong shape: .*embed_tokens|takes .* GiB"),
        ("vocab_size", True, "vocab_size=True: must be an integer"),
        ("head_dim", 0, "head_dim=0: must be at least 1"),
        ("head_dim", 2**40, "head_dim=1099511627776: must be an integer, at most"),
        ("num_attention_heads", 0, "num_heads=0: must be an integer, at least 1"),
        ("num_attention_heads", None, "num_attention_heads"),
        ("num_hidden_layers", 2**50, "num_hidden_layers=1125899906842624: must be an integer, at most"),
        ("num_key_value_heads", 0, "num_kv_heads=0: must be an integer, at least 1"),
        ("max_position_embeddings", 0, "max_position=0: must be an integer, at least 1"),
        ("rms_norm_eps", float("nan"), "rms_norm_eps=nan: must be a finite number"),
        ("rms_norm_eps", -1.0, "rms_norm_eps=-1.0: must be a finite number, at least 0"),
        ("tie_word_embeddings", "false", "tie_word_embeddings='false': must be true or false"),
        ("eos_token_id", "2", "eos_token_id='2': must be an integer or a list of integers"),
        ("eos_token_id", [1, [2]], r"eos_token_id=\[1, \[2\]\]: must be an integer or a list of integers"),
        ("layer_types", [{}], r"layer_types=\[\{\}\]: must be a list of texts"),
        ("quantization_config", "fp8", "quantization_config='fp8': must be an object"),
        ("quantization_config", [1], r"quantization_config=\[1\]: must be an object"),
        ("rope_parameters", 5, "rope_parameters=5: must be an object"),
        ("rope_parameters", {"rope_type": 5}, "rope_parameters=.*: must be an object with a rope_type"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 0}, "rope_parameters=.*: must be .* above 0"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 1e300}, "a rotary frequency is not above 0"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": None}, "rope_parameters of rope_type=.* lack"),
        ("rope_parameters", YARN | {"original_max_position_embeddings": 0}, "rope_parameters=.*: must be .* above 0"),
        ("rope_parameters", YARN | {"factor": 1e308}, "max_position=.*: must be an integer, at least 1 and at most"),
    ],
)
def test_a_field_of_the_config_that_is_wrong_is_named(folder, field, value, message, load_format):
    with (
        edited(folder / "config.json", config_with(folder, **{field: value})),
        pytest.raises(ValueError, match=message) as caught,
    ):
        load(folder, load_format)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "num_attention_heads"])
def test_a_shape_is_never_that_of_some_other_model(folder, field):
    fields = json.loads((folder / "config.json").read_text())
    del fields[field]
    with (
        edited(folder / "config.json", json.dumps(fields)),
        pytest.raises(ValueError, match=rf"config\.json: {field} is missing"),
    ):
        load(folder, "dummy")


def test_fields_that_are_not_read_do_not_matter(folder):
    with edited(folder / "config.json", config_with(folder, num_labels=2**40, attribute_map=5)):
        load(folder)


def test_an_end_in_the_generation_config_that_is_no_id_names_that_file(folder):
    with (
        edited(folder / "generation_config.json", '{"eos_token_id": "2"}'),
        pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id='2': must be an integer or a list"),
    ):
        load(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_json_nested_deep_is_no_json(folder, name):
    with edited(folder / name, DEEP), pytest.raises(ValueError, match=rf"{name} is not valid JSON: .*recursion"):
        load(folder)


VALUES = st.recursive(
    st.sampled_from([None, True, False, "", "x", "yarn", "linear"]) | st.integers(-(2**70), 2**70) | st.floats(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["rope_type", "rope_theta", "factor", "type", "x"]), inner, max_size=3)
    ),
    max_leaves=4,
)


@REPEATABLE
@given(data=st.data())
def test_any_field_with_any_value_is_loaded_or_named(folder, data):
    fields = json.loads((folder / "config.json").read_text())
    name = data.draw(st.sampled_from([*fields, "rope_scaling", "torch_dtype", "sliding_window", "num_labels"]))
    with edited(folder / "config.json", config_with(folder, **{name: data.draw(VALUES)})):
        loads_or_names(folder, lambda: load(folder))
        loads_or_names(folder, lambda: load(folder, "dummy"))


# Safetensors


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": 5}, "names 5: must be the name of a file beside it"),
        ({"a": ["x", 5], "b": "y"}, r"names \['x', 5\]: must be"),
        ({"a": None}, "names None: must be"),
        ({"a": "x" * 5000}, r"names 'x+\.\.\.: must be the name of a file beside it"),
        ({"a": "\u65e5" * 100}, "names '\u65e5+\\.*'?: must be"),  # 300 bytes
        ({"a": "x\0y"}, r"names 'x\\x00y': must be"),
        ({"a": "\ud800"}, r"names '\\ud800': must be"),
        ({"a": ""}, "names '': must be"),
        ({"a": "."}, r"names '\.': must be"),
        ({"a": ".."}, r"names '\.\.': must be"),
        ({"a": "../model.safetensors"}, r"names '\.\./model\.safetensors': must be"),
        ({"a": "/model.safetensors"}, r"names '/model\.safetensors': must be"),
        ({}, "has no weight_map"),
        ("a", "has no weight_map"),
    ],
)
def test_an_index_whose_shards_are_no_names(tmp_path, folder, weight_map, message):
    (tmp_path / "config.json").write_text(config_with(folder))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path)
    assert str(tmp_path / INDEX) in str(caught.value)


def test_weights_without_tensors(tmp_path, folder):
    (tmp_path / "config.json").write_text(config_with(folder, dtype=None))
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    with pytest.raises(ValueError, match=r"model\.safetensors holds no tensors"):
        load(tmp_path)


def mutated(data: st.DataObject, content: bytes, head: int) -> bytes:
    """The content with some bytes of its first `head` replaced, left out or put in."""
    result = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, head - 1))
        cut = data.draw(st.sampled_from([0, 1, 4, 8]))
        number = data.draw(st.sampled_from([2**64 - 1, 2**63, 2**40, 2**31, 1, 0])).to_bytes(8, "little")
        result[at : at + cut] = data.draw(st.binary(max_size=8) | st.just(number[: cut or 8]))
    return bytes(result)


@pytest.mark.parametrize("kind", ["folder", "fp8"])
@REPEATABLE
@given(data=st.data())
def test_any_header_of_safetensors_is_loaded_or_refused(kind, request, data):
    folder = request.getfixturevalue(kind)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    with edited(path, mutated(data, content, 8 + int.from_bytes(content[:8], "little"))):
        loads_or_names(folder, lambda: load(folder))


# GGUF


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("llama.attention.head_count", 0, "is 0: must be at least 1"),
        ("llama.attention.head_count", "four", "is 'four': must be an integer"),
        ("llama.attention.head_count_kv", [2, 2], r"is \[2, 2\]: must be an integer"),
        ("llama.attention.layer_norm_rms_epsilon", float("nan"), "is nan: must be a finite number"),
        ("llama.block_count", 1_000, "num_layers=1000, but there are"),
        ("llama.context_length", True, "is True: must be an integer"),
        ("llama.rope.freq_base", "x", "is 'x': must be a finite number"),
        (
            "llama.rope.freq_base",
            0.0,
            "'rope_theta': 0.0}: must be an object with a rope_type and finite numbers above 0",
        ),
        ("llama.rope.scaling.type", 5, "is 5: must be a text"),
        ("tokenizer.ggml.eos_token_id", "2", "is '2': must be an integer"),
        ("tokenizer.ggml.tokens", [1, 2], r"is \[1, 2\]: each of a list must be a text"),
        ("tokenizer.chat_template", 5, "is 5: must be a text"),
        ("general.architecture", 5, "unknown architecture 5"),
        ("general.alignment", -32, "is -32: must be a power of two"),
        ("general.alignment", 0, "is 0: must be a power of two"),
        ("general.alignment", 24, "is 24: must be a power of two"),
        ("general.alignment", "32", "is '32': must be an integer"),
        ("split.count", "x", "is 'x': must be an integer"),
    ],
)
def test_a_gguf_key_that_is_wrong_is_named(tmp_path, monkeypatch, key, value, message):
    path = tmp_path / "model.gguf"
    write_gguf(path, make_model("Llama", num_hidden_layers=1), Type.F32)
    parse = GgufFile._parse

    def parsed(self, cursor):
        parse(self, cursor)
        self.metadata[key] = value

    if key == "general.alignment":  # read while the header is parsed, so it must be in the file
        code = {int: struct.pack("<Ii", 5, value if isinstance(value, int) else 0)}
        code[str] = struct.pack("<IQ", 8, 2) + b"32"
        content = path.read_bytes()
        entry = struct.pack("<Q", len(key)) + key.encode() + code[type(value)]
        count = int.from_bytes(content[16:24], "little") + 1
        path.write_bytes(content[:16] + struct.pack("<Q", count) + entry + content[24:])
    else:
        monkeypatch.setattr(GgufFile, "_parse", parsed)
    with pytest.raises(ValueError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)
    if message.startswith("is ") or key.startswith("tokenizer"):
        assert key in str(caught.value)


def replaced(path: Path, name: str, shape: tuple[int, ...], **fields: int) -> bytes:
    """The file with other values in the entry of a tensor: `num_axes`, `axis`, `type` or `offset`."""
    content = bytearray(path.read_bytes())
    at = content.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name)
    places = {"num_axes": (at, "<I"), "axis": (at + 4, "<Q"), "type": (at + 4 + 8 * len(shape), "<I")}
    places["offset"] = (places["type"][0] + 4, "<Q")
    for field, value in fields.items():
        struct.pack_into(places[field][1], content, places[field][0], value)
    return bytes(content)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"offset": 0}, r"tensor \S+ overlaps tensor \S+"),
        ({"offset": 2**62}, "ends before tensor output_norm.weight does"),
        ({"offset": 7}, "tensor output_norm.weight lies at 7, no multiple of 32"),
        ({"axis": 2**62}, r"ends before|overlaps"),
        ({"axis": 0}, r"tensor output_norm.weight has shape \[0\]"),
        ({"type": 999}, "tensor output_norm.weight: 999 is not a valid"),
        ({"type": 8, "axis": 33}, "tensor output_norm.weight: .*not a multiple"),
        ({"num_axes": 2**32 - 1}, "broken GGUF header"),
    ],
)
def test_a_gguf_tensor_that_lies_is_named(gguf, fields, message):
    with (
        edited(gguf, replaced(gguf, "output_norm.weight", (64,), **fields)),
        pytest.raises(ValueError, match=message) as caught,
    ):
        load(gguf)
    assert str(gguf) in str(caught.value)


def test_rotary_divisors_that_are_no_divisors(tmp_path):
    path = tmp_path / "model.gguf"
    zeros = {"rope_freqs.weight": np.zeros(8, dtype=np.float32)}
    write_gguf(path, make_model("Llama", num_hidden_layers=1), Type.F32, extra_tensors=zeros)
    with pytest.raises(ValueError, match=r"model\.gguf: rope_freqs\.weight: a rotary frequency"):
        load(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("eos_token_id", 10_000, "eos_token_id is 10000: must be the id of one of"),
        ("token_type", [1, 1], "token_type has 2 values for"),
        ("merges", ["lo"], "merges: each merge must be two tokens"),
        ("merges", [5], r"merges is \[5\]: each of a list must be a text"),
        ("tokens", ["a", "a"], "tokens has a token twice"),
    ],
)
def test_a_gguf_tokenizer_that_is_wrong_is_named(tmp_path, key, value, message):
    path = tmp_path / "model.gguf"
    keys = {name: kept for name, kept in vocabulary("smollm").items() if key != "tokens" or "token_type" not in name}
    model = make_model("Llama", num_hidden_layers=1)
    write_gguf(path, model, Type.F32, keys | {f"tokenizer.ggml.{key}": value})
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(str(path))
    assert str(path) in str(caught.value)


@REPEATABLE
@given(data=st.data())
def test_any_gguf_header_is_loaded_or_refused(gguf, data):
    content = gguf.read_bytes()
    with edited(gguf, mutated(data, content, content.index(b"output_norm.weight") + 40)):
        loads_or_names(gguf, lambda: load(gguf))
        loads_or_names(gguf, lambda: load_tokenizer(str(gguf)))
