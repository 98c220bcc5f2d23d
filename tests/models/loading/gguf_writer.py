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
    arch_name = ARCHITECTURES.get(config.model_type, config.model_type.replace("_", ""))
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
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    writer.add_eos_token_id(2)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if getattr(config, "moe_intermediate_size", None):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if getattr(config, "shared_expert_intermediate_size", None):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if config.model_type in MORE_KEYS:
        MORE_KEYS[config.model_type](writer, config)
    for key, value in (metadata or {}).items():
        {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32, bool: writer.add_bool}.get(
            type(value), writer.add_array
        )(key, value)
    num_heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    written = {}
    is_gpt_oss = config.model_type == "gpt_oss"
    for name, tensor in (_apart if is_gpt_oss else _stacked)(model.state_dict()).items():
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
        offset = float(config.model_type == "gemma3_text" and name.endswith("norm.weight"))
        values = values + np.float32(offset)
        if name.endswith("shared_expert_gate.weight"):
            values, order = values[0], np.arange(len(values[0]))
        if values.ndim >= 2 and not name.endswith(("mlp.gate.weight", "mlp.router.weight", "bias")):
            kind = gguf.GGMLQuantizationType.Q8_0 if is_gpt_oss and ".experts." not in name else quantization
            data = gguf.quants.quantize(values, kind)
            writer.add_tensor(gguf_name, data, raw_dtype=kind)
            values = gguf.quants.dequantize(data, kind)
        else:
            writer.add_tensor(gguf_name, values)
        written[name] = torch.from_numpy(values[np.argsort(order)] - np.float32(offset))
    for name, values in (extra_tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return (_joined if is_gpt_oss else _unstacked)(written)


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


def _add_gemma3(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _add_gpt_oss(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(config.rope_parameters["factor"])
    writer.add_rope_scaling_orig_ctx_len(config.rope_parameters["original_max_position_embeddings"])


ARCHITECTURES = {"gemma3_text": "gemma3", "gpt_oss": "gpt-oss"}
MORE_KEYS = {"phi3": _add_phi3, "gemma3_text": _add_gemma3, "gpt_oss": _add_gpt_oss}


def _apart(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """gpt-oss' experts as the converter has them: gate and up apart, multiplied from the left."""
    apart = {}
    for name, tensor in weights.items():
        stem, _, last = name.rpartition(".")
        kind = "bias" if last.endswith("_bias") else "weight"
        rows = tensor.mT.contiguous() if stem.endswith("experts") and kind == "weight" else tensor
        if last.startswith("gate_up_proj"):
            apart[f"{stem}.gate_proj.{kind}"] = rows[:, ::2].contiguous()
            apart[f"{stem}.up_proj.{kind}"] = rows[:, 1::2].contiguous()
        elif stem.endswith("experts"):
            apart[f"{stem}.down_proj.{kind}"] = rows
        else:
            apart[f"{name}.weight" if last == "sinks" else name] = tensor
    return apart


def _joined(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The other way round."""
    joined = {}
    for name, tensor in weights.items():
        stem, _, kind = name.rpartition(".")
        experts, _, projection = stem.rpartition(".")
        end = "_bias" if kind == "bias" else ""
        if stem.endswith("sinks"):
            joined[stem] = tensor
        elif not experts.endswith("experts"):
            joined[name] = tensor
        elif projection == "gate_proj":
            rows = torch.stack((tensor, weights[f"{experts}.up_proj.{kind}"]), dim=2).flatten(1, 2)
            joined[f"{experts}.gate_up_proj{end}"] = rows if end else rows.mT
        elif projection == "down_proj":
            joined[f"{experts}.down_proj{end}"] = tensor if end else tensor.mT
    return joined


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
