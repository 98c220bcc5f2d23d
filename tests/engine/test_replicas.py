"""Several replicas answer as one does, and end together."""

import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.child_processes import is_alive, wait_for_end
from tests.engine.compressed import looks
from tests.tiny_models import VOCAB, save_tiny_model, save_tiny_tokenizer
from zipage import LLM, EventStats, SamplingParams, StepStats, share_model
from zipage.engine.interface import TokenDelta
from zipage.engine.prompt_order import PromptOrder
from zipage.engine.replica_messages import Reply, Report, Stop
from zipage.engine.replicas import Replicas, _environments
from zipage.engine.telemetry import Listeners
from zipage.eviction import registry
from zipage.eviction.policies.streaming import Streaming
from zipage.stats import EngineStats, RequestMetrics

pytestmark = pytest.mark.usefixtures("forked_children")

ROOT = Path(__file__).parents[2]
PROMPTS = [f"{i}: " + "once upon a time " * (1 + i % 4) for i in range(6)]


@pytest.fixture(scope="module", name="folder")
def model_folder(tmp_path_factory):
    folder = save_tiny_model("qwen3", tmp_path_factory.mktemp("model"))
    save_tiny_tokenizer(folder)
    return folder


def make_llm(folder, **options) -> LLM:
    defaults = {"device": "cpu", "block_size": 16, "num_blocks": 64, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    defaults |= {"policy": "zipage", "budget_tokens": 48, "policy_options": {"chunk": 32}, "debug": True}
    return LLM(str(folder), **defaults | options)


@pytest.fixture(scope="module", name="one")
def one_replica(folder):
    return make_llm(folder)


@pytest.fixture(scope="module", name="shared_two")
def two_shared_replicas(folder):
    llm = make_llm(folder, data_parallel_size=2)
    yield llm
    llm.shutdown()


@pytest.fixture(name="two")
def two_replicas(shared_two):
    yield shared_two
    assert not shared_two.has_unfinished_requests()
    assert shared_two.stats.blocks_used == shared_two.stats.num_running == 0
    assert [replica.load for replica in shared_two._core._replicas] == [0, 0]
    shared_two.step_listeners.clear()
    shared_two.event_listeners.clear()


def pids_of(llm: LLM) -> list[int]:
    return [replica.child.pid for replica in llm._core._replicas]


def records_of(llm: LLM) -> tuple[list[StepStats], list[EventStats]]:
    steps, events = [], []
    llm.step_listeners.append(steps.append)
    llm.event_listeners.append(events.append)
    return steps, events


# The same tokens


@pytest.mark.parametrize("policy", [None, "knorm"])
@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.0}, {"n": 2, "logprobs": 2}, {"n": 2, "stop": ["e", "th"], "min_tokens": 20}],
    ids=["greedy", "sampled", "stopped"],
)
def test_tokens_are_those_of_one_replica(one, two, policy, options):
    steps, events = records_of(two)
    before, params = two.stats, SamplingParams(**{"max_tokens": 70, "policy": policy, "seed": 5} | options)
    expected, outputs = (llm.generate(PROMPTS, params, use_tqdm=False) for llm in (one, two))
    for alone, output in zip(expected, outputs, strict=True):
        assert output.error is None
        for sample, other in zip(alone.outputs, output.outputs, strict=True):
            assert other.token_ids == sample.token_ids
            assert (other.text, other.finish_reason, other.stop_reason) == (
                sample.text,
                sample.finish_reason,
                sample.stop_reason,
            )
            assert other.metrics.output_tokens == len(other.token_ids)
            for ours, theirs in zip(sample.logprobs or (), other.logprobs or (), strict=True):
                assert list(ours) == list(theirs)
    after, num_tokens = two.stats, sum(len(s.token_ids) for o in outputs for s in o.outputs)
    assert after.output_tokens - before.output_tokens == num_tokens
    assert after.requests_finished - before.requests_finished == len(PROMPTS)
    assert after.budget_bound > before.budget_bound
    assert {step.replica for step in steps} == {0, 1}
    for replica in (0, 1):
        numbers = [step.step for step in steps if step.replica == replica]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert len(steps) == after.steps - before.steps
    places = {
        request: {e.replica for e in events if e.request_id == request} for request in {e.request_id for e in events}
    }
    assert places
    assert all(len(found) == 1 for found in places.values()), "samples of a prompt share its cache"


