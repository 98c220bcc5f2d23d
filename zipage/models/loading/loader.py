"""From a model's name to a `Decoder` with its weights."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from zipage.models.decoder import Decoder
from zipage.models.loading.fp8 import Fp8Folder
from zipage.models.loading.gguf_file import GgufFile
from zipage.models.loading.gguf_model import GgufWeights, gguf_spec
from zipage.models.loading.hf_config import read_spec
from zipage.models.loading.locate import CONFIG, WEIGHTS, locate_model
from zipage.models.loading.mxfp4 import Mxfp4Folder
from zipage.models.loading.quantized_folder import QuantizedFolder
from zipage.models.loading.safetensors_folder import SafetensorsFolder
from zipage.models.loading.weights import EMBEDDING, LM_HEAD, Weights, check_before_allocating, fill, fill_random
from zipage.models.quantization import Quantization
from zipage.models.registry import find_family
from zipage.models.shard import WHOLE, Shard
from zipage.models.spec import ModelSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A decoder with its weights, and the spec of the whole model."""

    decoder: Decoder
    spec: ModelSpec


def load_model(
    model: str,
    *,
    load_format: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    seed: int = 0,
    shard: Shard = WHOLE,
    check: Callable[[ModelSpec], None] | None = None,
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
        shard: what of the model to load.
        check: called before a weight is read; raises a ValueError for a model that the caller can't use.

    Raises:
        FileNotFoundError: the model, its config, its weights or a shard is missing.
        ValueError: the architecture or an option of it is not supported; a file is broken; a tensor is missing, left
            over, present twice, of another shape or not finite; `dtype` is unknown; no such device; the model cannot be
            spread over the shard's ranks.
        ImportError: a quantized GGUF file, and the package `gguf` is absent.
    """
    torch_device = resolve_device(device)
    dummy = load_format == "dummy"
    path = locate_model(model, CONFIG if dummy else WEIGHTS)
    spec, weights = _open(path, dummy, torch_device)
    if check is not None:
        check(spec)
    if weights is not None:
        spec = _checked_tying(spec, weights)
    torch_dtype = resolve_dtype(dtype, spec, torch_device)
    shard.check(spec)
    check_before_allocating(spec, torch_dtype, torch_device, weights, str(path), shard)
    if isinstance(weights, QuantizedFolder) and shard.rank == 0:
        logger.warning("%s", weights.cost(torch_dtype))
    decoder = find_family(spec.architecture).decoder(spec, torch_dtype, torch_device, shard)
    if weights is None:
        fill_random(decoder, seed)
    else:
        fill(decoder, weights, str(path))
    return LoadedModel(decoder, spec)


def read_shape(
    model: str, *, load_format: str = "auto", dtype: str = "auto", device: str = "auto"
) -> tuple[ModelSpec, torch.dtype]:
    """What `load_model` would build and in which dtype, as far as headers tell; no tensor is read, no device touched.

    Raises:
        FileNotFoundError, ValueError: as `load_model`, for what it finds before it reads weights.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    spec, _ = open_model(model, load_format, torch.device("cpu"))
    return spec, resolve_dtype(dtype, spec, torch.device(device))


def open_model(model: str, load_format: str, device: torch.device) -> tuple[ModelSpec, Weights | None]:
    """The spec of a model, and its weights, unread, unless they are dummies; as `load_model`."""
    dummy = load_format == "dummy"
    return _open(locate_model(model, CONFIG if dummy else WEIGHTS), dummy, device)


def _open(path: Path, dummy: bool, device: torch.device) -> tuple[ModelSpec, Weights | None]:
    """The model's spec, and its weights, unread, unless they are dummies."""
    if path.is_file():
        file = GgufFile(path)
        spec = gguf_spec(file)
        return spec, None if dummy else GgufWeights(file, spec)
    spec = read_spec(path)
    if dummy:
        return spec, None
    weights = _open_folder(path, device, spec.quantization)
    return dataclasses.replace(spec, dtype=spec.dtype or weights.dtype), weights


def _open_folder(
    folder: Path, device: torch.device, quantization: Quantization | None
) -> SafetensorsFolder | QuantizedFolder:
    if quantization is None:
        return SafetensorsFolder(folder, device)
    return (
        Fp8Folder(folder, device, quantization.block) if quantization.method == "fp8" else Mxfp4Folder(folder, device)
    )


def resolve_device(device: str) -> torch.device:
    """Turn `EngineConfig.device` into a device. Raises ValueError where it does not exist."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        result = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device={device!r}: must be auto, cpu, cuda or cuda:N") from None
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
