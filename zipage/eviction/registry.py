"""Policies by name."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zipage.eviction.policy import Policy

POLICIES: dict[str, str | type[Policy]] = {
    "full": "zipage.eviction.full:Full",
    "zipage": "zipage.eviction.zipage:Zipage",
    "snapkv": "zipage.eviction.snapkv:SnapKV",
    "h2o": "zipage.eviction.h2o:H2O",
    "tova": "zipage.eviction.tova:Tova",
    "streaming": "zipage.eviction.streaming:Streaming",
    "r_kv": "zipage.eviction.r_kv:RKV",
    "g_kv": "zipage.eviction.g_kv:GKV",
    "morphkv": "zipage.eviction.morphkv:MorphKV",
    "keydiff": "zipage.eviction.keydiff:KeyDiff",
    "knorm": "zipage.eviction.knorm:KNorm",
    "vase": "zipage.eviction.vase:VaSE",
    "random": "zipage.eviction.random:Random",
    "random_shared": "zipage.eviction.random_shared:RandomShared",
    "page_attention": "zipage.eviction.page_attention:PageAttention",
    "page_random": "zipage.eviction.page_random:PageRandom",
}
"""Name -> class, or where to find it; modules load on first use."""

SPELLED_OUT = {"random_attention": "policy='random' with protection='prompt'"}
"""Names of the field for a policy together with a protection, and how the two are asked for."""


def register(policy: type[Policy]) -> type[Policy]:
    """Class decorator: make a policy known by its `name`. Raises ValueError where the name is another policy's."""
    if POLICIES.setdefault(policy.name, policy) is not policy:
        raise ValueError(f"policy name {policy.name!r} is taken: choose another")
    return policy


def find(name: str) -> type[Policy]:
    """The class of a policy.

    Args:
        name: a registered name, or "package.module:Class" for one that lives elsewhere.

    Raises:
        ValueError: there is no such policy; the message names the closest.
    """
    place = POLICIES.get(name, name)
    if not isinstance(place, str):
        return place
    module, _, attribute = place.partition(":")
    if not attribute:
        hint = _hint(name, or_else=", or 'package.module:Class'")
        raise ValueError(f"unknown policy {name!r}; {hint}")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"policy {name!r} cannot be loaded: {error}") from error


def check_registered(name: str) -> None:
    """Raise a ValueError where no policy is known by this name; nothing is imported."""
    if name not in POLICIES:
        raise ValueError(f"unknown policy {name!r}; {_hint(name)}")


def _hint(name: str, or_else: str = "") -> str:
    if name in SPELLED_OUT:
        return f"it is {SPELLED_OUT[name]}"
    close = difflib.get_close_matches(name, POLICIES, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(POLICIES)}{or_else}"


def make(name: str, options: Mapping[str, Any] | None = None) -> Policy:
    """Build a policy from its name and options.

    Raises:
        ValueError: policy or option unknown (the message names the closest), or a value is outside its range.
    """
    return find(name).from_options(options or {})
