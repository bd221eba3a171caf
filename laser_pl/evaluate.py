"""`task=evaluate`: how well a model answers held-out problems, and judges its own answers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from laser_pl.config import Config, HFRollout, validate
from laser_pl.data.datamodule import PromptDataModule
from laser_pl.data.problem import Prompt
from laser_pl.distributed import (
    derive_seed,
    gather_over_ranks,
    on_all_ranks,
    rank,
    share_of_rank,
)
from laser_pl.errors import UserError, one_line
from laser_pl.evaluation.adaptive import is_decided
from laser_pl.evaluation.held_out import problem_lines, to_samples
from laser_pl.evaluation.report import (
    EvaluationSamples,
    adaptive_summary,
    detailed_summary,
    join_samples,
)
from laser_pl.hub import file_of_model
from laser_pl.launch import is_rank_zero
from laser_pl.logs.files import write_json_atomically, write_text_atomically
from laser_pl.logs.samples import Sample, SamplesFile, lines_of, read_samples
from laser_pl.logs.terminal import print_summary
from laser_pl.models.loading import resolve_path
from laser_pl.preflight import max_positions, model_settings
from laser_pl.report import draw_evaluations, list_files, score_facts
from laser_pl.rollout.callback import calibrate
from laser_pl.rollout.micro_batches import make_plan
from laser_pl.rollout.scoring import add_scores
from laser_pl.setup import Inputs, check_output_dir, prepare_inputs, prepare_output_dir
from laser_pl.train import (
    EXIT_FAILED,
    build_collector,
    build_module,
    is_lost_peer,
    quieten_libraries,
    tell_lost_peer,
)
from laser_pl.training.module import LaserModule

# Responses that vLLM gets at once; the hf engine gets as many as it generates at once.
VLLM_SEQUENCES = 2048
# Of output_dir/progress: what was sampled before an interruption.
KNOWN = "known.jsonl"
# Beside it, the constant that their scores were made with: measured anew it could be another.
CONSTANT = "c_ref.json"
# Below this share of finished responses the limit is likely too small.
FEW_FINISHED = 0.5


def evaluate(config: Config) -> int:
    """Sample K responses to each held-out problem and report accuracy, votes and self-judgement.

    Token, beta and c_ref come from the model's self_reward.json where it has one. Every rank does
    its share of the problems. What is sampled is kept in output_dir/progress until the end, so
    that resume=auto goes on from it.

    Returns:
        The exit code: 0, 1 if another rank has died.
    Raises:
        UserError: whatever of the input will not do.
    """
    start = time.perf_counter()
    quieten_libraries()
    console = Console(quiet=not is_rank_zero())
    config = with_exported_score(config, console)
    if config.resume not in (None, "auto"):
        raise UserError(f"resume = {config.resume}: an evaluation has no checkpoints; use auto")
    if is_rank_zero():
        check_output_dir(config, console=console)
    config = with_length_that_fits(config, console)
    inputs = prepare_inputs(config, console)
    folder = Path(config.output_dir)
    if is_rank_zero():
        prepare_output_dir(config)
    this_rank = 0
    try:
        with processes(config) as device:
            this_rank = rank()
            torch.manual_seed(config.seed)
            if config.trainer.num_threads:
                torch.set_num_threads(config.trainer.num_threads)
            module = build_module(config, inputs)
            module.setup("predict")
            module.to(device)
            found = _Evaluation(config, inputs, module, folder, console).run()
            if rank() == 0:
                facts = score_facts(config, module, inputs)
                _report(config, found, facts, folder, console, start)
    except KeyboardInterrupt:
        console.print(f"interrupted: go on with output_dir={folder} resume=auto", highlight=False)
        raise
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        tell_lost_peer(error, this_rank, folder)
        return EXIT_FAILED
    finally:
        inputs.verifier.close()
    return 0


@contextmanager
def processes(config: Config) -> Iterator[torch.device]:
    """Start the ranks, or join those that a launcher has started, and end the group at the end."""
    several = config.num_ranks > 1
    timeout = timedelta(minutes=config.trainer.timeout_minutes)
    fabric = Fabric(
        accelerator=config.trainer.accelerator,
        devices=config.trainer.devices,
        num_nodes=config.trainer.num_nodes,
        strategy=DDPStrategy(timeout=timeout) if several else "auto",
    )
    if several:
        fabric.launch()
    try:
        yield fabric.device
    finally:
        if several and dist.is_initialized():
            dist.destroy_process_group()


def with_exported_score(config: Config, console: Console) -> Config:
    """The configuration with token, beta and c_ref of the model's self_reward.json, if any."""
    model = resolve_path(config.model.path)
    path = file_of_model(model, "self_reward.json", config.model.revision)
    if path is None:
        if config.self_reward.token == "auto":
            raise UserError(
                f"self_reward.token = auto: {config.model.path} has no self_reward.json that names "
                "one; give it, or let task=calibrate find one"
            )
        return config
    facts = _read_facts(path)
    console.print(
        f"score: {facts['special_token']}, beta {facts['beta']}, c_ref {facts['c_ref']:.2f}, from "
        "the model's self_reward.json",
        highlight=False,
        markup=False,
    )
    raw = config.model_dump(by_alias=True)
    raw["self_reward"] |= {
        "token": facts["token_id"],
        "beta": facts["beta"],
        "c_ref": facts["c_ref"],
        "incorrect_token": facts.get("incorrect_token_id"),
        "score": facts.get("score", "log_ratio"),
        "loss": facts.get("loss", "mse"),
    }
    return validate(raw)


