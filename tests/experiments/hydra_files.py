"""Hydra reads the files of `conf` for each run, and composes it twice, first to see whether the config names another
mode than the command line, which ours never does. Tests make many runs.
"""

from __future__ import annotations

import pickle
from functools import cache

import pytest
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.hydra import Hydra
from hydra.plugins.config_source import ConfigResult

from experiments.paths import CONF


def read_once(patch: pytest.MonkeyPatch) -> None:
    """Let Hydra read each file of `conf` once in this process, and compose a run once."""

    def load_config(source: FileConfigSource, config_path: str) -> ConfigResult:
        load = _read if source.path == str(CONF) else _read.__wrapped__
        return pickle.loads(load(source.provider, source.path, config_path))  # copied ten times as fast as by deepcopy

    patch.setattr(FileConfigSource, "load_config", load_config)
    patch.setattr(Hydra, "get_mode", lambda *_, **__: None)


@cache
def _read(provider: str, folder: str, path: str, load=FileConfigSource.load_config) -> bytes:
    return pickle.dumps(load(FileConfigSource(provider, folder), path))
