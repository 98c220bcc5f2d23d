"""Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before they are imported."""

import gc
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_finish() -> None:
    """Garbage is looked for more seldom, and not among the modules: else that takes an eighth of all time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
