import json
import random
from pathlib import Path

import pytest

from laser_pl.data.problem import Problem
from laser_pl.reward.math_verifier import MathVerifier
from laser_pl.reward.verifier import Verdict, VerifierPool, canonical_answers

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def problem(answer: str) -> Problem:
    return Problem(0, "question", answer, {})


def load(name: str) -> list[Problem]:
    path = SHARED / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"needs {path}")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [Problem(i, row["problem"], str(row["answer"]), row) for i, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("reference", "response", "reward"),
    [
        ("7", r"\boxed{7}", 1.0),
        ("7", r"\boxed{8} so \boxed{7}", 1.0),
        ("7", r"\boxed{7} so \boxed{8}", 0.0),
        ("0.5", r"\boxed{\frac{1}{2}}", 1.0),
        (r"\frac{1}{2}", r"\boxed{1/2}", 1.0),
        (r"$\frac{1}{2}$", r"\boxed{0.5}", 1.0),
        ("1/2", r"\boxed{\dfrac12}", 1.0),
        ("1234", r"\boxed{1,234}", 1.0),
        (r"\sqrt{8}", r"\boxed{2\sqrt{2}}", 1.0),
        (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3, \pi/2)}", 1.0),
        (r"\{1, 2\}", r"\boxed{\{2, 1\}}", 1.0),
        ("(1, 2)", r"\boxed{(2, 1)}", 0.0),
        ("x^2+1", r"\boxed{1+x^2}", 1.0),
        (r"\text{Evelyn}", r"\boxed{\text{Evelyn}}", 1.0),
        (r"\text{Evelyn}", r"\boxed{\text{Briana}}", 0.0),
        ("7", "The final answer is 7.", 1.0),
        ("7", "So the final answer is $7$. I hope it is correct.", 1.0),
        ("7", "The final answer is 17.", 0.0),
        ("7", "no number here", 0.0),
        ("7", "", 0.0),
        ("7", r"\boxed{}", 0.0),
        ("7", r"\boxed{", 0.0),
    ],
)
def test_answers_are_compared_as_mathematics(reference, response, reward):
    assert MathVerifier()(problem(reference), response).reward == reward


def test_the_answer_is_the_text_of_the_box_or_of_the_final_answer():
    assert MathVerifier()(problem("7"), r"\boxed{ \frac{1}{2} }").answer == r"\frac{1}{2}"
    assert MathVerifier()(problem("7"), "The final answer is $8$.").answer == "8"
    assert MathVerifier()(problem("7"), "none").answer is None


def test_an_empty_answer_does_not_equal_an_empty_reference():
    assert MathVerifier()(problem(""), r"\boxed{}").reward == 0.0
    assert MathVerifier()(problem(""), "").reward == 0.0


def test_equivalent_answers_become_one_for_votes():
    answers = ["1/2", None, "0.5", "2", r"\frac{1}{2}", "x=2"]
    assert canonical_answers(MathVerifier(), answers) == ["1/2", None, "1/2", "2", "1/2", "2"]


@pytest.mark.parametrize(("name", "least"), [("math500", 495), ("amc23", 40), ("aime24", 30)])
def test_the_answers_of_a_real_dataset_verify_as_correct(name, least):
    problems = load(name)
    verifier = MathVerifier()
    right = sum(
        verifier(p, f"Thus the result is $\\boxed{{{p.answer}}}$.").reward for p in problems
    )
    assert right >= least  # 99 %


@pytest.mark.parametrize("name", ["math500", "amc23", "aime24"])
def test_the_shuffled_answers_of_a_real_dataset_verify_as_wrong(name):
    problems = load(name)
    answers = [p.answer for p in problems]
    random.Random(0).shuffle(answers)
    verifier = MathVerifier()
    taken = [
        (p.answer, answer)
        for p, answer in zip(problems, answers, strict=True)
        if "".join(p.answer.split()) != "".join(answer.split())
        and verifier(p, f"\\boxed{{{answer}}}").reward
    ]
    assert len(taken) <= len(problems) // 500, taken  # two answers may be the same number


# Each of these stalls math-verify for many seconds, or for ever, or breaks a parser.
ADVERSARIAL = [
    r"\boxed{9^{9^{9^{9}}}}",
    r"\boxed{10^{10^{10}}}",
    r"\boxed{1000000000!}",
    r"\boxed{\binom{10^9}{10^8}}",
    r"\boxed{\sum_{i=1}^{10^9} i^{i}}",
]
HARMLESS = [
    r"\boxed{10**10**10}",
    r"\boxed{" + "{" * 3000 + "}" * 3000 + "}",
    r"\boxed{" + "(" * 3000 + "}",
    r"\boxed{" + "9" * 100_000 + "}",
    r"\boxed{\frac{1}{0}}",
    r"\boxed{\frac{}{}}",
    r"\boxed{\}",
    "{" * 100_000,
    "$" * 5000,
    "9^" * 5000,
    "\x00\ud800",
]


def test_adversarial_answers_are_wrong_and_cannot_stall_a_pool():
    problems = [problem("5")] * (len(ADVERSARIAL) + len(HARMLESS) + 1)
    with VerifierPool(MathVerifier(), 2.0, 2, "stop") as pool:
        verdicts = pool.verify(problems, [*ADVERSARIAL, *HARMLESS, r"\boxed{5}"])
        assert [verdict.reward for verdict in verdicts] == [0.0] * (len(problems) - 1) + [1.0]
        stalled = verdicts[: len(ADVERSARIAL)]
        assert [verdict.error for verdict in stalled] == ["timeout"] * len(ADVERSARIAL)
        assert pool.counts == {
            "num_timeouts": len(ADVERSARIAL),
            "num_crashes": 0,
            "num_errors": 0,
        }


def test_repeating_the_problem_is_no_answer():
    problem = Problem(0, "Calculate 32 + 95.", "127", {})
    verifier = MathVerifier()
    for response in ("To calculate 32 + 95, the correct step is to add", "It is $32 + 95$."):
        assert verifier(problem, response) == Verdict(0.0, None)
    assert verifier(problem, "So the final answer is 127.").reward == 1.0
