"""`python -m experiments.bench RECORD...`: the tables of benchmarks in Markdown, and their picture."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from experiments import records
from experiments.bench.pictures import picture
from experiments.bench.rates import highest
from experiments.bench.tables import markdown
from experiments.command_line import Parser, stoppable
from experiments.errors import UsageError


@stoppable
def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m experiments.bench", description="Show finished benchmarks.")
    parser.add_argument("records", nargs="+", help="folders of scenario=kernels, engine_bench or serve_bench")
    parser.add_argument(
        "--picture",
        metavar="FILE",
        help="draw one record: the share of the roofline, or tails and goodput by rate (PNG, SVG or PDF)",
    )
    parser.add_argument("--against", metavar="ARM", help="add ratios of engines to this one, with 95 %% intervals")
    options = parser.parse_args(arguments)
    try:
        if options.picture and len(options.records) > 1:
            raise UsageError(f"--picture {options.picture}: draws one record; give one")
        for record in options.records:
            rows = records.load_rows(record)
            print(markdown(rows))
            if options.against:
                from experiments.bench.ratios import against
                from experiments.reporting.tables import to_markdown

                compared = highest(rows, options.against) if "slo" in rows else against(rows, options.against)
                print("\n" + to_markdown(compared))
            if options.picture:
                picture(rows).savefig(options.picture, dpi=150)
    except (UsageError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
