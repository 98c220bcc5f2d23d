"""`scenario=fidelity`: full KV's own outputs and worked solutions through a policy's cache."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.analysis import compare as compare_runs
from experiments.analysis import fidelity as measures
from experiments.archive import archive
from experiments.records import load_events, load_requests, load_runs, load_steps
from experiments.regrade import regrade
from experiments.reporting.conclusion import conclusions
from experiments.reporting.runs_table import with_notes
from experiments.reporting.tables import comparison_table
from experiments.run import main
from experiments.running import fidelity
from experiments.running.fidelity import compare
from tests.tiny_models import save_tiny_model, save_tiny_tokenizer

ITEMS = [
    {
        "question": f"What is {i} + {i}? Think about it for a while.",
        "answer": f"{i} + {i} = <<{i}+{i}>>{2 * i}\n#### {2 * i}",
    }
    for i in range(1, 6)
]
BOUNDED = ("policy=random", "policy.budget_tokens=32", "policy.recent_tokens=8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_tiny_model("qwen3", tmp_path_factory.mktemp("tiny"))
    save_tiny_tokenizer(folder)
    return folder


@pytest.fixture
def run(folder, tmp_path, monkeypatch):
    data = tmp_path / "items.jsonl"
    data.write_text("\n".join(map(json.dumps, ITEMS)))

    def run(*more: str, kind: str = "fidelity") -> int:
        given = [f"scenario={kind}", "model=hf", f"model.path={folder}", "workload=gsm8k", f"workload.path={data}"]
        given += ["hardware=cpu", "engine.num_blocks=128", "engine.block_size=16", "engine.dtype=float32"]
        given += ["sampling.max_tokens=40", f"results_dir={tmp_path / 'runs'}", *more]
        monkeypatch.setattr("sys.argv", ["run", *given])
        return main()

    return run


def test_full_kv_is_as_close_to_itself_as_rounding_allows(run, tmp_path):
    assert run("policy=full") == 0
    row = load_runs(tmp_path / "runs").iloc[0]
    assert row["fidelity.divergence"] < 1e-6
    assert row["fidelity.agreement"] == 1
    assert abs(row["fidelity.worked_loss"]) < 1e-5


def test_a_policy_is_compared_on_full_kvs_outputs_and_on_solutions(run, folder, tmp_path, capsys):
    assert run(*BOUNDED) == 0
    assert run("policy=full", kind="all_at_once") == 0
    table = capsys.readouterr().out
    assert "KL" in table
    runs = load_runs(tmp_path / "runs")
    measured = runs[runs["scenario.kind"] == "fidelity"].iloc[0]
    free = runs[runs["scenario.kind"] == "serve"].iloc[0]
    rows = load_requests(measured)
    assert list(rows["output"]) == list(load_requests(free)["output"])
    assert rows["grade"].isna().all()
    assert measured["fidelity.divergence"] > 1e-3
    assert measured["fidelity.agreement"] < 1
    # Steps and events are those of full KV's outputs under the policy alone.
    assert len(load_steps(measured)) < 60
    assert set(load_events(measured)["prompt_id"]) == set(rows["prompt_id"])
    assert rows["compressions"].sum() == len(load_events(measured))
    counted = {"steps": len(load_steps(measured)), "output_tokens": 200, "requests_finished": 5, "budget_bound": 5}
    counted |= {"compressions_applied": len(load_events(measured)), "compressions_ordered": len(load_events(measured))}
    assert {name: measured[f"counters.{name}"] for name in counted} == counted
    assert measured["counters.device_time"] == pytest.approx(load_steps(measured)["device_time"].sum())
    assert measured["worked_counters.output_tokens"] == rows["worked_tokens"].sum()
    # Until the first compression both see the same; after it they do not.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for _, row in rows.iterrows():
        first = load_events(measured).query("prompt_id == @row.prompt_id and round == 0").iloc[0]
        own = int(first["entries_before"]) - row["prompt_tokens"] + 1
        assert max(row["token_divergences"][:own]) < 1e-6
        assert max(row["token_divergences"][own:]) > 1e-4
        assert len(row["token_divergences"]) == row["output_tokens"] == 40
    # Full KV's side is transformers'.
    tokenizer, row = AutoTokenizer.from_pretrained(folder), rows.iloc[0]
    prompt, worked = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (row["prompt"], "1 + 1 = 2"))
    assert row["worked_tokens"] == len(worked)
    for output, found in (list(row["output_token_ids"]), "full_logprob"), (worked, "worked_full_logprob"):
        ids = torch.tensor([prompt + output])
        with torch.no_grad():
            logprobs = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert row[found] == pytest.approx(logprobs.gather(1, ids[0, len(prompt) :, None]).sum().item(), abs=1e-3)
    # Intervals, tables and small copies have it too.
    compared = compare_runs(runs)
    at = compared.index[runs["scenario.kind"] == "fidelity"][0]
    assert compared.loc[at, "divergence.low"] < compared.loc[at, "divergence"] < compared.loc[at, "divergence.high"]
    assert "KL (nats/token) [95 %]" in comparison_table(compared)
    small = archive(tmp_path / "runs" / measured["run"], tmp_path / "small")
    assert load_requests(small)["token_divergences"].notna().all()


def test_the_same_tokens_get_the_same_fidelity_whatever_the_engine_does_meanwhile(run, tmp_path):
    assert run(*BOUNDED) == 0
    assert run(*BOUNDED, "engine.num_blocks=12", "engine.max_num_seqs=2", "engine.async_scheduling=false") == 0
    first, second = (load_requests(row) for _, row in load_runs(tmp_path / "runs").iterrows())
    for a, b in zip(first["token_divergences"], second["token_divergences"], strict=True):
        np.testing.assert_allclose(a, b, rtol=0.02, atol=1e-5)


def test_hidden_states_are_held_of_so_many_tokens_and_no_more(run, tmp_path, monkeypatch):
    """The outputs have 40 tokens each, so that two are compared at a time."""
    assert run(*BOUNDED) == 0
    passes, held = [], []

    def serve(backend, requests):
        passes.append(fidelity_serve(backend, requests))
        samples = [sample for served in passes for output in served.outputs.values() for sample in output.outputs]
        held.append(sum(len(sample.hidden_states) for sample in samples if sample.hidden_states is not None))
        return passes[-1]

    fidelity_serve = fidelity.serve
    monkeypatch.setattr(fidelity, "serve", serve)
    monkeypatch.setattr(fidelity, "HELD_TOKENS", 100)
    assert run(*BOUNDED, "force=true", f"results_dir={tmp_path / 'grouped'}") == 0
    whole, grouped = (load_runs(tmp_path / name).iloc[0] for name in ("runs", "grouped"))
    assert len(passes) > 1 + 2 * 3, "full KV's answers, three groups of them, and groups of solutions"
    assert held[:3] == [0, 80, 160]
    assert max(held) <= 2 * 100
    first, second = load_requests(whole), load_requests(grouped)
    for a, b in zip(first["token_divergences"], second["token_divergences"], strict=True):
        np.testing.assert_allclose(a, b, rtol=0.02, atol=1e-5)
    np.testing.assert_allclose(first["worked_divergence"], second["worked_divergence"], rtol=1e-3)
    assert grouped["counters.output_tokens"] == whole["counters.output_tokens"] == 200
    assert grouped["counters.compressions_applied"] == second["compressions"].sum() == first["compressions"].sum()
    steps, events = load_steps(grouped), load_events(grouped)
    assert len(steps) == grouped["counters.steps"] > len(load_steps(whole))
    assert len(events) == second["compressions"].sum()
    assert set(events["prompt_id"]) == set(second["prompt_id"])


def test_a_solution_that_the_pool_cuts_is_named_and_counted(run, tmp_path, capsys):
    items = [dict(item) for item in ITEMS[:3]]
    items[1]["answer"] = "It takes a while to say. " * 10 + "\n#### 4"
    data = tmp_path / "others.jsonl"
    data.write_text("\n".join(map(json.dumps, items)))
    for options in (("policy=full",), BOUNDED):
        assert run(*options, f"workload.path={data}", "engine.num_blocks=12") == 0
        said = capsys.readouterr().out
        assert "1 of 3 worked solutions could not be measured; the first is " in said
        assert "full KV: cut after " in said
    for _, row in load_runs(tmp_path / "runs").iterrows():
        assert row["fidelity.unmeasured"] == 0
        assert row["fidelity.worked_unmeasured"] == 1
        rows = load_requests(row)
        assert list(rows["worked_tokens"].isna()) == [False, True, False]
        assert list(rows["worked_unmeasured"].isna()) == [True, False, True]
        assert "tokens (capacity)" in rows["worked_unmeasured"][1]
    assert "1 worked solution could not be measured" in with_notes(load_runs(tmp_path / "runs").iloc[:1])


def test_one_problem_has_no_interval_no_grade_and_no_speed_to_speak_of(run, tmp_path):
    assert run("policy=full", "limit=1") == run(*BOUNDED, "limit=1") == 0
    runs = load_runs(tmp_path / "runs")
    for _, row in runs.iterrows():
        assert regrade(row)["grade"].isna().all(), "the answers are full KV's"
    table = comparison_table(compare_runs(runs))
    assert "nan" not in table.to_string()
    assert "[" not in table["KL (nats/token) [95 %]"].sum()
    assert conclusions(runs) == []


def test_a_solution_that_is_no_text_costs_itself_and_another_one_is_another_run(run, tmp_path):
    items = [dict(item) for item in ITEMS[:2]]
    items[0]["answer"] = "half a pair: \ud83d\n#### 2"
    data = tmp_path / "others.jsonl"
    for name in ("first", "second"):
        items[1]["answer"] = f"the {name} way\n#### 4"
        data.write_text("\n".join(map(json.dumps, items)))
        assert run(*BOUNDED, f"workload.path={data}") == 0
    runs = load_runs(tmp_path / "runs")
    assert len(runs) == 2
    for _, row in runs.iterrows():
        rows = load_requests(row)
        assert rows["token_divergences"].notna().all()
        assert list(rows["worked_tokens"].isna()) == [True, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("backend=transformers",), "backend='transformers': must be zipage"),
        (("sampling.n=2", "sampling.temperature=1"), "sampling.n=2: must be 1"),
        (("sampling.stop=[x]",), "take stop_token_ids"),
        (("sampling.logprobs=true",), "left out"),
    ],
)
def test_what_can_not_be_measured_is_refused(run, capsys, options, message):
    assert run(*options) == 2
    assert message in capsys.readouterr().err


def test_divergence_is_torchs():
    torch.manual_seed(0)
    weights, full, policy = torch.randn(50, 8), torch.randn(300, 8), torch.randn(300, 8)
    tokens = torch.randint(50, (300,)).tolist()
    rows = []

    def compute_logits(states):
        rows.append(len(states))
        return states @ weights.T

    found = compare(compute_logits, full, policy, tokens)
    assert sum(rows) == 2 * 300
    assert max(rows) <= 64, "of a vocabulary of 152,000 the logits of 64 tokens take 39 MB"
    p, q = (torch.log_softmax(states @ weights.T, dim=-1) for states in (full, policy))
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(torch.tensor(found.divergences), expected, rtol=1e-4, atol=1e-5)
    assert found.agrees == (p.argmax(-1) == q.argmax(-1)).tolist()
    assert found.logprobs == pytest.approx(q[range(300), tokens].tolist(), rel=1e-5)
    assert found.full_logprobs == pytest.approx(p[range(300), tokens].tolist(), rel=1e-5)


def test_figures_are_means_over_tokens_and_positions():
    rows = [
        {"token_divergences": [0.0, 1.0], "token_agrees": [True, False], "logprob": -3.0, "full_logprob": -1.0},
        {"token_divergences": [0.5] * 100, "token_agrees": [True] * 100, "logprob": -10.0, "full_logprob": -10.0},
        {"token_divergences": None},
    ]
    found = measures.summary(rows)
    assert found["divergence"] == pytest.approx(51 / 102)
    assert found["agreement"] == pytest.approx(101 / 102)
    assert found["loss"] == pytest.approx(2 / 102)
    assert [(part["from"], part["tokens"]) for part in found["by_position"]] == [(0, 66), (64, 36)]
    assert measures.summary(rows[2:]) is None
