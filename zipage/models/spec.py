"""What a model is: shapes and flags, read from a config and checked once."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zipage.models.fields import (
    FIELDS,
    LARGEST,
    LARGEST_HEAD,
    checked_fields,
    is_ids,
    is_integer,
    is_number,
    is_texts,
    shown,
)
from zipage.models.rotary import rope_frequencies

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# model_type -> (class of the checkpoint, class of its config)
ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig"),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config"),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config"),
}

SIZES = ("vocab_size", "width", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_width", "max_position")
NEVER_LEFT_OUT = ("hidden_size", "num_hidden_layers", "num_attention_heads")
"""Fields of a `config.json` without which transformers takes those of some model, which the weights may seem to fit."""
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Shapes and flags of a decoder-only model of the Llama / Qwen2 / Qwen3 families.

    Attributes:
        architecture: "llama", "qwen2" or "qwen3".
        vocab_size: rows of the embedding.
        width: of the residual stream.
        num_layers, num_heads, num_kv_heads, head_dim: of attention; `num_heads` is a multiple of `num_kv_heads`.
        mlp_width: inner width of the gated MLP.
        rms_norm_eps: epsilon of every RMSNorm.
        inv_freq: rotary frequencies in radians per position, `head_dim / 2` of them, scaling applied.
        rope_attention_factor: factor on cos and sin (YaRN).
        max_position: positions that the model is made for, rope scaling included.
        qkv_bias, output_bias, mlp_bias: which projections carry a bias.
        qk_norm: RMSNorm on each head's q and k before rotary.
        tie_embeddings: the embedding is the output projection too.
        eos_token_ids: ids that end a sequence, ascending.
        dtype: of the checkpoint; None where its config does not say.
    """

    architecture: str
    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    rms_norm_eps: float
    inv_freq: tuple[float, ...]
    rope_attention_factor: float = 1.0
    max_position: int
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        for name in SIZES:
            value = getattr(self, name)
            if not is_integer(value) or not 1 <= value <= LARGEST:
                raise ValueError(f"{name}={shown(value)}: must be an integer, at least 1 and at most {LARGEST}")
        for name in ("rms_norm_eps", "rope_attention_factor"):
            value = getattr(self, name)
            if not is_number(value) or value < 0:
                raise ValueError(f"{name}={shown(value)}: must be a finite number, at least 0")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is no multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim}: must be even")
        if not all(0 < frequency < math.inf for frequency in self.inv_freq):
            raise ValueError("a rotary frequency is not above 0 or not finite: rope_theta or its scaling is wrong")

    @classmethod
    def from_hf_config(cls, config: PretrainedConfig, eos_token_ids: Iterable[int] = ()) -> ModelSpec:
        """Build from a transformers config of one of `ARCHITECTURES`.

        Args:
            config: transformers' own; not changed.
            eos_token_ids: ids that end a sequence beside the config's, such as the generation config's.

        Raises:
            ValueError: the architecture is unknown, or an option would change results and is not supported.
        """
        model_type = config.model_type
        check_architecture(model_type, config.architectures)
        _reject_unsupported(config)
        head_dim = getattr(config, "head_dim", None)
        if head_dim is None:
            head_dim = config.hidden_size // max(config.num_attention_heads, 1)
        if not 1 <= head_dim <= LARGEST_HEAD:
            raise ValueError(f"head_dim={head_dim}: must be at least 1 and at most {LARGEST_HEAD}")
        inv_freq, attention_factor = rope_frequencies(config, head_dim)
        attention_bias = bool(getattr(config, "attention_bias", False))
        return cls(
            architecture=model_type,
            vocab_size=config.vocab_size,
            width=config.hidden_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            mlp_width=config.intermediate_size,
            rms_norm_eps=config.rms_norm_eps,
            inv_freq=tuple(inv_freq.tolist()),
            rope_attention_factor=attention_factor,
            max_position=_max_position(config),
            qkv_bias=model_type == "qwen2" or attention_bias,
            output_bias=model_type != "qwen2" and attention_bias,
            mlp_bias=model_type == "llama" and bool(config.mlp_bias),
            qk_norm=model_type == "qwen3",
            tie_embeddings=bool(config.tie_word_embeddings),
            eos_token_ids=tuple(sorted({*token_ids(config.eos_token_id), *eos_token_ids})),
            dtype=_dtype(config.dtype),
        )


