"""Runs in temporary folders, with an engine that needs no model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from experiments import run
from experiments.paths import ROOT
from experiments.records import provenance, sources
from tests.experiments.fake_engine import fake_backend
from tests.experiments.hydra_files import read_once


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZIPAGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _hydra_reads_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read_once(monkeypatch)


@pytest.fixture(autouse=True)
def _git_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the runs of this process: it would be asked as long as they take."""
    monkeypatch.setattr(provenance, "code_state", CODE_STATE)


CODE_STATE = cache(provenance.code_state)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny-model"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["None"]}')
    return folder


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def arguments(model_folder: Path, results: Path) -> list[str]:
    """The command line of a small run."""
    return ["model=hf", f"model.path={model_folder}", "limit=6", f"results_dir={results}", "hardware=cpu"]


@pytest.fixture
def launch(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run the main job in this process on the fake engine; returns its exit code."""

    def launch(*more: str, **behaviour) -> int:
        monkeypatch.setattr(sys, "argv", ["experiments.run", *arguments, *more])
        return run.main(fake_backend(**behaviour))

    return launch


@pytest.fixture
def other_code(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Make believe that a file of the repository has changed."""
    caches = (sources._engine, sources._policy, sources._grader)
    file_hash = sources.file_hash

    def other_code(name: str) -> None:
        monkeypatch.setattr(sources, "file_hash", lambda file: "other" if file == ROOT / name else file_hash(file))
        for cached in caches:
            cached.cache_clear()

    yield other_code
    for cached in caches:
        cached.cache_clear()
