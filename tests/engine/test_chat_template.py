"""Which variables a chat template reads: not what its text says, or what it calls its own."""

from types import SimpleNamespace

import pytest

from zipage.engine.chat_template import chosen_template, template_reads

SWITCH = """{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content }}{% endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
"""As Qwen3's."""
LEVELS = """{%- macro system() -%}
    {%- if reasoning_effort is not defined %}{%- set reasoning_effort = "medium" %}{%- endif %}
    {{- "Reasoning: " + reasoning_effort }}
{%- endmacro -%}
{{ system() }}{% generation %}{{ messages }}{% endgeneration %}{# thinking_budget #}"""
"""As gpt-oss's."""


@pytest.mark.parametrize(
    ("template", "variable", "expected"),
    [
        (SWITCH, "enable_thinking", True),
        (SWITCH, "add_generation_prompt", True),
        (SWITCH, "reasoning_effort", False),
        (SWITCH, "assistant", False),
        (SWITCH, "think", False),
        (SWITCH, "content", False),
        (SWITCH, "enable", False),
        (LEVELS, "reasoning_effort", True),
        (LEVELS, "thinking_budget", False),
        (LEVELS, "Reasoning", False),
        ("Reasoning: reasoning_effort", "reasoning_effort", False),
        ("{{ tools . function }}", "function", False),
        ("{{ x['mood'] }}", "mood", False),
        ("{%- if mood-%}{%- endif -%}", "mood", True),
        ("{% set mood = 'calm' %}{{ mood }}", "mood", False),
        ("{% set mood = mood or 'calm' %}{{ mood }}", "mood", True),
        (SWITCH, "message", False),
        (SWITCH, "if", False),
        (SWITCH, "defined", False),
        ("{% set seen = namespace(mood=false) %}{{ seen.mood }}", "mood", False),
        ("{{ messages | trim }}", "trim", False),
        ("{% macro say(mood) %}{{ mood }}{% endmacro %}{{ say(mood=tone) }}", "mood", False),
        ("{% macro say(mood) %}{{ mood }}{% endmacro %}{{ say(mood=tone) }}", "tone", True),
        ("{% for m in messages %}{% if mood %}{% break %}{% endif %}{% endfor %}", "mood", True),
        ("{% for m in messages %}{% if mood %}{% break %}{% endif %}{% endfor %}", "tone", False),
        ("{% generation %}{{ mood }}{% endgeneration %}", "mood", True),
        ("{% generation %}{{ mood }}{% endgeneration %}", "endgeneration", False),
        ("{{ " + "(" * 5000 + "mood" + ")" * 5000 + " }}", "mood", True),
        ("{{ 7 ** 7 ** 77 }}{{ mood }}", "mood", True),
        ("{% if 'a' * 9999999999999 %}{{ mood }}{% endif %}", "tone", False),
        ("{{ 'a' | center(9999999999999) }}", "tone", False),
        ("{{ messages", "mood", True),
        ("{{ 'messages }}", "mood", True),
    ],
)
def test_what_is_read(template, variable, expected):
    assert template_reads(template, variable) is expected


@pytest.mark.parametrize(
    ("given", "own", "expected"),
    [
        (None, None, None),
        (None, SWITCH, SWITCH),
        (LEVELS, SWITCH, LEVELS),
        (None, {"default": SWITCH, "rag": LEVELS}, SWITCH),
        ("rag", {"default": SWITCH, "rag": LEVELS}, LEVELS),
        ("{{ messages }}", {"default": SWITCH, "rag": LEVELS}, "{{ messages }}"),
        (None, {"rag": LEVELS}, None),
    ],
)
def test_which_template_is_taken(given, own, expected):
    assert chosen_template(given, SimpleNamespace(chat_template=own)) == expected
    assert chosen_template(given, None) == given
