"""Tiny random models of the families, and what transformers generates with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from tests.models.tiny import GEMMA, GPT_OSS, HYBRID, MIXTURE, make_model

VOCAB = 300
FAMILIES = {
    "llama": ("Llama", {"num_key_value_heads": 4}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 24}),
}

LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 2.0, 4.0, 6.0, 7.0, 8.0],
}
MORE_FAMILIES = {
    "gemma3_text": ("Gemma3Text", GEMMA | {"final_logit_softcapping": 30.0, "tie_word_embeddings": False}),
    "mistral": ("Mistral", {"head_dim": 24, "sliding_window": 1024}),
    "gpt_oss": ("GptOss", GPT_OSS),
    "phi3": (
        "Phi3",
        {"partial_rotary_factor": 0.75, "rope_parameters": LONGROPE, "original_max_position_embeddings": 16},
    ),
    "qwen2_moe": ("Qwen2Moe", MIXTURE | {"shared_expert_intermediate_size": 40}),
    "qwen3_moe": ("Qwen3Moe", MIXTURE | {"head_dim": 24, "norm_topk_prob": True, "mlp_only_layers": [1]}),
}
"""Those that what is tested of every family is tested of in less breadth."""
HYBRIDS = {
    "qwen3_5_moe_text": ("Qwen3_5MoeText", HYBRID | MIXTURE | {"shared_expert_intermediate_size": 40}),
    "qwen3_5_text": ("Qwen3_5Text", HYBRID),
    "qwen3_next": ("Qwen3Next", HYBRID | MIXTURE | {"shared_expert_intermediate_size": 40}),
}
"""Those with recurrent layers: they run on one device, and share no prefixes."""
FORMED = {"gemma3_text", "gpt_oss"}
"""Those of them whose attention is not plain: some policies refuse them."""


def save_tiny_model(family: str, folder: Path, **more: Any) -> Path:
    """A model folder without a tokenizer; contexts of 1,024 tokens, no end token; `more` options of its config."""
    name, options = (FAMILIES | MORE_FAMILIES | HYBRIDS)[family]
    shape = {"vocab_size": VOCAB, "max_position_embeddings": 1024, "eos_token_id": None}
    make_model(name, gain=2.0, **(options | shape | more)).save_pretrained(folder)
    return folder


def save_tiny_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer (256 bytes and a few specials) with a chat template, beside a tiny model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|im_start|>", "<|im_end|>"]
    vocab = {token: i for i, token in enumerate(alphabet + specials)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and not enable_thinking %}No thoughts.\n{% endif %}{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


@torch.inference_mode()
def transformers_greedy(
    model, prompt: list[int], num_tokens: int, guess: Sequence[int] = ()
) -> tuple[list[int], list[float]]:
    """Greedy tokens and their log-probabilities: one prompt alone, by the model's own forward pass and cache.

    A `guess` changes no token: as far as the model draws it, one pass is enough.
    """

    def run(token_ids: Sequence[int], cache=None):
        return model(torch.tensor([token_ids], device=model.device), past_key_values=cache, use_cache=True)

    step = run([*prompt, *guess])
    logits = step.logits[0, len(prompt) - 1 :]
    drawn = logits.argmax(dim=-1).tolist()
    right = next((i for i, (token, guessed) in enumerate(zip(drawn, guess)) if token != guessed), len(guess))
    rows = list(logits[: right + 1])
    if right < len(guess):
        step = run([*prompt, *drawn[:right]])
    while len(rows) < num_tokens:
        step = run([rows[-1].argmax().item()], step.past_key_values)
        rows.append(step.logits[0, -1])
    best = torch.stack(rows[:num_tokens]).log_softmax(dim=-1).max(dim=-1)
    return best.indices.tolist(), best.values.tolist()
