"""The model of time: its parts by hand, and machines by their files."""

import json
from dataclasses import replace

import numpy as np
import pytest

from experiments.errors import UsageError
from experiments.paths import ROOT
from experiments.simulation.machine import machine_names, machine_of, read_machine
from experiments.simulation.shape import SimulatedShape
from experiments.simulation.step_model import TIMED, StepModel
from zipage import CompressionWork, StepWork, find_policy

MODEL = ROOT / "models" / "qwen3-8b-shape"
PLAIN = replace(
    read_machine("h100"), name="plain", bandwidth=1e12, flops=1e15, weight_share=0.5, product_share=0.5,
    entry_share=0.5, prefill_share=0.25, attention_seconds=0.0, layer_seconds=0.0, row_passes=0.0, sample_seconds=0.0,
    product_seconds=0.0, block_entries=0.0, collective_seconds=0.0, move_share=0.5, score_share=0.25,
    redundancy_share=0.5,
)  # fmt: skip


@pytest.fixture(scope="module", name="shape")
def qwen3_8b() -> SimulatedShape:
    return SimulatedShape.read(MODEL)


def test_one_request_reads_the_weights_and_its_entries(shape):
    seconds = StepModel(PLAIN, shape).step(StepWork(1, 1000))
    assert seconds == pytest.approx((15.1e9 + 1000 * 147_456) / 0.5e12, rel=0.01)


