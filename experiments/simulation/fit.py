"""`python -m experiments.simulation.fit`: a machine's constants from committed records.

Six stages, each with what those before have found:

1. Shares of a compression and of prefill attention, from the kernels' benchmark.
2. What a product takes beside its bytes, from products of five sizes in a profile of ranks. Shares of products and
   attention and the constants of a layer, by least squares over a profile's parts of a step and over step times of the
   engine's benchmark. Which steps an arm takes is simulated once: constants change their times.
3. What crosses the link: a gather's share of it from a profile of two ranks; what a sum takes, and its share, from two
   arms on two GPUs, of 64 rows and of 250.
4. What it takes to launch a layer kernel by kernel, from tokens/s of an arm of small layers that was timed once.
5. What the host takes, from arms whose steps are so short that it shows (their tokens/s, number, median and slowest
   tenth), each simulated anew at every trial.
6. What a request takes to its engine, from the median TTFT of a server. It needs the trace that was served.

`--few-rows` fits what few rows and unequal lengths change, and nothing else: from a profile's steps, whose kernels
overlap, so that their times do not add up, and from arms of such loads.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import brentq, least_squares, minimize

from experiments.command_line import Parser, stoppable
from experiments.errors import UsageError
from experiments.paths import ROOT
from experiments.records import METRICS, ROWS
from experiments.simulation.arms import MeasuredArm, SimulatedArm, measured_arms, simulate_arm
from experiments.simulation.errors import machine_of_record
from experiments.simulation.machine import MACHINES, Machine, file_of, read_machine
from experiments.simulation.runs import simulate_run
from experiments.simulation.served import compared_rates
from experiments.simulation.shape import SimulatedShape
from experiments.simulation.step_model import LOGIT_BYTES, StepModel

RECORDS = ROOT / "results" / "records"
PROFILED_MODEL = ROOT / "models" / "qwen3-8b-shape"
"""Of `profile_step` and of the kernels' benchmark."""
PROFILED_ROWS, PROFILED_STEPS = 64, 10
"""Requests and steps of the profile of ranks."""
SHARED = "full:256x1024="
"""A case of the profile whose requests share some of their blocks, so that their attention comes out too fast
(docs/performance.md)."""
DEVICE = (
    *("weight_share", "product_share", "entry_share"),
    *("attention_seconds", "layer_seconds", "row_passes", "sample_seconds"),
)
SUMS = ("collective_seconds", "sum_share")
FEW = ("imbalance", "overlap_seconds")
MOST_IMBALANCE = 8.0
HOST = ("host_seconds", "host_row_seconds", "compression_seconds", "compression_score_seconds", "interpreter_share")
LAUNCHES = 1e-4, 4e-3
"""Between which a layer's launch is sought, in seconds."""
LARGEST, SMALLEST = 0.99, 1e-15
"""Of a share, and of any constant that is fitted as its logarithm."""


def kernel_shares(machine: Machine, folder: Path) -> Machine:
    """Stage 1: from a record of `scenario=kernels`."""
    rows = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    shapes = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["shapes"]
    seconds = {row["kernel"]: row["ms"] / 1e3 for row in rows}  # of several shapes the last
    flops = {row["kernel"]: row["flops"] for row in rows}
    size = 2 * shapes["layers"] * shapes["kv_heads"] * shapes["head_dim"] * 2
    entry_bytes = shapes["compressions"] * shapes["entries"] * size
    return replace(
        machine,
        move_share=entry_bytes / seconds["compact_stable"] / machine.bandwidth,
        score_share=entry_bytes / seconds["attention_score"] / machine.bandwidth,
        redundancy_share=flops["redundancy"] / seconds["redundancy"] / machine.flops,
        prefill_share=flops["paged_prefill"] / seconds["paged_prefill"] / machine.flops,
    )


def profiled(path: Path) -> list[tuple[dict[str, Any], tuple[float, float, float]]]:
    """Of a record of `profile_step`: rows and bytes of a step, and seconds of its products, attention and the rest."""
    cases = json.loads(path.read_text(encoding="utf-8"))["cases"]
    parts = []
    for case in cases:
        us = dict(case["us"])
        named = [us.pop("matmul"), us.pop("attention")]
        parts.append((case, tuple(1e-6 * value for value in (*named, sum(us.values())))))
    return parts


