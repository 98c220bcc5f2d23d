"""Traces of real traffic: their formats, their requests, and the prefixes that these share.

The samples of the public formats are made up: their columns are real, their numbers are not.
"""

from __future__ import annotations

import gzip
import json
import sys

import pytest

from experiments import run
from experiments.backends import BACKENDS
from experiments.bench import gate
from experiments.config.compose import load_experiment
from experiments.config.schema import ScenarioConfig
from experiments.errors import UsageError
from experiments.records import load_requests, load_runs
from experiments.running.prompts import PromptRenderer
from experiments.running.scenarios import arrival_times
from experiments.running.traces import BLOCK, read_trace
from experiments.workloads import load_problems
from tests.experiments.fake_engine import FakeTokenizer

OURS = "arrival,prompt_tokens,output_tokens,reason_share\n0.25,30,4,0.5\n0.75,20,6,0.25\n1.75,40,5,0.0\n"
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2030-01-01 23:59:59.5000000,30,4
2030-01-02 00:00:00.0000000,20,6
2030-01-02 00:00:00.7500000,0,0
2030-01-02 00:00:01.0000000,40,5
"""
MOONCAKE = "".join(
    json.dumps({"timestamp": at, "input_length": prompt, "output_length": output, "hash_ids": ids}) + "\n"
    for at, prompt, output, ids in (
        (3000, 1100, 4, [7, 8, 9]),
        (3500, 1030, 6, [7, 8, 10]),
        (4500, 600, 5, [7, 11]),
    )
)
BURST = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
45,GPT-4,40,5,45,API log
5,ChatGPT,30,4,34,Conversation log
7,ChatGPT,99,0,99,API log
25,ChatGPT,20,6,26,Conversation log
"""
SAMPLES = {"ours.csv": OURS, "azure.csv": AZURE, "mooncake.jsonl": MOONCAKE, "burst.csv": BURST}


@pytest.fixture
def write(tmp_path):
    def write(name: str, text: str) -> str:
        path = tmp_path / name
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return str(path)

    return write


def load(path: str, *more: str, limit: int | None = None):
    experiment = load_experiment(["scenario=trace", f"scenario.path={path}", *more])
    problems = load_problems(experiment.workload, limit)
    return problems, arrival_times(experiment.scenario, len(problems))


