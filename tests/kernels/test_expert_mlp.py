"""A mixture of experts, both ways to compute it against the reference."""

from functools import partial

import pytest
import torch

from kernels.clamped_swiglu import clamped_swiglu, clamped_swiglu_reference
from kernels.expert_mlp import expert_mlp, expert_mlp_all, expert_mlp_grouped, expert_mlp_reference


def arguments(tokens=9, width=32, inner=16, num_experts=5, active=2, dtype=torch.float32) -> dict:
    """Expert 0 is nobody's, and expert 1 everybody's."""
    others = torch.stack([2 + torch.randperm(num_experts - 2)[: active - 1] for _ in range(tokens)] or [torch.empty(0)])
    experts = torch.cat((torch.ones(tokens, 1), others.reshape(tokens, active - 1)), dim=1).long()
    return {
        "x": torch.randn(tokens, width).to(dtype),
        "experts": experts,
        "shares": torch.rand(tokens, active),
        "gate_up": (torch.randn(num_experts, 2 * inner, width) / width**0.5).to(dtype),
        "down": (torch.randn(num_experts, width, inner) / inner**0.5).to(dtype),
    }


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("compute", [expert_mlp, expert_mlp_grouped, expert_mlp_all])
def test_equals_the_reference(compute, dtype, bound):
    given = arguments(dtype=dtype)
    out, expected = compute(**given), expert_mlp_reference(**given)
    assert out.dtype == dtype
    assert (out - expected).abs().max() < bound * expected.abs().max()


@pytest.mark.parametrize("compute", [expert_mlp, expert_mlp_grouped, expert_mlp_all])
def test_biases_and_another_gate(compute):
    """gpt-oss's."""
    given = arguments() | {"biases": (torch.randn(5, 32), torch.randn(5, 32))}
    expected = expert_mlp_reference(**given, gate=partial(clamped_swiglu_reference, alpha=1.7, limit=0.5))
    out = compute(**given, gate=partial(clamped_swiglu, alpha=1.7, limit=0.5))
    torch.testing.assert_close(out, expected)
    assert (out - compute(**arguments())).abs().max() > 0.1


def test_no_tokens():
    assert expert_mlp(**arguments(tokens=0)).shape == (0, 32)


def test_rows_that_the_grouped_product_does_not_take():
    given = arguments(width=30, inner=6)
    torch.testing.assert_close(expert_mlp(**given), expert_mlp_reference(**given))


def test_an_expert_that_overflows_costs_those_alone_that_it_has():
    given = arguments()
    given["down"][0] = torch.inf
    assert expert_mlp_all(**given).isfinite().all()


def test_while_a_graph_is_captured_the_host_reads_no_group(monkeypatch):
    """Where PyTorch's grouped product would."""
    given = {name: x.to("meta") for name, x in arguments().items()}
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    taken = []
    for name in ("expert_mlp_all", "expert_mlp_grouped"):
        monkeypatch.setattr(f"kernels.expert_mlp.{name}", lambda *_, name=name: taken.append(name))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    expert_mlp(**given)
    given = {name: x.bfloat16() if x.is_floating_point() and name != "shares" else x for name, x in given.items()}
    expert_mlp(**given)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    expert_mlp(**given)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    expert_mlp(**given)
    assert taken == ["expert_mlp_all", "expert_mlp_grouped", "expert_mlp_all", "expert_mlp_grouped"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"experts": torch.zeros(9, 2).int()}, "experts has dtype torch.int32: convert it to torch.int64"),
        ({"shares": torch.zeros(9, 3)}, r"shares has shape \(9, 3\): give \[9, 2\]"),
        ({"gate_up": torch.zeros(5, 16, 32)}, r"gate_up has shape \(5, 16, 32\): give \[5, 32, 32\]"),
        ({"down": torch.zeros(32, 16)}, r"down has shape \(32, 16\): give \[experts, width, inner\]"),
        ({"biases": (torch.zeros(5, 32), torch.zeros(5, 16))}, r"down's bias has shape \(5, 16\): give \[5, 32\]"),
        ({"down": torch.zeros(5, 16, 32).mT}, "down has stride .*: make its last dimension contiguous"),
    ],
)
def test_wrong_arguments_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        expert_mlp(**arguments() | given)