def with_length_that_fits(config: Config, console: Console) -> Config:
    """The configuration with responses no longer than the model's context leaves to them."""
    positions, limit = max_positions(model_settings(config)), config.rollout.max_response_tokens
    room = positions - config.data.max_prompt_tokens
    if limit <= room or room < max(1, config.rollout.min_response_tokens):
        return config
    console.print(
        f"rollout.max_response_tokens: {room} in place of {limit}, which with prompts of up to "
        f"{config.data.max_prompt_tokens} are more than the model's {positions} positions",
        highlight=False,
    )
    raw = config.model_dump(by_alias=True)
    raw["rollout"]["max_response_tokens"] = room
    return validate(raw)


def _read_facts(path: Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads(path.read_text())
        needed = {name: facts[name] for name in ("special_token", "token_id")}
        return {**facts, **needed} | {name: float(facts[name]) for name in ("beta", "c_ref")}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: {one_line(error)}; export the model again") from None


@dataclass
class _Problem:
    """The samples of one problem, and their answers as they vote."""

    lines: list[Sample]
    votes: list[str | None]


class _Evaluation:
    """Samples the responses of this rank's problems, group by group, and keeps them on the disk."""

    def __init__(
        self, config: Config, inputs: Inputs, module: LaserModule, folder: Path, console: Console
    ) -> None:
        self.config, self.module, self.console = config, module, console
        self.collector = build_collector(config, inputs)
        self.prompts = inputs.held_out[: config.evaluation.num_problems]
        self.folder = folder
        self._measure_constant()

    def run(self) -> list[_Problem]:
        """The problems with their samples, in order; all of them on rank 0."""
        known = self._known()
        if known and rank() == 0:
            self.console.print(
                f"resume: {len(known)} of {len(self.prompts)} problems are sampled already",
                highlight=False,
            )
        gather_over_ranks([0])  # everyone has read what was there before it changes
        if rank() == 0:
            self._keep_only(known)
        gather_over_ranks([0])
        found = on_all_ranks(lambda: self._sample_share(known))
        everything = gather_over_ranks(sorted(found.items()))
        return [problem for _, problem in sorted(everything)]

    def _sample_share(self, known: dict[int, list[Sample]]) -> dict[int, _Problem]:
        """This rank's problems, by index: those that are known, and the others sampled."""
        file = SamplesFile(self.folder / "progress" / f"rank-{rank()}.jsonl")
        mine = share_of_rank(self.prompts)
        samples = self.config.evaluation.samples_per_problem
        found: dict[int, _Problem] = {}
        engine = self.collector.engine
        with self._bar(len(mine) * samples) as advance, engine.weights_of(self.module.policy):
            for group in self._groups(mine):
                numbers = [prompt.problem.index for prompt in group]
                if all(number in known for number in numbers):
                    part = self._with_votes({number: known[number] for number in numbers})
                else:
                    part = self._sample(group)
                    new = [part[number] for number in numbers if number not in known]
                    file.write(line for problem in new for line in problem.lines)
                    part |= self._with_votes({n: known[n] for n in numbers if n in known})
                found |= part
                advance(found, len(group) * samples)
        return found

    def _sample(self, group: list[Prompt]) -> dict[int, _Problem]:
        """The samples of a group's problems: K each, or adaptively fewer."""
        settings = self.config.evaluation
        most = settings.samples_per_problem
        batch = settings.adaptive_batch if settings.adaptive else most
        # From the problems alone, so that any number of ranks draws the same group the same way.
        seed = derive_seed(self.config.seed, "evaluate", group[0].problem.index, len(group))
        lines: dict[int, list[Sample]] = {prompt.problem.index: [] for prompt in group}
        problems: dict[int, _Problem] = {}
        open_prompts = group
        for drawn in range(0, most, batch):
            number = min(batch, most - drawn)
            collected = self.collector.collect(open_prompts, number, derive_seed(seed, drawn))
            add_scores(
                collected.batch,
                self.module,
                lambda done=collected.batch: make_plan(  # type: ignore[misc]
                    done, self.config, self.module.policy.config, same_number=False
                ),
            )
            rows = problem_lines(collected, number, self.collector, step=0)
            for prompt, row in zip(open_prompts, rows, strict=True):
                lines[prompt.problem.index] += row
            problems |= self._with_votes(
                {p.problem.index: lines[p.problem.index] for p in open_prompts}
            )
            open_prompts = [p for p in open_prompts if not self._is_done(problems[p.problem.index])]
            if not open_prompts:
                break
        return problems

    def _is_done(self, problem: _Problem) -> bool:
        settings = self.config.evaluation
        return settings.adaptive and is_decided(
            problem.votes,
            [line.score for line in problem.lines],
            settings.samples_per_problem - len(problem.lines),
            settings.adaptive_confidence,
        )

    def _with_votes(self, lines: dict[int, list[Sample]]) -> dict[int, _Problem]:
        answers = [[line.answer for line in row] for row in lines.values()]
        votes = self.collector.verifier.canonical_answers(answers)
        return {
            number: _Problem(row, names)
            for (number, row), names in zip(lines.items(), votes, strict=True)
        }

    def _groups(self, prompts: list[Prompt]) -> list[list[Prompt]]:
        """As many problems at a time as the engine takes at once."""
        rollout, samples = self.config.rollout, self.config.evaluation.samples_per_problem
        sequences = rollout.max_sequences if isinstance(rollout, HFRollout) else VLLM_SEQUENCES
        size = max(1, sequences // samples)
        return [prompts[start : start + size] for start in range(0, len(prompts), size)]

    def _known(self) -> dict[int, list[Sample]]:
        """The problems that an interrupted evaluation has sampled whole, by index."""
        files = [self.folder / "samples.jsonl", *sorted(self.folder.glob("progress/*.jsonl"))]
        names = {field.name for field in fields(Sample)}
        known: dict[int, list[Sample]] = {}
        for file in files:
            lines: dict[int, list[Sample]] = {}
            for row in read_samples(file) if file.is_file() else []:
                sample = Sample(**{name: row[name] for name in names})
                lines.setdefault(sample.problem, []).append(sample)
            known |= {number: row for number, row in lines.items() if self._is_whole(number, row)}
        prompts = {prompt.problem.index: prompt for prompt in self.prompts}
        return {
            number: row
            for number, row in known.items()
            if number in prompts
            and self._asked(prompts[number]) == (row[0].prompt, row[0].reference_answer)
        }

    def _asked(self, prompt: Prompt) -> tuple[str, str]:
        """What samples hold of a problem, which may have changed in its file since."""
        text = str(self.collector.tokenizer.decode(list(prompt.token_ids)))
        return text, prompt.problem.answer

    def _is_whole(self, number: int, lines: list[Sample]) -> bool:
        settings = self.config.evaluation
        is_a_look = settings.adaptive and len(lines) % settings.adaptive_batch == 0
        if is_a_look and len(lines) < settings.samples_per_problem:
            return self._is_done(self._with_votes({number: lines})[number])
        return len(lines) == settings.samples_per_problem

    def _keep_only(self, known: dict[int, list[Sample]]) -> None:
        """Leave whole problems alone on the disk: others are sampled again from their start."""
        folder = self.folder / "progress"
        folder.mkdir(exist_ok=True)
        old = [file for file in folder.glob("*.jsonl") if file.name != KNOWN]
        write_json_atomically(folder / CONSTANT, {"c_ref": self.module.c_ref})
        text = lines_of(line for row in known.values() for line in row)
        write_text_atomically(folder / KNOWN, text)
        for file in old:
            file.unlink()

    def _measure_constant(self) -> None:
        given = self.config.self_reward.c_ref
        for path in (self.folder / "progress" / CONSTANT, self.folder / "summary.json"):
            if isinstance(given, str) and path.is_file():
                given = json.loads(path.read_text())["c_ref"]
        if not isinstance(given, str):
            self.module.c_ref = given
            return
        # There are no training prompts here; the held-out ones do, rewards are not looked at.
        config = self.config
        number = max(config.num_ranks, min(config.prompts_per_step, len(self.prompts)))
        data = PromptDataModule(self.prompts, [], number, 1, config.seed)
        calibrate(self.module, self.collector, data, config)

    @contextmanager
    def _bar(self, total: int) -> Iterator[Callable[[dict[int, _Problem], int], None]]:
        """A progress bar over this rank's responses, with the accuracy so far; rank 0 shows its."""
        columns = (
            TextColumn("evaluate"), BarColumn(), MofNCompleteColumn(), TextColumn("responses"),
            TextColumn("{task.fields[accuracy]}"), TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task("evaluate", total=total, accuracy="")

            def advance(found: dict[int, _Problem], number: int) -> None:
                rewards = [line.reward for problem in found.values() for line in problem.lines]
                accuracy = f"accuracy {sum(rewards) / len(rewards):.3f}"
                progress.update(task, advance=number, accuracy=accuracy)

            yield advance


def _report(
    config: Config,
    found: list[_Problem],
    facts: dict[str, Any],
    folder: Path,
    console: Console,
    start: float,
) -> None:
    """Write samples.jsonl, summary.json and the figures, and print the table."""
    settings = config.evaluation
    lines = [problem.lines for problem in found]
    votes = [problem.votes for problem in found]
    # Written whole, in the order of the problems; only then the progress may go.
    text = lines_of(line for row in lines for line in row)
    write_text_atomically(folder / "samples.jsonl", text)
    for file in folder.glob("progress/*.json*"):
        file.unlink()
    (folder / "progress").rmdir()
    if settings.adaptive:
        problems = [to_samples([row], [names]) for row, names in zip(lines, votes, strict=True)]
        samples: EvaluationSamples = join_samples(problems)
        summary = adaptive_summary(problems, settings.samples_per_problem)
    else:
        samples = to_samples(lines, votes)
        batch, confidence = settings.adaptive_batch, settings.adaptive_confidence
        summary = detailed_summary(samples, batch, confidence)
    (folder / "figures").mkdir(exist_ok=True)
    draw_evaluations(None, samples, folder / "figures", with_votes=not settings.adaptive)
    total = time.perf_counter() - start
    write_json_atomically(folder / "summary.json", {**summary, **facts, "time": {"total": total}})
    finished = 1 - summary["truncated_fraction"]
    if finished < FEW_FINISHED:
        console.print(
            f"warning: only {finished:.0%} of the responses ended within "
            f"rollout.max_response_tokens = {config.rollout.max_response_tokens}; a larger one "
            "would measure the model better",
            highlight=False,
        )
    print_summary(None, summary, list_files(folder), console)
    console.print(_words_on_adaptive(summary["adaptive"]), highlight=False)
    console.print(
        f"{summary['num_samples']:,} responses, {summary['response_tokens']:,} tokens, "
        f"{total:,.0f} s",
        highlight=False,
    )


def _words_on_adaptive(found: dict[str, float]) -> str:
    """What stopping early saved, or would have saved with a fixed K."""
    drawn = f"{found['samples_per_problem']:.3g} samples a problem"
    if "equal_fixed_k" not in found:
        return f"adaptive sampling: {drawn}, {found['saved_fraction']:.0%} saved"
    return (
        f"adaptive sampling would take {drawn}, {found['saved_fraction']:.0%} less: weighted vote "
        f"{found['weighted']:.3f} in place of {found['weighted_fixed']:.3f}, as that of a fixed "
        f"{found['equal_fixed_k']}"
    )
