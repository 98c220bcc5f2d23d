"""A model in a GGUF file: its spec, and its weights under their Hugging Face names."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from zipage.models.family import no_window
from zipage.models.fields import MOST_EXPERTS, SLIDING
from zipage.models.loading.gguf_experts import joined_experts
from zipage.models.loading.gguf_file import GgufFile
from zipage.models.loading.hf_config import hf_config, spec_from_config
from zipage.models.registry import find_family, find_gguf_family
from zipage.models.shard import Piece
from zipage.models.spec import ModelSpec

ROPE_FACTORS = "rope_freqs.weight"
SHORT_FACTORS, LONG_FACTORS = "rope_factors_short.weight", "rope_factors_long.weight"

# Ends of a turn in the chat templates of these families; a file's own end-of-sequence id may be another token.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|return|>", "<|call|>")

_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}

_FUSED = {"ffn_up": "mlp.gate_up_proj"}
"""Names that differ where gate and up are one tensor."""

_EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
"""Tensors of all experts of a layer, one after another."""

_FLOAT_KEYS = ("final_logit_softcapping", "rope.freq_base_swa")
"""Of `Family.gguf_keys`; values of the others are integers."""

# Keys under the architecture's name that are read below, or that change no result.
_KNOWN_KEYS = frozenset(
    {
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.layer_norm_rms_epsilon",
        "attention.value_length",
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scaling.factor",
        "rope.scaling.finetuned",
        "rope.scaling.original_context_length",
        "rope.scaling.type",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
        "tensor_data_layout",
        "vocab_size",
    }
)


def gguf_spec(file: GgufFile) -> ModelSpec:
    """Read the spec from metadata and header.

    Biases and tied embeddings are what the file holds tensors for. Llama 3's frequency scaling is a tensor too, of one
    divisor for each frequency, and LongRoPE's are two. `dtype` is bfloat16, whatever the file's own types.

    Raises:
        ValueError: the architecture is unknown, a key is missing, or a key would change results and is not supported.
    """
    architecture = file.metadata.get("general.architecture")
    try:
        find_gguf_family(architecture)
        spec = spec_from_config(hf_config(_config(file, architecture)), gguf_eos_token_ids(file))
    except ValueError as error:
        named = str(error).startswith(str(file.path))
        raise error if named else ValueError(f"{file.path}: {error}") from error
    inv_freq = torch.tensor(spec.inv_freq)
    if ROPE_FACTORS in file.tensors:
        factors = file.read(ROPE_FACTORS).float()
        if factors.shape != inv_freq.shape:
            raise ValueError(f"{file.path}: {ROPE_FACTORS} has {factors.numel()} values, not {inv_freq.numel()}")
        inv_freq = inv_freq / factors
    try:
        return dataclasses.replace(
            spec,
            inv_freq=tuple(inv_freq.tolist()),
            qkv_bias=f"blk.0.{'attn_qkv' if spec.fused_weights else 'attn_q'}.bias" in file.tensors,
            output_bias="blk.0.attn_output.bias" in file.tensors,
            mlp_bias="blk.0.ffn_down.bias" in file.tensors,
            dtype=torch.bfloat16,
        )
    except ValueError as error:
        raise ValueError(f"{file.path}: {ROPE_FACTORS}: {error}") from error


def gguf_eos_token_ids(file: GgufFile) -> set[int]:
    """The file's end-of-sequence and end-of-turn ids, and the turn ends that its chat template writes."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = {file.get(f"tokenizer.ggml.{key}", int) for key in keys} - {None}
    template = file.get("tokenizer.chat_template", str, "")
    tokens = file.get("tokenizer.ggml.tokens", [str], [])
    return ids | {tokens.index(end) for end in TURN_ENDS if end in template and end in tokens}


