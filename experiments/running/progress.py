"""The line at the foot of a terminal while a sweep runs; nothing where the output is a file."""

from __future__ import annotations

import sys
from datetime import timedelta

from tqdm import tqdm


class Progress:
    """A bar over the seconds that a sweep will take, the running arm included.

    Where no run of any kind has been timed yet, the bar counts arms instead.
    """

    def __init__(self, arms: int) -> None:
        self._bar = tqdm(
            total=arms, file=sys.stdout, disable=not sys.stdout.isatty(), leave=False, dynamic_ncols=True,
            bar_format="{desc} |{bar}|",
        )  # fmt: skip

    def show(self, arm: str, done: int, of: int, spent: float, left: float | None) -> None:
        """Draw the bar anew.

        Args:
            arm: what runs now.
            spent: seconds since the sweep began.
            left: seconds that this arm and those after it will still take; None where that is unknown.
        """
        known = left is not None
        self._bar.total = max(spent + left, 1e-9) if known else of
        self._bar.n = min(spent if known else done, self._bar.total)
        time = f"{clock(left)} left" if known else f"{clock(spent)}, time left unknown"
        self._bar.set_description_str(f"{arm[:60]}, {time}", refresh=False)
        self._bar.refresh()

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._bar.clear()
        print(line, flush=True)

    def close(self) -> None:
        self._bar.close()


def clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
