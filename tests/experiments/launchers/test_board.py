"""What workers on other machines tell, through a folder of a network file system."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from experiments import records
from experiments.launchers import board as board_module
from experiments.launchers.board import Board, Stopped, work
from experiments.launchers.task import Commands, Task


@pytest.fixture
def task(tmp_path) -> Task:
    return Task(0, ("arm",), tmp_path / "run", None, None, 0)


class Heard:
    """A report that keeps what it hears."""

    def __init__(self) -> None:
        self.said: list[tuple] = []

    def started(self, task, worker) -> None:
        self.said.append(("started", worker))

    def ended(self, task, worker, reason, seconds) -> None:
        self.said.append(("ended", worker, reason))


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(monkeypatch, tmp_path, task):
    """NFS knows a file by a handle that is stale once another machine has renamed a new one over it."""
    board, heard, read, stale = Board(tmp_path), Heard(), Path.read_text, [2]

    def read_text(path, **options):
        if stale[0]:
            stale[0] -= 1
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(path, **options)

    board.started(task, "node 1")
    monkeypatch.setattr(Path, "read_text", read_text)
    assert board.tell([task], heard) == [task]
    assert heard.said == [("started", "node 1")]


def test_workers_of_equal_process_numbers_write_files_of_their_own(monkeypatch, tmp_path):
    """As in containers, each of which counts its processes from 1."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    replaced = Path.replace

    def meanwhile(path, target):
        if not names:
            names.append(path)
            records.write_json(tmp_path / "x.json", "the other's")
        else:
            names.append(path)
        return replaced(path, target)

    names: list[Path] = []
    monkeypatch.setattr(Path, "replace", meanwhile)
    records.write_json(tmp_path / "x.json", "mine")
    assert len(set(names)) == 2
    assert (tmp_path / "x.json").read_text() == '"mine"\n'


@pytest.mark.parametrize("when", ["before", "while"])
def test_workers_end_without_an_error_when_the_sweep_has_ended(monkeypatch, tmp_path, task, when):
    """Whoever was slow to hear that it should stop finds the folder gone."""
    folder = tmp_path / "board"
    folder.mkdir()

    class Local:
        def __init__(self, *given, **options):
            return

        def run(self, tasks, report):
            shutil.rmtree(folder)
            with pytest.raises(Stopped):
                report.started(task, "node 1")
            report.tick()
            raise AssertionError("it goes on")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(board_module, "Local", Local)
    if when == "before":
        folder.rmdir()
    work([task], Commands((), ()), tmp_path, folder, "node 1")
