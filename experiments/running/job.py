"""One run from its options to its record."""

from __future__ import annotations

import hashlib
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import records
from experiments.analysis.metrics import in_window, summarise
from experiments.backends import BACKENDS, Backend, BackendFactory, get_backend
from experiments.config.check import SERVED
from experiments.config.notes import notes_before
from experiments.config.schema import Experiment, ModelConfig, WorkloadConfig, engine_options, to_dict
from experiments.config.typed import as_typed
from experiments.errors import RunError, UsageError, after_record, one_line
from experiments.graders import Grader, get_grader
from experiments.graders.ungraded import grade_none
from experiments.records import provenance, schemas, sources
from experiments.reporting.runs_table import latency_table, never_bound, runs_table, timed
from experiments.running import fidelity, outcomes, tracebacks
from experiments.running.equal_bytes import with_budget
from experiments.running.models import LocalModel, find_model, model_name
from experiments.running.prompts import Prompt, PromptRenderer
from experiments.running.quiet import errors_alone
from experiments.running.scenarios import Served, TimedRequest, arrival_times, serve
from experiments.running.steady import serve_steadily
from experiments.running.tracking import open_tracker
from experiments.running.turns import AnswerReader, answer_reader, turn_options
from experiments.simulation.backend import simulated
from experiments.simulation.machine import Machine, read_machine
from experiments.workloads import Problem, load_problems
from zipage import EngineConfig, EventStats, RequestMetrics, RequestOutput, SamplingParams, StepStats

if TYPE_CHECKING:
    import pandas as pd


def run(experiment: Experiment, backends: Mapping[str, BackendFactory] = BACKENDS, shows: bool = True) -> Path:
    """Do one run, or find it done.

    Args:
        shows: its table when it is done.

    Returns:
        The run's folder.

    Raises:
        UsageError: the run can't be done as asked; nothing was recorded.
        RunError: it began and failed; nothing was recorded but a traceback beside it.
    """
    return carry_out(prepare(experiment, backends), shows)


def carry_out(job: Job, shows: bool = True) -> Path:
    """`run` of a job that is prepared."""
    folder = job.folder  # reads a trace too, so that its faults show before the model is loaded
    if job.is_done():
        return _found(job, shows)
    for line in job.notes:
        print(f"note: {line}", flush=True)
    with records.claim(folder) as staging:
        if job.is_done():
            return _found(job, shows)  # made by another process while this one waited
        records.publish(staging, folder, job.record(staging))
    with after_record():
        _show(records.load_runs(folder), shows)
    return folder


def prepare(
    experiment: Experiment,
    backends: Mapping[str, BackendFactory] = BACKENDS,
    load_problems: Callable[[WorkloadConfig, int | None], list[Problem]] = load_problems,
    find_model: Callable[[ModelConfig], LocalModel] = find_model,
    command: Sequence[str] | None = None,
) -> Job:
    """Get hold of all that a run needs, but load no model.

    Args:
        command: that the record names, after Python; None: this process's.

    Raises:
        UsageError: the run can't be done as asked.
    """
    if experiment.scenario.kind not in SERVED:
        raise UsageError(f"scenario={experiment.scenario.name}: a benchmark can't be an arm of a sweep; run it alone")
    experiment = replace(experiment, model=replace(experiment.model, name=model_name(experiment.model)))
    records.check_writable(Path(experiment.results_dir).expanduser())
    grader_of(experiment)
    factory = get_backend(experiment.backend, backends)
    if experiment.scenario.kind == "simulate":
        factory = simulated(read_machine(experiment.scenario.machine))
    arrival_times(experiment.scenario, 0)  # a trace's faults under the name of the option that was given
    problems = load_problems(experiment.workload, experiment.limit)
    model = find_model(experiment.model)
    experiment, memory = with_budget(experiment, model.path)
    return Job(experiment, factory, problems, model, command, memory)


def _show(runs: pd.DataFrame, table: bool) -> None:
    """Print the table of a single run, what must be known to read it, and where its record lies; or just the latter."""
    run = runs.iloc[0]
    if table:
        print(runs_table(runs))
    if table and timed(runs).any():
        print(latency_table(runs))
    if table and never_bound(run):
        print("the budget never bound: no request was compressed, so this run equals full KV")
    print(f"record: {run['path']}", flush=True)


def _found(job: Job, shows: bool) -> Path:
    with after_record():
        print("already done; force=true runs it again")
        _show(records.load_runs(job.folder), shows)
        if job.standing.state == "stale":
            print(f"note: this run is stale: {job.standing.reason}; force=stale runs it again", flush=True)
    return job.folder