def test_a_long_prompt_is_arithmetic(shape):
    work = StepWork(0, 0, 8192, 8192 * 8193 // 2, False)
    pairs = work.prefill_entries * 4 * 36 * 32 * 128
    products = 8192 * shape.sizes.token_flops / 0.5e15
    assert StepModel(PLAIN, shape).step(work) == pytest.approx(products + pairs / 0.25e15, rel=0.01)


def test_the_corner_of_the_roofline_is_round(shape):
    rows = int(shape.sizes.weight_bytes / 0.5e12 / (shape.sizes.token_flops / 0.5e15))
    products, *_ = StepModel(PLAIN, shape).parts(rows, 0)
    assert products == pytest.approx(2 ** (1 / 4) * shape.sizes.weight_bytes / 0.5e12, rel=0.01)


def test_kernels_of_few_rows_overlap(shape):
    """Of 64 none, of fewer the more."""
    plain, overlapping = (StepModel(replace(PLAIN, overlap_seconds=seconds), shape) for seconds in (0.0, 1e-5))
    works = StepWork(16, 500), StepWork(40, 500, 8), StepWork(64, 500), StepWork(100, 500)
    saved = [plain.step(work) - overlapping.step(work) for work in works]
    assert saved == pytest.approx([36e-5 * 3 / 4, 36e-5 / 4, 0, 0])


def test_requests_of_unequal_lengths_keep_some_of_the_device_waiting(shape):
    """By the deviation of their lengths, times the square root of how many they are."""
    plain, uneven = (StepModel(replace(PLAIN, imbalance=factor), shape) for factor in (0.0, 0.5))
    works = [StepWork(4, 4000, decode_squares=squares) for squares in (4 * 1000**2, 2 * 700**2 + 2 * 1300**2)]
    lost = [uneven.step(work) - plain.step(work) for work in works]
    assert lost == pytest.approx([0, 0.5 * 300 * 2 * 147_456 / 1e12])


def test_a_block_is_read_as_if_it_had_more_entries(shape):
    work, machine = StepWork(4, 4096), replace(PLAIN, block_entries=2.0)
    seconds = [StepModel(machine, shape, size).step(work) for size in (16, 256)]
    free = StepModel(replace(PLAIN, block_entries=0.0), shape).step(work)
    assert [value - free for value in seconds] == pytest.approx([512 * 147_456 / 0.5e12, 32 * 147_456 / 0.5e12])


def test_numbers_and_arrays_alike(shape):
    model = StepModel(read_machine("h200"), shape)
    works = [StepWork(3, 500, decode_squares=10**5), StepWork(7, 100, 512, 4096, False, 2, 10**4)]
    arrays = sum(model.parts(*np.array(works, dtype=float).T[:TIMED]))
    assert arrays == pytest.approx([model.step(work) for work in works])


def test_copies_to_the_host_cost_what_the_step_beside_them_does_not_hide(shape):
    model = StepModel(PLAIN, shape, block_size=256)
    alone, few, many = (model.step(StepWork(1, 1000, moved_blocks=count)) for count in (0, 1, 1000))
    assert alone == few
    assert many == pytest.approx(1000 * 256 * 147_456 / PLAIN.host_bandwidth)


def test_two_gpus_share_the_bytes_and_pay_for_sums(shape):
    half = SimulatedShape.read(MODEL, ranks=2)
    work = StepWork(1, 1000)
    shared = StepModel(PLAIN, half).step(work)
    assert shared == pytest.approx(StepModel(PLAIN, shape).step(work) / 2, rel=0.01)
    slower = replace(PLAIN, collective_seconds=10e-6)
    assert StepModel(slower, half).step(work) == pytest.approx(shared + 72 * 10e-6)


def test_sums_and_logits_cross_the_link(shape):
    """Twice a layer N - 1 of N parts of a row, there and back, and once those of the logits in bfloat16."""
    fast = replace(PLAIN, link_bandwidth=1e30)
    for ranks in (2, 4):
        part = SimulatedShape.read(MODEL, ranks=ranks)
        slow = replace(PLAIN, link_bandwidth=1e10, link_share=0.5, sum_share=0.25)
        more = StepModel(slow, part).step(StepWork(8, 1000)) - StepModel(fast, part).step(StepWork(8, 1000))
        sums, logits = (8 * size * (ranks - 1) / ranks for size in (72 * 2 * 4096 * 2, shape.sizes.vocab_size * 2))
        assert more == pytest.approx(sums / 2.5e9 + logits / 5e9)


def test_what_is_no_graph_costs_the_host_launches(shape):
    graph, eager = StepWork(1, 100), StepWork(0, 0, 1000, 500_500, False, is_graph=False)
    model = StepModel(replace(PLAIN, host_seconds=1e-3, host_row_seconds=0.0, launch_seconds=50e-6), shape)
    assert model.host(graph) == model.host(eager) == pytest.approx(1e-3)
    assert model.launch(graph) == 0
    assert model.launch(eager) == pytest.approx(36 * 50e-6)
    never = StepModel(replace(model.machine, eager=True), shape)
    assert never.launch(graph) == pytest.approx(36 * 50e-6)
    assert never.launch(graph._replace(num_captures=2)) == pytest.approx(36 * 50e-6)


def test_a_graph_that_is_captured_costs_two_launches(shape):
    model = StepModel(replace(PLAIN, launch_seconds=50e-6), shape)
    assert model.launch(StepWork(1, 100, num_captures=1)) == pytest.approx(2 * 36 * 50e-6)
    assert model.launch(StepWork(1, 100, num_captures=2)) == pytest.approx(4 * 36 * 50e-6)


def test_engines_launched_steps_with_long_prompts(shape):
    """Prompts whose tokens attend as decodes were part of a graph before, too."""
    before = StepModel(replace(PLAIN, launch_seconds=50e-6, launches_prompts=True), shape)
    long, short = StepWork(4, 100, 600, 180_300, False), StepWork(4, 100, 20, 210)
    assert before.launch(long) == before.launch(long._replace(num_captures=1)) == pytest.approx(36 * 50e-6)
    assert before.launch(short) == 0


def test_each_product_begins_and_ends(shape):
    work = StepWork(8, 1000)
    more = StepModel(replace(PLAIN, product_seconds=1e-5), shape).step(work)
    assert more - StepModel(replace(PLAIN, product_seconds=0.0), shape).step(work) == pytest.approx(145e-5)


@pytest.mark.parametrize(
    ("name", "options", "parts"),
    [
        ("random", {}, "move"),
        ("snapkv", {}, "move score"),
        ("zipage", {}, "move score redundancy"),
        ("zipage", {"redundancy": "none"}, "move score"),
    ],
)
def test_a_compression_costs_what_its_policy_looks_at(shape, name, options, parts):
    policy = find_policy(name).from_options(options)
    seconds = StepModel(PLAIN, shape).compression(CompressionWork(policy, 2, 1280, 1024)).device
    each = {
        "move": 1280 * 147_456 / 0.5e12,
        "score": 1280 * 147_456 / 0.25e12,
        "redundancy": 1280 * 256 * 2 * 36 * 8 * 128 / 0.5e15,
    }
    assert seconds == pytest.approx(sum(each[part] for part in parts.split()))


def test_the_machines_that_come_with_it():
    assert {"h100", "h200", "a100_80gb"} <= set(machine_names())
    h100, h200, a100 = (read_machine(name) for name in ("h100", "h200", "a100_80gb"))
    assert h200.weight_share == a100.weight_share == h100.weight_share
    assert h200.bandwidth > h100.bandwidth > a100.bandwidth
    assert "published" in a100.origin


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("like: h100\nspeed: 3\n", "unknown option speed"),
        ("like: h100\nbandwidth: fast\n", "fast"),
        ("like: h100\nbandwidth: -1\n", "bandwidth"),
        ("like: h100\nbandwidth: 0\n", "above 0"),
        ("like: h100\nentry_share: 1.5\n", "entry_share"),
        ("name: mine\n", "is missing"),
        ("- 1\n", "mapping"),
        ("like: mine\n", r"mine\.yaml: its like, mine, leads back to mine\.yaml"),
        ("like: h100\neager: 'no'\n", "eager=no: must be true or false"),
        ("like: h100\nlaunches_prompts: 1\n", "launches_prompts=1: must be true or false"),
        ("like: h100\nname: 5\n", "name=5: must be a text"),
        ("like: h100\norigin: [a, b]\n", "origin=.*: must be a text"),
        ("like: h100\nuntil: 5\n", "until=5: must be a text or null"),
        ("like: h100\n1: 2\nspeed: 3\n", "unknown option 1"),
    ],
)
def test_a_file_that_is_no_machine(tmp_path, text, what):
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("like: h100", f"like: {ROOT}/conf/machine/h100"))
    with pytest.raises(UsageError, match=what):
        read_machine(path)


