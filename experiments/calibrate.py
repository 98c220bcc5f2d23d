"""`python -m experiments.calibrate MODEL --out FILE`: what policies must know of a model's queries beforehand.

The model answers prompts that no workload asks, and reads prompts and answers again under full KV, while statistics of
its queries are summed. `policy.options.calibration=FILE` names the file; it fits that model alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from experiments.calibration.command import add_options, ask, check
from experiments.command_line import Parser, stoppable
from experiments.errors import UsageError
from zipage import calibrate, share_model

KINDS = ("triattention", "q_filters", "expected_attention")


@stoppable
def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m experiments.calibrate", description=__doc__)
    add_options(parser, tokens=200_000)
    parser.add_argument("--kind", choices=KINDS, default=KINDS[0], help="policy that reads it (default: %(default)s)")
    parser.add_argument(
        "--covariance", choices=("full", "pairs"), help="of expected_attention, whole or in blocks (default: full)"
    )
    chosen = parser.parse_args(arguments)
    check(parser, chosen)
    if chosen.covariance and chosen.kind != "expected_attention":
        parser.error(f"--covariance={chosen.covariance}: only --kind=expected_attention has one")
    options = {"full": chosen.covariance != "pairs"} if chosen.kind == "expected_attention" else {}
    try:
        with share_model():
            texts, source, _ = ask(chosen, chosen.kind)
            given = {"kind": chosen.kind, "source": source, "options": options, "seed": chosen.seed}
            where = {"device": chosen.device, "dtype": chosen.dtype, "use_tqdm": True}
            path = calibrate(chosen.model, [tokens for tokens, _ in texts], chosen.out, **given, **where)
    except (UsageError, ValueError, FileNotFoundError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{chosen.kind} of {chosen.model}: {path.stat().st_size:,} bytes, {json.dumps(source)}: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
