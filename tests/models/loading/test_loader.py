"""What a folder must hold, and what is said when it does not."""

import json
import logging
import math
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.dense import dense_attention, dense_recurrence_of
from tests.models.tiny import COMMON, HYBRID, LENGTH, make_model, reference_logits, token_ids
from zipage.models.loading.loader import load_model, resolve_device
from zipage.models.shard import Shard

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    make_model("Llama").save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    make_model("Llama").save_pretrained(tmp_path, max_shard_size="60KB")
    return tmp_path


def edit_weights(folder, edit, file="model.safetensors"):
    tensors = load_file(folder / file)
    edit(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


def edit_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def logits(folder):
    decoder = load_model(str(folder), device="cpu").decoder
    return decoder.logits(decoder(token_ids(), torch.arange(LENGTH), dense_attention))


def test_missing_left_over_and_misshapen_tensors_are_named_together(folder):
    def edit(tensors):
        del tensors["model.layers.1.self_attn.k_proj.weight"]
        tensors["model.layers.2.self_attn.q_proj.bias"] = torch.zeros(64)
        tensors["model.norm.weight"] = torch.ones(63)

    edit_weights(folder, edit)
    with pytest.raises(ValueError, match="missing") as caught:
        load_model(str(folder), device="cpu")
    message = str(caught.value)
    assert "missing: model.layers.1.self_attn.k_proj.weight" in message
    assert "left over: model.layers.2.self_attn.q_proj.bias" in message
    assert "wrong shape: model.norm.weight is [63], not [64]" in message


@pytest.mark.parametrize("shard", [Shard(), Shard(1, 2)])
@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (math.nan, "float32", r"holds nan: 1 of its \d+ values are not finite; download the model again"),
        (-math.inf, "bfloat16", r"holds -inf: 1 of its \d+ values are not finite; download the model again"),
        (7e4, "float16", r"holds 7e\+04, which float16 cannot: pass dtype='bfloat16'"),
        (3.4e38, "bfloat16", r"holds 3\.4e\+38, which bfloat16 cannot: pass dtype='float32'"),
    ],
)
def test_a_weight_that_is_not_finite_is_named(folder, value, dtype, message, shard):
    """By the rank that holds it, where there are several."""
    name = "model.layers.1.self_attn.k_proj.weight"
    edit_weights(folder, lambda tensors: tensors[name][-1].fill_(1)[-1].fill_(value))
    with pytest.raises(ValueError, match=rf"{re.escape(str(folder))}: {re.escape(name)} {message}"):
        load_model(str(folder), device="cpu", dtype=dtype, shard=shard)
    load_model(str(folder), device="cpu", dtype=dtype, shard=Shard(0, 2))


def test_a_long_list_of_tensors_is_cut(folder):
    edit_config(folder, num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"left over: .*layers\.2\..* and 4 more"):
        load_model(str(folder), device="cpu")


def test_heads_that_predict_several_tokens_are_passed_over(tmp_path):
    """Qwen3-Next's; any other family's would be left over."""
    for name, options in (("Qwen3Next", HYBRID | {"num_experts": 0}), ("Qwen3", {})):
        folder = tmp_path / name
        make_model(name, **options).save_pretrained(folder)
        edit_weights(folder, lambda tensors: tensors.update({"mtp.norm.weight": torch.ones(64)}))
    load_model(str(tmp_path / "Qwen3Next"), device="cpu")
    with pytest.raises(ValueError, match=r"left over: mtp\.norm\.weight"):
        load_model(str(tmp_path / "Qwen3"), device="cpu")


def test_a_hybrid_of_random_weights_computes_something_in_each_layer(tmp_path):
    make_model("Qwen3Next", **HYBRID, num_experts=0).save_pretrained(tmp_path)
    decoder = load_model(str(tmp_path), device="cpu", load_format="dummy").decoder
    x, recurrence = torch.randn(5, 64), dense_recurrence_of(decoder)
    assert decoder.layers[0].net(x, recurrence).std() > 0.05


def test_old_rotary_buffers_are_harmless(folder):
    expected = logits(folder)
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(folder, lambda tensors: tensors.update({buffer: torch.ones(8)}))
    assert torch.equal(logits(folder), expected)


