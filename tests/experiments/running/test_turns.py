"""Conversations end to end: what is asked of the engine, its answers read back, their record, its copies."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from itertools import chain

import numpy as np
import pandas as pd
import pytest

from experiments import archive, regrade, run
from experiments.analysis.metrics import recalls_by_distance
from experiments.backends.common import require_plain
from experiments.config.compose import load_experiment
from experiments.config.schema import ModelConfig, WorkloadConfig
from experiments.errors import UsageError
from experiments.records import load_requests, load_runs
from experiments.running.job import sampling_params
from experiments.running.prompts import PromptRenderer
from experiments.running.turns import Answer, answer_reader, answer_spans, as_output, recall_distances
from experiments.workloads import Problem, load_problems
from tests.tiny_models import save_tiny_model, save_tiny_tokenizer
from zipage import SamplingParams

TURNS, RECALLS, LIMIT = 3, 2, 12
END = 9
ONE = Problem("one", "Question 1: 2+3?", '["5", "9"]', follow_ups=("Question 2: 4+5? Think.", "And the first?"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A Qwen3 of two layers that knows every token of its tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = save_tiny_tokenizer(folder)
    size = len(tokenizer)
    options = {"vocab_size": size, "eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": 2048}
    save_tiny_model("qwen3", folder, num_hidden_layers=2, **options)
    return folder, tokenizer


@pytest.fixture
def arguments(tiny, tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [{"question": f"Box {n}?", "answer": str(n)} for n in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["model=hf", f"model.path={tiny[0]}", "workload=gsm8k_turns", f"workload.path={path}", "hardware=cpu"]
    options += [f"workload.turns={TURNS}", f"workload.recalls={RECALLS}", f"sampling.max_tokens={LIMIT}"]
    options += ["workload.template='{question} Think.'", "engine.block_size=16", "engine.num_blocks=256"]
    return [*options, "hardware.threads=1", f"results_dir={tmp_path / 'runs'}"]


@pytest.fixture
def do(arguments, tmp_path, monkeypatch):
    def do(*more: str):
        monkeypatch.setattr(sys, "argv", ["run", *arguments, *more])
        assert run.main() == 0
        return load_runs(tmp_path / "runs").iloc[-1]

    return do


def chat_of(tokenizer, problem: Problem, template: str, answer: str) -> str:
    """The whole conversation with the same text for each answer, as transformers writes it."""
    first = template.replace("{question}", problem.question)
    messages = [{"role": "user", "content": first}]
    for text in problem.follow_ups:
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize(
    "more",
    [
        ["policy=full"],
        ["policy=full", "sampling.temperature=1", "sampling.n=2", "sampling.stop_token_ids=[65,66,67,68,69,70]"],
        ["policy=zipage", "policy.budget_tokens=64", "policy.protection=prompt"],
    ],
    ids=["cut short", "own stop tokens, two samples", "evicting"],
)
def test_a_conversation_is_one_request_and_a_list_of_answers(do, arguments, tiny, more, capsys):
    row = do(*more)
    _, tokenizer = tiny
    samples = 2 if "sampling.n=2" in more else 1
    assert row["samples"] == 3 * samples
    assert row["errors"] == row["grader_errors"] == row["unanswered_turns"] == 0
    assert row["budget_bound_share"] == 1 or more[0] == "policy=full"
    experiment = load_experiment([*arguments, *more])
    problems = {problem.id: problem for problem in load_problems(experiment.workload)}
    requests = load_requests(row)
    lengths = set()
    for sample in requests.to_dict("records"):
        problem = problems[sample["prompt_id"]]
        chat = chat_of(tokenizer, problem, "{question} Think.", "ANSWER")
        assert sample["prompt"] == chat.replace("ANSWER", "")
        _, *rest = (re.escape(part) for part in chat.split("ANSWER"))
        ids = list(sample["output_token_ids"])
        assert sample["prompt_tokens"] == len(tokenizer(chat.split("ANSWER")[0])["input_ids"])
        # What the model read and wrote is the chat as its template writes it, a stop token in an end token's place.
        end = re.escape(tokenizer.eos_token)
        rest = [f"(?:{end}|[!-~]){part.removeprefix(end)}" for part in rest]
        whole = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert re.fullmatch("(?s:.*?)".join(["", *rest, ""]), whole)
        answers = json.loads(sample["output"])
        assert len(answers) == len(sample["answer_tokens"]) == TURNS + RECALLS
        assert all(len(text) <= LIMIT and "<|im" not in text for text in answers)
        assert max(sample["answer_tokens"]) <= LIMIT + 1
        lengths |= {*map(int, sample["answer_tokens"][:-1])}
        given = sum(len(tokenizer(text)["input_ids"]) for text in problem.follow_ups)
        assert sample["output_tokens"] > sum(sample["answer_tokens"]) + given
        assert len(sample["place_grades"]) == TURNS
        assert sample["grade"] == pytest.approx(np.mean(sample["place_grades"]))
        assert len(sample["recall_grades"]) == len(sample["recall_distances"]) == RECALLS
        assert min(sample["recall_distances"]) >= 0
    assert LIMIT + 1 in lengths, "cut short, and the end token behind it"
    assert (len(lengths) > 1) == (samples == 2), "stop tokens end answers too"
    assert len(row["place_accuracy"]) == TURNS
    assert row["recall_accuracy"] == pytest.approx(np.mean(np.concatenate(requests["recall_grades"].tolist())))
    assert sum(row[f"recall_by_distance.{name}.count"] for name in ("0-500", "500-1000")) == 3 * samples * RECALLS
    table = capsys.readouterr().out
    assert {"by place", "recall"} <= {cell.strip() for cell in table.split("\n| run")[1].splitlines()[0].split("|")}


def test_the_answers_are_graded_again_from_the_record_alone(do, tmp_path, capsys):
    row = do()
    assert regrade.main([row["path"]]) == 0
    assert "0 of 3 grades changed" in capsys.readouterr().out
    copies = tmp_path / "copies"
    assert archive.main([row["path"], "--to", str(copies), "--texts"]) == 0
    assert archive.main([row["path"], "--to", str(tmp_path / "bare")]) == 0
    again = regrade.regrade(load_runs(copies).iloc[0])
    assert again["grade"].tolist() == again["old_grade"].tolist() == load_requests(row)["grade"].tolist()
    kept = load_requests(load_runs(tmp_path / "bare").iloc[0])
    assert {"recall_grades", "recall_distances", "answer_tokens", "place_grades"} <= {*kept.columns}
    assert "output" not in kept
    with pytest.raises(UsageError, match="copy without texts"):
        regrade.regrade(load_runs(tmp_path / "bare").iloc[0])


def test_a_grader_of_single_answers_refuses_a_conversation_and_grades_the_others(do, tmp_path, capsys):
    row = do()
    do("workload=jsonl", f"workload.path={tmp_path / 'questions.jsonl'}", "workload.turns=null", "workload.recalls=0")
    capsys.readouterr()
    grades = tmp_path / "grades.parquet"
    assert regrade.main([str(tmp_path / "runs"), "--grader", "number", "--write", str(grades)]) == 1
    said = capsys.readouterr()
    assert said.err == f"error: {row['run']}: --grader number: must be turns or none for workload.turns={TURNS}\n"
    assert "grades changed" in said.out
    assert set(pd.read_parquet(grades)["run"]) == set(load_runs(tmp_path / "runs")["run"]) - {row["run"]}
    assert regrade.main([str(tmp_path / "runs"), "--grader", "turns"]) == 1
    assert "--grader turns: must be another one for a run without workload.turns" in capsys.readouterr().err


def test_a_grader_of_single_answers_refuses_a_chain(do, tmp_path, capsys):
    chain = ("workload=gsm8k_chain", f"workload.path={tmp_path / 'questions.jsonl'}", "workload.turns=null")
    row = do(*chain, "workload.recalls=0", "workload.chain=3", "workload.grader=chain")
    with pytest.raises(UsageError, match="grader=number: must be chain or none for "):
        regrade.regrade(row, "number")
    assert regrade.regrade(row)["grader_error"].isna().all()


def test_a_conversation_ends_where_the_context_does(do, capsys):
    row = do("engine.max_model_len=200", "limit=2")
    (first, second) = load_requests(row).to_dict("records")
    for sample in (first, second):
        answers = json.loads(sample["output"])
        assert 0 < len(answers) < TURNS + RECALLS
        assert sample["finish_reason"] == "length"
        assert sample["recall_distances"][-1] is None or np.isnan(sample["recall_distances"][-1])
        assert len(sample["place_grades"]) == TURNS
        assert len(sample["recall_grades"]) == RECALLS
    missing = sum(TURNS + RECALLS - len(json.loads(s["output"])) for s in (first, second))
    assert row["unanswered_turns"] == missing > 0
    assert row["grader_errors"] == 0


def test_questions_alone_may_be_turns(do):
    row = do("workload.recalls=0")
    requests = load_requests(row)
    assert all(len(json.loads(output)) == TURNS for output in requests["output"])
    assert row["recall_accuracy"] is None
    assert "recall_by_distance.0-500.count" not in row
    assert len(row["place_accuracy"]) == TURNS


def test_other_questions_in_later_turns_are_other_data(arguments):
    def data(*more: str) -> str:
        from experiments.running.job import prepare

        return prepare(load_experiment([*arguments, *more])).data

    assert data() == data()
    assert data() != data("workload.template='{question} Go.'"), "later turns hold the template"
    assert data() != data("workload.recalls=1")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["workload.grader=number"], "workload.grader='number': must be turns or none"),
        (["workload.turns=null", "workload.recalls=0"], "workload.grader='turns': must be another one"),
        (["sampling.stop=[x]"], "use sampling.stop_token_ids"),
        (["sampling.logprobs=true"], "does not go with follow_ups"),
        (["sampling.ignore_eos=true"], "sampling.ignore_eos=True: must be false"),
        (["sampling.min_tokens=3"], "sampling.min_tokens=3: must be 0"),
    ],
)
def test_options_that_do_not_go_with_turns_are_refused_before_the_run(arguments, more, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        load_experiment([*arguments, *more])


def test_the_limit_of_an_answer_is_none_of_the_conversation(tiny, arguments):
    experiment = load_experiment([*arguments, "sampling.stop_token_ids=[7]"])
    prompt = PromptRenderer(experiment.workload, experiment.model, tiny[1]).render(ONE)
    params = sampling_params(experiment, ONE, prompt)
    assert (params.max_tokens, params.max_turn_tokens) == (None, LIMIT)
    assert list(params.stop_token_ids) == [tiny[1].eos_token_id, 7]
    assert [list(tokens) for tokens in params.follow_ups] == prompt.follow_ups
    plain = replace(ONE, follow_ups=())
    prompt = PromptRenderer(experiment.workload, experiment.model, tiny[1]).render(plain)
    params = sampling_params(experiment, plain, prompt)
    assert (params.max_tokens, params.max_turn_tokens, params.follow_ups) == (LIMIT, None, ())
    with pytest.raises(ValueError, match=r"workload\.turns: backend=transformers"):
        require_plain("transformers", SamplingParams(follow_ups=((1,),)))


class TestPrompts:
    def test_turns_are_those_of_the_chat_template(self, tiny):
        tokenizer = tiny[1]
        workload = WorkloadConfig(name="any", system_prompt="Think.", template="{question} Now.")
        single = replace(ONE, follow_ups=())
        renderer = PromptRenderer(workload, ModelConfig(), tokenizer)
        plain, prompt, other = renderer.render_all([single, ONE, single])
        assert plain == other
        assert (prompt.token_ids, plain.follow_ups, plain.end_token) == (plain.token_ids, [], None)
        messages = [{"role": "system", "content": "Think."}, {"role": "user", "content": ONE.question + " Now."}]
        for text, answer in zip(ONE.follow_ups, ("5", "9"), strict=True):
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": text}]
        whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        end = [tokenizer.eos_token_id]
        pieces = [prompt.token_ids]
        for answer, follow_up in zip(("5", "9"), prompt.follow_ups, strict=True):
            pieces += [tokenizer(answer)["input_ids"], end, follow_up]
        assert list(chain(*pieces)) == tokenizer(whole, add_special_tokens=False)["input_ids"]

    @pytest.mark.parametrize(
        ("template", "said"),
        [
            (
                "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
                "does not write the tokenizer's end",
            ),
            ("{% for m in messages %}<{{ m.role }}>{% endfor %}", "does not write the tokenizer's end"),
            ("{{ messages[1].content }}<|im_end|>", "refuses the prompt|does not write"),
        ],
    )
    def test_a_template_that_ends_no_answer_is_refused(self, tiny, tmp_path, template, said):
        path = tmp_path / "template.jinja"
        path.write_text(template)
        renderer = PromptRenderer(WorkloadConfig(name="any"), ModelConfig(chat_template=str(path)), tiny[1])
        with pytest.raises(UsageError, match=said):
            renderer.render(ONE)

    def test_without_a_template_there_are_no_turns(self, tiny):
        renderer = PromptRenderer(WorkloadConfig(name="any"), ModelConfig(chat_template="none"), tiny[1])
        with pytest.raises(UsageError, match=r"model\.chat_template: there is none, but workload\.turns"):
            renderer.render(ONE)


class TestSpans:
    FOLLOW_UPS = ((1, 2), (3,))

    @pytest.mark.parametrize(
        ("tokens", "spans"),
        [
            ([5, 6, END, 1, 2, 7, END, 3, 8, END], [(0, 3), (5, 7), (8, 10)]),
            ([5, 6, END, 1, 2, 7, END, 3, 8], [(0, 3), (5, 7), (8, 9)]),
            ([END, 1, 2, END, 3, END], [(0, 1), (3, 4), (5, 6)]),
            ([5, END, 5, END, 1, 2, 7], [(0, 4), (6, 7)]),  # another special token, which ends nothing
            ([5, 1, 2, 6, END, 1, 2, 7], [(0, 5), (7, 8)]),  # drawn as it stands in a follow-up
            ([5, 6, END, 1], [(0, 3)]),
            ([5, 6, END, 1, 2], [(0, 3)]),
            ([5, 6, END], [(0, 3)]),
            ([5, 6], [(0, 2)]),
            ([], []),
        ],
    )
    def test_an_answer_ends_where_its_follow_up_stands(self, tokens, spans):
        assert answer_spans(tokens, self.FOLLOW_UPS, {END}) == spans

    def test_texts_are_without_what_ended_them(self, tiny):
        tokenizer = tiny[1]
        sampling = load_experiment(["sampling.stop_token_ids=[33]"]).sampling
        stop, question = tokenizer.convert_ids_to_tokens(33), tokenizer("next")["input_ids"]
        prompt = PromptRenderer(WorkloadConfig(name="any"), ModelConfig(), tokenizer).render(ONE)
        prompt = replace(prompt, follow_ups=[question, question])
        tokens = [*tokenizer("one")["input_ids"], 33, *question, *tokenizer("two")["input_ids"], prompt.end_token]
        tokens += [*question, *tokenizer("é")["input_ids"]]
        texts = [answer.text for answer in answer_reader(tokenizer, sampling)(prompt, tokens)]
        assert texts == ["one", "two", "é"]
        assert as_output([Answer("é", 0, 1)]) == '["é"]'
        kept = replace(sampling, include_stop_str_in_output=True, skip_special_tokens=False)
        texts = [answer.text for answer in answer_reader(tokenizer, kept)(prompt, tokens)]
        assert texts == [f"one{stop}", "two<|im_end|>", "é"]


class TestRecalls:
    GOLD = json.dumps(["1", "2", {"answer_of": 1}, {"number_of": 1, "gold": "3"}, {"answer_of": 2}])
    ANSWERS = (Answer("", 0, 100), Answer("", 130, 300), Answer("", 350, 355), Answer("", 400, 405))

    def test_a_distance_begins_where_what_is_recalled_ends(self):
        fifth = Answer("", 450, 455)
        assert recall_distances(self.GOLD, [*self.ANSWERS, fifth]) == [200, 355, 105]
        assert recall_distances(self.GOLD, self.ANSWERS) == [200, 355, None]
        assert recall_distances(self.GOLD, self.ANSWERS[:1]) == [None, None, None]
        assert recall_distances(self.GOLD, []) == [None, None, None]
        assert recall_distances('["1", "2"]', self.ANSWERS[:2]) == []

    def test_recalls_are_grouped_by_distance(self):
        rows = [
            {"recall_distances": [0, 499, 500, None], "recall_grades": [1.0, 0.0, 1.0, 0.0]},
            {"recall_distances": [4000, 9000, 3999], "recall_grades": [0.0, 0.0, 1.0]},
            {"recall_distances": None, "recall_grades": None},
            {},
        ]
        assert recalls_by_distance(rows) == {
            "0-500": {"accuracy": 0.5, "count": 2},
            "500-1000": {"accuracy": 1.0, "count": 1},
            "1000-2000": {"accuracy": None, "count": 0},
            "2000-4000": {"accuracy": 1.0, "count": 1},
            "4000+": {"accuracy": 0.0, "count": 2},
        }
        assert recalls_by_distance(rows[2:]) is None
