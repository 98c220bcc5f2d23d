"""Hydra reads the files of `conf` and its own for each run, copies all that it knows, and composes twice, first to see
whether the config names another mode than the command line, which ours never does. Tests make many runs.
"""

from __future__ import annotations

import copy
import pickle
from functools import cache
from typing import Any

import pytest
from hydra._internal import defaults_list
from hydra._internal.config_repository import CachingConfigRepository, IConfigRepository
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.core_plugins.importlib_resources_config_source import ImportlibResourcesConfigSource
from hydra._internal.hydra import Hydra
from hydra.core.config_store import ConfigNode, ConfigStore
from hydra.core.default_element import InputDefault
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig

from experiments.paths import CONF


def read_once(patch: pytest.MonkeyPatch) -> None:
    """Let Hydra read each file of `conf` and of its own once in this process, and compose a run once."""
    patch.setattr(FileConfigSource, "load_config", _load_file)
    patch.setattr(ImportlibResourcesConfigSource, "load_config", _load_own)
    patch.setattr(ConfigStore, "load", _load_structured)
    patch.setattr(CachingConfigRepository, "__init__", _init_repository)
    patch.setattr(defaults_list, "_create_interpolation_map", _interpolation_map)
    patch.setattr(Hydra, "get_mode", lambda *_, **__: None)


def _load_file(source: FileConfigSource, config_path: str) -> ConfigResult:
    load = _read if source.path == str(CONF) else _read.__wrapped__
    return pickle.loads(load(FileConfigSource, source.provider, source.path, config_path))


def _load_own(source: ImportlibResourcesConfigSource, config_path: str) -> ConfigResult:
    return pickle.loads(_read(ImportlibResourcesConfigSource, source.provider, source.path, config_path))


LOADS = {source: source.load_config for source in (FileConfigSource, ImportlibResourcesConfigSource)}


@cache
def _read(source: type, provider: str, folder: str, path: str) -> bytes:
    """Pickled, which is copied ten times as fast as by `deepcopy`."""
    return pickle.dumps(LOADS[source](source(provider, folder), path))


def _load_structured(store: ConfigStore, config_path: str) -> ConfigNode:
    return pickle.loads(_pickled(store._load(config_path)))


_PICKLED: dict[int, tuple[ConfigNode, bytes]] = {}
"""With the node, so that no other takes its id."""


def _pickled(node: ConfigNode) -> bytes:
    if id(node) not in _PICKLED:
        _PICKLED[id(node)] = node, pickle.dumps(node)
    return _PICKLED[id(node)][1]


def _init_repository(repository: CachingConfigRepository, delegate: IConfigRepository) -> None:
    """`initialize_sources` gives the copy a new list, so the sources, with all that is stored, need no copy."""
    repository.delegate = copy.copy(delegate)
    repository.cache = {}


def _interpolation_map(
    overrides: Any, defaults: list[InputDefault], self_added: bool, create=defaults_list._create_interpolation_map
) -> DictConfig | None:
    """What interpolations of the defaults are resolved with, if there are any."""
    return create(overrides, defaults, self_added) if any(d.is_interpolation() for d in defaults) else None
