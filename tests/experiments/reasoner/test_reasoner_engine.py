"""The shipped reasoner thinks, through the engine, through transformers and through the main job."""

from __future__ import annotations

import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from experiments import run
from experiments.config.schema import ModelConfig, WorkloadConfig
from experiments.paths import REASONER
from experiments.records import load_requests, load_runs
from experiments.running.models import find_model
from experiments.running.prompts import PromptRenderer
from experiments.workloads import GENERATORS
from tests.tiny_models import transformers_greedy
from zipage import LLM, SamplingParams

SHORT = [
    ("chained_arithmetic", {"steps": 8, "recalls": 1, "distance": (32, 96), "restatements": 0, "distractors": 1}),
    ("program_trace", {"statements": 2, "iterations": 1}),
    ("fragility", {"distances": (128,), "kinds": ("turn",)}),
]
OPTIONS = [
    "model=reasoner",
    "hardware=cpu",
    "hardware.threads=1",
    "engine.block_size=64",
    "engine.num_blocks=64",
    "engine.max_model_len=1024",
    "limit=2",
]
SMALL_CHAIN = [
    "workload=chained_arithmetic",
    "workload.options.steps=8",
    "workload.options.recalls=1",
    "workload.options.distance=[32,96]",
    "workload.options.restatements=0",
    "workload.options.distractors=1",
]


@pytest.fixture(scope="module")
def llm() -> LLM:
    torch.set_num_threads(1)
    return LLM(str(REASONER), device="cpu", dtype="float32", block_size=16, num_blocks=128, max_model_len=1024)


@pytest.fixture(scope="module")
def problems():
    return [next(iter(GENERATORS[name](seed=0, count=1, **options))) for name, options in SHORT]


@pytest.fixture(scope="module")
def prompts(llm, problems) -> list[list[int]]:
    renderer = PromptRenderer(WorkloadConfig(name="any"), ModelConfig(), llm.get_tokenizer())
    return [renderer.render(problem).token_ids for problem in problems]


@pytest.fixture(scope="module")
def answers(llm, prompts):
    outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=500), use_tqdm=False)
    return [output.outputs[0] for output in outputs]


def test_answers_are_the_solutions(problems, answers):
    for problem, answer in zip(problems, answers, strict=True):
        assert answer.text == problem.solution
        assert answer.finish_reason == "stop"
        assert len(answer.token_ids) == problem.expected_tokens + 1, "a character a token, and the end"
        assert all(fact.known(answer.text) for fact in problem.facts)


def test_engine_equals_transformers(prompts, answers):
    model = AutoModelForCausalLM.from_pretrained(REASONER, dtype=torch.float32).eval()
    for prompt, answer in zip(prompts[:2], answers[:2], strict=True):
        assert transformers_greedy(model, prompt, len(answer.token_ids), answer.token_ids)[0] == answer.token_ids


def test_main_job_from_another_folder(tmp_path, monkeypatch, capsys):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr(sys, "argv", ["run", *OPTIONS, *SMALL_CHAIN, f"results_dir={tmp_path / 'runs'}"])
    assert run.main() == 0
    (_, row), *more = load_runs(tmp_path / "runs").iterrows()
    assert not more
    assert row["model.name"] == "zipage-reasoner"
    assert row["accuracy"] == row["facts_known"] == 1.0
    requests = load_requests(row)
    assert len(requests) == 2
    assert requests["grade"].tolist() == [1.0, 1.0]
    assert [known.tolist() for known in requests["facts_known"]] == [[True], [True]]
    assert all(0 < distances[0] < 130 for distances in requests["fact_distances"])
    assert requests["difficulty"].tolist() == ["8 steps, 1 recalls"] * 2
    assert (requests["output_tokens"] == requests["expected_tokens"] + 1).all()
    assert (requests["prompt_tokens"] == requests["prompt"].str.len() - len("<|user|><|assistant|>") + 2).all()
    heading, _, line = (part.split("|") for part in capsys.readouterr().out.splitlines() if part.startswith("|"))
    table = {name.strip(): cell.strip() for name, cell in zip(heading, line, strict=True)}
    assert table["facts"] == table["accuracy"] == "100.0%"


def test_lost_facts_lose_the_answer(tmp_path, monkeypatch):
    """The first of the same problems, in a cache that holds a third of it."""
    more = [*SMALL_CHAIN, "limit=1", "sampling.max_tokens=264", "policy=streaming", "policy.budget_tokens=96"]
    more += ["engine.block_size=16", "engine.num_blocks=128"]
    monkeypatch.setattr(sys, "argv", ["run", *OPTIONS, *more, f"results_dir={tmp_path / 'runs'}"])
    assert run.main() == 0
    (_, row), *_ = load_runs(tmp_path / "runs").iterrows()
    assert row["compressions"] > 0
    assert row["accuracy"] == row["facts_known"] == 0
    assert load_requests(row)["facts_known"][0].tolist() == [False]


def test_relative_path_in_the_working_folder_comes_first(tmp_path, monkeypatch):
    config = ModelConfig(path="models/zipage-reasoner")
    monkeypatch.chdir(tmp_path)
    assert find_model(config).path == REASONER
    own = tmp_path / "models" / "zipage-reasoner"
    own.mkdir(parents=True)
    (own / "config.json").write_text("{}")
    assert find_model(config).files.keys() == {"config.json"}


def test_system_prompt_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    more = [*SMALL_CHAIN, "workload.system_prompt=Think.", f"results_dir={tmp_path / 'runs'}"]
    monkeypatch.setattr(sys, "argv", ["run", *OPTIONS, *more])
    assert run.main() == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert "the model knows the roles user and assistant, not system" in errors
    assert "workload.system_prompt" in errors
