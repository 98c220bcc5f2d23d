"""What attention may be beside a softmax over all entries."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from kernels.layout import fail


@dataclass(frozen=True, eq=False)
class AttentionForm:
    """Of one layer. The default is plain attention, for which kernels compile to what they are without forms.

    Attributes:
        window: latest entries that a query sees, its own included, by their places in the cache; None: all.
        soft_cap: c, where scores x become c * tanh(x / c) (Gemma 2, arXiv:2408.00118); None: they stay.
        sinks: float [Hq], contiguous, a score of each query head that takes its share of the softmax and adds no value
            (gpt-oss, arXiv:2508.10925); None: there are none.
    """

    window: int | None = None
    soft_cap: float | None = None
    sinks: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        return self.window is None and self.soft_cap is None and self.sinks is None

    def of_heads(self, heads: slice) -> AttentionForm:
        """The same of some query heads."""
        return self if self.sinks is None else replace(self, sinks=self.sinks[heads])


PLAIN = AttentionForm()


def check_form(form: AttentionForm, q: Tensor) -> None:
    """Check a form for queries [T, Hq, d]. Raises ValueError naming the field, its value and the remedy."""
    if form.window is not None and (not isinstance(form.window, int) or form.window < 1):
        fail("window", "value", form.window, "give an int from 1, or None")
    if form.soft_cap is not None and not form.soft_cap > 0:
        fail("soft_cap", "value", form.soft_cap, "give a number above 0, or None")
    if form.sinks is None:
        return
    if form.sinks.shape != q.shape[1:2] or not form.sinks.is_floating_point():
        fail("sinks", "shape and dtype", (tuple(form.sinks.shape), form.sinks.dtype), f"give floats [{q.shape[1]}]")
    if not form.sinks.is_contiguous():
        fail("sinks", "stride", form.sinks.stride(), "make it contiguous")
    if form.sinks.device != q.device:
        fail("sinks", "device", form.sinks.device, f"move it to {q.device}, where q is")
