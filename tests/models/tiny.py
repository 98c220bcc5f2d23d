"""Tiny random models of transformers' own classes."""

from typing import Any

import torch
import transformers
from torch import Tensor

# Past every `original_max_position_embeddings` used in the tests.
LENGTH = 96

ROPE = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32},
}

COMMON = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": 2,
}


def make_model(family: str, seed: int = 0, gain: float = 1.0, **options: Any) -> torch.nn.Module:
    """A float32 model of "Llama", "Qwen2" or "Qwen3" with every parameter random: norms and biases too.

    At `gain` 2 greedy text wanders; at 1 it soon loops.
    """
    config = getattr(transformers, f"{family}Config")(**(COMMON | options))
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(gain * noise * parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 1 + 0.3 * noise)
    return model


def token_ids(seed: int = 0, length: int = LENGTH) -> Tensor:
    """int64 [length]."""
    return torch.randint(0, COMMON["vocab_size"], (length,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def reference_logits(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """[T] -> [T, vocab], by transformers."""
    return model(ids[None]).logits[0]
