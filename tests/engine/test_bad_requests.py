"""Prompts, options and files that the engine refuses, and what it says of them."""

import json
from collections.abc import Sequence

import numpy as np
import pytest

from tests.engine.small_llm import GREEDY, make_llm, small_folder, small_llm, small_shared_llm  # noqa: F401
from tests.tiny_models import VOCAB
from zipage import SamplingParams


class Unreadable(Sequence):
    """Token ids that can't be had."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        raise OSError("the disk is gone")


BAD_PROMPTS = {
    "empty": ([], "empty"),
    "too long for the model": ([1] * 1024, "max_model_len=1024"),
    "outside the vocabulary": ([1, VOCAB], f"token id {VOCAB} is outside the vocabulary"),
    "negative": ([-1], "outside the vocabulary"),
    "no prompt at all": (None, "a prompt is text or a list of token ids"),
    "nested": (["a", 1], "a prompt is text or a list of token ids"),
    "no dimension": (np.array(3), "the prompt cannot be read (TypeError: iteration over a 0-d array)"),
    "unreadable": (Unreadable(), "the prompt cannot be read (OSError: the disk is gone)"),
}


@pytest.mark.parametrize("bad", BAD_PROMPTS)
def test_a_bad_prompt_costs_itself_only(llm, bad):
    prompt, message = BAD_PROMPTS[bad]
    good = llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    outputs = llm.generate([[1, 2, 3], prompt, [1, 2, 3]], GREEDY, use_tqdm=False)
    assert message in outputs[1].error
    assert "\n" not in outputs[1].error
    assert outputs[1].outputs[0].finish_reason == "error"
    assert [o.outputs[0].token_ids for o in (outputs[0], outputs[2])] == [good, good]
    with pytest.raises(ValueError, match=r"prompt|vocabulary"):
        llm.add_request(prompt)


def test_a_prompt_larger_than_the_pool_is_refused(folder):
    llm = make_llm(folder, num_blocks=4)
    outputs = llm.generate([[1] * 64, [1] * 63], GREEDY, use_tqdm=False)
    assert "the KV pool holds 64 (4 blocks of 16)" in outputs[0].error
    assert outputs[1].error is None


def test_a_prompt_that_is_no_text_costs_itself(llm):
    outputs = llm.generate(["good", "a\ud800b", "fine"], GREEDY, use_tqdm=False)
    assert [output.error is None for output in outputs] == [True, False, True]
    assert "character 1 is '\\ud800', a lone surrogate" in outputs[1].error


def test_ids_of_a_tokenizer_beyond_the_embedding_cost_their_prompt(folder, monkeypatch):
    llm = make_llm(folder)
    llm._inputs.tokenizer.add_tokens([f"<{i}>" for i in range(VOCAB)])
    good, bad = llm.generate(["hello", f"hello<{VOCAB - 1}>"], GREEDY, use_tqdm=False)
    assert good.error is None
    assert f"('<{VOCAB - 1}>'), which is outside the vocabulary of {VOCAB}" in bad.error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blok_size": 16}, "unknown option 'blok_size'; did you mean block_size"),
        ({"block_size": 24}, "block_size=24: must be a power of two"),
        ({"num_blocks": 0}, "num_blocks=0: must be at least 1"),
        ({"max_model_len": 9999}, "max_model_len=9999: the model's positions end at 1024"),
        ({"max_num_batched_tokens": 4}, "max_num_batched_tokens=4: must be at least max_num_seqs=8"),
        ({"enable_chunked_prefill": False}, "max_num_batched_tokens=64 must hold max_model_len=1024"),
        ({"num_blocks": None, "kv_cache_memory_bytes": 100}, "no room for a KV block"),
        ({"kv_cache_memory_bytes": 10**6}, "give one of them"),
        ({"swap_space": 1e6}, "so many GiB exceed this machine's memory"),
        ({"policy": "lru"}, "unknown policy 'lru'; known: full, zipage"),
        ({"policy": "zipagee", "budget_tokens": 64}, "did you mean 'zipage'"),
        ({"policy": "zipage"}, "budget_tokens=None: must be given with policy 'zipage'"),
        ({"policy": "zipage", "budget_tokens": 64, "policy_options": {"alfa": 1}}, "did you mean alpha"),
        (
            {"policy": "zipage", "budget_tokens": 64, "recent_tokens": 64},
            "leaves nothing to choose beside recent_tokens=64",
        ),
        (
            {"policy": "random", "budget_tokens": 64, "protection": "sink:60"},
            "budget_tokens=64 is less than protection=sink:60",
        ),
        ({"policy": "page_random", "budget_tokens": 64}, "page_size=256 is not the block_size=16"),
        ({"trigger": "never"}, "trigger='never': must be one of block_full, pressure"),
        ({"scheduling": "fifo"}, "scheduling='fifo': must be one of hybrid, constrained"),
        ({"layer_stride": 0}, "layer_stride=0: must be at least 1"),
        ({"interval": 0}, "interval=0: must be at least 1"),
        (
            {"policy": "random", "budget_tokens": 64, "interval": 32, "trigger": "pressure"},
            "interval=32: must be left out with trigger 'pressure'",
        ),
        ({"recent_tokens": -1}, "recent_tokens=-1: must be at least 0"),
        ({"policy_options": {"a": 1}}, "policy 'full' has no options"),
        ({"protection": "sink"}, "protection='sink': must be none, prompt or sink:N"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size=0: must be at least 1"),
        ({"data_parallel_size": 0}, "data_parallel_size=0: must be at least 1"),
        ({"dtype": "int8"}, "dtype='int8': must be one of auto"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options_are_named(folder, options, message):
    with pytest.raises(ValueError, match=message) as error:
        make_llm(folder, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"n": 0}, "n=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_k": -2}, "top_k=-2"),
        ({"min_p": 2.0}, "min_p=2.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"stop": ("",)}, "stop="),
        ({"seed": "x"}, "seed='x'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_sampling_params_are_named(options, message):
    with pytest.raises(ValueError, match=f"SamplingParams.{message}"):
        SamplingParams(**options)


def test_options_of_eviction_are_said_to_have_no_effect(folder, caplog):
    make_llm(folder)
    assert "never evicts" not in caplog.text
    llm = make_llm(folder, budget_tokens=64, protection="sink:4", async_compression=False)
    assert "budget_tokens, protection, async_compression have no effect" in caplog.text
    caplog.clear()
    llm.generate([[1, 2]] * 3, SamplingParams(max_tokens=2, budget_tokens=32), use_tqdm=False)
    assert caplog.text.count("SamplingParams.budget_tokens has no effect") == 1
    output = llm.generate([[1]], SamplingParams(policy="random"), use_tqdm=False)[0]
    assert "an engine of policy 'full' reserves no memory" in output.error


def test_a_budget_that_blocks_make_larger_is_pointed_out(folder, caplog):
    make_llm(folder, policy="random", budget_tokens=32, block_size=16)
    assert "rounded" not in caplog.text
    make_llm(folder, policy="random", budget_tokens=20, block_size=16)
    assert "budget_tokens=20, rounded up to 32 entries in blocks of 16, smaller blocks" in caplog.text


def test_text_options_need_a_tokenizer(folder):
    llm = make_llm(folder, skip_tokenizer_init=True)
    assert llm.get_tokenizer() is None
    assert llm.generate([[1, 2]], GREEDY, use_tqdm=False)[0].outputs[0].text == ""
    assert "give token ids" in llm.generate(["hi"], GREEDY, use_tqdm=False)[0].error
    assert "use stop_token_ids" in llm.generate([[1]], SamplingParams(stop="x"), use_tqdm=False)[0].error


def test_missing_files_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        make_llm(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}))
    with pytest.raises(ValueError, match="architecture 'mamba' is not supported: it has recurrent layers"):
        make_llm(tmp_path)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        make_llm(tmp_path)
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        make_llm(tmp_path, load_format="dummy")
    make_llm(tmp_path, load_format="dummy", skip_tokenizer_init=True)


@pytest.mark.parametrize("request_id", [[], ["mine"], None, 5, b"mine"])
def test_an_abort_takes_one_id(llm, request_id):
    with pytest.raises(ValueError, match=r"request_id=.*: must be a text"):
        llm.abort(request_id)


@pytest.mark.parametrize("request_id", ["", 5, ["mine"]])
def test_a_request_id_is_a_text(llm, request_id):
    with pytest.raises(ValueError, match=r"request_id=.*: must be a text"):
        llm.add_request([1, 2, 3], GREEDY, request_id=request_id)
    assert not llm.has_unfinished_requests()


def test_a_prompt_that_leaves_its_policy_nothing_to_rank_costs_itself(folder):
    """lagkv ranks nothing in its last two partitions; of 64 entries, the longer prompt would take 47."""
    options = {"policy": "lagkv", "policy_options": {"partition": 9}, "budget_tokens": 64, "protection": "prompt"}
    llm = make_llm(folder, **options)
    long, short = llm.generate([[1] * 60, [1] * 40], GREEDY, use_tqdm=False)
    assert "64 entries kept leave nothing to rank beside 47 leading ones" in long.error
    assert short.error is None