def _reads(case: dict[str, Any], shape: SimulatedShape) -> dict[str, float]:
    """What a profiled step reads. Its lengths are spread evenly unless the case ends in `=`."""
    rows, entries = case["rows"], case["kv_bytes"] / shape.sizes.kv_bytes
    mean = entries / rows
    lengths = np.full(rows, mean) if case["case"].endswith("=") else np.linspace(1, 2 * mean, rows)
    return {"num_decodes": rows, "decode_entries": entries, "decode_squares": float((lengths**2).sum())}


def product_constant(machine: Machine, path: Path) -> Machine:
    """Stage 2, from a profile of ranks: where the line of products' times over their bytes begins."""
    profile = json.loads(path.read_text(encoding="utf-8"))
    config = json.loads((PROFILED_MODEL / "config.json").read_text(encoding="utf-8"))
    width, inner, head_dim = (config[name] for name in ("hidden_size", "intermediate_size", "head_dim"))
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    rows = (head_dim * (heads + 2 * kv_heads), head_dim * heads, 2 * inner, inner, config["vocab_size"])
    sizes = np.sort(rows) * width * LOGIT_BYTES / profile["gpus"]
    kernels = [row for row in profile["rows"] if row["kernel"].startswith("nvjet")]
    seconds = np.sort([1e-3 * row["ms_a_step"] * PROFILED_STEPS / row["calls"] for row in kernels])
    _, begin = np.polyfit(sizes, seconds, 1, w=1 / seconds)
    return replace(machine, product_seconds=max(0.0, float(begin)))


def device_constants(machine: Machine, profile: Path, arms: Sequence[MeasuredArm]) -> Machine:
    """Stage 2."""
    profile_shape = SimulatedShape.read(PROFILED_MODEL)
    cases = profiled(profile)
    simulated = [simulate_arm(measured.arm, machine) for measured in arms]
    shapes = [simulated_arm.times.shape for simulated_arm in simulated]

    def residuals(values: np.ndarray) -> list[float]:
        changed = replace(machine, **dict(zip(DEVICE, np.exp(values).tolist())))
        model, found = StepModel(changed, profile_shape), []
        for case, measured in cases:
            parts = np.array(model.parts(**_reads(case, profile_shape)))
            parts[2] -= changed.sample_seconds * case["rows"] * profile_shape.sizes.vocab_size  # not profiled
            off = (parts - measured) / sum(measured)
            found += [off[0], off[2]] if case["case"] == SHARED else list(off)
        for measured, base, shape in zip(arms, simulated, shapes):
            now, before = (StepModel(on, shape, base.times.block_size) for on in (changed, machine))
            found += _off(measured, base, now, before)
        return found

    begin = np.log([max(getattr(machine, name), SMALLEST) for name in DEVICE])
    highest = [np.log(LARGEST) if name.endswith("_share") else np.inf for name in DEVICE]
    fitted = least_squares(residuals, np.minimum(begin, np.array(highest) - 1e-6), bounds=(-np.inf, highest))
    return replace(machine, **dict(zip(DEVICE, np.exp(fitted.x).tolist())))


def few_rows_constants(machine: Machine, profile: Path, arms: Sequence[MeasuredArm]) -> Machine:
    """What steps of few rows save."""
    profile_shape = SimulatedShape.read(PROFILED_MODEL)
    cases = json.loads(profile.read_text(encoding="utf-8"))["cases"]
    simulated = [simulate_arm(measured.arm, machine) for measured in arms]

    def changed(values: np.ndarray) -> Machine:
        return replace(machine, overlap_seconds=float(values[0]) * 1e-5)

    def residuals(values: np.ndarray) -> list[float]:
        model, found = StepModel(changed(values), profile_shape), []
        for case in cases:
            seconds = float(sum(model.parts(**_reads(case, profile_shape))))
            found.append(float(np.log(1e3 * seconds / case["step_ms"])))
        for measured, base in zip(arms, simulated):
            shape = base.times.shape
            now, before = (StepModel(on, shape, base.times.block_size) for on in (changed(values), machine))
            found += _off(measured, base, now, before)
            long = np.quantile(sum(now.parts(*base.works())), 0.9)
            found.append(float(np.log(1e3 * long / measured.row["step_ms"]["p90"])))
        return found

    return changed(least_squares(residuals, np.ones(1), bounds=(0, np.inf)).x)


