"""A trained scorer, against transformers' own attention and hidden states in float64, and plain least squares."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from tests.tiny_models import save_tiny_model
from zipage import train_scorer
from zipage.models.loading.loader import load_model
from zipage.worker import train_scorer as module
from zipage.worker.ridge import RidgeSums

SOURCE = {"corpus": "made up"}
SEPARATOR = [7, 8, 9]
TEXTS = [([(7 * i * i + 3 * n) % 300 for i in range(14 + n)], 5 + n % 4) for n in range(20)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model("qwen3", tmp_path_factory.mktemp("model"), num_hidden_layers=2)


@pytest.fixture(scope="module")
def transformers_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")


def dense_samples(model, tokens, prompt_len, target):
    """Per layer, inputs [n, width] and targets [n, H], one entry at a time from whole attention matrices."""
    if target == "repeat":
        read, n = [*tokens, *SEPARATOR, *tokens], len(tokens)
        queries = [range(len(tokens) + len(SEPARATOR), len(read))] * n
    else:
        read, n = tokens, len(tokens) - 1
        starts = [max(j + 1, prompt_len) for j in range(n)]
        queries = [range(start, min(start + module.HORIZON, len(read))) for start in starts]
    inputs, values = [], []
    handles = []
    for layer in model.model.layers:
        handles.append(layer.input_layernorm.register_forward_hook(lambda _, __, out: inputs.append(out[0].detach())))
        handles.append(layer.self_attn.v_proj.register_forward_hook(lambda _, __, out: values.append(out[0].detach())))
    with torch.no_grad():
        shares = model(torch.tensor([read]), output_attentions=True).attentions
    for handle in handles:
        handle.remove()
    heads, d = model.config.num_key_value_heads, model.model.layers[0].self_attn.head_dim
    group = model.config.num_attention_heads // heads
    found = []
    for layer, x, v, a in zip(model.model.layers, inputs, values, shares, strict=True):
        weight = layer.self_attn.o_proj.weight.detach()
        y = np.zeros((n, heads))
        for j in range(n):
            for h in range(heads):
                most = 0.0
                for g in range(h * group, (h + 1) * group):
                    added = (weight[:, g * d : (g + 1) * d] @ v[j, h * d : (h + 1) * d]).norm()
                    most = max(most, float((a[0, g, queries[j], j] * added / x[queries[j]].norm(dim=-1)).max()))
                y[j, h] = np.log(max(most, 1e-12))
        found.append((x[:n].numpy(), y))
    return found


@pytest.mark.parametrize("target", ["repeat", "future"])
def test_samples_are_what_later_queries_add(folder, transformers_model, target, monkeypatch):
    monkeypatch.setattr(module, "HORIZON", 6)
    monkeypatch.setattr("zipage.worker.entry_targets.ROWS", 7)
    decoder = load_model(str(folder), device="cpu", dtype="float32").decoder
    found = []
    for tokens, prompt_len in TEXTS[:2]:
        found.clear()
        with torch.inference_mode():
            module.read(decoder, tokens, prompt_len, target, SEPARATOR, lambda layer, *pair: found.append(pair))
        for layer, (x, y) in enumerate(dense_samples(transformers_model, tokens, prompt_len, target)):
            np.testing.assert_allclose(found[layer][0].numpy(), x, atol=1e-4)
            np.testing.assert_allclose(found[layer][1].numpy(), y, atol=1e-3)


@pytest.mark.parametrize("target", ["repeat", "future"])
def test_the_file_is_the_ridge_regression(folder, transformers_model, target, tmp_path):
    options = {"target": target, "separator": SEPARATOR, "ridge": 0.1, "source": SOURCE, "device": "cpu"}
    r2 = train_scorer(folder, TEXTS, tmp_path / "file", **options)
    with safe_open(tmp_path / "file", framework="np") as file:
        header = json.loads(file.metadata()["calibration"])
        weight, bias = file.get_tensor("weight"), file.get_tensor("bias")
    samples = [dense_samples(transformers_model, *text, target) for text in TEXTS]
    kept, held_out = ([s for i, s in enumerate(samples) if (i % 10 == 9) == out] for out in (False, True))
    for layer in range(2):
        x, y = (np.concatenate([text[layer][i] for text in kept]) for i in (0, 1))
        centred = x - x.mean(axis=0)
        expected = np.linalg.solve(centred.T @ centred + 0.1 * np.eye(x.shape[1]), centred.T @ (y - y.mean(axis=0))).T
        np.testing.assert_allclose(weight[layer], expected, atol=2e-2)
        intercept = (y - x @ expected.T).mean(axis=0)
        np.testing.assert_allclose(x @ weight[layer].T + bias[layer], x @ expected.T + intercept, atol=2e-3)
        x, y = (np.concatenate([text[layer][i] for text in held_out]) for i in (0, 1))
        errors = np.square(y - x @ weight[layer].T - bias[layer]).sum(axis=0)
        of_head = 1 - errors / np.square(y - y.mean(axis=0)).sum(axis=0)
        assert r2[layer] == pytest.approx(of_head.mean(), abs=2e-3)
    assert header["held_out_r2"] == r2
    assert (header["kind"], header["target"], header["ridge"], header["corpus"]) == ("kvzap", target, 0.1, "made up")
    assert header["entries"] == sum(len(text[0][0]) for text in kept)


def test_sums_find_what_made_the_samples():
    sums = RidgeSums(1, 5, 2, torch.device("cpu"))
    x, weight, bias = torch.randn(200, 5), torch.randn(2, 5), torch.randn(2)
    for part in x.split(30):
        sums.add(0, part, part @ weight.T + bias)
    found = sums.solve(1e-9)
    torch.testing.assert_close(found[0][0].float(), weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1][0].float(), bias, rtol=1e-4, atol=1e-5)
    assert sums.r2(*found).min() > 1 - 1e-9
    nothing = torch.zeros(1, 2, 5), (x @ weight.T + bias).mean(dim=0).double()[None]
    assert sums.r2(*nothing).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (TEXTS, {"target": "past"}, "target='past': must be one of repeat, future"),
        (TEXTS, {"ridge": 0.0}, "ridge=0.0: must be above 0"),
        (TEXTS[:9], {}, "9 texts: give at least 10"),
        ([([1, 2, 3], 3)] * 20, {"target": "future"}, "20 texts: none to train on, or none held out, has an entry"),
    ],
)
def test_what_cannot_be_trained(folder, tmp_path, texts, options, message):
    with pytest.raises(ValueError, match=message):
        train_scorer(folder, texts, tmp_path / "file", source=SOURCE, device="cpu", **options)
