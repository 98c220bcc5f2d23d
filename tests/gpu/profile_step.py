"""Where a decode step's time goes on a GPU: by kernel, and each matrix product against the bytes of its weight.

    python -m tests.gpu.profile_step --out FILE --commit $(git rev-parse HEAD) [--cases full:48x1800,zipage:128x576]

A case is POLICY:REQUESTSxENTRIES of a Qwen3-8B-shaped model with random weights; the lengths are spread evenly from
nothing to twice the entries unless the case ends in `=`. Steps are replayed CUDA graphs with their logits, without
sampling; `step_ms` is timed without the profiler, over steps one after the other.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from tests.gpu.check_compressed_engine import versions
from tests.gpu.compression_times import QWEN3_8B
from zipage import LLM
from zipage.worker.cuda_graph import batch_sizes
from zipage.worker.token_batch import PromptChunks, TokenBatch

STEPS = 20
WEIGHTS = {"qkv": (6144, 4096), "output": (4096, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)}
ROWS = (16, 48, 64, 128, 256)
GROUPS = {
    "attention": ("_attend", "_combine"),
    "cut": ("_cut",),
    "norm": ("_norm_row",),
    "rope": ("_rotate",),
    "store": ("_store",),
    "gate": ("_gate",),
    "matmul": ("_few_rows", "gemm", "nvjet", "cutlass", "cublas", "splitK", "gemv"),
}


def group_of(kernel: str) -> str:
    lowered = kernel.lower()
    for name, parts in GROUPS.items():
        if any(part.lower() in lowered for part in parts):
            return name
    return "other"


def profile_case(folder: str, case: str) -> dict:
    policy, size = case.split(":")
    equal = size.endswith("=")
    count, entries = map(int, size.rstrip("=").split("x"))
    evict = {} if policy == "full" else {"policy": policy, "budget_tokens": 2048}
    llm = LLM(
        folder, load_format="dummy", skip_tokenizer_init=True, max_num_seqs=count, max_model_len=4 * entries + 256,
        gpu_memory_utilization=0.9, enable_prefix_caching=False, **evict,
    )  # fmt: skip
    try:
        return {"case": case} | _profile(llm, count, entries, equal)
    finally:
        llm.shutdown()


@torch.inference_mode()
def _profile(llm: LLM, count: int, entries: int, equal: bool) -> dict:
    """Times the graph of a batch alone, with block tables and lengths put in its inputs."""
    runner, cache = llm._core.runner, llm._core.runner.cache
    cache.k.normal_()
    cache.v.normal_()
    lens = torch.full((count,), entries) if equal else torch.linspace(1, 2 * entries, count)
    lens = lens.long().numpy()
    tables, size = runner._tables.device, cache.block_size
    needed = -(-lens // size)
    if needed.sum() > cache.k.shape[1]:
        raise ValueError(f"{count}x{entries}: needs {needed.sum()} blocks of {cache.k.shape[1]}; take fewer entries")
    shuffled = torch.randperm(cache.k.shape[1]).int()
    rows = list(shuffled[: needed.sum()].split(needed.tolist()))
    for row, ids in enumerate(rows):
        tables[row, : len(ids)] = ids.to(tables.device)
    numbers = torch.arange(count).numpy()
    slots = np.array([int(ids[0]) * size for ids in rows])
    batch = TokenBatch(numbers % 100, numbers * 0 - 1, lens - 1, slots, numbers * 0 - 1, numbers, lens)
    graphs, none = runner._graphs, PromptChunks(numbers[:0], numbers[:0], np.array([count]))

    def step() -> torch.Tensor:
        return runner.decoder.logits(graphs.run(batch, none))

    step()
    times = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(STEPS):
            step()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / STEPS)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    micros, launches, names = defaultdict(float), Counter(), defaultdict(float)
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            elapsed = event.time_range.elapsed_us() / STEPS
            micros[group_of(event.name)] += elapsed
            launches[group_of(event.name)] += 1
            names[event.name] += elapsed
    kv_bytes = int(lens.sum()) * cache.k[:, 0, :, 0].numel() * 2 * cache.k.itemsize
    top = sorted(names.items(), key=lambda item: -item[1])[:12]
    return {
        "rows": count,
        "graph": next(size for size in batch_sizes(graphs.most) if size >= count),
        "kv_bytes": kv_bytes,
        "step_ms": statistics.median(times),
        "attention_tb_per_second": kv_bytes / micros["attention"] / 1e6,
        "us": dict(micros),
        "launches": {name: n / STEPS for name, n in launches.items()},
        "kernels_us": dict(top),
    }


@torch.inference_mode()
def matmuls() -> list[dict]:
    """Each product of a layer from weights that no cache holds, as a graph over copies of 1 GB together."""
    rows = []
    for name, (out, width) in WEIGHTS.items():
        copies = max(2, (1 << 30) // (2 * out * width))
        weights = [torch.randn(out, width, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
        for count in ROWS:
            x = torch.randn(count, width, device="cuda", dtype=torch.bfloat16)
            for library in ("cublas", "cublaslt"):
                torch.backends.cuda.preferred_blas_library(library)
                for weight in weights[:2]:
                    F.linear(x, weight)
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    for weight in weights:
                        F.linear(x, weight)
                times = []
                for _ in range(12):
                    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    begin.record()
                    graph.replay()
                    end.record()
                    end.synchronize()
                    times.append(1e3 * begin.elapsed_time(end) / copies)
                micros = statistics.median(times)
                moved = 2 * (out * width + count * (out + width))
                row = {"weight": name, "rows": count, "library": library, "us": micros}
                rows.append(row | {"tb_per_second": moved / micros / 1e6})
                del graph
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--cases", default="full:48x1800,full:16x2600,full:256x1024=,zipage:128x576=")
    parser.add_argument("--no-matmuls", action="store_true")
    args = parser.parse_args()
    record = {
        "command": f"python -m tests.gpu.profile_step --cases {args.cases}",
        "commit": args.commit,
        **versions(),
        "cases": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(QWEN3_8B))
        for case in args.cases.split(","):
            record["cases"].append(profile_case(folder, case))
            gc.collect()
            torch.cuda.empty_cache()
            row = record["cases"][-1]
            parts = ", ".join(f"{name} {us / 1e3:.2f}" for name, us in sorted(row["us"].items(), key=lambda x: -x[1]))
            print(f"{case}: {row['step_ms']:.2f} ms; {parts}; attention {row['attention_tb_per_second']:.2f} TB/s")
            args.out.write_text(json.dumps(record, indent=1) + "\n")
    if not args.no_matmuls:
        record["matmuls"] = matmuls()
        for row in record["matmuls"]:
            print(
                f"{row['weight']:8} {row['rows']:4} {row['library']:9} {row['us']:7.1f} us {row['tb_per_second']:.2f}"
            )
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