def test_seeds_are_of_request_numbers(folder, one, two):
    """Without a seed of its own, a request's tokens follow from its number among all that were added."""
    numbers = [next(llm._numbers) for llm in (one, two)]
    for llm in (one, two):
        for _ in range(max(numbers) - next(llm._numbers)):
            next(llm._numbers)
    params = SamplingParams(max_tokens=30)
    expected, outputs = (llm.generate(PROMPTS, params, use_tqdm=False) for llm in (one, two))
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in expected]
    assert [o.request_id for o in outputs] == [o.request_id for o in expected]


def test_replicas_tell_what_is_held(one, two):
    """They step by themselves: what they are asked for falls between other steps than that of one."""
    params, held_at = SamplingParams(temperature=0, max_tokens=70, ignore_eos=True), []
    for llm in (one, two):
        seen, _ = looks(llm, PROMPTS[:4], params)
        held_at.append(
            {
                (number, held.num_tokens, held.positions.shape[2]): held.positions.tolist()
                for number, found in enumerate(seen.values())
                for _, held, _ in found
                if held is not None
            }
        )
        assert any(state.compressions for found in seen.values() for state, _, _ in found)
    both = held_at[0].keys() & held_at[1].keys()
    assert len(both) > len(held_at[1]) / 2 > 5
    assert all(held_at[0][key] == held_at[1][key] for key in both)
    assert two.held_entries("nobody") is None
    assert two.snapshot().requests == []


def test_conversations_streams_and_aborts(one, two):
    turns = SamplingParams(
        temperature=0, max_tokens=60, follow_ups=[[5, 6], [7]], max_turn_tokens=9, stop_token_ids=[3], ignore_eos=True
    )
    chats = [[{"role": "user", "content": text}] for text in PROMPTS[:3]]
    for answer in (lambda llm: llm.chat(chats, turns, use_tqdm=False), lambda llm: list(llm.stream(PROMPTS[0], turns))):
        told = [answer(llm) for llm in (one, two)]
        tokens = [[getattr(e, "token_id", None) or e.outputs[0].token_ids for e in events] for events in told]
        assert tokens[0] == tokens[1]
    long = SamplingParams(temperature=0, max_tokens=900, ignore_eos=True)
    stream = two.stream(PROMPTS[0], long)
    ids = [two.add_request(text, long) for text in PROMPTS[1:5]]
    streamed = [next(stream).token_id for _ in range(5)]
    assert two.abort(ids[0])
    assert not two.abort(ids[0])
    stream.close()
    for name in ids[1:]:
        two.abort(name)
    outputs = {output.request_id: output for output in two.step()}
    assert {output.outputs[0].finish_reason for output in outputs.values()} == {"abort"}
    assert list(outputs) == ids
    whole = one.generate(PROMPTS[:1], SamplingParams(temperature=0, max_tokens=5, ignore_eos=True), use_tqdm=False)
    assert whole[0].outputs[0].token_ids == streamed


def test_hidden_states_and_logits(one, two):
    params = SamplingParams(temperature=0, max_tokens=4, return_hidden_states=True)
    hidden = two.generate(PROMPTS[:1], params, use_tqdm=False)[0].outputs[0].hidden_states
    assert torch.allclose(two.compute_logits(hidden), one.compute_logits(hidden), atol=1e-4)
    with pytest.raises(ValueError, match=r"hidden_states of shape \(4, 3\): must be \[T, "):
        two.compute_logits(hidden[:, :3])


def test_what_a_replica_does_not_know_costs_one_request(two):
    """A policy that was registered after the replicas started."""
    late = type("Late", (Streaming,), {"name": "late", "__module__": __name__})
    registry.register(late)
    params = [SamplingParams(max_tokens=3, n=2, policy=policy) for policy in ("late", None)]
    failed, other = two.generate(PROMPTS[:2], params, use_tqdm=False)
    assert failed.error.startswith("unknown policy 'late'")
    assert failed.error.endswith("(replicas know what importable modules had registered when they started)")
    assert [sample.finish_reason for sample in failed.outputs] == ["error", "error"]
    assert other.error is None


# Who gets what


class FakeChild:
    """A child and its channel: keeps what it is sent, and sends what it is given."""

    def __init__(self) -> None:
        self.sent: list[PromptOrder] = []
        self._reading, self._writing = os.pipe()
        self._messages: list[Report | Reply] = []
        self.channel = self

    def send(self, message: PromptOrder) -> None:
        self.sent.append(message)

    def fileno(self) -> int:
        return self._reading

    def report(self, *deltas: TokenDelta) -> None:
        self.give(Report(list(deltas), [], [], EngineStats()))

    def give(self, message: Report | Reply) -> None:
        self._messages.append(message)
        os.write(self._writing, b".")

    def receive(self) -> Report | Reply:
        os.read(self._reading, 1)
        return self._messages.pop(0)


