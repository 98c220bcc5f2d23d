"""What a model makes each GPU read and multiply."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from experiments.bench.roofline import ModelShape, sliding_layers
from experiments.errors import UsageError


@dataclass(frozen=True)
class SimulatedShape:
    """`ModelShape`, and what the time of a step depends on beside bytes.

    Attributes:
        sizes: of one of the ranks.
        layers, width: of the model.
        pair_flops: operations of a token's attention to one entry, in all layers of one rank.
        key_flops: operations that compare two keys, in all layers and KV heads of one rank.
        ranks: GPUs that share the model.
    """

    sizes: ModelShape
    layers: int
    width: int
    pair_flops: int
    key_flops: int
    ranks: int

    @classmethod
    def read(cls, folder: Path, dtype: str = "auto", ranks: int = 1) -> SimulatedShape:
        """From a folder's `config.json`. Raises UsageError as `ModelShape.read`."""
        sizes = ModelShape.read(folder, dtype, "cuda", ranks)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if sliding_layers(config):
            raise UsageError(
                f"model.path={folder}: layers with a window can't be simulated: what they read is not modelled; take a "
                "model of full layers"
            )
        try:
            layers, width, heads = (
                int(config[name]) for name in ("num_hidden_layers", "hidden_size", "num_attention_heads")
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"model.path={folder}: its config.json lacks a size that a simulation needs") from error
        head_dim = config.get("head_dim") or width // heads
        kv_heads = max(1, (config.get("num_key_value_heads") or heads) // ranks)
        return cls(
            sizes=sizes,
            layers=layers,
            width=width,
            pair_flops=4 * layers * max(1, heads // ranks) * head_dim,
            key_flops=2 * layers * kv_heads * head_dim,
            ranks=ranks,
        )
