"""Eviction from the full layers of models with sliding ones and sinks: a part of `check_compressed_engine`."""

from __future__ import annotations

import tempfile
from itertools import product
from pathlib import Path

from tests.engine.compressed import UNBOUNDED, greedy, make_llm, pause_now_and_then, random_prompts, tokens_of
from tests.eviction.cases import SMALL_CHUNK, Case
from tests.tiny_models import VOCAB, save_tiny_model

FAMILIES = {
    "gpt_oss": {"num_hidden_layers": 4},
    "gemma3_text": {"num_hidden_layers": 5, "sliding_window_pattern": 3, "attn_logit_softcapping": 20.0},
}
CASES = (
    Case("zipage", SMALL_CHUNK, recent=8, protection="prompt"),
    Case("r_kv", protection="sink:4"),
    Case("lazy_eviction", {"alpha": 0.01}),
    Case("knorm"),
)
LENGTHS = (5, 17, 33, 9, 70, 100)
VARIANTS = {
    "graphs": {"async_compression": True},
    "eager": {"enforce_eager": True, "max_num_batched_tokens": 24},
    "tight": {"num_blocks": 11, "headroom": 0},
    "paused": {},
}


def check_sliding(_: Path, device: str, full: bool) -> list[dict]:
    """One row a family and policy: variants of an engine whose tokens differ from those of the requests alone, and
    whether an unbounded budget gives those of full KV.
    """
    prompts, rows = random_prompts(LENGTHS, VOCAB), []
    params = [greedy(90, seed=i) for i in range(len(prompts))]
    for family, case in product(FAMILIES, CASES if full else CASES[:3]):
        with tempfile.TemporaryDirectory() as path:
            folder = save_tiny_model(family, Path(path), **FAMILIES[family])
            common = {"device": device, "dtype": "float32", "async_compression": False}
            llm = make_llm(folder, case, 48, **common)
            alone = [
                tokens_of(llm.generate([prompt], one, use_tqdm=False))[0]
                for prompt, one in zip(prompts, params, strict=True)
            ]
            wrong, pauses = [], 0
            for name, options in VARIANTS.items():
                llm = make_llm(folder, case, 48, **common | options)
                if name == "paused":
                    pause_now_and_then(llm, share=0.3)
                if tokens_of(llm.generate(prompts, params, use_tqdm=False)) != alone:
                    wrong.append(name)
                pauses += llm.stats.pauses
            engines = (
                make_llm(folder, None, device=device, dtype="float32"),
                make_llm(folder, case, UNBOUNDED, **common),
            )
            everything, unbounded = (tokens_of(one.generate(prompts, params, use_tqdm=False)) for one in engines)
            ok = not wrong and everything == unbounded != alone and pauses > 0
            rows.append({"family": family, "case": str(case), "differ": wrong, "pauses": pauses, "ok": ok})
    return rows
