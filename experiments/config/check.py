"""Conditions on the options of a run that their types do not say."""

from __future__ import annotations

import math
import re
from operator import attrgetter

from experiments.config.schema import Experiment, engine_options
from experiments.config.typed import as_typed
from experiments.errors import UsageError
from zipage import EngineConfig, SamplingParams

SOURCES = ("path", "generator", "hub_id", "parts")
WANDB_PROJECT = re.compile(r"[^/\\#?%:]{1,128}")
FORCE = ("false", "stale", "true")
ARRIVALS = ("all_at_once", "poisson", "trace", "steady")
SERVED = ("serve", "fidelity", "simulate")
"""Kinds of scenario that ask a model the questions of a workload; the others are benchmarks."""
KINDS = (*SERVED, "kernels", "engine_bench", "serve_bench")
OF_LENGTHS = ("lengths", "trace")
"""Generators whose problems say how long their outputs are."""
OF_TURNS, OF_CHAINS = ("turns", "none"), ("chain", "none")
"""Graders that can read conversations, and chains of questions: their golds are lists."""
GROUPS = ("engine.", "policy.", "sampling.", "model.", "hardware.")
"""Of the options that engine and sampling parameters check; errors that begin with one name it already."""
LAUNCHERS = ("local", "ray", "slurm")
LAUNCHED = {
    "accelerator": ("ray", "slurm"),
    "cpus": ("ray", "slurm"),
    "address": ("ray",),
    **dict.fromkeys(("gpus", "partition", "timeout", "array_parallelism", "parameters", "cluster"), ("slurm",)),
}
"""Options of a launcher, and which launchers have them."""


