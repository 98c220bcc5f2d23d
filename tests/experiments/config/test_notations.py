"""Final answers in the many notations that models and data sets write: pairs of answer and gold, right or wrong."""

from __future__ import annotations

import pytest

from experiments.graders import get_grader, grade
from experiments.graders.boxed import last_boxes
from experiments.graders.code import same_output

NUMBERS = [
    # Where an answer is announced, and where it only seems to be.
    ('{"answer": "18", "confidence": 0.9}', "18", 1),
    ("**Answer**: 18 (in 3 steps)", "18", 1),
    ("The answer is not 18, it is 20.", "20", 1),
    ("The answer is not 18, it is 20.", "18", 0),
    ("The answer is either 17 or 18. Let me check: yes, 18.", "18", 1),
    ("The answer is between 18 and 20.", "18", 0),
    # Degrees and sizes of type.
    ("\\boxed{18 \\,^\\circ\\mathrm{C}}", "18", 1),
    ("\\boxed{18^{\\circ}\\text{F}}", "18", 1),
    ("\\boxed{-18^\\circ C}", "-18", 1),
    ("\\boxed{18°C}", "18", 1),
    ("\\boxed{18^\\circ}", "18", 1),
    ("\\boxed{18^\\circ x}", "18", 0),
    ("\\boxed{\\large 18}", "18", 1),
    ("\\boxed{{\\bf 18}}", "18", 1),
    # What a number is counted in belongs to it; a remark beside it does not.
    ("The answer is $18k.", "18000", 1),
    ("\\boxed{18 \\text{ million}}", "18000000", 1),
    ("They sold 1.5 million tickets", "1500000", 1),
    ("They sold 18 million tickets", "18", 0),
    ("3 hundred", "300", 1),
    ("答案是18万", "180000", 1),
    ("18 kg", "18", 1),
    ("18 millionaires", "18", 1),
    ("\\boxed{18 \\text{ (rounded to 2 digits)}}", "18", 1),
    ("\\boxed{18 (19)}", "18", 0),
    # Fractions and mixed numbers.
    ("\\boxed{3\\frac{1}{2}}", "3.5", 1),
    ("\\boxed{3\\frac{1}{2}}", "15.5", 0),
    ("The answer is 3 1/2 cups.", "3.5", 1),
    ("The answer is 3½ cups.", "3.5", 1),
    ("-2\\frac{1}{4}", "-2.25", 1),
    ("\\boxed{\\dfrac34}", "0.75", 1),
    ("\\boxed{\\frac 3 4}", "0.75", 1),
    ("\\boxed{\\frac{3}4}", "0.75", 1),
    ("\\boxed{-\\tfrac{3}{4}}", "-0.75", 1),
    ("\\boxed{\\frac{-3}{4}}", "-0.75", 1),
    ("\\boxed{\\frac{1,500}{2}}", "750", 1),
    ("\\boxed{\\frac{x}{2}}", "2", 0),
    ("\\boxed{\\frac{\\sqrt{3}}{2}}", "2", 0),
    ("1 / 0", "0", 0),
    ("\\boxed{\\frac{13}{0}}", "13", 0),
    # Thousands.
    ("\\boxed{10,\\!000}", "10000", 1),
    ("\\boxed{10,\\!000}", "10", 0),
    ("\\boxed{11,\\! 111,\\! 111,\\! 100}", "11111111100", 1),
    ("\\boxed{1{,}234}", "1234", 1),
    ("\\boxed{1\\,234}", "1234", 1),
    ("The answer is 1 234 567.", "1234567", 1),
    ("The answer is 1\u202f234.", "1234", 1),
    ("The answer is Rs. 1,50,000", "150000", 1),
    ("\\boxed{1,234}", "234", 0),
    ("\\boxed{1,23}", "23", 0),
    ("\\boxed{0,123}", "123", 0),
    ("The answer is 1,234.50.", "1234.5", 1),
    # Signs.
    ("\\boxed{- 5}", "-5", 1),
    ("\\boxed{- 5}", "5", 0),
    ("The answer is - 5", "-5", 1),
    ("The answer is: − 5.", "-5", 1),
    ("x = - 5", "-5", 1),
    ("- 5", "-5", 1),
    ("They need:\n- 7 apples", "7", 1),
    ("\\boxed{+5}", "5", 1),
    ("\\boxed{\\$-5}", "-5", 1),
    ("\\boxed{-\\$5}", "-5", 1),
    ("the result—18", "18", 1),
    # Powers and products are numbers, read whole; sums, ranges, dates and times are none.
    ("\\boxed{1.2 \\times 10^6}", "1200000", 1),
    ("\\boxed{1.2 \\times 10^{6}}", "1.2", 0),
    ("The answer is 1.2×10⁶.", "1200000", 1),
    ("The answer is 5 \\cdot 10^{-3}", "0.005", 1),
    ("The answer is 1.2e6", "1200000", 1),
    ("\\boxed{2^{10}}", "1024", 1),
    ("\\boxed{2*9}", "18", 1),
    ("2*9", "29", 0),
    ("2*9", "9", 0),
    ("2 * 9", "18", 1),
    ("\\boxed{2 \\times 9}", "9", 0),
    ("**2** and **9**", "9", 1),
    ("*18*", "18", 1),
    ("* 18 eggs", "18", 1),
    ("__18__", "18", 1),
    ("10-7", "7", 0),
    ("The answer is 9 + 9", "9", 0),
    ("The answer is 9 + 9 = 18", "18", 1),
    ("The answer is 5-7 days.", "5", 0),
    ("at 18:30", "30", 0),
    ("version 1.2.3", "3", 0),
    ("the ratio is 3:5", "5", 0),
    ("10^400^400", "5", 0),
    ("9^9999999999", "5", 0),
    ("1e99999999999", "5", 0),
    ("9" * 10_000, "9", 0),
    ("\\boxed{5!}", "5", 0),
    # Parts of expressions are no numbers.
    ("\\boxed{2\\pi}", "2", 0),
    ("\\boxed{2π}", "2", 0),
    ("\\boxed{\\sqrt{3}}", "3", 0),
    ("\\boxed{5\\sqrt{3}}", "5", 0),
    ("\\boxed{13x}", "13", 0),
    ("\\boxed{x+5}", "5", 0),
    ("\\boxed{x-5}", "5", 0),
    ("\\boxed{x^2}", "2", 0),
    ("\\boxed{2^x}", "2", 0),
    ("\\boxed{a_2}", "2", 0),
    ("\\boxed{\\log_2 8}", "8", 0),
    ("\\boxed{f(3)}", "3", 0),
    ("\\boxed{x \\le 5}", "5", 0),
    ("\\boxed{x < 5}", "5", 0),
    ("\\boxed{\\pm 5}", "5", 0),
    ("The answer is x2", "2", 0),
    ("The answer is 2x9", "9", 0),
    # Numerals with a base.
    ("\\boxed{1011_2}", "11", 1),
    ("\\boxed{1011_{3}}", "31", 1),
    ("\\boxed{1011_2}", "1011", 0),
    ("\\boxed{1012_2}", "14", 0),
    ("4_1", "41", 0),
    # Words, units, currencies, other scripts.
    ("答案是18", "18", 1),
    ("答案是18。检查用了3步。", "18", 1),
    ("共有18个苹果", "18", 1),
    ("정답은 18입니다", "18", 1),
    ("\\boxed{答案是18}", "18", 1),
    ("答案是**18**。", "18", 1),
    ("答案:18", "18", 1),
    ("Rs.18", "18", 1),
    ("The answer is Rs.18.50", "18.5", 1),
    ("Rs18", "18", 1),
    ("USD 18", "18", 1),
    ("18€", "18", 1),
    ("€18", "18", 1),
    ("\\boxed{\\text{Rs. }18}", "18", 1),
    ("\\boxed{\\$18.00}", "18", 1),
    ("\\boxed{18\\text{ eggs}}", "18", 1),
    ("\\boxed{18 eggs}", "18", 1),
    ("\\boxed{18\\text{ cm}^2}", "18", 1),
    ("\\boxed{18 cm^2}", "18", 1),
    ("\\boxed{18\\mbox{ cm}^{2}}", "18", 1),
    ("\\boxed{18~\\mathrm{m/s^2}}", "18", 1),
    ("\\boxed{18^\\circ}", "18", 1),
    ("\\boxed{18°}", "18", 1),
    ("18kg", "18", 1),
    ("the 18th", "18", 1),
    ("eggs.18", "18", 1),
    # A percent is a unit: what it counts is what was asked for.
    ("\\boxed{25\\%}", "25", 1),
    ("\\boxed{25%}", "25", 1),
    ("\\boxed{25 \\text{ percent}}", "25", 1),
    ("\\boxed{12.5\\%}", "12.5", 1),
    ("\\boxed{25\\%}", "0.25", 0),
    # How a box is written, and what it holds.
    ("\\boxed{7.}", "7", 1),
    ("\\boxed {7}", "7", 1),
    ("\\boxed{ 7 }", "7", 1),
    ("\\boxed{\n7\n}", "7", 1),
    ("\\fbox{7}", "7", 1),
    ("\\boxed{\\boxed{7}}", "7", 1),
    ("\\boxed{x = \\boxed{7}}", "7", 1),
    ("\\boxed{$7$}", "7", 1),
    ("\\boxed{{7}}", "7", 1),
    ("\\boxed{(7)}", "7", 1),
    ("\\boxed{\\mathbf{7}}", "7", 1),
    ("\\boxed{\\textbf{(B)}\\ 7}", "7", 1),
    ("\\boxed{x = 7}", "7", 1),
    ("\\boxed{x \\approx 7.5}", "7.5", 1),
    ("\\boxed{3 + 4 = 7}", "7", 1),
    ("\\boxed{3 + 4}", "4", 0),
    ("\\boxed{(3, 7)}", "7", 0),
    ("\\boxed{3 \\text{ or } 7}", "3", 0),
    ("\\boxed{3 \\text{ hours } 20 \\text{ minutes}}", "3", 0),
    # A box wins.
    ("\\boxed{18}. The answer is 3 times as many as before.", "18", 1),
    ("\\boxed{18}. The answer is 3.", "3", 0),
    ("\\boxed{18} #### 3", "18", 1),
    ("#### 3 and then \\boxed{18}", "18", 1),
    ("\\boxed{\\text{eighteen}}. The answer is 3.", "3", 0),
    ("\\boxed{7} no, \\boxed{18}", "18", 1),
    ("\\boxed{7}\n\n\\boxed{18}", "18", 1),
    ("\\boxed{3} and \\boxed{7}", "7", 0),
    ("\\boxed{7}, \\boxed{7}", "7", 1),
    ("\\boxed{7}, so \\boxed{1", "7", 1),
    ("I put it within \\boxed{}. The answer is 18.", "18", 1),
    ("The answer is 18. I put it within \\boxed{}", "18", 1),
    ("so \\boxed{18", "18", 1),
]

