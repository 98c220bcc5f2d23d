"""Servers are started with the right command line, and leave no process behind, however they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from experiments.errors import RunError
from experiments.serving.server import RunningServer, command, free_port
from tests.child_processes import is_alive, wait_for_end
from tests.serve.running import wait_until

FAKE = (sys.executable, "-m", "tests.experiments.serving.fake_server")
ENGINE = {"model": "m", "load_format": "dummy", "skip_tokenizer_init": True, "seed": 0, "device": "cuda"}
ENGINE |= {"max_num_seqs": 256, "max_model_len": 4096, "kv_cache_memory_bytes": 10**10, "enable_prefix_caching": False}


def pairs(words: list[str]) -> set[str]:
    """Flags with their values, in one word each."""
    return set(" ".join(words).replace(" --", "\n--").split("\n"))


def test_our_command_line_is_one_that_our_server_takes():
    from zipage.serve.cli import parse

    options = ENGINE | {"policy": "r_kv", "budget_tokens": 512, "policy_options": {"window": 8}}
    words, environment = command("zipage", options, 1234, {"max_queue": 9})
    assert words[:4] == [sys.executable, "-m", "zipage.serve", "m"]
    assert environment == {}
    engine, server = parse(words[3:])
    assert {name: getattr(engine, name) for name in options} == options
    assert (server.port, server.max_queue, server.access_log) == (1234, 9, False)
    assert server.served_model_name == ("bench",)


def test_vllms_command_line(monkeypatch):
    monkeypatch.delenv("VLLM_NO_USAGE_STATS", raising=False)
    words, environment = command("vllm", ENGINE, 1234, {"return_tokens_as_token_ids": True})
    assert words[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]
    assert {
        *("--model m", "--load-format dummy", "--skip-tokenizer-init", "--max-num-seqs 256", "--max-model-len 4096"),
        *("--kv-cache-memory-bytes 10000000000", "--no-enable-prefix-caching", "--port 1234", "--host 127.0.0.1"),
        *("--served-model-name bench", "--disable-uvicorn-access-log", "--return-tokens-as-token-ids", "--seed 0"),
    } <= pairs(words)
    assert "--device" not in words
    assert not any("enforce-eager" in word for word in words)
    assert environment["VLLM_NO_USAGE_STATS"] == "1"


def test_vllm_matched_has_our_options():
    words, _ = command("vllm_matched", ENGINE | {"kv_cache_memory_bytes": None, "block_size": 16, "num_blocks": 99}, 1)
    assert {"--block-size 16", "--num-gpu-blocks-override 99", "--enable-chunked-prefill"} <= pairs(words)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"policy": "zipage", "budget_tokens": 512}, "backend=vllm keeps full KV"),
        ({"device": "cpu"}, "backend=vllm needs a GPU"),
        ({"debug": True}, "backend=vllm has no such option"),
    ],
)
def test_what_vllm_cannot_do_is_refused_before_it_starts(options, reason):
    with pytest.raises(ValueError, match=reason):
        command("vllm", ENGINE | options, 1)


def group(pid: int) -> list[int]:
    """The processes of a process group."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(path.name)) == pid and is_alive(int(path.name)):
                found.append(int(path.name))
        except ProcessLookupError:
            continue
    return found


@pytest.fixture
def fake():
    def start(*, words: tuple[str, ...] = FAKE, **options) -> RunningServer:
        port = free_port()
        started.append(RunningServer([*words, str(port), json.dumps(options)], port))
        return started[-1]

    started: list[RunningServer] = []
    yield start
    for server in started:
        if is_alive(server.pid):
            server.stop()


def test_it_starts_and_stops(fake):
    server = fake()
    server.wait_until_ready(20)
    assert 0 < server.startup < 20
    members = group(server.pid)
    assert len(members) == 2
    server.stop()
    wait_for_end(members)


def test_it_stops_at_once_where_a_shell_made_it_ignore_sigint(fake, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        server = fake()
    finally:
        signal.signal(signal.SIGINT, before)
    server.wait_until_ready(20)
    begin = time.monotonic()
    server.stop()
    assert time.monotonic() - begin < 10, "it was asked, not killed after its grace"


def test_one_that_dies_says_how(fake):
    server = fake(words=(sys.executable, "-c", "import sys; print('loading'); sys.exit('ValueError: no such model')"))
    with pytest.raises(RunError, match=r"the server ended \(ValueError: no such model\); its last lines: loading \|"):
        server.wait_until_ready(20)
    server.stop()


def test_one_that_is_killed_says_by_what(fake):
    server = fake(words=(sys.executable, "-c", "import os; print('loading', flush=True); os.kill(os.getpid(), 9)"))
    with pytest.raises(RunError, match=r"the server ended \(killed by SIGKILL.*\); its last lines: loading"):
        server.wait_until_ready(20)
    server.stop()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"api_key": ["a", "b"]}, ["--api-key", "a", "b"]),
        ({"middleware": []}, []),
        ({"policy_options": {"window": 8}}, ["--policy-options", '{"window": 8}']),
        ({"access_log": True}, ["--access-log"]),
    ],
)
def test_flags_of_every_kind(flags, words):
    plain, _ = command("zipage", {"model": "m"}, 1)
    given, _ = command("zipage", {"model": "m"}, 1, flags)
    assert [word for word in given if word not in plain] == words


def test_one_that_does_not_come_up_says_so(fake):
    server = fake(unready=True)
    wait_until(lambda: "listening" in server.last_lines(), 30)
    with pytest.raises(RunError, match=r"not ready after 0.2 s; its last lines: listening on"):
        server.wait_until_ready(0.2)
    members = group(server.pid)
    server.stop()
    wait_for_end(members)


def test_what_a_server_leaves_behind_is_ended(fake):
    code = "import subprocess, sys; subprocess.Popen(['sleep', '60']); print('started', flush=True)"
    server = fake(words=(sys.executable, "-c", code))
    with pytest.raises(RunError, match="the server ended"):
        server.wait_until_ready(20)
    server.stop()
    wait_for_end(group(server.pid))


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_it_ends_with_the_process_that_wanted_it(signal_number):
    port = free_port()
    code = f"""
        from experiments.serving.server import RunningServer
        import time
        with RunningServer({[*FAKE, str(port), "{}"]!r}, {port}) as server:
            server.wait_until_ready(20)
            print(server.pid, flush=True)
            time.sleep(60)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    members = group(int(parent.stdout.readline()))
    assert len(members) == 2
    time.sleep(0.1)
    parent.send_signal(signal_number)
    parent.wait(20)
    wait_for_end(members)
