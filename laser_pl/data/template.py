"""From problems to prompts: the instruction, the chat template, the tokens."""

from collections.abc import Sequence
from typing import Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from laser_pl.data.problem import Problem, Prompt
from laser_pl.errors import UserError, one_line

PLACEHOLDER = "{problem}"


class PromptTemplate:
    """Puts a problem into the instruction, and that into the model's chat template or plain text.

    With the instruction "{problem}\\nAnswer in \\boxed{}." the problem "1+1=" reads, in plain text,
    "1+1=\\nAnswer in \\boxed{}.". Only "{problem}" is replaced, so that the braces of LaTeX need no
    doubling.

    Args:
        tokenizer: the model's.
        kind: "chat" for the tokenizer's chat template, "plain" for the instruction alone, "auto"
            for chat if the tokenizer has a chat template.
        instruction: the user's message; must contain "{problem}".
        system_prompt: the system message of a chat, or None.
    Raises:
        UserError: no "{problem}" in the instruction, no chat template where one is asked for or the
            template refuses the messages, or a system prompt without a chat.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        kind: Literal["auto", "chat", "plain"],
        instruction: str,
        system_prompt: str | None,
    ) -> None:
        if PLACEHOLDER not in instruction:
            raise UserError(f"data.instruction = {instruction!r}: must contain {PLACEHOLDER}")
        has_chat = bool(tokenizer.chat_template)
        if kind == "chat" and not has_chat:
            raise UserError(
                "data.template = chat: the model's tokenizer has no chat template; use "
                "data.template=plain"
            )
        self.is_chat = has_chat if kind == "auto" else kind == "chat"
        if system_prompt is not None and not self.is_chat:
            raise UserError(
                f"data.system_prompt = {system_prompt!r}: a plain template has none; use null and "
                "put it into data.instruction"
            )
        self.tokenizer = tokenizer
        self.instruction = instruction
        self.system_prompt = system_prompt
        self._bos = () if self.is_chat else _own_bos(tokenizer)
        self._check_chat_template()

    def text(self, problem: Problem) -> str:
        """The prompt as text, with the special tokens of the chat template."""
        message = self.instruction.replace(PLACEHOLDER, problem.text)
        if not self.is_chat:
            return message
        messages = [{"role": "user", "content": message}]
        if self.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        return str(
            self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )

    def encode(self, problem: Problem) -> tuple[int, ...]:
        """The prompt as token ids."""
        return self.encode_all([problem])[0]

    def encode_all(self, problems: Sequence[Problem]) -> list[tuple[int, ...]]:
        """The prompts of many problems as token ids, in one call of the tokenizer."""
        if not problems:
            return []
        texts = [self.text(problem) for problem in problems]
        # A chat template writes the special tokens itself; a plain prompt gets no EOS.
        encoded = self.tokenizer(texts, add_special_tokens=False, padding=False, truncation=False)
        return [(*self._bos, *ids) for ids in encoded["input_ids"]]

    def _check_chat_template(self) -> None:
        try:
            self.text(Problem(0, "1 + 1 =", "2", {}))
        except (TemplateError, TypeError) as error:
            system = "; try data.system_prompt=null" if self.system_prompt is not None else ""
            raise UserError(
                f"data.template: the model's chat template refuses the messages: {one_line(error)}"
                f"{system}"
            ) from None


def encode_prompts(
    problems: Sequence[Problem], template: PromptTemplate, max_prompt_tokens: int
) -> tuple[list[Prompt], int]:
    """Make prompts of problems and drop those that are too long.

    Args:
        problems: any number, none included.
        template: how a problem becomes tokens.
        max_prompt_tokens: longest prompt that is kept, in tokens.
    Returns:
        The prompts that were kept, in order, and how many were dropped.
    Raises:
        UserError: there were problems and none is left, or one has no tokens at all.
    """
    encoded = template.encode_all(problems)
    for problem, ids in zip(problems, encoded, strict=True):
        if not ids:
            raise UserError(
                f"data.instruction: problem {problem.index} has no tokens that the tokenizer "
                f"knows: {problem.text[:60]!r}"
            )
    prompts = [
        Prompt(problem, ids)
        for problem, ids in zip(problems, encoded, strict=True)
        if len(ids) <= max_prompt_tokens
    ]
    if problems and not prompts:
        raise UserError(
            f"data.max_prompt_tokens = {max_prompt_tokens}: all {len(problems)} prompts are longer"
            f"; the shortest has {min(map(len, encoded))} tokens"
        )
    return prompts, len(problems) - len(prompts)


def _own_bos(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The BOS that the tokenizer puts before a text by itself, or nothing."""
    bos = tokenizer.bos_token_id
    if bos is None or tokenizer("1")["input_ids"][:1] != [bos]:
        return ()
    return (int(bos),)
