"""Statistics of a model's queries, as a calibration file has them, against transformers' own queries in float64."""

import json

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from tests.engine.compressed import make_llm
from tests.eviction.cases import Case
from tests.models.loading.gguf_writer import write_gguf
from tests.tiny_models import save_tiny_model
from zipage import LLM, calibrate
from zipage.eviction.query_statistics import QFilters

SEQUENCES = [[(7 * i * i + 3 * n) % 300 for i in range(length)] for n, length in enumerate((30, 3, 5, 41))]
SOURCE = {"corpus": "made up"}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 256}
ROPES = {"plain": {}, "yarn": {"rope_parameters": YARN}}


@pytest.fixture(scope="module", params=[("qwen3", "plain"), ("qwen3", "yarn"), ("llama", "plain"), ("qwen2", "plain")],
                ids="-".join)  # fmt: skip
def folder(request, tmp_path_factory):
    family, rope = request.param
    return save_tiny_model(family, tmp_path_factory.mktemp("model"), num_hidden_layers=2, **ROPES[rope])


@pytest.fixture(scope="module")
def queries(folder):
    """Before RoPE, after q-norm: [L, T, Hq, d], the first four of each sequence left out; and their positions."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    found, positions = [[] for _ in model.model.layers], []
    for layer, rows in zip(model.model.layers, found, strict=True):
        attention = layer.self_attn
        hooked = getattr(attention, "q_norm", attention.q_proj)
        shape = -1, model.config.num_attention_heads, attention.head_dim

        def note(_, __, out, rows=rows, shape=shape):
            rows.append(out.reshape(shape)[4:].detach())

        hooked.register_forward_hook(note)
    for sequence in SEQUENCES:
        model(torch.tensor([sequence]))
        positions += range(4, len(sequence))
    return torch.stack([torch.cat(rows) for rows in found]).numpy(), np.array(positions)


def rotated(folder, queries: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """After RoPE, one pair at a time."""
    spec = LLM(str(folder), skip_tokenizer_init=True, device="cpu", num_blocks=8)._core.runner.spec
    out, half = np.empty_like(queries), queries.shape[-1] // 2
    for f, frequency in enumerate(spec.inv_freq):
        turn = spec.rope_attention_factor * np.exp(1j * positions * frequency)[None, :, None]
        pair = (queries[..., f] + 1j * queries[..., f + half]) * turn
        out[..., f], out[..., f + half] = pair.real, pair.imag
    return out


def made(folder, tmp_path, kind: str, **options) -> dict[str, np.ndarray]:
    path = calibrate(folder, SEQUENCES, tmp_path / "file", kind=kind, source=SOURCE, device="cpu", **options)
    with safe_open(path, framework="np") as file:
        header = json.loads(file.metadata()["calibration"])
        assert (header["kind"], header["corpus"]) == (kind, "made up")
        assert header["tokens"] == sum(max(0, len(sequence) - 4) for sequence in SEQUENCES)
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict


def test_triattention(folder, queries, tmp_path):
    found = made(folder, tmp_path, "triattention")
    before, _ = queries
    layers, _, heads, dim = before.shape
    for layer in range(layers):
        for head in range(heads):
            for f in range(dim // 2):
                pairs = [complex(q[f], q[f + dim // 2]) for q in before[layer, :, head]]
                mean, size = sum(pairs) / len(pairs), sum(map(abs, pairs)) / len(pairs)
                place = layer, head, f
                assert found["mean_real"][place] == pytest.approx(mean.real, abs=1e-4)
                assert found["mean_imaginary"][place] == pytest.approx(mean.imag, abs=1e-4)
                assert found["mean_size"][place] == pytest.approx(size, abs=1e-4)


@pytest.mark.parametrize("full", [True, False])
def test_expected_attention(folder, queries, tmp_path, full):
    found = made(folder, tmp_path, "expected_attention", options={"full": full})
    before, _ = queries
    layers, _, heads, dim = before.shape
    assert set(found) == {"mean", "pairs", *(["covariance"] if full else [])}
    for layer in range(layers):
        for head in range(heads):
            covariance = np.cov(before[layer, :, head].T, bias=True)
            np.testing.assert_allclose(found["mean"][layer, head], before[layer, :, head].mean(axis=0), atol=1e-4)
            if full:
                np.testing.assert_allclose(found["covariance"][layer, head], covariance, atol=1e-3)
            for f in range(dim // 2):
                g = f + dim // 2
                block = covariance[f, f], covariance[f, g], covariance[g, g]
                np.testing.assert_allclose(found["pairs"][layer, head, f], block, atol=1e-3)


@pytest.mark.parametrize("sampled", [3000, 20])
def test_q_filters(folder, queries, tmp_path, monkeypatch, sampled):
    monkeypatch.setattr(QFilters, "queries", sampled)
    found = made(folder, tmp_path, "q_filters", seed=3)["filters"]
    after = rotated(folder, *queries)
    chosen = torch.randperm(after.shape[1], generator=torch.Generator().manual_seed(3))[:sampled].numpy()
    layers, heads = found.shape[:2]
    group = after.shape[2] // heads
    for layer in range(layers):
        for head in range(heads):
            directions = []
            for g in range(group):
                rows = after[layer, chosen, head * group + g]
                first = np.linalg.svd(rows)[2][0]
                along = rows @ first
                most = np.sum(along > 0) - np.sum(along < 0)
                directions.append(first if (most or along.sum()) > 0 else -first)
            np.testing.assert_allclose(found[layer, head], np.mean(directions, axis=0), atol=2e-4)


def test_the_file_fits_its_model_alone(tmp_path):
    folders = {}
    for name, options in {"own": {}, "deep": {"num_hidden_layers": 3}, "theta": {"rope_theta": 500.0}}.items():
        folders[name] = save_tiny_model("qwen3", tmp_path / name, **{"num_hidden_layers": 2} | options)
    path = calibrate(folders["own"], SEQUENCES, tmp_path / "file", kind="q_filters", source=SOURCE, device="cpu")
    case = Case("q_filters", {"calibration": str(path)})
    make_llm(folders["own"], case)
    for name, message in {"deep": "num_layers is 2, not 3", "theta": "inv_freq is"}.items():
        with pytest.raises(ValueError, match=message):
            LLM(str(folders[name]), skip_tokenizer_init=True, device="cpu", num_blocks=8, policy="q_filters",
                policy_options=case.options, budget_tokens=64)  # fmt: skip


def test_what_cannot_be_calibrated(tmp_path):
    folder = save_tiny_model("llama", tmp_path / "model")
    with pytest.raises(ValueError, match="kind='zipage': must be one of triattention, q_filters, expected_attention"):
        calibrate(folder, SEQUENCES, tmp_path / "file", kind="zipage", source=SOURCE, device="cpu")
    with pytest.raises(ValueError, match="2 sequences: none has a token beyond its first 4"):
        calibrate(folder, [[1, 2], [3] * 4], tmp_path / "file", kind="q_filters", source=SOURCE, device="cpu")


def test_other_weights_of_one_shape_and_a_gguf_file_are_models_of_their_own(tmp_path):
    """A hash of the weights tells them apart; a calibration of a GGUF file fits it."""
    folder = save_tiny_model("llama", tmp_path / "folder", num_hidden_layers=2)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    write_gguf(tmp_path / "model.gguf", model, GGMLQuantizationType.F16)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] += 1.0
    model.save_pretrained(tmp_path / "edited")
    models = {"folder": folder, "gguf": tmp_path / "model.gguf", "edited": tmp_path / "edited"}
    options = {
        "skip_tokenizer_init": True,
        "device": "cpu",
        "num_blocks": 8,
        "policy": "q_filters",
        "budget_tokens": 64,
    }
    for name in ("folder", "gguf"):
        path = calibrate(
            models[name], SEQUENCES, tmp_path / f"of_{name}", kind="q_filters", source=SOURCE, device="cpu"
        )
        for other, at in models.items():
            given = options | {"policy_options": {"calibration": str(path)}}
            if other == name:
                LLM(str(at), **given)
                continue
            with pytest.raises(ValueError, match=r"weights is [0-9a-f]{16}, not "):
                LLM(str(at), **given)
