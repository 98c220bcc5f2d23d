"""Files and folders that are not as they should be: one line that names the option, the file and the fault."""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path

import pytest

from experiments import archive, regrade, report, run
from experiments.config.arms import read_sweep
from experiments.errors import UsageError
from experiments.records import HASHES, load_runs
from tests.experiments.fake_engine import fake_backend


@pytest.fixture
def loop(tmp_path):
    """A symbolic link to itself."""
    path = tmp_path / "loop"
    path.symlink_to(path)
    return path


@pytest.fixture
def said(monkeypatch, capsys):
    """What a command says as its error, in one line; it must end with code 2."""

    def said(command, *arguments: object) -> str:
        capsys.readouterr()
        words = [str(argument) for argument in arguments]
        monkeypatch.setattr(sys, "argv", ["run", *words])
        assert (run.main(fake_backend()) if command is run else command.main(words)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return said


def test_links_in_a_circle(launch, said, loop, results, arguments, tmp_path):
    launch()
    circle = "Too many levels of symbolic links"
    assert said(run, *arguments, f"model.path={loop}").startswith(f"error: model.path={loop}: ")
    assert said(archive, results, "--to", loop) == f"error: --to {loop}: can't be written: {circle}"
    assert said(run, *arguments, "-m", f"results_dir={loop}", "seed=0,1") == (
        f"error: results_dir={loop}: can't be written: {circle}"
    )
    (results / "self").symlink_to(results)
    assert len(load_runs(results)) == 1


def test_several_runs_into_a_file(said, arguments, tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    line = said(run, *arguments, f"results_dir={path}", "seed=0,1", "-m")
    assert line == f"error: results_dir={path}: can't be written: Not a directory"


def test_new_grades_are_written_whole_or_not_at_all(launch, said, results, tmp_path):
    launch()
    folder, target = tmp_path / "folder.parquet", tmp_path / "grades.parquet"
    folder.mkdir()
    assert said(regrade, results, "--write", folder) == f"error: --write {folder}: can't be written: Is a directory"
    assert regrade.main([str(results), "--write", str(target)]) == 0
    whole = target.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))  # as on a disk that is full
    try:
        line = said(regrade, results, "--write", target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert line == f"error: --write {target}: can't be written: {os.strerror(27)}"
    assert target.read_bytes() == whole
    assert {path.name for path in tmp_path.glob("*grades*")} == {"grades.parquet"}


@pytest.mark.parametrize("lost", ["config.yaml", "steps.parquet", "provenance.json"])
def test_record_that_lost_a_file_is_named(launch, results, caplog, lost):
    launch()
    launch("seed=1")
    (results / load_runs(results)["run"][0] / lost).unlink()
    caplog.clear()
    assert len(load_runs(results)) == 1
    (line,) = caplog.messages
    assert "skipped, its record is damaged (" in line
    assert lost in line


def test_record_of_a_newer_schema_is_read(launch, results, capsys):
    launch()
    (path,) = load_runs(results)["path"]
    config, metrics = Path(path, "config.yaml"), Path(path, "metrics.json")
    config.write_text(f"{config.read_text()}galaxy: {{warp: 3}}\n")
    numbers = json.loads(metrics.read_text())
    del numbers[HASHES]
    metrics.write_text(json.dumps(numbers | {"entropy": {"mean": 2.0}}))
    assert report.main([str(results)]) == 0
    assert load_runs(results)["galaxy.warp"][0] == 3
    assert launch() == 0
    assert "already done" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("", "must hold axes or arms"),
        ("- seed", "must hold axes or arms"),
        ("axs: {seed: [0]}", "axs: unknown key; must be axes or arms"),
        ("axes:\n\tseed: [0]", "; YAML is indented with spaces, not tabs"),
        ("axes: {seed: [0, 1]", "expected ',' or '}'"),
        ("axes: {1: [0]}", "axes: 1 is no option; its name begins with a letter"),
        ('axes: {"": [0]}', "axes: '' is no option; its name begins with a letter"),
        ("arms: [{~limit: 3}]", "arms[0]: '~limit' is no option; its name begins with a letter"),
    ],
)
def test_sweep_file_of_another_form(tmp_path, content, fault):
    path = tmp_path / "own.yaml"
    path.write_text(content)
    with pytest.raises(UsageError) as caught:
        read_sweep(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert fault in str(caught.value)
    assert "\n" not in str(caught.value)
