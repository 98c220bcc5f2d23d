"""A model's `config.json` to its spec."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zipage.models.attention import AttentionSpec
from zipage.models.family import Family
from zipage.models.fields import FIELDS, LARGEST, LARGEST_HEAD, check_size, checked_fields, is_ids, shown
from zipage.models.quantization import read_quantization
from zipage.models.registry import find_family
from zipage.models.rotary import rope_frequencies
from zipage.models.spec import ModelSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)

NEVER_LEFT_OUT = ("hidden_size", "num_hidden_layers", "num_attention_heads")
"""Fields of a `config.json` without which transformers takes those of some model, which the weights may seem to fit."""
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def read_spec(folder: Path) -> ModelSpec:
    """Read `config.json`, and `generation_config.json` where there is one, of a model folder.

    Raises:
        FileNotFoundError: there is no `config.json`.
        ValueError: it is not valid JSON, misstates a field, or describes a model that is not supported.
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
        raise ValueError(f"{generation}: {error}") from None
    try:
        family = find_family(values.get("model_type"), values.get("architectures"))
        for name in (*NEVER_LEFT_OUT, *(["num_experts_per_tok"] if family.sparse else [])):
            if values.get(name) is None:
                raise ValueError(f"{name} is missing")
        return spec_from_config(hf_config(values), eos)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def hf_config(values: Mapping[str, Any]) -> PretrainedConfig:
    """The transformers config of what a `config.json` says in `FIELDS`.

    Raises:
        ValueError: the architecture is unknown or a field has the wrong type.
    """
    import transformers

    family = find_family(values.get("model_type"), values.get("architectures"))
    fields = checked_fields(values)
    try:
        # A deep copy: transformers writes defaults into nested values.
        return getattr(transformers, family.config_class).from_dict(copy.deepcopy(fields))
    except Exception as error:  # of any kind
        reason = error.args[0] if isinstance(error, KeyError) else error
        raise ValueError(" ".join(str(reason).split())) from error


def spec_from_config(config: PretrainedConfig, eos_token_ids: Iterable[int] = ()) -> ModelSpec:
    """The spec of a transformers config of a family in the registry.

    Args:
        config: transformers' own; not changed.
        eos_token_ids: ids that end a sequence beside the config's, such as the generation config's.

    Raises:
        ValueError: the architecture is unknown, or an option would change results and is not supported.
    """
    family = find_family(config.model_type, config.architectures)
    _reject_unsupported(config, family)
    quantization = read_quantization(getattr(config, "quantization_config", None), family.quantization, family.gguf)
    flags = family.flags(config)
    head_dim = getattr(config, "head_dim", None)
    if head_dim is None:
        head_dim = config.hidden_size // max(config.num_attention_heads, 1)
    if not 1 <= head_dim <= LARGEST_HEAD:
        raise ValueError(f"head_dim={head_dim}: must be at least 1 and at most {LARGEST_HEAD}")
    parameters, local_parameters = family.rope(config)
    rotary = rope_frequencies(config, head_dim, parameters, partial=family.partial_rotary)
    long, local = rotary.long_inv_freq, None
    if local_parameters is not None:
        local = rope_frequencies(config, head_dim, local_parameters)
        if local.attention_factor != 1.0 or local.long_inv_freq is not None:
            raise ValueError(f"rope_type={local_parameters.get('rope_type')!r} of sliding layers is not supported")
    positions, window = _max_position(config, family, parameters), family.window(config)
    if window is not None:
        check_size("sliding_window", window)
        if window < positions:
            logger.warning("contexts end at %d tokens, where the sliding window of all layers does", window)
    check_size("num_layers", config.num_hidden_layers)
    attention = family.attention(
        config,
        AttentionSpec(
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
        ),
    )
    return ModelSpec(
        architecture=family.name,
        vocab_size=config.vocab_size,
        width=config.hidden_size,
        attention=attention,
        mlp_width=_mlp_width(config),
        rms_norm_eps=config.rms_norm_eps,
        inv_freq=tuple(rotary.inv_freq.tolist()),
        long_inv_freq=None if long is None else tuple(long.tolist()),
        local_inv_freq=None if local is None else tuple(local.inv_freq.tolist()),
        short_context=rotary.short_context,
        rope_attention_factor=rotary.attention_factor,
        max_position=positions if window is None else min(positions, window),
        tie_embeddings=bool(config.tie_word_embeddings),
        eos_token_ids=tuple(sorted({*token_ids(config.eos_token_id), *eos_token_ids})),
        dtype=_dtype(config.dtype),
        quantization=quantization,
        **flags,
    )


def _mlp_width(config: PretrainedConfig) -> int | None:
    """Of layers without experts; where all have some, the config may leave it out."""
    width = getattr(config, "intermediate_size", None)
    return getattr(config, "moe_intermediate_size", None) if width is None else width


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
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no JSON object")
    return values


def _reject_unsupported(config: PretrainedConfig, family: Family) -> None:
    if family.hidden_act is not None and config.hidden_act not in family.hidden_act:
        raise ValueError(f"hidden_act={config.hidden_act!r} is not supported; only silu")
    layer_types = getattr(config, "layer_types", None) or ()
    others = ", ".join(sorted({*layer_types} - {*family.layer_types}))
    if others:
        raise ValueError(f"layer_types with {others} are not supported (use_sliding_window must be false)")


def _max_position(config: PretrainedConfig, family: Family, parameters: Mapping[str, Any]) -> int:
    """Positions after scaling. `linear` stretches the config's count, `yarn` the count before scaling."""
    positions = config.max_position_embeddings
    rope_type = parameters.get("rope_type") or parameters.get("type")
    if rope_type == "linear" and family.stretches_positions:
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
