"""The training of the reasoner."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from experiments.reasoner.network import LONGEST, build_network
from experiments.reasoner.packing import IGNORED, Batch, PackedBatches, pack, to_document
from experiments.reasoner.tokenizer import build_tokenizer
from experiments.records import provenance
from experiments.workloads import chained_arithmetic, fragility, program_trace
from experiments.workloads.problem import Problem

FAMILIES = {
    "chained_arithmetic": chained_arithmetic.generate,
    "program_trace": program_trace.generate,
    "fragility": fragility.generate,
}
HELD_OUT_SEED = 1
RECORD = "training.json"


@dataclass(frozen=True)
class TrainingOptions:
    """How the reasoner is trained.

    Attributes:
        tokens: of the whole training; it decides the number of steps.
        batch_tokens: of one step.
        slots: the most documents in one step.
        learning_rate: the highest, after the warm-up; it falls to 0 on a cosine.
        warmup: steps.
        weight_decay, beta2: of AdamW; beta1 is 0.9.
        clip: the greatest norm of the gradient.
        seed: of the weights and the problems.
        workers: processes that make batches; the batches do not depend on them.
        evaluate_every: steps between two evaluations.
        held_out: problems of each family in an evaluation.
    """

    tokens: int = 320_000_000
    batch_tokens: int = 32_768
    slots: int = 96
    learning_rate: float = 2e-3
    warmup: int = 200
    weight_decay: float = 0.01
    beta2: float = 0.98
    clip: float = 1.0
    seed: int = 0
    workers: int = 12
    evaluate_every: int = 1000
    held_out: int = 64

    def __post_init__(self) -> None:
        for name in ("tokens", "batch_tokens", "learning_rate", "clip", "evaluate_every", "held_out"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be above 0")
        for name in ("warmup", "weight_decay", "workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 0")
        if self.batch_tokens < LONGEST:
            raise ValueError(f"batch_tokens={self.batch_tokens}: must hold the longest document, {LONGEST} tokens")
        if self.slots < 2:
            raise ValueError(f"slots={self.slots}: must be at least 2")

    @property
    def steps(self) -> int:
        return math.ceil(self.tokens / self.batch_tokens)

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def train(options: TrainingOptions, out: Path, device: str) -> dict:
    """Train, and save the model with its tokenizer and the record of its training as the folder `out`.

    On CUDA: bfloat16 arithmetic with float32 master weights, compiled. Elsewhere: float32.

    Returns:
        The record: options, provenance, curve (one row an evaluation: step, tokens, seconds, loss in nats a token, and
        for each family the share of held-out solutions whose every token is the most likely one).
    """
    out.mkdir(parents=True, exist_ok=True)
    network = build_network(options.seed).to(device)
    optimizer = torch.optim.AdamW(
        _groups(network, options.weight_decay),
        lr=options.learning_rate,
        betas=(0.9, options.beta2),
        fused=device == "cuda",
    )
    predict = _predictor(network, device)
    held_out = {name: list(_packed_held_out(name, options)) for name in FAMILIES}
    started, begin = provenance.now(), time.perf_counter()
    curve, losses = [], []
    for step, batch in enumerate(_batches(options)):
        batch = _to(batch, device)
        for group in optimizer.param_groups:
            group["lr"] = options.rate(step)
        loss = cross_entropy(predict(batch).float(), batch["labels"][0], ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), options.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        if (step + 1) % options.evaluate_every == 0 or step + 1 == options.steps:
            exact = {name: _exact(predict, batches, device) for name, batches in held_out.items()}
            mean = torch.stack(losses).mean().item()
            if not math.isfinite(mean):
                raise FloatingPointError(f"the loss is {mean} at step {step + 1}: lower learning_rate")
            seconds = time.perf_counter() - begin
            curve.append(
                {"step": step + 1, "tokens": (step + 1) * options.batch_tokens, "seconds": seconds, "loss": mean}
                | exact
            )
            losses.clear()
            shares = "  ".join(f"{name} {share:.1%}" for name, share in exact.items())
            print(f"step {step + 1}/{options.steps}  {seconds:.0f} s  loss {mean:.5f}  {shares}", flush=True)
    record = {
        "options": asdict(options),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "provenance": provenance.collect() | {"started": started, "ended": provenance.now()},
        "curve": curve,
    }
    _save(network, out)
    (out / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def _batches(options: TrainingOptions) -> DataLoader:
    data = PackedBatches(options.steps, options.batch_tokens, options.slots, options.seed)
    more = {"prefetch_factor": 8} if options.workers else {}
    pin = torch.cuda.is_available()
    return DataLoader(data, batch_size=None, shuffle=False, num_workers=options.workers, pin_memory=pin, **more)


def _groups(network: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Matrices decay, norms do not."""
    parameters = list(network.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def _predictor(network: torch.nn.Module, device: str):
    """A function from a batch to logits [tokens, vocabulary]."""
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
        for layer in network.model.layers:  # one compilation serves all layers
            layer.compile(dynamic=False, fullgraph=True)

    def predict(batch: Batch) -> torch.Tensor:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            inputs = {name: batch[name] for name in ("input_ids", "position_ids", "cu_seq_lens")}
            return network(**inputs).logits[0]

    return predict


def _packed_held_out(family: str, options: TrainingOptions) -> Iterator[tuple[Batch, int]]:
    """Batches of held-out problems at the default difficulty, with the number of problems in each."""
    documents, left = [], options.batch_tokens
    for problem in held_out_problems(family, options.held_out):
        document = to_document(problem)
        if len(document[0]) > left or len(documents) == options.slots - 1:
            yield pack(documents, options.batch_tokens, options.slots), len(documents)
            documents, left = [], options.batch_tokens
        documents.append(document)
        left -= len(document[0])
    yield pack(documents, options.batch_tokens, options.slots), len(documents)


def held_out_problems(family: str, count: int) -> Iterator[Problem]:
    """The problems of a family that evaluations of a training ask; none is ever trained on (see `splits`)."""
    return FAMILIES[family](seed=HELD_OUT_SEED, count=count)


@torch.no_grad()
def _exact(predict, batches: list[tuple[Batch, int]], device: str) -> float:
    """Share of the documents whose every labelled token is the most likely one: greedy decoding gets them right."""
    right = total = 0
    for batch, count in batches:
        batch = _to(batch, device)
        labels = batch["labels"][0]
        wrong = (predict(batch).argmax(-1) != labels) & (labels != IGNORED)
        before = torch.cat([wrong.new_zeros(1, dtype=torch.long), wrong.long().cumsum(0)])
        bounds = batch["cu_seq_lens"].long()[: count + 1]
        right += int((before[bounds[1:]] == before[bounds[:-1]]).sum())
        total += count
    return right / total


def _to(batch: Batch, device: str) -> Batch:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def _save(network: torch.nn.Module, out: Path) -> None:
    """bfloat16 safetensors with config and tokenizer, as any folder of `transformers`."""
    network = network.to(torch.bfloat16)
    network.config.dtype = torch.bfloat16
    network.config.use_cache = network.generation_config.use_cache = True
    network.save_pretrained(out)
    build_tokenizer(LONGEST).save_pretrained(out)
