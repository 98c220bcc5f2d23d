"""The least time that a step can take, and the entries that it must read."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.errors import UsageError
from zipage import EventStats, RequestOutput, StepStats

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class ModelShape:
    """What a model makes a step read and multiply, on one of the ranks over which it is spread.

    Attributes:
        weight_bytes: of all matrices that a step of one token reads, of experts those that it is sent to. An input
            embedding is looked up, not read, unless it is the output's too.
        kv_bytes: of one token's K and V in all layers.
        read_bytes: of those in layers without a window: of the others a step reads no more than windows.
        token_flops: operations of one token in the layers' matrices.
        vocab_size: tokens.
        expert_bytes: of one expert in all layers that have any.
        num_experts, active_experts: of a layer and of a token; 0: there are none.
    """

    weight_bytes: int
    kv_bytes: int
    read_bytes: int
    token_flops: int
    vocab_size: int
    expert_bytes: int = 0
    num_experts: int = 0
    active_experts: int = 0

    @classmethod
    def read(cls, folder: Path, dtype: str, device: str, ranks: int = 1) -> ModelShape:
        """From a folder's `config.json`.

        Args:
            dtype: as `EngineConfig.dtype`; "auto" is the config's on CUDA and float32 on a CPU.
            device: "cpu" or another.
            ranks: GPUs that share the model. What they tell each other counts as nothing.

        Raises:
            UsageError: there is no such file, or it lacks a size.
        """
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            hidden, heads = config["hidden_size"], config["num_attention_heads"]
            head_dim = config.get("head_dim") or hidden // heads
            kv_heads = config.get("num_key_value_heads") or heads
            attention = 2 * hidden * (heads + kv_heads) * head_dim
            layers = config["num_hidden_layers"] * attention + hidden * _mlp_rows(config)
            vocab = config["vocab_size"]
        except (OSError, ValueError, KeyError) as error:
            raise UsageError(f"model.path={folder}: a benchmark needs a config.json with the model's sizes") from error
        if dtype == "auto":
            named = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
            dtype = "float32" if device == "cpu" else named
        size = DTYPE_BYTES[dtype]
        layer_bytes, depth = 2 * max(1, kv_heads // ranks) * head_dim * size, config["num_hidden_layers"]
        read_bytes = (depth - len(sliding_layers(config))) * layer_bytes
        weight_bytes = (layers + vocab * hidden) * size // ranks
        shape = cls(weight_bytes, depth * layer_bytes, read_bytes, 2 * layers // ranks, vocab)
        if not _num_experts(config):
            return shape
        return replace(
            shape,
            expert_bytes=hidden * _sparse_layers(config) * _expert_rows(config) * size // ranks,
            num_experts=_num_experts(config),
            active_experts=config["num_experts_per_tok"],
        )

    def touched_experts(self, tokens: float) -> float:
        """Experts of a layer that so many tokens are sent to, on average, if all experts are as likely."""
        return self.num_experts * (1 - (1 - self.active_experts / self.num_experts) ** tokens)

    def read_weights(self, tokens: float) -> float:
        """Bytes of the matrices that a step of so many tokens reads."""
        if not self.num_experts:
            return self.weight_bytes
        return self.weight_bytes + (self.touched_experts(tokens) - self.active_experts) * self.expert_bytes

    @property
    def held_weights(self) -> int:
        """Bytes of all matrices, each expert's too."""
        return self.weight_bytes + (self.num_experts - self.active_experts) * self.expert_bytes


def sliding_layers(config: dict[str, Any]) -> list[int]:
    """Layers that a `config.json` gives a window of their own, by `layer_types` or as transformers fills them in."""
    types = config.get("layer_types")
    if types is not None:
        return [i for i, kind in enumerate(types) if kind == "sliding_attention"]
    periods = {"gemma3_text": config.get("sliding_window_pattern", 6), "gpt_oss": 2}
    period = periods.get(config.get("model_type"))
    return [] if period is None else [i for i in range(config.get("num_hidden_layers", 0)) if (i + 1) % period]


def _num_experts(config: dict[str, Any]) -> int:
    return config.get("num_experts") or config.get("num_local_experts") or 0


def _sparse_layers(config: dict[str, Any]) -> int:
    """Layers that have experts."""
    only, step = config.get("mlp_only_layers") or [], config.get("decoder_sparse_step") or 1
    return sum(layer not in only and (layer + 1) % step == 0 for layer in range(config["num_hidden_layers"]))


def _expert_rows(config: dict[str, Any]) -> int:
    """Rows of hidden size in the three matrices of an expert."""
    return 3 * (config.get("moe_intermediate_size") or config["intermediate_size"])


def _mlp_rows(config: dict[str, Any]) -> int:
    """Rows of hidden size in the MLPs of all layers, of experts in those of one token."""
    layers, plain = config["num_hidden_layers"], 3 * config["intermediate_size"]
    if not _num_experts(config):
        return layers * plain
    shared = 3 * (config.get("shared_expert_intermediate_size") or 0)
    sparse = _num_experts(config) + config["num_experts_per_tok"] * _expert_rows(config) + shared
    return (layers - _sparse_layers(config)) * plain + _sparse_layers(config) * sparse


def step_floor(
    shape: ModelShape, entries: float, tokens: float, prefill_tokens: float, bandwidth: float, flops_per_second: float
) -> float:
    """The least seconds of a step: (weights + entries x bytes of one) / bandwidth + prefill arithmetic / matmul rate.

    The arithmetic of decodes hides behind the bytes; attention within a prompt and all host time count as nothing.

    Args:
        entries: of all requests that the step reads.
        tokens: of the step, of decodes and of prompts: the experts that it reads depend on them.
        prefill_tokens: those of prompts.
        bandwidth: measured bytes a second.
        flops_per_second: measured.
    """
    return step_bytes(shape, entries, tokens) / bandwidth + prefill_tokens * shape.token_flops / flops_per_second


def step_bytes(shape: ModelShape, entries: float, tokens: float) -> float:
    """The least bytes that a step of so many tokens reads: its weights, and `entries` of K and V."""
    return shape.read_weights(tokens) + entries * shape.read_bytes


class EntriesRead:
    """Follows the entries that running requests hold, from what an engine tells.

    Attributes:
        entries: of each step, those that it reads: the part of all held that its batch is of all running, on all
            replicas.
    """

    def __init__(self, most: float | None = None) -> None:
        """`most`: entries that the pools hold. It bounds engines that don't report preemptions; None: no bound."""
        self.entries: list[float] = []
        self._most, self._held = float("inf") if most is None else most, 0
        self._running: dict[int, int] = {}
        """On each replica, by its last step."""
        self._evicted: Counter[str] = Counter()

    def step(self, step: StepStats) -> None:
        self._held += step.prefill_tokens + step.num_decode
        batch = step.num_decode + step.num_prefill
        self._running[step.replica] = max(step.num_running, batch)
        share = batch / max(sum(self._running.values()), 1)
        self.entries.append(min(max(self._held, 0), self._most) * share)

    def event(self, event: EventStats) -> None:
        if event.kind == "compress":
            gone = event.entries_before - event.entries_after
            self._evicted[event.request_id] += gone
            self._held -= gone
        elif event.kind == "resume":
            self._held += event.entries_before
        else:
            self._held -= event.entries_before

    def finished(self, output: RequestOutput) -> None:
        """The last token of an answer was never an input, so it has no entry."""
        metrics = output.metrics
        held = metrics.prompt_tokens - metrics.cached_tokens + metrics.output_tokens - 1
        self._held -= held - self._evicted.pop(output.request_id, 0)
