"""From the name that the user gave to the model's folder or file."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from zipage.models.loading.gguf_file import MAGIC

# What a hub id is downloaded for -> the files of its top folder.
CONFIG = ("*.json",)
TOKENIZER = ("*.json", "*.jinja", "*.model", "merges.txt")
WEIGHTS = ("*.json", "*.safetensors")

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def locate_model(model: str, files: tuple[str, ...]) -> Path:
    """A model folder or a GGUF file.

    Args:
        model: an existing folder, an existing GGUF file, or a hub id ("owner/name"), which is downloaded into
            the hub's cache unless it lies there.
        files: patterns of the files wanted, for the hub.

    Raises:
        FileNotFoundError: there is no such path, and on the hub there is no such id or it cannot be reached.
        ValueError: the path is a file of another kind.
    """
    try:
        path = Path(model).expanduser()
        is_folder, is_file = bool(model) and path.is_dir(), path.is_file()
    except (OSError, RuntimeError) as error:  # a name that is too long; ~ of an unknown user
        raise FileNotFoundError(f"{model!r:.100} does not exist ({error}): pass a model folder or a hub id") from None
    if is_folder:
        return path
    if is_file:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise ValueError(f"{model} is not a GGUF file: pass the model's folder, a hub id or a GGUF file")
        return path
    if not _HUB_ID.fullmatch(model) or model.endswith(".gguf"):
        raise FileNotFoundError(f"{model!r} does not exist: pass a model folder, a GGUF file or a hub id (owner/name)")
    return _download(model, files)


def _download(model: str, files: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)  # of its retries the last error says all
    try:
        folder = snapshot_download(model, allow_patterns=list(files), ignore_patterns=["*/*", "consolidated*"])
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise FileNotFoundError(
            f"{model}: no folder of that name here, and the hub did not give it ({reason}): "
            "check the name and the network, or pass a local folder"
        ) from None  # what the client chains to it are a hundred lines that say no more
    finally:
        logger.setLevel(level)
    return Path(folder)
