"""YAML files as plain data, within a limit on what they hold once their aliases are written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.errors import UsageError

MOST_BYTES = 1 << 20
MOST_VALUES = 100_000


def read_yaml(path: Path, *, texts: bool = False) -> Any:
    """A YAML file as plain data. A key that is there twice is an error, as in every config file.

    Args:
        texts: leave each value as the text that was written.

    Raises:
        UsageError: the file is not valid YAML, or too large (see `check_yaml_size`).
    """
    try:
        check_yaml_size(path)
        if texts:
            return yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
        return OmegaConf.to_container(OmegaConf.load(path))
    except yaml.scanner.ScannerError as error:
        hint = "; YAML is indented with spaces, not tabs" * ("'\\t'" in str(error.problem))
        raise UsageError(f"{path}: {' '.join(str(error).split())}{hint}") from error
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UsageError(f"{path}: {' '.join(str(error).split())}") from error


def check_yaml_size(path: Path) -> None:
    """See that a file can be read whole.

    Raises:
        ValueError: it has more than `MOST_BYTES`, more than `MOST_VALUES` values and keys where each alias counts as
            what it stands for, an alias inside of what it stands for, or too deep a nesting.
        yaml.YAMLError: it is not valid YAML.
        OSError: it can't be read.
    """
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"has {size:,} bytes; at most {MOST_BYTES:,}")
    try:
        total = _count(yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader), {})
    except RecursionError:
        raise ValueError("is nested too deep") from None
    if total > MOST_VALUES:
        raise ValueError(f"holds {total:,} values with its aliases written out; at most {MOST_VALUES:,}")


def _count(node: yaml.Node | None, known: dict[int, int | None]) -> int:
    """Nodes below and with this one. `known` has the count of each collection; None while it is being counted."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = None
        inner = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_count(part, known) for part in inner)
    count = known[id(node)]
    if count is None:
        raise ValueError("holds an alias inside of what it stands for")
    return count
