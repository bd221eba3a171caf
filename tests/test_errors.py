from laser_pl.errors import one_line, suggestion


def test_a_message_of_several_lines_becomes_one():
    assert one_line(ValueError("first\n   second\n")) == "ValueError: first second"


def test_an_exception_without_a_message_is_its_type():
    assert one_line(KeyError()) == "KeyError"


def test_a_long_message_is_cut():
    text = one_line(ValueError("x" * 1000), limit=50)
    assert len(text) == 50
    assert text.endswith("...")


def test_the_nearest_name_is_suggested_and_a_far_one_is_not():
    assert suggestion("chain_sums", ["gcd", "chain_sum"]) == "; did you mean chain_sum?"
    assert suggestion("zzz", ["gcd", "chain_sum"]) == ""
