"""Where the time of a sparse layer's experts goes on a GPU, by part, against the bytes and the arithmetic.

    python -m tests.gpu.profile_experts --out FILE --commit $(git rev-parse HEAD) [--tokens 1,64] [--models NAME]

Routing is random. A part is a CUDA graph over several layers one after the other, whose weights are more than a cache
holds. `least_us` is the longer of reading the experts that are touched and of multiplying with them, at `--bandwidth`
and `--flops`. Parts whose names begin with `grouped` are of `expert_mlp_grouped`, those with `triton` of
`expert_mlp_triton`, with the tile of `TILES` that is fastest, or with `--no-search` the one that `expert_mlp` takes;
`error` is between the two. Without a GPU the same runs small, to see that it does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.clamped_swiglu import clamped_swiglu
from kernels.dependent_launch import dependent_launch
from kernels.expert_mlp import Biases, Gate, expert_mlp, expert_mlp_grouped
from kernels.expert_mlp_triton import combine_experts, expert_mlp_triton, group_by_expert, multiply_experts
from kernels.expert_tiles import ExpertTile, find_tile
from kernels.route import route
from kernels.silu_mul import silu_mul
from kernels.tiles import has_large_shared_memory
from tests.gpu.check_compressed_engine import versions

MODELS = ("qwen3-30b-a3b-shape", "gpt-oss-20b-shape")
TOKENS = (1, 8, 32, 64, 128, 256, 1024, 8192)
LAYERS = 4
"""Even one token's experts in as many layers are 300 MB."""
REPLAYS = 15
FEW_ROWS = (64, 64, 4), (64, 64, 6), (64, 128, 3), (64, 128, 4), (64, 128, 6), (64, 256, 3), (128, 64, 4), (128, 128, 3)
TILES = (
    *(ExpertTile(rows, 32, depth, stages) for rows in (16, 32) for depth, stages in ((128, 6), (256, 4), (256, 6))),
    *(
        ExpertTile(rows, outputs, depth, stages)
        for rows in (16, 32)
        for outputs, depth, stages in FEW_ROWS
    ),
    *(ExpertTile(64, outputs, depth, stages) for outputs, depth, stages in ((64, 64, 4), (128, 64, 3), (128, 128, 3))),
    *(ExpertTile(rows, 128, 64, stages, 8) for rows in (64, 128) for stages in (3, 4)),
    *(ExpertTile(128, 256, 64, stages, 8) for stages in (3, 4)),
)  # fmt: skip
DRY = not torch.cuda.is_available()
DEVICE = torch.device("cpu" if DRY else "cuda")


class Layers:
    """Experts of a few layers of a model, with random weights.

    Args:
        config: a model's, of Qwen3's mixtures or gpt-oss's.
    """

    def __init__(self, config: dict) -> None:
        sizes = config["hidden_size"], config.get("moe_intermediate_size", config["intermediate_size"])
        self.width, self.inner = (size // 256 * 16 if DRY else size for size in sizes)
        self.num_experts = config.get("num_experts") or config["num_local_experts"]
        self.active = config["num_experts_per_tok"]
        self.depth = config["num_hidden_layers"]
        self.gate: Gate = silu_mul
        self.biases: list[Biases | None] = [None] * LAYERS
        if "swiglu_limit" in config:
            self.gate = partial(clamped_swiglu, alpha=1.702, limit=config["swiglu_limit"])
            sizes = 2 * self.inner, self.width
            self.biases = [tuple(_normal(self.num_experts, size) for size in sizes) for _ in range(LAYERS)]
        sizes = (2 * self.inner, self.width), (self.width, self.inner)
        self.gate_up, self.down = (
            [_normal(self.num_experts, rows, width).mul_(width**-0.5) for _ in range(LAYERS)] for rows, width in sizes
        )
        self.router = [torch.randn(self.num_experts, self.width, device=DEVICE) for _ in range(LAYERS)]

    def route(self, tokens: int) -> list[tuple[Tensor, Tensor]]:
        """Experts and shares of random tokens, of each layer."""
        scores = (torch.rand(tokens, self.num_experts, device=DEVICE).topk(self.active) for _ in range(LAYERS))
        return [(indices, values / values.sum(1, keepdim=True)) for values, indices in scores]


def _normal(*sizes: int) -> Tensor:
    return torch.empty(sizes, dtype=torch.bfloat16, device=DEVICE).normal_()


def micros(compute: Callable[[int], object]) -> float:
    """Microseconds of `compute(layer)`, as it runs in a graph over the layers."""
    if DRY:
        begin = time.perf_counter()
        for layer in range(LAYERS):
            compute(layer)
        return 1e6 * (time.perf_counter() - begin) / LAYERS
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for layer in range(LAYERS):
            compute(layer)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for layer in range(LAYERS):
            compute(layer)
    times = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / LAYERS)
    return statistics.median(times)


