"""A model spread over processes answers as on one device, and ends with them."""

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from importlib import import_module
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.child_processes import is_alive, wait_for_end
from tests.engine.compressed import check_look, greedy, looks, tokens_of
from tests.eviction.cases import SMALL_CHUNK, Case
from tests.parallel.policies import FAILING_SEED, POLICIES
from tests.parallel.ranked import OWN_CASES, TOKEN_POLICIES, answers, engine
from tests.tiny_models import save_tiny_model
from zipage import LLM, SamplingParams, share_model
from zipage.eviction import registry
from zipage.eviction.policies.streaming import Streaming
from zipage.parallel import messages as m
from zipage.parallel.rank import Outbox, Rank
from zipage.parallel.ranked_worker import RankedCompressor, start_ranks
from zipage.processes import Channel
from zipage.scheduling.plan import CompressionOrder
from zipage.worker.compression_runner import CompressionResult

pytestmark = pytest.mark.usefixtures("forked_children")

ROOT = Path(__file__).parents[2]
ZIPAGE = Case("zipage", SMALL_CHUNK)


@pytest.fixture(scope="module", name="folder")
def model_folder(tmp_path_factory):
    """Two KV heads: four ranks hold each twice."""
    return save_tiny_model("qwen3", tmp_path_factory.mktemp("model"), num_hidden_layers=2)


@pytest.fixture(scope="module", name="one")
def one_device(folder):
    return engine(folder, ZIPAGE)


@pytest.fixture(scope="module", name="two")
def two_ranks(folder):
    llm = engine(folder, ZIPAGE, tensor_parallel_size=2)
    yield llm
    llm.shutdown()


@pytest.fixture(scope="module", name="failing")
def two_ranks_of_policies_that_fail(folder):
    """Whose requests may name those of `policies.py`."""
    registry.POLICIES |= {policy.name: policy for policy in POLICIES}
    llm = engine(folder, ZIPAGE, tensor_parallel_size=2, debug=False, layer_stride=1)
    yield llm
    llm.shutdown()
    for policy in POLICIES:
        del registry.POLICIES[policy.name]


def pids_of(llm: LLM) -> list[int]:
    return [child.pid for child in llm._core.runner._group.children]


# The same tokens, and the same entries kept


@pytest.mark.parametrize("pauses", [0.0, 0.3])
def test_every_policy_keeps_what_one_device_keeps(one, two, pauses):
    policies = TOKEN_POLICIES[:: 3 if pauses else 1]  # what moves is blocks, whoever ranks
    expected, found = (answers(llm, policies, pauses) for llm in (one, two))
    assert not expected.differences(found)
    assert len(found.kept) >= 5 * len(policies)
    assert all(positions.shape[1] == 2 for positions in found.kept.values()), "all heads, each once"
    assert (two.stats.pauses > 0) == (pauses > 0)
    assert two.stats.blocks_used == 0


@pytest.mark.parametrize("case", OWN_CASES, ids=str)
def test_policies_that_no_other_engine_serves_keep_what_one_device_keeps(folder, case):
    two = engine(folder, case, tensor_parallel_size=2)
    expected, found = (answers(llm) for llm in (engine(folder, case), two))
    two.shutdown()
    assert not expected.differences(found)
    assert len(found.kept) >= 5


def test_what_ranks_hold_is_told_together(two):
    seen, _ = looks(two, [[1, 2, 3], [4, 5, 6, 7]], greedy(80))
    for found in seen.values():
        assert any(state.compressions and held is not None for state, held, _ in found)
        for look in found:
            check_look(*look, heads=(2, 2))


def test_four_ranks_of_two_heads_and_whole_pages(folder):
    case = Case("page_attention", {"page_size": 16})
    four = engine(folder, case, tensor_parallel_size=4, async_compression=False)
    one = engine(folder, case)
    assert four.memory_plan.block_bytes * 2 == one.memory_plan.block_bytes
    expected, found = (answers(llm, [None, "knorm"], max_tokens=40) for llm in (one, four))
    assert found.kept
    assert not expected.differences(found)
    for look in looks(four, [list(range(50))], greedy(24))[0].popitem()[1]:  # one compression
        check_look(*look, heads=(2, 2))
    pids = pids_of(four)
    four.shutdown()
    wait_for_end(pids)


