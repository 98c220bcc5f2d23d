"""Hugging Face's package `kernels`, which transformers imports where it is installed, beside our folder."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.utils import import_utils

ROOT = Path(__file__).parents[1]
NAMES = [
    "CUDAProperties",
    "Device",
    "KernelizeFallback",
    "LayerRepository",
    "LocalLayerRepository",
    "ROCMProperties",
    "get_kernel",
    "kernelize",
    "register_kernel_mapping",
    "replace_kernel_forward_from_hub",
    "use_kernel_forward_from_hub",
    "use_kernel_mapping",
    "use_kernelized_func",
]
OURS = "from zipage import EngineConfig; from kernels import layout; from kernels.store_kv import store_kv"
THEIRS = "from kernels import get_kernel, Device; from kernels.layer import mode; assert get_kernel is mode.get_kernel"


@pytest.fixture
def site(tmp_path) -> Path:
    """A folder of packages with one that has the names, and the distribution, which transformers looks for."""
    version = getattr(import_utils, "KERNELS_MIN_VERSION", "0.99.0")
    package, metadata = tmp_path / "site" / "kernels", tmp_path / "site" / f"kernels-{version}.dist-info"
    (package / "layer").mkdir(parents=True)
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    (package / "__init__.py").write_text(
        "import importlib.metadata\n"
        "__version__ = importlib.metadata.version('kernels')\n"
        f"from kernels.layer import Mode, {', '.join(NAMES)}\n"
        "import kernels\n"
        "print('theirs')\n"
    )
    (package / "layer" / "__init__.py").write_text(
        f"from .mode import Mode, {', '.join(NAMES)}\nfrom kernels.layer import mode\n"
    )
    anything = "".join(f"def {name}(*args, **kwargs): return lambda cls: cls\n" for name in NAMES)
    (package / "layer" / "mode.py").write_text(f"class Mode:\n    INFERENCE = TRAINING = TORCH_COMPILE = 0\n{anything}")
    return package.parent


def run(code: str, *path: Path, cwd: Path, given: str = "") -> str:
    """What the code prints where these folders are on the path, and Zipage is not installed otherwise."""
    code = f"import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in f.__module__]\n{code}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=environment,
        input=given,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


EACH_FORKED = """
import os, sys, torch
for path, code in eval(sys.stdin.read()):
    if not (pid := os.fork()):
        assert not {"kernels", "zipage", "transformers"} & sys.modules.keys()
        sys.path[:0] = path
        exec(code)
        sys.stdout.flush()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0, (path, code)
"""
IN_TRANSFORMERS = f"""
from transformers.utils import is_kernels_available
assert is_kernels_available()
import transformers.integrations.hub_kernels as hub
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
assert hub.get_kernel_hub.__module__ == "kernels.layer.mode"
{OURS}
"""
NOT_RUN = f"{OURS}\nimport kernels\nassert not hasattr(kernels, '__wrapped__')"


def test_both_packages_are_there(site, tmp_path):
    """Whichever comes first, on the path and in the program; transformers works with the other one, and it is not run
    until it is asked for: programs forked from one that has torch.
    """
    broken = tmp_path / "broken"
    shutil.copytree(site, broken)
    (broken / "kernels" / "__init__.py").write_text("raise RuntimeError('of another version')\n")
    orders = [f"{OURS}\n{THEIRS}", f"{THEIRS}\n{OURS}"]
    paths = [[str(ROOT), str(site)], [str(site), str(ROOT)]]
    programs = [(path, code) for path in paths for code in orders]
    programs += [([str(ROOT), str(site)], IN_TRANSFORMERS), ([str(ROOT), str(broken)], NOT_RUN)]
    said = run(EACH_FORKED, cwd=tmp_path, given=repr(programs))
    assert said == "theirs\n" * 5, "the other package is run once"


def test_without_the_other_package_a_name_that_is_not_there_is_an_import_error(tmp_path):
    code = "try: from kernels import get_it\nexcept ImportError as error: print(error)"
    assert "cannot import name 'get_it' from 'kernels'" in run(code, ROOT, cwd=tmp_path)