def block_constant(machine: Machine, measured: MeasuredArm) -> Machine:
    """Stage 2: as how many entries more a block counts, for the median step of an arm with small ones."""
    simulated, size = simulate_arm(measured.arm, machine), measured.arm.options["block_size"]

    def off(entries: float) -> float:
        model = StepModel(replace(machine, block_entries=entries), simulated.times.shape, size)
        return float(1e3 * np.median(sum(model.parts(*simulated.works()))) - measured.row["step_ms"]["p50"])

    return replace(machine, block_entries=float(brentq(off, 0, size)))


def imbalance_constant(machine: Machine, folder: Path, trace: str | None) -> Machine:
    """What unequal lengths must cost for the tokens/s of a whole run, on a machine of its time."""
    like = MACHINES / file_of(machine_of_record(folder))
    measured = json.loads((folder / METRICS).read_text(encoding="utf-8"))["output_tokens_per_second"]

    def off(imbalance: float) -> float:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "machine.yaml"
            path.write_text(f"like: {like}\nimbalance: {imbalance}\n", encoding="utf-8")
            with redirect_stdout(sys.stderr):
                simulated = simulate_run(folder, str(path), trace)["output_tokens_per_second"]
            return float(np.log(simulated / measured))

    return replace(machine, imbalance=float(brentq(off, 0, MOST_IMBALANCE, xtol=0.02)))


def _off(measured: MeasuredArm, base: SimulatedArm, now: StepModel, before: StepModel) -> list[float]:
    """By how much the time of an arm's steps is off under other constants: their sum and their median."""
    works = base.works()
    after = sum(now.parts(*works))
    seconds = sum(repeat.seconds for repeat in base.repeats) + float(np.sum(after - sum(before.parts(*works))))
    tokens = sum(repeat.tokens for repeat in base.repeats)
    rate = tokens / seconds / measured.row["tokens_per_second"]
    return [float(np.log(rate)), float(np.log(1e3 * np.median(after) / measured.row["step_ms"]["p50"]))]


def link_share(machine: Machine, path: Path) -> Machine:
    """Stage 3, from a profile of ranks: the gather of the logits of `rows` requests in bfloat16."""
    profile = json.loads(path.read_text(encoding="utf-8"))
    seconds = 1e-3 * next(row["ms_a_step"] for row in profile["rows"] if "AllGather" in row["kernel"])
    size = PROFILED_ROWS * SimulatedShape.read(PROFILED_MODEL).sizes.vocab_size * LOGIT_BYTES
    others = (profile["gpus"] - 1) / profile["gpus"]
    return replace(machine, link_share=size * others / seconds / machine.link_bandwidth)


def launch_constant(machine: Machine, measured: MeasuredArm) -> Machine:
    """Stage 4: what a layer's launches must take for the tokens/s of an arm with prompts, and captures of graphs."""

    def off(seconds: float) -> float:
        row = simulate_arm(measured.arm, replace(machine, launch_seconds=seconds)).row
        return float(np.log(row["tokens_per_second"] / measured.row["tokens_per_second"]))

    return replace(machine, launch_seconds=float(brentq(off, *LAUNCHES, xtol=1e-5)))