class TestFormats:
    @pytest.mark.parametrize(
        ("name", "arrivals"),
        [
            ("ours.csv", [0.25, 0.75, 1.75]),
            ("azure.csv", [0.0, 0.5, 1.5]),
            ("mooncake.jsonl", [0.0, 0.5, 1.5]),
            ("burst.csv", [0.0, 20.0, 40.0]),
        ],
    )
    @pytest.mark.parametrize("suffix", ["", ".gz"])
    def test_times_and_lengths_are_those_of_the_file(self, write, name, arrivals, suffix):
        problems, times = load(write(name + suffix, SAMPLES[name]))
        assert times == arrivals
        prompts = [1100, 1030, 600] if name == "mooncake.jsonl" else [30, 20, 40]
        assert [(p.prompt_tokens, p.output_tokens) for p in problems] == list(zip(prompts, [4, 6, 5], strict=True))

    def test_speed_limit_count_and_longest(self, write):
        path = write("azure.csv", AZURE)
        assert load(path, "scenario.speed=2")[1] == [0.0, 0.25, 0.75]
        assert load(path, "scenario.speed=0.5", limit=2)[1] == [0.0, 1.0]
        problems, times = load(path, "workload.options.count=2", "workload.options.longest=25")
        assert [(p.id, p.prompt_tokens, p.output_tokens) for p in problems] == [("00000", 25, 4), ("00001", 20, 6)]
        assert times == [0.0, 0.5]
        experiment = load_experiment(["workload=trace", f"workload.path={path}"])
        assert len(load_problems(experiment.workload)) == 3, "the lengths alone, arriving otherwise"

    def test_an_edited_file_is_read_again(self, write):
        assert len(read_trace(write("t.csv", OURS)).requests) == 3
        assert len(read_trace(write("t.csv", OURS + "9,1,1,0\n")).requests) == 4

    def test_another_workload_is_asked_at_these_times(self, write):
        experiment = load_experiment(["scenario=trace", f"scenario.path={write('t.csv', OURS)}", "workload=lengths"])
        assert load_problems(experiment.workload)[0].prompt_tokens == 512

    @pytest.mark.parametrize(
        ("name", "text", "line"),
        [
            (
                "t.csv",
                "when,in,out\n1,2,3\n",
                "has the columns when, in, out, which fit no known trace: TIMESTAMP, Cont",
            ),
            ("t.csv", "when,in,out\n", "has the columns when, in, out, which fit no"),
            ("t.jsonl", '{"timestamp": 1}\n', "has the columns timestamp, which fit no known trace"),
            ("t.csv", "", "holds no request"),
            ("t.csv", OURS + "2,x,3,0\n", "line 5: prompt_tokens='x': must be a whole number of at least 1"),
            ("t.csv", OURS + "2,1,0,0\n", "line 5: output_tokens='0': must be a whole number of at least 1"),
            ("t.csv", OURS + "2,1\n", "line 5: has no output_tokens"),
            ("t.csv", OURS + "-2,1,1,0\n", "line 5: arrival='-2': must be seconds, 0 or more"),
            ("t.csv", AZURE + "soon,1,1\n", "line 6: TIMESTAMP='soon': must be a date and time"),
            ("t.csv", BURST + "9,m,1.5,2,3,API log\n", "line 6: Request tokens='1.5': must be a whole number"),
            ("t.csv", BURST + "9,m,-1,2,3,API log\n", "line 6: Request tokens='-1': must be a whole number"),
            ("t.jsonl", MOONCAKE + "\n{\n", "line 5: is not JSON"),
            (
                "t.jsonl",
                MOONCAKE + '{"timestamp": "x", "input_length": 1, "output_length": 1}',
                "line 4: timestamp='x'",
            ),
            (
                "t.jsonl",
                '{"timestamp": 0, "input_length": 513, "output_length": 1, "hash_ids": [1, 2, 3]}',
                "line 1: 3 hash_ids for input_length=513: it has 2 blocks of 512 tokens",
            ),
            (
                "t.jsonl",
                '{"timestamp": 0, "input_length": 9, "output_length": 1, "hash_ids": ["a"]}',
                "line 1: hash_ids=",
            ),
            ("t.jsonl", '{"arrival": 1' + 400 * "0" + "}", "line 1: arrival=1000"),
            ("t.jsonl", "1\ntrue\n", "line 2: must be a number"),
            ("t.jsonl", '{"arrival": true}', "line 1: arrival=True: must be seconds, 0 or more"),
            ("t.jsonl", 100_000 * "[", "line 1: is not JSON"),
            ("t.jsonl", MOONCAKE.replace("1100", "1" + 400 * "0"), "line 1: input_length=1000"),
            ("t.jsonl", MOONCAKE.replace("1100", "true"), "line 1: input_length=True: must be a whole number"),
            ("t.csv", OURS + "2,1e300,1,0\n", "line 5: prompt_tokens='1e300': must be a whole number of at least 1"),
            ("t.csv", OURS + "2,1,1,0,5\n", "line 5: has 5 cells for 4 columns"),
            ("t.csv", "arrival,arrival\n1,2\n", "has two columns arrival"),
            ("t.csv.gz", None, "can't be read (No such file or directory)"),
            ("t.txt", "1\n", "must end in .jsonl or .csv"),
        ],
    )
    def test_a_fault_is_one_line_that_names_its_place(self, write, tmp_path, name, text, line):
        path = str(tmp_path / name) if text is None else write(name, text)
        with pytest.raises(UsageError) as caught:
            arrival_times(ScenarioConfig(arrival="trace", path=path), 0)
        assert str(caught.value).startswith(f"scenario.path={path}: {line}")
        assert "\n" not in str(caught.value)

    def test_a_fault_is_found_before_the_model_is_loaded(self, write, launch, capsys):
        path = write("t.csv", OURS + "2,1,0,0\n")
        assert launch("scenario=trace", f"scenario.path={path}", fail_at=0) == 2
        assert capsys.readouterr().err.startswith(f"error: scenario.path={path}: line 5: output_tokens='0'")

    def test_what_a_trace_lacks_is_said(self, write):
        with pytest.raises(UsageError, match=r"workload\.path=.*holds arrivals alone, no lengths: name a workload"):
            load(write("t.csv", "arrival\n1\n"))
        with pytest.raises(UsageError, match=r"scenario\.path=.*holds lengths alone, no arrivals"):
            load(write("u.csv", "prompt_tokens,output_tokens\n1,1\n"))
        with pytest.raises(UsageError, match=r"workload\.options\.count=4: the trace has 3 requests"):
            load(write("v.csv", OURS), "workload.options.count=4")
        with pytest.raises(UsageError, match=r"workload\.path=None: must be given"):
            load_problems(load_experiment(["workload=trace"]).workload)

    @pytest.mark.parametrize("speed", ["0", "-1", "nan", "inf"])
    def test_speed_is_above_0(self, speed):
        with pytest.raises(UsageError, match=r"scenario\.speed=.*: must be above 0"):
            load_experiment(["scenario=trace", "scenario.path=x.csv", f"scenario.speed={speed}"])

    def test_only_a_trace_has_a_speed(self):
        with pytest.raises(UsageError, match=r"scenario\.speed=2\.0: must be 1 but for scenario=trace"):
            load_experiment(["scenario=poisson", "scenario.speed=2"])


