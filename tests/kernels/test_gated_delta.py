"""The gated delta rule against its reference: spans of any length, whose states lie in any rows."""

import pytest
import torch
from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

from kernels.delta_gates import DeltaGates
from kernels.gated_delta import gated_delta, gated_delta_reference, gated_delta_torch
from kernels.gated_delta_step_triton import gated_delta_step_triton
from kernels.gated_delta_triton import gated_delta_triton
from kernels.spans import Spans
from tests.kernels.paged import BACKENDS, device_of

NAN = float("nan")
EVERY = pytest.mark.parametrize(("backend", "dtype"), BACKENDS)


def arguments(tokens, rows, fresh, heads=2, group=3, dim=8, value_dim=12, dtype=torch.float32, device="cpu"):
    """Some heads forget at once, others nothing; parts of wider rows; states that no span may read are NaN."""
    value_heads = heads * group
    widths = heads * dim, heads * dim, value_heads * value_dim, value_heads, value_heads
    q, k, v, a, b = torch.randn(tokens, sum(widths), device=device).to(dtype).split(widths, dim=1)
    decay_log = torch.tensor([-20.0, -5.0, -2.0, 0.0, 1.0, 2.5], device=device)[:value_heads]
    state = torch.full((max(rows) + 2, value_heads, dim, value_dim), NAN, device=device)
    for row, is_fresh in zip(rows, fresh, strict=True):
        if row >= 0 and not is_fresh:
            state[row] = torch.randn(state.shape[1:])
    return {
        "q": q.unflatten(1, (heads, dim)),
        "k": k.unflatten(1, (heads, dim)),
        "v": v.unflatten(1, (value_heads, value_dim)),
        "gates": DeltaGates(a, b, decay_log, torch.randn(value_heads, device=device)),
        "state": state,
        "out": torch.full((tokens, value_heads, value_dim), NAN, device=device),
    }


def expect(q, k, v, gates, state, out, spans):
    """The reference, span by span, on the CPU."""
    q, k, v, state, out = (x.cpu().clone() for x in (q, k, v, state, out))
    decay, beta = (x.cpu() for x in gates.computed())
    for row, begin, end, fresh in spans.each():
        before = torch.zeros_like(state[row]) if fresh else state[row]
        part = slice(begin, end)
        out[part], state[row] = gated_delta_reference(q[part], k[part], v[part], decay[part], beta[part], before)
    return out, state


def compare(backend, given, spans):
    run = gated_delta_torch
    if backend == "triton":
        run = gated_delta_step_triton if spans.starts is None else gated_delta_triton
    expected = expect(**given, spans=spans)
    run(**given, spans=spans)
    exact = given["q"].dtype == torch.float32 or spans.starts is None or backend == "torch"
    bound = {"rtol": 1e-4, "atol": 1e-4} if exact else {"rtol": 1e-2, "atol": 1e-2}
    for x, y in zip((given["out"], given["state"]), expected, strict=True):
        torch.testing.assert_close(x.cpu(), y, **bound, equal_nan=True)


@EVERY
@pytest.mark.parametrize("fresh", [None, (False, True, False, True)])
def test_a_token_each(backend, dtype, fresh):
    rows, device = (3, 0, -1, 2), device_of(backend)
    given = arguments(4, rows, fresh or (False,) * 4, dtype=dtype, device=device)
    if fresh is not None:
        fresh = torch.tensor(fresh, device=device)
    compare(backend, given, Spans(torch.tensor(rows, device=device), None, fresh))


@EVERY
def test_columns_are_divided(backend, dtype):
    given = arguments(2, (1, 0), (False, False), heads=1, group=2, dim=24, value_dim=72, dtype=dtype,
                      device=device_of(backend))  # fmt: skip
    compare(backend, given, Spans(torch.tensor([1, 0], device=device_of(backend))))


@EVERY
@pytest.mark.parametrize("lengths", [(1, 0, 63, 7, 2), (64, 65, 0, 5, 130)], ids=str)
def test_spans_of_any_length(backend, dtype, lengths):
    """Empty, left out, and tokens before and after them of no span."""
    rows, fresh, device = (4, 2, 0, -1, 6), (False, False, True, False, False), device_of(backend)
    given = arguments(2 + sum(lengths) + 3, rows, fresh, dtype=dtype, device=device)
    starts = torch.tensor([2, *lengths], device=device).cumsum(0, dtype=torch.int32)
    compare(backend, given, Spans(torch.tensor(rows, device=device), starts, torch.tensor(fresh, device=device)))


