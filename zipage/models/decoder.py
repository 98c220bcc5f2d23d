"""A decoder of pre-norm blocks; the flags of its `ModelSpec` say which biases and norms it has."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.add_rms_norm import add_rms_norm
from kernels.attention_form import AttentionForm
from kernels.linear import linear
from kernels.qk_norm_rope import qk_norm_rope
from zipage.models.delta_net import Recurrence, RecurrentLayer
from zipage.models.layer_mlp import new_mlp
from zipage.models.mlp import new_parameter, prefixed, row_pieces, row_views
from zipage.models.rotary import RotaryEmbedding
from zipage.models.shard import WHOLE, Piece, Shard
from zipage.models.spec import ModelSpec

Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]
Observe = Callable[[int, Tensor], None]


class DecoderLayer(nn.Module):
    """Pre-norm block: attention, then an MLP.

    q, k, v are rows of one weight, in this order. RMSNorm: Zhang and Sennrich 2019, arXiv:1910.07467.

    Args:
        index: of the layer in the model.
        place: among the layers that attend.
    """

    def __init__(
        self, spec: ModelSpec, index: int, place: int, dtype: torch.dtype, device: torch.device, shard: Shard
    ) -> None:
        super().__init__()
        whole = spec.attention[place]
        heads = shard.attention(whole)
        self.index = index
        self.place = place
        self.shard = shard
        self.num_heads = heads.num_heads
        self.num_kv_heads = heads.num_kv_heads
        self.output_gate = heads.output_gate
        self.eps = spec.rms_norm_eps
        self.norm_offset = spec.norm_offset
        self.qkv = shard.head_pieces(whole)
        self.output, self.own_columns = shard.output_columns(whole)
        self._qkv_names = ("qkv_proj",) if spec.fused_weights else ("q_proj", "k_proj", "v_proj")
        qkv_width = sum(piece.count for piece in self.qkv)
        parameter = partial(new_parameter, dtype=dtype, device=device)
        self.input_norm = parameter(spec.width)
        self.qkv_weight = parameter(qkv_width, spec.width)
        self.qkv_bias = parameter(qkv_width) if spec.qkv_bias else None
        self.q_norm = parameter(heads.head_dim) if spec.qk_norm else None
        self.k_norm = parameter(heads.head_dim) if spec.qk_norm else None
        self.output_weight = parameter(spec.width, self.output.count)
        self.output_bias = parameter(spec.width) if spec.output_bias else None
        self.own_heads = shard.query_heads(whole)
        self.sinks = parameter(heads.num_heads) if heads.sinks else None
        self.form = AttentionForm(heads.window, heads.soft_cap, self.sinks)
        self.attention_output_norm = parameter(spec.width) if spec.output_norms else None
        self.mlp_output_norm = parameter(spec.width) if spec.output_norms else None
        self.mlp_norm = parameter(spec.width)
        self.places = (None, None) if spec.output_norms else (0, 1)  # where what is added to the stream is a part
        self.mlp = new_mlp(spec, index, dtype, device, shard)

    def forward(
        self,
        hidden: Tensor,
        delta: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        attention: Attention,
        observe: Observe | None = None,
    ) -> Tensor:
        """One layer, up to the add of its output, which the next norm does.

        Args:
            hidden: [T, width], the residual stream; added to in place.
            delta: [T, width], the layer before's output, not yet added; None in the first layer.
            cos, sin: of `RotaryEmbedding`.
            attention, observe: as in `Decoder.forward`.

        Returns:
            [T, width], this layer's output, not yet added.
        """
        normed = self.shard.add_rms_norm(hidden, delta, self.places[1], self.input_norm, self.eps, self.norm_offset)
        if observe is not None:
            observe(self.place, normed)
        qkv = linear(normed, self.qkv_weight, self.qkv_bias)
        heads, gate = (self.num_heads, self.num_kv_heads), None
        if self.output_gate:
            qkv, gate = self._without_gate(qkv)
        q, k, v = qk_norm_rope(qkv, self.q_norm, self.k_norm, self.eps, cos, sin, *heads, self.norm_offset)
        attended = attention(self.place, q, k, v).reshape(hidden.shape[0], -1)[:, self.own_columns]
        if gate is not None:
            attended = attended * gate.sigmoid()
        delta = self.shard.row_parallel(attended, self.output_weight, self.output_bias, 0)
        delta = self._output_norm(delta, 0, self.attention_output_norm)
        normed = self.shard.add_rms_norm(hidden, delta, self.places[0], self.mlp_norm, self.eps, self.norm_offset)
        return self._output_norm(self.mlp(normed), 1, self.mlp_output_norm)

    def _without_gate(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """[T, (Hq + 2 H) * d] of a product whose rows have a gate behind each query, and the gates [T, Hq * d]."""
        both, kv = qkv.split([self.qkv[0].count, 2 * self.qkv[1].count], dim=1)
        q, gate = both.unflatten(1, (self.num_heads, 2, -1)).unbind(2)
        return torch.cat((q.flatten(1), kv), dim=1), gate.flatten(1)

    def _output_norm(self, delta: Tensor, place: int, weight: Tensor | None) -> Tensor:
        if weight is None:
            return delta
        return add_rms_norm(self.shard.sum(delta, place), None, weight, self.eps, self.norm_offset)

    def pieces(self) -> dict[str, tuple[Piece, ...]]:
        """As `Decoder.pieces`."""
        own = {
            "qkv_weight": self.qkv,
            "qkv_bias": self.qkv,
            "output_weight": (self.output,),
            "sinks": (self.own_heads,),
        }
        return own | prefixed("mlp", self.mlp.pieces())

    def weight_pieces(self) -> dict[str, tuple[Piece, ...]]:
        """As `Decoder.weight_pieces`."""
        own = row_pieces(self._qkv_names, self.qkv) | {"o_proj.weight": (self.output,), "sinks": (self.own_heads,)}
        return prefixed("self_attn", own) | prefixed("mlp", self.mlp.weight_pieces())

    def weight_views(self) -> dict[str, Tensor]:
        """As `Decoder.weight_views`."""
        attention = row_views(self._qkv_names, self.qkv, self.qkv_weight, self.qkv_bias)
        attention["o_proj.weight"] = self.output_weight
        optional = {
            "o_proj.bias": self.output_bias,
            "q_norm.weight": self.q_norm,
            "k_norm.weight": self.k_norm,
            "sinks": self.sinks,
        }
        attention |= {name: tensor for name, tensor in optional.items() if tensor is not None}
        norms = {"post_attention_layernorm.weight": self.mlp_norm}
        if self.mlp_output_norm is not None:
            norms = {
                "post_attention_layernorm.weight": self.attention_output_norm,
                "pre_feedforward_layernorm.weight": self.mlp_norm,
                "post_feedforward_layernorm.weight": self.mlp_output_norm,
            }
        return {
            "input_layernorm.weight": self.input_norm,
            **norms,
            **prefixed("self_attn", attention),
            **prefixed("mlp", self.mlp.weight_views()),
        }


class Decoder(nn.Module):
    """Token ids to hidden states to logits, for inference. Knows nothing about how keys and values are kept.

    The weights of a new one are uninitialised memory; `load_model` fills them.

    Args:
        spec: shapes and flags of the whole model.
        dtype: of the parameters, the hidden states and the logits.
        device: where the parameters lie.
        shard: what of the model this is. All ranks call `forward` and `logits` together.

    Attributes:
        spec: with the heads that are computed here.
        attending: the layers that attend, in their order.
        forms: of their attention, which `forward` leaves to its caller.
    """

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, device: torch.device, shard: Shard = WHOLE) -> None:
        super().__init__()
        self.spec = shard.spec(spec)
        self.shard = shard
        self.vocab = shard.piece(0, spec.vocab_size)
        self.embedding = new_parameter(self.vocab.count, spec.width, dtype=dtype, device=device)
        self.layers = nn.ModuleList(self._layers(spec, dtype, device))
        self.norm = new_parameter(spec.width, dtype=dtype, device=device)
        self.lm_head = (
            self.embedding
            if spec.tie_embeddings
            else new_parameter(self.vocab.count, spec.width, dtype=dtype, device=device)
        )
        self.rotary = self._rotary(spec.max_position, device)
        self.local_rotary = None
        if spec.local_inv_freq is not None:
            self.local_rotary = RotaryEmbedding(torch.tensor(spec.local_inv_freq, device=device), 1.0)
        self.forms = tuple(layer.form for layer in self.attending)
        self._embedding_scale = torch.tensor(spec.embedding_scale, dtype=dtype).item()

    def _layers(self, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> Iterator[nn.Module]:
        recurrent = () if spec.recurrent is None else spec.recurrent.layers
        numbers = count(), count()
        for index in range(spec.depth):
            kind = RecurrentLayer if index in recurrent else DecoderLayer
            yield kind(spec, index, next(numbers[kind is RecurrentLayer]), dtype, device, self.shard)

    @property
    def attending(self) -> list[DecoderLayer]:
        return [layer for layer in self.layers if isinstance(layer, DecoderLayer)]

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    def for_context(self, length: int) -> Decoder:
        """This decoder, its weights shared, for contexts of up to `length` tokens (`ModelSpec.frequencies`)."""
        if self.spec.frequencies(length) == self.spec.frequencies(self.spec.max_position):
            return self
        other = copy.copy(self)
        other._modules = self._modules | {"rotary": self._rotary(length, self.device)}
        return other

    def _rotary(self, length: int, device: torch.device) -> RotaryEmbedding:
        inv_freq = torch.tensor(self.spec.frequencies(length), dtype=torch.float32, device=device)
        return RotaryEmbedding(inv_freq, self.spec.rope_attention_factor)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attention: Attention,
        observe: Observe | None = None,
        recurrence: Recurrence | None = None,
    ) -> Tensor:
        """Hidden states after the final norm.

        Args:
            token_ids: int64 [T], of any number of requests.
            positions: int64 [T], each token's place in its request.
            attention: called once a layer that attends, in order, with its place among them, q [T, Hq, d], and k and v
                [T, H, d] after rotary; returns [T, Hq, d]. q, k and v are views: the last two axes are contiguous, the
                step from token to token is not `heads * d`.
            observe: called once a layer, before its attention, with the same place and [T, width], what q, k and v
                are projections of; it changes nothing.
            recurrence: called once a recurrent layer, in order, with its place among them, queries, keys and values
                [T, channels], its gates of T tokens, and its convolution's weight [channels, K]; returns float32
                [T, Hv, dv], contiguous, what `recur` gives of each request's tokens.

        Returns:
            [T, width] in the model's dtype.
        """
        hidden = self.shard.embed(token_ids, self.embedding)
        if self._embedding_scale != 1.0:
            hidden.mul_(self._embedding_scale)
        angles = self.rotary(positions)
        local_angles = angles if self.local_rotary is None else self.local_rotary(positions)
        delta = None
        for layer in self.layers:
            if isinstance(layer, RecurrentLayer):
                delta = layer(hidden, delta, recurrence)
                continue
            cos, sin = angles if layer.form.window is None else local_angles
            delta = layer(hidden, delta, cos, sin, attention, observe)
        place = None if self.spec.output_norms else 1
        return self.shard.add_rms_norm(hidden, delta, place, self.norm, self.spec.rms_norm_eps, self.spec.norm_offset)

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, width] -> [N, vocab] in the model's dtype."""
        return self.capped(self.shard.all_tokens(F.linear(hidden, self.lm_head), self.spec.vocab_size))

    def capped(self, logits: Tensor) -> Tensor:
        """Logits as the model caps them, in place."""
        cap = self.spec.logit_cap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)

    def pieces(self) -> dict[str, tuple[Piece, ...]]:
        """Of each parameter that a shard splits, by its name, what it holds of the whole, one after another."""
        pieces = {"embedding": (self.vocab,), "lm_head": (self.vocab,)}
        for layer in self.layers:
            pieces |= prefixed(f"layers.{layer.index}", layer.pieces())
        return pieces

    def weight_pieces(self) -> dict[str, tuple[Piece, ...]]:
        """The same for the tensors of `weight_views`."""
        pieces = {"model.embed_tokens.weight": (self.vocab,), "lm_head.weight": (self.vocab,)}
        for layer in self.layers:
            pieces |= prefixed(f"model.layers.{layer.index}", layer.weight_pieces())
        return pieces

    def weight_views(self) -> dict[str, Tensor]:
        """Each tensor of a Hugging Face checkpoint, by its name there, as a view of a parameter: whole, or what the
        rank holds of it (`weight_pieces`).

        Writing all of them sets every element of every parameter once. With tied embeddings there is no
        `lm_head.weight`.
        """
        views = {"model.embed_tokens.weight": self.embedding, "model.norm.weight": self.norm}
        if not self.spec.tie_embeddings:
            views["lm_head.weight"] = self.lm_head
        for layer in self.layers:
            views |= prefixed(f"model.layers.{layer.index}", layer.weight_views())
        return views
