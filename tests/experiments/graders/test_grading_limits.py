"""An answer that loops, hangs or explodes costs itself alone, in any thread or process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from experiments.graders import GRADERS, bounded, get_grader, grade
from experiments.graders.code import extract_program, same_output

LENGTH = 80_000
GOLD = {"number": "5", "math": "5", "exact": "5", "final": "5", "f1": "5", "literal": "5"}
LOOPS = [
    "The answer is N. ",
    "The answer is 5 + ",
    "Answer:",
    "answer ",
    "Wait, let me check again: 3 + 4 = 7. ",
    "\\boxed{",
    "\\boxed{7} ",
    "\\boxed{7}, ",
    "\\boxed{\\boxed{7}",
    "#### ",
    "[ANSWER]",
    "9",
    "1,",
    "1/",
    "1_",
    "1e9",
    "2^",
    "2*",
    "2 \\times ",
    "123 ",
    "3 1/2 ",
    "7 apples and ",
    "the ",
    "答案是",
    "$",
    "*",
    "_",
    "-",
    "(",
    "{",
    "\\",
    "\\text{",
    "\\frac{",
    "\\frac{1}",
    "\\sqrt[",
    "^{",
    " ",
    "\n",
    "```\n",
]


@pytest.mark.parametrize("name", GOLD)
def test_time_is_linear_in_the_answer(name):
    for loop in LOOPS:
        answer = (loop * LENGTH)[:LENGTH]
        begin = time.process_time()
        GRADERS[name](answer, GOLD[name])
        assert time.process_time() - begin < 1.5, loop  # 0.05 on an idle machine


def test_programs_and_outputs_take_linear_time():
    for loop in LOOPS:
        answer = (loop * LENGTH)[:LENGTH]
        begin = time.process_time()
        extract_program(answer)
        same_output(answer, answer[:-1] + "x")
        assert time.process_time() - begin < 1.5, loop


EXPLODING = ["\\boxed{9^{9^{9^9}}}", "\\boxed{10^{10^{10}}}", "\\boxed{\\binom{1000000000}{500000000}}"]


@pytest.mark.parametrize("answer", EXPLODING)
def test_exploding_expression_costs_one_answer(answer, monkeypatch):
    grader = get_grader("math")
    grade(grader, "\\boxed{5}", "5")  # the library is loaded
    begin = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(bounded, "SECONDS", 0.3)
        graded = grade(grader, answer, "5")
    assert graded.score == 0
    assert graded.error in ("TimeoutError: grading took longer than 0.3 s of CPU time", "MemoryError")
    assert time.monotonic() - begin < 30
    assert grade(grader, "\\boxed{5}", "5").score == 1


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(bounded, "MEMORY", 256 << 20)
    graded = grade(get_grader("f1"), "ab " * 3_000_000, "5")
    assert graded.score == 0
    assert graded.error is not None
    monkeypatch.undo()
    assert grade(get_grader("f1"), "5", "5").score == 1


def test_process_that_dies_between_answers_costs_nothing():
    grader = get_grader("number")
    grade(grader, "5", "5")
    os.kill(bounded._PROCESS._process.pid, signal.SIGKILL)
    bounded._PROCESS._process.wait()
    assert grade(grader, "5", "5").score == 1


def test_process_that_dies_costs_one_answer(monkeypatch):
    def die(process, question):
        process.kill()
        return exchange(process, question)

    exchange = bounded._PROCESS._exchange
    grader = get_grader("number")
    with monkeypatch.context() as patch:
        patch.setattr(bounded._PROCESS, "_exchange", die)
        assert grade(grader, "5", "5").error == "RuntimeError: the grader's process ended with code -9"
    assert grade(grader, "5", "5").score == 1


def test_interrupted_grading_leaves_no_reply_to_the_next(monkeypatch):
    def interrupt(process, question):
        process.stdin.write(question + "\n")
        process.stdin.flush()
        raise KeyboardInterrupt

    grader = get_grader("number")
    with monkeypatch.context() as patch:
        patch.setattr(bounded._PROCESS, "_exchange", interrupt)
        with pytest.raises(KeyboardInterrupt):
            grade(grader, "5", "5")
    assert grade(grader, "6", "5").score == 0


def test_threads_grade_side_by_side():
    wrong = []

    def work(number):
        for _ in range(10):
            for name in ("math", "number"):
                wrong.extend(
                    said
                    for said in (5, number)
                    if grade(get_grader(name), f"\\boxed{{{said}}}", "5").score != (said == 5)
                )

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_forked_process_grades_by_itself():
    grade(get_grader("math"), "\\boxed{5}", "5")
    with multiprocessing.get_context("fork").Pool(1) as pool:
        grades = pool.starmap(_score, [("\\boxed{5}", "5"), ("\\boxed{6}", "5")])
    assert grades == [1, 0]
    assert grade(get_grader("math"), "\\boxed{6}", "5").score == 0


def _score(answer, gold):
    return grade(get_grader("math"), answer, gold).score


def test_grading_needs_no_folder_and_leaves_no_process(tmp_path):
    program = f"""
import sys
sys.path.insert(0, {str(bounded.ROOT)!r})
from experiments.graders import bounded, get_grader, grade
print(grade(get_grader("number"), "5", "5").score, bounded._PROCESS._process.pid)
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    score, pid = done.stdout.split()
    assert (float(score), done.stderr) == (1, "")
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)
