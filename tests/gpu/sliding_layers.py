"""Models with sliding layers, whose windows have blocks of their own: a part of `check_compressed_engine`."""

from __future__ import annotations

import tempfile
from itertools import product
from pathlib import Path
from unittest.mock import patch

from tests.engine.compressed import UNBOUNDED, greedy, make_llm, pause_now_and_then, random_prompts, tokens_of
from tests.eviction.cases import SMALL_CHUNK, Case
from tests.tiny_models import VOCAB, save_tiny_model
from zipage.scheduling import swap_space
from zipage.sliding_table import most_blocks

FAMILIES = {
    "gpt_oss": {"num_hidden_layers": 4},
    "gemma3_text": {"num_hidden_layers": 5, "sliding_window_pattern": 3, "attn_logit_softcapping": 20.0},
}
CASES = (
    Case("zipage", SMALL_CHUNK, recent=8, protection="prompt"),
    Case("r_kv", recent=8, protection="sink:4"),
    Case("lazy_eviction", {"alpha": 0.01}),
    Case("knorm"),
    Case("page_random", {"page_size": 16}),
)
LENGTHS = (5, 17, 33, 9, 70, 100)
VARIANTS = {
    "graphs": {"async_compression": True},
    "eager": {"enforce_eager": True, "max_num_batched_tokens": 24},
    "tight": {"num_blocks": 11, "headroom": 0},
    "paused": {},
    "few windows": {"max_num_seqs": 3, "async_scheduling": True},
}
BUDGETS = {"r_kv": 16}
"""By policy: one that is less than the window."""
WINDOW_VARIANTS = {
    "eager": {"enforce_eager": True},
    "overlapped": {"async_scheduling": True},
    "chunks": {"max_num_batched_tokens": 24, "async_scheduling": True},
    "tight": {"num_blocks": 22, "headroom": 0},
    "copied": {"num_blocks": 22, "headroom": 0, "swap_space": 0.1, "async_scheduling": True},
    "paused": {"async_scheduling": True},
    "no prefixes": {"enable_prefix_caching": False},
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
            budget = BUDGETS.get(case.policy, 48)
            llm = make_llm(folder, case, budget, **common)
            alone = [
                tokens_of(llm.generate([prompt], one, use_tqdm=False))[0]
                for prompt, one in zip(prompts, params, strict=True)
            ]
            wrong, pauses = [], 0
            for name, options in VARIANTS.items():
                llm = make_llm(folder, case, budget, **common | options)
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
    return rows + [check_windows(family, device, size) for family in FAMILIES for size in (16, 64)]


def check_windows(family: str, device: str, block_size: int) -> dict:
    """Full KV: variants whose tokens differ from those of requests alone, and whether a request that decodes holds its
    window and no more. Debug mode fills blocks with NaN once they are given back.
    """
    prompts, params = random_prompts((5, 17, 100, 33, 70, 9), VOCAB), greedy(200)
    wrong, moved = [], 0
    with tempfile.TemporaryDirectory() as path, patch.object(swap_space, "OPERATIONS_PER_BYTE", 0):
        folder = save_tiny_model(family, Path(path), **FAMILIES[family])
        common = {"device": device, "dtype": "float32", "block_size": block_size}
        llm = make_llm(folder, None, **common, async_scheduling=False)
        outputs = [llm.generate([prompt], params, use_tqdm=False)[0] for prompt in prompts]
        most = most_blocks(llm._core.scheduler.sliding.window, block_size)
        held = [output.metrics.peak_sliding_blocks for output in outputs[:2]]
        for name, options in WINDOW_VARIANTS.items():
            if "num_blocks" in options:
                options = options | {"num_blocks": options["num_blocks"] * 16 // block_size}
            llm = make_llm(folder, None, **common | options)
            if name == "paused":
                pause_now_and_then(llm, share=0.1)
            for _ in range(2):  # once more, where prefixes were left
                if tokens_of(llm.generate(prompts, params, use_tqdm=False)) != tokens_of(outputs):
                    wrong.append(name)
            moved += llm.stats.pauses + llm.stats.preemptions
            if llm.stats.sliding_blocks_used:
                wrong.append(f"{name}: blocks are left")
    ok = not wrong and moved > 0 and max(held) == most
    return {"family": family, "case": f"full KV, blocks of {block_size}", "differ": wrong, "moved": moved, "ok": ok}
