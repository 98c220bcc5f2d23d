"""What a `config.json` says of weights that are stored in fewer bits and dequantized when loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from zipage.models.fields import LARGEST, is_integer, is_text, shown

KINDS = {"fp8": "FP8 in blocks", "mxfp4": "MXFP4"}
"""`quant_method` -> what messages call it."""
COMPUTED = {"activation_scheme": "dynamic", "fmt": "e4m3", "expert_dtype": "fp8"}
"""Fields beside `weight_block_size` that say what codes mean -> the value that a field left out has."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a checkpoint stores its quantized weights.

    Attributes:
        method: `quant_method`.
        block: rows and columns of a weight that share a scale, where `method` is "fp8".
    """

    method: Literal["fp8", "mxfp4"]
    block: tuple[int, int] = (1, 1)


def read_quantization(config: Any, methods: tuple[str, ...], gguf: bool) -> Quantization | None:
    """Of a `quantization_config`, None where there is none.

    Args:
        methods: of `KINDS`, those that the model's family has.
        gguf: the family's GGUF files can be read, which a refusal then says.

    Raises:
        ValueError: another method, or a form of FP8 that is not supported.
    """
    if config is None:
        return None
    *others, last = ["unquantized weights", *(KINDS[method] for method in methods), *["a GGUF file"] * gguf]
    remedy = f"use {', '.join(others)} or {last}"
    method = config.get("quant_method") if isinstance(config, Mapping) else config
    if not is_text(method) or method not in methods:
        name = method if is_text(method) and len(method) <= 40 else shown(method)
        raise ValueError(f"quantization_config ({name}) is not supported; {remedy}")
    if method != "fp8":
        return Quantization(method)
    block = config.get("weight_block_size")
    if not isinstance(block, list | tuple) or len(block) != 2 or not all(map(_is_size, block)):
        raise ValueError(
            f"quantization_config (fp8) with weight_block_size={shown(block)}: must be two integers from 1 to "
            f"{LARGEST}; {remedy}"
        )
    for name, value in COMPUTED.items():
        if config.get(name, value) != value:
            raise ValueError(f"quantization_config (fp8) with {name}={shown(config[name])} is not supported; {remedy}")
    return Quantization(method, tuple(block))


def _is_size(value: Any) -> bool:
    return is_integer(value) and 1 <= value <= LARGEST
