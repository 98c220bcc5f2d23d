"""The families that can be loaded, and what a new one takes."""

from dataclasses import replace

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from tests.models.dense import dense_attention
from tests.models.tiny import COMMON, LENGTH, reference_logits, token_ids
from zipage.models import registry
from zipage.models.attention import AttentionSpec, refuse_forms
from zipage.models.family import Family
from zipage.models.loading.hf_config import hf_config, spec_from_config
from zipage.models.loading.loader import load_model

HEADS = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16, scale=0.25)
MISTRAL = Family(
    name="mistral",
    checkpoint_class="MistralForCausalLM",
    config_class="MistralConfig",
    flags=lambda config: {},
)


def test_these_families_and_no_other():
    assert list(registry.FAMILIES) == [
        "llama",
        "mistral",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "gemma3_text",
        "gpt_oss",
        "qwen3_next",
        "qwen3_5_text",
        "qwen3_5_moe_text",
    ]
    assert all(name == family.name for name, family in registry.FAMILIES.items())


def test_each_layer_has_its_attention():
    spec = spec_from_config(hf_config(COMMON | {"model_type": "llama"}))
    assert spec.attention == (HEADS,) * 3


def test_a_registered_family_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "FAMILIES", {"mistral": MISTRAL})
    torch.manual_seed(0)
    reference = MistralForCausalLM(MistralConfig(**COMMON, head_dim=16, sliding_window=None)).eval()
    reference.save_pretrained(tmp_path)
    ids = token_ids()
    loaded = load_model(str(tmp_path), device="cpu")
    assert loaded.spec.architecture == "mistral"
    logits = loaded.decoder.logits(loaded.decoder(ids, torch.arange(LENGTH), dense_attention))
    expected = reference_logits(reference, ids)
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_kv_heads": 1}, r"layers that differ in num_kv_heads \(1, 2\) are not supported"),
        ({"num_heads": 3}, "num_heads=3 is not a multiple of num_kv_heads=2"),
        ({"head_dim": 15}, "head_dim=15: must be even"),
        ({"scale": float("nan")}, "scale=nan: must be a finite number above 0"),
        ({"window": 0}, "window=0: must be an integer, at least 1"),
    ],
)
def test_attention_that_makes_no_sense_is_refused_by_name(monkeypatch, options, message):
    def attention(config, full):
        return (full, full, replace(full, **options))

    monkeypatch.setitem(registry.FAMILIES, "mistral", replace(MISTRAL, attention=attention))
    with pytest.raises(ValueError, match=message):
        spec_from_config(hf_config(COMMON | {"model_type": "mistral"}))


@pytest.mark.parametrize(
    ("options", "what"),
    [({"window": 16}, "window=16"), ({"soft_cap": 50.0}, "soft_cap=50.0"), ({"sinks": True}, "sinks")],
)
def test_options_that_take_plain_attention_say_so(options, what):
    refuse_forms((HEADS, HEADS), "policy=zipage", "take policy full")
    message = rf"policy=zipage: attention with {what}.* \(layer 1\) is not supported: take policy full"
    with pytest.raises(ValueError, match=message):
        refuse_forms((HEADS, replace(HEADS, **options)), "policy=zipage", "take policy full")
