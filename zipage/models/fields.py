"""What the fields of a `config.json` must be, checked before anything is computed or allocated from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from zipage.models.rotary import KNOWN_KEYS

LARGEST = 2**31 - 1
"""Of any size."""
LARGEST_HEAD = 2**16
LARGEST_DEPTH = 2**16
MOST_EXPERTS = 2**12
FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
"""Types of layers, in `layer_types`."""


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is an integer or a float, and finite as a float."""
    return (is_integer(value) and abs(value) < 2**1023) or (isinstance(value, float) and math.isfinite(value))


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(is_text, value))


def is_ids(value: Any) -> bool:
    """Whether it is a token id or a list of them."""
    return all(map(is_integer, value)) if isinstance(value, list | tuple) else is_integer(value)


def _is_positive(value: Any) -> bool:
    return is_number(value) and value > 0


def _is_rope(value: Any) -> bool:
    """Of all layers alike, or by their type."""
    if isinstance(value, Mapping) and (FULL in value or SLIDING in value):
        return all(key in (FULL, SLIDING) and (inner is None or _is_rope_of_all(inner)) for key, inner in value.items())
    return _is_rope_of_all(value)


def _is_rope_of_all(value: Any) -> bool:
    def is_right(key: str, inner: Any) -> bool:
        if key in ("rope_type", "type"):
            return is_text(inner)
        if key in ("rope_theta", "factor", "original_max_position_embeddings"):
            return inner is None or _is_positive(inner)
        if key in ("short_factor", "long_factor"):
            return isinstance(inner, list) and all(map(_is_positive, inner))
        return key not in KNOWN_KEYS or inner is None or isinstance(inner, bool) or is_number(inner)

    return isinstance(value, Mapping) and all(is_right(*item) for item in value.items())


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _at_most(limit: int) -> tuple[Callable[[Any], bool], str]:
    return lambda value: is_integer(value) and value <= limit, f"an integer, at most {limit}"


def _are_integers(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(is_integer, value))


_FLAG, _NUMBER, _TEXT = (_is_flag, "true or false"), (is_number, "a finite number"), (is_text, "a text")
_TEXTS, _ROPE = (is_texts, "a list of texts"), (_is_rope, "an object with a rope_type and finite numbers above 0")

FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "architectures": _TEXTS,
    "attention_bias": _FLAG,
    "attn_logit_softcapping": _NUMBER,
    "decoder_sparse_step": _at_most(LARGEST),
    "dtype": _TEXT,
    "eos_token_id": (is_ids, "an integer or a list of integers"),
    "final_logit_softcapping": _NUMBER,
    "full_attention_interval": (lambda value: _is_positive(value) and is_integer(value), "an integer above 0"),
    "head_dim": _at_most(LARGEST_HEAD),
    "hidden_act": _TEXT,
    "hidden_activation": _TEXT,
    "hidden_size": _at_most(LARGEST),
    "intermediate_size": _at_most(LARGEST),
    "layer_types": _TEXTS,
    "linear_conv_kernel_dim": _at_most(LARGEST_HEAD),
    "linear_key_head_dim": _at_most(LARGEST_HEAD),
    "linear_num_key_heads": _at_most(LARGEST),
    "linear_num_value_heads": _at_most(LARGEST),
    "linear_value_head_dim": _at_most(LARGEST_HEAD),
    "max_position_embeddings": _at_most(LARGEST),
    "max_window_layers": _at_most(LARGEST),
    "mlp_bias": _FLAG,
    "mlp_only_layers": (_are_integers, "a list of integers"),
    "moe_intermediate_size": _at_most(LARGEST),
    "norm_topk_prob": _FLAG,
    "num_attention_heads": _at_most(LARGEST),
    "num_experts": _at_most(MOST_EXPERTS),
    "num_experts_per_tok": _at_most(MOST_EXPERTS),
    "num_hidden_layers": _at_most(LARGEST_DEPTH),
    "num_key_value_heads": _at_most(LARGEST),
    "num_local_experts": _at_most(MOST_EXPERTS),
    "original_max_position_embeddings": (lambda value: _is_positive(value) and is_integer(value), "an integer above 0"),
    "partial_rotary_factor": _NUMBER,
    "qkv_bias": _FLAG,
    "quantization_config": (lambda value: isinstance(value, Mapping), "an object"),
    "query_pre_attn_scalar": _NUMBER,
    "rms_norm_eps": _NUMBER,
    "rope_local_base_freq": _NUMBER,
    "rope_parameters": _ROPE,
    "rope_scaling": _ROPE,
    "rope_theta": _NUMBER,
    "shared_expert_intermediate_size": _at_most(LARGEST),
    "sliding_window": _at_most(LARGEST),
    "sliding_window_pattern": (lambda value: _is_positive(value) and is_integer(value), "an integer above 0"),
    "swiglu_alpha": _NUMBER,
    "swiglu_limit": _NUMBER,
    "tie_word_embeddings": _FLAG,
    "torch_dtype": _TEXT,
    "use_bidirectional_attention": _FLAG,
    "use_sliding_window": _FLAG,
    "vocab_size": _at_most(LARGEST),
}
"""Fields that are read -> a check of a value that is not null, and what it wants.

No other field reaches transformers, which allocates what some of them say (`num_labels`).
"""


def check_size(name: str, value: Any) -> None:
    """Raise a ValueError unless `value` is an integer from 1 to `LARGEST`."""
    if not is_integer(value) or not 1 <= value <= LARGEST:
        raise ValueError(f"{name}={shown(value)}: must be an integer, at least 1 and at most {LARGEST}")


def checked_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `FIELDS` that are there. Raises ValueError that names the first that is wrong, its value and what it
    must be."""
    kept = {name: values[name] for name in FIELDS if name in values}
    for name, value in kept.items():
        is_right, what = FIELDS[name]
        if value is not None and not is_right(value):
            raise ValueError(f"{name}={shown(value)}: must be {what}")
    return kept


def shown(value: Any) -> str:
    """The value as a message shows it: not at length."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; lists in lists
        text = f"({type(value).__name__})"
    return text if len(text) <= 80 else f"{text[:80]}..."
