"""What a rank holds of a model, and that the ranks together compute what one device does; without processes."""

import threading
from types import SimpleNamespace

import pytest
import torch
from gguf import GGMLQuantizationType

from tests.models.dense import dense_attention_of
from tests.models.loading.gguf_writer import write_gguf
from tests.models.tiny import GEMMA, GPT_OSS, MIXTURE, make_model
from tests.tiny_models import FAMILIES, MORE_FAMILIES, VOCAB, save_tiny_model
from zipage.models.attention import AttentionSpec
from zipage.models.loading.loader import load_model
from zipage.models.loading.safetensors_folder import SafetensorsFolder
from zipage.models.shard import Shard


class Threads:
    """`Collectives` of ranks that are threads of this process."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size)
        self._parts = [None] * size

    def of(self, rank: int) -> SimpleNamespace:
        def everyone(x):
            self._parts[rank] = x
            self._barrier.wait(10)
            parts = [part.clone() for part in self._parts]
            self._barrier.wait(10)
            return parts

        return SimpleNamespace(
            product=lambda x, weight, place: x @ weight.T,
            part=lambda x, place: x,
            sum=lambda part, place: sum(everyone(part)),
            reduce=lambda x: sum(everyone(x)),
            gather=lambda x: torch.stack(everyone(x)),
        )


def on_ranks(size: int, run) -> list:
    """`run(rank)` of each, at the same time."""
    results = [None] * size

    def keep(rank: int) -> None:
        with torch.inference_mode():
            results[rank] = run(rank)

    threads = [threading.Thread(target=keep, args=[rank]) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("family", sorted({*FAMILIES, *MORE_FAMILIES}))
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_ranks_compute_what_one_device_does(family, size, load_format, tmp_path):
    more = {
        "llama": {"attention_bias": True, "mlp_bias": True},
        "gemma3_text": {"attention_bias": True, "attn_logit_softcapping": 5.0},
    }.get(family, {})
    folder = save_tiny_model(family, tmp_path, **more)
    options = {"device": "cpu", "load_format": load_format, "seed": 3}
    whole = load_model(str(folder), **options)
    tokens = torch.arange(40) * 7 % VOCAB
    positions = torch.arange(40)
    with torch.inference_mode():
        hidden = whole.decoder(tokens, positions, dense_attention_of(whole.decoder))
        expected = whole.decoder.logits(hidden)
    joint = Threads(size)

    def run(rank):
        decoder = load_model(str(folder), **options, shard=Shard(rank, size, joint.of(rank))).decoder
        states = decoder(tokens, positions, dense_attention_of(decoder))
        return states, decoder.logits(states), sum(p.numel() for p in decoder.parameters())

    results = on_ranks(size, run)
    for states, logits, _ in results:
        torch.testing.assert_close(states, hidden, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        assert logits.shape == expected.shape
        assert torch.equal(states, results[0][0]), "all ranks have the same, to the last bit"
    most = sum(p.numel() for p in whole.decoder.parameters()) / size
    assert max(count for *_, count in results) < 1.4 * most


def test_heads_go_round():
    """Two KV heads on four ranks: each on two; eight on two: four each."""
    few = AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=4, scale=1.0)
    shards = [Shard(rank, 4) for rank in range(4)]
    assert [list(shard.kv_heads(2)) for shard in shards] == [[0], [0], [1], [1]]
    assert [(a.num_heads, a.num_kv_heads) for a in (shard.attention(few) for shard in shards)] == [(4, 1)] * 4
    columns = [shard.output_columns(few) for shard in shards]
    assert [(piece.first, piece.count) for piece, _ in columns] == [(0, 8), (8, 8), (16, 8), (24, 8)]
    assert [(own.start, own.stop) for _, own in columns] == [(0, 8), (8, 16)] * 2
    assert [list(Shard(rank, 2).kv_heads(8)) for rank in (0, 1)] == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (3, r"tensor_parallel_size=3: 4 query heads and 2 KV heads go on 1, 2, 4 ranks"),
        (8, r"tensor_parallel_size=8: 4 query heads and 2 KV heads go on 1, 2, 4 ranks"),
    ],
)
def test_heads_that_do_not_go_round_are_refused(size, message, tmp_path):
    folder = save_tiny_model("qwen3", tmp_path)
    with pytest.raises(ValueError, match=message):
        load_model(str(folder), device="cpu", shard=Shard(0, size))


def test_an_mlp_that_does_not_divide_is_refused(tmp_path):
    folder = save_tiny_model("qwen3", tmp_path, intermediate_size=50)
    with pytest.raises(ValueError, match=r"tensor_parallel_size=4: must divide the MLP's width of 50"):
        load_model(str(folder), device="cpu", shard=Shard(1, 4))


def test_experts_that_do_not_divide_are_refused(tmp_path):
    folder = save_tiny_model("qwen2_moe", tmp_path, shared_expert_intermediate_size=42)
    with pytest.raises(ValueError, match=r"tensor_parallel_size=4: must divide the shared expert's width of 42"):
        load_model(str(folder), device="cpu", shard=Shard(1, 4))


def test_a_rank_reads_its_own_rows_and_columns(tmp_path, monkeypatch):
    folder = save_tiny_model("llama", tmp_path)
    read = {}
    original = SafetensorsFolder.read

    def counted(self, name, piece=None):
        tensor = original(self, name, piece)
        read[name] = tensor.numel() / torch.Size(self.shapes[name]).numel()
        return tensor

    monkeypatch.setattr(SafetensorsFolder, "read", counted)
    load_model(str(folder), device="cpu", shard=Shard(1, 4, Threads(4).of(1)))
    norms = {name: share for name, share in read.items() if "norm" in name}
    assert set(norms.values()) == {1.0}
    assert {share for name, share in read.items() if name not in norms} == {0.25}


def test_the_last_rank_of_an_uneven_vocabulary_is_padded_with_zeros(tmp_path):
    folder = save_tiny_model("qwen3", tmp_path, vocab_size=301)
    whole = load_model(str(folder), device="cpu").decoder
    parts = [load_model(str(folder), device="cpu", shard=Shard(rank, 4)).decoder.embedding for rank in range(4)]
    assert [len(part) for part in parts] == [76] * 4
    joined = torch.cat(parts)
    assert torch.equal(joined[:301], whole.embedding)
    assert not joined[301:].any()


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Llama", {}),
        ("Qwen2", {}),
        ("Phi3", {}),
        ("Qwen2Moe", MIXTURE | {"shared_expert_intermediate_size": 64}),
        ("Gemma3Text", GEMMA),
        ("GptOss", GPT_OSS),
    ],
)
def test_rows_and_columns_of_a_gguf_file(family, options, tmp_path):
    """Rotary pairs are put back within the heads that were read."""
    path = tmp_path / "model.gguf"
    write_gguf(path, make_model(family, **options), GGMLQuantizationType.Q8_0)
    whole = load_model(str(path), device="cpu").decoder.weight_views()
    for rank in range(2):
        shard = load_model(str(path), device="cpu", shard=Shard(rank, 2)).decoder
        views, pieces = shard.weight_views(), shard.weight_pieces()
        for name, view in views.items():
            expected = whole[name]
            if name in pieces:
                axis, fulls = pieces[name][0].axis, [piece.full for piece in pieces[name]]
                parts = zip(pieces[name], expected.split(fulls, dim=axis), strict=True)
                expected = torch.cat([piece.of(part) for piece, part in parts], dim=axis)
            if name.endswith("down_proj_bias") and rank:  # added to the sum of the ranks once
                expected = torch.zeros_like(view)
            assert torch.equal(view, expected), name
