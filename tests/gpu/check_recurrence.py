"""Recurrent layers on a GPU: the compiled kernels against their references, and times beside the floor of their bytes.

    python -m tests.gpu.check_recurrence --out FILE [--commit COMMIT] [--no-timing] [--dry]

Exits with 1 unless all cases passed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

if "--dry" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from kernels.causal_conv import causal_conv_reference, causal_conv_torch
from kernels.causal_conv_triton import causal_conv_triton
from kernels.delta_gates import DeltaGates
from kernels.gated_delta import gated_delta_reference, gated_delta_torch
from kernels.gated_delta_step_triton import gated_delta_step_triton
from kernels.gated_delta_triton import gated_delta_triton
from kernels.gated_norm import gated_norm_reference
from kernels.gated_norm_triton import gated_norm_triton
from kernels.spans import Spans
from tests.gpu.kernel_cases import DEVICE, DRY, Checks, differing, error, provenance
from tests.gpu.kernel_times import milliseconds, time_copy

KEY_HEADS, VALUE_HEADS, DIM, TAPS = (2, 4, 16, 4) if DRY else (16, 32, 128, 4)
"""Of Qwen3-Next and Qwen3.5."""
WIDTHS = KEY_HEADS * DIM, KEY_HEADS * DIM, VALUE_HEADS * DIM
CHANNELS = sum(WIDTHS)
BOUNDS = {"bfloat16": 1e-2, "float16": 3e-3, "float32": 1e-4}
LENGTHS = (70, 1, 0) if DRY else (700, 1, 0, 64, 3, 129)
DTYPES = ("float32", "float16") if DRY else ("float32", "bfloat16", "float16")


class Layer:
    """Inputs of one layer and the states of more rows than take part, which are NaN where none may be read."""

    def __init__(self, tokens: int, rows: int, dtype: torch.dtype) -> None:
        options: dict[str, Any] = {"device": DEVICE, "dtype": dtype}
        self.x = torch.randn(tokens, CHANNELS + 64, **options)[:, :CHANNELS]
        self.weight = torch.randn(CHANNELS, TAPS, **options)
        controls = torch.randn(tokens, 2 * VALUE_HEADS, **options).split(VALUE_HEADS, dim=1)
        heads = torch.randn(2, VALUE_HEADS, device=DEVICE)
        self.gates = DeltaGates(*controls, *(heads - 2))
        self.inputs = torch.randn(rows + 1, TAPS - 1, CHANNELS, **options)
        self.states = torch.randn(rows + 1, VALUE_HEADS, DIM, DIM, device=DEVICE)
        self.inputs[-1], self.states[-1] = float("nan"), float("nan")
        self.mixed = torch.zeros(tokens, CHANNELS, **options)
        self.out = torch.zeros(tokens, VALUE_HEADS, DIM, device=DEVICE)

    def heads(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, as parts of `mixed`."""
        return tuple(part.unflatten(1, (-1, DIM)) for part in self.mixed.split(WIDTHS, dim=1))

    def expected(self, spans: Spans) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of the references: `mixed` and the inputs kept; `out` and states, of `mixed` as it is here."""
        mixed, inputs, out, states = (x.clone() for x in (self.mixed, self.inputs, self.out, self.states))
        (q, k, v), (decay, beta) = self.heads(), self.gates.computed()
        for row, begin, end, fresh in spans.each():
            part = slice(begin, end)
            before = [torch.zeros_like(x[row]) if fresh else x[row] for x in (inputs, states)]
            mixed[part], inputs[row] = causal_conv_reference(self.x[part], before[0], self.weight)
            given = (x[part] for x in (q, k, v, decay, beta))
            out[part], states[row] = gated_delta_reference(*given, before[1])
        return mixed, inputs, out, states

    def convolve(self, spans: Spans) -> None:
        causal_conv_triton(self.x, self.weight, self.inputs, spans, self.mixed)

    def recur(self, spans: Spans) -> None:
        run = gated_delta_step_triton if spans.starts is None else gated_delta_triton
        run(*self.heads(), self.gates, self.states, spans, self.out)


def check_case(checks: Checks, name: str, layer: Layer, spans: Spans, **case: Any) -> None:
    """One launch set from the states as they are."""
    mixed, inputs, *_ = layer.expected(spans)
    layer.convolve(spans)
    checks.add("causal_conv", name, error(layer.mixed, mixed), BOUNDS[name], **case)
    checks.add("causal_conv state", name, differing(layer.inputs, inputs), 0.0, **case)
    *_, out, states = layer.expected(spans)
    layer.recur(spans)
    checks.add("gated_delta", name, error(layer.out, out), BOUNDS[name], **case)
    held = slice(0, len(states) - 1)
    checks.add("gated_delta state", name, error(layer.states[held], states[held]), BOUNDS[name], **case)


def check_kernels(checks: Checks) -> None:
    for name in DTYPES:
        dtype = getattr(torch, name)
        for batch in (3,) if DRY else (1, 5, 130):
            layer = Layer(batch, 2 * batch, dtype)
            rows = torch.randperm(2 * batch, device=DEVICE)[:batch]
            rows[batch // 2] = -1 if batch > 1 else 0
            for _ in range(2):
                check_case(checks, name, layer, Spans(rows), decodes=batch)
        layer = Layer(5 + sum(LENGTHS) + 9, len(LENGTHS), dtype)
        starts = torch.tensor([5, *LENGTHS], device=DEVICE).cumsum(0, dtype=torch.int32)
        rows = torch.tensor([len(LENGTHS), *range(len(LENGTHS) - 1)], device=DEVICE)  # the first, fresh, reads no NaN
        check_case(checks, name, layer, Spans(rows, starts, rows == len(LENGTHS)), lengths=LENGTHS)
        gate = torch.randn(33, VALUE_HEADS * DIM + 64, device=DEVICE).to(dtype)[:, 64:].unflatten(1, (-1, DIM))
        x, weight = 9 * torch.randn(gate.shape, device=DEVICE), torch.randn(DIM, device=DEVICE).to(dtype)
        value = error(gated_norm_triton(x, gate, weight, 1e-6), gated_norm_reference(x, gate, weight, 1e-6))
        checks.add("gated_norm", name, value, BOUNDS[name])


def check_graph(checks: Checks) -> None:
    """A captured layer follows rows, spans and inputs that change between replays; padding is left out."""
    batch, spans, tokens, dtype = 40, 8, 600, torch.bfloat16
    layer = Layer(tokens, batch, dtype)
    rows, chunk_rows = torch.full((batch,), -1, device=DEVICE), torch.full((spans,), -1, device=DEVICE)
    starts = torch.zeros(spans + 1, dtype=torch.int32, device=DEVICE)
    fresh = torch.zeros(spans, dtype=torch.bool, device=DEVICE)
    parts = (Layer(batch, batch, dtype), Spans(rows)), (layer, Spans(chunk_rows, starts, fresh))

    def run() -> None:
        for part, some in parts:
            part.convolve(some)
            part.recur(some)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for seed in range(4):
        order = torch.randperm(batch, device=DEVICE)
        rows.copy_(order)
        rows[20 + seed :] = -1
        chunk_rows.copy_(order[-spans:])
        chunk_rows[5:] = -1
        starts.copy_(torch.tensor([20, 20 + 64 * seed, 300, 301, 302, 590, 590, 590, 590]))
        fresh.copy_(torch.arange(spans, device=DEVICE) % 2 == 0)
        layer.x.normal_()
        before = [part.states.clone() for part, _ in parts]
        graph.replay()
        for (part, some), states in zip(parts, before, strict=True):
            after = part.states.clone()
            part.states.copy_(states)
            *_, out, expected = part.expected(some)
            checks.add("gated_delta", "bfloat16", error(part.out, out), BOUNDS["bfloat16"], replay=seed)
            value = error(after[:-1], expected[:-1])
            checks.add("gated_delta state", "bfloat16", value, BOUNDS["bfloat16"], replay=seed)
            part.states.copy_(after)


def eager_ms(run: Callable[[], None], rounds: int = 7) -> float:
    """Median time of a run that waits for the device, or allocates, so that no graph can hold it."""
    run()
    times = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return median(times)


def time_layers(bandwidth: float) -> list[dict[str, Any]]:
    """Of one layer in bfloat16: its convolution, its recurrence and its norm. The floor is what must be read and
    written at a copy's speed: states of decodes once each, activations of prompts once each.
    """
    rows = []
    cases = [((1,) * batch, True) for batch in (1, 8, 64, 256)]
    cases += [(lengths, False) for lengths in ((256,), (2048,), (256,) * 8, (8192,), (1024,) * 8)]
    for lengths, decodes in cases:
        tokens = sum(lengths)
        layer = Layer(tokens, len(lengths), torch.bfloat16)
        places = torch.arange(len(lengths), device=DEVICE)
        starts = torch.tensor([0, *lengths], device=DEVICE).cumsum(0, dtype=torch.int32)
        spans = Spans(places) if decodes else Spans(places, starts, places < 0)
        gate = torch.randn(tokens, VALUE_HEADS, DIM, device=DEVICE, dtype=torch.bfloat16)
        weight = torch.randn(DIM, device=DEVICE, dtype=torch.bfloat16)
        moved = {
            "causal_conv": 2 * layer.mixed.nbytes + 2 * len(lengths) * layer.inputs[0].nbytes,
            "gated_delta": layer.mixed.nbytes + layer.out.nbytes + 2 * len(lengths) * layer.states[0].nbytes,
            "gated_norm": layer.out.nbytes + 2 * gate.nbytes,
        }
        runs = {
            "causal_conv": lambda layer=layer, spans=spans: layer.convolve(spans),
            "gated_delta": lambda layer=layer, spans=spans: layer.recur(spans),
            "gated_norm": lambda layer=layer, gate=gate, w=weight: gated_norm_triton(layer.out, gate, w, 1e-6),
        }
        before = {
            "causal_conv": lambda la=layer, s=spans: causal_conv_torch(la.x, la.weight, la.inputs, s, la.mixed),
            "gated_delta": lambda la=layer, s=spans: gated_delta_torch(*la.heads(), la.gates, la.states, s, la.out),
        }
        for kernel, run in runs.items():
            row = {"kernel": kernel, "decodes": decodes, "lengths": f"{len(lengths)} x {lengths[0]}"}
            row |= {"ms": milliseconds(run), "floor_ms": 1e3 * moved[kernel] / bandwidth}
            if kernel in before:
                row["torch_ms"] = eager_ms(before[kernel])
            rows.append(row)
    return rows


def timing_table(bandwidth: float, rows: list[dict[str, Any]]) -> list[str]:
    lines = [f"copy: {bandwidth / 1e12:.2f} TB/s read and written; one layer, bfloat16"]
    for row in rows:
        kind = "decodes" if row["decodes"] else "prompts"
        torch_ms = f", torch {row['torch_ms']:.3f} ms" if "torch_ms" in row else ""
        lines.append(
            f"{row['kernel']:<14}{kind} {row['lengths']:<10}{row['ms']:>9.4f} ms, floor {row['floor_ms']:.4f} ms"
            f" ({row['floor_ms'] / row['ms']:.0%}){torch_ms}"
        )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="path of the JSON record")
    parser.add_argument("--commit", default="unknown", help="git commit of the kernels, for the record")
    parser.add_argument("--seed", type=int, default=None, help="of the inputs; default: fresh ones")
    parser.add_argument("--dry", action="store_true", help="small cases, interpreted on a CPU, no timing")
    parser.add_argument("--full", action="store_true", help="taken as the other checks do; nothing more to run")
    parser.add_argument("--no-timing", action="store_true", help="check, but time nothing: beside other processes")
    options = parser.parse_args()
    if not DRY and not torch.cuda.is_available():
        parser.error("no CUDA device: use --dry to check the script on a CPU")
    seed = int.from_bytes(os.urandom(4)) if options.seed is None else options.seed
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("highest")
    record, checks = provenance(options.commit, seed), Checks()
    check_kernels(checks)
    lines = []
    if not DRY:
        check_graph(checks)
        if not options.no_timing:
            bandwidth = time_copy()
            record["timing"] = {"copy_bytes_per_second": bandwidth, "layers": time_layers(bandwidth)}
            lines = timing_table(bandwidth, record["timing"]["layers"])
    record |= {"failures": checks.failures, "cases": checks.cases}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print("\n".join([*checks.table(), *lines]))
    print(f"{len(checks.cases)} cases, {checks.failures} failed")
    return 1 if checks.failures else 0


if __name__ == "__main__":
    sys.exit(main())