@dataclass(frozen=True)
class Job:
    """A run whose questions and model are at hand.

    Attributes:
        memory: a line on the budget, where it comes of another policy's bytes.
        accelerator: where it will run, as `provenance.device_name` tells it there; None: here.
    """

    experiment: Experiment
    factory: BackendFactory
    problems: list[Problem]
    model: LocalModel
    command: Sequence[str] | None = None
    memory: str | None = None
    accelerator: str | None = None

    @cached_property
    def notes(self) -> list[str]:
        """Lines on what to know before the run."""
        return [self.memory] * bool(self.memory) + notes_before(self.experiment, self.problems)

    @property
    def options(self) -> dict[str, Any]:
        return to_dict(self.experiment)

    @cached_property
    def data(self) -> str:
        """Content hash of the questions with golds, lengths and solutions that are read, and of a trace's arrivals."""
        lengths = {p.id: [p.prompt_tokens, p.output_tokens] for p in self.problems if p.prompt_tokens is not None}
        fed = self.experiment.scenario.kind == "fidelity"
        worked = {p.id: p.worked for p in self.problems if fed and p.worked}
        traced = self.experiment.scenario.arrival == "trace"
        arrivals = arrival_times(self.experiment.scenario, len(self.problems)) if traced else []
        questions = [
            [p.id, p.question, p.gold, *p.history, *([] if p.error is None else [p.error]), *p.follow_ups, *p.pieces]
            for p in self.problems
        ]
        return records.content_hash(questions + [part for part in (lengths, arrivals, worked) if part])

    @cached_property
    def calibration(self) -> str | None:
        """sha256 of the calibration file that the policy reads; None where it reads none."""
        return sources.calibration(self.experiment)

    @cached_property
    def machine(self) -> Machine | None:
        """That the engine is simulated on; None for a real one."""
        scenario = self.experiment.scenario
        return read_machine(scenario.machine) if scenario.kind == "simulate" else None

    @cached_property
    def run_id(self) -> str:
        device = self.experiment.hardware.device
        if self.machine is not None:
            device = f"simulated {records.content_hash(asdict(self.machine))}"
        elif device == "cpu" or self.accelerator is None:
            device = provenance.device_name(device)
        else:
            device = self.accelerator
        own = sources.own_policies(self.experiment)
        if self.calibration is not None:
            own |= {records.CALIBRATION: self.calibration}
        template = Path(self.experiment.model.chat_template).expanduser()
        if template.is_file():
            own |= {"chat_template": records.file_hash(template)}
        return records.run_id(self.options, model=self.model.identity, data=self.data, device=device, files=own)

    @property
    def standing(self) -> sources.Standing:
        """What there is of the run already."""
        return sources.standing(self.folder, sources.hashes(self.experiment))

    @property
    def needs_tokenizer(self) -> bool:
        """Not where the model has none, as the shapes of models, and the prompts are of given lengths alone."""
        return self.model.has_tokenizer or any(problem.prompt_tokens is None for problem in self.problems)

    def is_done(self) -> bool:
        """Whether the record that is there stays.

        Raises:
            UsageError: it is damaged, and `force` does not allow replacing it.
        """
        standing = self.standing
        if standing.state == "damaged" and self.experiment.force == "false":
            raise UsageError(f"{self.folder}: its record is damaged ({standing.reason}); force=stale replaces it")
        return standing.is_kept(self.experiment.force)

    @property
    def folder(self) -> Path:
        """Where the record lies, or will."""
        return Path(self.experiment.results_dir).expanduser() / self.run_id

    def record(self, staging: Path) -> dict[str, Any]:
        """Run, write all of the record but its metrics into `staging`, and return the metrics."""
        kept = {key: value for key, value in self.options.items() if key not in ("results_dir", "force")}
        records.write_config(staging, kept)
        tracker = open_tracker(self.experiment.tracking, self.run_id, kept, staging.parent)
        metrics: dict[str, Any] | None = None
        try:
            code, hashes = provenance.code_state(), sources.hashes(self.experiment)  # they may change later
            started, begin = provenance.now(), time.perf_counter()
            backend = self._load(staging)
            load_seconds = time.perf_counter() - begin
            print(f"memory plan: {backend.memory_plan}", flush=True)
            tokenizer = backend.get_tokenizer() if self.needs_tokenizer else None
            renderer = PromptRenderer(self.experiment.workload, self.experiment.model, tokenizer)
            rendered = iter(renderer.render_all([p for p in self.problems if p.error is None]))
            prompts = [Prompt("", []) if p.error is not None else next(rendered) for p in self.problems]
            steps: list[StepStats] = []
            backend.step_listeners += [steps.append, tracker.log_step]
            events: list[EventStats] = []
            backend.event_listeners.append(events.append)
            with tracebacks.kept_in(staging / records.TRACEBACK):
                served, measured = self._serve(backend, prompts, steps, events, staging)

            reader = answer_reader(backend.get_tokenizer(), self.experiment.sampling)
            request_rows = self._grade(prompts, served, staging / records.TRACEBACK, reader)
            counters = {"counters": asdict(backend.stats)}
            if measured is not None:
                request_rows = [row | outcomes.fidelity(measured, row["prompt_id"]) for row in request_rows]
                counters = outcomes.fidelity_counters(measured)
                _say_unmeasured(measured)
            step_rows = outcomes.step_rows(steps, served.start)
            event_rows = outcomes.event_rows(events, served.start)
            evicts = self.experiment.policy.name != "full"
            memory = asdict(backend.memory_plan)
            summary = summarise(
                request_rows,
                step_rows,
                event_rows,
                seconds=served.seconds,
                evicts=evicts,
                memory=memory,
                timed=self.experiment.scenario.arrival not in ("all_at_once", "steady"),
            )
            if served.window is not None:
                summary |= in_window(step_rows, event_rows, served.window, evicts=evicts)
            metrics = summary | {"load_seconds": load_seconds, "memory": memory} | counters
            schemas.write_rows(staging / records.REQUESTS, request_rows, schemas.REQUEST_SCHEMA)
            schemas.write_rows(staging / records.STEPS, step_rows, schemas.STEP_SCHEMA)
            schemas.write_rows(staging / records.EVENTS, event_rows, schemas.EVENT_SCHEMA)
            times = {"started": started, "ended": provenance.now()}
            origin = provenance.collect(self.command, self.machine, code) | {"sources": hashes} | times
            origin |= self._inputs(prompts, renderer)
            records.write_json(staging / records.PROVENANCE, origin)
            tracker.log_record(staging, request_rows)
            if hasattr(backend, "shutdown"):
                backend.shutdown()
            return metrics
        finally:
            tracker.finish(metrics)

    def _load(self, staging: Path) -> Backend:
        if self.experiment.hardware.threads is not None:
            import torch

            torch.set_num_threads(self.experiment.hardware.threads)
        options = engine_options(self.experiment, str(self.model.path))
        if not self.needs_tokenizer:
            options["skip_tokenizer_init"] = True
        try:
            with errors_alone("zipage.config.rounding"):  # `notes` have it
                return self.factory(**options)
        except (ValueError, FileNotFoundError) as error:
            raise UsageError(f"the model can't be loaded: {self._typed(' '.join(str(error).split()))}") from error
        except Exception as error:
            raise _failure("loading the model failed", error, staging) from error

    def _typed(self, text: str) -> str:
        """What the engine says, in the names that a run's user types."""
        return as_typed(text, self.experiment.policy.name)

    def _serve(
        self,
        backend: Backend,
        prompts: list[Prompt],
        steps: list[StepStats],
        events: list[EventStats],
        staging: Path,
    ) -> tuple[Served, fidelity.Measured | None]:
        """What came of the requests, and with `scenario=fidelity` what was measured on the way."""
        arrivals = arrival_times(self.experiment.scenario, len(prompts))
        requests = [
            TimedRequest(problem.id, prompt.token_ids, sampling_params(self.experiment, problem, prompt), arrival)
            for problem, prompt, arrival in zip(self.problems, prompts, arrivals, strict=True)
            if problem.error is None
        ]
        measured = None
        try:
            if self.experiment.scenario.kind == "fidelity":
                measured = fidelity.measure(backend, requests, self._worked(backend), [steps, events])
                served = measured.own.served
            elif self.experiment.scenario.arrival == "steady":
                served = self._serve_steadily(backend, requests)
            else:
                served = serve(backend, requests)
        except RunError:
            raise
        except Exception as error:
            raise _failure(f"the engine failed after {len(steps)} steps", error, staging) from error
        for problem in self.problems:
            if problem.error is not None:
                metrics = RequestMetrics(arrival=served.start)
                served.outputs[problem.id] = RequestOutput(problem.id, None, [], [], metrics, error=problem.error)
        return served, measured

    def _serve_steadily(self, backend: Backend, requests: list[TimedRequest]) -> Served:
        scenario = self.experiment.scenario
        config = EngineConfig(**engine_options(self.experiment, str(self.model.path)))
        return serve_steadily(backend, requests, config, seconds=scenario.seconds, seed=scenario.seed)

    def _worked(self, backend: Backend) -> dict[str, list[int]]:
        """Tokens of the worked solutions that the workload has, by problem."""
        tokenizer = backend.get_tokenizer()
        solved = [problem for problem in self.problems if problem.error is None and problem.worked]
        return {p.id: list(tokenizer(p.worked, add_special_tokens=False)["input_ids"]) for p in solved}

    def _grade(self, prompts: list[Prompt], served: Served, trace: Path, reader: AnswerReader) -> list[dict[str, Any]]:
        """The graded rows; says in a line what was refused or could not be graded.

        Args:
            trace: file of the tracebacks of errors, if there were any.
            reader: of the answers of a conversation.

        Raises:
            RunError: not one sample was answered.
        """
        grader, samples = grader_of(self.experiment), self.experiment.sampling.n
        rows: list[dict[str, Any]] = []
        for problem, prompt in zip(self.problems, prompts, strict=True):
            output = served.outputs.get(problem.id)
            if output is None and served.window is not None:
                continue  # still at work, or never handed over
            problem = problem if self.machine is None else replace(problem, facts=())  # a simulated text holds none
            rows += outcomes.request_rows(problem, prompt, output, samples, grader, served.start, reader)
        for column, what in (("error", "could not be answered"), ("grader_error", "could not be graded, score 0")):
            faults = [row for row in rows if row.get(column) is not None]
            if not faults:
                continue
            fault = faults[0][column]
            first = f"the first is {faults[0]['prompt_id']}: {self._typed(fault) if column == 'error' else fault}"
            line = f"{len(faults)} of {len(rows)} samples {what}; {first}"
            if column == "error" and len(faults) == len(rows) and served.window is None:
                raise RunError(line + f" (nothing was recorded; traceback: {trace})" * trace.exists())
            if column == "error" and trace.exists():
                line += f" (traceback: {self.folder / trace.name})"
            print(line, flush=True)
        return rows

    def _inputs(self, prompts: list[Prompt], renderer: PromptRenderer) -> dict[str, Any]:
        """Seeds, and hashes of all that went in."""
        seeds = {name: getattr(self.experiment, name).seed for name in ("workload", "scenario")}
        return {
            "seeds": {"run": self.experiment.seed} | seeds,
            "model_files": self.model.files,
            **({} if self.calibration is None else {"calibration": self.calibration}),
            "data": self.data,
            "prompts": hashlib.sha256("\0".join(prompt.text for prompt in prompts).encode()).hexdigest(),
            "chat_template": renderer.chat_template_hash,
        }


