"""The simulated engine decides what the real one decides, and its clock passes as the model of time says."""

from dataclasses import asdict
from random import Random

import pytest

from tests.simulation.fixed_times import FixedTimes
from tests.tiny_models import save_tiny_model
from zipage import LLM, CompressionTime, SamplingParams, SimulatedLLM

OPTIONS = {
    "skip_tokenizer_init": True,
    "load_format": "dummy",
    "block_size": 16,
    "num_blocks": 24,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "max_model_len": 400,
}
BOUNDED = {"budget_tokens": 32, "recent_tokens": 16}
TIMES = ("time", "host_time", "device_time", "step_time")


@pytest.fixture(scope="module", name="folder")
def tiny_folder(tmp_path_factory):
    return str(save_tiny_model("qwen3", tmp_path_factory.mktemp("model")))


def requests(count: int, prompt: int = 40, output: int = 300) -> list[tuple[list[int], SamplingParams]]:
    random = Random(0)
    lengths = [(random.randrange(1, prompt), random.randrange(1, output)) for _ in range(count)]
    return [
        ([random.randrange(3, 60) for _ in range(length)], SamplingParams(max_tokens=tokens, ignore_eos=True))
        for length, tokens in lengths
    ]


def served(llm: LLM, count: int = 10) -> tuple[list[dict], list[tuple], dict]:
    """Steps without their times, events, and what was counted of each request."""
    steps, events = [], []
    llm.step_listeners.append(steps.append)
    llm.event_listeners.append(events.append)
    prompts, params = zip(*requests(count))
    outputs = llm.generate(list(prompts), list(params), use_tqdm=False)
    llm.shutdown()
    plain = [{name: value for name, value in asdict(step).items() if name not in TIMES} for step in steps]
    kinds = [(e.kind, e.step, e.request_id, e.entries_before, e.entries_after, e.blocks_after) for e in events]
    metrics = [output.metrics for output in outputs]
    counts = [(m.output_tokens, m.preemptions, m.pauses, m.compressions, m.peak_blocks) for m in metrics]
    return plain, kinds, counts


@pytest.mark.parametrize(
    "options",
    [
        {"num_blocks": 26},
        {"num_blocks": 26, "swap_space": 0.01},
        {"policy": "zipage", **BOUNDED, "async_compression": False},
        {"policy": "zipage", **BOUNDED, "async_compression": False, "num_blocks": 9, "enable_prefix_caching": False},
        {"policy": "random", **BOUNDED, "async_compression": False, "trigger": "pressure", "num_blocks": 14},
    ],
    ids=["full", "copied", "zipage", "tight", "pressure"],
)
def test_the_same_steps_as_the_real_engine(folder, options, monkeypatch):
    monkeypatch.setattr("zipage.scheduling.swap_space.OPERATIONS_PER_BYTE", 0)  # as of a larger model
    options = OPTIONS | {"async_scheduling": False} | options
    real = served(LLM(folder, device="cpu", dtype="float32", **options))
    simulated = served(SimulatedLLM(folder, times=FixedTimes(), **options))
    assert any(preemptions + pauses + compressions for _, preemptions, pauses, compressions, _ in real[2])
    assert simulated == real


def test_overlapped_steps_hide_the_host(folder):
    llm = SimulatedLLM(folder, times=FixedTimes(), **OPTIONS)
    output = llm.generate([5] * 10, SamplingParams(max_tokens=20, ignore_eos=True), use_tqdm=False)[0]
    assert llm.stats.steps == 20
    assert llm.clock() == pytest.approx(0.002 + 20 * 0.010)
    assert output.metrics.ttft == pytest.approx(0.012)
    assert output.metrics.tpot == pytest.approx(0.010, rel=0.03)


def test_steps_that_do_not_overlap_wait_for_the_host(folder):
    llm = SimulatedLLM(folder, times=FixedTimes(), **OPTIONS | {"async_scheduling": False})
    llm.generate([5] * 10, SamplingParams(max_tokens=20, ignore_eos=True), use_tqdm=False)
    assert llm.clock() == pytest.approx(20 * 0.012)
    assert llm.stats.host_time == pytest.approx(20 * 0.002)


def seconds_and_steps(folder, **options) -> tuple[float, int, int]:
    times = FixedTimes(compression_time=CompressionTime(0.001, 0.0, 0.003, 0.012))
    llm = SimulatedLLM(folder, times=times, policy="random", **OPTIONS | BOUNDED | options)
    llm.generate([[5] * 10, [6] * 3], SamplingParams(max_tokens=100, ignore_eos=True), use_tqdm=False)
    return llm.clock(), llm.stats.steps, llm.stats.compressions_applied


def test_a_synchronous_compression_takes_device_time_between_steps(folder):
    seconds, steps, compressions = seconds_and_steps(folder, async_compression=False)
    assert (steps, compressions) == (100, 8)
    assert seconds == pytest.approx(0.002 + 100 * 0.010 + compressions * 0.003, abs=0.01)


