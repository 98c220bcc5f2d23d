"""`python -m experiments.serving.guard COMMAND...`: run a server that ends with the process that wanted it.

The server knows nothing of lifelines, so this one watches ours (`experiments.running.lifeline`). It hands on SIGINT and
SIGTERM, and ends what the server leaves behind in its process group.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from experiments.running import lifeline

GRACE = 20.0
"""Seconds that the server has to end in order."""


def main() -> int:
    lifeline.watch()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    server = subprocess.Popen(sys.argv[1:])
    try:
        code = server.wait()
    except KeyboardInterrupt:
        server.send_signal(signal.SIGINT)
        try:
            code = server.wait(GRACE)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            server.kill()
            code = server.wait()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
