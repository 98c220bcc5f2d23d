"""The command line of a run before Hydra reads it, so that what is mistyped is one line that names what was meant."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import NoReturn

from hydra._internal.utils import get_args_parser

from experiments.command_line import given_flags, unknown_flag
from experiments.config.known import BESIDE, known_keys
from experiments.errors import UsageError
from zipage import closest

DRY_RUN = "--dry-run"
ALL = "`python -m experiments.run --help` shows all options"


def arranged(arguments: Sequence[str]) -> list[str]:
    """The arguments with all overrides before the flags, as Hydra's parser wants them.

    Raises:
        UsageError: a flag is unknown or lacks its value, or an argument is neither a flag nor an override.
    """
    parser = get_args_parser()
    parser.error = _refuse
    flags = [f"--{name.replace('_', '-')}" for name in vars(parser.parse_args([])) if name != "overrides"]
    flags += ["--version", DRY_RUN]
    for argument in arguments:
        _refuse_dashes(argument)
    for flag in given_flags(arguments):
        if not any(known.startswith(flag) for known in flags):
            raise UsageError(unknown_flag(flag, flags, ALL))
    given = [argument for argument in arguments if argument != DRY_RUN]
    overrides = parser.parse_intermixed_args(given).overrides
    for override, after in zip_longest(overrides, overrides[1:], fillvalue=""):
        _check_form(override, after, flags)
    waiting = list(overrides)
    others = [argument for argument in arguments if not (argument in waiting and not waiting.remove(argument))]
    return [*overrides, *others]


def _refuse(message: str) -> NoReturn:
    raise UsageError(message if "; " in message else f"{message}; --help shows how")


def _refuse_dashes(argument: str) -> None:
    """Raise a UsageError for an option that is written like a flag."""
    name, _, value = argument.lstrip("-").partition("=")
    option = name.replace("-", "_")
    if argument.startswith("-") and option in known_keys() | {*BESIDE}:
        plus, default = ("+", BESIDE[option]) if option in BESIDE else ("", "VALUE")
        raise UsageError(f"{argument.partition('=')[0]}: options have no dashes: {plus}{option}={value or default}")


def _check_form(override: str, after: str, flags: Sequence[str]) -> None:
    if override.startswith("="):
        raise UsageError(f"{override}: names no option; write OPTION=VALUE")
    if "=" in override or override.startswith("~"):
        return
    if override in known_keys():
        remedy = f"write {override}=VALUE" + ", without spaces" * after.startswith("=")
    elif close := closest(override, known_keys()):
        remedy = f"did you mean {close}=VALUE?"
    elif close := closest(override, [flag.lstrip("-") for flag in flags]):
        remedy = f"did you mean --{close}?"
    else:
        remedy = "write OPTION=VALUE"
    raise UsageError(f"{override}: has no value; {remedy}")