def sum_constants(machine: Machine, arms: Sequence[MeasuredArm]) -> Machine:
    """Stage 3: what a sum over GPUs must take for the median steps of arms with few and with many rows."""
    simulated = [simulate_arm(measured.arm, machine) for measured in arms]

    def changed(values: np.ndarray) -> Machine:
        return replace(machine, **dict(zip(SUMS, np.exp(values).tolist())))

    def residuals(values: np.ndarray) -> list[float]:
        found = []
        for measured, base in zip(arms, simulated):
            model = StepModel(changed(values), base.times.shape, base.times.block_size)
            after = sum(model.parts(*base.works()))
            found.append(float(np.log(1e3 * np.median(after) / measured.row["step_ms"]["p50"])))
        return found

    begin = np.log([getattr(machine, name) for name in SUMS])
    return changed(least_squares(residuals, np.minimum(begin, -1e-2), bounds=(-np.inf, (np.inf, 0.0))).x)


def host_constants(machine: Machine, arms: Sequence[MeasuredArm], trials: int) -> Machine:
    """Stage 5."""

    def changed(values: np.ndarray) -> Machine:
        found = dict(zip(HOST, np.exp(values).tolist()))
        return replace(machine, **found | {"interpreter_share": min(found["interpreter_share"], LARGEST)})

    def loss(values: np.ndarray) -> float:
        total = 0.0
        for measured in arms:
            row = simulate_arm(measured.arm, changed(values)).row
            for name in ("tokens_per_second", "steps"):
                total += np.log(row[name] / measured.row[name]) ** 2
            for share in ("p50", "p90"):
                total += np.log(row["step_ms"][share] / measured.row["step_ms"][share]) ** 2
        return total

    begin = np.log([getattr(machine, name) for name in HOST])
    simplex = np.vstack([begin, begin + 0.5 * np.eye(len(HOST))])
    options = {"maxfev": trials, "initial_simplex": simplex, "xatol": 0.02, "fatol": 1e-5}
    return changed(minimize(loss, begin, method="Nelder-Mead", options=options).x)


def request_constant(machine: Machine, rows: Sequence[dict[str, Any]]) -> Machine:
    """Stage 6: what the median TTFT lacks in the mean.

    Args:
        rows: as of `compared_rates`, on this machine. Rates that were broken off are left out: a queue decides there.

    Raises:
        UsageError: there is none.
    """
    medians = [row["ttft.p50"] for row in rows if not row["refused"] and not row["broken"]["measured"]]
    if not medians:
        raise UsageError("--served: no rate of Zipage's that was not broken off")
    lacking = statistics.mean(median["measured"] - median["simulated"] for median in medians)
    return replace(machine, request_seconds=max(0.0, machine.request_seconds + lacking))


def as_yaml(machine: Machine, head: str) -> str:
    lines = [f"# {head}"]
    for name, value in asdict(machine).items():
        if value is not None and name not in ("eager", "launches_prompts"):
            lines.append(f"{name}: {value:.6g}" if isinstance(value, float) else f"{name}: {value}")
    return "\n".join(lines) + "\n"


