"""Which variables a chat template reads: not what its text says, or what it calls its own."""

import pytest

from zipage.engine.chat_template import template_reads

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
        ({"default": SWITCH, "tool_use": "{{ tools }}"}, "tools", True),
        ({"default": SWITCH, "tool_use": "{{ tools }}"}, "documents", False),
        ("{{ messages", "mood", False),
        ("{{ 'messages }}", "mood", True),
    ],
)
def test_what_is_read(template, variable, expected):
    assert template_reads(template, variable) is expected
