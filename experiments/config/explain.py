"""What was wrong with an option, in one line that names it and the one that was meant."""

from __future__ import annotations

from dataclasses import fields

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from experiments.config.known import known_keys
from experiments.config.schema import FIXED, HOMES, PolicyConfig
from zipage import closest


def explain(error: Exception) -> str:
    """One line for an error of composition that names the option, and the closest known one."""
    if isinstance(error, MissingConfigException) and error.options:
        group, _, choice = (error.missing_cfg_file or "").rpartition("/")
        close = closest(choice, error.options)
        hint = f"did you mean {close}? " if close else ""
        return f"{group}={choice}: no such choice; {hint}(choices: {', '.join(error.options)})"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OmegaConfBaseException) and cause.full_key:
            if isinstance(cause, ConfigAttributeError | ConfigKeyError):
                return unknown(cause.full_key)
            return f"{cause.full_key}: {str(cause).splitlines()[0]}"
        cause = cause.__cause__
    text = " ".join(str(error).partition("See https")[0].split())
    return f"{error.override}: {text}" if isinstance(error, OverrideParseException) else text


def unknown(key: str) -> str:
    group, _, option = key.partition(".")
    if group == "engine" and option in HOMES:
        return f"{key}: set it as {HOMES[option]}=..."
    if group == "engine" and option in FIXED:
        return f"{key}: is always {FIXED[option]} here; workloads are text"
    if group == "policy":
        names = ", ".join(f.name for f in fields(PolicyConfig))
        return (
            f"{key}: unknown option; an option of the policy itself is policy.options.{option}, the others are {names}"
        )
    known = sorted(known_keys())
    by_option = {name.rpartition(".")[2]: name for name in known}
    close = closest(key, known) or by_option.get(closest(option or key, by_option))
    hint = f"did you mean {close}?" if close else "`--cfg job` lists all options"
    return f"{key}: unknown option; {hint}"
