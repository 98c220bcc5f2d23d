"""`python -m experiments.calibrate MODEL --out FILE`: what policies must know of a model's queries beforehand.

The model answers prompts that no workload asks, and reads prompts and answers again under full KV, while statistics of
its queries are summed. `policy.options.calibration=FILE` names the file; it fits that model alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from experiments.calibration.answers import answered
from experiments.calibration.corpora import CORPORA, corpus, corpus_for
from experiments.command_line import Parser, stoppable
from experiments.errors import UsageError
from experiments.records import content_hash
from zipage import LLM, calibrate, share_model

KINDS = ("triattention", "q_filters", "expected_attention")


@stoppable
def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m experiments.calibrate", description=__doc__)
    parser.add_argument("model", help="folder, hub id or GGUF file")
    parser.add_argument("--out", required=True, help="the calibration file, .safetensors")
    parser.add_argument("--kind", choices=KINDS, default=KINDS[0], help="policy that reads it (default: %(default)s)")
    parser.add_argument(
        "--covariance", choices=("full", "pairs"), help="of expected_attention, whole or in blocks (default: full)"
    )
    corpora = f"{', '.join(CORPORA)}, or a text file with a prompt a line"
    parser.add_argument("--corpus", help=f"{corpora} (default: reasoner for models trained as the shipped one)")
    parser.add_argument("--tokens", type=int, default=200_000, help="of prompts and answers (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=2048, help="longest answer (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of prompts, answers and samples (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="as the option of the engine (default: %(default)s)")
    chosen = parser.parse_args(arguments)
    if min(chosen.tokens, chosen.max_tokens) < 1:
        parser.error(f"--tokens={chosen.tokens} --max-tokens={chosen.max_tokens}: must be at least 1")
    if chosen.covariance and chosen.kind != "expected_attention":
        parser.error(f"--covariance={chosen.covariance}: only --kind=expected_attention has one")
    options = {"full": chosen.covariance != "pairs"} if chosen.kind == "expected_attention" else {}
    name = chosen.corpus or corpus_for(chosen.model)
    try:
        conversations = corpus(name, chosen.seed)
        where = {"device": chosen.device, "dtype": chosen.dtype}
        with share_model():
            llm = LLM(chosen.model, seed=chosen.seed, **where)
            try:
                sequences = answered(llm, conversations, chosen.tokens, max_tokens=chosen.max_tokens, seed=chosen.seed)
            finally:
                llm.shutdown()
            source = {"corpus": name, "corpus_sha256": content_hash(sequences)}
            given = {"kind": chosen.kind, "source": source, "options": options, "seed": chosen.seed}
            path = calibrate(chosen.model, sequences, chosen.out, **given, **where)
    except (UsageError, ValueError, FileNotFoundError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{chosen.kind} of {chosen.model}: {path.stat().st_size:,} bytes, {json.dumps(source)}: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
