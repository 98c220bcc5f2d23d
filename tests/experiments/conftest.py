"""Runs in temporary folders, with an engine that needs no model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
from omegaconf import DictConfig

from experiments import run
from experiments.config import compose as composing
from experiments.paths import ROOT
from experiments.records import sources
from tests.experiments.fake_engine import fake_backend
from zipage.eviction import registry


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZIPAGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The example of a policy is new to each test, and what it registers is forgotten after it."""
    known = {name: policy for name, policy in registry.POLICIES.items() if name != "my_policy"}
    monkeypatch.setattr(registry, "POLICIES", known)
    monkeypatch.delitem(sys.modules, "examples.my_policy", raising=False)
    yield
    sys.modules.pop("examples.my_policy", None)


@pytest.fixture(autouse=True)
def _compose_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tests plan the same arms again and again, each of which takes Hydra a tenth of a second."""
    monkeypatch.setattr(composing, "compose", lambda name, overrides: deepcopy(_composed(name, tuple(overrides))))


@cache
def _composed(name: str, overrides: tuple[str, ...], compose=composing.compose) -> DictConfig:
    return compose(name, overrides=list(overrides))


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
