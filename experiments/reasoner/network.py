"""The reasoner's architecture, and attention that keeps packed documents apart."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, Qwen3Config, Qwen3ForCausalLM

from experiments.reasoner.tokenizer import END, PAD, VOCABULARY

LONGEST = 9216
"""No document of the training is longer, in tokens."""


def build_config() -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(VOCABULARY),
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=LONGEST,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False,
        eos_token_id=VOCABULARY[END],
        pad_token_id=VOCABULARY[PAD],
        bos_token_id=None,
        use_cache=False,
    )


def build_network(seed: int) -> Qwen3ForCausalLM:
    """A network with float32 weights drawn from `seed`, for packed documents."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM._from_config(build_config(), attn_implementation="packed", dtype=torch.float32)


def packed_attention(module, query, key, value, attention_mask, *, scaling, cu_seq_lens, **options):
    """Causal attention inside each document: an attention function of `transformers`.

    Args:
        query: [1, heads, tokens, head size].
        key, value: [1, KV heads, tokens, head size].
        cu_seq_lens: int32 [documents + 1], bounds of the documents.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if query.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        rows = [tensor[0].transpose(0, 1).to(torch.bfloat16) for tensor in (query, key, value)]
        output = varlen_attn(*rows, cu_seq_lens, cu_seq_lens, LONGEST, LONGEST, scale=scaling, window_size=(-1, 0))
        return output[None], None
    pieces = [
        scaled_dot_product_attention(
            *(tensor[:, :, begin:end] for tensor in (query, key, value)), is_causal=True, scale=scaling
        )
        for begin, end in zip(cu_seq_lens[:-1].tolist(), cu_seq_lens[1:].tolist())
        if end > begin
    ]
    return torch.cat(pieces, dim=2).transpose(1, 2), None


AttentionInterface.register("packed", packed_attention)
