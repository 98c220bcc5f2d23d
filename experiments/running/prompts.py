"""From a question to the tokens that the engine reads."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from experiments.config.schema import ModelConfig, WorkloadConfig
from experiments.errors import UsageError, one_line
from experiments.running import bounded
from experiments.workloads import Problem
from zipage import template_reads

LIMITS = {"seconds": 20.0, "mebibytes": 1024, "characters": 1 << 24}
"""Of a chat template, which is a program that comes with a model, for each prompt."""
WITHOUT_SYSTEM = "; workload.system_prompt=null leaves the system prompt out"
MARKER = "ANSWER-STANDS-HERE"
"""An answer, where a template is asked what stands behind one."""


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt.

    Attributes:
        text: all that is asked, with all of the chat template; of a conversation every turn, without the answers.
        token_ids: of the prompt, up to the first answer.
        follow_ups: tokens of each later turn, behind the end token of the answer before it, up to its own answer.
        end_token: that the template ends an answer with; None without follow-ups.
    """

    text: str
    token_ids: list[int]
    follow_ups: list[list[int]] = field(default_factory=list)
    end_token: int | None = None


class PromptRenderer:
    """Puts questions the way the workload and the model's chat template want them.

    Args:
        workload: its template and system prompt.
        model: its chat template and the template's options.
        tokenizer: of `transformers`; None: every prompt is of a given length, and its text's bytes are its tokens.

    Raises:
        UsageError: `model.chat_template` is not a template, or reads no variable of the options' names.
    """

    def __init__(self, workload: WorkloadConfig, model: ModelConfig, tokenizer: Any) -> None:
        self._workload = workload
        self._tokenizer = tokenizer
        self._piece = lru_cache(maxsize=1024)(self._tokens_of_piece)
        self._options: Mapping[str, Any] = model.chat_template_options
        self.chat_template = _chat_template(model.chat_template, tokenizer)
        for name in self._options:
            if self.chat_template is None or not template_reads(self.chat_template, name):
                what = (
                    "there is no chat template"
                    if self.chat_template is None
                    else "the chat template reads no such variable"
                )
                raise UsageError(f"model.chat_template_options.{name}: {what}: leave it out")

    @property
    def chat_template_hash(self) -> str | None:
        """sha256 of the chat template; None where prompts go bare."""
        return None if self.chat_template is None else hashlib.sha256(self.chat_template.encode()).hexdigest()

    def render(self, problem: Problem) -> Prompt:
        """`render_all` of one problem."""
        return self.render_all([problem])[0]

    def render_all(self, problems: Sequence[Problem]) -> list[Prompt]:
        """The prompts of problems, each ending where the model's answer begins.

        The chat template runs in a process of its own, within `LIMITS`.

        Raises:
            UsageError: the chat template refuses a prompt, such as for its system prompt, or exceeds a limit, or a
                conversation needs one and there is none that ends an answer.
        """
        if self.chat_template is None and any(problem.follow_ups for problem in problems):
            raise UsageError(
                "model.chat_template: there is none, but workload.turns needs one that says where an answer ends and "
                "the next turn begins: give model.chat_template=FILE"
            )
        chats = [None if problem.prompt_tokens is not None else self._messages(problem) for problem in problems]
        asked = []
        if self.chat_template is not None:
            for problem, chat in zip(problems, chats, strict=True):
                asked += [] if chat is None else [chat, *map(self._next_turn, problem.follow_ups)]
        try:
            rendered = iter(bounded.texts(self._apply_template, asked, **LIMITS))
        except bounded.Failed as error:
            what = "" if self._workload.system_prompt is None else WITHOUT_SYSTEM
            raise UsageError(f"the model's chat template refuses the prompt ({error}){what}") from error
        except bounded.Exceeded as error:
            raise UsageError(
                f"the model's chat template {error} on a prompt: give another with model.chat_template=FILE, or none"
            ) from error
        return [self._prompt(*pair, rendered) for pair in zip(problems, chats, strict=True)]

    def _messages(self, problem: Problem) -> list[dict[str, str]]:
        user = self._workload.template.replace("{question}", problem.question)
        turns = [text for turn in problem.history for text in turn]
        roles = itertools.cycle(("user", "assistant"))
        messages = [{"role": role, "content": text} for role, text in zip(roles, [*turns, user])]
        return self._with_system(messages)

    def _next_turn(self, text: str) -> list[dict[str, str]]:
        """A chat in which the user says `text` once `MARKER` was answered."""
        turns = (("user", "?"), ("assistant", MARKER), ("user", text))
        return self._with_system([{"role": role, "content": content} for role, content in turns])

    def _with_system(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        system = self._workload.system_prompt
        return messages if system is None else [{"role": "system", "content": system}, *messages]

    def _apply_template(self, messages: list[dict[str, str]]) -> str:
        return self._tokenizer.apply_chat_template(
            messages, chat_template=self.chat_template, tokenize=False, add_generation_prompt=True, **self._options
        )

    def _prompt(self, problem: Problem, chat: list[dict[str, str]] | None, rendered: Iterator[str]) -> Prompt:
        if problem.pieces:
            texts = " ".join(text for text, _ in problem.pieces)
            return Prompt(texts, self._joined(problem.pieces))
        if chat is None:
            text = problem.question
            tokens = text.encode() if self._tokenizer is None else self._tokenizer(text)["input_ids"]
            return Prompt(text, list(tokens)[: problem.prompt_tokens])
        if self.chat_template is None:
            text = "\n\n".join(message["content"] for message in chat)
            return Prompt(text, list(self._tokenizer(text)["input_ids"]))
        text = next(rendered)
        # The template writes the special tokens itself.
        tokens = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        if not problem.follow_ups:
            return Prompt(text, tokens)
        tails = [next(rendered).partition(MARKER)[2] for _ in problem.follow_ups]
        follow_ups = [self._behind_end(tail) for tail in tails]
        return Prompt("".join([text, *tails]), tokens, follow_ups, self._tokenizer.eos_token_id)

    def _joined(self, pieces: Sequence[tuple[str, int]]) -> list[int]:
        """The first tokens of each text, one behind the other; special tokens stand before the first alone."""
        return [token for i, (text, count) in enumerate(pieces) for token in self._piece(text, i == 0)[:count]]

    def _tokens_of_piece(self, text: str, first: bool) -> list[int]:
        if self._tokenizer is None:
            return list(text.encode())
        return list(self._tokenizer(text, add_special_tokens=first)["input_ids"])

    def _behind_end(self, tail: str) -> list[int]:
        """Tokens of what stands behind an answer and its end token, which the model draws itself."""
        tokens = list(self._tokenizer(tail, add_special_tokens=False)["input_ids"])
        end = self._tokenizer.eos_token
        if end is None or len(tokens) < 2 or tokens[0] != self._tokenizer.eos_token_id:
            raise UsageError(
                f"the model's chat template does not write the tokenizer's end token ({end}) and the next turn behind "
                "an answer, as workload.turns needs it: give another with model.chat_template=FILE"
            )
        return tokens[1:]


def _chat_template(choice: str, tokenizer: Any) -> str | None:
    if choice == "none" or tokenizer is None:
        return None
    if choice == "auto":
        template = tokenizer.chat_template
        if isinstance(template, dict):  # several by name; "default" is the one for plain chat
            if "default" not in template:
                raise UsageError(
                    f"the tokenizer's chat templates are called {', '.join(sorted(template))}, and none default: give "
                    "another one with model.chat_template=FILE, or none"
                )
            template = template["default"]
        if template is not None and not isinstance(template, str):
            raise UsageError(
                "the tokenizer's chat template is not text: give another one with model.chat_template=FILE"
            )
        return template
    path = Path(choice).expanduser()
    if not path.is_file():
        raise UsageError(f"model.chat_template={choice}: must be auto, none or a file that exists")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"model.chat_template={choice}: can't be read ({one_line(error)})") from error