def test_an_unknown_machine_names_those_there_are():
    with pytest.raises(UsageError, match="h100"):
        read_machine("h999")
    with pytest.raises(UsageError, match="missing"):
        machine_of({"name": "x"}, "here")


def test_a_step_reads_the_experts_that_its_tokens_are_sent_to():
    """8 of 128 for one token, and all for many, whose step takes as long as reading all weights."""
    shape = SimulatedShape.read(ROOT / "models" / "qwen3-30b-a3b-shape")
    machine = read_machine("h200")
    model = StepModel(machine, shape, 256)
    one, many = (model.parts(n, 0)[0] for n in (1, 256))
    constant = (4 * shape.layers + 1) * machine.product_seconds
    rate = machine.bandwidth * machine.weight_share
    assert (one - constant) * rate == pytest.approx(shape.sizes.weight_bytes, rel=1e-3)
    assert (many - constant) * rate == pytest.approx(shape.sizes.held_weights, rel=0.02)


def test_layers_with_a_window_are_refused(tmp_path):
    config = json.loads((ROOT / "models" / "qwen3-0.6b-shape" / "config.json").read_text())
    types = {"layer_types": ["sliding_attention"] * 28}
    (tmp_path / "config.json").write_text(json.dumps(config | types))
    with pytest.raises(UsageError, match="layers with a window can't be simulated"):
        SimulatedShape.read(tmp_path)
