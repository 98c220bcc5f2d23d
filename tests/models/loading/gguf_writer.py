"""GGUF files of transformers' models."""

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
    arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[config.model_type]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, config.model_type)
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
    for key, value in (metadata or {}).items():
        {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32, bool: writer.add_bool}.get(
            type(value), writer.add_array
        )(key, value)
    num_heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    written = {}
    for name, tensor in model.state_dict().items():
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
        if values.ndim == 2:
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
    return written


def _interleave(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's `permute`: rows (i, i + d / 2) of a head become rows (2 i, 2 i + 1)."""
    return rows.reshape(num_heads, 2, -1).swapaxes(1, 2).reshape(-1)
