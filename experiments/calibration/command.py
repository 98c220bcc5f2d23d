"""What the commands that make calibration files share: their options, and the model's answers."""

from __future__ import annotations

import argparse

from experiments.calibration.answers import answered
from experiments.calibration.corpora import CORPORA, corpus, corpus_for
from experiments.command_line import Parser
from experiments.records import content_hash
from zipage import LLM, load_to_calibrate


def add_options(parser: Parser, tokens: int) -> None:
    parser.add_argument("model", help="folder, hub id or GGUF file")
    parser.add_argument("--out", required=True, help="the file to write, .safetensors")
    corpora = f"{', '.join(CORPORA)}, or a text file with a prompt a line"
    parser.add_argument("--corpus", help=f"{corpora} (default: reasoner for models trained as the shipped one)")
    parser.add_argument("--tokens", type=int, default=tokens, help="of prompts and answers (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=2048, help="longest answer (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of prompts, answers and samples (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="as the option of the engine (default: %(default)s)")
    parser.add_argument(
        "--kv-cache-memory-bytes", type=int, metavar="N", help="likewise, where others share the GPU (default: most)"
    )


def check(parser: Parser, chosen: argparse.Namespace) -> None:
    if min(chosen.tokens, chosen.max_tokens) < 1:
        parser.error(f"--tokens={chosen.tokens} --max-tokens={chosen.max_tokens}: must be at least 1")


def ask(
    chosen: argparse.Namespace, kind: str, separator: str = ""
) -> tuple[list[tuple[list[int], int]], dict, list[int]]:
    """Prompts and the model's answers to them, if a file of this kind can be made for it.

    Returns:
        Token ids of each text and how many of them are its prompt; where they come from, for the file's header; and the
        ids of `separator`.
    """
    name = chosen.corpus or corpus_for(chosen.model)
    conversations = corpus(name, chosen.seed)
    memory = {"kv_cache_memory_bytes": chosen.kv_cache_memory_bytes}
    load_to_calibrate(chosen.model, kind, device=chosen.device, dtype=chosen.dtype, seed=chosen.seed)
    llm = LLM(chosen.model, seed=chosen.seed, device=chosen.device, dtype=chosen.dtype, **memory)
    try:
        texts = answered(llm, conversations, chosen.tokens, max_tokens=chosen.max_tokens, seed=chosen.seed)
        ids = llm.get_tokenizer().encode(separator, add_special_tokens=False)
    finally:
        llm.shutdown()
    return texts, {"corpus": name, "corpus_sha256": content_hash([tokens for tokens, _ in texts])}, list(ids)
