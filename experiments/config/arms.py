"""Which runs a sweep is made of: the files in `conf/sweep/`, joined with the command line.

    axes:                                # of every arm; a list is an axis, a single value holds for all
      limit: 32
    arms:                                # optional blocks; the arms of each are a product of its own
      - policy: full
      - policy: [zipage, random]
        policy.budget_tokens: [256, 512]

An arm is a list of overrides, as `python -m experiments.run` takes them. Values are written as on its command line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from experiments.config.axes import MOST_ARMS, count_arms, parse_overrides
from experiments.config.known import is_list_of_texts, is_text
from experiments.config.overrides import looks_like_a_scalar, quoted
from experiments.config.yaml_files import read_yaml
from experiments.errors import UsageError
from experiments.paths import CONF
from zipage import closest

FOLDER = CONF / "sweep"
KEYS = ("axes", "arms")
OPTION = re.compile(r"[A-Za-z_][\w./@-]*")
OWN_VALUES = "a number, a text, true, false or null, or a list of these"

OWNED = {"model": "model.", "policy": "policy.options.", "workload": "workload.options."}
"""Choices, and how the options begin that mean something to one of them alone."""

Arm = tuple[str, ...]
Block = dict[str, list[str]]
"""Option -> the overrides that it takes in turn. The arms of a block are the product of its axes."""


def split_command_line(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The sweeps that a command line asks for (`+sweep=a` or `+sweep=[a,b]`), and the rest of it.

    Without a sweep, or beside a flag such as `--help` or `--cfg`, the command is Hydra's: no names, and all of it.
    """
    given = [argument for argument in arguments if argument not in ("-m", "--multirun")]
    asked = [argument for argument in given if argument.lstrip("+").startswith("sweep=")]
    if not asked or any(argument.startswith("-") for argument in given):
        return [], list(arguments)
    names = [name for argument in asked for name in _names(argument)]
    return names, [argument for argument in given if argument not in asked]


def _names(argument: str) -> list[str]:
    value = argument.partition("=")[2].strip()
    names = [name.strip() for name in value[1:-1].split(",")] if value[:1] + value[-1:] == "[]" else [value]
    if not all(names) or (names == [value] and "," in value):
        raise UsageError(f"{argument}: must be one sweep, or several joined as +sweep=[a,b]")
    return names


def sweep_path(name: str) -> Path:
    """The file of a sweep, given by its name in `conf/sweep/` or as a path that ends in .yaml."""
    path = Path(name) if name.endswith(".yaml") else FOLDER / f"{name}.yaml"
    if path.is_file():
        return path
    if name.endswith(".yaml"):
        raise UsageError(f"sweep={name}: no such sweep: there is no such file")
    choices = sorted(file.stem for file in FOLDER.glob("*.yaml"))
    close = closest(name, choices)
    hint = f"; did you mean {close}?" if close else ""
    raise UsageError(f"sweep={name}: no such sweep{hint} (choices: {', '.join(choices)}, or a path to FILE.yaml)")


def expand(names: Sequence[str], arguments: Sequence[str] = ()) -> list[Arm]:
    """The arms of the joined sweeps.

    Sweeps join by product: each block of the one with each block of the other. Where two set the same option, the
    later one wins, and the command line wins over all; `seed=0,1,2` there is an axis too. Where the later one makes
    another choice of `OWNED`, the options that belong to the choice before go with it.

    Raises:
        UsageError: a sweep is unknown, its file is not of the form above, or there are more than `MOST_ARMS` arms.
    """
    blocks: list[Block] = [{}]
    for name in names:
        later = read_sweep(sweep_path(name))
        _check_count(names, len(blocks) * len(later))
        blocks = [_joined(block, more) for block in blocks for more in later]
    given = parse_overrides(arguments)
    blocks = [_joined(block, given) for block in blocks]
    _check_count(names, sum(math.prod(map(len, block.values())) for block in blocks))
    return list(dict.fromkeys(arm for block in blocks for arm in _arms(block)))


