"""A clone in a folder named `zipage` does not hide the package it installs, wherever Python is started."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_a_clone_named_zipage_hides_nothing_from_the_folder_above_it(tmp_path):
    """There `import zipage` meets the clone's folder first, which is no package: the installed one must win."""
    pytest.importorskip("setuptools", minversion="77")
    clone, site = tmp_path / "zipage", tmp_path / "site"
    for package in ("zipage", "kernels", "experiments"):
        (clone / package).mkdir(parents=True)
        (clone / package / "__init__.py").write_text("found = True\n", encoding="utf-8")
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, clone)
    run("from setuptools.build_meta import build_editable; build_editable('..')", clone)
    for wheel in tmp_path.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(site)
    run(f"import site; site.addsitedir({str(site)!r}); import zipage; assert zipage.found", tmp_path, "-S")


def run(code: str, folder: Path, *flags: str) -> None:
    done = subprocess.run(
        [sys.executable, "-E", *flags, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
