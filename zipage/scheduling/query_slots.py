"""Query slots: who keeps the latest queries that its next compression will read."""

from __future__ import annotations

from collections.abc import Iterable

from zipage.scheduling.request import Request


class QuerySlots:
    """Hands out the places where the cache keeps the latest `w` queries of a request.

    Args:
        num_slots: how many there are.
        constrained: every bounded request needs one, whether or not its policy reads queries.
    """

    def __init__(self, num_slots: int, constrained: bool = False) -> None:
        self.num_slots = num_slots
        self.constrained = constrained
        self._free = list(range(num_slots - 1, -1, -1))

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
        """Give free slots to those that lack one, in the order given."""
        for request in running:
            if not self._free:
                return
            self.offer(request)

    def offer(self, request: Request) -> None:
        """Give the request a slot if one is free and it lacks and wants it. Its queries are kept from now on."""
        if self._free and request.query_slot < 0 and self.wanted_by(request):
            request.query_slot = self._free.pop()
            request.has_held_slot = True
            request.queries_from = request.num_computed

    def give_back(self, request: Request) -> None:
        """A paused request returns: a slot for the queries that were saved with its entries, if they were."""
        if request.queries_saved:
            request.query_slot = self._free.pop()

    def take_back(self, request: Request) -> None:
        """The request stops running. Its slot, if any, is free."""
        if request.query_slot >= 0:
            self._free.append(request.query_slot)
            request.query_slot = -1

    def check_integrity(self, running: Iterable[Request]) -> None:
        """Raises RuntimeError if a slot is lost or held twice."""
        held = [request.query_slot for request in running if request.query_slot >= 0]
        if sorted(held + self._free) != list(range(self.num_slots)):
            raise RuntimeError("query slots leaked or were handed out twice")


def has_window(request: Request) -> bool:
    """Whether all queries that a compression of the request reads now are kept."""
    window = request.rule.window
    if not window:
        return True
    return request.query_slot >= 0 and request.queries_from <= request.num_computed - window
