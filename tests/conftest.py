"""Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before they are imported."""

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


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
