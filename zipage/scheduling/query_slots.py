"""Query slots: who keeps the latest queries that its next compression will read."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from zipage.scheduling.request import Request, Status
from zipage.scheduling.triggers import Trigger


class _Survey(NamedTuple):
    """Who decodes at one time.

    Attributes:
        waiting: those who have come to their window and lack a slot, oldest first.
        able: those who hold a slot and have not come to their window, the one with most entries to go to its next
            compression last.
    """

    waiting: deque[Request]
    able: list[Request]


class QuerySlots:
    """Hands out the places where the cache keeps the latest `w` queries of a request.

    Args:
        num_slots: how many there are.
        trigger: says whose queries the next compression reads.
        constrained: every bounded request needs one, whether or not its policy reads queries.
    """

    def __init__(self, num_slots: int, trigger: Trigger, constrained: bool = False) -> None:
        self.num_slots = num_slots
        self.trigger = trigger
        self.constrained = constrained
        self._free = list(range(num_slots - 1, -1, -1))
        self._survey: _Survey | None = None
        self._has_returned = False
        """A slot came back since they were assigned; who enters meanwhile is offered one."""

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_slots - len(self._free)

    def wanted_by(self, request: Request) -> bool:
        """Whether the request holds a slot as soon as there is one."""
        rule = request.rule
        return rule is not None and (rule.window > 0 or self.constrained)

    def assign(self, running: Iterable[Request]) -> None:
        """Give free slots to those that lack one, in the order given. A step begins with it."""
        self._survey = None
        if not self._has_returned:  # none is free, or nobody lacks one
            return
        for request in running:
            if not self._free:
                break
            self.offer(request)
        self._has_returned = False

    def offer(self, request: Request) -> None:
        """Give the request a slot if one is free and it lacks and wants it. Its queries are kept from now on."""
        if self._free and request.query_slot < 0 and self.wanted_by(request):
            request.query_slot = self._free.pop()
            request.has_held_slot = True
            request.queries_from = request.num_computed

    def can_serve(self, request: Request, running: Sequence[Request]) -> bool:
        """Whether a request that needs a slot can have one: a free one, or that of a request that can do without."""
        self._survey = None
        return bool(self._free) or self._lender(request, running) is not None

    def lend(self, request: Request, running: Sequence[Request]) -> None:
        """If none is free, hand the request the slot of one that can do without, if there is one."""
        if not self._free and (lender := self._lender(request, running)):
            self.take_back(lender)
            self.offer(request)

    def give_back(self, request: Request, running: Sequence[Request]) -> None:
        """A paused request returns: a slot for the queries that were saved with its entries, if they were."""
        if request.queries_saved:
            if not self._free:
                self.take_back(self._lender(request, running))
            request.query_slot = self._free.pop()

    def _lender(self, request: Request, running: Sequence[Request]) -> Request | None:
        """Of those who hold a slot and have not come to their window, the one with most entries to go to its
        next compression. None while a request that is older than `request` waits for a slot.
        """
        if self.constrained:
            return None
        if self._survey is None:
            # All that look for a slot in a step share it, lest hundreds go through hundreds.
            self._survey = self._look(running)
        waiting, able = self._survey
        while waiting and (waiting[0].query_slot >= 0 or not _decodes(waiting[0])):
            waiting.popleft()
        if waiting and waiting[0].number < request.number:
            return None
        while able and (able[-1].query_slot < 0 or not _decodes(able[-1])):
            able.pop()
        return able[-1] if able else None

    def _look(self, running: Iterable[Request]) -> _Survey:
        waiting, able = deque(), []
        for request in running:
            if not self.wanted_by(request) or not _decodes(request):
                continue
            if self.trigger.has_come_to_window(request):
                if request.query_slot < 0:
                    waiting.append(request)
            elif request.query_slot >= 0:
                able.append(request)
        # Stable: of equals, the oldest is last.
        able.reverse()
        able.sort(key=lambda request: self.trigger.most_entries(request) - request.cache_len)
        return _Survey(waiting, able)

    def take_back(self, request: Request) -> None:
        """The request stops running. Its slot, if any, is free."""
        if request.query_slot >= 0:
            self._free.append(request.query_slot)
            self._has_returned = True
            request.query_slot = -1

    def check_integrity(self, running: Iterable[Request]) -> None:
        """Raises RuntimeError if a slot is lost or held twice."""
        held = [request.query_slot for request in running if request.query_slot >= 0]
        if sorted(held + self._free) != list(range(self.num_slots)):
            raise RuntimeError("query slots leaked or were handed out twice")


def _decodes(request: Request) -> bool:
    is_one_behind = len(request.token_ids) - request.num_computed == 1
    return is_one_behind and request.status is Status.RUNNING and not request.has_all_tokens
