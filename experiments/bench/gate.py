"""May an engine's options be timed? Only where its greedy tokens are those of the eager engine."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

from zipage import SamplingParams

SHAPE = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}
REQUESTS = 4
SHORT = 33
"""Tokens of one more prompt."""
SIZES = ("num_blocks", "kv_cache_memory_bytes", "gpu_memory_utilization", "max_model_len", "max_num_seqs", "dtype")
"""Options that the small model has of its own."""


def why_refused(options: Mapping[str, Any]) -> str | None:
    """None where requests of a tiny float32 model get the same tokens with `options` and eagerly.

    Four run past the budget, so that each is compressed where the options evict. A fifth, a short one, comes when the
    first is done: its prompt is computed beside decodes.
    """
    size = options.get("block_size", 256)
    budget = options.get("budget_tokens") or 2 * size
    interval = -(-(options.get("interval") or size) // size) * size
    longest = budget + interval + 64
    lengths = [budget + 7 * i + 1 for i in range(REQUESTS)] + [SHORT]
    prompts = [[Random(i).randrange(SHAPE["vocab_size"]) for _ in range(length)] for i, length in enumerate(lengths)]
    own = {name: value for name, value in options.items() if name not in SIZES}
    own |= {"dtype": "float32", "num_blocks": REQUESTS * (-(-2 * longest // size) + 2), "max_num_seqs": REQUESTS}
    outputs = [interval + 8] + [interval + 16] * REQUESTS
    params = [SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True) for tokens in outputs]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPE))
        made, eager = (
            _tokens(own | {"model": folder, "max_model_len": 2 * longest} | more, prompts, params)
            for more in ({}, {"enforce_eager": True})
        )
    wrong = sum(a != b for a, b in zip(made, eager, strict=True))
    return f"greedy tokens of {wrong} of {len(prompts)} requests differ from the eager engine's" if wrong else None


def _tokens(options: Mapping[str, Any], prompts: list[list[int]], params: list[SamplingParams]) -> list[list[int]]:
    from zipage import LLM

    llm = LLM(**options)
    try:
        return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]
    finally:
        llm.shutdown()
