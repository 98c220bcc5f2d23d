"""Runs a model's program in the sandbox as the main program, with its stdin and stdout."""

from __future__ import annotations

import sys

sys.path.insert(0, "/box")
from program import run

if __name__ == "__main__":
    del sys.path[0]
    sys.argv = ["program.py"]
    run(type(sys)("__main__"))
