"""Weights of eight-bit floats in blocks, against what each block means."""

import json
import logging
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.loading.fp8_writer import FILE, meant, quantized, write_fp8
from tests.tiny_models import HYBRIDS, save_tiny_model
from zipage.models.loading.fp8 import Fp8Folder, dequantized
from zipage.models.loading.identity import model_identity
from zipage.models.loading.loader import load_model
from zipage.models.loading.safetensors_folder import SafetensorsFolder
from zipage.models.shard import Piece, Shard

CPU = torch.device("cpu")
BLOCK = (20, 24)
"""Fits none of the shapes."""
NAME = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("fp8")
    return write_fp8(save_tiny_model("qwen3", path / "plain", num_hidden_layers=2), path / "fp8", BLOCK)


@pytest.fixture
def folder(made, tmp_path):
    """One to change."""
    for file in ("config.json", FILE):
        (tmp_path / file).write_bytes((made / file).read_bytes())
    return tmp_path


def edit(folder, **changes):
    tensors = load_file(folder / FILE)
    tensors |= {NAME + end: tensor for end, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / FILE)


def edit_quantization(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= fields
    (folder / "config.json").write_text(json.dumps(config))


def test_values_by_hand():
    """Blocks of 2 by 3, cut off at 3 by 4; the largest code is 448, the smallest 2**-9."""
    codes = torch.tensor([[1.0, -2.0, 448.0, 0.5], [1.0, 1.0, 1.0, 1.0], [2.0**-9, -448.0, 0.0, 3.0]])
    scales = torch.tensor([[0.5, 10.0], [2.0, -1.0]])
    expected = [[0.5, -1.0, 224.0, 5.0], [0.5, 0.5, 0.5, 10.0], [2.0**-8, -896.0, 0.0, -3.0]]
    assert dequantized(codes.to(torch.float8_e4m3fn), scales, (2, 3)).tolist() == expected


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "block"), [((256, 384), (128, 128)), ((96, 64), BLOCK), ((5, 7), (128, 128))])
def test_every_code_times_the_scale_of_its_block(shape, block, scale_dtype):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    codes[(codes & 127) == 127] = 0  # not numbers
    codes = codes.view(torch.float8_e4m3fn)
    scales = quantized(torch.randn(shape, generator=generator), block, scale_dtype)[1]
    found = dequantized(codes, scales, block)
    assert found.dtype is torch.float32
    assert torch.equal(found, meant(codes, scales, block))