class GgufWeights:
    """A GGUF file's tensors by their Hugging Face names; a tensor without one keeps its own.

    Attributes:
        shapes: name -> shape of every tensor but the rotary divisors, which belong to the spec.

    Raises:
        ImportError, ValueError: see `GgufFile.check_layout`.
    """

    def __init__(self, file: GgufFile, spec: ModelSpec) -> None:
        file.check_layout()
        self._file = file
        self._spec = spec
        of_rotary = (ROPE_FACTORS, SHORT_FACTORS, LONG_FACTORS)
        self._sources: dict[str, tuple[str, int | None]] = {}
        self._joined = joined_experts(file) if spec.experts and spec.experts.swiglu else {}
        self.shapes: dict[str, tuple[int, ...]] = {name: joined.shape for name, joined in self._joined.items()}
        passed_over = {*of_rotary, *(part for joined in self._joined.values() for part in joined.parts)}
        names = _LAYER | (_FUSED if spec.fused_weights else {}) | find_family(spec.architecture).gguf_names
        for name, tensor in file.tensors.items():
            if name in passed_over:
                continue
            for hf_name, expert in _hf_names(name, tensor.shape, names):
                self._sources[hf_name] = name, expert
                self.shapes[hf_name] = tensor.shape if expert is None else tensor.shape[1:]
            if name.endswith("ffn_gate_inp_shexp.weight") and len(tensor.shape) == 1:
                self.shapes[hf_name] = (1, *tensor.shape)

    def read(self, name: str, piece: Piece | None = None) -> Tensor:
        """One tensor on the CPU, as `GgufFile.read` gives it, its rows in Hugging Face's order, or a piece of it.

        Of rows no more is read than they are. Rows are cut from whole heads.
        """
        if name in self._joined:
            return self._joined[name].read(piece)
        source, expert = self._sources[name]
        if expert is not None:
            whole = self._file.read(source, range(expert, expert + 1))[0]
            return whole if piece is None else piece.of(whole)
        rows = range(piece.first, piece.first + piece.stored) if piece is not None and piece.axis == 0 else None
        tensor = self._file.read(source, rows)
        if tensor.dim() < len(self.shapes[name]):
            return tensor[None]
        is_head = ".q_proj." in name or ".k_proj." in name
        if is_head and find_family(self._spec.architecture).gguf_rotary_pairs:
            tensor = _halves(tensor, tensor.shape[0] // self._spec.head_dim)
        if self._spec.norm_offset and name.endswith("norm.weight"):  # which the converter has added
            tensor = tensor.float() - self._spec.norm_offset
        return piece.of(tensor) if piece is not None and piece.axis == 1 else tensor


def _halves(tensor: Tensor, num_heads: int) -> Tensor:
    """Undo llama.cpp's order of rotary pairs within a head: (0, 1), (2, 3) ... -> (i, i + head_dim / 2)."""
    pairs = tensor.view(num_heads, -1, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)


def _hf_names(name: str, shape: tuple[int, ...], names: Mapping[str, str]) -> list[tuple[str, int | None]]:
    """Hugging Face's names of a tensor, and which expert each is of all that it holds."""
    stem, dot, suffix = name.rpartition(".")
    if stem in _TOP:
        return [(_TOP[stem] + dot + suffix, None)]
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if layer and layer[2] in names:
        hf_name = f"model.layers.{layer[1]}.{names[layer[2]]}"
        return [(hf_name if hf_name.endswith(".sinks") else f"{hf_name}.{suffix}", None)]
    if layer and layer[2] in _EXPERTS and len(shape) == 3 and shape[0] <= MOST_EXPERTS:
        experts = f"model.layers.{layer[1]}.mlp.experts"
        return [(f"{experts}.{expert}.{_EXPERTS[layer[2]]}.{suffix}", expert) for expert in range(shape[0])]
    return [(name, None)]


def _config(file: GgufFile, architecture: str) -> dict[str, Any]:
    """What a `config.json` of this model would say."""
    prefix = f"{architecture}."
    values = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    family = find_gguf_family(architecture)
    is_long = LONG_FACTORS in file.tensors and SHORT_FACTORS in file.tensors
    known = _KNOWN_KEYS | {
        *(["attention.sliding_window"] if family.window is not no_window or SLIDING in family.layer_types else []),
        *(["rope.scaling.attn_factor"] if is_long else []),
        *family.gguf_keys,
    }
    unused = sorted(key for key in values.keys() - known if values[key])
    if unused:
        raise ValueError(f"GGUF key {', '.join(prefix + key for key in unused)} is not supported")

    def required(key: str, kind: type = int) -> Any:
        if key not in values:
            raise ValueError(f"GGUF key {prefix}{key} is missing")
        return optional(key, None, kind)

    def optional(key: str, default: Any, kind: type = int) -> Any:
        return file.get(prefix + key, kind, default)

    if "token_embd.weight" not in file.tensors:
        raise ValueError("tensor token_embd.weight is missing")
    width, num_heads = required("embedding_length"), required("attention.head_count")
    if num_heads < 1:
        raise ValueError(f"GGUF key {prefix}attention.head_count is {num_heads}: must be at least 1")
    head_dim = optional("attention.key_length", width // num_heads)
    for key in ("attention.value_length", *(() if family.partial_rotary else ("rope.dimension_count",))):
        if optional(key, head_dim) != head_dim:
            raise ValueError(f"GGUF key {prefix}{key} is {values[key]}, not the head dimension {head_dim}")
    rope = _rope_parameters(optional)
    if is_long:
        rope |= {
            "rope_type": "longrope",
            "short_factor": file.read(SHORT_FACTORS).tolist(),
            "long_factor": file.read(LONG_FACTORS).tolist(),
            "attention_factor": optional("rope.scaling.attn_factor", None, float),
        }
    if family.partial_rotary:
        rope["partial_rotary_factor"] = optional("rope.dimension_count", head_dim) / max(head_dim, 1)
    more = {field: optional(key, None, float if key in _FLOAT_KEYS else int) for key, field in family.gguf_keys.items()}
    more["original_max_position_embeddings"] = optional("rope.scaling.original_context_length", 0) or None
    return family.gguf_config(
        dict(family.gguf_fields)
        | {
            "model_type": family.name,
            "architectures": [family.checkpoint_class],
            "vocab_size": file.tensors["token_embd.weight"].shape[0],
            "hidden_size": width,
            "intermediate_size": required("feed_forward_length"),
            "num_hidden_layers": required("block_count"),
            "num_attention_heads": num_heads,
            "num_key_value_heads": optional("attention.head_count_kv", num_heads),
            "head_dim": head_dim,
            "max_position_embeddings": required("context_length"),
            "rms_norm_eps": required("attention.layer_norm_rms_epsilon", float),
            "rope_parameters": rope,
            "sliding_window": optional("attention.sliding_window", 0) or None,
            "tie_word_embeddings": "output.weight" not in file.tensors,
            "eos_token_id": file.get("tokenizer.ggml.eos_token_id", int),
        }
        | {name: value for name, value in more.items() if value is not None}
    )


def _rope_parameters(optional: Callable[[str, Any, type], Any]) -> dict[str, Any]:
    parameters = {"rope_type": "default", "rope_theta": optional("rope.freq_base", 10000.0, float)}
    factor = optional("rope.scaling.factor", None, float)
    rope_type = optional("rope.scaling.type", "none" if factor is None else "linear", str)
    if rope_type == "none":
        return parameters
    if rope_type not in ("linear", "yarn"):
        raise ValueError(f"rope.scaling.type={rope_type!r} is not supported; supported: none, linear, yarn")
    parameters |= {"rope_type": rope_type, "factor": factor}
    if rope_type == "yarn":
        scaling = {
            "original_max_position_embeddings": optional("rope.scaling.original_context_length", None, int),
            "beta_fast": optional("rope.scaling.yarn_beta_fast", None, float),
            "beta_slow": optional("rope.scaling.yarn_beta_slow", None, float),
        }
        parameters |= {name: value for name, value in scaling.items() if value is not None}
    return parameters
