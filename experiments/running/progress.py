"""The line at the foot of a terminal while a sweep runs; nothing where the output is a file."""

from __future__ import annotations

import os
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
        room = max(10, min(60, (columns() or 80) - len(time) - 10))
        self._bar.set_description_str(f"{arm if len(arm) <= room else f'{arm[: room - 3]}...'}, {time}", refresh=False)
        self._bar.refresh()

    def say(self, line: str, *, error: bool = False) -> None:
        """Print a line above the bar, to the standard error where it is one."""
        self._bar.clear()
        print(line, file=sys.stderr if error else sys.stdout, flush=True)

    def close(self) -> None:
        self._bar.close()


def columns() -> int | None:
    """Width of the terminal that the output goes to; None: it goes to a file."""
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or None
    except (OSError, ValueError):
        return None


def clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
