"""The tokenizer that belongs to a model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from zipage.checks import shown
from zipage.models.loading.gguf_file import GgufFile
from zipage.models.loading.gguf_tokenizer import gguf_tokenizer
from zipage.models.loading.hf_config import read_json
from zipage.models.loading.locate import TOKENIZER, locate_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

REMEDY = "add the tokenizer's files, or pass skip_tokenizer_init=True and prompts as token ids"


def load_tokenizer(model: str) -> PreTrainedTokenizerFast:
    """Load a model's tokenizer, chat template included.

    Args:
        model: folder, hub id or GGUF file. `tokenizer.json` is taken as it stands; without one, transformers
            converts what the folder holds. Code in the folder is never run.

    Raises:
        FileNotFoundError: the model does not exist or has no tokenizer.
        ValueError: the tokenizer is broken or of an unknown kind.
    """
    path = locate_model(model, TOKENIZER)
    file = GgufFile(path) if path.is_file() else None
    try:
        tokenizer = _from_folder(path) if file is None else gguf_tokenizer(file)
        tokenizer.decode(tokenizer("")["input_ids"])  # options of the wrong type show here, before any request
        return tokenizer
    except BaseException as error:
        if not is_tokenizer_error(error):
            raise
        if str(path) in str(error) and isinstance(error, FileNotFoundError | ValueError):
            raise
        raise ValueError(f"{path}: the tokenizer cannot be read ({_first_line(error)}): {REMEDY}") from error


def is_tokenizer_error(error: BaseException) -> bool:
    """Whether a tokenizer may have raised it: bare Exceptions, and a BaseException where its Rust panics."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def end_of_sequence_ids(of_model: Iterable[int], tokenizer: PreTrainedTokenizerFast | None = None) -> frozenset[int]:
    """Ids that end a sequence: those of config, generation config or GGUF metadata, and the tokenizer's."""
    if tokenizer is None or tokenizer.eos_token_id is None:
        return frozenset(of_model)
    return frozenset((*of_model, tokenizer.eos_token_id))


def _from_folder(folder: Path) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    _check_chat_template(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    if (folder / "tokenizer.model").is_file() or _has_all(folder, "vocab.json", "merges.txt"):
        try:
            return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            raise ValueError(
                f"{folder}: its tokenizer is Python code, which is never run: save it as tokenizer.json, "
                "or pass skip_tokenizer_init=True and prompts as token ids"
            ) from None
    raise FileNotFoundError(f"{folder} has no tokenizer (tokenizer.json): {REMEDY}")


def _check_chat_template(path: Path) -> None:
    """Raises ValueError where the config has a chat template that is none: transformers takes whatever stands there."""
    try:
        template = read_json(path).get("chat_template") if path.is_file() else None
    except ValueError:
        return  # transformers says what is wrong
    texts = [template]
    if isinstance(template, dict):
        texts = [*template.values()]
    elif isinstance(template, list):
        texts = [d.get(key) if isinstance(d, dict) else None for d in template for key in ("name", "template")]
    if template is not None and not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"{path}: chat_template={shown(template)}: must be a text, a list of objects with a name and a template, "
            "or left out"
        )


def _has_all(folder: Path, *names: str) -> bool:
    return all((folder / name).is_file() for name in names)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