def test_a_tensor_in_two_shards(sharded):
    shards = sorted(sharded.glob("*.safetensors"))
    name = next(iter(load_file(shards[0])))
    edit_weights(sharded, lambda tensors: tensors.update({name: torch.zeros(1)}), shards[1].name)
    with pytest.raises(ValueError, match=f"tensor {name} lies in two shards"):
        load_model(str(sharded), device="cpu")


def test_a_missing_shard(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard.name} is missing"):
        load_model(str(sharded), device="cpu")


@pytest.mark.parametrize("place", ["../{}/", "{}/"])
def test_an_index_that_names_a_file_elsewhere(sharded, tmp_path_factory, place):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.rename(elsewhere / shard.name)
    path = sharded / INDEX
    named = place.format(elsewhere.name if place.startswith("..") else elsewhere) + shard.name
    path.write_text(path.read_text().replace(shard.name, named))
    with pytest.raises(ValueError, match=f"names '{named[:40]}.*: must be the name of a file beside it"):
        load_model(str(sharded), device="cpu")


def test_an_index_that_names_what_a_shard_lacks(sharded):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.ghost.weight"] = index["weight_map"]["model.norm.weight"]
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"puts model\.ghost\.weight in"):
        load_model(str(sharded), device="cpu")
    (sharded / INDEX).write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        load_model(str(sharded), device="cpu")


def test_a_cut_off_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a complete safetensors file"):
        load_model(str(folder), device="cpu")


def test_tensors_that_are_no_floats(folder):
    edit_weights(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}))
    with pytest.raises(ValueError, match=r"tensor model\.norm\.weight is I8"):
        load_model(str(folder), device="cpu")


def test_no_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        FileNotFoundError, match=r"neither model\.safetensors .*pytorch_model\.bin there cannot be used"
    ):
        load_model(str(folder), device="cpu")


def test_no_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_model(str(folder), device="cpu")


def test_an_equal_head_beside_tied_embeddings_is_the_embedding(tmp_path):
    reference = make_model("Llama", tie_word_embeddings=True)
    reference.save_pretrained(tmp_path)

    def edit(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit_weights(tmp_path, edit)
    loaded = load_model(str(tmp_path), device="cpu")
    assert loaded.spec.tie_embeddings
    assert loaded.decoder.lm_head is loaded.decoder.embedding


def test_another_head_beside_tied_embeddings_is_kept_as_transformers_does(tmp_path, caplog):
    reference = make_model("Llama", tie_word_embeddings=True)
    reference.save_pretrained(tmp_path)

    def edit(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    edit_weights(tmp_path, edit)
    with caplog.at_level(logging.WARNING, logger="zipage"):
        actual = logits(tmp_path)
    assert "not tied" in caplog.text
    expected = reference_logits(type(reference).from_pretrained(tmp_path, dtype=torch.float32), token_ids())
    assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_checkpoints_of_half_precision_are_cast(dtype, tmp_path):
    reference = make_model("Qwen2").to(dtype)
    reference.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), device="cpu")
    assert loaded.spec.dtype is dtype
    assert loaded.decoder.dtype is torch.float32
    weights = reference.state_dict()
    assert all(torch.equal(view, weights[name].float()) for name, view in loaded.decoder.weight_views().items())


def test_a_config_without_dtype_takes_the_weights(folder):
    edit_config(folder, dtype=None)
    assert load_model(str(folder), device="cpu").spec.dtype is torch.float32


def test_dummy_needs_the_config_alone(tmp_path):
    values = COMMON | {"model_type": "qwen3", "num_hidden_layers": 40, "attention_bias": True}
    (tmp_path / "config.json").write_text(json.dumps(values))
    first, again, other = (
        load_model(str(tmp_path), load_format="dummy", dtype="bfloat16", device="cpu", seed=seed).decoder
        for seed in (1, 1, 2)
    )
    states = [decoder.state_dict() for decoder in (first, again, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["embedding"], states[2]["embedding"])
    result = first.logits(first(token_ids(), torch.arange(LENGTH), dense_attention)).float()
    assert result.isfinite().all()
    assert 0.3 < result.std() < 3


def test_devices_and_dtypes_that_do_not_exist(folder):
    with pytest.raises(ValueError, match="device='warp'"):
        resolve_device("warp")
    with pytest.raises(ValueError, match="device='cuda:99'"):
        resolve_device("cuda:99")
    with pytest.raises(ValueError, match="dtype='int8'"):
        load_model(str(folder), device="cpu", dtype="int8")
