"""Every command, Python block and sweep of the documents and of `--help` works: each is carried out here, made small.

Runs are made on a tiny model where theirs is one of the hub. What takes a GPU, a network or minutes is carried out as
far as it goes without them; the function that does it says how far. A command that no function takes fails.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import inspect
import re
import shlex
import shutil
import sys
import threading
import tomllib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from experiments import bench, run
from experiments.backends import BACKENDS
from experiments.bench import engine
from experiments.config.arms import expand, split_command_line
from experiments.config.compose import load_experiment
from experiments.config.schema import Experiment
from experiments.graders import get_grader
from experiments.paths import CONF, ROOT
from experiments.records import load_runs
from experiments.running import sweep
from experiments.workloads import load_problems
from experiments.workloads.problem import Problem
from tests.experiments.document_programs import calibrate_a_little, planned, send_body, simulate, train_a_little
from tests.experiments.workloads.test_workload_configs import ITEMS, write
from tests.serve.running import RunningServer, answers, free_port, wait_until
from tests.tiny_models import save_tiny_model, save_tiny_tokenizer
from zipage import LLM, SamplingParams
from zipage.eviction.budget import Budget
from zipage.models.decoder import Decoder
from zipage.serve.cli import serve
from zipage.serve.server import Server

HELP = CONF / "hydra" / "help" / "zipage.yaml"
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "results" / "README.md",
    HELP,
]
PROGRAMS = ("python ", "make ", "pip ", "wandb ", "jupyter ", "zipage ", "curl ")
HARNESS = "python -m experiments.run"
BENCHMARKS = {"scenario=kernels", "scenario=engine_bench", "scenario=serve_bench"}
RECORD_READERS = ("experiments.report", "experiments.regrade", "experiments.archive", "experiments.bench")
BENCHMARK = ROOT / "results" / "records" / "engine_bench_ample_vllm_h100"


def text_of(document: Path) -> str:
    text = document.read_text(encoding="utf-8")
    return yaml.safe_load(text)["template"] if document == HELP else text


def commands_of(text: str) -> Iterator[str]:
    """Commands in fenced and indented blocks and in code spans, without the comments behind them."""
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        command = re.split(r"\s+#|\s{4,}", line.strip())[0]
        if command.startswith(PROGRAMS) and "`" not in line:
            yield command
    for span in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if span.startswith(PROGRAMS):
            yield " ".join(span.split())
        elif span.startswith("+sweep="):
            yield f"{HARNESS} {span}"


def blocks_of(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


COMMANDS = list(dict.fromkeys(command for path in DOCUMENTS for command in commands_of(text_of(path))))
RUNS = [command for command in COMMANDS if command.startswith(f"{HARNESS} ") and "--" not in command]


FIRST_PAGE = next(command for command in COMMANDS if "--html" in command).split()[3:]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """What stands in for models of the hub: random weights and a tokenizer of bytes."""
    folder = save_tiny_model("qwen3", tmp_path_factory.mktemp("tiny"))
    save_tiny_tokenizer(folder)
    return folder


@pytest.fixture
def small(tiny, tmp_path) -> Callable[[list[str]], list[str]]:
    """Options of `experiments.run` with others in the place of those that make it large or ask the hub."""

    def small(given: list[str]) -> list[str]:
        instead: dict[str, Any] = {"results_dir": tmp_path / "small", "hardware": "cpu"}
        if "scenario=serve_bench" in given:
            del instead["hardware"]  # vLLM takes a GPU, and nothing is started here
        if not BENCHMARKS & set(given):
            instead["limit"] = 1
            if any(option.startswith("+sweep") for option in given):
                instead["seed"] = 0
            else:
                instead |= {"sampling.max_tokens": 8, "tracking": "none"}  # test_tracking.py has wandb
                if "backend=transformers" not in given:
                    instead["engine.num_blocks"] = 64
            if not {"model=reasoner", "+sweep=demo", "+sweep=[paper_table1,small]"} & set(given):
                instead |= {"model": "hf", "model.path": tiny}
        for name in ("gsm8k", "math500"):
            if {f"workload={name}", f"+sweep=qwen_{name}"} & set(given):
                instead["workload.path"] = write(tmp_path / f"{name}.jsonl", ITEMS[name])
        if "+sweep=paper_table1" in given:
            instead["workload.path"] = write(tmp_path / "amc23.jsonl", ITEMS["amc23"])
        if "workload=lengths" in given:
            instead |= {"workload.options.prompt_tokens": 8, "workload.options.output_tokens": 8}
        kept = [option for option in given if option.partition("=")[0] not in instead]
        return kept + [f"{option}={value}" for option, value in instead.items()]

    return small


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("made") / "runs"


@pytest.fixture
def runs(launch, results, made) -> Path:
    """Finished runs of one workload: full KV, `zipage` and `random`, made by the first test that asks for them."""
    if not made.exists():
        common = ("policy.budget_tokens=48", "engine.block_size=16", "engine.trace_positions=true")
        for policy in ("full", "zipage", "random"):
            assert launch(f"policy={policy}", *common) == 0
        results.rename(made)
    shutil.copytree(made, results)
    return results


def make_run(given: list[str], request) -> None:
    """A run is made. Of a sweep every arm is prepared, and of a benchmark its loads: all but the loading of a model."""
    patch, output = request.getfixturevalue("monkeypatch"), request.getfixturevalue("capsys")
    options = request.getfixturevalue("small")(given)
    sweeps, arguments = split_command_line(options)
    if "--dry-run" in options or any(option.startswith("+arms=") for option in options):
        patch.setattr(sys, "argv", ["experiments.run", *dict.fromkeys([*options, "--dry-run"])])
        assert run.main(BACKENDS) == 0, output.readouterr().err
        assert output.readouterr().out.startswith("sweep ")
    elif sweeps:
        arms = planned(sweeps, [a for a in arguments if a != "+share_model=true"], " ".join(given))
        assert all(arm.sampling.max_tokens > held(arm) for arm in arms)
    elif BENCHMARKS & set(given):
        patch.setattr(engine, "_check_memory", lambda *_: None)  # as where there is a GPU
        experiment = load_experiment(options)
        bench.BENCHES[experiment.scenario.kind].prepare(experiment, BACKENDS)
    else:
        only_shows = not given or given[0].startswith("--")
        patch.setattr(sys, "argv", ["experiments.run", *((given or ["--help"]) if only_shows else options)])
        try:
            code = run.main(BACKENDS)
        except SystemExit as shown:  # Hydra's way to end behind --help
            code = shown.code
        assert code == 0, output.readouterr().err
        if not only_shows:
            arms = prod(option.count(",") + 1 for option in given if "-m" in given and "[" not in option)
            assert len(load_runs(request.getfixturevalue("tmp_path") / "small")) == arms


def held(experiment: Experiment) -> int:
    """Entries that a request may hold, in each layer and head; one whose output is no longer shows full KV."""
    if experiment.policy.name == "full":
        return 0
    return Budget.from_tokens(experiment.policy.budget_tokens, experiment.engine.block_size).peak


def read_records(module: str, given: list[str], request) -> None:
    """`report`, `regrade`, `archive` and `bench` read records that are shipped, or made here by three short runs."""
    runs, written = request.getfixturevalue("runs"), request.getfixturevalue("tmp_path") / "written"
    written.mkdir()
    stand_ins = {"RECORD": BENCHMARK, "ARM": "vllm", "RUN": runs, "results/runs": runs}
    arguments = []
    for before, argument in zip(["", *given], given):
        if before in ("--html", "--tables", "--to", "--picture", "--pictures"):
            stand_ins[argument] = written / Path(argument).name
        elif argument.startswith(("results/runs/sweeps/demo-", "results/records/")):
            stand_ins[argument] = runs
            assert "sweeps/demo-" in argument or (ROOT / argument).is_dir()
        arguments.append(str(stand_ins.get(argument, argument)))
    if "--html" in given and given != FIRST_PAGE:  # one page is enough, they take seconds
        at = arguments.index("--html")
        del arguments[at : at + 2]
    if "--allow-code-execution" in given:  # these answers are no programs: test_code_grader.py has some
        request.getfixturevalue("monkeypatch").setattr("experiments.regrade.get_grader", lambda *_: get_grader("exact"))
    output = request.getfixturevalue("capsys")
    program = importlib.import_module("experiments.bench.__main__" if module == "experiments.bench" else module)
    assert program.main(arguments or [str(runs)]) == 0, output.readouterr().err
    assert output.readouterr().out


def read_training_options(given: list[str], request) -> None:
    """Training takes a GPU and minutes: test_reasoner_training.py trains a little."""
    asked = []
    record = {"parameters": 1, "curve": [{"tokens": 1, "seconds": 1.0}]}
    patch = request.getfixturevalue("monkeypatch")
    patch.setattr("experiments.train_reasoner.train", lambda *options: asked.append(options) or record)
    assert importlib.import_module("experiments.train_reasoner").main(given) == 0
    assert len(asked) == 1


def find_script(file: str, given: list[str]) -> None:
    """It takes a GPU, or writes a picture into the tree: it is there and knows the options."""
    source = (ROOT / file).read_text(encoding="utf-8")
    for option in given:
        assert not option.startswith("--") or f'"{option}"' in source


def serve_model(given: list[str], request) -> None:
    """A server starts, answers and is stopped."""
    patch = request.getfixturevalue("monkeypatch")
    servers: list[Server] = []

    def make(*arguments: Any) -> Server:
        servers.append(Server(*arguments))
        return servers[0]

    patch.setattr("zipage.serve.server.Server", make)
    patch.setattr("zipage.serve.server.SWITCH", sys.getswitchinterval())
    port, codes = free_port(), []
    small = ["--port", str(port), "--device", "cpu", "--num-blocks", "64"]
    options = [str(request.getfixturevalue("tiny")), *given[1:], *small]
    thread = threading.Thread(target=lambda: codes.append(serve(options)))
    thread.start()
    url = f"http://127.0.0.1:{port}"
    wait_until(lambda: not thread.is_alive() or answers(url), 60)
    assert httpx.post(f"{url}/v1/completions", json={"prompt": "x", "max_tokens": 2}, timeout=30).status_code == 200
    servers[0].should_exit = True
    thread.join(30)
    assert codes == [0]


def find_target(given: list[str]) -> None:
    """It installs, or runs all tests."""
    assert re.search(rf"^{given[0]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)


def find_tests(given: list[str]) -> None:
    """They are run anyway."""
    paths = [argument for argument in given if argument.startswith("tests")]
    assert paths
    assert all((ROOT / path).exists() for path in paths)


def find_extra(given: list[str]) -> None:
    """It fetches packages."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert re.findall(r"\.\[([\w-]+)\]", " ".join(given))[0] in extras


