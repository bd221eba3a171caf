import time

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from laser_pl.data.problem import Problem
from laser_pl.data.template import PromptTemplate, encode_prompts
from laser_pl.errors import UserError

CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
NO_SYSTEM = "{{ raise_exception('no system role') if messages[0]['role'] == 'system' }}" + CHAT


def make_tokenizer(chat_template=None, adds="none") -> PreTrainedTokenizerFast:
    """A tokenizer of single characters: <s> 0, </s> 1, <unk> 2, then printable ASCII."""
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2}
    for character in (chr(code) for code in [10, *range(32, 127)]):
        vocabulary[character] = len(vocabulary)
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    pattern = {"none": None, "bos": "<s> $A", "both": "<s> $A </s>", "eos": "$A </s>"}[adds]
    if pattern:
        inner.post_processor = processors.TemplateProcessing(
            single=pattern, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", chat_template=chat_template
    )


def problem(text: str = "1+1=", index: int = 0) -> Problem:
    return Problem(index, text, "2", {})


def plain(tokenizer, instruction="{problem}") -> PromptTemplate:
    return PromptTemplate(tokenizer, "plain", instruction, None)


def error_of(*arguments) -> str:
    with pytest.raises(UserError) as caught:
        PromptTemplate(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_only_the_placeholder_is_replaced():
    template = plain(make_tokenizer(), "{problem}\nPut it in \\boxed{}. {x} {{y}} %s")
    text = template.text(problem("what is {0} in {problem} \\frac{1}{2}?"))
    assert text == ("what is {0} in {problem} \\frac{1}{2}?\nPut it in \\boxed{}. {x} {{y}} %s")


@pytest.mark.parametrize(
    ("adds", "prefix"), [("none", []), ("bos", [0]), ("both", [0]), ("eos", [])]
)
def test_a_plain_prompt_has_the_tokenizers_own_bos_and_never_an_eos(adds, prefix):
    tokenizer = make_tokenizer(adds=adds)
    characters = [tokenizer.get_vocab()[c] for c in "1+1="]
    assert plain(tokenizer).encode(problem()) == (*prefix, *characters)


def test_a_chat_prompt_is_the_chat_template_and_nothing_else():
    tokenizer = make_tokenizer(CHAT, adds="both")
    template = PromptTemplate(tokenizer, "chat", "Q: {problem}", "Be brief.")
    expected = "<s>system: Be brief.</s><s>user: Q: 1+1=</s><s>assistant:"
    assert template.text(problem()) == expected
    ids = template.encode(problem())
    assert ids == tuple(tokenizer(expected, add_special_tokens=False)["input_ids"])
    assert ids.count(0) == 3  # no second BOS from the tokenizer
    assert ids.count(1) == 2


def test_auto_is_chat_where_there_is_a_chat_template():
    assert PromptTemplate(make_tokenizer(CHAT), "auto", "{problem}", None).is_chat
    assert not PromptTemplate(make_tokenizer(), "auto", "{problem}", None).is_chat
    assert not PromptTemplate(make_tokenizer(CHAT), "plain", "{problem}", None).is_chat


def test_an_instruction_without_the_problem_is_told():
    assert error_of(make_tokenizer(), "plain", "solve this", None).startswith("data.instruction = ")


def test_a_chat_without_a_chat_template_is_told():
    text = error_of(make_tokenizer(), "chat", "{problem}", None)
    assert text.startswith("data.template = chat: ")


def test_a_system_prompt_in_plain_text_is_told():
    text = error_of(make_tokenizer(), "auto", "{problem}", "Be brief.")
    assert text.startswith("data.system_prompt = 'Be brief.': a plain template has none")


def test_a_chat_template_that_refuses_a_system_message_is_told():
    text = error_of(make_tokenizer(NO_SYSTEM), "chat", "{problem}", "Be brief.")
    assert "no system role" in text
    assert "data.system_prompt=null" in text


def test_over_long_prompts_are_dropped_and_counted():
    template = plain(make_tokenizer())
    problems = [problem("1" * length, index) for index, length in enumerate([3, 5, 4, 9])]
    prompts, dropped = encode_prompts(problems, template, max_prompt_tokens=4)
    assert [prompt.problem.index for prompt in prompts] == [0, 2]
    assert [len(prompt.token_ids) for prompt in prompts] == [3, 4]
    assert dropped == 2


def test_many_prompts_are_encoded_as_one_is():
    template = PromptTemplate(make_tokenizer(CHAT), "chat", "{problem}", None)
    problems = [problem(f"{i} + {i * i} =", i) for i in range(50)]
    prompts, dropped = encode_prompts(problems, template, 1000)
    assert dropped == 0
    assert [prompt.token_ids for prompt in prompts] == [template.encode(p) for p in problems]


def test_five_thousand_prompts_take_seconds():
    template = PromptTemplate(make_tokenizer(CHAT), "chat", "{problem}", None)
    problems = [problem(f"{i} + {i * i} = " * 5, i) for i in range(5000)]
    start = time.perf_counter()
    encode_prompts(problems, template, 1000)
    assert time.perf_counter() - start < 10


def test_no_problems_are_no_prompts():
    assert encode_prompts([], plain(make_tokenizer()), 5) == ([], 0)


def test_no_prompt_left_is_told_with_the_shortest():
    with pytest.raises(UserError) as caught:
        encode_prompts([problem("11111"), problem("1111111")], plain(make_tokenizer()), 4)
    assert str(caught.value) == (
        "data.max_prompt_tokens = 4: all 2 prompts are longer; the shortest has 5 tokens"
    )


def test_a_prompt_that_the_tokenizer_cannot_read_is_told():
    # A BPE without an unknown token lets characters that are not in its vocabulary vanish.
    inner = Tokenizer(models.BPE({"1": 0, "</s>": 1}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    with pytest.raises(UserError, match=r"data\.instruction: problem 7 has no tokens"):
        encode_prompts([problem("\u4e00", 7)], plain(tokenizer), 4)
