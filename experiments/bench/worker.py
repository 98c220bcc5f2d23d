"""`python -m experiments.bench.worker TASK.json ROW.json`: one arm in a process of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from experiments.backends import BACKENDS
from experiments.bench.loads import Arm
from experiments.bench.measure import measure
from experiments.errors import one_line
from experiments.running import lifeline


def main() -> int:
    lifeline.watch()
    source, target = map(Path, sys.argv[1:])
    task = json.loads(source.read_text(encoding="utf-8"))
    arm = Arm(**task["arm"])
    try:
        row = measure(arm, BACKENDS[arm.backend], task["ceilings"], task["used_before"])
    except Exception as error:
        print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
        return 1
    target.write_text(json.dumps(row), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
