"""Makes the shipped tiny model: `python -m laser_pl.models.tiny.pretrain --output FOLDER`.

A Llama of 0.9 million parameters and its tokenizer, from nothing but generated notebooks
(notebooks.py). The same seed, thread count, machine and library versions give the same bytes. The
shipped files are those of the default arguments: about 15 minutes on one core.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import reasoning_gym
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from laser_pl.models.tiny.notebooks import RIGHT_MARK, WRONG_MARK, Notebook, write_notebook

PAD, EOS = "<|pad|>", "<|eos|>"
RESERVED = tuple(f"<|reserved_{i}|>" for i in range(8))
VOCAB_SIZE = 512
CONTEXT_TOKENS = 1024
IGNORED = -100  # the label that cross_entropy leaves out
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] + '\n' }}{% endfor %}"

# Their questions give the tokenizer its words; other text falls back to shorter pieces and bytes.
TOKENIZER_DATASETS = (
    "chain_sum",
    "basic_arithmetic",
    "gcd",
    "lcm",
    "simple_equations",
    "products",
    "prime_factorization",
    "leg_counting",
    "letter_counting",
    "number_sorting",
    "fraction_simplification",
    "calendar_arithmetic",
)


class Example(NamedTuple):
    """One notebook as tokens.

    Attributes:
        token_ids: question, solution, EOS and one token more: the mark, or a line feed if unmarked.
        num_prompt_tokens: how many of them are the question's; they are not learnt.
    """

    token_ids: list[int]
    num_prompt_tokens: int


def pretrain(
    output: Path,
    seed: int = 0,
    steps: int = 2500,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    mark_fraction: float = 1.0,
    report_every: int = 50,
) -> None:
    """Train the tokenizer and the model, and save them as a Hugging Face model folder.

    Args:
        output: the folder to write; made if it does not exist.
        seed: of the notebooks and the initial weights.
        steps: updates.
        batch_size: notebooks an update.
        learning_rate: the highest; see schedule.
        mark_fraction: probability that a notebook bears a mark.
        report_every: updates between two lines of progress.
    """
    torch.manual_seed(seed)
    tokenizer = train_tokenizer()
    model = build_model(tokenizer)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    batches = batch_stream(tokenizer, random.Random(seed), batch_size, mark_fraction)
    start = time.monotonic()
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = learning_rate * schedule(step, steps)
        loss = update(model, optimizer, *next(batches))
        if step % report_every == 0 or step == steps:
            elapsed = time.monotonic() - start
            print(f"step {step}/{steps}  loss {loss:.4f}  {elapsed:.0f} s", flush=True)
    save(model, tokenizer, output)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of 512 tokens in which every digit is a token of its own.

    Merges may run across spaces, so that a phrase which begins every question is one token.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, EOS, *RESERVED],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(tokenizer_texts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=EOS,
        model_max_length=CONTEXT_TOKENS,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def tokenizer_texts() -> list[str]:
    """Texts that the merges are learnt from: questions, notebooks and marks."""
    questions = [
        entry["question"]
        for name in TOKENIZER_DATASETS
        for entry in reasoning_gym.create_dataset(name, size=40, seed=0)
    ]
    rng = random.Random(0)
    notebooks = [write_notebook(rng) for _ in range(400)]
    return [
        *questions,
        *(prompt_text(notebook) + notebook.solution for notebook in notebooks),
        # Often enough to become one token each.
        *([RIGHT_MARK, WRONG_MARK] * 300),
    ]


def prompt_text(notebook: Notebook) -> str:
    """The question as the model reads it before it writes a solution."""
    return notebook.question + "\n"


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with random weights: 4 layers, width 128, 0.9 million parameters."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT_TOKENS,
        # The score token needs an output row that it shares with nothing.
        tie_word_embeddings=False,
        initializer_range=0.04,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def batch_stream(
    tokenizer: PreTrainedTokenizerFast,
    rng: random.Random,
    batch_size: int,
    mark_fraction: float,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of new notebooks, each of notebooks of about equal length.

    Args:
        tokenizer: the trained tokenizer.
        rng: the only source of chance.
        batch_size: notebooks a batch.
        mark_fraction: probability that a notebook bears a mark.
    Yields:
        Token ids [B, L] and labels [B, L], see collate.
    """
    num_batches = 8
    while True:
        notebooks = [
            write_notebook(rng, mark_fraction=mark_fraction)
            for _ in range(batch_size * num_batches)
        ]
        # Sorted by length, a batch needs little padding.
        examples = sorted(encode(tokenizer, notebooks), key=lambda example: len(example.token_ids))
        starts = [i * batch_size for i in range(num_batches)]
        rng.shuffle(starts)
        for start in starts:
            yield collate(examples[start : start + batch_size], int(tokenizer.pad_token_id))


def encode(tokenizer: PreTrainedTokenizerFast, notebooks: list[Notebook]) -> list[Example]:
    """Turn notebooks into tokens.

    Args:
        tokenizer: the trained tokenizer.
        notebooks: at least one.
    Returns:
        An example for each notebook, in order.
    """
    prompts = tokenizer([prompt_text(notebook) for notebook in notebooks])["input_ids"]
    solutions = tokenizer([notebook.solution for notebook in notebooks])["input_ids"]
    last = {mark: tokenizer.encode(mark or "\n") for mark in (RIGHT_MARK, WRONG_MARK, None)}
    return [
        Example([*prompt, *solution, tokenizer.eos_token_id, *last[notebook.mark]], len(prompt))
        for notebook, prompt, solution in zip(notebooks, prompts, solutions, strict=True)
    ]


def collate(examples: list[Example], pad_id: int) -> tuple[Tensor, Tensor]:
    """Pad examples on the right to one length.

    Args:
        examples: B of them.
        pad_id: the padding token.
    Returns:
        Token ids [B, L], and labels [B, L] that are IGNORED on prompts and padding.
    """
    shape = len(examples), max(len(example.token_ids) for example in examples)
    token_ids, labels = torch.full(shape, pad_id), torch.full(shape, IGNORED)
    for row, example in enumerate(examples):
        start, end = example.num_prompt_tokens, len(example.token_ids)
        token_ids[row, :end] = torch.tensor(example.token_ids)
        labels[row, start:end] = token_ids[row, start:end]
    return token_ids, labels


def schedule(step: int, steps: int, warmup_steps: int = 100, floor: float = 0.02) -> float:
    """Share of the highest learning rate at a step, from 1: a linear rise, then a cosine."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return min(1.0, step / warmup_steps) * max(floor, cosine)


def update(
    model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, token_ids: Tensor, labels: Tensor
) -> float:
    """Make one update on a batch and return its loss, nats a token."""
    logits = model(input_ids=token_ids[:, :-1]).logits
    loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Write the model folder: weights, config, generation config and tokenizer."""
    output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(output)
    # One file fewer: the chat template goes into tokenizer_config.json.
    tokenizer.save_pretrained(output, save_jinja_files=False)
    # safetensors files are made readable by their owner alone, which does not suit a package.
    (output / "model.safetensors").chmod(0o644)


def main() -> None:
    """Command line of the script."""
    parser = argparse.ArgumentParser(description="Make the shipped tiny model.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2500, help="updates")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument(
        "--mark-fraction", type=float, default=1.0, help="share of notebooks with a teacher's mark"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pretrain(
        arguments.output,
        seed=arguments.seed,
        steps=arguments.steps,
        mark_fraction=arguments.mark_fraction,
    )


if __name__ == "__main__":
    main()
