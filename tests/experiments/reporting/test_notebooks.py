"""The notebooks run from top to bottom on what a fresh clone holds, and are stored without outputs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from jupyter_client import KernelManager
from nbclient import NotebookClient

from experiments.paths import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_all_are_there():
    names = ["ablations", "accuracy", "anatomy_of_a_request", "real_llm", "throughput"]
    assert [path.stem for path in NOTEBOOKS] == names


def test_they_only_call_the_library():
    allowed = {"experiments", "IPython", "pandas"}
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code":
                words = [line.split() for line in cell.source.splitlines()]
                imported = {line[1].partition(".")[0] for line in words if line[:1] in (["from"], ["import"])}
                assert imported <= allowed, path.name


FEW = """
%reset -f
from experiments import records
def _few(folder, load=records.load_runs):
    runs = load(folder)
    chosen = runs["policy.name"].isin(["full", "zipage", "random"])
    return runs[chosen].reset_index(drop=True) if len(runs) > 12 else runs
records.load_runs = _few
"""
"""Nothing is left of the notebook before. Of many runs, three policies are enough to draw every picture."""


@pytest.fixture(scope="module")
def kernel() -> Iterator[KernelManager]:
    """One for all notebooks: it imports everything once."""
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(ROOT))
    yield manager
    manager.shutdown_kernel(now=True)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_and_is_stored_without_outputs(path: Path, kernel: KernelManager):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(FEW))
    NotebookClient(notebook, km=kernel, timeout=120).execute()  # raises where a cell does
    assert all(cell.execution_count for cell in code)
    pictures = [
        output
        for cell in code
        for output in cell.outputs
        if output.output_type in ("display_data", "execute_result") and "image/png" in output.data
    ]
    assert pictures