def test_prompts_go_where_the_least_is_left_to_compute():
    children = [FakeChild(), FakeChild(), FakeChild()]
    core = Replicas(children, Listeners(), [8, 8, 8])
    assert core.stats().blocks_total == 24, "before they have told"

    def add(name: str, prompt: int, new: int, n: int = 1) -> int:
        before = [len(child.sent) for child in children]
        order = PromptOrder(
            name, [1] * prompt, SamplingParams(n=n), 0, frozenset(), [], prompt + new, "length", 0.0, False
        )
        core.add(order.samples(None))
        return next(i for i, child in enumerate(children) if len(child.sent) > before[i])

    assert [add("a", 10, 100), add("b", 10, 20, n=2), add("c", 10, 80)] == [0, 1, 2]
    assert add("d", 30, 30) == 1  # 50 before
    assert add("e", 1, 1) == 2  # 110, 110, 90
    assert add("f", 5, 13) == 2  # 92
    assert add("g", 10, 10) == 0  # 110, 110, 110
    children[1].report(TokenDelta("b", 0, [7] * 15, None))
    assert list(core.step()) == [TokenDelta("b", 0, [7] * 15, None)]
    assert add("h", 1, 1) == 1  # its prompt is computed, and 15 tokens of 20: 85
    last = "stop", 7, None, RequestMetrics()
    children[0].report(TokenDelta("a", 0, [7], None, *last))
    assert [delta.request_id for delta in core.step()] == ["a"]
    assert add("i", 1, 1) == 0  # it ended early: 20
    assert [child.sent[0].request_id for child in children] == ["a", "b", "c"]


def test_a_sample_that_ended_before_it_was_stopped_is_cut_where_it_was_read():
    child = FakeChild()
    child.name = "replica 0"
    core = Replicas([child], Listeners(), [8])
    order = PromptOrder("a", [1] * 5, SamplingParams(n=2), 0, frozenset(), [], 25, "length", 0.0, True)
    core.add(order.samples(None))
    ended = RequestMetrics(ttft=1.0, e2e=7.0, tpot=2.0, output_tokens=4)
    child.report(TokenDelta("a", 0, [7], None), TokenDelta("a", 1, [3], None))
    child.report(TokenDelta("a", 0, [8], None), TokenDelta("a", 1, [4], None))
    child.report(TokenDelta("a", 0, [9, 10], None, "length", None, None, ended), TokenDelta("a", 1, [5], None))
    child.give(Reply(None))
    read = []
    for _ in range(2):
        for delta in core.step():
            read.append((delta.index, *delta.token_ids))
            if (delta.index, delta.token_ids) == (0, [8]):
                metrics = core.stop("a", 0)
    assert child.sent[1] == Stop("a", 0)
    assert (metrics.output_tokens, metrics.tpot, metrics.e2e) == (2, 6.0, 7.0)
    assert read == [(0, 7), (1, 3), (0, 8), (1, 4), (1, 5)]
    assert core.output_tokens == -2, "of the 0 that were reported"
    assert core._replicas[0].load == 20 - 3


