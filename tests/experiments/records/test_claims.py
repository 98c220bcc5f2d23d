"""Claims on runs: one owner at a time, whatever owners do, and none that is lost keeps a run for ever."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from experiments import records
from experiments.errors import RunError
from experiments.records import claims
from tests.experiments.running.run_process import ROOT, wait_for


@pytest.fixture
def run(tmp_path) -> Path:
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Who looks silent is lost without a further look."""
    monkeypatch.setattr(claims, "WATCH", 0.0)


def files(run: Path) -> list[str]:
    return sorted(path.name for path in (run.parent / claims.FOLDER).iterdir())


def silent(run: Path) -> None:
    """Make the last claim look as if its owner had been silent for too long."""
    path = run.parent / claims.FOLDER / run.name
    while (after := claims._after(run, claims._token(path))).exists():
        path = after
    old = time.time() - claims.LOST - 5
    os.utime(path, (old, old))


def elsewhere(run: Path) -> None:
    """Claim the run as a process of another machine."""
    run.parent.joinpath(claims.FOLDER).mkdir(exist_ok=True)
    owner = {"token": "0123456789ab", "host": "node7", "machine": "another", "pid": 1, "begun": 1, "worker": "job 5"}
    (run.parent / claims.FOLDER / run.name).write_text(json.dumps(owner))


def test_a_claim_is_one_owners_until_it_is_given_back(run):
    claim = claims.take(run, worker="GPU 0")
    assert claims.take(run) is None
    assert claims.holder(run).items() >= {"token": claim.token, "pid": os.getpid(), "worker": "GPU 0"}.items()
    claim.release()
    assert claims.holder(run) is None
    assert files(run) == []
    assert claims.take(run) is not None


def test_an_owner_on_another_machine_is_believed_while_it_gives_signs_of_life(run):
    elsewhere(run)
    assert claims.take(run) is None
    silent(run)
    claim = claims.take(run)
    assert claim is not None
    claim.release()
    assert files(run) == []


def test_an_owner_is_lost_only_to_who_has_watched_it(run, monkeypatch):
    """After a machine was asleep, or a file system did not answer, all owners look silent until they beat again."""
    monkeypatch.setattr(claims, "WATCH", 0.3)
    elsewhere(run)
    silent(run)
    assert claims.take(run) is None
    time.sleep(0.4)
    os.utime(run.parent / claims.FOLDER / run.name)
    assert claims.take(run) is None, "it lives"
    silent(run)
    assert claims.take(run) is None
    begin = time.monotonic()
    wait_for(lambda: claims.take(run) is not None)
    assert 0.1 < time.monotonic() - begin < 5


def test_clocks_of_machines_do_not_matter(run, monkeypatch):
    elsewhere(run)
    monkeypatch.setattr(time, "time", lambda: 1e12)
    assert claims.take(run) is None


def test_a_process_that_has_ended_here_is_lost_at_once(run):
    code = f"from experiments.records import claims; from pathlib import Path; claims.take(Path({str(run)!r}))"
    subprocess.run([sys.executable, "-c", f"{code}; import os; os._exit(0)"], cwd=ROOT, check=True)
    assert files(run) == ["run"]
    claim = claims.take(run)
    claim.release()
    assert files(run) == []


def test_what_works_for_a_process_that_has_ended_here_holds_its_claim(run):
    """As an arm does in the seconds that it takes to follow its sweep."""
    code = f"""
import os, time
from pathlib import Path
from experiments.records import claims
run = Path({str(run)!r})
claim = claims.take(run)
if os.fork() == 0:
    os.environ[claims.VARIABLE] = claim.token
    with claims.hold(run):
        os.close(1)
        run.with_name("works").touch()
        while not run.with_name("end").exists():
            time.sleep(0.01)
    os._exit(0)
while not run.with_name("works").exists():
    time.sleep(0.01)
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert claims.take(run) is None
    run.with_name("end").touch()
    wait_for(lambda: claims.take(run) is not None)


def test_a_claim_that_the_crash_of_a_machine_left_empty_is_lost_in_time(run):
    elsewhere(run)
    (run.parent / claims.FOLDER / run.name).write_text("")
    assert claims.take(run) is None
    silent_since = time.time() - claims.LOST - 5
    os.utime(run.parent / claims.FOLDER / run.name, (silent_since, silent_since))
    claims.take(run).release()
    assert files(run) == []


def test_an_owner_gives_signs_of_life(run, monkeypatch):
    monkeypatch.setattr(claims, "BEAT", 0.02)
    claim = claims.take(run)
    silent(run)
    wait_for(lambda: claims.take(run) is None and time.time() - claims.holder(run)["beat"] < 5)
    claim.release()


def test_an_owner_that_wakes_up_gives_back_nothing_of_anothers(run):
    first = claims.take(run)
    silent(run)
    second = claims.take(run)
    assert first.is_lost
    assert not second.is_lost
    first.release()
    assert claims.take(run) is None
    silent(run)
    third = claims.take(run)
    assert second.is_lost
    second.release()
    assert claims.take(run) is None
    third.release()
    assert files(run) == []


def test_one_of_many_takes_over(run):
    elsewhere(run)
    silent(run)
    found, start = [], threading.Barrier(8)

    def work():
        start.wait()
        found.append(claims.take(run))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(claim is not None for claim in found) == 1


@pytest.mark.parametrize("then", ["free", "taken"])
def test_a_taker_that_comes_too_late_takes_nothing(run, monkeypatch, then):
    """It saw a lost claim, and meanwhile another took that over, made the run, and gave it back."""
    elsewhere(run)
    silent(run)
    link, others = claims._link, []

    def meanwhile(draft, path, *more):
        if path.name != "run" and not others:
            monkeypatch.setattr(claims, "_link", link)
            others.append(claims.take(run))
            others[0].release()
            if then == "taken":
                others.append(claims.take(run))
        return link(draft, path, *more)

    monkeypatch.setattr(claims, "_link", meanwhile)
    late = claims.take(run)
    assert len(others) == (2 if then == "taken" else 1)
    assert (late is None) == (then == "taken")
    (late or others[1]).release()
    assert files(run) == []


def test_a_link_whose_answer_was_lost_is_ours(run, monkeypatch):
    """NFS asks again, and is told that the file is there. What it remembers of the draft is from before."""
    link, stat = os.link, Path.stat

    def answered_twice(draft, path):
        link(draft, path)
        raise FileExistsError(17, "File exists")

    def remembered(path, **options):
        found = list(stat(path, **options))
        found[3] = 1
        return os.stat_result(found)

    monkeypatch.setattr(os, "link", answered_twice)
    monkeypatch.setattr(Path, "stat", remembered)
    claim = claims.take(run)
    assert claim is not None
    claim.release()
    assert files(run) == []


def test_the_server_is_asked_whether_a_claim_was_lost(run, monkeypatch):
    """NFS remembers for up to a minute that no one had taken it over."""
    claim, asked = claims.take(run), []
    opened = os.open
    monkeypatch.setattr(os, "open", lambda path, *more: (asked.append(Path(path)), opened(path, *more))[1])
    assert not claim.is_lost
    assert run.parent / claims.FOLDER in asked
    asked.clear()
    assert claims.holder(run)["token"] == claim.token
    assert run.parent / claims.FOLDER in asked
    claim.release()


CONTENDER = """
import os, random, sys, time
from pathlib import Path
from experiments.records import claims

