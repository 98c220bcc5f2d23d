"""The convolution before a recurrence against its reference: spans of any length, whose states lie in any rows."""

import pytest
import torch

from kernels.causal_conv import causal_conv, causal_conv_reference, causal_conv_torch
from kernels.causal_conv_triton import causal_conv_triton
from kernels.spans import Spans
from tests.kernels.paged import BACKENDS, device_of

RUN = {"triton": causal_conv_triton, "torch": causal_conv_torch}
NAN = float("nan")
EVERY = pytest.mark.parametrize(("backend", "dtype"), BACKENDS)


def arguments(tokens, rows, fresh, taps, channels, dtype, device):
    """x is a part of wider rows; states that no span may read are NaN."""
    x = torch.randn(tokens, channels + 3, device=device).to(dtype)[:, :channels]
    weight = torch.randn(channels, taps, device=device).to(dtype)
    state = torch.full((max(rows) + 2, taps - 1, channels), NAN, device=device, dtype=dtype)
    for row, is_fresh in zip(rows, fresh, strict=True):
        if row >= 0 and not is_fresh:
            state[row] = torch.randn(taps - 1, channels)
    return x, weight, state, torch.full((tokens, channels), NAN, device=device, dtype=dtype)


def expect(x, weight, state, spans, out):
    """The reference, span by span, on the CPU."""
    x, weight, state, out = (each.cpu().clone() for each in (x, weight, state, out))
    for row, begin, end, fresh in spans.each():
        before = torch.zeros_like(state[row]) if fresh else state[row]
        out[begin:end], state[row] = causal_conv_reference(x[begin:end], before, weight)
    return out, state


def compare(backend, x, weight, state, spans, out):
    expected, after = expect(x, weight, state, spans, out)
    RUN[backend](x, weight, state, spans, out)
    bound = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[x.dtype]
    torch.testing.assert_close(out.cpu(), expected, rtol=bound, atol=bound, equal_nan=True)
    torch.testing.assert_close(state.cpu(), after, rtol=0, atol=0, equal_nan=True)


@EVERY
@pytest.mark.parametrize("taps", [1, 2, 4])
def test_spans_of_any_length(backend, dtype, taps):
    """Shorter than the taps, longer than a tile, empty, left out, and tokens before and after them of no span."""
    lengths, rows = (1, 0, 40, 2, 5, 16, 3), (4, 2, 0, -1, 6, 5, 1)
    fresh = (False, False, True, False, True, False, False)
    device = device_of(backend)
    x, weight, state, out = arguments(2 + sum(lengths) + 4, rows, fresh, taps, 300, dtype, device)
    starts = torch.tensor([2, *lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
    spans = Spans(torch.tensor(rows, device=device), starts, torch.tensor(fresh, device=device))
    compare(backend, x, weight, state, spans, out)


def test_more_spans_than_are_looked_at_together():
    lengths, device = [1, 0, 2] * 25, device_of("triton")
    rows = torch.randperm(75)
    x, weight, state, out = arguments(75, rows.tolist(), (False,) * 75, 2, 8, torch.float32, device)
    starts = torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
    compare("triton", x, weight, state, Spans(rows.to(device), starts), out)


@EVERY
@pytest.mark.parametrize("fresh", [None, (False, True, False, True)])
def test_a_token_each(backend, dtype, fresh):
    rows, device = (3, 0, -1, 2), device_of(backend)
    x, weight, state, out = arguments(4, rows, fresh or (False,) * 4, 4, 70, dtype, device)
    if fresh is not None:
        fresh = torch.tensor(fresh, device=device)
    compare(backend, x, weight, state, Spans(torch.tensor(rows, device=device), None, fresh), out)


def test_spans_go_on_from_each_other():
    x, weight, state = torch.randn(20, 10), torch.randn(10, 4), torch.zeros(1, 3, 10)
    expected, last = causal_conv_reference(x, state[0], weight)
    parts = [
        causal_conv(part, weight, state, Spans(torch.zeros(1).long(), torch.tensor([0, len(part)]).int()))
        for part in x.split([1, 2, 16, 1])
    ]
    torch.testing.assert_close(torch.cat(parts), expected)
    assert (state[0] == last).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, "x has shape"),
        ({"x": torch.zeros(2, 3).double()}, "x has dtype"),
        ({"state": torch.zeros(5, 2, 3)}, "state has shape"),
        ({"weight": torch.zeros(4, 3).T}, "weight has stride"),
        ({"spans": Spans(torch.zeros(3).long())}, "rows has shape .*: give one for each of 2 tokens"),
        ({"spans": Spans(torch.zeros(1).long(), torch.zeros(1).int())}, "starts has shape"),
        ({"spans": Spans(torch.zeros(2).long(), None, torch.zeros(2))}, "fresh has dtype"),
        ({"out": torch.zeros(2, 4)}, "out has shape"),
    ],
)
def test_names_what_is_wrong(given, message):
    right = {"x": torch.zeros(2, 3), "weight": torch.zeros(3, 4), "state": torch.zeros(5, 3, 3)}
    with pytest.raises(ValueError, match=message):
        causal_conv(**right | {"spans": Spans(torch.zeros(2).long())} | given)
