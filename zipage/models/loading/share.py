"""Models that several engines of one process share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from zipage.models.loading.loader import LoadedModel, load_model
from zipage.models.spec import ModelSpec

_kept: dict[tuple[Any, ...], LoadedModel] | None = None
"""The last model that was loaded, where `share_model` holds it."""


@contextmanager
def share_model() -> Iterator[None]:
    """Inside, an engine takes over the weights of the last one that was made of the same model.

    The same is one of equal name, format, dtype and device (and seed, where weights are drawn): its files are not
    looked at again. Engines never write weights. Another model frees those that are held, once no engine uses them.
    Replicas (`data_parallel_size`) are refused.
    """
    global _kept
    before, _kept = _kept, {}
    try:
        yield
    finally:
        _kept = before


def is_sharing() -> bool:
    """Whether this is inside `share_model`."""
    return _kept is not None


def obtain_model(
    model: str,
    *,
    load_format: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    seed: int = 0,
    check: Callable[[ModelSpec], None] | None = None,
) -> LoadedModel:
    """`load_model`, or what `share_model` holds of the same."""
    options = {"load_format": load_format, "dtype": dtype, "device": device, "seed": seed}
    if _kept is None:
        return load_model(model, **options, check=check)
    key = (model, load_format, dtype, device, seed if load_format == "dummy" else None)
    if key not in _kept:
        _kept.clear()  # first, so that two are never held
        _kept[key] = load_model(model, **options, check=check)
    elif check is not None:
        check(_kept[key].spec)
    return _kept[key]
