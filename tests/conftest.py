"""Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before they are imported."""

import gc
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Workers begin to import the tests at different places: what one has compiled, the others find compiled.

    What can't be imported is told where it is collected. Nothing imported is garbage.
    """
    gc.set_threshold(1_000_000)
    if not (worker := getattr(config, "workerinput", None)):
        return
    places = [Path(argument.partition("::")[0]).resolve() for argument in config.args]
    files = [file for place in places for file in (sorted(place.rglob("test_*.py")) if place.is_dir() else [place])]
    first = len(files) * int(worker["workerid"].removeprefix("gw")) // worker["workercount"]
    for file in files[first:] + files[:first]:
        with suppress(Exception, pytest.skip.Exception):
            importlib.import_module(".".join(file.relative_to(config.rootpath).with_suffix("").parts))


def pytest_collection_finish() -> None:
    """Garbage is looked for more seldom, and not among the modules: else that takes an eighth of all time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="module")
def forked_children() -> Iterator[None]:
    """Children of this process (`zipage.processes`) are forked from one that has imported what they import."""
    from tests.experiments.running.forked import ForkedPython
    from zipage import processes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": ForkedPython}))
        yield


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The example of a policy is new to each test, and what a test registers is forgotten after it."""
    from zipage.eviction import registry

    known = {name: policy for name, policy in registry.POLICIES.items() if name != "my_policy"}
    monkeypatch.setattr(registry, "POLICIES", known)
    monkeypatch.delitem(sys.modules, "examples.my_policy", raising=False)
    yield
    sys.modules.pop("examples.my_policy", None)