def test_a_request_sits_out_the_steps_beside_its_compression(folder):
    _, synchronous, _ = seconds_and_steps(folder, async_compression=False)
    _, steps, compressions = seconds_and_steps(folder)
    assert compressions == 8
    assert steps > synchronous


def test_time_is_the_model_s_alone(folder):
    runs = [served(SimulatedLLM(folder, times=FixedTimes(), policy="zipage", **OPTIONS | BOUNDED)) for _ in range(2)]
    assert runs[0] == runs[1]


def test_the_work_of_a_step_is_told(folder):
    times = FixedTimes()
    llm = SimulatedLLM(folder, times=times, **OPTIONS)
    llm.generate([[5] * 100], SamplingParams(max_tokens=3, ignore_eos=True), use_tqdm=False)
    chunks = [
        (work.num_decodes, work.decode_entries, work.prefill_tokens, work.prefill_entries) for work in times.steps
    ]
    assert chunks == [(0, 0, 64, 64 * 65 // 2), (0, 0, 36, 36 * 64 + 36 * 37 // 2), (1, 101, 0, 0), (1, 102, 0, 0)]


def test_the_pool_is_planned_from_the_device_s_memory(folder):
    options = {name: value for name, value in OPTIONS.items() if name != "num_blocks"}
    small, large = (
        SimulatedLLM(folder, times=FixedTimes(memory_bytes=size), **options).memory_plan for size in (10**8, 10**9)
    )
    assert large.weight_bytes == small.weight_bytes > 0
    freed = 0.9 * (10**9 - 10**8)
    assert (large.num_blocks - small.num_blocks) * large.block_bytes == pytest.approx(freed, abs=large.block_bytes)


@pytest.mark.parametrize(
    "option", [{"debug": True}, {"trace_positions": True}, {"data_parallel_size": 2}, {"allocation": "pyramid"}]
)
def test_options_without_meaning_are_refused(folder, option):
    with pytest.raises(ValueError, match=next(iter(option))):
        SimulatedLLM(folder, times=FixedTimes(), **OPTIONS | option)


def test_models_with_sliding_layers_are_bounded_as_they_are(tmp_path):
    """Windows bound who runs at once, and what is shared."""
    folder = str(save_tiny_model("gpt_oss", tmp_path, num_hidden_layers=2))
    options = OPTIONS | {"policy": "zipage", "budget_tokens": 48, "async_compression": False, "async_scheduling": False}
    real = LLM(folder, device="cpu", dtype="float32", protection="prompt", **options)
    simulated = SimulatedLLM(folder, times=FixedTimes(), protection="prompt", **options)
    assert served(simulated, 6) == served(real, 6)
    assert simulated.memory_plan.num_sliding_blocks == real.memory_plan.num_sliding_blocks > 0


@pytest.mark.parametrize("option", [{"logprobs": 1}, {"return_hidden_states": True}])
def test_requests_for_what_is_not_computed_are_refused(folder, option):
    llm = SimulatedLLM(folder, times=FixedTimes(), **OPTIONS)
    with pytest.raises(ValueError, match=next(iter(option))):
        llm.add_request([5] * 10, SamplingParams(**option))


def test_a_step_that_is_launched_kernel_by_kernel_ends_no_sooner_than_its_launch(folder):
    """Prompts too many for a graph: the device works meanwhile, so that the longer of the two counts."""
    prompts, sizes = [[number] * 30 for number in range(9)], {"max_num_batched_tokens": 400, "max_num_seqs": 9}
    for launch, lasts in ((0.004, 0.010), (0.030, 0.030)):
        llm = SimulatedLLM(folder, times=FixedTimes(launch_seconds=launch), **OPTIONS | sizes)
        outputs = llm.generate(prompts, SamplingParams(max_tokens=1), use_tqdm=False)
        llm.shutdown()
        assert [output.metrics.ttft for output in outputs] == pytest.approx([0.002 + lasts] * 9)


def test_token_listeners_hear_every_token_when_it_is_there(folder):
    llm = SimulatedLLM(folder, times=FixedTimes(), **OPTIONS)
    heard = []
    llm.token_listeners.append(lambda now, names: heard.extend((name, now) for name in names))
    llm.add_request([1] * 20, SamplingParams(max_tokens=5, ignore_eos=True), "one")
    llm.add_request([1] * 20, SamplingParams(max_tokens=3, ignore_eos=True), "two")
    outputs = {}
    while llm.has_unfinished_requests():
        outputs |= {output.request_id: output.metrics for output in llm.step()}
    for name, count in (("one", 5), ("two", 3)):
        times = [now for who, now in heard if who == name]
        assert len(times) == count
        assert times[0] == pytest.approx(outputs[name].ttft)
        assert times[-1] == pytest.approx(outputs[name].e2e)
    llm.shutdown()
