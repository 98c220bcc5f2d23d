"""Model folders in FP8, as Qwen's are published, and what they mean."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FILE = "model.safetensors"
LARGEST = 448.0
"""Of the floats of eight bits, e4m3."""


def blocks_of(tensor: Tensor, block: tuple[int, int]):
    """Place among the blocks, and view of the tensor, of each block."""
    for i, rows in enumerate(tensor.split(block[0])):
        for j, values in enumerate(rows.split(block[1], dim=1)):
            yield (i, j), values


def quantized(
    weight: Tensor, block: tuple[int, int], scale_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Codes and scales of a matrix: the largest value of each block takes the largest code."""
    codes = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    scales = torch.empty([-(-full // size) for full, size in zip(weight.shape, block, strict=True)], dtype=scale_dtype)
    for (place, values), (_, out) in zip(blocks_of(weight, block), blocks_of(codes, block), strict=True):
        scales[place] = values.abs().max() / LARGEST
        out.copy_((values / scales[place].float()).clamp(-LARGEST, LARGEST))
    return codes, scales


def meant(codes: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """The float32 matrix of codes and scales, one block after another."""
    weight = torch.empty(codes.shape)
    for (place, values), (_, out) in zip(blocks_of(codes, block), blocks_of(weight, block), strict=True):
        out.copy_(values.to(torch.float32) * scales[place].to(torch.float32))
    return weight


def write_fp8(folder: Path, out: Path, block: tuple[int, int], scale_dtype: torch.dtype = torch.float32) -> Path:
    """Quantize a folder's projections into `out`, and write what they mean, in float32, into `out`/dense."""
    tensors, dense = load_file(folder / FILE), {}
    for name in list(tensors):
        if name.endswith("_proj.weight"):
            codes, scales = quantized(tensors[name], block, scale_dtype)
            tensors |= {name: codes, f"{name}_scale_inv": scales}
            dense[name] = meant(codes, scales, block)
        else:
            dense[name] = tensors[name]
    config = json.loads((folder / "config.json").read_text())
    said = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    said["modules_to_not_convert"] = ["lm_head", "model.layers.0.mlp.gate", "model.layers.0.input_layernorm"]
    for place, weights, more in ((out, tensors, {"quantization_config": said}), (out / "dense", dense, {})):
        place.mkdir(parents=True, exist_ok=True)
        save_file(weights, place / FILE, metadata={"format": "pt"})
        (place / "config.json").write_text(json.dumps(config | more))
    return out
