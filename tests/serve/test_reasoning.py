"""Thoughts between `<think>` and `</think>`, whole and in pieces."""

import pytest

from tests.serve.running import RunningServer
from zipage import SamplingParams
from zipage.serve.reasoning import Splitter, marks_reasoning

CASES = [
    ("", "", ("", "")),
    ("", "an answer", ("", "an answer")),
    ("", "<think>\na thought\n</think>\n\nan answer", ("a thought\n", "an answer")),
    ("", "\n<think>a</think>b</think>c", ("a", "b</think>c")),
    ("", "<think>no end </thin", ("no end </thin", "")),
    ("", "<thin ice", ("", "<thin ice")),
    ("", "<thi", ("", "<thi")),
    ("", "say <think> aloud", ("", "say <think> aloud")),
    ("<think>\n", "a thought</think>an answer", ("a thought", "an answer")),
    ("<think>\n", "\n\n</think>\n\nan answer", ("", "an answer")),
    ("<think>\n\n</think>\n\n", "an answer", ("", "an answer")),
]


@pytest.mark.parametrize(("prompt", "text", "expected"), CASES)
@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_pieces_are_the_whole(prompt, text, expected, size):
    splitter = Splitter(f"<|user|>hi<|assistant|>{prompt}")
    pieces = [splitter.add(text[at : at + size]) for at in range(0, len(text), size)] + [splitter.add("", is_last=True)]
    assert tuple(map("".join, zip(*pieces))) == expected
    assert Splitter(f"hi{prompt}").add(text, is_last=True) == expected


def test_a_template_without_marks_is_left_alone(offline):
    assert not marks_reasoning(offline.get_tokenizer().chat_template)
    assert not marks_reasoning(None)


def test_an_answer_of_thoughts(offline, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0].content }}\n{% if add_generation_prompt %}<think>\n{% endif %}")
    server = RunningServer(chat_template=str(template))
    try:
        with server.client() as client:
            options = {"model": "reasoner", "seed": 1, "max_completion_tokens": 6}
            options["messages"] = [{"role": "user", "content": "a=1"}]
            message = client.chat.completions.create(**options).choices[0].message
            text = (
                offline.generate("a=1\n<think>\n", SamplingParams(seed=1, max_tokens=6), use_tqdm=False)[0]
                .outputs[0]
                .text
            )
            assert (message.content, message.reasoning_content) == (None, text.lstrip("\n"))
            deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(**options, stream=True)]
            assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas) == text.lstrip("\n")
            assert "".join(delta.content or "" for delta in deltas) == ""
    finally:
        server.stop()