def read_spec(folder: Path) -> ModelSpec:
    """Read `config.json`, and `generation_config.json` where there is one, of a model folder.

    Raises:
        FileNotFoundError: there is no `config.json`.
        ValueError: it is no JSON, misstates a field, or describes a model that is not supported.
    """
    path = folder / "config.json"
    if not path.is_file():
        ggufs = sorted(file.name for file in folder.glob("*.gguf"))
        hint = f"to load its GGUF file, pass {folder / ggufs[0]}" if ggufs else "it comes with every model on the hub"
        raise FileNotFoundError(f"{folder} has no config.json: {hint}")
    values = read_json(path)
    generation = folder / "generation_config.json"
    ends = read_json(generation).get("eos_token_id") if generation.is_file() else None
    try:
        eos = token_ids(ends)
    except ValueError as error:
        raise ValueError(f"{generation}: {error}") from error
    try:
        check_architecture(values.get("model_type"), values.get("architectures"))
        for name in NEVER_LEFT_OUT:
            if values.get(name) is None:
                raise ValueError(f"{name} is missing")
        return ModelSpec.from_hf_config(hf_config(values), eos)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def hf_config(values: Mapping[str, Any]) -> PretrainedConfig:
    """The transformers config of what a `config.json` says in `FIELDS`.

    Raises:
        ValueError: the architecture is unknown or a field has the wrong type.
    """
    import transformers

    model_type = values.get("model_type")
    check_architecture(model_type, values.get("architectures"))
    fields = checked_fields(values)
    try:
        # A deep copy: transformers writes defaults into nested values.
        return getattr(transformers, ARCHITECTURES[model_type][1]).from_dict(copy.deepcopy(fields))
    except Exception as error:  # whatever it stumbles over
        reason = error.args[0] if isinstance(error, KeyError) else error
        raise ValueError(" ".join(str(reason).split())) from error


def check_architecture(model_type: Any, classes: Iterable[str] | None) -> None:
    """Raise a ValueError that names the architecture, unless it is one of `ARCHITECTURES`."""
    supported = {name: architecture[0] for name, architecture in ARCHITECTURES.items()}
    if not isinstance(model_type, str) or model_type not in supported:
        raise ValueError(f"unknown architecture {shown(model_type)}; supported: {', '.join(supported)}")
    if classes is not None and not is_texts(classes):
        raise ValueError(f"architectures={shown(classes)}: must be {FIELDS['architectures'][1]}")
    if classes and supported[model_type] not in classes:
        named = ", ".join(classes)
        raise ValueError(f"unknown architecture {named}; supported: {', '.join(supported.values())}")


def token_ids(value: int | Iterable[int] | None) -> tuple[int, ...]:
    """`eos_token_id` as configs write it (one id, several, or none) as a tuple. Raises ValueError for anything else."""
    if value is None:
        return ()
    if not is_ids(value):
        raise ValueError(f"eos_token_id={shown(value)}: must be {FIELDS['eos_token_id'][1]}")
    return (value,) if isinstance(value, int) else tuple(value)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object. Raises ValueError that names the file if it holds none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no JSON object")
    return values


def _reject_unsupported(config: PretrainedConfig) -> None:
    if config.hidden_act not in ("silu", "swish"):
        raise ValueError(f"hidden_act={config.hidden_act!r} is not supported; only silu")
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise ValueError(f"quantization_config ({method}) is not supported; use unquantized weights or a GGUF file")
    layer_types = getattr(config, "layer_types", None) or ()
    if any(layer_type != "full_attention" for layer_type in layer_types):
        others = ", ".join(sorted({*layer_types} - {"full_attention"}))
        raise ValueError(f"layer_types with {others} are not supported (use_sliding_window must be false)")
    if config.model_type == "llama" and getattr(config, "sliding_window", None):
        raise ValueError(f"sliding_window={config.sliding_window!r} is not supported")
    if config.model_type == "qwen2" and getattr(config, "attention_bias", True) is not True:
        raise ValueError(f"attention_bias={config.attention_bias!r} is not supported with qwen2, which has biases")
    if config.model_type != "llama" and getattr(config, "mlp_bias", False):
        raise ValueError(f"mlp_bias={config.mlp_bias!r} is not supported with {config.model_type}")


def _max_position(config: PretrainedConfig) -> int:
    """Positions after scaling. `linear` stretches the config's count, `yarn` the count before scaling."""
    parameters, positions = config.rope_parameters, config.max_position_embeddings
    rope_type = parameters.get("rope_type") or parameters.get("type")
    if rope_type == "linear":
        return _stretched(positions, parameters["factor"])
    if rope_type == "yarn" and parameters.get("factor"):
        return max(positions, _stretched(parameters["original_max_position_embeddings"], parameters["factor"]))
    return positions


def _stretched(positions: int, factor: float) -> int:
    return int(min(positions * float(factor), 2.0 * LARGEST))


def _dtype(value: torch.dtype | str | None) -> torch.dtype | None:
    dtype = getattr(torch, value.removeprefix("torch."), value) if isinstance(value, str) else value
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={value!r} is not supported; supported: {', '.join(map(str, DTYPES))}")
    return dtype
