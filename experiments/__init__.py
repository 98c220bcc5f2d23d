import sys
from types import TracebackType

import zipage  # noqa: F401  (before torch, whichever module is run: see `zipage/threads.py`)


def _say_interrupted(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None, otherwise=sys.excepthook
) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("error: interrupted: nothing was run", file=sys.stderr)
    else:
        otherwise(kind, error, trace)


if sys.argv[:1] == ["-m"]:  # Python is still importing one of our commands, which takes a second or two
    sys.excepthook = _say_interrupted
