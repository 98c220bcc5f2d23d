"""The server's own options; those of the engine are `EngineConfig`'s."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from zipage.checks import Count, Text, at_least, between, check_fields, shown

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Options of `zipage serve` beside those of the engine.

    Attributes:
        host: address to listen on.
        port: TCP port to listen on; 0 takes a free one.
        served_model_name: names by which requests may call the model, the first of them in answers. None: as it was
            given.
        api_key: keys of which a request must bring one, as "Authorization: Bearer KEY". None: those of the environment
            variable ZIPAGE_API_KEY, separated by commas, or no keys.
        chat_template: a file with a Jinja template, or the template itself, instead of the tokenizer's.
        max_body_bytes: a request's body has at most so many bytes.
        max_n: samples of one request at most, all its prompts together.
        max_queue: samples that may wait beside those that run; further requests are refused with status 429.
        shutdown_grace: seconds that running requests have to finish after SIGTERM or SIGINT.
        engine_process: the engine runs in a process of its own, so that streams do not slow its steps. None: on a GPU.
        show_prompts: the page at / shows how each prompt begins and ends. None: unless there are several API keys.
        access_log: log a line for every request.

    Raises:
        ValueError: a value is of the wrong type or outside its range, or the template cannot be read.
    """

    host: Text = "127.0.0.1"
    port: Annotated[int, between(0, 65535)] = 8000
    served_model_name: tuple[Text, ...] | None = None
    api_key: tuple[Text, ...] | None = None
    chat_template: Text | None = None
    max_body_bytes: Count = 4 * 2**20
    max_n: Count = 128
    max_queue: Annotated[int, at_least(0)] = 1024
    shutdown_grace: Annotated[float, at_least(0)] = 30.0
    engine_process: bool | None = None
    show_prompts: bool | None = None
    access_log: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "chat_template", _template(self.chat_template))


def _template(given: str | None) -> str | None:
    """Text with Jinja's brackets is a template, any other the name of a file."""
    if given is None or "{" in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"chat_template={shown(given)}: must be a template or a file that holds one ({error})"
        ) from None
