"""What the engine says of its options, in the names under which a run's user types them."""

from __future__ import annotations

import re
from dataclasses import fields

from experiments.config.schema import HOMES, EngineOptions, SamplingOptions

_SAMPLING = {f.name: f"sampling.{f.name}" for f in fields(SamplingOptions) if "_" in f.name}
_ENGINE = {f.name: f"engine.{f.name}" for f in fields(EngineOptions)} | HOMES
TYPED = {name: typed for name, typed in (_SAMPLING | _ENGINE).items() if name not in ("model", "policy", "seed")}
"""Name of an option in the engine's messages -> as it is typed, where that differs."""


def as_typed(text: str, policy: str) -> str:
    """`block_size=20: must be ...` as `engine.block_size=20: must be ...`.

    A name of several words is an option wherever it stands, one of a single word where a value follows.

    Args:
        text: of an error of the engine or of its sampling parameters.
        policy: the run's, whose own options are named `POLICY.OPTION=`.
    """
    text = re.sub(r"\bSamplingParams\.(?=[a-z])", "sampling.", text)
    text = re.sub(rf"(?<![\w./]){re.escape(policy)}\.(?=\w+=)", "policy.options.", text)

    def typed(found: re.Match[str]) -> str:
        name = found[0]
        is_option = "_" in name or text[found.end() : found.end() + 1] == "="
        return TYPED.get(name, name) if is_option else name

    return re.sub(r"(?<![\w./:'\"-])[a-z]\w*\b(?![/(]|\.\w)", typed, text)
