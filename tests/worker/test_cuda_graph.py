"""What the graph of a step computes, without a GPU to capture it on."""

from contextlib import contextmanager, nullcontext
from itertools import product

import numpy as np
import pytest
import torch

from tests.calibrations import MADE_UP
from tests.engine.compressed import greedy, make_llm, random_prompts, tokens_of
from tests.eviction.cases import Case
from tests.tiny_models import VOCAB, save_tiny_model
from zipage import LLM
from zipage.scheduling.planner import plan_step
from zipage.worker.cuda_graph import NO_CHUNKS, StepGraphs, batch_sizes, capture_stream
from zipage.worker.token_batch import PromptChunks, TokenBatch

ZIPAGE, KVZAP = Case("zipage", {"chunk": 32}), Case("kvzap", MADE_UP)
UNEQUAL = {"allocation": "adaptive", "allocation_options": {"round": "entry"}, "enable_prefix_caching": False}


@pytest.mark.parametrize(("largest", "sizes"), [(1, [1]), (5, [1, 2, 4, 5]), (33, [1, 2, 4, 8, 16, 32, 33])])
def test_sizes_end_with_the_largest_batch(largest, sizes):
    assert batch_sizes(largest) == sizes


def test_sizes_of_large_batches():
    sizes = batch_sizes(512)
    assert sizes == sorted(set(sizes))
    assert sizes[-4:] == [416, 448, 480, 512]
    assert batch_sizes(1300)[-5:] == [960, 1024, 1152, 1280, 1300]


