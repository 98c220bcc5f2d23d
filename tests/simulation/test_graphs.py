"""Steps that a simulation takes for graphs, and captures, beside those that the engine does."""

from random import Random

import pytest

from tests.engine.compressed import make_llm
from tests.simulation.fixed_times import FixedTimes
from tests.tiny_models import save_tiny_model
from tests.worker.test_cuda_graph import chunks, empty_batch
from zipage import SamplingParams, SimulatedLLM
from zipage.simulation.graphs import SimulatedGraphs


def test_the_same_steps_are_graphs_and_the_same_graphs_are_captured(tmp_path, monkeypatch):
    runner = make_llm(save_tiny_model("qwen3", tmp_path), None, debug=False)._core.runner
    graphs = runner.step_graphs(runner.cache, runner._tables)
    captured = []
    monkeypatch.setattr(graphs, "_capture", lambda *key: captured.append(graphs._graphs.setdefault(key, key)))
    simulated = SimulatedGraphs(runner.max_num_seqs, runner.max_num_batched_tokens)
    assert simulated.most == graphs.most
    random, kinds = Random(0), set()
    for _ in range(200):
        decodes, prompts = random.randrange(1, 9), random.choice((0, 0, 1, 3, 12))
        tokens = random.choice((8, 40, 300)) if prompts else 0
        lens = list(range(random.choice((1, 9_000)), tokens * prompts + 1))
        lens = lens + [1] * (tokens * prompts - len(lens))
        batch, parts = empty_batch(decodes + len(lens), lens), chunks([tokens] * prompts, decodes, tokens)
        all_decode = simulated.all_decode(len(lens), sum(lens))
        assert all_decode == graphs._all_decode(batch, parts)
        taken = graphs.takes(batch, parts)
        assert simulated.take(len(batch), prompts, all_decode) == taken
        kinds.add((taken, all_decode))
        if taken:
            before = len(captured)
            if (key := (graphs._size_for(len(batch)), not all_decode)) not in graphs._graphs:
                graphs._capture_new(*key)
            assert simulated.capture(len(batch), all_decode) == len(captured) - before
    assert kinds == {(True, True), (True, False), (False, False)}
    assert len(captured) > 5


@pytest.fixture(scope="module", name="folder")
def tiny_folder(tmp_path_factory):
    return str(save_tiny_model("qwen3", tmp_path_factory.mktemp("model")))


class Capturing(FixedTimes):
    def launch(self, work):
        return 1.0 * work.num_captures


def test_a_graph_is_captured_once_and_behind_what_the_device_does(folder):
    """The first step's and the largest; one of decodes alone, before which the first step ends; later none."""
    llm = SimulatedLLM(
        folder, times=Capturing(), skip_tokenizer_init=True, block_size=16, num_blocks=24, max_num_seqs=8,
        max_num_batched_tokens=64, max_model_len=400,
    )  # fmt: skip
    seconds = []
    for _ in range(2):
        begin = llm.clock()
        llm.generate([5] * 10, SamplingParams(max_tokens=20, ignore_eos=True), use_tqdm=False)
        seconds.append(llm.clock() - begin)
    assert seconds[1] == pytest.approx(0.002 + 20 * 0.010)
    assert seconds[0] == pytest.approx(seconds[1] + 3.0, abs=0.03)
