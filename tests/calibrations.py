"""Calibrations of made-up numbers, which tests can give to any model."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import torch

from zipage.eviction import registry
from zipage.eviction.calibration import write_calibration
from zipage.models.loading.identity import model_identity
from zipage.models.loading.loader import read_shape

CALIBRATED = {name for name in registry.POLICIES if "calibration" in registry.find(name).known_options()}
"""Policies that read a calibration file."""

MADE_UP = {"calibration": "made up"}
"""An option that `given` replaces where there is a model; dense events have the arrays themselves."""


WIDTH = 24
"""Of made-up hidden states."""


def arrays(kind: str, layers: int, heads: int, group: int, dim: int, width: int = WIDTH) -> dict[str, np.ndarray]:
    """float32 arrays [L, rows, ...] of a policy's calibration by name; empty for one without."""
    rng = np.random.default_rng(zlib.crc32(f"{kind} {layers} {heads} {group} {dim}".encode()))

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    if kind == "q_filters":
        return {"filters": normal(layers, heads, dim)}
    if kind == "triattention":
        real, imaginary = (normal(layers, heads * group, dim // 2) for _ in range(2))
        sizes = np.hypot(real, imaginary) * (1 + np.abs(normal(layers, heads * group, dim // 2)))
        return {"mean_real": real, "mean_imaginary": imaginary, "mean_size": sizes}
    if kind == "expected_attention":
        mixing = normal(layers, heads * group, dim, dim) / dim**0.5
        covariance = (mixing @ mixing.swapaxes(2, 3)).astype(np.float32)
        first, second = np.arange(dim // 2), np.arange(dim // 2, dim)
        pairs = [covariance[..., a, b] for a, b in ((first, first), (first, second), (second, second))]
        mean = normal(layers, heads * group, dim)
        return {"mean": mean, "covariance": covariance, "pairs": np.stack(pairs, axis=-1)}
    if kind == "kvzap":
        return {"weight": normal(layers, heads, width), "bias": normal(layers, heads)}
    return {}


def output_projection(layers: int, heads: int, group: int, dim: int, width: int = WIDTH) -> np.ndarray:
    """Made up, float32 [L, H, G, d, width]."""
    rng = np.random.default_rng(7)
    return rng.standard_normal((layers, heads, group, dim, width)).astype(np.float32)


def given(options: dict, kind: str, folder: Path, load_format: str = "auto") -> dict:
    """`options` with a file of `arrays` for the model in `folder`, where they ask for one."""
    if "calibration" not in options:
        return options
    kind = options.get("base", kind)
    path = folder / "calibration" / f"{kind}.safetensors"
    if not path.exists():
        identity = model_identity(str(folder), load_format=load_format)
        heads, dim = identity["num_kv_heads"], identity["head_dim"]
        width = read_shape(str(folder), load_format=load_format)[0].width
        made = arrays(kind, identity["num_layers"], heads, identity["num_heads"] // heads, dim, width)
        tensors = {name: torch.from_numpy(array) for name, array in made.items()}
        write_calibration(path, kind, tensors, identity, {"corpus": "none", "tokens": 0, "seed": 0})
    return options | {"calibration": str(path)}
