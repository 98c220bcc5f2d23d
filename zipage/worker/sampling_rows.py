"""What the rows of the batch ask of the sampler."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np

from zipage.sampling_params import SamplingParams
from zipage.scheduling.plan import RowStart

OPTIONS = np.dtype(
    [
        ("temperature", np.float64),
        ("top_k", np.int64),
        ("top_p", np.float64),
        ("min_p", np.float64),
        ("repetition_penalty", np.float64),
        ("seed", np.int64),
        ("index", np.int64),
        ("num_prompt_tokens", np.int64),
        ("num_logprobs", np.int64),
        ("edits_logits", np.bool_),
        ("needs_history", np.bool_),
        ("returns_hidden_states", np.bool_),
        ("draw", np.int8),
    ]
)
"""Of one row. Floats are as they were given: who computes with them rounds. `num_logprobs` is -1 where none are wanted,
and `draw` says how a token is drawn."""

FROM_ALL, IN_ORDER, RANKED = range(3)
"""Greedy or without a cut; with `min_p` alone; with `top_k` or `top_p`."""


class SamplingRows:
    """The options of each row, from the `RowStart` of the request that has it.

    Attributes:
        starts: of each row, the latest.
        texts: of a row whose options need it, all its tokens as of the last `extend`; else empty.
    """

    def __init__(self, num_rows: int) -> None:
        self._options = np.zeros(num_rows, dtype=OPTIONS)
        self.starts: list[RowStart | None] = [None] * num_rows
        self.texts = [array("i")] * num_rows

    def begin(self, start: RowStart) -> None:
        """Another request has the row from now on, or the same one again."""
        params = start.sampling_params
        self._options[start.row] = (
            params.temperature,
            min(params.top_k, 2**31),
            params.top_p,
            params.min_p,
            params.repetition_penalty,
            start.seed,
            start.index,
            start.num_prompt_tokens,
            -1 if params.logprobs is None else params.logprobs,
            params.edits_logits,
            params.needs_history,
            params.return_hidden_states,
            _way_to_draw(params),
        )
        self.starts[start.row] = start
        self.texts[start.row] = array("i", start.token_ids or ())

    def of(self, rows: np.ndarray) -> np.ndarray:
        """`OPTIONS` [N] of `rows`, int64 [N]."""
        return self._options.take(rows)  # indexing copies a record field by field

    def wants_hidden_states(self, rows: np.ndarray) -> bool:
        """Whether any of `rows`, int64 [N], asks for the states that its tokens are drawn from."""
        return bool(self._options["returns_hidden_states"].take(rows).any())

    def extend(self, rows: Sequence[int], lens: Sequence[int], token_ids: Sequence[int]) -> None:
        """Rows whose texts are kept have `lens` tokens now, the last of them `token_ids`.

        Raises:
            RuntimeError: more than the last token is new.
        """
        for row, length, token in zip(rows, lens, token_ids, strict=True):
            text = self.texts[row]
            if len(text) < length:
                text.append(token)
            if len(text) != length:
                raise RuntimeError(f"row {row}: {len(text)} tokens are known of a text of {length}")


def _way_to_draw(params: SamplingParams) -> int:
    if params.temperature == 0 or (params.top_k == 0 and params.top_p == 1 and params.min_p == 0):
        return FROM_ALL
    return IN_ORDER if params.top_k == 0 and params.top_p == 1 else RANKED