@stoppable
def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m experiments.simulation.fit", description="Fit a machine to committed records.")
    parser.add_argument("--machine", default="h100", help="whose published rates and first guesses are taken")
    parser.add_argument("--kernels", type=Path, default=RECORDS / "kernels_scenario_h100", help="of scenario=kernels")
    parser.add_argument("--profile", type=Path, default=RECORDS / "profile_step_h100.json", help="of profile_step")
    parser.add_argument(
        "--device",
        type=Path,
        nargs="+",
        metavar="RECORD",
        default=[RECORDS / f"engine_bench_{name}_h100" for name in ("factorial", "ample_vllm")],
        help="of scenario=engine_bench: the device's constants",
    )
    parser.add_argument(
        "--host",
        nargs="+",
        metavar="RECORD/ARM",
        default=[str(RECORDS / "engine_bench_policies_h100" / name) for name in ("random", "zipage")],
        help="arms whose host shows",
    )
    parser.add_argument(
        "--ranks",
        nargs="+",
        default=[
            str(RECORDS / "engine_bench_ranks_h100" / "two_h100" / "two"),
            str(RECORDS / "engine_bench_short_ranks_h100" / "two_zipage_short" / "two_zipage"),
        ],
        metavar="RECORD/ARM",
        help="arms on several GPUs, of few rows and of many",
    )
    parser.add_argument(
        "--blocks",
        default=str(RECORDS / "engine_bench_short_h100" / "full"),
        metavar="RECORD/ARM",
        help="an arm whose blocks are small",
    )
    parser.add_argument("--link", type=Path, default=RECORDS / "ranks_profile_h200.json", help="a profile of ranks")
    parser.add_argument(
        "--launch",
        default=str(RECORDS / "engine_bench_redesign_h100" / "after_small1" / "full"),
        metavar="RECORD/ARM",
        help="an arm of small layers, timed once: its host launches prompts, and graphs that it captures",
    )
    served = RECORDS / "serve_trace_four_h100"
    parser.add_argument("--served", type=Path, default=served, help="a folder of records of scenario=serve_bench")
    parser.add_argument("--trace", metavar="FILE", help="of --served; without it no stage 6, and its constant is 0")
    parser.add_argument(
        "--only-served", action="store_true", help="stage 6 alone: all else stays as the machine has it"
    )
    parser.add_argument(
        "--few-rows", action="store_true", help="only what few rows change, from --profile and the arms of --device"
    )
    parser.add_argument("--uneven", type=Path, metavar="RUN", help="with --few-rows: a whole run of unequal lengths")
    parser.add_argument("--trials", type=int, default=40, help="of the host's constants; 0 leaves them as they are")
    parser.add_argument("--out", type=Path, help="a file of conf/machine/; without, it is printed")
    options = parser.parse_args(arguments)
    try:
        if options.only_served and options.trace is None:
            raise UsageError("--only-served: needs --trace")
        machine = read_machine(options.machine)
        if options.few_rows:
            arms = [arm for folder in options.device for arm in measured_arms(folder)]
            if options.uneven is not None:
                machine = imbalance_constant(machine, options.uneven, options.trace)
            machine = few_rows_constants(machine, options.profile, arms)
            print("\n".join(f"{name}: {getattr(machine, name):.6g}" for name in FEW))
            return 0
        if not options.only_served:
            machine = _of_engines(machine, options)
        if options.trace is None:
            machine = replace(machine, request_seconds=0.0)
        else:
            machine = _of_servers(machine, options.served, options.trace)
        text = as_yaml(machine, "Made by `python -m experiments.simulation.fit`, which says how.")
    except (UsageError, OSError, KeyError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text, end="")
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    return 0


def _of_engines(machine: Machine, options: Namespace) -> Machine:
    """Stages 1 to 5."""
    machine = kernel_shares(machine, options.kernels)
    arms = [arm for folder in options.device for arm in measured_arms(folder)]
    machine = device_constants(product_constant(machine, options.link), options.profile, arms)
    machine = block_constant(machine, _one_arm(options.blocks))
    machine = sum_constants(link_share(machine, options.link), [_one_arm(name) for name in options.ranks])
    machine = launch_constant(machine, _one_arm(options.launch))
    if options.trials:
        machine = host_constants(machine, [_one_arm(name) for name in options.host], options.trials)
    records = [options.kernels.name, options.profile.stem, *(folder.name for folder in options.device)]
    records.append(options.link.stem)
    others = [options.blocks, *options.ranks, options.launch, *(options.host if options.trials else [])]
    records += ["/".join(Path(name).parts[-2:]) for name in dict.fromkeys(others)]
    return replace(machine, origin=f"published rates; constants fitted to {', '.join(records)}")


def _of_servers(machine: Machine, served: Path, trace: str) -> Machine:
    """Stage 6."""
    folders = sorted(path.parent for path in served.rglob(ROWS))
    machine = request_constant(machine, [row for folder in folders for row in compared_rates(folder, machine, trace)])
    known = served.name in machine.origin.replace(",", " ").split()
    return machine if known else replace(machine, origin=f"{machine.origin}, {served.name}")


def _one_arm(name: str) -> MeasuredArm:
    path = Path(name)
    for measured in measured_arms(path.parent):
        if measured.arm.name == path.name:
            return measured
    raise UsageError(f"--host {name}: the record has no such arm of Zipage's")


if __name__ == "__main__":
    sys.exit(main())
