"""What was wrong with an option, in one line that names it and the one that was meant."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from experiments.config.known import BESIDE, groups, known_keys
from experiments.config.schema import FIXED, HOMES, PolicyConfig
from zipage import closest

MULTIRUN = ".multirun"
"""Folder in `results_dir` where Hydra writes what `-m` was asked for (`conf/config.yaml`)."""


def explain(error: Exception) -> str:
    """One line for an error of composition that names the option, and the closest known one."""
    if isinstance(error, MissingConfigException) and error.options:
        group, _, choice = (error.missing_cfg_file or "").partition("/")
        close = _own(group, choice) or closest(choice, error.options)
        hint = f"; did you mean {close}?" if close else ""
        return f"{group}={choice}: no such choice{hint} (choices: {', '.join(error.options)})"
    if isinstance(error, OSError) and Path(str(error.filename)).name == MULTIRUN:
        return f"results_dir={Path(error.filename).parent}: can't be written: {error.strerror}"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OmegaConfBaseException) and cause.full_key:
            if isinstance(cause, ConfigAttributeError | ConfigKeyError):
                return unknown(cause.full_key)
            return f"{cause.full_key}: {str(cause).splitlines()[0]}"
        cause = cause.__cause__
    text = " ".join(str(error).partition("See https")[0].split())
    if isinstance(error, OverrideParseException):
        return f"{error.override}: {text}"
    return _reworded(text) if isinstance(error, HydraException) else text


def _own(group: str, choice: str) -> str | None:
    """How a user's own model or policy is named, which is no file of `conf/GROUP/`; None where it is neither."""
    if group == "model" and choice.endswith(".gguf"):
        return f"model=gguf model.path={choice}"
    if group == "model" and "/" in choice:
        return f"model=hf model.path={choice}"
    return f"policy.name={choice}" if group == "policy" and ":" in choice else None


def _reworded(text: str) -> str:
    """What Hydra says, as it reads for this command line."""
    if found := re.match(r"Ambiguous value for argument '(([^=]*)=(.*?))' 1\. To use", text):
        override, option, values = found.groups()
        return f"{override}: several values; -m makes a run of each, {option}=[{values}] is a list"
    if found := re.fullmatch(r"Could not delete from config\. '(\S+)' does not exist\.", text):
        return f"~{found[1]}: has no value to take away" if found[1] in known_keys() else f"~{unknown(found[1])}"
    return text


def unknown(key: str) -> str:
    group, _, option = key.partition(".")
    if group == "engine" and option in HOMES:
        return f"{key}: set it as {HOMES[option]}=..."
    if group == "engine" and option in FIXED:
        return f"{key}: is always {FIXED[option]} here; workloads are text"
    if group == "policy":
        names = [f.name for f in fields(PolicyConfig)]
        if close := closest(option, names):
            return f"{key}: unknown option; did you mean policy.{close}?"
        return (
            f"{key}: unknown option; an option of the policy itself is policy.options.{option}, "
            f"the others are {', '.join(names)}"
        )
    if key in BESIDE:
        return f"{key}: unknown option; it goes with +sweep=NAME"
    meant = " or ".join("+" * (name in BESIDE) + name for name in _meant(key))
    return f"{key}: unknown option; " + (f"did you mean {meant}?" if meant else "`--cfg job` lists all options")


def _meant(key: str) -> list[str]:
    """The known options that may be meant: in the group that is named, else those of exactly that name elsewhere.

    Groups and names are compared each for itself: options are no more alike for being in the same group.
    """
    known: dict[str, list[str]] = {}
    for name in sorted({*known_keys(), *BESIDE}):
        known.setdefault(name.rpartition(".")[2], []).append(name)
    group, _, option = key.rpartition(".")
    if group:
        near = f"{closest(group, groups())}."
        inside = [last for last, names in known.items() if any(name.startswith(near) for name in names)]
        if close := closest(option, inside):
            return [near + close]
        longer = [name for last, names in known.items() if last.endswith(f"_{option}") for name in names]
        return known.get(option) or (longer if len(longer) == 1 else [])
    found = known.get(closest(option, known), [])
    return [name for name in found if "." not in name] or found
