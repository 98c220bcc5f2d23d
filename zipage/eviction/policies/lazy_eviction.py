"""LazyEviction: entries that are attended to again and again, and are not overdue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from torch import Tensor

from zipage.checks import Count, Share, one_of
from zipage.eviction.event import Event
from zipage.eviction.policy import Policy
from zipage.transfer import to_device

LARGEST_EXPONENT = 80.0


@dataclass(frozen=True, kw_only=True)
class LazyEviction(Policy):
    """`S = 2 / (1 + exp(1 + (c - last) / (mri + 1e-5))) + [mri > 0] 2 / (1 + exp(mri - 1))` [L, R, H, N]. Zhang et al.,
    arXiv 2506.15969.

    c counts decode steps. An entry is attended to at step c where the maximum over the group of its attention is
    `alpha` or more: then `mri = max(mri, c - last)`, its longest wait so far, and `last = c`. A new entry has
    `last = c - 1, mri = 0`, those of the prompt `last = 0`. Exponents end at 80. The published method looks at every
    step; this one sees the last w before each compression, and what an entry waits in between is part of its wait.
    Steps before the first decode don't count, so a request that is compressed as it begins keeps the youngest. The
    published code decides per query head.

    Attributes:
        observe: "window", the only form: decode attention writes down no weights, and a step would have to.
        window: w.
        alpha: attention from which on an entry is attended to.
    """

    name: ClassVar[str] = "lazy_eviction"
    variant: ClassVar[str] = "LazyEviction, observed in windows"
    paper: ClassVar[str] = "https://arxiv.org/abs/2506.15969"
    always_labelled: ClassVar[tuple[str, ...]] = ("observe",)

    observe: Annotated[str, one_of("window", "step")] = "window"
    window: Count = 16
    alpha: Share = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("observe", self.observe != "step", "window: decode attention keeps no weights of its steps")

    @property
    def state(self) -> bool:
        return True

    @property
    def num_states(self) -> int:
        return 2

    def rank(self, event: Event) -> Tensor:
        device = event.device
        prompt = to_device(event.prompt_lens, device, np.int32)[:, None]
        behind = event.logical_lens[:, None]
        # Entries that carry no state came one after the other, the newest of them last.
        born = (behind - event.lens[:, None] + event.slots - prompt).clamp_min(0).float()[:, None]
        last, mri = event.stored_states
        last, mri = torch.where(last < 0, born, last), mri.clamp_min(0.0)
        order = torch.arange(self.window, dtype=torch.int32, device=device)
        steps = behind - prompt - self.window + 1 + order
        bits = (steps >= 1).int() << order % 32  # no bit of a step that doesn't count
        words = event.attended(self.alpha)
        for q, (step, bit) in enumerate(zip(steps.float().T[..., None, None], bits.T[..., None, None], strict=True)):
            seen = torch.where((words[q // 32] & bit).bool(), step, last)
            mri = torch.maximum(mri, seen - last)
            last = seen
        event.store(last, mri)
        now = (behind - prompt).double()[:, None]
        overdue = 1 + (now - last) / (mri.double() + 1e-5)
        rare = mri.double() - 1
        scores = 2 / (1 + overdue.clamp_max(LARGEST_EXPONENT).exp())
        return scores + (mri > 0) * 2 / (1 + rare.clamp_max(LARGEST_EXPONENT).exp())
