"""What decode attention for Hopper relies on where it reads entries while the kernels ahead of it still run."""

import numpy as np
import pytest
import torch

from kernels.decode_shares_triton import share_decodes
from tests.engine.compressed import greedy, make_llm, pause_now_and_then, random_prompts, tokens_of
from tests.eviction.cases import Case
from tests.tiny_models import VOCAB, save_tiny_model
from tests.worker.test_cuda_graph import run_in_graphs
from zipage.worker import paged_attention


class Watch:
    """Looks on as layers store and attend.

    Attributes:
        early: calls of which each row reads but one entry that its step stores, its last.
        fresh: those of which some reads more.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.early = self.fresh = 0
        self._stored = None
        self._pieces = [None] * 4
        """Of the latest calls: a step has two groups of layers at most."""
        for name, place in (("store_kv", 4), ("store_step", 6)):
            monkeypatch.setattr(paged_attention, name, self._storing(getattr(paged_attention, name), place))
        monkeypatch.setattr(paged_attention, "paged_decode", self._attending(paged_attention.paged_decode))

    def _storing(self, store, place):
        def watched(*args):
            self._stored = args[place][:, 0].numpy()
            store(*args)

        return watched

    def _attending(self, attend):
        def watched(q, view, scale, pieces, out, form, early):
            assert early == any(pieces is other for other in self._pieces), "the first layer of its group"
            self._pieces = [*self._pieces[1:], pieces]
            tables, lens = view.block_tables[:, 0].numpy(), view.lens[:, 0].numpy()
            entries, size = np.arange(view.width), view.k_cache.shape[2]
            if form.window is not None:
                return attend(
                    q, view, scale, pieces, out, form, early
                )  # by another kernel: blocks before a window may be anyone's
            slots = tables[:, entries // size] * size + entries % size
            if np.isin(slots[entries < lens[:, None] - 1], self._stored).any():
                assert share_decodes(view, 64, 2, 9).fresh.item() == 1
                self.fresh += 1
            else:
                self.early += early
            return attend(q, view, scale, pieces, out, form, early)

        return watched


@pytest.mark.parametrize(
    ("case", "options", "family"),
    [
        (None, {"swap_space": 0.01}, "qwen3"),
        (Case("zipage", {"chunk": 32}), {}, "qwen3"),
        (Case("zipage", {"chunk": 32}), {"async_compression": True, "swap_space": 0.01}, "qwen3"),
        (None, {}, "gpt_oss"),
    ],
    ids=["full KV", "compressed", "beside", "mixed"],
)
@pytest.mark.parametrize("all_decode", [True, None])
def test_a_step_stores_nothing_else_that_its_decodes_read(monkeypatch, tmp_path, case, options, family, all_decode):
    """Chunks, shared prefixes, samples, pauses, preemptions and compressions among them. Where it does, as for tokens
    of a prompt that attend as decodes, `share_decodes` finds out."""
    llm = make_llm(
        save_tiny_model(family, tmp_path, num_hidden_layers=4 if family == "gpt_oss" else 2),
        case, debug=False, num_blocks=40, headroom=0, max_num_batched_tokens=48, **options,
    )  # fmt: skip
    steps, watch = run_in_graphs(llm, all_decode), Watch(monkeypatch)
    if "swap_space" in options:
        pause_now_and_then(llm)
    prompts = random_prompts([5, 64, 33, 1, 100, 65], VOCAB)
    prompts += [prompts[4][:64] + tail for tail in random_prompts([1, 30, 1], VOCAB, seed=1)]
    with torch.inference_mode():
        tokens_of(llm.generate(prompts, greedy(40, n=2), use_tqdm=False))
    assert any(count > 8 for count, _ in steps)
    assert watch.early > 40
    assert watch.fresh > (8 if all_decode else -1)
