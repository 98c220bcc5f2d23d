"""`python -m experiments.calibrate`, and the files that come with the shipped reasoner."""

import json
import re
from itertools import islice

import pytest
import torch
from safetensors import safe_open

from experiments import calibrate, train_scorer
from experiments.calibration.answers import answered
from experiments.calibration.corpora import TASKS, TOPICS, corpus, corpus_for
from experiments.errors import UsageError
from experiments.paths import REASONER
from experiments.workloads import GENERATORS
from experiments.workloads.problem import Problem
from experiments.workloads.splits import HELD_OUT, TRAIN, split_of
from tests.tiny_models import save_tiny_model, save_tiny_tokenizer
from zipage import LLM


def contents(path) -> tuple[dict, dict[str, torch.Tensor]]:
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["calibration"])
        return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict


def test_the_reasoners_corpus_is_apart_from_every_workload():
    asked = [turns[-1]["content"] for turns in islice(corpus("reasoner", 0), 40)]
    histories = [turns[:-1] for turns in islice(corpus("reasoner", 0), 40)]
    for question, history in zip(asked, histories, strict=True):
        pairs = tuple((user["content"], answer["content"]) for user, answer in zip(history[::2], history[1::2]))
        assert split_of(Problem("", question, "", history=pairs)) == TRAIN
    for name in ("chained_arithmetic", "program_trace"):
        assert {split_of(problem) for problem in GENERATORS[name](seed=0, count=4)} == {HELD_OUT}
    assert len(set(asked)) == 40


def test_instructions_are_no_question_of_a_workload():
    asked = [turns[0]["content"] for turns in islice(corpus("instructions", 0), len(TASKS) * len(TOPICS))]
    assert len({*asked}) == len(asked) == 504
    assert asked != [turns[0]["content"] for turns in islice(corpus("instructions", 1), len(asked))]
    assert not {*asked} & {problem.question for problem in GENERATORS["word_problems"](seed=0, count=48, steps=[1, 2])}


def test_a_file_of_prompts_is_a_corpus(tmp_path):
    (tmp_path / "prompts").write_text("one\n\ntwo\n")
    assert [turns[0]["content"] for turns in islice(corpus(str(tmp_path / "prompts"), 0), 3)] == ["one", "two", "one"]
    (tmp_path / "empty").write_text("\n")
    for name, message in {
        "empty": "holds no prompt",
        "none": "neither instructions nor reasoner",
    }.items():
        with pytest.raises(UsageError, match=message):
            corpus(str(tmp_path / name), 0)


def test_the_shipped_model_gets_its_own_corpus(tmp_path):
    assert corpus_for(str(REASONER)) == "reasoner"
    assert corpus_for(str(tmp_path)) == corpus_for("owner/name") == "instructions"


def test_answers_are_cut_at_the_number_of_tokens(tmp_path):
    folder = save_tiny_model("qwen3", tmp_path, num_hidden_layers=1)
    save_tiny_tokenizer(folder)
    llm = LLM(str(folder), device="cpu", num_blocks=64, block_size=64)
    texts = answered(llm, corpus("instructions", 0), 500, max_tokens=20, seed=0)
    assert sum(len(tokens) for tokens, _ in texts) == 500
    assert all(0 < prompt <= len(tokens) <= prompt + 20 for tokens, prompt in texts)
    with pytest.raises(UsageError, match="the model answers none of 25 prompts; the first: "):
        answered(llm, iter([[{"role": "user", "content": "x" * 2000}]] * 64), 500, max_tokens=20, seed=0)


def test_few_tokens_take_few_answers_and_a_bar_counts_them(tmp_path, capsys):
    """Those of the larger number begin with those of the smaller."""
    folder = save_tiny_model("qwen3", tmp_path, num_hidden_layers=1)
    save_tiny_tokenizer(folder)
    llm, steps = LLM(str(folder), device="cpu", num_blocks=64, block_size=64), []
    llm.step_listeners.append(steps.append)
    few = answered(llm, corpus("instructions", 0), 150, max_tokens=2048, seed=0)
    assert sum(step.num_decode + step.prefill_tokens for step in steps) < 2 * 150
    assert re.search(r"answers: 100%\|.*\| 150/150 ", capsys.readouterr().err)
    assert len(llm.step_listeners) == 1
    more = answered(llm, corpus("instructions", 0), 600, max_tokens=2048, seed=0)
    assert more[0][0][:150] == few[0][0]
    assert len(few) < len(more) <= 64


def test_the_command_writes_the_same_file_again(tmp_path, capsys):
    folder = save_tiny_model("qwen3", tmp_path / "model", num_hidden_layers=2)
    save_tiny_tokenizer(folder)
    options = ["--tokens", "300", "--max-tokens", "30", "--device", "cpu", "--kind", "q_filters"]
    for name in ("one", "two"):
        assert calibrate.main([str(folder), "--out", str(tmp_path / name), *options]) == 0
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    header, _ = contents(tmp_path / "one")
    assert (header["kind"], header["corpus"], header["seed"]) == ("q_filters", "instructions", 0)
    assert header["tokens"] < 300
    assert calibrate.main([str(folder), "--out", str(tmp_path / "three"), *options, "--corpus", "none"]) == 2
    assert calibrate.main([str(tmp_path / "no"), "--out", str(tmp_path / "three"), *options]) == 2
    assert capsys.readouterr().err.count("error: ") == 2
    no_room = ["--kv-cache-memory-bytes", "100"]
    assert calibrate.main([str(folder), "--out", str(tmp_path / "three"), *options, *no_room]) == 2
    assert "no room for a KV block" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        calibrate.main([str(folder), "--out", str(tmp_path / "three"), "--tokens", "0"])


@pytest.mark.parametrize("kind", ["expected_attention", "q_filters", "triattention"])
def test_shipped_files_fit_the_shipped_model_and_are_small(kind):
    path = REASONER / "calibration" / f"{kind}.safetensors"
    header, arrays = contents(path)
    assert (header["kind"], header["corpus"], header["seed"]) == (kind, "reasoner", 0)
    assert 190_000 < header["tokens"] < 200_000
    assert all(array.dtype == torch.float32 for array in arrays.values())
    assert path.stat().st_size < 64 * 1024
    more = {"cov": "pairs"} if kind == "expected_attention" else {}
    options = {
        "policy": kind,
        "policy_options": {"calibration": str(path), **more},
        "budget_tokens": 64,
        "block_size": 16,
    }
    llm = LLM(str(REASONER), device="cpu", num_blocks=16, max_model_len=256, **options)
    assert llm.generate("<|user|>a=1", use_tqdm=False)[0].error is None


@pytest.mark.parametrize("command", [calibrate, train_scorer], ids=["calibrate", "train_scorer"])
def test_a_model_that_cannot_be_calibrated_is_refused_before_it_answers(command, tmp_path, monkeypatch, capsys):
    save_tiny_tokenizer(save_tiny_model("gemma3_text", tmp_path / "model"))
    monkeypatch.setattr("experiments.calibration.command.LLM", None)
    assert command.main([str(tmp_path / "model"), "--out", str(tmp_path / "file")]) == 2
    assert "is not supported: calibrate another model" in capsys.readouterr().err
