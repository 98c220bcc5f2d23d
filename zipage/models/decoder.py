"""A decoder of pre-norm blocks; the flags of its `ModelSpec` say which biases and norms it has."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.qk_norm_rope import qk_norm_rope
from kernels.silu_mul import silu_mul
from zipage.models.rotary import RotaryEmbedding
from zipage.models.shard import WHOLE, Piece, Shard
from zipage.models.spec import ModelSpec

Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]
Observe = Callable[[int, Tensor], None]


def _parameter(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


class DecoderLayer(nn.Module):
    """Pre-norm block: attention, then a gated MLP (SwiGLU, Shazeer 2020, arXiv:2002.05202).

    q, k, v are rows of one weight, in this order, and so are gate and up. RMSNorm: Zhang and Sennrich 2019,
    arXiv:1910.07467.
    """

    def __init__(self, spec: ModelSpec, index: int, dtype: torch.dtype, device: torch.device, shard: Shard) -> None:
        super().__init__()
        whole = spec.attention[index]
        heads = shard.attention(whole)
        self.index = index
        self.shard = shard
        self.num_heads = heads.num_heads
        self.num_kv_heads = heads.num_kv_heads
        self.eps = spec.rms_norm_eps
        self.qkv = shard.head_pieces(whole)
        self.gate_up = (shard.piece(0, spec.mlp_width),) * 2
        self.output, self.own_columns = shard.output_columns(whole)
        self.down = shard.piece(1, spec.mlp_width)
        qkv_width, gate_up_width = (sum(piece.count for piece in pieces) for pieces in (self.qkv, self.gate_up))

        def parameter(*shape: int) -> nn.Parameter:
            return _parameter(*shape, dtype=dtype, device=device)

        self.input_norm = parameter(spec.width)
        self.qkv_weight = parameter(qkv_width, spec.width)
        self.qkv_bias = parameter(qkv_width) if spec.qkv_bias else None
        self.q_norm = parameter(heads.head_dim) if spec.qk_norm else None
        self.k_norm = parameter(heads.head_dim) if spec.qk_norm else None
        self.output_weight = parameter(spec.width, self.output.count)
        self.output_bias = parameter(spec.width) if spec.output_bias else None
        self.mlp_norm = parameter(spec.width)
        self.gate_up_weight = parameter(gate_up_width, spec.width)
        self.gate_up_bias = parameter(gate_up_width) if spec.mlp_bias else None
        self.down_weight = parameter(spec.width, self.down.count)
        self.down_bias = parameter(spec.width) if spec.mlp_bias else None

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
        normed = self.shard.add_rms_norm(hidden, delta, 1, self.input_norm, self.eps)
        if observe is not None:
            observe(self.index, normed)
        qkv = F.linear(normed, self.qkv_weight, self.qkv_bias)
        q, k, v = qk_norm_rope(qkv, self.q_norm, self.k_norm, self.eps, cos, sin, self.num_heads, self.num_kv_heads)
        attended = attention(self.index, q, k, v).reshape(hidden.shape[0], -1)[:, self.own_columns]
        delta = self.shard.row_parallel(attended, self.output_weight, self.output_bias, 0)
        normed = self.shard.add_rms_norm(hidden, delta, 0, self.mlp_norm, self.eps)
        gated = silu_mul(F.linear(normed, self.gate_up_weight, self.gate_up_bias))
        return self.shard.row_parallel(gated, self.down_weight, self.down_bias, 1)

    def pieces(self) -> dict[str, tuple[Piece, ...]]:
        """Of each parameter that a shard splits, by its name, what it holds of the whole, one after another."""
        return {
            "qkv_weight": self.qkv,
            "qkv_bias": self.qkv,
            "output_weight": (self.output,),
            "gate_up_weight": self.gate_up,
            "gate_up_bias": self.gate_up,
            "down_weight": (self.down,),
        }

    def weight_pieces(self) -> dict[str, Piece]:
        """The same for the tensors of `weight_views`."""
        names = [*(f"self_attn.{name}_proj" for name in "qkv"), "mlp.gate_proj", "mlp.up_proj"]
        rows = dict(zip(names, self.qkv + self.gate_up, strict=True))
        pieces = {f"{name}.{kind}": piece for name, piece in rows.items() for kind in ("weight", "bias")}
        return pieces | {"self_attn.o_proj.weight": self.output, "mlp.down_proj.weight": self.down}

    def weight_views(self) -> dict[str, Tensor]:
        """Each tensor of a Hugging Face checkpoint's layer, by its name there, as a view of a parameter: whole, or the
        piece that the rank holds (`weight_pieces`).
        """
        views = {
            "input_layernorm.weight": self.input_norm,
            "post_attention_layernorm.weight": self.mlp_norm,
            "self_attn.o_proj.weight": self.output_weight,
            "mlp.down_proj.weight": self.down_weight,
        }
        qkv = [f"self_attn.{name}_proj" for name in "qkv"]
        gate_up = ["mlp.gate_proj", "mlp.up_proj"]
        for names, pieces, weight, bias in (
            (qkv, self.qkv, self.qkv_weight, self.qkv_bias),
            (gate_up, self.gate_up, self.gate_up_weight, self.gate_up_bias),
        ):
            widths = [piece.count for piece in pieces]
            views |= {f"{name}.weight": part for name, part in zip(names, weight.split(widths))}
            if bias is not None:
                views |= {f"{name}.bias": part for name, part in zip(names, bias.split(widths))}
        optional = {
            "self_attn.o_proj.bias": self.output_bias,
            "mlp.down_proj.bias": self.down_bias,
            "self_attn.q_norm.weight": self.q_norm,
            "self_attn.k_norm.weight": self.k_norm,
        }
        return views | {name: tensor for name, tensor in optional.items() if tensor is not None}


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
    """

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, device: torch.device, shard: Shard = WHOLE) -> None:
        super().__init__()
        self.spec = shard.spec(spec)
        self.shard = shard
        self.vocab = shard.piece(0, spec.vocab_size)
        self.embedding = _parameter(self.vocab.count, spec.width, dtype=dtype, device=device)
        self.layers = nn.ModuleList(DecoderLayer(spec, index, dtype, device, shard) for index in range(spec.num_layers))
        self.norm = _parameter(spec.width, dtype=dtype, device=device)
        self.lm_head = (
            self.embedding
            if spec.tie_embeddings
            else _parameter(self.vocab.count, spec.width, dtype=dtype, device=device)
        )
        inv_freq = torch.tensor(spec.inv_freq, dtype=torch.float32, device=device)
        self.rotary = RotaryEmbedding(inv_freq, spec.rope_attention_factor)

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    def forward(
        self, token_ids: Tensor, positions: Tensor, attention: Attention, observe: Observe | None = None
    ) -> Tensor:
        """Hidden states after the final norm.

        Args:
            token_ids: int64 [T], of any number of requests.
            positions: int64 [T], each token's place in its request.
            attention: called once a layer, in order, with the layer's index, q [T, Hq, d], and k and v [T, H, d]
                after rotary; returns [T, Hq, d]. q, k and v are views: the last two axes are contiguous, the step
                from token to token is not `heads * d`.
            observe: called once a layer, before its attention, with the layer's index and [T, width], what q, k and v
                are projections of; it changes nothing.

        Returns:
            [T, width] in the model's dtype.
        """
        hidden = self.shard.embed(token_ids, self.embedding)
        cos, sin = self.rotary(positions)
        delta = None
        for layer in self.layers:
            delta = layer(hidden, delta, cos, sin, attention, observe)
        return self.shard.add_rms_norm(hidden, delta, 1, self.norm, self.spec.rms_norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, width] -> [N, vocab] in the model's dtype."""
        return self.shard.all_tokens(F.linear(hidden, self.lm_head), self.spec.vocab_size)

    def pieces(self) -> dict[str, tuple[Piece, ...]]:
        """Of each parameter that a shard splits, by its name, what it holds of the whole, one after another."""
        pieces = {"embedding": (self.vocab,), "lm_head": (self.vocab,)}
        for layer in self.layers:
            pieces |= {f"layers.{layer.index}.{name}": of_layer for name, of_layer in layer.pieces().items()}
        return pieces

    def weight_pieces(self) -> dict[str, Piece]:
        """Of each tensor of `weight_views` that a shard splits, the piece that is held here."""
        pieces = {"model.embed_tokens.weight": self.vocab, "lm_head.weight": self.vocab}
        for layer in self.layers:
            pieces |= {f"model.layers.{layer.index}.{name}": piece for name, piece in layer.weight_pieces().items()}
        return pieces

    def weight_views(self) -> dict[str, Tensor]:
        """Each tensor of a Hugging Face checkpoint, by its name there, as a view of a parameter.

        Writing all of them sets every element of every parameter once. With tied embeddings there is no
        `lm_head.weight`.
        """
        views = {"model.embed_tokens.weight": self.embedding, "model.norm.weight": self.norm}
        if not self.spec.tie_embeddings:
            views["lm_head.weight"] = self.lm_head
        for layer in self.layers:
            views |= {f"model.layers.{layer.index}.{name}": view for name, view in layer.weight_views().items()}
        return views
