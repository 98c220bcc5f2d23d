"""Experts of four-bit floats, against transformers' own code."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.models.dense import dense_attention_of
from tests.models.tiny import GPT_OSS, LENGTH, make_model, reference_logits, token_ids
from zipage.models.loading.loader import load_model
from zipage.models.loading.mxfp4 import Mxfp4Folder, dequantized
from zipage.models.shard import Piece, Shard

CONFIG = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}


def random_blocks(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts, rows and blocks of a row -> blocks and scales."""
    scales = torch.randint(118, 126, shape, dtype=torch.uint8)
    return torch.randint(0, 256, (*shape, 16), dtype=torch.uint8), scales


@pytest.fixture
def packed(tmp_path):
    """A folder with packed experts, and the model of transformers that it means."""
    torch.manual_seed(0)
    model = make_model("GptOss", **GPT_OSS)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        blocks, scales = random_blocks(experts, rows, columns // 32)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        model.get_parameter(name).data.copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIG}))
    return tmp_path, model


def test_values_by_hand():
    """1.0 and -0.5 at exponent 1, and the largest values at the smallest exponent."""
    blocks = torch.zeros(1, 1, 2, 16, dtype=torch.uint8)
    blocks[0, 0, 0, 0], blocks[0, 0, 1, 15] = 0x92, 0xF7
    scales = torch.tensor([[[128, 100]]], dtype=torch.uint8)
    out = dequantized(blocks, scales)
    assert out.shape == (1, 1, 64)
    assert out[0, 0, :2].tolist() == [2.0, -1.0]
    assert out[0, 0, 62:].tolist() == [6 * 2.0**-27, -6 * 2.0**-27]
    assert out[0, 0, 2:62].eq(0).all()


def test_equals_transformers():
    blocks, scales = random_blocks(3, 8, 5)
    assert torch.equal(dequantized(blocks, scales).mT, convert_moe_packed_tensors(blocks, scales))


def test_a_folder_computes_what_transformers_computes(packed, caplog):
    folder, model = packed
    decoder = load_model(str(folder), device="cpu").decoder
    assert "MXFP4 experts are dequantized" in caplog.text
    ids = token_ids()
    logits = decoder.logits(decoder(ids, torch.arange(LENGTH), dense_attention_of(decoder)))
    expected = reference_logits(model, ids)
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


def test_any_run_is_read_alone(packed):
    """Also one that begins and ends within a block."""
    weights = Mxfp4Folder(packed[0], torch.device("cpu"))
    assert weights.dtype == torch.float32
    for name in ("gate_up_proj", "down_proj"):
        whole = weights.read(f"model.layers.0.mlp.experts.{name}")
        for axis, full in enumerate(whole.shape):
            for first, count in ((0, full), (1, 3), (full // 2, full - full // 2), (full // 4, full // 3)):
                piece = Piece(axis, first, count, full)
                assert torch.equal(weights.read(f"model.layers.0.mlp.experts.{name}", piece), piece.of(whole))


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_hold_what_one_device_holds(packed, size):
    """Halves of a block of 32 among them; what is added to a sum once, rank 0 has alone."""
    whole = load_model(str(packed[0]), device="cpu").decoder.weight_views()
    shards = [load_model(str(packed[0]), device="cpu", shard=Shard(rank, size)).decoder for rank in range(size)]
    for name in (name for name in whole if ".experts." in name or name.endswith("sinks")):
        views = [shard.weight_views()[name] for shard in shards]
        (piece,) = shards[0].weight_pieces()[name]
        if name.endswith("down_proj_bias"):
            assert torch.equal(views[0], whole[name])
            assert not any(view.any() for view in views[1:])
        elif name.endswith("sinks"):  # of two KV heads: four ranks hold each twice
            assert torch.equal(torch.cat(views[:: size // 2]), whole[name])
        else:
            assert torch.equal(torch.cat(views, dim=piece.axis), whole[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"down_proj_scales": None}, "down_proj_blocks is quantized and .*down_proj_scales is missing"),
        (
            {"down_proj_scales": torch.zeros(6, 64, 2, dtype=torch.uint8)},
            r"down_proj_scales is \[6, 64, 2\], not \[6, 64, 1\] as",
        ),
        ({"down_proj_scales": torch.zeros(6, 64, 1)}, r"down_proj_scales is torch.float32, not torch.uint8"),
        ({"down_proj_blocks": torch.zeros(6, 64, 8, dtype=torch.uint8)}, r"down_proj_blocks is \[6, 64, 8\], which no"),
        ({"down_proj_blocks": None}, "down_proj_scales is of no MXFP4 experts"),
        ({"down_proj_bias": torch.zeros(6, 64, dtype=torch.uint8)}, "down_proj_bias is U8; supported: F64"),
    ],
)
def test_broken_blocks_are_named(packed, changes, message):
    folder, _ = packed
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        tensors[f"model.layers.1.mlp.experts.{name}"] = tensor
    save_file({name: x for name, x in tensors.items() if x is not None}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_model(str(folder), device="cpu")


def test_a_scale_that_is_no_number_is_named(packed):
    folder, _ = packed
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.experts.down_proj_scales"][3, 7, 0] = 255
    save_file(tensors, folder / "model.safetensors")
    message = r"layers\.1\.mlp\.experts\.down_proj_scales holds 255 \(1 of 384 scales\): must be below 255, which is no"
    with pytest.raises(ValueError, match=message):
        load_model(str(folder), device="cpu")


def test_bytes_without_the_config_s_word_are_refused(packed):
    folder, _ = packed
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is U8; supported: F64"):
        load_model(str(folder), device="cpu")
