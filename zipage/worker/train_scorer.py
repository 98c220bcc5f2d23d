"""A linear scorer of entries, trained in closed form on what full KV attends to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

from zipage.checks import shown
from zipage.eviction.calibration import write_calibration
from zipage.models.decoder import Decoder
from zipage.models.loading.identity import model_identity
from zipage.transfer import to_device
from zipage.worker.calibrate import load_to_calibrate
from zipage.worker.entry_targets import entry_targets
from zipage.worker.ridge import RidgeSums

KIND = "kvzap"
TARGETS = ("repeat", "future")
HORIZON = 512
"""Queries of an answer that `future` looks ahead."""
HELD_OUT = 10
"""Of so many texts one is held out."""

Add = Callable[[int, Tensor, Tensor], None]
"""Takes a layer's index, inputs [n, width] and targets [n, H]."""


@torch.inference_mode()
def train_scorer(
    model: str | PathLike[str],
    texts: Sequence[tuple[Sequence[int], int]],
    out: str | PathLike[str],
    *,
    target: Literal["repeat", "future"] = "repeat",
    separator: Sequence[int] = (),
    ridge: float = 1.0,
    source: Mapping[str, Any],
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    load_format: str = "auto",
    use_tqdm: bool = False,
) -> list[float]:
    """Write a scorer of new entries for policy `kvzap`: ridge regression, in each layer, of the targets of its KV heads
    (`entry_targets`) on the input of its attention.

    Args:
        model, device, dtype, load_format: as `LLM`.
        texts: token ids of each, and how many of them are its prompt. Every tenth is held out.
        out: the file.
        target: "repeat": the model reads the text, the separator and the text again, and the queries of the second copy
            count. "future": it reads the text once, and of each entry the next 512 queries of the answer count.
        separator: token ids.
        ridge: penalty on squared weights, above 0.
        source: what the texts are, for the file's header.
        seed: of dummy weights.
        use_tqdm: show a progress bar.

    Returns:
        R^2 on the texts held out, of each layer, mean over its KV heads.

    Raises:
        FileNotFoundError, ValueError: as `LLM`; an option is out of range; too few texts.
    """
    if target not in TARGETS:
        raise ValueError(f"target={shown(target)}: must be one of {', '.join(TARGETS)}")
    if not ridge > 0:
        raise ValueError(f"ridge={shown(ridge)}: must be above 0")
    if len(texts) < HELD_OUT:
        raise ValueError(f"{len(texts)} texts: give at least {HELD_OUT}, of which one is held out")
    drawn = {"load_format": load_format, "seed": seed}

    decoder = load_to_calibrate(model, KIND, dtype=dtype, device=device, **drawn).decoder
    spec = decoder.spec
    sums = [RidgeSums(spec.num_layers, spec.width, spec.num_kv_heads, decoder.device) for _ in range(2)]
    bar = tqdm(texts, desc="reading", unit=" texts", disable=not use_tqdm, dynamic_ncols=True)
    for number, (token_ids, prompt_len) in enumerate(bar):
        into = sums[number % HELD_OUT == HELD_OUT - 1]
        read(decoder, token_ids, prompt_len, target, separator, into.add)
    trained_on, held_out = sums
    if not min(trained_on.counts[0], held_out.counts[0]):
        raise ValueError(f"{len(texts)} texts: none to train on, or none held out, has an entry with queries behind it")
    weight, bias = trained_on.solve(ridge)
    r2 = held_out.r2(weight, bias).mean(dim=1).tolist()
    told = {**source, "target": target, "ridge": ridge, "entries": int(trained_on.counts[0]), "held_out_r2": r2}
    arrays = {"weight": weight, "bias": bias}
    write_calibration(Path(out), KIND, arrays, model_identity(str(model), **drawn), told | {"seed": seed})
    return r2


def read(
    decoder: Decoder, token_ids: Sequence[int], prompt_len: int, target: str, separator: Sequence[int], add: Add
) -> None:
    """One text, cut to the model's positions: what the scorer of each layer sees, and what it shall say."""
    room = decoder.spec.max_position
    if target == "repeat":
        text = list(token_ids[: (room - len(separator)) // 2])
        tokens, num_entries = [*text, *separator, *text], len(text)
        first = torch.full((num_entries,), len(text) + len(separator))
        last = torch.full((num_entries,), len(tokens))
    else:
        tokens = list(token_ids[:room])
        num_entries = len(tokens) - 1 if prompt_len < len(tokens) else 0
        first = (torch.arange(num_entries) + 1).clamp_min(prompt_len)
        last = (first + HORIZON).clamp_max(len(tokens))
    if num_entries < 1:
        return
    inputs: list[Tensor] = []
    ends = first.to(decoder.device), last.to(decoder.device)

    def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hidden, scale = inputs.pop(), decoder.spec.attention[layer].scale
        y = entry_targets(q, k, v, hidden, decoder.attending[layer].output_weight, scale, *ends)
        add(layer, hidden[:num_entries], y)
        heads = (x.transpose(0, 1)[None] for x in (q, k, v))
        return scaled_dot_product_attention(*heads, is_causal=True, scale=scale, enable_gqa=True)[0].transpose(0, 1)

    positions = torch.arange(len(tokens), device=decoder.device)
    ids = to_device(tokens, decoder.device, np.int64)
    decoder(ids, positions, attention, lambda _, hidden: inputs.append(hidden))