MATHEMATICS = [
    # Words between numbers: no number.
    ("\\boxed{12\\text{ dollars and }50\\text{ cents}}", "12", 0),
    ("\\boxed{2 \\text{ hours } 30 \\text{ minutes}}", "2", 0),
    ("\\boxed{2 \\text{ h } 30 \\text{ min}}", "2", 0),
    ("\\boxed{\\frac{5}{2} \\text{ or } 2.5}", "2.5", 1),
    ("\\boxed{3\\cos 0 + 3}", "6", 1),
    ("\\boxed{\\gcd(12, 18)}", "6", 1),
    ("\\boxed{2^3 \\text{ cubes}}", "8", 1),
    ("\\boxed{25\\%}", "25", 1),
    ("\\boxed{25}", "25\\%", 1),
    ("\\boxed{12.5\\%}", "12.5", 1),
    ("\\boxed{25 percent}", "25", 1),
    ("\\boxed{25\\%}", "2.5", 0),
    ("\\boxed{7.}", "7", 1),
    ("\\boxed{x^2+1.}", "x^2+1", 1),
    ("\\boxed {7}", "7", 1),
    ("\\fbox {7}", "7", 1),
    ("\\boxed{\\boxed{7}}", "7", 1),
    ("\\boxed{1} and \\boxed{2}", "1,2", 1),
    ("$\\boxed{1}$ and $\\boxed{2}$", "1,2", 1),
    ("\\boxed{2}, \\boxed{1}", "\\{1,2\\}", 1),
    ("$x=\\boxed{1}$ or $x=\\boxed{2}$", "1,2", 1),
    ("\\boxed{1}, \\boxed{2}, and \\boxed{3}", "1,2,3", 1),
    ("\\boxed{1} and \\boxed{3}", "1,2", 0),
    ("\\boxed{2}", "1,2", 0),
    ("\\boxed{1} and \\boxed{2}", "2", 0),
    ("\\boxed{1}, so \\boxed{2}", "2", 1),
    ("\\boxed{15\\frac{39}{40}},$ or $\\boxed{\\frac{639}{40}}$ inches", "\\frac{639}{40}", 1),
    ("\\boxed{1011_2}", "1011_2", 1),
    ("\\boxed{1011_{2}}", "1011_2", 1),
    ("\\boxed{1011_{\\text{two}}}", "1011_2", 1),
    ("\\boxed{1011_3}", "1011_2", 0),
    ("\\boxed{1011_{\\text{three}}}", "1011_2", 0),
    ("\\boxed{1011}", "1011_2", 1),
    ("\\boxed{1010}", "1011_2", 0),
    ("\\boxed{1011_2}", "1011", 0),
    ("\\boxed{1011_2}", "11", 1),
    ("\\boxed{10,\\!000}", "10000", 1),
    ("\\boxed{10000}", "10,\\!000", 1),
    ("\\boxed{10}", "10,\\!000", 0),
    ("\\boxed{1 234}", "1234", 1),
    ("\\boxed{1\\,234}", "1234", 1),
    ("\\boxed{3\\frac{1}{2}}", "\\frac{7}{2}", 1),
    ("\\boxed{3\\frac{1}{2}}", "\\frac{31}{2}", 0),
    ("\\boxed{1.2 \\times 10^6}", "1200000", 1),
    ("\\boxed{2*9}", "18", 1),
    ("\\boxed{2*9}", "29", 0),
    ("\\boxed{- 5}", "-5", 1),
    ("The answer is - 5", "-5", 1),
    ("The answer is - 5", "5", 0),
    ("\\boxed{答案是18}", "18", 1),
    ("答案是18", "18", 1),
    ("Rs.18", "18", 1),
    ("\\boxed{\\text{Rs.}18}", "18", 1),
    ("\\boxed{18 dollars}", "18", 1),
    ("\\boxed{18} The answer is 3", "18", 1),
    ("\\boxed{18} The answer is 3", "3", 0),
    ("The answer is $\\frac12$. That is 3 more than $2$", "\\frac{1}{2}", 1),
    ("The answer is $\\frac12$. That is 3 more than $2$", "3", 0),
    ("\\boxed{2x}", "2", 0),
    ("\\boxed{2}", "2x", 0),
    ("\\boxed{2}", "2k", 0),
    ("\\boxed{2\\pi}", "2", 0),
    ("\\boxed{\\sqrt{4}}", "2", 1),
    ("\\boxed{(3)}", "3", 1),
    ("\\boxed{\\{3, 4\\}}", "3", 0),
    ("\\boxed{0.333333}", "\\frac{1}{3}", 1),
    ("\\boxed{\\text{(C)}}", "\\text{(C)}", 1),
    ("\\boxed{\\text{(C)}}", "\\text{(E)}", 0),
    ("I put it within \\boxed{}. The answer is $x+1$.", "x+1", 1),
    ("\\boxed{1/0}", "5", 0),
    ("\\boxed{٤١}", "41", 1),
    ("\\boxed{x + ٤}", "x+4", 1),
]

