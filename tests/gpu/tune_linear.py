"""Choose the tiles of `kernels.linear`: each shape's products as they follow a norm in a graph, against cuBLAS.

    python -m tests.gpu.tune_linear --out RECORD --table kernels/linear_tiles.json --commit $(git rev-parse HEAD)

Shapes are those of `MODELS`, whole and cut for two and four ranks. Weights come from memory, not from a cache. A tile
enters the table where norm and product together take no longer than with cuBLAS. `--part I/N` takes every N-th
shape; `--merge RECORDS` joins the parts.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.add_rms_norm import add_rms_norm
from kernels.linear_tiles import Tile, padded_rows
from kernels.linear_triton import PREFETCH, linear_triton
from tests.gpu.check_compressed_engine import versions

MODELS = {
    "Qwen3-0.6B": (1024, 16, 8, 128, 3072),
    "Qwen3-1.7B": (2048, 16, 8, 128, 6144),
    "Qwen3-4B": (2560, 32, 8, 128, 9728),
    "Qwen3-8B": (4096, 32, 8, 128, 12288),
    "Qwen3-14B": (5120, 40, 8, 128, 17408),
    "Qwen3-32B": (5120, 64, 8, 128, 25600),
    "Qwen3-30B-A3B": (2048, 32, 4, 128, None),
    "Qwen2.5-1.5B": (1536, 12, 2, 128, 8960),
    "Qwen2.5-7B": (3584, 28, 4, 128, 18944),
    "Qwen2.5-14B": (5120, 40, 8, 128, 13824),
    "Qwen2.5-32B": (5120, 40, 8, 128, 27648),
    "Llama-3.1-8B": (4096, 32, 8, 128, 14336),
    "Phi-4": (5120, 40, 10, 128, 17920),
    "gpt-oss-20b": (2880, 64, 8, 64, None),
}
"""Width, heads, KV heads, head dim and the inner width of the MLP; None: experts."""

TILES = (
    *(Tile(16, 256, stages) for stages in (4, 6)),
    *(Tile(32, depth, stages) for depth, stages in ((128, 6), (256, 4), (256, 6))),
    *(Tile(64, depth, stages) for depth, stages in ((64, 4), (64, 6), (128, 3), (128, 6), (256, 4))),
    *(Tile(128, depth, stages) for depth, stages in ((64, 4), (128, 3))),
)
ROWS = (16, 32, 64)
SHARED_BYTES = 227 * 1024
READ_BYTES = 400e6
"""Of weights, one after the other, so that none is still in the cache when it comes again."""


def shapes() -> list[tuple[int, int]]:
    """Outputs and width of every product."""
    found = {}
    for width, heads, kv_heads, dim, inner in MODELS.values():
        for ranks in (1, 2, 4):
            if kv_heads % ranks:
                continue
            found[(heads + 2 * kv_heads) * dim // ranks, width] = None
            found[width, heads * dim // ranks] = None
            if inner is not None:
                found[2 * inner // ranks, width] = None
                found[width, inner // ranks] = None
    return list(found)


def micros(product: Callable[[int], Tensor], copies: int, rows: int) -> float:
    """Of a norm and a product, the median of some replays of a graph of them."""
    hidden = torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16)
    weight = torch.ones(4096, device="cuda", dtype=torch.bfloat16)

    def run() -> None:
        for index in range(copies):
            add_rms_norm(hidden, None, weight, 1e-6)
            product(index)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(7):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / copies)
    return statistics.median(times)


def suits(tile: Tile, rows: int, outputs: int, width: int) -> bool:
    programs = outputs // tile.outputs
    return (
        outputs % tile.outputs == 0
        and width % tile.depth == 0
        and width >= PREFETCH
        and 16 <= programs <= 4096
        and 2 * tile.stages * tile.depth * (rows + tile.outputs) <= SHARED_BYTES
    )


@torch.inference_mode()
def tune(outputs: int, width: int) -> list[dict]:
    """A row for each number of rows: cuBLAS, the tiles in order of their time."""
    copies = max(4, min(64, int(READ_BYTES // (2 * outputs * width))))
    weights = [torch.randn(outputs, width, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    found = []
    for rows in ROWS:
        x = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
        expected = F.linear(x.float(), weights[0].float())
        libraries = {}
        for library in ("cublas", "cublaslt"):
            torch.backends.cuda.preferred_blas_library(library)
            with patch("kernels.add_rms_norm_triton.dependent_launch", lambda x: {"DEPENDENT": False}):
                libraries[library] = micros(lambda i, x=x: F.linear(x, weights[i]), copies, rows)
        times = {}
        for tile in filter(lambda tile: suits(tile, rows, outputs, width), TILES):
            out = linear_triton(x, weights[0], None, None, tile)
            if not (out.float() - expected).norm() < 1e-2 * expected.norm():
                raise AssertionError(f"{rows} x {outputs} x {width}: {tile} is wrong")
            times[tile] = micros(lambda i, x=x, tile=tile: linear_triton(x, weights[i], None, None, tile), copies, rows)
        order = sorted(times.items(), key=lambda item: item[1])
        found.append({
            "rows": padded_rows(rows), "outputs": outputs, "width": width,
            "us": {name: round(value, 2) for name, value in libraries.items()},
            "tiles": [[*tile, round(value, 2)] for tile, value in order],
        })  # fmt: skip
    return found


def chosen(measured: list[dict]) -> list[list[int]]:
    """[rows, outputs, width, tile...] where a tile is no slower than the library's default."""
    return [
        [row["rows"], row["outputs"], row["width"], *row["tiles"][0][:3]]
        for row in measured
        if row["tiles"] and row["us"]["cublas"] >= row["tiles"][0][3]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--table", type=Path)
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--merge", type=Path, nargs="+")
    args = parser.parse_args()
    if args.merge:
        parts = [json.loads(path.read_text()) for path in args.merge]
        measured = [row for part in parts for row in part["measured"]]
        head = {key: value for key, value in parts[0].items() if key != "measured"}
    else:
        index, count = map(int, args.part.split("/"))
        head = {"command": "python -m tests.gpu.tune_linear", "commit": args.commit, **versions()}
        measured = [row for shape in shapes()[index::count] for row in tune(*shape)]
    write(args.out, head, "measured", measured)
    if args.table:
        write(args.table, {"columns": "rows, outputs, width, tile"} | head, "tiles", sorted(chosen(measured)))
    print(f"{len(measured)} products, {len(chosen(measured))} for the table")


def write(path: Path, head: dict, name: str, rows: list) -> None:
    """A record with a line for each row."""
    lines = ",\n".join(map(json.dumps, rows))
    path.write_text(f'{{{json.dumps(head)[1:-1]},\n"{name}": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
