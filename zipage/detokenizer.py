"""Text of one sample as its tokens arrive, and the stop strings in it."""

from __future__ import annotations

from tokenizers.decoders import DecodeStream


class Detokenizer:
    """Turns tokens into text that is certain, holding back what a later token could change.

    Held back are unfinished UTF-8 sequences and, where there are stop strings, the last characters that could be the
    beginning of one.

    Args:
        tokenizer: a `transformers` fast tokenizer.
        stop: stop strings; the text ends before the first one that appears.
    """

    def __init__(self, tokenizer, stop: tuple[str, ...] = (), skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._skip_special_tokens = skip_special_tokens
        self._stop = stop
        self._held_back = max(map(len, stop), default=1) - 1
        self._token_ids: list[int] = []
        self._num_emitted = 0
        self.text = ""
        self.stop_reason: str | None = None

    def add(self, token_id: int) -> str | None:
        """Take one token. Returns the stop string that it completed, if any; `text` then ends before it."""
        self._token_ids.append(token_id)
        piece = self._stream.step(self._tokenizer.backend_tokenizer, token_id)
        if piece:
            start = max(0, len(self.text) - self._held_back)
            self.text += piece
            self._find_stop(start)
        return self.stop_reason

    def _find_stop(self, start: int) -> None:
        found = [(at, s) for s in self._stop if (at := self.text.find(s, start)) >= 0]
        if found:
            at, self.stop_reason = min(found, key=lambda pair: pair[0])
            self.text = self.text[:at]

    def finish(self) -> str:
        """No more tokens come: settle and return the whole text.

        An unfinished UTF-8 sequence at the end shows as U+FFFD, as in `tokenizer.decode` of all tokens.
        """
        if self.stop_reason is None:
            whole = decode(self._tokenizer, self._token_ids, self._skip_special_tokens)
            if whole.startswith(self.text):
                self.text = whole
        return self.text

    def take(self, finished: bool) -> str:
        """Text that became certain since the last call."""
        end = len(self.text) if finished else max(self._num_emitted, len(self.text) - self._held_back)
        piece = self.text[self._num_emitted : end]
        self._num_emitted = end
        return piece


def decode(tokenizer, token_ids: list[int], skip_special_tokens: bool = True) -> str:
    """Text of `token_ids`, exactly as the tokens spell it."""
    return tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
