"""Tiny random models of transformers' own classes."""

import copy
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
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
        "long_factor": [1.0, 2.0, 4.0, 6.0, 7.0, 8.0],
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32},
}

PHI = {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 32}
"""12 of 16 dimensions of a head rotate."""

GEMMA = {"head_dim": 32, "sliding_window": 24, "sliding_window_pattern": 2, "query_pre_attn_scalar": 20}
"""Layers with a window and full ones take turns."""

GPT_OSS = {
    "head_dim": 32,
    "sliding_window": 24,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "intermediate_size": 32,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 128,
    },
}

HYBRID = {
    "full_attention_interval": 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}
"""Recurrent layers and layers that attend take turns; 4 of 16 dimensions of a head rotate."""

MIXTURE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

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
    """A float32 model of a family, "Llama" or "Phi3" say, with every parameter random: norms and biases too.

    At `gain` 2 greedy text wanders; at 1 it soon loops.
    """
    config = getattr(transformers, f"{family}Config")(**copy.deepcopy(COMMON | {"pad_token_id": None} | options))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("A_log"):
                parameter.copy_(noise - 3)  # a state that lasts
                continue
            parameter.copy_(gain * noise * parameter.shape[-1] ** -0.5 if parameter.dim() >= 2 else 1 + 0.3 * noise)
    return model


def token_ids(seed: int = 0, length: int = LENGTH) -> Tensor:
    """int64 [length]."""
    return torch.randint(0, COMMON["vocab_size"], (length,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def reference_logits(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """[T] -> [T, vocab], by transformers."""
    return model(ids[None]).logits[0]