def _say_unmeasured(measured: fidelity.Measured) -> None:
    """A line on full KV's outputs that could not be compared, and one on such worked solutions."""
    for texts, what in ((measured.own, "outputs of full KV"), (measured.worked, "worked solutions")):
        if texts is not None and texts.unmeasured:
            (first, why), *_ = texts.unmeasured.items()
            count = len(texts.unmeasured) + len(texts.fidelity)
            line = f"{len(texts.unmeasured)} of {count} {what} could not be measured; the first is {first}: {why}"
            print(line, flush=True)


def grader_of(experiment: Experiment) -> Grader:
    """Full KV's answers, which `scenario=fidelity` feeds to all policies alike, are not graded, nor are simulated ones.

    Raises:
        UsageError: it can't grade here.
    """
    if experiment.scenario.kind in ("fidelity", "simulate"):
        return grade_none
    return get_grader(experiment.workload.grader, experiment.workload.allow_code_execution)


def sampling_params(experiment: Experiment, problem: Problem, prompt: Prompt | None = None) -> SamplingParams:
    """The request's options. Its seed depends on the run's seed and the problem alone, whatever runs beside it.

    Args:
        prompt: of the problem; needed for a conversation, whose later turns it holds.
    """
    options = dict(vars(experiment.sampling))
    if options["seed"] is None:
        options["seed"] = int.from_bytes(hashlib.sha256(f"{experiment.seed}/{problem.id}".encode()).digest()[:4]) >> 1
    if problem.output_tokens is not None:
        options["max_tokens"] = problem.output_tokens
    if prompt is not None and prompt.follow_ups:
        options |= turn_options(experiment.sampling, prompt)
    return SamplingParams(**options)


def _failure(what: str, error: Exception, staging: Path) -> RunError:
    trace = staging / records.TRACEBACK
    trace.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    return RunError(f"{what}: {one_line(error)} (nothing was recorded; traceback: {trace})")
