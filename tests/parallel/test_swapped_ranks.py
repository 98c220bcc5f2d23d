"""Ranks and requests that lose their blocks: each copies its own heads to host memory and back."""

import pytest

from tests.eviction.cases import Case
from tests.parallel.ranked import answers, engine
from tests.tiny_models import save_tiny_model


@pytest.mark.usefixtures("forked_children")
@pytest.mark.parametrize("case", [None, Case("h2o")], ids=str)
def test_each_rank_copies_its_shard_of_a_preempted_request(tmp_path, monkeypatch, case):
    folder = save_tiny_model("qwen3", tmp_path, num_hidden_layers=2)
    monkeypatch.setattr("zipage.scheduling.swap_space.OPERATIONS_PER_BYTE", 0)
    options = {"num_blocks": 14, "headroom": 0, "interval": None if case is None else 48}
    expected = answers(engine(folder, case, **options))
    llm = engine(folder, case, **options, tensor_parallel_size=2, swap_space=0.01)
    found = answers(llm)
    stats = llm.stats
    llm.shutdown()
    assert not expected.differences(found)
    assert stats.pauses == stats.resumes > 0
    assert stats.bytes_to_host > 0