def check(experiment: Experiment) -> None:
    """Raise a UsageError that names the first option that is out of range, and what it must be."""
    model, workload, scenario, tracking = (
        getattr(experiment, g) for g in ("model", "workload", "scenario", "tracking")
    )
    threads, limit = experiment.hardware.threads, experiment.limit
    poisson, rate = scenario.arrival == "poisson", scenario.rate
    simulate = scenario.kind == "simulate"
    steady = (scenario.kind == "serve" or simulate) and scenario.arrival == "steady"
    turns = workload.turns is not None
    sampling, fidelity = experiment.sampling, scenario.kind == "fidelity"
    serve, repeats = scenario.kind in SERVED, scenario.repeats
    launcher = experiment.launcher
    own = sampling.policy is not None or sampling.budget_tokens is not None
    bounded = experiment.policy.name != "full" and serve and not own
    for option, ok, what in (
        ("model.path", model.path or model.wheel, "given: a folder, a hub id or a GGUF file"),
        ("workload.path", any(getattr(workload, name) for name in SOURCES), "given: a file of questions"),
        ("results_dir", experiment.results_dir, "given: a folder"),
        ("force", experiment.force in FORCE, " or ".join(FORCE)),
        ("limit", limit is None or limit >= 1, "at least 1, or null for all"),
        ("workload.template", "{question}" in workload.template, "a text that holds {question}"),
        ("workload.grader", not turns or workload.grader in OF_TURNS, "turns or none beside workload.turns"),
        ("workload.grader", turns or workload.grader != "turns", "another one without workload.turns"),
        (
            "workload.grader",
            workload.chain is None or workload.grader in OF_CHAINS,
            "chain or none beside workload.chain",
        ),
        ("sampling.ignore_eos", not (turns and sampling.ignore_eos), "false beside workload.turns"),
        ("sampling.min_tokens", not (turns and sampling.min_tokens), "0 beside workload.turns"),
        ("scenario.arrival", scenario.arrival in ARRIVALS, " or ".join(ARRIVALS)),
        (
            "policy.bytes_as",
            experiment.policy.bytes_as is None or bounded,
            "left out: with policy=full, sampling.policy, sampling.budget_tokens or a benchmark it bounds nothing",
        ),
        ("scenario.kind", scenario.kind in KINDS, " or ".join(KINDS)),
        (
            "scenario.loads",
            not (serve and scenario.loads),
            "left out: only scenario=engine_bench and scenario=serve_bench have loads",
        ),
        (
            "scenario.options",
            not (serve and scenario.options),
            "left out: only scenario=kernels, scenario=engine_bench and scenario=serve_bench have options",
        ),
        ("scenario.repeats", not (serve and repeats), "left out: only benchmarks repeat; take sampling.n or seed=0,1"),
        ("scenario.repeats", serve or (repeats is not None and repeats >= 1), "at least 1"),
        ("scenario.path", scenario.arrival != "trace" or scenario.path, "given: the file of a trace"),
        ("scenario.speed", 0 < scenario.speed < math.inf, "above 0: how many times as fast as in the trace"),
        ("scenario.speed", scenario.arrival == "trace" or scenario.speed == 1, "1 but for scenario=trace"),
        ("scenario.seconds", steady or scenario.seconds is None, "left out: only scenario=steady is timed so long"),
        ("scenario.seconds", not steady or 0 < (scenario.seconds or 0) < math.inf, "seconds, above 0"),
        ("sampling.policy", not steady or sampling.policy is None, "left out with scenario=steady"),
        ("sampling.budget_tokens", not steady or sampling.budget_tokens is None, "left out with scenario=steady"),
        (
            "workload.generator",
            not steady or workload.generator in OF_LENGTHS,
            f"{' or '.join(OF_LENGTHS)} with scenario=steady, which must know how long outputs are",
        ),
        (
            "backend",
            not steady or experiment.backend != "transformers",
            "another one with scenario=steady: its batches last to their end, so no request joins one at work",
        ),
        ("scenario.rate", not poisson or (rate is not None and 0 < rate < math.inf), "arrivals a second, above 0"),
        ("scenario.machine", not simulate or scenario.machine, "given: a name in conf/machine/, or a YAML file"),
        ("scenario.machine", simulate or scenario.machine is None, "left out: only scenario=simulate has a machine"),
        ("backend", not simulate or experiment.backend == "zipage", "zipage: no other engine is simulated"),
        ("backend", not fidelity or experiment.backend == "zipage", "zipage: no other tells its distributions"),
        ("sampling.n", not fidelity or sampling.n in (None, 1), "1: scenario=fidelity feeds one answer of full KV"),
        ("sampling.stop", not (fidelity and sampling.stop), "left out with scenario=fidelity: take stop_token_ids"),
        ("sampling.logprobs", not (fidelity and sampling.logprobs), "left out: scenario=fidelity compares all tokens"),
        ("tracking.backend", tracking.backend in ("none", "wandb"), "none or wandb"),
        ("tracking.mode", tracking.mode in ("offline", "online"), "offline or online"),
        ("tracking.project", WANDB_PROJECT.fullmatch(tracking.project), f"of wandb's form, {WANDB_PROJECT.pattern}"),
        ("tracking.group", tracking.group is None or 1 <= len(tracking.group) <= 128, "1 to 128 characters, or null"),
        ("tracking.tags", all(1 <= len(tag) <= 64 for tag in tracking.tags), "tags of 1 to 64 characters"),
        ("launcher.name", launcher.name in LAUNCHERS, " or ".join(LAUNCHERS)),
        *(
            (f"launcher.{name}", launcher.name in owners or not getattr(launcher, name), f"left out: {_only(owners)}")
            for name, owners in LAUNCHED.items()
        ),
        *(
            (
                f"launcher.{name}",
                getattr(launcher, name) is None or getattr(launcher, name) >= least,
                f"{least} or more",
            )
            for name, least in (("workers", 1), ("cpus", 1), ("gpus", 0), ("timeout", 1), ("array_parallelism", 1))
        ),
        ("launcher.cluster", launcher.cluster in (None, "slurm", "local"), "slurm or local"),
        ("hardware.threads", threads is None or threads >= 1, "at least 1, or null for torch's choice"),
    ):
        if not ok:
            raise UsageError(f"{option}={attrgetter(option)(experiment)!r}: must be {what}")
    for group, cls, options in (
        ("engine", EngineConfig, engine_options(experiment, model.path or str(model.member))),
        ("sampling", SamplingParams, vars(sampling) | ({"follow_ups": ((0,),)} if turns else {})),
    ):
        try:
            cls(**options)
        except ValueError as error:
            text = as_typed(str(error), experiment.policy.name)
            raise UsageError(text if text.startswith(GROUPS) else f"{group}: {text}") from error


def _only(launchers: tuple[str, ...]) -> str:
    return f"only launcher={' and launcher='.join(launchers)} {'has' if len(launchers) == 1 else 'have'} it"
