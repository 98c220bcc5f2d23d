"""Batches of whole documents, packed end to end without padding in between, made as they are asked for."""

from __future__ import annotations

from random import Random

import numpy as np
import torch
from torch.utils.data import Dataset

from experiments.reasoner.curriculum import training_problem
from experiments.reasoner.tokenizer import ASSISTANT, END, PAD, USER, VOCABULARY, encode
from experiments.workloads.problem import Problem

IGNORED = -100
"""Label of a position that is not trained on."""

Batch = dict[str, torch.Tensor]


def to_document(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int16 [tokens] of a whole conversation, and its labels int16: the next token where an answer goes on.

    What the user says is read, not learned.
    """
    ids, labels = [], []
    for question, answer in (*problem.history, (problem.question, problem.solution)):
        asked = np.concatenate(([VOCABULARY[USER]], encode(question)))
        answered = np.concatenate((encode(answer), [VOCABULARY[END]]))
        ids += [asked, [VOCABULARY[ASSISTANT]], answered]
        labels += [np.full(len(asked), IGNORED), answered, [IGNORED]]
    return np.concatenate(ids).astype(np.int16), np.concatenate(labels).astype(np.int16)


def pack(documents: list[tuple[np.ndarray, np.ndarray]], tokens: int, slots: int) -> Batch:
    """One batch.

    Args:
        documents: as of `to_document`; together at most `tokens` long and fewer than `slots`.

    Returns:
        input_ids, labels, position_ids: int64 [1, tokens]; positions begin anew with every document, and what is left
        over is one document of padding. cu_seq_lens: int32 [slots + 1], the bounds of the documents; unused slots are
        empty.
    """
    ids = np.full(tokens, VOCABULARY[PAD], dtype=np.int64)
    labels = np.full(tokens, IGNORED, dtype=np.int64)
    bounds = np.full(slots + 1, tokens, dtype=np.int32)
    end = 0
    for number, (document, targets) in enumerate(documents):
        bounds[number] = end
        ids[end : end + len(document)], labels[end : end + len(document)] = document, targets
        end += len(document)
    bounds[len(documents)] = end
    positions = np.arange(tokens) - np.repeat(bounds[:-1], np.diff(bounds))
    wide = {"input_ids": ids, "labels": labels, "position_ids": positions.astype(np.int64)}
    return {name: torch.from_numpy(array)[None] for name, array in wide.items()} | {
        "cu_seq_lens": torch.from_numpy(bounds)
    }


class PackedBatches(Dataset):
    """The batches of a training run: number and seed decide each, whatever process makes it.

    Args:
        batches: number of them.
        tokens: of one batch.
        slots: the most documents in one, and one more for the padding.
        seed: of the problems.
    """

    def __init__(self, batches: int, tokens: int, slots: int, seed: int) -> None:
        self._batches, self._tokens, self._slots, self._seed = batches, tokens, slots, seed

    def __len__(self) -> int:
        return self._batches

    def __getitem__(self, index: int) -> Batch:
        random = Random(f"{self._seed}/{index}")
        documents, left, misses = [], self._tokens, 0
        while len(documents) < self._slots - 1 and misses < 8:
            document = to_document(training_problem(random, index / self._batches))
            if len(document[0]) > left:
                misses += 1
                continue
            documents.append(document)
            left -= len(document[0])
        return pack(documents, self._tokens, self._slots)
