"""Documents that the reasoner is trained on, and the batches they are packed into."""

# ruff: noqa: F811

from __future__ import annotations

from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch.utils.data import DataLoader

from experiments.reasoner import training
from experiments.reasoner.packing import IGNORED, PackedBatches, pack, to_document
from experiments.reasoner.tokenizer import ASSISTANT, END, PAD, USER, VOCABULARY
from experiments.workloads.problem import Problem
from tests.experiments.reasoner.small_training import (
    documents,
    same,
    tokenizer,  # noqa: F401
)


class TestDocuments:
    def test_is_the_chat_with_the_answer(self, tokenizer):
        for make in training.FAMILIES.values():
            for problem in make(seed=0, count=6):
                turns = [*problem.history, (problem.question, problem.solution)]
                chat = [
                    {"role": role, "content": text}
                    for turn in turns
                    for role, text in zip(("user", "assistant"), turn, strict=True)
                ]
                text = tokenizer.apply_chat_template(chat, tokenize=False)
                ids, _ = to_document(problem)
                assert ids.tolist() == tokenizer(text)["input_ids"]

    def test_labels_are_the_next_tokens_of_answers_alone(self, tokenizer):
        problem = Problem("", "q1?", "2", history=(("first", "one"), ("second", "two")), solution="Answer: 2")
        ids, labels = to_document(problem)
        assert len(ids) == len(labels)
        learned = labels != IGNORED
        assert (labels[:-1][learned[:-1]] == ids[1:][learned[:-1]]).all()
        assert tokenizer.decode(labels[learned]) == "one<|end|>two<|end|>Answer: 2<|end|>"
        assert labels[-1] == IGNORED
        # The assistant's mark is where an answer begins.
        assert all(learned[place] for place in np.flatnonzero(ids == VOCABULARY[ASSISTANT]))
        assert not any(learned[place] for place in np.flatnonzero(ids == VOCABULARY[USER]))
        assert not any(learned[place] for place in np.flatnonzero(ids == VOCABULARY[END]))


class TestPacking:
    def test_layout(self):
        three = documents(3)
        lengths = [len(ids) for ids, _ in three]
        tokens = sum(lengths) + 37
        batch = pack(three, tokens, 6)
        ends = np.cumsum(lengths).tolist()
        assert batch["cu_seq_lens"].tolist() == [0, *ends, tokens, tokens, tokens]
        assert batch["cu_seq_lens"].dtype == torch.int32
        for name in ("input_ids", "labels", "position_ids"):
            assert batch[name].shape == (1, tokens)
            assert batch[name].dtype == torch.int64
        for (ids, labels), end in zip(three, ends, strict=True):
            place = slice(end - len(ids), end)
            assert batch["input_ids"][0, place].tolist() == ids.tolist()
            assert batch["labels"][0, place].tolist() == labels.tolist()
            assert batch["position_ids"][0, place].tolist() == list(range(len(ids)))
        assert (batch["input_ids"][0, ends[-1] :] == VOCABULARY[PAD]).all()
        assert (batch["labels"][0, ends[-1] :] == IGNORED).all()
        assert batch["position_ids"][0, ends[-1] :].tolist() == list(range(37))

    def test_a_full_batch_has_no_padding(self):
        two = documents(2)
        tokens = sum(len(ids) for ids, _ in two)
        batch = pack(two, tokens, 3)
        assert batch["cu_seq_lens"].tolist() == [0, len(two[0][0]), tokens, tokens]
        assert VOCABULARY[PAD] not in batch["input_ids"]

    def test_batches_hold_whole_documents(self):
        tokens, slots = 12_000, 9
        data = PackedBatches(4, tokens, slots, seed=3)
        assert len(data) == 4
        for index in range(4):
            batch = data[index]
            ids, bounds = batch["input_ids"][0], batch["cu_seq_lens"].tolist()
            assert bounds == sorted(bounds)
            assert len(bounds) == slots + 1
            kinds = [ids[begin:end] for begin, end in pairwise(bounds) if end > begin]
            *whole, last = kinds if ids[-1] == VOCABULARY[PAD] else [*kinds, None]
            assert 0 < len(whole) <= slots - 1
            for document in whole:
                assert document[0] == VOCABULARY[USER]
                assert document[-1] == VOCABULARY[END]
                assert VOCABULARY[PAD] not in document
            assert last is None or (last == VOCABULARY[PAD]).all()

    def test_seed_and_number_decide(self):
        first, again = PackedBatches(3, 9216, 8, seed=1), PackedBatches(3, 9216, 8, seed=1)
        other = PackedBatches(3, 9216, 8, seed=2)
        for index in (2, 0):
            assert same(first[index], again[index])
            assert not same(first[index], other[index])
        assert not same(first[0], first[1])

    def test_workers_do_not_matter(self):
        data = PackedBatches(4, 9216, 8, seed=1)
        load = partial(DataLoader, data, batch_size=None, shuffle=False)
        for alone, shared in zip(load(num_workers=0), load(num_workers=2), strict=True):
            assert same(alone, shared)
