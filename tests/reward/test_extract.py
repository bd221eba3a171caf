import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from laser_pl.reward.extract import last_boxed, last_line, last_tagged


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{4}, no: \boxed{ 5 }", "5"),
        (r"\boxed {5}", "5"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{ \boxed{ \boxed{5} } }", "5"),
        (r"\boxed{x = \boxed{5}}", r"x = \boxed{5}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ 1 \right.}", r"\left\{ 1 \right."),
        (r"\boxed{a \\}", r"a \\"),
        ("\\boxed{two\nlines}", "two\nlines"),
        (r"{ } } { \boxed{5}", "5"),
        (r"\boxed{4} and \boxed{5", "4"),
        (r"\boxed{4 { 5}", None),
        (r"\boxed{", None),
        (r"\boxed{}", None),
        (r"\boxed{  }", None),
        (r"\boxed 5", None),
        ("", None),
    ],
)
def test_the_last_balanced_box_is_found(response, expected):
    assert last_boxed(response) == expected


def slow_last_boxed(response: str) -> str | None:
    """The last-closing box by trying all pairs of a start and an end; no escapes, no nesting."""
    best: tuple[int, int] | None = None
    for start in range(len(response)):
        if not response.startswith(r"\boxed{", start):
            continue
        depth = 0
        for end in range(start + 6, len(response)):
            depth += {"{": 1, "}": -1}.get(response[end], 0)
            if depth == 0:
                if best is None or end > best[1]:
                    best = (start, end)
                break
    return response[best[0] + 7 : best[1]].strip() or None if best else None


@given(st.lists(st.sampled_from(["\\boxed{a", "{", "}", "b ", " c"]), max_size=30).map("".join))
def test_boxes_are_found_as_by_trying_all_of_them(response):
    assert last_boxed(response) == slow_last_boxed(response)


@given(st.text(alphabet="\\boxed{}5 \n", max_size=200))
def test_any_text_is_read_without_an_exception(response):
    for extract in (last_boxed, last_line, last_tagged):
        answer = extract(response)
        assert answer is None or answer == answer.strip() != ""


@pytest.mark.parametrize("part", ["\\boxed{", "{", "}", "\\", "\\boxed{}", "\\boxed{1", " \\boxed"])
def test_a_long_response_is_read_in_linear_time(part):
    start = time.perf_counter()
    last_boxed(part * 200_000 + "}" * 200_000)
    assert time.perf_counter() - start < 5


def test_the_last_line_is_the_last_one_that_is_not_blank():
    assert last_line("a\n b \n\n  \n") == "b"
    assert last_line(" \n") is None
    assert last_line("") is None


def test_the_last_tagged_answer_is_found():
    assert last_tagged("<answer>1</answer> <answer> 2\n3 </answer> bye") == "2\n3"
    assert last_tagged("<answer>1</answer> <answer>2") == "1"
    assert last_tagged("<answer></answer>") is None
    assert last_tagged("</answer> 1 <answer>") is None