VALUES = [
    ("[ANSWER]٤١[/ANSWER]", "41", 0),
    ("[ANSWER]4_1[/ANSWER]", "'4_1'", 0),
    ("[ANSWER]1or 2[/ANSWER]", "1", 0),
    ("[ANSWER]1_000[/ANSWER]", "1000", 1),  # Python's own way of writing it
]


@pytest.mark.parametrize(("answer", "gold", "score"), NUMBERS)
def test_number(answer, gold, score):
    graded = grade(get_grader("number"), answer, gold)
    assert (graded.score, graded.error) == (score, None), graded


@pytest.mark.parametrize(("answer", "gold", "score"), MATHEMATICS)
def test_math(answer, gold, score):
    graded = grade(get_grader("math"), answer, gold)
    assert (graded.score, graded.error) == (score, None), graded


@pytest.mark.parametrize(("answer", "gold", "score"), VALUES)
def test_literal(answer, gold, score):
    graded = grade(get_grader("literal"), answer, gold)
    assert (graded.score, graded.error) == (score, None), graded


@pytest.mark.parametrize("word", ["4_1", "٤١", "４１", "0x29", "4 1"])
def test_only_plain_digits_are_a_number_in_a_programs_output(word):
    assert not same_output(word, "41")
    assert same_output("41.0 +41 4.1e1", "41 41 41")


