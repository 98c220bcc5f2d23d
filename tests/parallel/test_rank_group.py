"""Who failed first is named."""

from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest

from tests.child_processes import wait_for_end
from zipage.parallel import messages as m
from zipage.parallel import rank_group
from zipage.parallel.rank_group import RankGroup


@contextmanager
def ranks(monkeypatch: pytest.MonkeyPatch, target: str, *delays: float) -> Iterator[RankGroup]:
    """Processes that run a function of `tests.child_processes`."""
    monkeypatch.setattr(rank_group, "TARGET", f"tests.child_processes:{target}")
    starts = [SimpleNamespace(rank=rank, delay=delay) for rank, delay in enumerate(delays)]
    group = RankGroup(starts, TemporaryDirectory())
    group.is_ready = True
    try:
        yield group
    finally:
        group.close(grace=0)


@pytest.mark.parametrize("ask", [lambda group: group.tell(m.TellMisranked()), lambda group: group.take(0, m.Done)])
def test_the_rank_that_failed_first_is_named_with_its_traceback(monkeypatch, ask):
    """The others fail because of it, and may be heard first, or only found to have ended."""
    with ranks(monkeypatch, "fail_after", 0.3, 0.0) as group:
        wait_for_end([child.pid for child in group.children])
        with pytest.raises(RuntimeError, match=r"^rank 1 failed: ArithmeticError: after 0.0 seconds$") as caught:
            ask(group)
        assert isinstance(caught.value.__cause__, ArithmeticError)
        assert "in fail_after" in str(caught.value.__cause__.__cause__)
        with pytest.raises(RuntimeError, match=r"^rank 1 failed: ArithmeticError"):
            group.tell(m.TellMisranked())