def test_any_run_of_rows_or_columns(made):
    weights = Fp8Folder(made, CPU, BLOCK)
    whole = weights.read(NAME)
    assert torch.equal(whole, load_file(made / "dense" / FILE)[NAME])
    for axis, full in enumerate(whole.shape):
        for first in range(0, full + 9, 7):
            piece = Piece(axis, first, 30, full)
            assert torch.equal(weights.read(NAME, piece), piece.of(whole))


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "family",
    ["llama", "phi3", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_are_those_of_the_dense_folder(family, dtype, scale_dtype, tmp_path):
    """Whole and, where models are spread, on each of two ranks; rounded once."""
    folder = write_fp8(save_tiny_model(family, tmp_path / "plain", num_hidden_layers=2), tmp_path, BLOCK, scale_dtype)
    for shard in (Shard(),) if family in HYBRIDS else (Shard(), Shard(0, 2), Shard(1, 2)):
        found, expected = (
            load_model(str(place), device="cpu", dtype=dtype, shard=shard).decoder.state_dict()
            for place in (folder, folder / "dense")
        )
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_each_tensor_is_read_once(made, monkeypatch):
    read = Counter()
    original = SafetensorsFolder.read

    def counted(self, name, piece=None):
        read[name] += 1
        return original(self, name, piece)

    monkeypatch.setattr(SafetensorsFolder, "read", counted)
    load_model(str(made), device="cpu")
    assert read == dict.fromkeys(load_file(made / FILE), 1)


def test_one_line_says_what_it_costs(made, caplog, monkeypatch):
    with caplog.at_level(logging.WARNING, logger="zipage"):
        for rank in range(2):
            load_model(str(made), device="cpu", dtype="bfloat16", shard=Shard(rank, 2))
    assert [record.message for record in caplog.records] == [
        "FP8 weights are dequantized to the model's dtype: 0.0 GiB of them take 0.0 GiB in bfloat16"
    ]
    weights = Fp8Folder(made, CPU, BLOCK)
    monkeypatch.setattr(weights._files, "shapes", dict.fromkeys(weights._files.shapes, (2**15, 2**15)))
    weights._quantized = {NAME: (2**15, 2**15)}
    assert weights.cost(torch.bfloat16).endswith("5.0 GiB of them take 2.0 GiB in bfloat16")


def test_the_dtype_is_that_of_what_is_not_quantized(folder):
    tensors = load_file(folder / FILE)
    kept = {
        name: x.bfloat16() if x.dtype is torch.float32 and "_scale" not in name else x for name, x in tensors.items()
    }
    save_file(kept, folder / FILE)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": None}))
    assert load_model(str(folder), device="cpu").spec.dtype is torch.bfloat16


def test_weights_and_scales_may_lie_in_different_shards(made, folder):
    shards = {"a.safetensors": {}, "b.safetensors": {}}
    for name, tensor in load_file(folder / FILE).items():
        shards["a.safetensors" if name.endswith("_scale_inv") else "b.safetensors"][name] = tensor
    (folder / FILE).unlink()
    for shard, tensors in shards.items():
        save_file(tensors, folder / shard)
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    (folder / f"{FILE}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    found, expected = (load_model(str(place), device="cpu").decoder.state_dict() for place in (folder, made))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_files_made_of_such_a_model_know_it_again(made):
    assert model_identity(str(made)) == model_identity(str(made / "dense"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_scale_inv": None}, r"q_proj\.weight is quantized and .*q_proj\.weight_scale_inv is missing"),
        ({"_scale_inv": torch.ones(5, 2)}, r"weight_scale_inv is \[5, 2\], not \[5, 3\] as .*weight of \[96, 64\]"),
        ({"_scale_inv": torch.ones(())}, r"weight_scale_inv is \[\], not \[5, 3\]"),
        ({"_scale_inv": torch.ones(5, 3).half()}, "weight_scale_inv is torch.float16, not torch.float32 or torch.bfl"),
        ({"_scale_inv": torch.ones(5, 3).to(torch.uint8)}, "weight_scale_inv is U8; supported: F64"),
        ({"": None}, r"q_proj\.weight_scale_inv is of no FP8 weights"),
        ({"": torch.ones(96, 64)}, r"q_proj\.weight_scale_inv is of no FP8 weights"),
        ({"": torch.ones(2, 48, 64).to(torch.float8_e4m3fn)}, r"q_proj\.weight is \[2, 48, 64\], which no FP8 weights"),
        ({"": torch.ones(96, 64).to(torch.float8_e5m2)}, r"q_proj\.weight is F8_E5M2; supported: F64"),
        ({"_bias": torch.ones(96).to(torch.float8_e4m3fn)}, "weight_bias is F8_E4M3; supported: F64"),
        ({"": torch.ones(80, 64).to(torch.float8_e4m3fn), "_scale_inv": torch.ones(4, 3)}, r"is \[80, 64\], not \[96"),
        ({"_scale": torch.ones(5, 3)}, r"left over: .*q_proj\.weight_scale"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, changes, message):
    edit(folder, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(str(folder), device="cpu")
    assert str(folder) in str(caught.value)


def with_one(value, dtype=torch.float32):
    """Scales of which one has another value."""
    scales = torch.full((5, 3), 0.01, dtype=dtype)
    scales[3, 1] = value
    return scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), r"holds nan \(1 of 15 scales\): must be finite and not negative: download the model again"),
        (float("inf"), r"holds inf \(1 of 15 scales\): must be finite"),
        (-0.5, r"holds -0\.5 \(1 of 15 scales\): must be finite and not negative"),
        (0.0, r"holds 0 \(1 of 15 scales\): must be positive where codes are not zero"),
    ],
)
def test_a_scale_that_is_none_is_named(folder, value, message, dtype):
    edit(folder, _scale_inv=with_one(value, dtype))
    with pytest.raises(ValueError, match=rf"layers\.0\.self_attn\.q_proj\.weight_scale_inv {message}") as caught:
        load_model(str(folder), device="cpu")
    assert str(folder) in str(caught.value)


def test_a_block_of_zeros_may_have_the_scale_zero(folder):
    codes = torch.ones(96, 64)
    codes[60:80, 24:48] = 0
    edit(folder, **{"": codes.to(torch.float8_e4m3fn), "_scale_inv": with_one(0.0)})
    load_model(str(folder), device="cpu")


def test_codes_and_products_that_are_no_numbers(folder):
    codes = torch.full((96, 64), 448.0)
    edit(folder, **{"": codes.to(torch.float8_e4m3fn), "_scale_inv": with_one(1e38)})
    with pytest.raises(ValueError, match=r"q_proj\.weight holds inf: 480 of its 6144 values are not finite"):
        load_model(str(folder), device="cpu")
    codes[5, 6] = float("nan")
    edit(folder, **{"": codes.to(torch.float8_e4m3fn), "_scale_inv": with_one(0.01)})
    with pytest.raises(ValueError, match=r"q_proj\.weight holds nan: 1 of its 6144 values are not finite"):
        load_model(str(folder), device="cpu")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"weight_block_size": None},
            r"\(fp8\) with weight_block_size=None: must be two integers from 1 to 2147483647; use unq",
        ),
        ({"weight_block_size": [1, 2**70]}, r"weight_block_size=\[1, 1180591620717411303424\]: must be two integers"),
        ({"weight_block_size": [128]}, r"weight_block_size=\[128\]: must be two integers"),
        ({"weight_block_size": [128, 0]}, r"weight_block_size=\[128, 0\]: must be two integers"),
        ({"weight_block_size": [128, 1.5]}, r"weight_block_size=\[128, 1.5\]: must be two integers"),
        ({"weight_block_size": "128"}, "weight_block_size='128': must be two integers"),
        ({"activation_scheme": "static"}, "activation_scheme='static' is not supported; use unquantized weights, FP8"),
        ({"fmt": "e5m2"}, "fmt='e5m2' is not supported"),
        ({"expert_dtype": "fp4"}, "expert_dtype='fp4' is not supported"),
        ({"quant_method": "compressed-tensors"}, r"quantization_config \(compressed-tensors\) is not supported"),
        ({"quant_method": "awq"}, r"\(awq\) is not supported; use unquantized weights, FP8 in blocks or a GGUF file"),
        ({"quant_method": "gptq"}, r"\(gptq\) is not supported"),
        ({"quant_method": "bitsandbytes"}, r"\(bitsandbytes\) is not supported"),
        ({"quant_method": "mxfp4"}, r"\(mxfp4\) is not supported"),
        ({"quant_method": None}, r"\(None\) is not supported"),
        ({"quant_method": ["fp8"]}, r"\(\['fp8'\]\) is not supported"),
    ],
)
def test_other_forms_are_refused_before_weights_are_opened(folder, fields, message, monkeypatch):
    edit_quantization(folder, **fields)
    monkeypatch.setattr(SafetensorsFolder, "__init__", None)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(str(folder), device="cpu")
    assert "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_codes_without_the_config_s_word_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is F8_E4M3; supported: F64"):
        load_model(str(folder), device="cpu")


def test_random_weights_need_the_config_alone(folder):
    (folder / FILE).unlink()
    load_model(str(folder), load_format="dummy", device="cpu")