GOLDS = {
    "number": ["18", "-10", "-3", "1,234", "70000", "025", "073", "0.5", "3/4", "2.125"],
    "math": [
        "2",
        "-11",
        "x=5",
        "1.25",
        ".0000672",
        "58,500",
        "11,\\! 222,\\! 333,\\! 400",
        "\\$42,\\!348",
        "\\$17.90",
        "1\\frac{3}{5}",
        "137 \\frac{1}{2}",
        "\\frac 57",
        "\\frac9{17}",
        "\\frac43",
        "-\\frac{35}{8}",
        "\\frac{280}7\\text{ degrees}",
        "25\\%",
        "91^\\circ",
        "52_8",
        "4212_{5}",
        "5.4 \\text{ cents}",
        "865 \\mbox{ inches}^2",
        "\\left( 3, \\frac{\\pi}{2} \\right)",
        "1,-2",
        "3, 5, 7",
        "(6,31,-1)",
        "(3,4]",
        "(2,\\infty)",
        "(0,9) \\cup (9,36)",
        "x \\in [-2,7]",
        "\\{1\\pm\\sqrt{5},-2\\}",
        "1 \\pm \\sqrt{19}",
        "6 - 5i",
        "p - q",
        "2k",
        "5r^5",
        "3\\sqrt{13}",
        "11\\sqrt2",
        "\\pi",
        "288 \\pi",
        "\\cot x",
        "\\frac{20000}{\\pi}",
        "\\frac{11+9a}{20}",
        "(a+5)(b+2)",
        "x^3+3x-6",
        "y = 2x + 3",
        "5x - 7y + 11z + 4 = 0",
        "\\begin{pmatrix} -1/3 \\\\ 2/3 \\\\ 5/3 \\end{pmatrix}",
        "\\begin{pmatrix} -1 & 0 \\\\ 0 & -1 \\end{pmatrix}",
        "\\text{Maria}",
        "\\text{(C)}",
        "\\text{even}",
    ],
    "literal": ["41", "[1, 2]", "'a'", "{'a': (1, None)}", "True"],
}
"""Golds of different values, in the notations of GSM8K, AIME, MATH and LiveCodeBench."""
SENTENCES = {"number": "So the answer is {}.", "math": "So the answer is ${}$.", "literal": "[ANSWER]{}[/ANSWER]"}


