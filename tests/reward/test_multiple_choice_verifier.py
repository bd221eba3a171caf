import pytest

from laser_pl.data.problem import Problem
from laser_pl.reward.multiple_choice_verifier import MultipleChoiceVerifier, chosen_letter


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (r"\boxed{B}", "B"),
        (r"\boxed{b}", "B"),
        (r"\boxed{(B)}", "B"),
        (r"\boxed{\text{B}}", "B"),
        (r"\boxed{\textbf{(B)}}", "B"),
        (r"\boxed{\text{(B) } 12}", "B"),
        (r"\boxed{B. Paris}", "B"),
        (r"\boxed{B: Paris}", "B"),
        (r"\boxed{Option B}", "B"),
        (r"The answer is A. Wait: \boxed{B}", "B"),
        (r"\boxed{Berlin}", None),
        (r"\boxed{12}", None),
        (r"\boxed{K}", None),
        ("B", "B"),
        ("B.", "B"),
        ("(B)", "B"),
        ("**B**", "B"),
        ("thinking\nB. Paris", "B"),
        ("thinking\nB) Paris", "B"),
        ("The answer is (B).", "B"),
        ("The answer is (b).", "B"),
        ("the answer is B", "B"),
        ("Answer: B", "B"),
        ("**Answer:** B", "B"),
        ("The answer is **B**.", "B"),
        (r"The answer is $\boxed{B}$.", "B"),
        (r"The answer is $\text{B}$.", "B"),
        ("The correct answer is option C, since A is false.", "C"),
        ("The answer is A. No, the answer is C because D is red.", "C"),
        ("The answer is A.\nTherefore I choose choice D.", "D"),
        ("The answer is a bit unclear", None),
        ("The answer is A good one", None),
        ("Answer: I think it rains", None),
        ("A good start", None),
        ("I do not know", None),
        ("Berlin", None),
        ("", None),
    ],
)
def test_the_chosen_letter_is_found(response, expected):
    assert chosen_letter(response) == expected


@pytest.mark.parametrize("reference", ["B", "b", "(B)", "B. Paris", r"\boxed{B}"])
def test_the_reference_may_be_written_in_these_ways_too(reference):
    problem = Problem(0, "question", reference, {})
    assert MultipleChoiceVerifier()(problem, "The answer is (B)") == (1.0, "B", None)
    assert MultipleChoiceVerifier()(problem, "The answer is (C)") == (0.0, "C", None)


def test_no_letter_is_wrong_even_where_the_reference_has_none():
    problem = Problem(0, "question", "Paris", {})
    assert MultipleChoiceVerifier()(problem, "I do not know") == (0.0, None, None)
