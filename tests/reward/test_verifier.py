import os
import signal
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from laser_pl.data.problem import Problem
from laser_pl.errors import UserError
from laser_pl.reward import verifier as module
from laser_pl.reward.exact_verifier import ExactVerifier
from laser_pl.reward.verifier import (
    Verdict,
    VerifierPool,
    answers_equivalent,
    canonical_answers,
    resolve_verifier,
)

USER_MODULE = """
    import ctypes, os, signal, sys, time

    NUMBER = 3

    def misbehave(problem, response):
        if response == "hang":
            time.sleep(60)
        if response == "busy":
            while True:
                pass
        if response == "exit":
            os._exit(3)
        if response == "segfault":
            ctypes.string_at(0)
        if response == "raise":
            raise ValueError("two\\nlines")
        if response == "sys.exit":
            sys.exit("bye")
        if response == "timeout error":
            raise TimeoutError("from a server")
        if response == "torch":
            return "torch" in sys.modules
        if response == "sigint":
            os.kill(os.getpid(), signal.SIGINT)
        return response == problem.answer

    def give(problem, response, value):
        return {"half": 0.5, "nan": float("nan"), "none": None, "text": "1.0x"}.get(value, value)

    def no_response(problem):
        return 1

    def needs(problem, response, strictness, limit=3):
        return 1

    def any_option(problem, response, **options):
        return float(options == {"a": 1, "b": 2})

    class Tolerant:
        def __init__(self, tolerance, scale=1.0):
            if tolerance < 0:
                raise ValueError("tolerance must not be negative")
            self.tolerance = tolerance
        def __call__(self, problem, response):
            close = abs(float(response) - float(problem.answer)) <= self.tolerance
            return close, response
        def equivalent(self, a, b):
            if "hang" in (a, b):
                time.sleep(60)
            return abs(float(a) - float(b)) <= self.tolerance

    class NotCallable:
        pass
"""


