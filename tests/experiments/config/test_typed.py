"""The engine's messages name options as they are typed at the harness."""

import pytest

from experiments.config.typed import as_typed


@pytest.mark.parametrize(
    ("said", "typed"),
    [
        ("block_size=20: must be a power of two", "engine.block_size=20: must be a power of two"),
        ("3 blocks of 16: raise num_blocks or shorten it", "3 blocks of 16: raise engine.num_blocks or shorten it"),
        (
            "budget_tokens=8 is less than protection=sink:9 and recent_tokens=16: raise budget_tokens above 25.",
            "policy.budget_tokens=8 is less than policy.protection=sink:9 and policy.recent_tokens=16: raise "
            "policy.budget_tokens above 25.",
        ),
        ("dtype='int8': must be another dtype", "engine.dtype='int8': must be another dtype"),
        ("zipage.lambda=2.0: must be in [0, 1]", "policy.options.lambda=2.0: must be in [0, 1]"),
        (
            "SamplingParams.min_tokens=5: must be at most max_tokens=3",
            "sampling.min_tokens=5: must be at most sampling.max_tokens=3",
        ),
        ("unknown policy 'zipge'; did you mean 'zipage'?", "unknown policy 'zipge'; did you mean 'zipage'?"),
        ("the interval of a policy; policy=x; seed=1", "the interval of a policy; policy=x; seed=1"),
        ("engine.block_size=20 of /block_size/num_blocks.json", "engine.block_size=20 of /block_size/num_blocks.json"),
    ],
)
def test_options_are_named_as_they_are_typed(said, typed):
    assert as_typed(said, "zipage") == typed