@pytest.fixture
def fake_cuda(monkeypatch):
    """Stands in for what captures call of `torch.cuda`; a list of the streams made, and one of those captured on."""
    made, captured_on = [], []

    class Stream(nullcontext):
        def __init__(self, device=None):
            super().__init__()
            made.append(self)

        def wait_stream(self, other):
            pass

    class Graph:
        def pool(self):
            return (0, 1)

        def replay(self):
            pass

    @contextmanager
    def graph(graph, pool=None, stream=None, **_):
        captured_on.append(stream)
        yield

    current = Stream()
    made.clear()
    for name, fake in {
        "Stream": Stream,
        "stream": lambda stream: stream,
        "current_stream": lambda device=None: current,
        "CUDAGraph": Graph,
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    capture_stream.cache_clear()
    yield made, captured_on
    capture_stream.cache_clear()


def test_all_graphs_are_captured_on_one_stream_the_largest_first(tmp_path, fake_cuda):
    """cuBLAS keeps a workspace for every stream it sees, and a pool that begins small grows with every larger graph."""
    runner = make_llm(save_tiny_model("qwen3", tmp_path), None, debug=False)._core.runner
    runner._capture_stream = capture_stream(torch.device("cuda"))
    graphs = runner.step_graphs(runner.cache, runner._tables)
    with torch.inference_mode():
        for _ in range(2):
            assert len(graphs.run(empty_batch(3), chunks([], 3))) == 3
        graphs.run(empty_batch(12), chunks([], 12))
        graphs.run(empty_batch(70, [65_530] * 50), chunks([65_530], 20, 50))
    assert list(graphs._graphs) == [(graphs.most, True), (4, False), (16, False), (80, True)]
    made, captured_on = fake_cuda
    assert len(made) == 1
    assert captured_on == made * 4
    assert graphs._inputs.nbytes + graphs._hidden.nbytes == graphs.kept_bytes


@pytest.mark.parametrize(
    ("family", "options", "largest"),
    [
        ("qwen3", {}, [(288, False), (512, True)]),
        ("qwen3", UNEQUAL, [(264, False)]),
        ("qwen3_next", {}, [(8, False), (512, True)]),
    ],
    ids=["", "unequal", "hybrid"],
)
def test_the_largest_graph_of_each_kind_is_measured(tmp_path, fake_cuda, monkeypatch, family, options, largest):
    """One has fewer tokens, and block tables for all of them: of long tables these take more than the rest."""
    case = ZIPAGE if options else None
    runner = make_llm(save_tiny_model(family, tmp_path), case, debug=False, **options)._core.runner
    runner._capture_stream = capture_stream(torch.device("cuda"))
    graphs, ran = runner.step_graphs(runner.cache, runner._tables), []
    monkeypatch.setattr(graphs, "forward", lambda inputs, size: ran.append((size, len(inputs) > 7 * size)))
    graphs.warm_up_largest()
    assert sorted(ran) == largest
    held = StepGraphs._all_decode(empty_batch(264, [1] * 256), chunks([1] * 256, 8, 1))
    assert held, "a full batch of decodes and as many tokens of prompts"


def run_in_graphs(llm: LLM, all_decode: bool | None = None) -> list[tuple[int, bool]]:
    """From here on steps compute what a graph would, with rows of nobody.

    Args:
        all_decode: where tokens of prompts may: whether they attend as decodes.

    Returns:
        A list that gets the tokens of each step, and whether it had prefill attention.
    """
    runner, steps = llm._core.runner, []
    graphs = runner.step_graphs(runner.cache, runner._tables, runner._sliding_tables)

    def run(batch: TokenBatch, chunks: PromptChunks) -> torch.Tensor:
        size, prompts = len(batch) + 5, not all_decode
        if all_decode is None:
            prompts = not graphs._all_decode(batch, chunks, graphs._decoded_tokens)
        if not len(chunks):
            prompts = False
        steps.append((len(batch), prompts))
        return graphs.forward(graphs.inputs(size, batch, chunks if prompts else None), size)[: len(batch)]

    graphs.run = run
    runner._graphs = graphs
    return steps


def empty_batch(count: int, lens: list[int] = ()) -> TokenBatch:
    """Tokens of nobody, the last of which read `lens` entries."""
    zeros = np.zeros(count, dtype=np.int64)
    read = zeros.copy()
    read[count - len(lens) :] = lens
    return TokenBatch(zeros, zeros - 1, zeros, zeros - 1, zeros - 1, zeros, read)


def chunks(lens: list[int], decodes: int, tokens: int = 0) -> PromptChunks:
    """Of so many tokens each, beside `decodes`."""
    count = np.arange(len(lens) + 1)
    return PromptChunks(np.zeros(len(lens), dtype=np.int64), np.array(lens, dtype=np.int64), decodes + tokens * count)


@pytest.mark.parametrize(
    ("lens", "all_decode"),
    [
        ([], True),
        (range(1, 257), True),
        (range(1, 258), False),
        (range(4097, 4113), False),
        ([65_536], True),
        ([65_537], False),
    ],
)
def test_prompts_attend_as_decodes_while_they_are_short_and_read_little(lens, all_decode):
    batch = empty_batch(3 + len(lens), list(lens))
    assert StepGraphs._all_decode(batch, chunks([0] * (len(lens) > 0), 3, len(lens))) == all_decode


@pytest.mark.parametrize(
    ("tokens", "prompts", "options", "taken"),
    [
        (300, 1, {}, True),
        (512, 8, {}, True),
        (513, 8, {}, False),
        (300, 9, {}, False),
        (9, 9, {}, True),  # as decodes
        (300, 1, UNEQUAL, False),
        (256, 1, UNEQUAL, True),
    ],
)
def test_longer_prompts_run_in_a_graph_while_they_are_few(tmp_path, tokens, prompts, options, taken):
    case = ZIPAGE if options else None
    llm = make_llm(save_tiny_model("qwen3", tmp_path), case, debug=False, max_num_batched_tokens=512, **options)
    runner = llm._core.runner
    graphs = runner.step_graphs(runner.cache, runner._tables)
    assert graphs.takes(empty_batch(tokens, [10] * tokens), chunks([10] * prompts, 0, tokens // prompts)) == taken


@pytest.mark.parametrize(
    ("new_prompts", "all_decode"), [([], True), ([40], True), ([40], False), ([1, 33], True), ([1, 33], False)], ids=str
)
@pytest.mark.parametrize("case", [None, ZIPAGE, Case("random"), KVZAP], ids=str)
def test_a_padded_batch_gives_the_logits_of_an_eager_step(tmp_path, case, new_prompts, all_decode):
    llm = make_llm(save_tiny_model("qwen3", tmp_path), case, debug=False)
    runner, scheduler = llm._core.runner, llm._core.scheduler
    for prompt in random_prompts([5, 20, 70], VOCAB):
        llm.add_request(prompt, greedy(50))
    for _ in range(20):
        llm.step()
    for prompt in random_prompts(new_prompts, VOCAB, seed=1):
        llm.add_request(prompt, greedy(50))
    batch = scheduler.schedule()
    assert len(batch.decodes) == 3
    assert len(batch.prefills) == len(new_prompts)
    plan = plan_step(batch)
    cache = runner.cache
    tensors = [*cache.entry_tensors, *([] if cache.queries is None else [cache.queries])]
    state = [x.clone() for x in tensors]
    with torch.inference_mode():
        expected = runner.decoder.logits(runner.forward(plan))
        computed = [x.clone() for x in tensors]
        for x, before in zip(tensors, state, strict=True):
            x.copy_(before)
        steps = run_in_graphs(llm, all_decode)
        logits = runner.decoder.logits(runner.forward(plan))
    assert steps == [(batch.num_tokens, not all_decode)]
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    for x, once in zip(tensors, computed, strict=True):
        torch.testing.assert_close(x, once, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_steps_of_nobody_run_where_layers_slide(tmp_path):
    """As they do before a capture."""
    runner = make_llm(save_tiny_model("gpt_oss", tmp_path, num_hidden_layers=2), None)._core.runner
    graphs = runner.step_graphs(runner.cache, runner._tables, runner._sliding_tables)
    for chunks in (None, NO_CHUNKS):
        with torch.inference_mode():
            assert graphs.forward(graphs.inputs(16, None, chunks), 16).isfinite().all()
    assert graphs.kept_bytes == 8 * len(graphs.inputs(graphs.most, None, NO_CHUNKS)) + 4 * graphs.most * 64


def test_steps_of_a_hybrid_run_in_graphs(tmp_path):
    """Those with prompts in graphs that have chunks, however short these are."""
    model = save_tiny_model("qwen3_next", tmp_path, num_hidden_layers=4)
    prompts = random_prompts([5, 20, 1, 33, 60, 7], VOCAB)

    def served(in_graphs: bool) -> tuple[list[list[int]], list[tuple[int, bool]]]:
        llm = make_llm(model, None, max_num_seqs=3, num_blocks=10, max_num_batched_tokens=24)
        steps = run_in_graphs(llm) if in_graphs else []
        tokens = tokens_of(llm.generate(prompts, greedy(40), use_tqdm=False))
        assert llm.stats.preemptions > 0
        if in_graphs:
            assert len(steps) == llm.stats.steps
        return tokens, steps

    expected, _ = served(False)
    tokens, steps = served(True)
    assert tokens == expected
    assert {prompts for _, prompts in steps} == {False, True}
    assert all(count <= 3 for count, prompts in steps if not prompts)


@pytest.mark.parametrize(
    ("case", "options", "graphs", "family"),
    [
        *product((None, ZIPAGE, Case("random"), KVZAP), [{}], [(True, False)], ["qwen3"]),
        *product((ZIPAGE, KVZAP), [UNEQUAL], [(True,)], ["qwen3"]),
        (None, {}, (True, False), "gpt_oss"),
        (ZIPAGE, {}, (True, False), "gemma3_text"),
    ],
    ids=lambda value: "unequal" if value is UNEQUAL else "" if value == {} else str(value),
)
def test_requests_that_run_in_graphs_from_their_first_token_get_the_tokens_of_an_eager_engine(
    tmp_path, case, options, graphs, family
):
    """`graphs`: whether all tokens of theirs attend as decodes."""
    # A small pool: some leave it, and compute their prompt and output anew.
    model = save_tiny_model(family, tmp_path, num_hidden_layers=2)
    prompts = random_prompts([5, 20, 70, 33, 1, 180, 64, 90], VOCAB)
    prompts += [prompts[2][:64] + tail for tail in random_prompts([7, 30], VOCAB, seed=1)]

    def served(all_decode: bool | None) -> tuple[list[list[int]], list[tuple[int, bool]]]:
        llm = make_llm(model, case, debug=False, num_blocks=32, headroom=0, **options)
        steps = [] if all_decode is None else run_in_graphs(llm, all_decode)
        outputs, waiting = {}, list(enumerate(prompts))
        while waiting or llm.has_unfinished_requests():
            if waiting:
                index, prompt = waiting.pop(0)
                llm.add_request(prompt, greedy(36), str(index))
            outputs |= {output.request_id: output for _ in range(5) for output in llm.step()}
        assert case is not None or llm.stats.preemptions > 0
        return tokens_of([outputs[str(index)] for index in range(len(prompts))]), steps

    eager, _ = served(None)
    for all_decode in graphs:
        tokens, steps = served(all_decode)
        assert len([tokens for tokens, prompts in steps if tokens > 8 and prompts != all_decode]) >= len(prompts) // 2
        assert tokens == eager
