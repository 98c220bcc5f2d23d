"""From a command line to a checked `Experiment`: Hydra composes, the schema holds."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.config import config_files
from experiments.config.check import check
from experiments.config.explain import explain, unknown
from experiments.config.known import groups, is_text, known_keys
from experiments.config.overrides import as_written
from experiments.config.schema import Experiment
from experiments.errors import UsageError
from experiments.paths import CONF


@cache
def register() -> None:
    """Give Hydra the schema under the name that `conf/config.yaml` lists first, and its way to read files."""
    config_files.use()
    ConfigStore.instance().store("experiment_schema", _schema())


def _schema() -> DictConfig:
    schema = OmegaConf.structured(Experiment)
    # OmegaConf makes the config of a frozen dataclass read-only; here only the dataclass it ends in is.
    OmegaConf.set_readonly(schema, None)
    for group in groups():
        OmegaConf.set_readonly(schema[group], None)
    for free in (
        schema.policy.options,
        schema.policy.allocation_options,
        schema.workload.options,
        schema.workload.parts,
        schema.scenario.options,
        schema.launcher.parameters,
        schema.model.chat_template_options,
    ):
        OmegaConf.set_struct(free, False)
    return schema


def recorded(config: Mapping[str, Any]) -> Experiment:
    """The experiment of a record's config. Raises UsageError where an option of it is none any more or out of range."""
    try:
        return build(OmegaConf.merge(_schema(), dict(config)))
    except OmegaConfBaseException as error:
        raise UsageError(explain(error)) from error


def build(config: DictConfig) -> Experiment:
    """The composed config as a checked `Experiment`.

    Raises:
        UsageError: an option is unknown, missing or out of range.
    """
    for key in _keys(config):
        if key not in known_keys():
            raise UsageError(unknown(key))
    try:
        experiment = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise UsageError(_missing(config) or explain(error)) from error
    check(experiment)
    return experiment


def _missing(config: DictConfig) -> str | None:
    """That an option is missing, if one is."""
    with suppress(OmegaConfBaseException):
        if missing := sorted(OmegaConf.missing_keys(config)):
            return f"{missing[0]} is missing: give {missing[0]}=..."
    return None


def load_experiment(overrides: Sequence[str] = ()) -> Experiment:
    """What `python -m experiments.run OVERRIDES` would run.

    Raises:
        UsageError: an option is unknown, missing or out of range.
    """
    register()
    try:
        config = _composed([_as_written(override) for override in overrides])
    except Exception as error:
        raise UsageError(explain(error)) from error
    return build(config)


def _composed(overrides: Sequence[str]) -> DictConfig:
    """What Hydra composes.

    It takes a tenth of a second for the choices of groups. So each is composed once, and the other options set as it
    would set them, unless anything is out of the ordinary or fails: then all is left to Hydra.
    """
    # Inside an application of Hydra's, as `python -m experiments.run` is, there is an instance to compose with.
    running = GlobalHydra.instance().is_initialized()
    with suppress(Exception):
        if not running and (parts := _split(overrides)) is not None:
            config = pickle.loads(_of_choices(parts[0], _stamp()))
            for option, value in parts[1]:
                OmegaConf.update(config, option, value, merge=True)
            return config
    with nullcontext() if running else initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def _split(overrides: Sequence[str]) -> tuple[tuple[str, ...], list[tuple[str, Any]]] | None:
    """The choices of groups among overrides, and the options that the others set; None where there is more to them."""
    choices, options = [], []
    for override in overrides:
        parsed = _parsed(override)
        name, value = parsed.key_or_group, parsed.value()
        is_plain = parsed.type is OverrideType.CHANGE and parsed.package is None and not parsed.is_sweep_override()
        if not is_plain or "/" in name or name.partition(".")[0] == "hydra":
            return None
        if not (CONF / name).is_dir():
            options.append((name, value))
        elif isinstance(value, str):
            choices.append(override)
        else:
            return None
    return tuple(choices), options


@lru_cache(maxsize=1024)
def _of_choices(choices: tuple[str, ...], stamp: Any) -> bytes:
    """The composed config, pickled, which is copied ten times as fast; `stamp`: of the files that it is made from.

    A choice decides its own group alone, unless its file says otherwise: so each is composed once, whatever is
    beside it.
    """
    last = {_parsed(choice).key_or_group: choice for choice in choices}
    if any(_decides_more(CONF / name / f"{_parsed(choice).value()}.yaml") for name, choice in last.items()):
        return _together(choices)
    config = pickle.loads(_alone(None, stamp))
    for name, choice in last.items():
        config[name] = pickle.loads(_alone(choice, stamp))[name]
    return pickle.dumps(config)


def _decides_more(file: Path) -> bool:
    """Than its group."""
    return re.search(r"^defaults:|@package", file.read_text(encoding="utf-8"), re.MULTILINE) is not None


@lru_cache(maxsize=1024)
def _alone(choice: str | None, stamp: Any) -> bytes:
    """One choice, or none, as in `_of_choices`."""
    return _together([] if choice is None else [choice])


def _together(choices: Sequence[str]) -> bytes:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return pickle.dumps(compose("config", overrides=list(choices)))


def _stamp() -> tuple[tuple[str, int, int], ...]:
    """Tells the files of `conf/` from what they were before any of them changed."""
    paths = sorted(os.path.join(folder, name) for folder, _, names in os.walk(CONF) for name in names)
    return tuple((path, (found := os.stat(path)).st_mtime_ns, found.st_size) for path in paths)


@lru_cache(maxsize=4096)
def _as_written(override: str) -> str:
    return as_written(override, is_text)


@lru_cache(maxsize=4096)
def _parsed(override: str) -> Override:
    return OverridesParser.create().parse_override(override)


def _keys(config: DictConfig) -> Iterator[str]:
    known = groups()
    for name in config:
        yield str(name)
        if name in known:
            yield from (f"{name}.{inner}" for inner in config[name])
