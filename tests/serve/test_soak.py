"""The soak of tests/benchmarks/soak.py on a small scale; its record is results/records/serve_soak_cpu.json."""

from tests.benchmarks.soak import ENGINE, REASONER, memory, soak


def test_idle_streams_and_clients_that_go_away(monkeypatch):
    """More streams than the usual soft limit of open files lets in, in proportion: the server raises it."""
    monkeypatch.setattr("tests.benchmarks.soak.PATIENCE", 20.0)
    found = soak(REASONER, ENGINE, idle=160, requests=100, streams=16, open_files=128)
    checks = found["checks"]
    assert list(checks) == ["idle streams, 1", "idle streams, 2", "requests", "memory"]
    assert all(check["holds"] for check in checks.values()), checks
    outcomes = checks["requests"]["outcomes"]
    assert outcomes["finished"] > 20
    assert outcomes["aborted"] > 20


def test_memory_is_that_of_a_process_and_its_children():
    assert memory(1) > 0
    assert memory(2**30) == 0
