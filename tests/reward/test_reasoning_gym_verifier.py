import pytest

from laser_pl.data.datasets import load_reasoning_gym
from laser_pl.data.problem import Problem
from laser_pl.reward.reasoning_gym_verifier import ReasoningGymVerifier
from laser_pl.reward.verifier import VerifierPool

# Of every category, with answers that are numbers, words, lists, fractions, moves and grids.
TASKS = [
    "ab",
    "advanced_geometry",
    "base_conversion",
    "basic_arithmetic",
    "chain_sum",
    "circuit_logic",
    "complex_arithmetic",
    "countdown",
    "decimal_arithmetic",
    "dice",
    "family_relationships",
    "fraction_simplification",
    "gcd",
    "group_anagrams",
    "knights_knaves",
    "leg_counting",
    "letter_counting",
    "mini_sudoku",
    "number_sequence",
    "polynomial_equations",
    "prime_factorization",
    "rotate_matrix",
    "simple_equations",
    "syllogism",
    "time_intervals",
    "tower_of_hanoi",
    "word_ladder",
    "word_sorting",
]


@pytest.mark.parametrize("name", TASKS)
def test_the_reference_answer_gets_the_reward_and_another_one_does_not(name):
    verifier = ReasoningGymVerifier()
    for problem in load_reasoning_gym(name, {}, 3, 0, seed=0).train:
        # Box and tags, since a grid has several lines and a box must balance its braces.
        assert verifier(problem, f"<answer>{problem.answer}</answer>") == (
            1.0,
            problem.answer,
            None,
        )
        assert verifier(problem, f"so \\boxed{{{problem.answer}}}.").reward == 1.0
        wrong = verifier(problem, "so \\boxed{none of these}")
        assert wrong.reward == 0.0
        assert wrong.answer == "none of these"
        assert verifier(problem, "") == (0.0, None, None)


def sum_problem() -> Problem:
    return load_reasoning_gym("chain_sum", {}, 1, 0, seed=0).train[0]


def test_a_box_comes_before_tags_and_tags_before_the_last_line():
    problem = sum_problem()
    verifier = ReasoningGymVerifier()
    assert verifier(problem, "\\boxed{1} <answer>2</answer>\n3").answer == "1"
    assert verifier(problem, "<answer>2</answer>\n3").answer == "2"
    assert verifier(problem, "2\n3\n\n").answer == "3"


def test_a_part_of_the_full_score_is_no_reward():
    problem = sum_problem()
    # The scorer gives this a third or so: the answer is in it.
    assert ReasoningGymVerifier()(problem, f"\\boxed{{it is {problem.answer}}}").reward == 0.0


def test_another_right_answer_than_the_reference_is_rewarded():
    problem = load_reasoning_gym("countdown", {}, 1, 0, seed=0).train[0]
    # The same numbers with the same value, in other words.
    assert ReasoningGymVerifier()(problem, f"\\boxed{{({problem.answer})}}").reward == 1.0


def test_scorers_see_the_parameters_of_their_dataset():
    parts = {"datasets": [{"name": "gcd"}, {"name": "lcm"}]}
    verifier = ReasoningGymVerifier()
    for problem in load_reasoning_gym("composite", parts, 6, 0, seed=0).train:
        assert verifier(problem, f"\\boxed{{{problem.answer}}}").reward == 1.0


def test_a_scorer_that_raises_on_a_malformed_answer_is_counted_and_does_not_stop_the_run():
    problem = load_reasoning_gym("prime_factorization", {}, 1, 0, seed=0).train[0]
    pool = VerifierPool(ReasoningGymVerifier(), 5.0, 0, "stop")
    [verdict] = pool.verify([problem], ["\\boxed{garbage}"])
    assert verdict.reward == 0.0
    assert verdict.answer == "garbage"
    assert verdict.error is not None
    assert verdict.error.startswith("scorer of prime_factorization: ValueError: ")
    assert pool.num_errors == 1


def test_problems_of_another_source_are_refused():
    with pytest.raises(ValueError, match="not a reasoning_gym problem; use data=reasoning_gym"):
        ReasoningGymVerifier()(Problem(0, "q", "a", {}), "a")


def test_problems_are_scored_in_other_processes_as_in_this_one():
    problems = [
        problem
        for name in ("chain_sum", "mini_sudoku", "graph_color", "time_intervals")
        for problem in load_reasoning_gym(name, {}, 2, 0, seed=0).train
    ]
    responses = [f"<answer>{problem.answer}</answer>" for problem in problems]
    here = VerifierPool(ReasoningGymVerifier(), 5.0, 0, "stop").verify(problems, responses)
    with VerifierPool(ReasoningGymVerifier(), 5.0, 1, "stop") as pool:
        assert pool.verify(problems, responses) == here
