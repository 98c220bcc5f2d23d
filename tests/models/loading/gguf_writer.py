"""GGUF files of transformers' models."""

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor


def write_gguf(
    path: Path,
    model: torch.nn.Module,
    quantization: gguf.GGMLQuantizationType,
    metadata: dict[str, Any] | None = None,
    extra_tensors: dict[str, np.ndarray] | None = None,
    leave_out: str | None = None,
) -> dict[str, Tensor]:
    """Write the model as llama.cpp's converter does; returns the weights that the file holds, dequantized.

    Matrices are quantized, vectors stay float32. In the "llama" architecture rotary pairs are interleaved.
    """
    config = model.config
    arch_name = config.model_type.replace("_", "")
    arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[arch_name]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, arch_name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_eos_token_id(2)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if getattr(config, "num_experts", None):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if getattr(config, "shared_expert_intermediate_size", None):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if config.model_type == "phi3":
        _add_phi3(writer, config)
    for key, value in (metadata or {}).items():
        {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32, bool: writer.add_bool}.get(
            type(value), writer.add_array
        )(key, value)
    num_heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    written = {}
    for name, tensor in _stacked(model.state_dict()).items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, suffix = name.rpartition(".")
        gguf_name = f"{names.get_name(stem)}.{suffix}"
        if gguf_name == leave_out:
            continue
        order = np.arange(tensor.shape[0])
        if config.model_type == "llama" and stem.rpartition(".")[2] in num_heads:
            order = _interleave(order, num_heads[stem.rpartition(".")[2]])
        values = tensor.numpy()[order]
        if name.endswith("shared_expert_gate.weight"):
            values, order = values[0], np.arange(len(values[0]))
        if values.ndim >= 2 and not name.endswith("mlp.gate.weight"):
            data = gguf.quants.quantize(values, quantization)
            writer.add_tensor(gguf_name, data, raw_dtype=quantization)
            values = gguf.quants.dequantize(data, quantization)
        else:
            writer.add_tensor(gguf_name, values)
        written[name] = torch.from_numpy(values[np.argsort(order)])
    for name, values in (extra_tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return _unstacked(written)


def _add_phi3(writer: gguf.GGUFWriter, config: Any) -> None:
    rope = config.rope_parameters
    head_dim = config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(int(head_dim * rope["partial_rotary_factor"]))
    writer.add_sliding_window(config.sliding_window or 0)
    writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    if rope["rope_type"] == "longrope":
        factor = config.max_position_embeddings / config.original_max_position_embeddings
        attention = math.sqrt(1 + math.log(factor) / math.log(config.original_max_position_embeddings))
        writer.add_rope_scaling_attn_factors(attention)
        for name in ("short", "long"):
            writer.add_tensor(f"rope_factors_{name}.weight", np.array(rope[f"{name}_factor"], dtype=np.float32))


def _stacked(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the converter stacks the experts of a layer: gate and up apart."""
    stacked = {}
    for name, tensor in weights.items():
        stem, _, last = name.rpartition(".")
        if last == "gate_up_proj" and stem.endswith("experts"):
            stacked[f"{stem}.gate_proj.weight"], stacked[f"{stem}.up_proj.weight"] = tensor.chunk(2, dim=1)
        else:
            stacked[f"{name}.weight" if stem.endswith("experts") else name] = tensor
    return stacked


def _unstacked(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The other way round."""
    whole = {}
    for name, tensor in weights.items():
        stem, _, last = name.removesuffix(".weight").rpartition(".")
        if name.endswith("shared_expert_gate.weight"):
            whole[name] = tensor[None]
        elif not stem.endswith(".experts"):
            whole[name] = tensor
        elif last == "down_proj":
            whole[f"{stem}.down_proj"] = tensor
        elif last == "gate_proj":
            whole[f"{stem}.gate_up_proj"] = torch.cat((tensor, weights[f"{stem}.up_proj.weight"]), dim=1)
    return whole


def _interleave(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's `permute`: rows (i, i + d / 2) of a head become rows (2 i, 2 i + 1)."""
    return rows.reshape(num_heads, 2, -1).swapaxes(1, 2).reshape(-1)