def test_draws_stops_streams_and_aborts(one, two):
    drawn = {"temperature": 1.0, "top_p": 0.9, "seed": 7, "logprobs": 2, "repetition_penalty": 1.1}
    told = []
    for llm in (one, two):
        outputs = llm.generate([[3, 1, 4], [1, 5]], SamplingParams(max_tokens=30, n=2, **drawn), use_tqdm=False)
        streamed = [event.token_id for event in llm.stream([2, 7, 1], greedy(20))]
        stream = llm.stream([8, 2], greedy(500))
        streamed += [next(stream).token_id for _ in range(5)]
        stream.close()
        names = [llm.add_request([9, number], greedy(500)) for number in range(3)]
        llm.step()
        assert all(map(llm.abort, names))
        assert [output.outputs[0].finish_reason for output in llm.step()] == ["abort"] * 3
        told.append((tokens_of(outputs), streamed))
        logprobs = [next(iter(each.values())).logprob for each in outputs[0].outputs[0].logprobs]
        told[-1] += (np.round(logprobs, 3).tolist(),)
    assert told[0] == told[1]
    assert two.stats.blocks_used == 0


def test_hidden_states_and_logits(one, two):
    states = [
        llm.generate([[5, 3]], greedy(4, return_hidden_states=True), use_tqdm=False)[0].outputs[0].hidden_states
        for llm in (one, two)
    ]
    torch.testing.assert_close(states[1], states[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(two.compute_logits(states[0]), one.compute_logits(states[0]), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"hidden_states of shape \(4, 3\)"):
        two.compute_logits(states[0][:, :3])
    assert len(two.generate([[1]], greedy(2), use_tqdm=False)[0].outputs[0].token_ids) == 2


def test_a_prefix_is_shared(two):
    prompt = list(range(100, 140))
    two.generate([prompt], greedy(2), use_tqdm=False)
    assert two.generate([prompt], greedy(2), use_tqdm=False)[0].metrics.cached_tokens == 32


def test_ranks_agree_though_the_pool_decides_when(folder):
    """Under `pressure` the parent orders what the pool lacks, and earlier compressions end when they may. Ranks that
    kept different entries would be found, since all heads of `tova` keep the same.
    """
    case = Case("tova", {})
    options = {"trigger": "pressure", "async_compression": True, "num_blocks": 20, "headroom": 0}
    llm = engine(folder, case, tensor_parallel_size=2, **options)
    try:
        outputs = llm.generate([[number] for number in range(6)], greedy(90), use_tqdm=False)
        assert [output.error for output in outputs] == [None] * 6
        assert llm.stats.compressions_applied > 6
        assert llm.stats.blocks_used == 0
    finally:
        llm.shutdown()


# What goes wrong


def fail_one_of_two(llm: LLM, policy: str) -> list[str]:
    """Two are compressed together, and the policy fails for the first. Returns their errors; the engine goes on."""
    params = [greedy(80, policy=policy, seed=FAILING_SEED), greedy(80, policy=policy)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zipage.scheduling.triggers.PACE", 100)
        outputs = llm.generate([[1, 2, 3], [4, 5, 6]], params, use_tqdm=False)
    assert llm.generate([[1, 2, 3]], params[1], use_tqdm=False)[0].error is None
    return [output.error for output in outputs if output.error]


def errors_in(caplog) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_policy_that_fails_costs_its_request(failing, caplog):
    (error,) = fail_one_of_two(failing, "fails_once")
    assert "a compression under policy 'fails_once' failed: ArithmeticError: not this one" in error
    (said,) = errors_in(caplog)  # what all ranks say is logged once
    assert re.match(r"rank [01]: a compression under policy 'fails_once' failed: ArithmeticError: not", said.message)


def test_a_requests_policy_that_ranks_cannot_import_is_refused(two, monkeypatch):
    mine = type("Mine", (Streaming,), {"name": "mine_of_requests", "__module__": "__main__"})
    monkeypatch.setitem(registry.POLICIES, mine.name, mine)
    fine, refused = two.generate([[1], [2]], [greedy(80), greedy(80, policy="mine_of_requests")], use_tqdm=False)
    assert fine.error is None
    assert "policy='mine_of_requests': it is defined in the program itself" in refused.error


def test_what_fails_on_one_rank_fails_on_all(failing, caplog):
    """Where no rank has moved anything, what is left is tried again one by one."""
    errors = fail_one_of_two(failing, "fails_on_one_rank")
    assert len(errors) == 1
    (said,) = errors_in(caplog)
    assert re.match("rank 1: a compression under policy '.*' failed: MemoryError: no memory on this", said.message)
    assert 'raise MemoryError("no memory on this rank")' in str(said.exc_info[1])
    errors += fail_one_of_two(failing, "fails_beside_one")
    assert len(errors) == 3
    assert all("MemoryError: no memory on this rank" in error for error in errors)


def test_a_policy_that_catches_what_another_rank_brought_about(folder, failing):
    """It goes on alone; the ranks do not come apart."""
    errors = fail_one_of_two(failing, "catches_all")
    assert all("MemoryError: no memory on this rank" in error for error in errors)
    assert errors
    alone = engine(folder, ZIPAGE, debug=False, layer_stride=1)
    assert not answers(alone, ["catches_all"]).differences(answers(failing, ["catches_all"]))


def test_a_killed_rank_ends_the_engine(folder):
    llm = engine(folder, ZIPAGE, tensor_parallel_size=2, debug=False)
    pids = pids_of(llm)
    steps = []

    def kill(step) -> None:
        steps.append(step)
        if len(steps) == 20:
            os.kill(pids[1], signal.SIGKILL)

    llm.step_listeners.append(kill)
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=r"^rank 1 died \(signal 9\)$"):
        llm.generate([[1, 2]] * 4, greedy(900), use_tqdm=False)
    assert time.monotonic() - begin < 20
    assert not any(map(is_alive, pids))
    with pytest.raises(RuntimeError, match="has failed and serves nothing more"):
        llm.generate([[1]], greedy(2), use_tqdm=False)
    llm.shutdown()


def test_a_rank_that_fails_is_named(folder, tmp_path, monkeypatch):
    """Also where its error is one that, at the start, would be the user's to mend."""
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "vanishing_policy.py"
    module.write_text(f"from {Streaming.__module__} import Streaming\nclass Vanishing(Streaming): name = 'vanishing'\n")
    monkeypatch.setitem(registry.POLICIES, "vanishing", import_module(module.stem).Vanishing)
    llm = engine(folder, ZIPAGE, tensor_parallel_size=2)
    pids = pids_of(llm)
    module.unlink()
    shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
    with pytest.raises(
        RuntimeError, match=r"^rank [01] failed: ModuleNotFoundError: No module named 'vanishing_policy'"
    ):
        llm.generate([[1]], greedy(80, policy="vanishing"), use_tqdm=False)
    wait_for_end(pids)
    llm.shutdown()


def test_starts_that_fail(folder, tmp_path):
    with pytest.raises(ValueError, match=r"tensor_parallel_size=3: 4 query heads and 2 KV heads go on 1, 2, 4 ranks"):
        engine(folder, None, tensor_parallel_size=3)
    with pytest.raises(FileNotFoundError):
        engine(tmp_path / "nothing", None, tensor_parallel_size=2)
    with pytest.raises(ValueError, match=r"device='cuda:1': must be 'cuda' with tensor_parallel_size=2: ranks take"):
        LLM(str(folder), device="cuda:1", tensor_parallel_size=2)
    with share_model(), pytest.raises(ValueError, match=r"tensor_parallel_size=2: ranks load the model .*leave it out"):
        engine(folder, None, tensor_parallel_size=2)
    mine = type("Mine", (Streaming,), {"name": "mine_alone", "__module__": "__main__"})
    registry.register(mine)
    with pytest.raises(ValueError, match=r"policy='mine_alone': it is defined in the program itself"):
        engine(folder, Case("mine_alone"), tensor_parallel_size=2)
    broken = save_tiny_model("qwen3", tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    with pytest.raises(ValueError, match="is not a complete safetensors file"):
        engine(broken, None, tensor_parallel_size=2)


def test_too_few_gpus(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    llm = engine(folder, None)
    with pytest.raises(ValueError, match=r"tensor_parallel_size=2: needs 2 GPUs, but 1 are visible"):
        start_ranks(llm.config.__class__(**{**vars_of(llm), "device": "auto", "tensor_parallel_size": 2}))


def vars_of(llm: LLM) -> dict:
    return {name: getattr(llm.config, name) for name in llm.config.__dataclass_fields__}


PROGRAM = """
import os, signal, sys
from zipage import LLM, SamplingParams, share_model
llm = LLM(sys.argv[1], device="cpu", skip_tokenizer_init=True, block_size=16, num_blocks=64, tensor_parallel_size=2)
long = SamplingParams(max_tokens=800, ignore_eos=True)
print(*[child.pid for child in llm._core.runner._group.children], flush=True)
llm.step_listeners.append(lambda step: step.step == 30 and os.killpg(0, signal.SIGINT))
try:
    llm.generate([[1, 2, 3]], long, use_tqdm=False)
except KeyboardInterrupt:
    print("interrupted", llm.has_unfinished_requests(), llm.stats.blocks_used, flush=True)
print(len(llm.generate([[1]], SamplingParams(max_tokens=5, ignore_eos=True), use_tqdm=False)[0].outputs[0].token_ids))
sys.stdout.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_ctrl_c_and_a_killed_parent(folder, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(PROGRAM)
    command = [sys.executable, str(script), str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90, process_group=0, check=False)
    lines = done.stdout.splitlines()
    assert lines[1:] == ["interrupted False 0", "5"], done.stderr
    wait_for_end([int(pid) for pid in lines[0].split()])


# Replicas of ranks


def test_replicas_of_ranks(folder, one):
    llm = engine(folder, ZIPAGE, tensor_parallel_size=2, data_parallel_size=2)
    try:
        expected, found = (answers(each, ["tova"], max_tokens=40) for each in (one, llm))
        assert found.kept
        assert not expected.differences(found)
    finally:
        llm.shutdown()


# What a rank does while it is not read

MUCH = 4 * 2**20
"""Bytes, more than a connection holds."""


class FakeWorker:
    """Has compressed one request, of many entries."""

    def __init__(self) -> None:
        self.compressor = self.runner = self
        self.in_flight = 1
        self.poisoned = []
        self.cache = self

    def poll(self) -> list[CompressionResult]:
        self.in_flight = 0
        return [CompressionResult(order(0), None, np.zeros(MUCH // 4, dtype=np.int32), 0.0)]

    def poison_queries(self, slot) -> None:
        self.poisoned.append(len(slot))


def test_a_rank_reads_though_it_is_not_read():
    ours, theirs = map(Channel, Pipe())
    worker = FakeWorker()

    def serve() -> None:
        with suppress(EOFError):
            Rank(theirs, Outbox(theirs), worker, 1).serve()

    threading.Thread(target=serve, daemon=True).start()
    while worker.in_flight:
        time.sleep(0.01)
    teller = threading.Thread(target=ours.send, args=[m.Poison(None, bytes(MUCH))], daemon=True)
    teller.start()
    teller.join(20)
    assert not teller.is_alive(), "both wait until the other reads"
    (part,) = ours.receive().parts
    assert part.kept_positions.nbytes == MUCH
    ours.close()


# What the parent makes of answers


class FakeGroup:
    def __init__(self) -> None:
        self.told, self.answers = [], []

    def tell(self, message) -> None:
        self.told.append(message)

    def arrived(self, kind) -> list:
        found, self.answers = self.answers, []
        return found


def order(number: int, policy: str = "tova") -> CompressionOrder:
    rule = SimpleNamespace(policy=registry.make(policy, {}))
    return CompressionOrder(number, rule, [0], [1], num_entries=16, window_end=16, query_slot=0)


def compressor(group, **options) -> RankedCompressor:
    class Config:
        tensor_parallel_size, block_size, trace_positions = 2, 16, True

    for name, value in options.items():
        setattr(Config, name, value)
    return RankedCompressor(group, Config, num_kv_heads=2)


def part(number: int, head: list[int], pages=None, error=None) -> m.Part:
    return m.Part(number, pages, np.array([[head]], dtype=np.int32), error)


def test_a_result_is_whole_once_all_ranks_have_told(monkeypatch):
    group = FakeGroup()
    ranked = compressor(group)
    ranked.submit([order(0, "knorm"), order(1, "knorm")])
    ranked.submit([order(2, "knorm")])
    ranked.submit([order(3, "knorm")])
    ranked.submit([order(4, "knorm")])
    assert [[each.number for each in message.orders] for message in group.told] == [[0, 1], [2]]
    group.answers = [(0, m.Compressed([part(0, [1, 2]), part(1, [1, 2])])), (1, m.Compressed([part(1, [3, 4])]))]
    (result,) = ranked.poll()
    assert result.order.number == 1
    assert result.kept_positions.tolist() == [[[1, 2], [3, 4]]]
    assert len(group.told) == 2, "of the first batch, order 0 is under way"
    group.answers = [(1, m.Compressed([part(0, [5, 6], error="rank 1 had no memory")]))]
    (result,) = ranked.poll()
    assert (result.error, result.kept_positions) == ("rank 1 had no memory", None)
    assert [each.number for each in group.told[2].orders] == [3, 4], "what came meanwhile goes together"
    assert ranked.in_flight == 3


def test_ranks_that_do_not_agree_are_found():
    group = FakeGroup()
    ranked = compressor(group)
    ranked.submit([order(0, "tova")])
    group.answers = [(0, m.Compressed([part(0, [1, 2])])), (1, m.Compressed([part(0, [1, 3])]))]
    with pytest.raises(RuntimeError, match="ranks kept different entries of the same heads under 'tova'"):
        ranked.poll()
    ranked = compressor(group)
    ranked.submit([order(0, "page_attention")])
    group.answers = [(0, m.Compressed([part(0, [1], [0])])), (1, m.Compressed([part(0, [1], [1])]))]
    with pytest.raises(RuntimeError, match="ranks kept different blocks"):
        ranked.poll()
