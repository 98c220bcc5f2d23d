"""One question."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fact:
    """Something that a thought must still know late, so that a partial loss shows where the answer is lost.

    Attributes:
        line: how the line of the thought begins that needs it.
        text: stands in that line, as words of its own, where the fact was known.
        stated: where it was last stated before, in characters of the prompt's question and the solution behind it.
        needed: where it is needed, likewise; `needed - stated` is the distance of the recall.
    """

    line: str
    text: str
    stated: int
    needed: int

    @property
    def distance(self) -> int:
        return self.needed - self.stated

    def known(self, thought: str) -> bool:
        """Whether a line of `thought` that begins with `line` holds `text` as words of its own."""
        wanted = f" {self.text} "
        return any(line.startswith(self.line) and wanted in f" {line} " for line in thought.splitlines())


@dataclass(frozen=True)
class Problem:
    """A question and the answer that counts as right.

    Attributes:
        id: names it within its workload.
        question: its text, without any instruction.
        gold: the right answer.
        kind: of a generated problem, or its part of a mix.
        history: earlier turns, each what was asked and what was answered.
        follow_ups: what the user says in each later turn, once the one before is answered.
        prompt_tokens: where given, the prompt is this many of the question's first tokens, without template.
        pieces: where given, the prompt is put together of them in place of the question: texts, and how many of the
            first tokens of each. Prompts that begin with the same pieces share their tokens.
        output_tokens: where given, takes the place of `sampling.max_tokens`.
        solution: the whole thought that leads to the gold, where the generator knows it.
        worked: a worked solution, where the data set has one, in its own words.
        difficulty: what the generator was asked for, in words.
        facts: what the solution needs late.
        error: why it can't be asked; None where it can.
    """

    id: str
    question: str
    gold: str
    kind: str | None = None
    history: tuple[tuple[str, str], ...] = ()
    follow_ups: tuple[str, ...] = ()
    prompt_tokens: int | None = None
    pieces: tuple[tuple[str, int], ...] = ()
    output_tokens: int | None = None
    solution: str | None = None
    worked: str | None = None
    difficulty: str | None = None
    facts: tuple[Fact, ...] = ()
    error: str | None = None

    @property
    def expected_tokens(self) -> int | None:
        """Length of the solution in characters, which are the tokens of a character-level model."""
        return None if self.solution is None else len(self.solution)
