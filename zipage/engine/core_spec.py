"""What an engine core can serve, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from zipage.worker.memory_plan import MemoryPlan


@dataclass(frozen=True, slots=True)
class CoreSpec:
    """What those who hand requests to a core must know of it; they may live in another process.

    Attributes:
        memory_plan: what it reserves.
        max_model_len: longest prompt plus output, in tokens.
        vocab_size: token ids are below it.
        eos_token_ids: of the model; the tokenizer may know another.
    """

    memory_plan: MemoryPlan
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
