"""Which queries attend to which entries, against the reference."""

import pytest
import torch

from kernels.attended import attended_reference, attended_torch
from kernels.attention_score_triton import attended_triton
from tests.kernels.events import make_event
from tests.kernels.grid import half
from tests.kernels.paged import BACKENDS, DEVICE, device_of, upcast
from tests.kernels.test_scores import made_form, on_host, window_queries

ATTENDED = {"triton": attended_triton, "torch": attended_torch, "reference": attended_reference}


def check(found, event, window, group, threshold, form=None, **options):
    """Bits equal the reference's, but where a weight is within 1e-4 of the threshold."""
    q_cache, slots, ends = window_queries(event, window, event.k_cache.shape[2] * group)
    scale = 2 * event.k_cache.shape[-1] ** -0.5
    form = form or {}
    out = found(q_cache, event.view, slots, ends, scale, threshold, **form, **options).cpu()
    host = q_cache.cpu().float(), upcast(event.view), slots.cpu(), ends.cpu(), scale
    more, fewer = (attended_reference(*host, threshold * factor, **on_host(form)) for factor in (0.9999, 1.0001))
    assert out.dtype == torch.int32
    assert out.shape == more.shape == (-(-window // 32), *event.view.lens.shape, event.width)
    assert (out & ~more == 0).all()
    assert (fewer & ~out == 0).all()
    assert fewer.any()


@pytest.mark.usefixtures("poisoned_empty")
@half(
    (("backend", "dtype"), BACKENDS),
    (
        ("lens", "block_size", "layers", "heads", "group", "head_dim", "window"),
        [
            pytest.param([37, 0, 16, 70], 16, 2, 1, 3, 40, 16, id="mixed-b16-g3"),
            pytest.param([130], 64, 1, 1, 4, 64, 32, id="b64-g4-w32"),
            pytest.param([70, 257], 256, 1, 2, 1, 64, 40, id="b256-mha-w40"),
            pytest.param([100, 66], 64, 1, 1, 7, 32, 65, id="b64-g7-w65"),
            pytest.param([1, 20], 16, 1, 1, 5, 32, 1, id="b16-g5-w1"),
        ],
    ),
    ("apart", [pytest.param(False, id="shared"), pytest.param(True, id="apart")]),
)
def test_attended(backend, dtype, apart, lens, block_size, layers, heads, group, head_dim, window):
    device, heads = device_of(backend), heads + apart
    event = make_event(lens, block_size, layers, heads, head_dim, dtype, device, apart=apart, shortest=window)
    check(ATTENDED[backend], event, window, group, 0.02)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_soft_caps_and_sinks(backend, dtype):
    event = make_event([37, 0, 50], 16, 1, 2, 32, dtype, device_of(backend), shortest=34)
    check(ATTENDED[backend], event, 34, 3, 0.02, made_form(event, 6))


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("num_splits", [1, 3, 8])
def test_splits_change_nothing(num_splits):
    event = make_event([230, 17], 64, 1, 1, 32, torch.float32, DEVICE)
    check(attended_triton, event, 16, 3, 0.02, num_splits=num_splits)


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_a_weight_at_the_threshold_is_enough(backend):
    """Equal keys share a query's attention: queries see 7 to 10 entries, and 1/8 of it is enough for two of them."""
    event = make_event([10], 16, 1, 1, 32, torch.float32, device_of(backend))
    q_cache, slots, ends = window_queries(event, 4, 2)
    view = event.view._replace(k_cache=torch.ones_like(event.k_cache))
    out = ATTENDED[backend](torch.zeros_like(q_cache), view, slots, ends, 1.0, 0.125)
    assert out.flatten().tolist() == [0b11] * 7 + [0b10] + [0] * (event.width - 8)
