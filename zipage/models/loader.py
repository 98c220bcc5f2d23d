"""From a model's name to a `Decoder` with its weights."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from zipage.models.decoder import Decoder
from zipage.models.gguf_file import GgufFile
from zipage.models.gguf_model import GgufWeights, gguf_spec
from zipage.models.locate import CONFIG, WEIGHTS, locate_model
from zipage.models.safetensors_folder import SafetensorsFolder
from zipage.models.spec import ModelSpec, read_spec

logger = logging.getLogger(__name__)

EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"

# Buffers that old checkpoints carry and that follow from the config.
HARMLESS_SUFFIXES = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")


class Weights(Protocol):
    """Tensors by their Hugging Face names."""

    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class LoadedModel:
    """A decoder with its weights, and what it is."""

    decoder: Decoder
    spec: ModelSpec


def load_model(
    model: str, *, load_format: str = "auto", dtype: str = "auto", device: str = "auto", seed: int = 0
) -> LoadedModel:
    """Build a model and fill it.

    Tensors are read one at a time, cast and moved, so the model is never in memory twice.

    Args:
        model: folder with `config.json` and safetensors, hub id, or GGUF file.
        load_format: "auto" reads weights; "dummy" draws them from `seed` and needs the config alone.
        dtype: "float32", "float16", "bfloat16", or "auto": on CUDA the config's, failing that the first tensor's,
            bfloat16 for GGUF and where there is neither; on a CPU float32.
        device: "auto" (CUDA where there is one), or a torch device.
        seed: of dummy weights.

    Raises:
        FileNotFoundError: the model, its config, its weights or a shard is missing.
        ValueError: the architecture or an option of it is not supported; a file is broken; a tensor is missing, left
            over, present twice or of another shape; `dtype` is unknown; there is no such device.
        ImportError: a quantized GGUF file, and the package `gguf` is absent.
    """
    torch_device = resolve_device(device)
    dummy = load_format == "dummy"
    path = locate_model(model, CONFIG if dummy else WEIGHTS)
    weights: Weights | None = None
    if path.is_file():
        file = GgufFile(path)
        spec = gguf_spec(file)
        weights = None if dummy else GgufWeights(file, spec)
    else:
        spec = read_spec(path)
        if not dummy:
            weights = SafetensorsFolder(path, torch_device)
            spec = dataclasses.replace(spec, dtype=spec.dtype or weights.dtype)
    if weights is not None:
        spec = _checked_tying(spec, weights)
    torch_dtype = resolve_dtype(dtype, spec, torch_device)
    check_before_allocating(spec, torch_dtype, torch_device, weights, str(path))
    decoder = Decoder(spec, torch_dtype, torch_device)
    if weights is None:
        fill_random(decoder, seed)
    else:
        fill(decoder, weights, str(path))
    return LoadedModel(decoder, spec)


_kept: dict[tuple[Any, ...], LoadedModel] | None = None
"""The last model that was loaded, where `share_model` holds it."""


@contextmanager
def share_model() -> Iterator[None]:
    """Inside, an engine takes over the weights of the last one that was made of the same model.

    The same is one of equal name, format, dtype and device (and seed, where weights are drawn): its files are not
    looked at again. Engines never write weights. Another model frees those that are held, once no engine uses them.
    """
    global _kept
    before, _kept = _kept, {}
    try:
        yield
    finally:
        _kept = before


def obtain_model(
    model: str, *, load_format: str = "auto", dtype: str = "auto", device: str = "auto", seed: int = 0
) -> LoadedModel:
    """`load_model`, or what `share_model` holds of the same."""
    options = {"load_format": load_format, "dtype": dtype, "device": device, "seed": seed}
    if _kept is None:
        return load_model(model, **options)
    key = (model, load_format, dtype, device, seed if load_format == "dummy" else None)
    if key not in _kept:
        _kept.clear()  # first, so that two are never held
        _kept[key] = load_model(model, **options)
    return _kept[key]


def resolve_device(device: str) -> torch.device:
    """Turn `EngineConfig.device` into a device. Raises ValueError where it does not exist."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        result = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r}: must be auto, cpu, cuda or cuda:N") from error
    if result.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device={device!r}: torch {torch.__version__} sees no CUDA device; pass device='cpu'")
        result = torch.device("cuda", torch.cuda.current_device() if result.index is None else result.index)
        if result.index >= torch.cuda.device_count():
            raise ValueError(f"device={device!r}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return result


def resolve_dtype(dtype: str, spec: ModelSpec, device: torch.device) -> torch.dtype:
    """Turn `EngineConfig.dtype` into a dtype; see `load_model`. Raises ValueError for an unknown one."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else spec.dtype or torch.bfloat16
    if dtype not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"dtype={dtype!r}: must be auto, float32, float16 or bfloat16")
    return getattr(torch, dtype)


def check_before_allocating(
    spec: ModelSpec, dtype: torch.dtype, device: torch.device, weights: Weights | None, source: str
) -> None:
    """See that a spec tells the truth about its weights, or, where they are to be drawn, that they fit this machine.

    Args:
        weights: None where they are to be drawn.
        source: what errors call the model.

    Raises:
        ValueError: the weights are others (see `fill`), or too large for the host's memory.
    """
    layers = 1 if weights is None else spec.num_layers
    if weights is not None and layers > len(weights.shapes):
        raise ValueError(f"{source}: num_layers={layers}, but there are {len(weights.shapes)} tensors")
    try:
        decoder = Decoder(dataclasses.replace(spec, num_layers=layers), dtype, torch.device("meta"))
    except RuntimeError as error:  # no tensor can be as large
        raise ValueError(f"{source}: the sizes of its config overflow ({error})") from error
    if weights is not None:
        _names_to_read(decoder, weights, source)
    elif device.type == "cpu":
        layer, total = (sum(p.nbytes for p in module.parameters()) for module in (decoder.layers, decoder))
        needed, memory = total + layer * (spec.num_layers - 1), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if needed > memory:
            raise ValueError(f"{source}: the model takes {needed >> 30:,} GiB, this machine has {memory >> 30:,} GiB")


def fill(decoder: Decoder, weights: Weights, source: str) -> None:
    """Copy each tensor into its place, each place once.

    `lm_head.weight` is passed over where embeddings are tied: `load_model` has seen that it equals the embedding.

    Args:
        source: what errors call the weights.

    Raises:
        ValueError: tensors are missing, left over or of another shape; the message names them. Nothing was read then.
    """
    views = decoder.weight_views()
    for name in _names_to_read(decoder, weights, source):
        views[name].copy_(weights.read(name))


def _names_to_read(decoder: Decoder, weights: Weights, source: str) -> list[str]:
    views = decoder.weight_views()
    passed_over = (*HARMLESS_SUFFIXES, LM_HEAD) if decoder.spec.tie_embeddings else HARMLESS_SUFFIXES
    names = [name for name in weights.shapes if not name.endswith(passed_over)]
    missing = [name for name in views if name not in weights.shapes]
    left_over = [name for name in names if name not in views]
    misshapen = [
        f"{name} is {list(weights.shapes[name])}, not {list(views[name].shape)}"
        for name in names
        if name in views and weights.shapes[name] != tuple(views[name].shape)
    ]
    problems = [
        f"{what}: {_first(found)}"
        for what, found in (("missing", missing), ("left over", left_over), ("wrong shape", misshapen))
        if found
    ]
    if problems:
        raise ValueError(f"{source} does not hold the tensors that its config describes: {'; '.join(problems)}")
    return names


@torch.no_grad()
def fill_random(decoder: Decoder, seed: int) -> None:
    """Draw weights on the decoder's device: the same on every call with one device type, dtype and seed.

    Matrices have variance 1 / fan-in, so that each sublayer adds about unit variance to the residual stream, which
    keeps activations finite in every dtype however deep the model. Norms are 1, biases small.
    """
    generator = torch.Generator(decoder.device).manual_seed(seed)
    for name, parameter in decoder.named_parameters():
        if parameter.dim() == 2:
            parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
        elif name.endswith("bias"):
            parameter.normal_(0.0, 0.02, generator=generator)
        else:
            parameter.fill_(1.0)


def _checked_tying(spec: ModelSpec, weights: Weights) -> ModelSpec:
    """Untie embeddings that the config calls tied and the weights hold twice with different values.

    As transformers does: then the config is wrong, not the weights.
    """
    if not spec.tie_embeddings or not {EMBEDDING, LM_HEAD} <= weights.shapes.keys():
        return spec
    same_shape = weights.shapes[EMBEDDING] == weights.shapes[LM_HEAD]
    if same_shape and torch.equal(weights.read(EMBEDDING), weights.read(LM_HEAD)):
        return spec
    logger.warning("config says tie_word_embeddings, but %s differs from %s: not tied", LM_HEAD, EMBEDDING)
    return dataclasses.replace(spec, tie_embeddings=False)


def _first(names: Iterable[str], limit: int = 5) -> str:
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
