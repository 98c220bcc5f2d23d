"""Every Triton kernel compiles for a GPU, also where there is none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import kernels

triton = pytest.importorskip("triton")
FOLDER = Path(kernels.__file__).parent


@pytest.mark.skipif("nvidia" not in triton.backends.backends, reason="this Triton compiles nothing for NVIDIA")
def test_every_kernel_compiles():
    command = sys.executable, "-m", "tests.kernels.compile_kernels"
    # Debug information takes a tenth of the time, and tells nothing here
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DISABLE_LINE_INFO": "1"}
    done = subprocess.run(command, check=False, env=env, cwd=FOLDER.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    compiled = {line.split()[0] for line in done.stdout.splitlines()}
    assert compiled == {path.stem for kind in ("triton", "gluon") for path in FOLDER.glob(f"*_{kind}.py")}
