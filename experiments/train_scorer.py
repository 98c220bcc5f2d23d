"""`python -m experiments.train_scorer MODEL --out FILE`: a linear scorer of KV entries, for policy `kvzap`.

The model answers prompts that no workload asks. Then it reads prompts and answers again under full KV, and a ridge
regression in each layer learns from an entry's hidden state how much later queries attend to it.
`policy.options.calibration=FILE` names the file; it fits that model alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.calibration.command import add_options, ask, check
from experiments.command_line import Parser, stoppable
from experiments.errors import UsageError
from zipage import share_model, train_scorer

SEPARATOR = "\n\nRepeat the text above.\n\n"


@stoppable
def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m experiments.train_scorer", description=__doc__)
    add_options(parser, tokens=100_000)
    parser.add_argument(
        "--target",
        choices=("repeat", "future"),
        default="repeat",
        help="queries that count: those of the text read again, or the next 512 of the answer (default: %(default)s)",
    )
    parser.add_argument("--ridge", type=float, default=1.0, help="penalty on squared weights (default: %(default)s)")
    chosen = parser.parse_args(arguments)
    check(parser, chosen)
    if not chosen.ridge > 0:
        parser.error(f"--ridge={chosen.ridge}: must be above 0")
    try:
        with share_model():
            texts, source, separator = ask(chosen, "kvzap", SEPARATOR)
            source |= {"tokens": sum(len(tokens) for tokens, _ in texts)}
            given = {"target": chosen.target, "separator": separator, "ridge": chosen.ridge, "seed": chosen.seed}
            where = {"device": chosen.device, "dtype": chosen.dtype, "use_tqdm": True}
            r2 = train_scorer(chosen.model, texts, chosen.out, source=source, **given, **where)
    except (UsageError, ValueError, FileNotFoundError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for layer, value in enumerate(r2):
        print(f"layer {layer}: held-out R^2 {value:.3f}")
    size = Path(chosen.out).stat().st_size
    print(f"kvzap ({chosen.target}) of {chosen.model}: {size:,} bytes, {json.dumps(source)}: {chosen.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
