"""Products with a weight, the kernel of few rows among them: each against the reference."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from kernels.linear import linear, linear_reference, linear_torch
from kernels.linear_tiles import MOST_ROWS, TABLE, Tile, find_tile
from kernels.linear_triton import PREFETCH, linear_triton
from tests.gpu.tune_linear import chosen
from tests.kernels.paged import CUDA, DEVICE

# The kernel takes 16 bits, and Triton's interpreter gets bfloat16 products wrong.
CASES = [("triton", torch.float16), ("torch", torch.float32), ("torch", torch.bfloat16)]
CASES += [("triton", torch.bfloat16)] if CUDA else []
BOUNDS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def error(out, expected):
    return ((out.cpu().float() - expected.float()).norm() / expected.float().norm()).item()


@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=lambda value: str(value).removeprefix("torch."))
@pytest.mark.parametrize(
    ("rows", "outputs", "width", "tile"),
    [
        pytest.param(1, 16, 256, Tile(16, 256, 4), id="one-row"),
        pytest.param(17, 96, 512, Tile(32, 256, 4), id="tiles-of-32"),
        pytest.param(33, 80, 256, Tile(16, 128, 6), id="tiles-of-16"),
        pytest.param(40, 64, 256, Tile(64, 128, 3), id="swapped"),
        pytest.param(64, 256, 384, Tile(128, 64, 4), id="swapped-wide"),
    ],
)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_linear(backend, dtype, rows, outputs, width, tile, bias, poisoned_empty):
    device = DEVICE if backend == "triton" else "cpu"
    memory = torch.full((rows, width + 64), float("nan"), dtype=dtype)
    memory[:, :width] = torch.randn(rows, width)
    x, weight = memory[:, :width], (torch.randn(outputs, width) * width**-0.5).to(dtype)
    shift = torch.randn(outputs).to(dtype) if bias else None
    expected = linear_reference(x.float(), weight.float(), None if shift is None else shift.float())
    given = x.to(device), weight.to(device), None if shift is None else shift.to(device)
    compute = partial(linear_triton, tile=tile) if backend == "triton" else linear_torch
    assert error(compute(*given, out=None), expected) < BOUNDS[dtype]
    out = torch.full((rows, outputs), float("nan"), dtype=dtype, device=device)
    assert compute(*given, out=out) is out
    assert error(out, expected) < BOUNDS[dtype]


def test_tiles_of_the_table_are_whole_and_fit():
    rows = json.loads(TABLE.read_text())["tiles"]
    assert len({tuple(row[:3]) for row in rows}) == len(rows)
    for padded, outputs, width, *numbers in rows:
        tile = Tile(*numbers)
        assert find_tile(padded, outputs, width) == tile
        assert (outputs % tile.outputs, width % tile.depth) == (0, 0)
        assert width >= PREFETCH
        held = 2 * tile.stages * tile.depth * (padded + tile.outputs)
        assert held <= 227 * 1024, "more than Hopper lets a program have"


def test_the_table_follows_from_its_record():
    record = Path(__file__).parents[2] / "results" / "records" / "linear_tiles_h200.json"
    measured = json.loads(record.read_text())["measured"]
    assert json.loads(TABLE.read_text())["tiles"] == sorted(chosen(measured))


def test_a_tile_is_found_by_rows():
    outputs, width = 24576, 4096  # gate and up of Qwen3-8B
    found = [find_tile(rows, outputs, width) for rows in (1, 16, 17, 32, 33, MOST_ROWS)]
    assert None not in found
    assert (found[0], found[2], found[4]) == (found[1], found[3], found[5])
    assert find_tile(0, outputs, width) is find_tile(MOST_ROWS + 1, outputs, width) is find_tile(1, 7, 9) is None


def test_a_cpu_computes_as_torch_does():
    x, weight = torch.randn(3, 128), torch.randn(32, 128)
    assert torch.equal(linear(x, weight), torch.nn.functional.linear(x, weight))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"x": torch.zeros(128)}, "x has shape", id="x"),
        pytest.param({"weight": torch.zeros(32, 64)}, "weight has shape", id="width"),
        pytest.param({"weight": torch.zeros(32, 128, dtype=torch.float16)}, "weight has dtype", id="dtype"),
        pytest.param({"bias": torch.zeros(31)}, "bias has shape", id="bias"),
        pytest.param({"out": torch.zeros(3, 31)}, "out has shape", id="out"),
        pytest.param({"out": torch.zeros(32, 3).t()}, "out has stride", id="out-stride"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    given = {"x": torch.zeros(3, 128), "weight": torch.zeros(32, 128)} | change
    with pytest.raises(ValueError, match=message):
        linear(**given)
