"""Policies by name."""

from __future__ import annotations

import importlib
import inspect
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from zipage.checks import closest, shown
from zipage.eviction.fault import named

if TYPE_CHECKING:
    from zipage.eviction.policy import Policy

POLICIES: dict[str, str | type[Policy]] = {
    "full": "zipage.eviction.policies.full:Full",
    "zipage": "zipage.eviction.policies.zipage:Zipage",
    "snapkv": "zipage.eviction.policies.snapkv:SnapKV",
    "h2o": "zipage.eviction.policies.h2o:H2O",
    "tova": "zipage.eviction.policies.tova:Tova",
    "streaming": "zipage.eviction.policies.streaming:Streaming",
    "r_kv": "zipage.eviction.policies.r_kv:RKV",
    "g_kv": "zipage.eviction.policies.g_kv:GKV",
    "morphkv": "zipage.eviction.policies.morphkv:MorphKV",
    "keydiff": "zipage.eviction.policies.keydiff:KeyDiff",
    "knorm": "zipage.eviction.policies.knorm:KNorm",
    "vase": "zipage.eviction.policies.vase:VaSE",
    "lagkv": "zipage.eviction.policies.lagkv:LagKV",
    "q_filters": "zipage.eviction.policies.q_filters:QFilters",
    "triattention": "zipage.eviction.policies.triattention:TriAttention",
    "expected_attention": "zipage.eviction.policies.expected_attention:ExpectedAttention",
    "kvzap": "zipage.eviction.policies.kvzap:KVzap",
    "critical": "zipage.eviction.policies.critical:Critical",
    "lazy_eviction": "zipage.eviction.policies.lazy_eviction:LazyEviction",
    "random": "zipage.eviction.policies.random:Random",
    "random_shared": "zipage.eviction.policies.random_shared:RandomShared",
    "page_attention": "zipage.eviction.policies.page_attention:PageAttention",
    "page_random": "zipage.eviction.policies.page_random:PageRandom",
}
"""Name -> class, or where to find it; modules load on first use."""

METHODS = {"random_attention": "policy='random' with protection='prompt'"}
"""Published methods that are options of another policy, and those options."""


def register(policy: type[Policy]) -> type[Policy]:
    """Class decorator: make a policy known by its `name`. Raises ValueError where the name is another policy's."""
    known = POLICIES.get(policy.name)
    if known is not None and known not in (policy, location(policy)):
        raise ValueError(f"policy name {policy.name!r} is taken: choose another")
    POLICIES[policy.name] = policy
    return policy


def find(name: str) -> type[Policy]:
    """The class of a policy.

    Args:
        name: a registered name, or "package.module:Class" for one that lives elsewhere, whose module is imported.

    Raises:
        ValueError: there is no such policy (the message names the closest), or what is there is none.
    """
    place = POLICIES.get(name, name)
    if not isinstance(place, str):
        return place
    module, _, attribute = place.partition(":")
    if not attribute:
        raise ValueError(_unknown(name))
    with named(name, "loaded"):
        holder = _imported(name, module)
        found = getattr(holder, attribute, None)
    if found is None:
        raise ValueError(f"policy {shown(name)} cannot be loaded: {_missing(holder, attribute)}")
    if not _is_policy(found):
        raise ValueError(
            f"policy {shown(name)} cannot be loaded: {attribute} must be a subclass of zipage.eviction.policy.Policy "
            "that sets name, variant and paper and implements rank"
        )
    return found


def _imported(policy: str, module: str) -> ModuleType:
    """Raises ValueError where there is no such module; what the module itself lacks is its own error."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"policy {shown(policy)} cannot be loaded: no module {shown(error.name)} is installed, nor in "
            f"{' or '.join(_folders()) or 'any other folder'}; name the folder that holds it in PYTHONPATH"
        ) from error


def _folders() -> list[str]:
    """Where Python looks for modules besides those that are installed."""
    installed = (str(Path(sysconfig.get_path("stdlib")).parent / "python"), sysconfig.get_path("purelib"))
    folders = dict.fromkeys(str(Path(folder).resolve()) for folder in sys.path)
    return [folder for folder in folders if not folder.startswith(installed) and Path(folder).is_dir()]


def location(policy: type[Policy]) -> str | None:
    """As "package.module:Class" what another process can import; None where the policy is this process's alone."""
    module, name = policy.__module__, policy.__qualname__
    return None if module == "__main__" or name != policy.__name__ else f"{module}:{name}"


def locations() -> dict[str, str]:
    """The registered policies that another process can find, by name."""
    found = {name: known if isinstance(known, str) else location(known) for name, known in POLICIES.items()}
    return {name: where for name, where in found.items() if where is not None}


def _is_policy(found: object) -> bool:
    from zipage.eviction.policy import Policy

    whole = isinstance(found, type) and issubclass(found, Policy) and not inspect.isabstract(found)
    return whole and all(hasattr(found, attribute) for attribute in ("name", "variant", "paper"))


def _missing(module: ModuleType, attribute: str) -> str:
    policies = [name for name, value in vars(module).items() if _is_policy(value)]
    close = closest(attribute, policies)
    hint = f"did you mean {close}?" if close else f"its policies: {', '.join(policies) or 'none'}"
    return f"{module.__name__} has no {attribute}; {hint}"


def _unknown(name: str) -> str:
    if name in METHODS:
        return f"unknown policy {shown(name)}: it is {METHODS[name]}"
    close = closest(name, POLICIES)
    known = f"known: {', '.join(POLICIES)}, or 'package.module:Class'"
    return f"unknown policy {shown(name)}; " + (f"did you mean {close!r}?" if close else known)


def make(name: str, options: Mapping[str, Any] | None = None) -> Policy:
    """Build a policy from its name and options.

    Raises:
        ValueError: policy or option unknown (the message names the closest), or a value is outside its range.
    """
    policy = find(name)
    with named(name, "built"):
        return policy.from_options(options or {})
