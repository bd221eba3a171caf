import pytest

from laser_pl.data.problem import Problem
from laser_pl.errors import UserError
from laser_pl.reward.exact_verifier import ExactVerifier


def problem(answer: str) -> Problem:
    return Problem(0, "question", answer, {})


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        (r"it is \boxed{big  dog}", "big  dog", 1.0),
        (r"\boxed{big dog} or \boxed{cat}", "cat", 0.0),
        ("thinking\n big\tdog \n\n", "big\tdog", 1.0),
        ("the big dog", "the big dog", 0.0),
        ("Big dog", "Big dog", 0.0),
        ("", None, 0.0),
    ],
)
def test_the_answer_must_be_the_reference_up_to_white_space(response, answer, reward):
    assert ExactVerifier()(problem("big dog"), response) == (reward, answer, None)


def test_the_last_line_may_be_asked_for():
    verifier = ExactVerifier(extract="last_line")
    assert verifier(problem("7"), "\\boxed{8}\n7").reward == 1.0
    assert verifier(problem("7"), r"\boxed{7}") == (0.0, r"\boxed{7}", None)


def test_no_answer_is_wrong_even_where_the_reference_is_empty():
    assert ExactVerifier()(problem(""), " \n").reward == 0.0


def test_an_unknown_way_to_extract_is_told():
    with pytest.raises(UserError, match=r"verifier\.arguments\.extract = 'first': must be"):
        ExactVerifier(extract="first")  # type: ignore[arg-type]