def test_more_spans_than_are_looked_at_together():
    device, rows = device_of("triton"), torch.randperm(70)
    given = arguments(
        105, rows.tolist(), (False,) * 70, heads=1, group=1, dim=4, value_dim=4, dtype=torch.float32, device=device
    )
    starts = torch.tensor([0, *[1, 2] * 35], device=device).cumsum(0, dtype=torch.int32)
    compare("triton", given, Spans(rows.to(device), starts))


@EVERY
def test_the_same_key_again_and_again(backend, dtype):
    """The system that a chunk solves is then as far from the identity as can be: powers of it would lose all digits."""
    given = arguments(64, (0,), (True,), value_dim=40, dtype=dtype, device=device_of(backend))
    given["k"][:] = given["k"][:1]
    given["gates"].b[:] = 20.0
    given["gates"].decay_log[:] = -20.0
    whole = Spans(*(torch.tensor(x, device=device_of(backend)) for x in ([0], [0, 64], [True])))
    compare(backend, given, whole._replace(starts=whole.starts.int()))


def test_the_reference_is_that_of_transformers():
    given = arguments(9, (0,), (False,))
    q, k, v = (given[name][None] for name in "qkv")
    decay, beta = given["gates"].computed()
    options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    expected = torch_recurrent_gated_delta_rule(
        q, k, v, decay[None], beta[None], initial_state=given["state"][:1], **options
    )
    for x, y in zip(gated_delta_reference(q[0], k[0], v[0], decay, beta, given["state"][0]), expected, strict=True):
        torch.testing.assert_close(x, y[0])


def test_spans_go_on_from_each_other():
    given = arguments(90, (0,), (False,))
    state, gates = given.pop("state"), given.pop("gates")
    del given["out"]
    whole = gated_delta_reference(**given, **dict(zip(("decay", "beta"), gates.computed())), state=state[0])
    parts = []
    for begin, end in ((0, 1), (1, 30), (30, 31), (31, 90)):
        part = gates._replace(a=gates.a[begin:end], b=gates.b[begin:end])
        spans = Spans(torch.zeros(1).long(), torch.tensor([0, end - begin]).int())
        if end - begin == 1:
            spans = Spans(torch.zeros(1).long())
        parts.append(
            gated_delta(**{name: x[begin:end] for name, x in given.items()}, gates=part, state=state, spans=spans)
        )
    torch.testing.assert_close(torch.cat(parts), whole[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state[0], whole[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"q": torch.zeros(3, 8)}, "q has shape"),
        ({"q": torch.zeros(3, 2, 8).double()}, "q has dtype"),
        ({"v": torch.zeros(3, 5, 12)}, "v has heads 5: give a multiple of q's 2"),
        ({"k": torch.zeros(3, 1, 8)}, "k has shape"),
        ({"state": torch.zeros(2, 6, 12, 8)}, "state has shape"),
        ({"state": torch.zeros(2, 6, 12, 8).mT}, "state has stride"),
        ({"spans": Spans(torch.zeros(2).long())}, "rows has shape"),
        ({"out": torch.zeros(3, 6, 8)}, "out has shape"),
    ],
)
def test_names_what_is_wrong(given, message):
    right = arguments(3, (0, 1, 2), (True,) * 3) | {"spans": Spans(torch.arange(3))}
    with pytest.raises(ValueError, match=message):
        gated_delta(**right | given)


def test_names_which_gate_is_wrong():
    given = arguments(3, (0, 1, 2), (True,) * 3) | {"spans": Spans(torch.arange(3))}
    for name, x in {"b": torch.zeros(3, 6).half(), "a": torch.zeros(2, 6), "decay_log": torch.zeros(5)}.items():
        with pytest.raises(ValueError, match=f"{name} has"):
            gated_delta(**given | {"gates": given["gates"]._replace(**{name: x})})
