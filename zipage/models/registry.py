"""The families of models that can be loaded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from zipage.models.families.gemma3_text import GEMMA3_TEXT
from zipage.models.families.gpt_oss import GPT_OSS
from zipage.models.families.llama import LLAMA
from zipage.models.families.mistral import MISTRAL
from zipage.models.families.phi3 import PHI3
from zipage.models.families.qwen2 import QWEN2
from zipage.models.families.qwen2_moe import QWEN2_MOE
from zipage.models.families.qwen3 import QWEN3
from zipage.models.families.qwen3_5_moe_text import QWEN3_5_MOE_TEXT
from zipage.models.families.qwen3_5_text import QWEN3_5_TEXT
from zipage.models.families.qwen3_moe import QWEN3_MOE
from zipage.models.families.qwen3_next import QWEN3_NEXT
from zipage.models.family import Family
from zipage.models.fields import FIELDS, is_texts, shown

_PLAIN = LLAMA, MISTRAL, PHI3, QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE
_ALL = *_PLAIN, GEMMA3_TEXT, GPT_OSS, QWEN3_NEXT, QWEN3_5_TEXT, QWEN3_5_MOE_TEXT
FAMILIES = {family.name: family for family in _ALL}

_LATENT = "has multi-head latent attention: its cache holds no keys of a head's own to score or to evict"
_RECURRENT = "has recurrent layers: there are none that attend, and no entries to evict"
REFUSED = {
    "gemma3": "reads images; 'gemma3_text' is supported",
    "qwen3_5_moe": "reads images; 'qwen3_5_moe_text' is supported",
    "qwen3_5": "reads images; 'qwen3_5_text' is supported",
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2"), _LATENT),
    **dict.fromkeys(("mamba", "mamba2"), _RECURRENT),
}
"""Other architectures that are asked for -> why there is no family for them."""


def find_family(name: Any, classes: Iterable[str] | None = None) -> Family:
    """The family of a model.

    Args:
        name: `model_type` of its `config.json`.
        classes: `architectures` of its `config.json`.

    Raises:
        ValueError: there is no such family, or its checkpoints are of another class; the message names both.
    """
    if isinstance(name, str) and name in REFUSED:
        raise ValueError(f"architecture {name!r} is not supported: it {REFUSED[name]}")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(f"unknown architecture {shown(name)}; supported: {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    if classes is not None and not is_texts(classes):
        raise ValueError(f"architectures={shown(classes)}: must be {FIELDS['architectures'][1]}")
    if classes and family.checkpoint_class not in classes:
        supported = ", ".join(each.checkpoint_class for each in FAMILIES.values())
        raise ValueError(f"unknown architecture {', '.join(classes)}; supported: {supported}")
    return family


def find_gguf_family(architecture: Any) -> Family:
    """The same of the `general.architecture` of a GGUF file."""
    families = {family.gguf_name: family for family in FAMILIES.values() if family.gguf}
    if not isinstance(architecture, str) or architecture not in families:
        raise ValueError(f"unknown architecture {shown(architecture)}; supported in GGUF: {', '.join(families)}")
    return families[architecture]