run, inside = Path(sys.argv[1]), Path(sys.argv[1] + ".inside")
rng = random.Random(int(sys.argv[2]))
claims.WATCH = 0.0
until = time.monotonic() + 2.0
while time.monotonic() < until:
    if (claim := claims.take(run)) is None:
        time.sleep(rng.random() * 0.002)
        continue
    try:
        os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        sys.exit("two owners")
    time.sleep(rng.random() * 0.001)
    inside.unlink()
    print("mine", flush=True)
    if rng.random() < 0.1:
        if os.fork():
            os._exit(0)  # dies with the claim; its child goes on as another contender
    elif rng.random() < 0.9:
        claim.release()
    else:
        old = time.time() - 2 * claims.LOST  # is silent, and wakes up later
        os.utime(claim._path, (old, old))
        time.sleep(0.002)
        claim.release()
"""


def test_processes_that_die_and_fall_silent_never_own_a_run_together(run):
    command = [sys.executable, "-c", CONTENDER, str(run)]
    contenders = [
        subprocess.Popen([*command, str(seed)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for seed in range(4)
    ]
    outputs = [contender.communicate(timeout=60) for contender in contenders]
    assert [(contender.returncode, err) for contender, (_, err) in zip(contenders, outputs)] == [(0, "")] * 4
    assert sum(out.count("mine") for out, _ in outputs) > 8


def test_a_run_that_was_taken_over_is_not_published_twice(run):
    def slow():
        with records.claim(run) as staging:
            (staging / "config.yaml").write_text("slow")
            silent(run)
            with records.claim(run) as other:
                (other / "config.yaml").write_text("fast")
                records.publish(other, run, {"a": 1})
            records.publish(staging, run, {"a": 2})

    with pytest.raises(RunError, match="another process makes run: this one was silent"):
        slow()
    assert (run / "config.yaml").read_text() == "fast"
    assert json.loads((run / "metrics.json").read_text())["a"] == 1
    assert sorted(path.name for path in run.parent.iterdir()) == [".locks", "run"]


def test_a_record_that_can_not_be_replaced_stays(run, monkeypatch):
    for number in (1, 2):
        with records.claim(run) as staging:
            (staging / "config.yaml").write_text(str(number))
            if number == 2:
                monkeypatch.setattr(Path, "rename", gone(staging))
                with pytest.raises(FileNotFoundError):
                    records.publish(staging, run, {"a": number})
            else:
                records.publish(staging, run, {"a": number})
    assert (run / "config.yaml").read_text() == "1"


def gone(staging, rename=Path.rename):
    def renamed(path, target):
        if path == staging:
            raise FileNotFoundError
        return rename(path, target)

    return renamed


def test_who_works_for_an_owner_has_its_claim(run, monkeypatch):
    claim = claims.take(run)
    monkeypatch.setenv(claims.VARIABLE, claim.token)
    with claims.hold(run) as token:
        assert token == claim.token
    assert claims.take(run) is None
    with claims.hold(run.with_name("other")) as token:
        assert token != claim.token
    claim.release()
    assert files(run) == []


def test_a_file_system_without_hard_links_is_one_line(run, monkeypatch):
    def link(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(RunError, match=r"the claim on .*run can't be written: Operation not permitted"):
        records.claim(run).__enter__()
    assert files(run) == []


def test_a_stamp_tells_a_record_from_the_next(run):
    assert records.stamp(run) is None
    stamps = []
    for number in (1, 2):
        with records.claim(run) as staging:
            records.publish(staging, run, {"a": number})
        stamps.append(records.stamp(run))
    assert None not in stamps
    assert stamps[0] != stamps[1]
