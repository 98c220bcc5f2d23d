"""Loads on a server of known delays: what is measured, what is aborted, and when a rate is broken."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time

import pytest

from experiments.serving import drive
from experiments.serving.drive import Task
from experiments.serving.prompts import Asked, bodies
from experiments.serving.stream import Stream
from tests.experiments.serving.fake_server import Fake
from tests.experiments.serving.test_stream import END, HEAD, TOKEN, Wire

SLO = {"ttft": 0.5, "itl": 0.2}


@pytest.fixture
def fake():
    started = []

    def start(**options) -> Fake:
        started.append(Fake(**options))
        started[-1].start()
        return started[-1]

    yield start
    for one in started:
        one.stop()


def task(server: Fake, requests, **options) -> Task:
    given = {"warmup": 0.0, "seconds": 1.0, "drain": 2.0, "patience": 5.0} | options
    return Task(port=server.port, requests=requests, seed="s", vocab_size=100, common={}, slo=SLO, **given)


def run(server: Fake, requests, **options) -> dict:
    return asyncio.run(drive.drive(task(server, requests, **options)))


def evenly(count: int, gap: float, output: int = 5) -> list[Asked]:
    return [Asked(i * gap, 7, output) for i in range(count)]


def test_an_open_loop(fake):
    server = fake(first=0.1, step=0.05)
    row = run(server, evenly(40, 0.05))
    assert (row["sent"], row["finished"], row["failed"], row["aborted"]) == (20, 20, 0, 0), "those due in the second"
    assert row["beside"] >= 4, "requests went on coming until the last of them was answered"
    assert row["ttft"]["p50"] == pytest.approx(0.1, abs=0.03)
    assert row["itl"]["p50"] == pytest.approx(0.05, abs=0.02)
    assert row["tpot"]["p50"] == pytest.approx(0.05, abs=0.02)
    assert row["e2e"]["p50"] == pytest.approx(0.3, abs=0.05)
    assert row["tokens_per_second_user"] == pytest.approx(20, rel=0.3)
    assert row["seconds"] == pytest.approx(1.0, abs=0.1)
    assert row["goodput"] == pytest.approx(20, rel=0.2)
    assert (row["broken"], row["left"], row["preemptions"]) == (False, 0, 0)
    assert row["most_running"] > 0
    prompts = [body["prompt"] for body in server.asked]
    assert all(len(prompt) == 7 for prompt in prompts)
    assert len({tuple(prompt) for prompt in prompts}) == len(prompts)
    json.dumps(row, allow_nan=False)


def test_the_warm_up_is_left_out(fake):
    row = run(fake(), evenly(20, 0.05), warmup=0.5, seconds=0.25)
    assert row["sent"] == 5


def test_several_tokens_in_a_chunk_are_all_counted(fake):
    row = run(fake(first=0.0, step=0.05, tokens=4), evenly(20, 0.05, 40), seconds=1.0, drain=1.0)
    assert row["tpot"]["p50"] == pytest.approx(0.45 / 39, rel=0.3)
    assert row["itl"]["p50"] == pytest.approx(0.05, abs=0.02)
    assert 300 < row["tokens_per_second"] < 900, "20 requests of 40 tokens in the second, the last ones in part"


def test_what_runs_when_the_drain_is_over_is_aborted(fake):
    server = fake(step=1.0)
    row = run(server, evenly(4, 0.1), seconds=0.4, drain=0.3)
    assert (row["sent"], row["finished"], row["aborted"]) == (4, 0, 4)
    assert row["left"] == 0
    assert server.gone == 4
    assert row["goodput"] == 0


@pytest.mark.parametrize("warmup", [0.0, 5.0])
def test_a_queue_that_grows_ends_the_rate_early(fake, warmup):
    begin = time.monotonic()
    row = run(fake(slots=1, step=0.1), evenly(200, 0.05), warmup=warmup, seconds=10.0, patience=0.5)
    assert row["broken"]
    assert not row["slo_holds"]
    assert time.monotonic() - begin < 5
    assert 0 < row["sent"] < 60
    assert row["aborted"] > 0


def test_a_server_that_keeps_aborted_requests_is_told_of(fake, monkeypatch):
    monkeypatch.setattr(drive, "IDLE", 0.3)
    assert run(fake(step=2.0, stuck=True), evenly(2, 0.1), seconds=0.2, drain=0.1)["left"] == 2


def test_refusals_are_failures(fake):
    row = run(fake(status=429), evenly(5, 0.1), seconds=0.5)
    assert (row["failed"], row["slo_holds"]) == (5, False)
    assert row["error"] == "status 429: too many requests"
    assert row["ttft"] is None


def test_a_client_that_is_late_says_so(fake, monkeypatch):
    connect = Stream.connect

    async def slow(self, host, port):
        time.sleep(0.04)
        await connect(self, host, port)

    monkeypatch.setattr(Stream, "connect", slow)
    server = fake()
    row = run(server, evenly(10, 0.01), seconds=0.1)
    assert row["client_late"]
    assert row["late"]["p99"] > 0.1, "ten after each other"
    assert row["ttft"]["p99"] > 0.1, "it counts from when the request was due"


def test_a_closed_loop(fake):
    server = fake(first=0.1, step=0.02)
    row = run(server, evenly(12, 0.0), streams=4, seconds=30.0)
    assert (row["finished"], row["most_waiting"]) == (12, 0)
    assert row["seconds"] == pytest.approx(3 * 0.18, abs=0.15), "four at a time"
    assert row["tokens_per_second"] == pytest.approx(60 / row["seconds"])
    assert not row["broken"]
    assert run(server, evenly(12, 0.0), streams=1, seconds=0.3)["broken"], "they did not end in time"


def test_prompts_share_what_the_trace_shares():
    requests = [Asked(0, 600, 1, (5,)), Asked(0, 700, 1, (5, 6)), Asked(0, 100, 1, (5,)), Asked(0, 600, 1)]
    one, two, three, four = (
        json.loads(body)["prompt"] for body in bodies(requests, seed="a", vocab_size=1000, common={})
    )
    assert [len(prompt) for prompt in (one, two, three, four)] == [600, 700, 100, 600]
    assert one[:512] == two[:512]
    assert one[512:] != two[512:600]
    assert three == one[:100]
    assert four[:50] != one[:50]
    (again,) = (json.loads(body)["prompt"] for body in bodies(requests[:1], seed="b", vocab_size=1000, common={}))
    assert again[:512] != one[:512], "another measurement finds nothing in a cache"


def test_the_client_reads_10_000_chunks_a_second_on_one_core():
    """CPU time, so that neighbours do not matter: 256 streams of 40 tokens a second are that many."""
    chunks, begin = 20_000, time.process_time()
    one = Stream(b"", 0.0, chunks)
    one.connection_made(Wire())
    one.data_received(HEAD)
    for _ in range(chunks):
        one.data_received(TOKEN)
    one.data_received(END)
    assert one.events == chunks
    assert time.process_time() - begin < 1.0


def test_the_program_writes_the_row(fake, tmp_path):
    server, source, target = fake(), tmp_path / "task.json", tmp_path / "row.json"
    source.write_text(json.dumps(task(server, evenly(2, 0.1), seconds=0.2).plain()))
    command = [sys.executable, "-X", "importtime", "-m", "experiments.serving.drive", str(source), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(target.read_text())["finished"] == 2
    assert "torch" not in done.stderr.split(), "it starts in a moment"