@pytest.mark.parametrize("name", GOLDS)
def test_golds_are_right_in_any_dress_and_differ_from_each_other(name):
    grader, golds = get_grader(name), GOLDS[name]
    for gold in golds:
        dresses = [SENTENCES[name].format(gold)]
        dresses += [] if name == "literal" else [f"So it is \\boxed{{{gold}}}.", f"$\\fbox {{{gold}}}$"]
        dresses += [gold, f"So the answer is {gold}."] if name != "literal" else [gold]
        for dress in dresses:
            graded = grade(grader, dress, gold)
            assert (graded.score, graded.error) == (1, None), (dress, graded)
    for index, one in enumerate(golds):
        other = golds[index - 1]
        dress = SENTENCES[name] if name == "literal" else "\\boxed{{{}}}"
        graded = grade(grader, dress.format(one), other)
        assert (graded.score, graded.error) == (0, None), (one, other, graded)


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("none", []),
        ("\\boxed{}", []),
        ("\\boxed{unclosed", []),
        ("\\boxed{1} no, \\boxed{2}", ["2"]),
        ("\\boxed{1} and \\boxed{2}", ["1", "2"]),
        ("\\boxed{0} no, \\boxed{1}, \\boxed{2}$ or $y=\\boxed{3}", ["1", "2", "3"]),
        ("\\boxed{\\boxed{1} and \\boxed{2}}", ["1", "2"]),
        ("\\boxed{1}\n\n\\boxed{2}", ["2"]),
        ("\\boxed{1} {\\boxed{2} \\boxed{3", ["2"]),
        ("a { b \\boxed{\\{1, \\frac{1}{2}\\}}", ["\\{1, \\frac{1}{2}\\}"]),
        ("\\boxed{\\left\\{ x \\right.}", ["\\left\\{ x \\right."]),
        ("\\boxedfoo{1}", []),
    ],
)
def test_boxes_of_a_set_stand_in_a_row(text, boxes):
    assert last_boxes(text) == boxes
