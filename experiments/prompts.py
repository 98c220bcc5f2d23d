"""From a question to the tokens that the engine reads."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from experiments.errors import UsageError, one_line
from experiments.schema import ModelConfig, WorkloadConfig
from experiments.workloads import Problem


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt: its text with all of the chat template, and its tokens."""

    text: str
    token_ids: list[int]


class PromptRenderer:
    """Puts questions the way the workload and the model's chat template want them.

    Args:
        workload: its template and system prompt.
        model: its chat template and the template's options.
        tokenizer: of `transformers`.

    Raises:
        UsageError: `model.chat_template` is no template.
    """

    def __init__(self, workload: WorkloadConfig, model: ModelConfig, tokenizer: Any) -> None:
        self._workload = workload
        self._tokenizer = tokenizer
        self._options: Mapping[str, Any] = model.chat_template_options
        self.chat_template = _chat_template(model.chat_template, tokenizer)

    @property
    def chat_template_hash(self) -> str | None:
        """sha256 of the chat template; None where prompts go bare."""
        return None if self.chat_template is None else hashlib.sha256(self.chat_template.encode()).hexdigest()

    def render(self, problem: Problem) -> Prompt:
        """The prompt of one problem, ending where the model's answer begins.

        Raises:
            UsageError: the chat template refuses it, such as for its system prompt.
        """
        if problem.prompt_tokens is not None:
            return Prompt(
                problem.question, list(self._tokenizer(problem.question)["input_ids"])[: problem.prompt_tokens]
            )
        user = self._workload.template.replace("{question}", problem.question)
        system = self._workload.system_prompt
        turns = [text for turn in problem.history for text in turn]
        if self.chat_template is None:
            text = "\n\n".join(([] if system is None else [system]) + [*turns, user])
            return Prompt(text, list(self._tokenizer(text)["input_ids"]))
        roles = itertools.cycle(("user", "assistant"))
        messages = [{"role": role, "content": text} for role, text in zip(roles, [*turns, user])]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        try:
            text = self._tokenizer.apply_chat_template(
                messages, chat_template=self.chat_template, tokenize=False, add_generation_prompt=True, **self._options
            )
        except TemplateError as error:
            what = "" if system is None else "; workload.system_prompt=null leaves the system prompt out"
            raise UsageError(f"the model's chat template refuses the prompt ({one_line(error)}){what}") from error
        # The template writes the special tokens itself.
        return Prompt(text, list(self._tokenizer(text, add_special_tokens=False)["input_ids"]))


def _chat_template(choice: str, tokenizer: Any) -> str | None:
    if choice == "none":
        return None
    if choice == "auto":
        template = tokenizer.chat_template
        # A tokenizer may bring several by name; "default" is the one for plain chat.
        return template.get("default") if isinstance(template, dict) else template
    path = Path(choice).expanduser()
    if not path.is_file():
        raise UsageError(f"model.chat_template={choice}: must be auto, none or a file that exists")
    return path.read_text(encoding="utf-8")