ELSEWHERE = {
    **dict.fromkeys(
        ("zipage serve MODEL", "zipage serve MODEL [options]", "python -m zipage.serve MODEL", "zipage serve"),
        "the form of the others",
    ),
    "zipage serve --help": "test_command_line.py",
    f"{HARNESS} [GROUP=CHOICE | GROUP.OPTION=VALUE | OPTION=VALUE] ...": "the form of the others",
    "jupyter lab notebooks": "a server; test_notebooks.py runs the notebooks",
    "wandb sync results/runs/wandb/offline-run-*": "a network; test_tracking.py makes such folders",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_works(command, request):
    if command in ELSEWHERE:
        return
    program, *given = shlex.split(command.replace("$(git rev-parse HEAD)", "COMMIT"))
    if program == "make":
        find_target(given)
    elif program == "zipage":
        assert given[0] == "serve"
        serve_model(given[1:], request)
    elif program == "curl":
        send_body(given, request)
    elif program == "pip":
        find_extra(given)
    elif program == "python" and given[0].endswith(".py"):
        find_script(given[0], given[1:])
    elif program == "python" and given[1] == "experiments.run":
        make_run(given[2:], request)
    elif program == "python" and given[1] in RECORD_READERS:
        read_records(given[1], given[2:], request)
    elif program == "python" and given[1] == "experiments.train_reasoner":
        read_training_options(given[2:], request)
    elif program == "python" and given[1] == "experiments.calibrate":
        calibrate_a_little(given[2:], request)
    elif program == "python" and given[1] == "experiments.train_scorer":
        train_a_little(given[2:], request)
    elif program == "python" and given[1] in ("experiments.simulate", "experiments.simulation.fit"):
        simulate(given[1], given[2:], request)
    elif program == "python" and given[1] == "pytest":
        find_tests(given[2:])
    elif program == "python" and given[1].startswith("tests."):
        find_script(given[1].replace(".", "/") + ".py", given[2:])
    else:
        pytest.fail("nothing here carries it out")


def test_commands_are_found():
    assert {"make demo", f"{HARNESS} scenario=kernels", f"{HARNESS} +sweep=[paper_table1,small]"} <= set(COMMANDS)
    assert len(COMMANDS) > 40
    text = "a\n```\npython -m x y \\\n    z=1   # why\n```\n\n    make w\n\n`pip install q` and `+sweep=s`"
    assert list(commands_of(text)) == ["python -m x y z=1", "make w", "pip install q", f"{HARNESS} +sweep=s"]


@pytest.mark.parametrize("command", RUNS)
def test_files_that_are_named_are_there(command):
    for option in shlex.split(command):
        name, _, value = option.partition("=")
        if name.endswith(".path") and name != "model.path":
            assert (ROOT / value).is_file()


@pytest.mark.parametrize("command", [c for c in RUNS if "policy" in c and "+sweep=" not in c])
def test_the_budget_that_is_shown_binds(command):
    """Outputs are longer than a request may hold, or else the example shows full KV."""
    for arm in expand([], [option for option in shlex.split(command)[3:] if option != "-m"]):
        experiment = load_experiment(arm)
        if bound := held(experiment):
            assert experiment.sampling.max_tokens > bound
            assert all(_entries(p) > bound for p in load_problems(experiment.workload))


def _entries(problem: Problem) -> int:
    """Of a request at its end: of its solution, where the model is one of characters, or as its workload says."""
    if problem.output_tokens is not None:
        return problem.prompt_tokens + problem.output_tokens
    return len(problem.question) + problem.expected_tokens


@pytest.fixture
def served(tiny) -> Iterator[str]:
    """The address of a server of the tiny model."""
    llm = {"policy": "zipage", "budget_tokens": 512, "device": "cpu", "block_size": 16, "num_blocks": 256}
    server = RunningServer(lambda: LLM(str(tiny), **llm), served_model_name=[str(tiny)])
    yield server.url
    server.stop()


def test_python_blocks_work(tiny, runs, served, capsys):
    """Those of a document after each other, as one reads them."""
    for document in DOCUMENTS:
        names: dict[str, Any] = {}
        for block in blocks_of(text_of(document), "python"):
            if "@register" in block or SIGNATURE.search(block):  # test_example.py; the test below
                continue
            for shown, made_small in SMALL.items():
                block = block.replace(shown, made_small.format(tiny=tiny, runs=runs, served=served))
            exec(compile(block, document.name, "exec"), names)
    assert capsys.readouterr().out


def test_the_readme_evicts_offline_too(monkeypatch):
    """Its eight lines with what it says to write instead: the model of the clone, some of its tokens."""
    monkeypatch.chdir(ROOT)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    made, params = re.search(
        r"^Offline.*?`(LLM\(.*?\))` and `(SamplingParams\(.*?\))`", text, re.DOTALL | re.M
    ).groups()
    llm = eval(made.replace(")", ", device='cpu', num_blocks=64)"), {"LLM": LLM})
    params = eval(params, {"SamplingParams": SamplingParams})
    assert params.max_tokens >= 512
    llm.generate("Why is the sky blue?", replace(params, max_tokens=140), use_tqdm=False)
    assert llm.stats.entries_evicted > 0


SIGNATURE = re.compile(r"^(?:    def )?(\w+)\(([^()]*)\) ->", flags=re.MULTILINE)
"""A function as the documents write it, with what it returns."""


def test_signatures_are_those_of_the_code():
    """But for `attention`, `observe` and `recurrence`, which are whatever the model is handed."""
    blocks = [block for path in DOCUMENTS for block in blocks_of(text_of(path), "python") if "@register" not in block]
    found = {
        name: [part.split(":")[0].strip("* \n") for part in written.split(",")]
        for name, written in SIGNATURE.findall("".join(blocks))
    }
    assert len(found) > 15
    del found["attention"], found["observe"], found["recurrence"]
    for name, written in found.items():
        spec = importlib.util.find_spec(f"kernels.{name}")
        function = getattr(importlib.import_module(spec.name) if spec else Decoder, name)
        parameters = list(inspect.signature(function).parameters)
        assert parameters == [part.split("=")[0] for part in written if part], name


SMALL = {
    "Qwen/Qwen3-0.6B": "{tiny}",
    "http://127.0.0.1:8000": "{served}",
    "max_completion_tokens=30_000": "max_completion_tokens=100",
    "max_tokens=30_000": "max_tokens=100",
    "max_turn_tokens=512": "max_turn_tokens=16",
    "max_tokens=None, logprobs": "max_tokens=8, logprobs",
    "max_tokens=512": "max_tokens=8",
    "budget_tokens=2048": "budget_tokens=512",
    "load_runs()": 'load_runs("{runs}")',
}


def test_sweep_that_is_shown_can_be_planned(tmp_path):
    (block,) = blocks_of(text_of(ROOT / "docs" / "harness.md"), "yaml")
    (tmp_path / "own.yaml").write_text(block, encoding="utf-8")
    arms = [f"results_dir={tmp_path}", "hardware=cpu"]
    assert len(sweep.plan([str(tmp_path / "own.yaml")], arms, BACKENDS)) == 5


def test_the_sweep_over_how_much_a_model_thinks(tmp_path):
    (block,) = blocks_of(text_of(ROOT / "docs" / "workloads.md"), "yaml")
    (tmp_path / "own.yaml").write_text(block, encoding="utf-8")
    arms = [load_experiment(arm) for arm in expand([str(tmp_path / "own.yaml")])]
    asked = [(arm.workload.name, arm.policy.name, arm.model.chat_template_options) for arm in arms]
    thoughts = [("gsm8k", {"enable_thinking": True}), ("gsm8k", {"enable_thinking": False}), ("math500", {})]
    expected = [(workload, policy, told) for workload, told in thoughts for policy in ("full", "zipage")]
    assert sorted(map(str, asked)) == sorted(map(str, expected))


def test_an_engine_that_is_deleted_is_gone_at_once(tiny):
    """docs/engine.md makes a second one, which on CUDA finds memory only where nothing of the first is left."""
    gc.disable()
    try:
        llm = LLM(str(tiny), policy="zipage", budget_tokens=32, device="cpu", block_size=16, num_blocks=32)
        llm.generate("abc", SamplingParams(max_tokens=80, ignore_eos=True), use_tqdm=False)
        assert llm.stats.compressions_applied
        left = [weakref.ref(part) for part in (llm, llm._core.runner.decoder, llm._core.compressor._cache)]
        llm.shutdown()
        del llm
        assert [part() for part in left] == [None, None, None]
    finally:
        gc.enable()