@pytest.fixture(autouse=True)
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's module, importable here and in the processes."""
    (tmp_path / "users_own.py").write_text(textwrap.dedent(USER_MODULE))
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "needs_more.py").write_text("import not_installed_anywhere\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("users_own", "broken", "needs_more"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def problems(*answers: str, start: int = 0) -> list[Problem]:
    return [Problem(start + i, f"question {i}", answer, {}) for i, answer in enumerate(answers)]


def pool_of(
    target: str, num_workers: int = 2, timeout_s: float = 1.0, on_error: str = "zero", **arguments
) -> VerifierPool:
    verifier = resolve_verifier(f"users_own.{target}", arguments)
    return VerifierPool(verifier, timeout_s, num_workers, on_error)  # type: ignore[arg-type]


def resolve_error(target: str, **arguments) -> str:
    with pytest.raises(UserError) as caught:
        resolve_verifier(target, arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Finding a verifier


def test_a_class_is_made_with_its_arguments():
    verifier = resolve_verifier(
        "laser_pl.reward.exact_verifier.ExactVerifier", {"extract": "last_line"}
    )
    assert isinstance(verifier, ExactVerifier)
    assert verifier.extract == "last_line"


def test_a_function_gets_its_arguments_with_each_call():
    [problem] = problems("a")
    assert resolve_verifier("users_own.any_option", {"a": 1, "b": 2})(problem, "") == 1.0
    assert resolve_verifier("users_own.any_option", {"a": 1})(problem, "") == 0.0


def test_a_module_in_the_current_folder_is_found(tmp_path, monkeypatch):
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "only_here.py").write_text("def check(problem, response):\n    return 1\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(folder)
    assert resolve_verifier("only_here.check", {})(problems("a")[0], "") == 1


@pytest.mark.parametrize(
    ("target", "arguments", "expected"),
    [
        ("exact", {}, "verifier._target_ = exact: must be a path"),
        (
            "no_such.f",
            {},
            "verifier._target_ = no_such.f: module no_such cannot be imported: Module",
        ),
        ("broken.f", {}, "module broken cannot be imported: SyntaxError"),
        ("needs_more.f", {}, "No module named 'not_installed_anywhere'"),
        ("users_own.misbehav", {}, "users_own has no misbehav; did you mean misbehave?"),
        ("users_own.NUMBER", {}, "verifier._target_ = users_own.NUMBER: a int; must be"),
        ("users_own.NotCallable", {}, "its objects cannot be called"),
        ("users_own.no_response", {}, "must take (problem, response), takes (problem)"),
        (
            "users_own.needs",
            {},
            "missing a required argument: 'strictness'; it takes strictness, l",
        ),
        (
            "users_own.needs",
            {"strictnes": 1},
            "verifier.arguments.strictnes: no such argument of users_own.needs; did you mean",
        ),
        ("users_own.needs", {"problem": 1, "strictness": 1}, "verifier.arguments.problem: "),
        ("users_own.Tolerant", {}, "missing a required argument: 'tolerance'"),
        (
            "users_own.Tolerant",
            {"tolerance": 1, "by": 2},
            "verifier.arguments.by: no such argument",
        ),
        ("users_own.Tolerant", {"tolerance": -1}, "tolerance must not be negative"),
        (
            "laser_pl.reward.exact_verifier.ExactVerifier",
            {"extract": "first"},
            "verifier.arguments.extract = 'first'",
        ),
        (
            "laser_pl.reward.reasoning_gym_verifier.ReasoningGymVerifier",
            {"strict": True},
            "verifier.arguments.strict: no such argument of",
        ),
    ],
)
def test_a_bad_target_or_argument_is_told(target, arguments, expected):
    assert expected in resolve_error(target, **arguments)


# Verdicts


@pytest.mark.parametrize("num_workers", [0, 2])
def test_verdicts_come_in_the_order_of_the_responses(num_workers):
    answers = [str(i) for i in range(100)]
    responses = [str(i if i % 3 else -1) for i in range(100)]
    with pool_of("misbehave", num_workers) as pool:
        verdicts = pool.verify(problems(*answers), responses)
    assert [verdict.reward for verdict in verdicts] == [float(i % 3 > 0) for i in range(100)]
    assert pool.counts == {"num_timeouts": 0, "num_crashes": 0, "num_errors": 0}


def test_a_verifier_of_rewards_alone_gets_the_last_box_as_answer():
    with pool_of("any_option", 0, a=1, b=2) as pool:
        assert pool.verify(problems("x"), [r"so \boxed{7}"]) == [Verdict(1.0, "7", None)]
        assert pool.verify(problems("x"), ["so 7"]) == [Verdict(1.0, None, None)]


@pytest.mark.parametrize("value", [0, 1, 0.0, 1.0, True, False])
def test_rewards_may_be_written_in_several_ways(value):
    [verdict] = pool_of("give", 0, value=value).verify(problems("x"), [""])
    assert verdict.reward == float(value)
    assert type(verdict.reward) is float


@pytest.mark.parametrize("value", ["half", "nan", "none", "text", 2, -1])
def test_a_reward_that_is_not_0_or_1_is_an_error(value):
    with pytest.raises(
        UserError, match=r"verifier: problem 5: ValueError: .* rewards must be 0 or 1"
    ):
        pool_of("give", 0, on_error="stop", value=value).verify(problems("x", start=5), [""])
    pool = pool_of("give", 0, on_error="zero", value=value)
    assert pool.verify(problems("x"), [""])[0].reward == 0.0
    assert pool.num_errors == 1


def test_problems_and_responses_must_be_as_many():
    with pytest.raises(ValueError):
        pool_of("misbehave", 0).verify(problems("a", "b"), ["a"])


def test_no_responses_are_no_verdicts():
    with pool_of("misbehave", 2) as pool:
        assert pool.verify([], []) == []


# Hanging, crashing, raising


def test_what_hangs_or_crashes_is_scored_0_and_counted_and_the_others_are_not_affected():
    responses = ["a", "hang", "exit", "b", "busy", "a", "segfault", "a", "timeout error"]
    with pool_of("misbehave") as pool:
        for round_number in (1, 2):
            verdicts = pool.verify(problems(*"a" * 9), responses)
            assert [verdict.reward for verdict in verdicts] == [1, 0, 0, 0, 0, 1, 0, 1, 0]
            assert [verdict.error for verdict in verdicts] == [
                None,
                "timeout",
                "crash",
                None,
                "timeout",
                None,
                "crash",
                None,
                "TimeoutError: from a server",
            ]
            assert pool.counts == {
                "num_timeouts": 2 * round_number,
                "num_crashes": 2 * round_number,
                "num_errors": round_number,
            }


def test_a_hanging_verification_is_cut_off_in_time():
    with pool_of("misbehave", 1, timeout_s=0.5) as pool:
        pool.verify(problems("a"), ["a"])  # starts the process
        start = time.perf_counter()
        pool.verify(problems("a"), ["hang"])
        assert 0.4 < time.perf_counter() - start < 3


def test_every_response_may_crash():
    with pool_of("misbehave") as pool:
        verdicts = pool.verify(problems(*"a" * 12), ["exit"] * 12)
        assert {verdict.error for verdict in verdicts} == {"crash"}
        assert pool.num_crashes == 12
        assert pool.verify(problems("a"), ["a"])[0].reward == 1.0


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_exception_stops_with_the_problem_and_the_message(num_workers):
    with pool_of("misbehave", num_workers, on_error="stop") as pool:
        with pytest.raises(UserError) as caught:
            pool.verify(problems(*"aaa", start=16), ["a", "raise", "a"])
        assert str(caught.value).startswith("verifier: problem 17: ValueError: two lines; ")
        assert "verifier.on_error=zero" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_exception_is_scored_0_and_counted_where_that_is_asked_for(num_workers):
    with pool_of("misbehave", num_workers, on_error="zero") as pool:
        verdicts = pool.verify(problems(*"aaa"), ["a", "raise", "sys.exit"])
    assert verdicts == [
        Verdict(1.0, None, None),
        Verdict(0.0, None, "ValueError: two lines"),
        Verdict(0.0, None, "SystemExit: bye"),
    ]
    assert pool.num_errors == 2


def test_a_timeout_does_not_stop_the_run_where_exceptions_do():
    with pool_of("misbehave", 1, timeout_s=0.3, on_error="stop") as pool:
        assert pool.verify(problems("a"), ["hang"])[0].error == "timeout"


def test_a_pool_that_breaks_is_started_again():
    with pool_of("misbehave") as pool:
        pool.verify(problems("a"), ["a"])
        assert pool._processes is not None
        for pid in list(pool._processes._pool_manager.worker_manager.workers):
            os.kill(pid, signal.SIGKILL)  # idle: no verification is to blame
        time.sleep(0.3)
        verdicts = pool.verify(problems(*"aaaa"), ["a"] * 4)
        assert [verdict.reward for verdict in verdicts] == [1.0] * 4


def test_processes_that_die_as_they_start_are_told(monkeypatch):
    monkeypatch.setattr(module, "_start_worker", os._exit)
    pool = pool_of("misbehave", 1)
    pool._pickled = 3  # type: ignore[assignment]  # os._exit(3)
    with pool, pytest.raises(UserError, match="its processes die as they start"):
        pool.verify(problems("a"), ["a"])


# Processes


def test_the_processes_import_no_torch():
    with pool_of("misbehave") as pool:
        assert pool.verify(problems("a"), ["torch"])[0].reward == 0.0


def test_256_cheap_verifications_take_no_seconds():
    with pool_of("misbehave") as pool:
        pool.verify(problems("a"), ["a"])
        start = time.perf_counter()
        pool.verify(problems(*"a" * 256), ["a"] * 256)
        assert time.perf_counter() - start < 1.5


def test_ctrl_c_does_not_reach_the_processes():
    with pool_of("misbehave") as pool:
        assert pool.verify(problems("sigint"), ["sigint"])[0] == (1.0, None, None)


@pytest.fixture
def ctrl_c_interrupts():
    """A shell that starts the tests in the background has Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_interrupts")
def test_ctrl_c_interrupts_the_waiting_and_the_pool_goes_on_afterwards():
    with pool_of("misbehave", 1, timeout_s=30.0) as pool:
        pool.verify(problems("a"), ["a"])
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        start = time.perf_counter()
        with pytest.raises(KeyboardInterrupt):
            pool.verify(problems("a", "a"), ["hang", "a"])
        assert pool.verify(problems("a"), ["a"])[0].reward == 1.0
        assert time.perf_counter() - start < 10


def test_a_closed_pool_leaves_no_processes_and_may_be_used_again():
    pool = pool_of("misbehave")
    pool.verify(problems("a"), ["a"])
    assert pool._processes is not None
    pids = list(pool._processes._pool_manager.worker_manager.workers)
    pool.close()
    assert pids
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert pool.verify(problems("a"), ["a"])[0].reward == 1.0
    pool.close()
    pool.close()


def test_a_verifier_that_cannot_be_sent_is_told():
    with pytest.raises(
        UserError, match=r"^verifier: cannot be sent to another process: .*num_workers=0"
    ):
        VerifierPool(lambda problem, response: 1.0, 1.0, 2, "stop")


def test_a_problem_that_cannot_be_sent_is_told_with_its_index():
    problem = Problem(4, "q", "a", {"function": lambda: 1})
    with pool_of("misbehave", 1, on_error="stop") as pool, pytest.raises(UserError) as caught:
        pool.verify([problem], ["a"])
    assert str(caught.value).startswith("verifier: problem 4: cannot be sent to a process: ")


# Votes


def test_without_equivalent_answers_are_the_same_if_their_stripped_texts_are():
    verifier = resolve_verifier("users_own.misbehave", {})
    assert answers_equivalent(verifier, "a ", "a")
    assert not answers_equivalent(verifier, "1.0", "1")
    assert canonical_answers(verifier, ["a ", None, "a", "b"]) == ["a ", None, "a ", "b"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_equivalent_answers_become_the_first_of_them_problem_by_problem(num_workers):
    with pool_of("Tolerant", num_workers, tolerance=0.01) as pool:
        answers = pool.canonical_answers([["1", None, "1.0", "2", "1.005"], ["1.0", "1"], []])
    assert answers == [["1", None, "1", "2", "1"], ["1.0", "1.0"], []]


def test_a_comparison_that_hangs_falls_back_to_texts_and_is_counted():
    with pool_of("Tolerant", 2, timeout_s=0.5, tolerance=0.01) as pool:
        answers = pool.canonical_answers([["1", "hang", "1.0", "1 "], ["1", "1.0"]])
    assert answers == [["1", "hang", "1.0", "1"], ["1", "1"]]
    assert pool.num_timeouts == 1


def test_a_comparison_that_raises_follows_on_error():
    with pytest.raises(UserError, match="verifier: equivalent, answers to problem 1: ValueError"):
        pool_of("Tolerant", 0, on_error="stop", tolerance=1).canonical_answers([[], ["1", "x"]])
    pool = pool_of("Tolerant", 0, on_error="zero", tolerance=1)
    assert pool.canonical_answers([["1", "x", "1"]]) == [["1", "x", "1"]]
    assert pool.num_errors == 1


def test_a_plain_tuple_is_not_a_verdict():
    with pytest.raises(UserError, match="rewards must be 0 or 1"):
        pool_of("Tolerant", 0, on_error="stop", tolerance=1).verify(problems("1"), ["1"])