class TestPrefixes:
    def test_prompts_share_what_their_hash_ids_share_token_by_token(self, write):
        problems, _ = load(write("m.jsonl", MOONCAKE))
        renderer = PromptRenderer(
            load_experiment(["workload=trace"]).workload, load_experiment().model, FakeTokenizer()
        )
        first, second, third = (prompt.token_ids for prompt in renderer.render_all(problems))
        assert (len(first), len(second), len(third)) == (1100, 1030, 600)
        assert first[: 2 * BLOCK] == second[: 2 * BLOCK]
        assert first[:BLOCK] == third[:BLOCK]
        assert first[2 * BLOCK :][:30] != second[2 * BLOCK :][:30]
        assert first[BLOCK : BLOCK + 88] != third[BLOCK:]
        assert first.count(1) == 1, "one token for the begin of a text"
        assert load(write("m.jsonl", MOONCAKE))[0] == problems
        assert load(write("m.jsonl", MOONCAKE), "workload.seed=1")[0] != problems

    def test_the_engine_finds_them_cached(self, write, tmp_path, results, monkeypatch):
        folder = tmp_path / "shape"
        folder.mkdir()
        sizes = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 16, "vocab_size": 300}
        (folder / "config.json").write_text(json.dumps(gate.SHAPE | sizes))
        options = ["model=dummy", f"model.path={folder}", "hardware=cpu", f"results_dir={results}"]
        options += ["engine.block_size=32", "engine.num_blocks=160", "engine.max_model_len=1536"]
        trace = ["scenario=trace", f"scenario.path={write('m.jsonl', MOONCAKE)}", "scenario.speed=2"]
        monkeypatch.setattr(sys, "argv", ["experiments.run", *options, *trace])
        assert run.main(BACKENDS) == 0
        row = load_runs(results).iloc[0]
        requests = load_requests(row)
        assert requests["cached_tokens"].tolist() == [0, 2 * BLOCK, BLOCK]
        assert requests["prompt_tokens"].tolist() == [1100, 1030, 600]
        assert requests["output_tokens"].tolist() == [4, 6, 5]
        assert requests["arrival"].tolist() == pytest.approx([0.0, 0.25, 0.75])
        assert row["rate.offered"] == pytest.approx(2 / 0.75)
        assert row["rate.achieved"] == pytest.approx(3 / row["seconds"])


class TestRuns:
    def test_speed_is_another_run_and_the_files_place_is_not(self, write, launch, results):
        for name, *more in (
            ["a.csv", "scenario.speed=8"],
            ["b.csv", "scenario.speed=8"],
            ["a.csv", "scenario.speed=4"],
        ):
            assert launch("scenario=trace", f"scenario.path={write(name, AZURE)}", *more) == 0
        runs = load_runs(results)
        assert launch("workload=word_problems") == 0
        assert load_runs(results)["rate.offered"].isna().sum() == 1, "all at once"
        assert sorted(runs["rate.offered"]) == pytest.approx([8 / 1.5, 16 / 1.5])

    def test_failed_requests_are_counted(self, write, launch, capsys):
        assert launch("scenario=trace", f"scenario.path={write('b.csv', BURST)}", "scenario.speed=100") == 0
        assert "failed requests, without tokens, are left out: 1" in capsys.readouterr().out

    def test_times_count_from_when_a_request_was_due(self, write, launch, results):
        """One that comes while a step runs waits for its end, and its TTFT says so."""
        path = write("t.csv", "arrival,prompt_tokens,output_tokens\n0,30,4\n0.05,30,4\n")
        assert launch("scenario=trace", f"scenario.path={path}", step_seconds=0.2) == 0
        requests = load_requests(load_runs(results).iloc[0])
        assert requests["arrival"].tolist() == pytest.approx([0, 0.05])
        assert 0.34 < requests["ttft"].iloc[1] < 0.6, "the rest of one step, and one of its own"
