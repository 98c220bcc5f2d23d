"""A calibration file from teacher-forced passes of full KV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

from zipage.checks import closest
from zipage.eviction.calibration import write_calibration
from zipage.eviction.query_statistics import STATISTICS, Heads, QueryStatistics
from zipage.models.attention import refuse_forms
from zipage.models.decoder import Decoder
from zipage.models.loading.identity import model_identity
from zipage.models.loading.loader import LoadedModel
from zipage.models.loading.share import obtain_model
from zipage.models.spec import ModelSpec
from zipage.transfer import to_device

SKIPPED = 4
"""Leading tokens of a sequence that no statistics count: attention sinks, whose queries are unlike all others."""


@torch.inference_mode()
def calibrate(
    model: str | PathLike[str],
    sequences: Sequence[Sequence[int]],
    out: str | PathLike[str],
    *,
    kind: str,
    source: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    load_format: str = "auto",
    use_tqdm: bool = False,
) -> Path:
    """Write the calibration file of a model: statistics of its queries over texts, which full KV reads.

    Args:
        model, device, dtype, load_format: as `LLM`.
        sequences: token ids of each text; its first 4 tokens are left out of the statistics.
        out: the file.
        kind: of policy that reads it.
        source: what the texts are, for the file's header.
        options: of the kind; `expected_attention` takes `full` (True), whether the whole covariance is stored.
        seed: of what is drawn, and of dummy weights.
        use_tqdm: show a progress bar.

    Raises:
        FileNotFoundError, ValueError: as `LLM`; an unknown kind; no token to count.
    """
    if kind not in STATISTICS:
        close = closest(kind, STATISTICS)
        raise ValueError(
            f"kind={kind!r}: must be one of {', '.join(STATISTICS)}" + f"; did you mean {close!r}?" * bool(close)
        )
    drawn = {"load_format": load_format, "seed": seed}
    loaded = load_to_calibrate(model, kind, dtype=dtype, device=device, **drawn)
    spec = loaded.spec
    num_tokens = sum(max(0, len(sequence) - SKIPPED) for sequence in sequences)
    if num_tokens < 1:
        raise ValueError(f"{len(sequences)} sequences: none has a token beyond its first {SKIPPED}")
    heads = Heads(spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim)
    statistics = STATISTICS[kind](heads, num_tokens, seed, loaded.decoder.device, **options or {})
    first = 0
    for sequence in tqdm(sequences, desc="reading", unit=" texts", disable=not use_tqdm, dynamic_ncols=True):
        read(loaded.decoder, sequence, statistics, first)
        first += max(0, len(sequence) - SKIPPED)
    path = Path(out)
    told = {**source, "tokens": num_tokens, "seed": seed}
    write_calibration(path, kind, statistics.arrays(), model_identity(str(model), **drawn), told)
    return path


def load_to_calibrate(model: str | PathLike[str], kind: str, **options: Any) -> LoadedModel:
    """A model whose queries, keys and values a calibration or a scorer can be made of; `options` as `LLM`'s. Within
    `share_model` it stays loaded.

    Raises:
        FileNotFoundError, ValueError: as `LLM`; its attention has windows, caps or sinks, or it has recurrent layers.
    """

    def check(spec: ModelSpec) -> None:
        refuse_forms(spec.attention, f"calibration of {kind}", "calibrate another model")
        spec.refuse_hybrids(f"calibration of {kind}", "calibrate another model")

    return obtain_model(str(model), check=check, **options)


def read(decoder: Decoder, token_ids: Sequence[int], statistics: QueryStatistics, first: int) -> None:
    """One text through the model, its queries into the statistics as tokens first, first + 1 ..."""
    if len(token_ids) <= SKIPPED:
        return
    positions = torch.arange(len(token_ids), device=decoder.device)
    angles = positions[SKIPPED:, None, None].float() * decoder.rotary.inv_freq
    turn = torch.polar(torch.full_like(angles, 1 / decoder.rotary.attention_factor).double(), -angles.double())

    def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        after = q[SKIPPED:].double()
        real, imaginary = after.chunk(2, dim=-1)
        before = torch.complex(real, imaginary) * turn
        statistics.add(layer, first, torch.cat((before.real, before.imag), dim=-1), after)
        heads = (x.transpose(0, 1)[None] for x in (q, k, v))
        scale = decoder.spec.attention[layer].scale
        return scaled_dot_product_attention(*heads, is_causal=True, scale=scale, enable_gqa=True)[0].transpose(0, 1)

    decoder(to_device(token_ids, decoder.device, np.int64), positions, attention)