def _joined(block: Block, later: Block) -> Block:
    """Both; of the one before go the options that belong to a choice which the later one replaces."""
    replaced = [group for group in OWNED if group in block and not set(later.get(group, ())) <= set(block[group])]
    lost = tuple(OWNED[group] for group in replaced)
    return {option: values for option, values in block.items() if not option.startswith(lost)} | later


def check_multirun(arguments: Sequence[str]) -> bool:
    """Whether the command line asks Hydra for several runs (`-m`). Raises UsageError for more than `MOST_ARMS`."""
    asked = bool({"-m", "--multirun"} & {*arguments})
    if asked:
        _check_count(["-m"], count_arms([a for a in arguments if "=" in a and not a.startswith("-")]))
    return asked


def _check_count(names: Sequence[str], count: int) -> None:
    if count > MOST_ARMS:
        raise UsageError(f"sweep {', '.join(names)}: {count:,} arms; at most {MOST_ARMS:,}: give fewer values")


def _arms(block: Block) -> list[Arm]:
    arms = []
    for overrides in product(*block.values()):
        arm = dict(zip(block, overrides, strict=True))
        if arm.get("policy", "policy=full") == "policy=full" and "policy.name" not in arm:
            # Full KV never evicts, so an axis of eviction would only repeat it.
            arm = {option: override for option, override in arm.items() if not option.startswith("policy.")}
        arms.append(tuple(arm.values()))
    return arms


def read_sweep(path: Path) -> list[Block]:
    """The blocks of a file, each with the axes that all share.

    Raises:
        UsageError: the file is not of the form above; the line names the file and the key.
    """
    content, written = read_yaml(path), read_yaml(path, texts=True)
    if not isinstance(content, dict) or not content:
        raise UsageError(f"{_shown(path)}: must hold {' or '.join(KEYS)}")
    for key in content:
        if key not in KEYS:
            raise UsageError(f"{_shown(path)}: {key}: unknown key; must be {' or '.join(KEYS)}")
    shared = _block(path, "axes", content.get("axes", {}), written.get("axes"))
    arms = content.get("arms", [{}])
    if not isinstance(arms, list) or not arms:
        raise UsageError(f"{_shown(path)}: arms: must be a list of blocks, each of options and their values")
    texts = written.get("arms", [{}])
    return [shared | _block(path, f"arms[{index}]", *both) for index, both in enumerate(zip(arms, texts, strict=True))]


def _block(path: Path, where: str, block: Any, written: Any) -> Block:
    """The block with its values as overrides; `written` is the same with all of them as texts."""
    if not isinstance(block, dict):
        raise UsageError(f"{_shown(path)}: {where}: must be options and their values")
    overrides: Block = {}
    for option, values in block.items():
        name, texts = str(option).lstrip("+"), written.get(str(option), values)  # YAML's merges are not in it
        if not OPTION.fullmatch(name):
            raise UsageError(f"{_shown(path)}: {where}: {option!r} is no option; its name begins with a letter")
        pairs = zip(_list(path, option, values), _list(path, option, texts), strict=True)
        overrides[name] = [f"{option}={_text(path, name, value, text)}" for value, text in pairs]
    return overrides


def _list(path: Path, option: str, values: Any) -> list[Any]:
    if values == []:
        raise UsageError(f"{_shown(path)}: {option}: no values; must be {OWN_VALUES}")
    return values if isinstance(values, list) else [values]


def _text(path: Path, option: str, value: Any, written: Any) -> str:
    """A value as on the command line, so that Hydra reads what YAML read, or the text where text is meant."""
    if isinstance(value, dict | list):
        raise UsageError(f"{_shown(path)}: {option}: must be {OWN_VALUES}")
    if value is None:
        return "null"
    if is_text(option) and not is_list_of_texts(option):
        return quoted(str(written))
    if isinstance(value, str):
        return quoted(value) if looks_like_a_scalar(value) else value
    return str(value).lower() if isinstance(value, bool) else str(value)


def _shown(path: Path) -> Path:
    return path.relative_to(CONF.parent) if path.is_relative_to(CONF.parent) else path