def test_each_replica_sees_its_own_gpus(monkeypatch):
    def config(**options):
        return SimpleNamespace(**{"device": "auto", "tensor_parallel_size": 1, "data_parallel_size": 2} | options)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert _environments(config(tensor_parallel_size=2)) == [
        {"CUDA_VISIBLE_DEVICES": "0,1"},
        {"CUDA_VISIBLE_DEVICES": "2,3"},
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7, GPU-x,1,3,2")
    assert _environments(config(device="cuda")) == [{"CUDA_VISIBLE_DEVICES": "7"}, {"CUDA_VISIBLE_DEVICES": "GPU-x"}]
    assert _environments(config(device="cpu", data_parallel_size=9)) == [{}] * 9
    with pytest.raises(ValueError, match=r"data_parallel_size=3: with tensor_parallel_size=2 needs 6 GPUs, but 5 are"):
        _environments(config(data_parallel_size=3, tensor_parallel_size=2))
    with pytest.raises(ValueError, match=r"device='cuda:1': must be 'cuda' with data_parallel_size=2: "):
        LLM("m", device="cuda:1", data_parallel_size=2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert _environments(config()) == [{}, {}]
    with pytest.raises(ValueError, match="but 0 are visible"):
        _environments(config(device="cuda"))


# Starts that fail


def test_what_replicas_cannot_do_is_refused_at_once(folder, monkeypatch):
    with (
        share_model(),
        pytest.raises(ValueError, match=r"data_parallel_size=2: replicas load the model .*leave it out"),
    ):
        make_llm(folder, data_parallel_size=2)
    mine = type("Mine", (Streaming,), {"name": "mine", "__module__": "__main__"})
    registry.register(mine)
    with pytest.raises(ValueError, match=r"policy='mine': it is defined in the program itself"):
        make_llm(folder, data_parallel_size=2, policy="mine", policy_options={})


def test_a_start_fails_as_that_of_one_replica():
    errors = []
    for size in (1, 2):
        with pytest.raises(FileNotFoundError) as caught:
            make_llm("/no/such", data_parallel_size=size)
        errors.append(caught.value)
    assert str(errors[1]) == str(errors[0])
    assert "Traceback" in str(errors[1].__cause__)


# Ends


def test_a_killed_replica_ends_the_engine(folder, caplog):
    llm = make_llm(
        folder, data_parallel_size=2, debug=False, policy="tests.engine.replica_policies:RanksNan", policy_options={}
    )
    pids = pids_of(llm)
    long = SamplingParams(temperature=0, max_tokens=900, ignore_eos=True)

    def kill(step: StepStats) -> None:
        if (step.replica, step.step) == (0, 100):
            os.kill(pids[1], signal.SIGKILL)

    llm.step_listeners.append(kill)
    with caplog.at_level(logging.WARNING), pytest.raises(RuntimeError, match=r"^replica 1 died \(signal 9\)$"):
        llm.generate(PROMPTS, long, use_tqdm=False)
    begin = time.monotonic()
    assert not any(map(is_alive, pids))
    assert re.search("replica [01]: policy 'ranks_nan' ranked entries NaN", caplog.text)
    assert llm.stats.compressions_misranked > 0
    assert not llm.has_unfinished_requests()
    with pytest.raises(RuntimeError, match=r"has failed and serves nothing more \(RuntimeError: replica 1 died"):
        llm.generate(PROMPTS, long, use_tqdm=False)
    llm.shutdown()
    assert time.monotonic() - begin < 5


def test_a_step_that_fails_ends_the_engine_and_shutdown_its_processes(folder):
    llm = make_llm(
        folder, data_parallel_size=2, policy="tests.engine.replica_policies:EndsTheEngine", policy_options={}
    )
    pids = pids_of(llm)
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    with pytest.raises(RuntimeError, match=r"^replica 0 failed: ArithmeticError: a step broke$") as caught:
        llm.generate(PROMPTS[:1], params, use_tqdm=False)
    assert isinstance(caught.value.__cause__, ArithmeticError)
    assert "in _broken" in str(caught.value.__cause__.__cause__)
    assert not any(map(is_alive, pids))


PROGRAM = f"""
import os, signal, sys
from zipage import LLM, SamplingParams
llm = LLM(sys.argv[1], device="cpu", block_size=16, num_blocks=64, data_parallel_size=2, seed=3)
prompts, long = [[1, 2, 3]] * 6, SamplingParams(max_tokens=800, ignore_eos=True)
print(*[replica.child.pid for replica in llm._core._replicas], flush=True)
llm.step_listeners.append(lambda step: (step.replica, step.step) == (0, 60) and os.killpg(0, signal.SIGINT))
try:
    llm.generate(prompts, long, use_tqdm=False)
except KeyboardInterrupt:
    print("interrupted", llm.has_unfinished_requests(), llm.stats.requests_aborted, llm.stats.blocks_used, flush=True)
llm.step_listeners.clear()
outputs = llm.generate(prompts, SamplingParams(max_tokens=5, ignore_eos=True), use_tqdm=False)
print([len(output.outputs[0].token_ids) for output in outputs], flush=True)
for prompt in prompts:
    llm.add_request(prompt, long)
llm.step()
os.kill(os.getpid(), signal.SIGKILL)
assert {VOCAB} == 0
"""


def test_a_script_without_a_guard_ctrl_c_and_a_killed_parent(folder, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(PROGRAM)
    command = [sys.executable, str(script), str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, process_group=0, check=False)
    lines = done.stdout.splitlines()
    assert lines[1:] == ["interrupted False 6 0", str([5] * 6)], done.stderr
    assert done.returncode == -signal.SIGKILL
    wait_for_end([int(pid) for pid in lines[0].split()])
    assert "Traceback" not in done.stderr
