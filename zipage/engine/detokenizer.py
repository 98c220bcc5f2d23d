"""Text of one sample as its tokens arrive, and the stop strings in it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""How vocabularies with byte fallback spell one byte of a text that has no token of its own."""

CONTEXT = 4
"""Tokens decoded again before a new one: as many as the bytes of a character, for a token has at least one byte."""


class Detokenizer:
    """Turns tokens into text that is certain: a beginning of `decode` of all tokens, whatever follows.

    Held back are an unfinished UTF-8 sequence; a run of byte tokens until its end, because one ill-formed byte replaces
    the whole run; and, where there are stop strings, the last characters that could be the beginning of one. A new
    token costs the decoding of a few; all are decoded once more at the end.

    Args:
        tokenizer: a `transformers` fast tokenizer.
        stop: stop strings; the text ends before the first one that appears.
        skip_special_tokens: leave special tokens out of the text.
        include_stop: the text ends behind the stop string instead.
        min_tokens: a stop string that is complete within this many tokens does not count.

    Attributes:
        stop_reason: the stop string that appeared, or None.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        stop: tuple[str, ...] = (),
        skip_special_tokens: bool = True,
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._skip_special_tokens = skip_special_tokens
        added = self._backend.get_added_tokens_decoder() if skip_special_tokens else {}
        self._skipped = {token_id for token_id, token in added.items() if token.special}
        self._token_ids: list[int] = []
        self._window: list[int] = []
        """The latest tokens that have a text."""
        self._num_settled = 0
        """Characters of the window's text that are certain and were handed on."""
        self._num_whole = 0
        """Tokens of the window behind its last byte token."""
        self._run = bytearray()
        """The byte tokens at the end."""
        self._run_is_ill_formed = False

        self._stop = stop
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._stop_bytes = tuple(s.encode("utf-8", "surrogatepass") for s in stop)
        self._held_back = max(map(len, stop), default=1) - 1
        self._pieces: list[str] = []
        self._held = ""
        self._num_early = 0
        """Characters of `_held` that came within `min_tokens`."""
        self._num_taken = 0
        self.stop_reason: str | None = None

    @property
    def text(self) -> str:
        """What is certain, up to the stop string."""
        return "".join(self._pieces) + self._held

    def add(self, token_id: int) -> str | None:
        """Take one token. Returns the stop string that it completed, if any; `text` then ends before it."""
        self._token_ids.append(token_id)
        token = None if token_id in self._skipped else self._backend.id_to_token(token_id)
        if not token or self.stop_reason is not None:
            return self.stop_reason
        if byte := BYTE_TOKEN.fullmatch(token):
            if not self._run:
                self._settle()
            self._window.append(token_id)
            self._num_whole = 0
            self._run.append(int(byte[1], 16))
            if self._stop and not self._run_is_ill_formed and self._ends_like_a_stop():
                self._look_into_run()
        else:
            self._window.append(token_id)
            self._num_whole += 1
            self._run.clear()
            self._run_is_ill_formed = False
            self._settle(unfinished="\ufffd")
        return self.stop_reason

    def finish(self) -> str:
        """No more tokens come: settle and return the whole text.

        An unfinished UTF-8 sequence at the end shows as U+FFFD, as in `decode` of all tokens.
        """
        if self.stop_reason is None:
            whole, text = decode(self._tokenizer, self._token_ids, self._skip_special_tokens), self.text
            if whole.startswith(text):
                self._held += whole[len(text) :]
        return self.text

    def take(self, finished: bool) -> str:
        """Text that became certain since the last call."""
        if finished:
            self._pieces.append(self._held)
            self._held = ""
        piece = "".join(self._pieces[self._num_taken :])
        self._num_taken = len(self._pieces)
        return piece

    def _text_of_window(self) -> str:
        return self._backend.decode(self._window, skip_special_tokens=self._skip_special_tokens)

    def _settle(self, unfinished: str = "") -> None:
        """Hand on what is certain: the text of the window without `unfinished`, which may stand at its end."""
        certain = self._text_of_window().removesuffix(unfinished)
        self._append(certain[self._num_settled :])
        if len(self._window) >= 2 * CONTEXT:
            del self._window[: -min(CONTEXT, self._num_whole)]
            certain = self._text_of_window().removesuffix(unfinished)
        self._num_settled = len(certain)

    def _append(self, piece: str) -> None:
        """More certain text: look for a stop string, and hold back what may begin one."""
        text = self._held + piece
        found = self._find_stop(text)
        if found is not None:
            end, self.stop_reason = found
            end += len(self.stop_reason) if self._include_stop else 0
            text = text[:end]
        else:
            end = max(0, len(text) - self._held_back)
        self._pieces.append(text[:end])
        self._held = text[end:]
        early = len(text) if self._is_early else self._num_early
        self._num_early = max(0, early - end)

    @property
    def _is_early(self) -> bool:
        return len(self._token_ids) <= self._min_tokens

    def _find_stop(self, text: str) -> tuple[int, str] | None:
        """Where in `text`, which `_held` begins, the first stop string stands, and which."""
        if self._is_early:
            return None
        places = ((text.find(s, max(0, self._num_early + 1 - len(s))), s) for s in self._stop)
        return min(((at, s) for at, s in places if at >= 0), key=lambda pair: pair[0], default=None)

    def _ends_like_a_stop(self) -> bool:
        """Whether certain text and run end with the bytes of a stop string."""
        longest = max(map(len, self._stop_bytes))
        before = self._held.encode("utf-8", "surrogatepass") if len(self._run) < longest else b""
        return (before + self._run[-longest:]).endswith(self._stop_bytes)

    def _look_into_run(self) -> None:
        """Stop if the run, should it end here, holds a stop string."""
        text = self._text_of_window()[self._num_settled :]
        if self._find_stop(self._held + text) is not None:
            self._append(text)
        self._run_is_ill_formed = not text.strip("\ufffd")


def decode(tokenizer: PreTrainedTokenizerFast, token_ids: list[int], skip_special_tokens: bool = True) -> str:
    """Text of `token_ids`, exactly as the tokens spell it."""
    return tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
