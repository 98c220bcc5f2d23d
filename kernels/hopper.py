"""Kernels that Hopper has beside those of every GPU: in Gluon, Triton's language for one kind of GPU."""

from __future__ import annotations

import logging
from functools import cache
from importlib import import_module
from types import ModuleType

log = logging.getLogger(__name__)


@cache
def hopper_kernels(name: str) -> ModuleType | None:
    """`kernels/NAME_gluon.py`. None with a warning where Triton's Gluon, which is experimental, differs from ours."""
    try:
        return import_module(f"kernels.{name}_gluon")
    except (ImportError, AttributeError, TypeError) as error:
        log.warning("%s has a slower kernel: this Triton's Gluon differs (%s); use Triton 3.6 to 3.9", name, error)
        return None
