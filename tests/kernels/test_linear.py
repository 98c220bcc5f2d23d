"""Products with a weight, the kernel of few rows among them: each against the reference."""

import pytest
import torch

from kernels.linear import MOST_ROWS, linear, linear_reference, linear_torch
from kernels.linear_triton import linear_triton, tile
from tests.kernels.paged import CUDA, DEVICE

# The kernel takes 16 bits, and Triton's interpreter gets bfloat16 products wrong.
CASES = [("triton", torch.float16), ("torch", torch.float32), ("torch", torch.bfloat16)]
CASES += [("triton", torch.bfloat16)] if CUDA else []
BOUNDS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
LINEAR = {"triton": linear_triton, "torch": linear_torch}


def error(out, expected):
    return ((out.cpu().float() - expected.float()).norm() / expected.float().norm()).item()


@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=lambda value: str(value).removeprefix("torch."))
@pytest.mark.parametrize(
    ("rows", "outputs", "width"),
    [
        pytest.param(1, 16, 128, id="one-row"),
        pytest.param(17, 96, 512, id="tiles-of-32"),
        pytest.param(33, 80, 256, id="tiles-of-16"),
        pytest.param(40, 64, 256, id="swapped"),
        pytest.param(64, 192, 384, id="swapped-many"),
    ],
)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_linear(backend, dtype, rows, outputs, width, bias, poisoned_empty):
    device = DEVICE if backend == "triton" else "cpu"
    memory = torch.full((rows, width + 64), float("nan"), dtype=dtype)
    memory[:, :width] = torch.randn(rows, width)
    x, weight = memory[:, :width], (torch.randn(outputs, width) * width**-0.5).to(dtype)
    shift = torch.randn(outputs).to(dtype) if bias else None
    expected = linear_reference(x.float(), weight.float(), None if shift is None else shift.float())
    given = x.to(device), weight.to(device), None if shift is None else shift.to(device)
    assert error(LINEAR[backend](*given), expected) < BOUNDS[dtype]
    out = torch.full((rows, outputs), float("nan"), dtype=dtype, device=device)
    assert LINEAR[backend](*given, out=out) is out
    assert error(out, expected) < BOUNDS[dtype]


@pytest.mark.parametrize("processors", [1, 114, 132])
@pytest.mark.parametrize("rows", [1, 16, 17, 32, 33, MOST_ROWS])
@pytest.mark.parametrize(("outputs", "width"), [(6144, 4096), (4096, 4096), (24576, 4096), (1024, 3072), (1536, 8960)])
def test_tiles_are_whole_and_fit(processors, rows, outputs, width):
    options = tile(rows, outputs, width, processors)
    assert options["ROWS"] >= rows
    assert outputs % options["OUTPUTS"] == 0
    assert width % options["DEPTH"] == 0
    held = options["num_stages"] * options["DEPTH"] * (options["ROWS"] + options["OUTPUTS"]) * 2
    assert held <= 227 * 1024, "more than Hopper lets a program have"


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