def route_parts(layers: Layers, x: Tensor) -> dict[str, Callable[[int], object]]:
    """The router's product, and what turns it into experts and shares, in PyTorch; both in kernels."""
    logits = F.linear(x.float(), layers.router[0])

    def choose(_: int) -> Tensor:
        shares, _ = logits.softmax(-1).topk(layers.active)
        return shares / shares.sum(-1, keepdim=True)

    return {
        "router": lambda i: F.linear(x.float(), layers.router[i]),
        "choose": choose,
        "route": lambda i: route(x, layers.router[i], None, layers.active, normalized=True),
    }


def grouped_parts(layers: Layers, x: Tensor, routing: list) -> dict[str, Callable[[int], object]]:
    """What `expert_mlp_grouped` is made of, each part with inputs that are there already."""
    numbers = torch.arange(layers.num_experts, device=DEVICE)
    tokens = len(x)

    def sort(i: int) -> tuple[Tensor, Tensor, Tensor]:
        ids, order = routing[i][0].flatten().sort(stable=True)
        return ids, order, torch.searchsorted(ids, numbers, right=True, out_int32=True)

    sorted_ = [sort(i) for i in range(LAYERS)]
    rows = x[sorted_[0][1] // layers.active]

    def first(i: int) -> Tensor:
        return F.grouped_mm(rows, layers.gate_up[i].mT, offs=sorted_[i][2])

    gate_up = first(0)
    gated = layers.gate(gate_up)

    def second(i: int) -> Tensor:
        return F.grouped_mm(gated, layers.down[i].mT, offs=sorted_[i][2])

    outs = second(0)

    def combine(i: int) -> Tensor:
        out = torch.empty_like(outs).index_copy_(0, sorted_[i][1], outs).view(tokens, layers.active, layers.width)
        return torch.bmm(routing[i][1].to(x.dtype)[:, None], out)[:, 0]

    parts = {
        "sort": sort,
        "gather": lambda i: x[sorted_[i][1] // layers.active],
        "first": first,
        "gate": lambda _: layers.gate(gate_up),
        "second": second,
        "combine": combine,
    }
    if layers.biases[0] is not None:
        parts["biases"] = lambda i: (
            gate_up.add_(layers.biases[i][0][sorted_[i][0]]), outs.add_(layers.biases[i][1][sorted_[i][0]])
        )  # fmt: skip
    return parts


def candidates(layers: Layers, tokens: int, search: bool) -> list[ExpertTile]:
    """The tile that `expert_mlp` takes, or all whose rows suit so many tokens."""
    if not search:
        return [find_tile(tokens, layers.active, layers.num_experts, 2, has_large_shared_memory(DEVICE))]
    mean = tokens * layers.active / layers.num_experts
    return [tile for tile in TILES if mean / 8 <= tile.rows <= max(16, 4 * mean)]


def tile_times(layers: Layers, x: Tensor, routing: list, tiles: list[ExpertTile]) -> list[dict]:
    """Each tile's times of the first and of the second product, the fastest first."""
    launch = dependent_launch(x[:1])
    gated = _normal(len(x) * layers.active, layers.inner)
    times = []
    for tile in tiles:
        grouped = [group_by_expert(experts, layers.num_experts, tile, launch) for experts, _ in routing]
        first, second = (
            micros(lambda i, x=x, w=w: multiply_experts(x, w[i], None, *grouped[i], tile, launch))  # noqa: B023
            for x, w in ((x, layers.gate_up), (gated, layers.down))
        )
        times.append({"tile": tile, "first": first, "second": second})
    return sorted(times, key=lambda row: row["first"] + row["second"])


def triton_parts(layers: Layers, x: Tensor, routing: list, tile: ExpertTile) -> dict[str, Callable[[int], object]]:
    """What `expert_mlp_triton` is made of, each part with inputs that are there already."""
    launch = dependent_launch(x[:1])
    grouped = [group_by_expert(experts, layers.num_experts, tile, launch) for experts, _ in routing]
    gate_up = _normal(len(x) * layers.active, 2 * layers.inner)
    parts = _normal(len(x) * layers.active, layers.width)
    biases = [given or (None, None) for given in layers.biases]

    def product(i: int, number: int) -> Tensor:
        given, weight = ((x, layers.gate_up), (gate_up[:, : layers.inner], layers.down))[number]
        return multiply_experts(given, weight[i], biases[i][number], *grouped[i], tile, launch)

    return {
        "group": lambda i: group_by_expert(routing[i][0], layers.num_experts, tile, launch),
        "first": lambda i: product(i, 0),
        "gate": lambda _: layers.gate(gate_up),
        "second": lambda i: product(i, 1),
        "combine": lambda i: combine_experts(parts, routing[i][1], launch),
    }


@torch.inference_mode()
def measure(name: str, layers: Layers, tokens: int, bandwidth: float, flops: float, search: bool) -> dict:
    x = _normal(tokens, layers.width)
    routing = layers.route(tokens)
    touched = statistics.mean(len(experts.unique()) for experts, _ in routing)
    numbers = 3 * layers.width * layers.inner
    read, multiplied = 2 * touched * numbers / bandwidth, 2 * tokens * layers.active * numbers / flops
    whole = {"expert_mlp": expert_mlp, "grouped": expert_mlp_grouped}
    parts = route_parts(layers, x)
    parts |= {f"grouped {part}": compute for part, compute in grouped_parts(layers, x, routing).items()}
    tiles = {}
    if not DRY:
        times = tile_times(layers, x, routing, candidates(layers, tokens, search))
        best = times[0]["tile"]
        parts |= {f"triton {part}": compute for part, compute in triton_parts(layers, x, routing, best).items()}
        whole["triton"] = partial(expert_mlp_triton, tile=best)
        tiles = {"tiles": [row | {"tile": list(row["tile"])} for row in times]}

    def run(compute: Callable, i: int) -> Tensor:
        return compute(
            x, *routing[i], layers.gate_up[i], layers.down[i], biases=layers.biases[i], gate=layers.gate
        )  # fmt: skip

    outs = [run(compute, 0).float() for compute in whole.values()]
    return {
        "model": name,
        "tokens": tokens,
        "touched": touched,
        "least_us": 1e6 * max(read, multiplied),
        "whole_us": {key: micros(partial(run, compute)) for key, compute in whole.items()},
        "parts_us": {part: micros(compute) for part, compute in parts.items()},
        "error": ((outs[-1] - outs[1]).norm() / outs[1].norm()).item(),
    } | tiles


def lines(row: dict) -> str:
    head = f"{row['model'].removesuffix('-shape')} {row['tokens']} tokens"
    ways = ", ".join(f"{way} {us:.1f} ({us / row['least_us']:.2f} x)" for way, us in row["whole_us"].items())
    parts = ", ".join(f"{part} {us:.1f}" for part, us in row["parts_us"].items())
    tiles = "".join(f"\n  {row['tile']}: {row['first']:.1f} {row['second']:.1f}" for row in row.get("tiles", ()))
    error = f"error {row['error']:.1e}"
    return f"{head}, {row['touched']:.1f} experts: least {row['least_us']:.1f} us; {ways}\n  {parts}; {error}{tiles}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS[:2] if DRY else TOKENS)))
    parser.add_argument("--bandwidth", type=float, default=4.35e12, help="bytes a second")
    parser.add_argument("--flops", type=float, default=7e14, help="of matrix products, a second")
    parser.add_argument("--no-search", dest="search", action="store_false", help="time the chosen tile alone")
    args = parser.parse_args()
    record = {
        "command": f"python -m tests.gpu.profile_experts --models {args.models} --tokens {args.tokens}"
        f" --bandwidth {args.bandwidth:g} --flops {args.flops:g}" + " --no-search" * (not args.search),
        "commit": args.commit,
        **versions(DEVICE.type),
        "rows": [],
    }
    torch.manual_seed(0)
    for name in args.models.split(","):
        layers = Layers(json.loads(Path("models", name, "config.json").read_text()))
        for tokens in map(int, args.tokens.split(",")):
            record["rows"].append(measure(name, layers, tokens, args.bandwidth, args.flops, args.search))
            print(lines(record["rows"][-1]), flush=True)
            args.out.write_text(json.dumps(record, indent=1) + "\n")
        del layers
        if not DRY:
            torch.cuda.empty_cache()
    print(
        "model          tokens  experts  least us  " + "  ".join(f"{way:>10}" for way in record["rows"][0]["whole_us"])
    )
    for row in record["rows"]:
        ways = "  ".join(f"{us:10.1f}" for us in row["whole_us"].values())
        print(f"{row['model']:14.14} {row['tokens']:6} {row['touched']:8.1f}  {row['least_us']:8.1f}  {ways}")


if __name__ == "__main__":
    main()
