"""Chat templates are programs of others: transformers renders each in its sandbox, here within limits."""

from __future__ import annotations

import copy
import os
import threading
import time

import pytest

from experiments.config.schema import ModelConfig, WorkloadConfig
from experiments.errors import UsageError
from experiments.running import bounded, prompts
from experiments.running.prompts import PromptRenderer
from experiments.workloads import Problem
from tests.tiny_models import save_tiny_tokenizer

PROBLEMS = [Problem(str(number), f"{number}+{number}?", "0") for number in range(3)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def render(tokenizer, tmp_path):
    def render(template: str, **options):
        path = tmp_path / "template.jinja"
        path.write_text(template)
        model = ModelConfig(chat_template=str(path), chat_template_options=options)
        return PromptRenderer(WorkloadConfig(name="any"), model, tokenizer).render_all(PROBLEMS)

    return render


def test_prompts_are_those_of_transformers(tokenizer):
    renderer = PromptRenderer(WorkloadConfig(name="any", system_prompt="Think."), ModelConfig(), tokenizer)
    chats = [
        [{"role": "system", "content": "Think."}, {"role": "user", "content": problem.question}] for problem in PROBLEMS
    ]
    made = renderer.render_all(PROBLEMS)
    assert [prompt.text for prompt in made] == tokenizer.apply_chat_template(
        chats, tokenize=False, add_generation_prompt=True
    )
    assert [prompt.token_ids for prompt in made] == [
        tokenizer(prompt.text, add_special_tokens=False)["input_ids"] for prompt in made
    ]
    assert renderer.render(PROBLEMS[1]) == made[1]
    assert renderer.render_all([]) == []


LOOPS = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
ROWS = "{% for a in range(9999) %}{{ 'a' * 9999 }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "limits", "line"),
    [
        (LOOPS, {"seconds": 0.3}, r"took more than 0\.3 s"),
        ("{{ 7 ** (7 ** 77) }}", {"seconds": 0.3}, r"took more than (0\.3 s|64 MiB)"),
        (
            "{% for a in range(99999) %}{{ 'a' * 9999 }}{% endfor %}",
            {"mebibytes": 64},
            "took more than 64 MiB of memory",
        ),
        ("{{ 'a' * 9999999999 }}", {"mebibytes": 64}, "took more than 64 MiB of memory"),
        ("{{ 'a' * 1001 }}", {"characters": 1000}, "made more than 1,000 characters"),
    ],
)
def test_a_template_beyond_a_limit_is_one_line(render, monkeypatch, template, limits, line):
    monkeypatch.setattr(prompts, "LIMITS", {"seconds": 20.0, "mebibytes": 64, "characters": 1 << 24} | limits)
    begin = time.monotonic()
    with pytest.raises(UsageError, match=f"the model's chat template {line} on a prompt: give another") as caught:
        render(template)
    assert time.monotonic() - begin < 10
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "line"),
    [
        ("{{ raise_exception('no system prompt') }}", "TemplateError: no system prompt"),
        ("{{ messages[5].role.x }}", "UndefinedError"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "RecursionError"),
        ("{{ '{{' * 9999 }}" + "(" * 999, ""),
    ],
)
def test_a_template_that_fails_is_one_line(render, template, line):
    if not line:
        assert render(template)[0].text.endswith("(" * 999)
        return
    with pytest.raises(UsageError, match=rf"the model's chat template refuses the prompt \({line}") as caught:
        render(template)
    assert "\n" not in str(caught.value)


def test_options_of_a_template(render):
    assert render("{{ thinking }}", thinking=False)[0].text == "False"
    with pytest.raises(UsageError, match=r"refuses the prompt .*add_generation_prompt"):
        render("{{ add_generation_prompt }}", add_generation_prompt=True)


def test_options_that_the_template_does_not_read(render, tokenizer):
    with pytest.raises(UsageError) as caught:
        render("{{ messages }} enable_thinking", enable_thinking=False)
    assert str(caught.value) == (
        "model.chat_template_options.enable_thinking: the chat template reads no such variable: leave it out"
    )
    model = ModelConfig(chat_template="none", chat_template_options={"enable_thinking": False})
    for of_text in (tokenizer, None):
        with pytest.raises(UsageError, match=r"options\.enable_thinking: there is no chat template: leave it out"):
            PromptRenderer(WorkloadConfig(name="any"), model, of_text)


def test_a_file_that_is_no_template(tokenizer, tmp_path):
    (tmp_path / "template.jinja").write_bytes(b"\xff\xfe")
    model = ModelConfig(chat_template=str(tmp_path / "template.jinja"))
    with pytest.raises(UsageError, match=r"model\.chat_template=.*: can't be read \(UnicodeDecodeError"):
        PromptRenderer(WorkloadConfig(name="any"), model, tokenizer)


def test_a_child_that_hangs_outlives_nobody():
    read, write = os.pipe()
    limits = {"mebibytes": 64, "characters": 9}

    def hang(_: int) -> str:
        os.write(write, b"%d" % os.getpid())
        while True:
            threading.Event().wait(1)

    with pytest.raises(bounded.Exceeded, match=r"took more than 0\.2 s"):
        bounded.texts(hang, [1], seconds=0.2, **limits)
    with pytest.raises(ProcessLookupError):
        os.kill(int(os.read(read, 20)), 0)
    with pytest.raises(bounded.Exceeded, match=r"ended its process \(exit code 3\)"):
        bounded.texts(lambda _: os._exit(3), [1], seconds=9, **limits)
    assert bounded.texts(str, range(3), seconds=9, **limits) == ["0", "1", "2"]


def test_several_templates_and_none_for_plain_chat(tokenizer):
    several = copy.copy(tokenizer)
    several.chat_template = {"rag": "{{ documents }}", "tool_use": "{{ tools }}"}
    with pytest.raises(UsageError, match=r"templates are called rag, tool_use, and none default: give .*FILE, or none"):
        PromptRenderer(WorkloadConfig(name="any"), ModelConfig(), several)
    several.chat_template |= {"default": "{{ messages[0].content }}!"}
    renderer = PromptRenderer(WorkloadConfig(name="any"), ModelConfig(), several)
    assert renderer.render(PROBLEMS[0]).text == PROBLEMS[0].question + "!"
