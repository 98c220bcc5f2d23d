"""`python -m experiments.train_reasoner`: train the reasoner that the project ships, from scratch, on one GPU."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from experiments.command_line import Parser, stoppable
from experiments.paths import REASONER
from experiments.reasoner.training import TrainingOptions, train


@stoppable
def main(arguments: Sequence[str] | None = None) -> int:
    import torch

    parser = Parser(prog="python -m experiments.train_reasoner", description=__doc__)
    parser.add_argument("--out", type=Path, default=REASONER, help="folder of the model (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    for option in fields(TrainingOptions):
        kind = type(option.default)
        parser.add_argument(f"--{option.name.replace('_', '-')}", type=kind, default=option.default, help="%(default)s")
    chosen = vars(parser.parse_args(arguments))
    out, device = chosen.pop("out"), chosen.pop("device")
    try:
        record = train(TrainingOptions(**chosen), out, device)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    last = record["curve"][-1]
    print(f"{record['parameters']:,} parameters, {last['tokens']:,} tokens in {last['seconds']:.0f} s: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
