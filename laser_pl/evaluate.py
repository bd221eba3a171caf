"""`task=evaluate`: how well a model answers held-out problems, and judges its own answers."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from laser_pl.config import Config, validate
from laser_pl.data.datamodule import PromptDataModule
from laser_pl.errors import UserError, one_line
from laser_pl.evaluation.held_out import Evaluation, evaluate_prompts
from laser_pl.evaluation.report import evaluation_summary
from laser_pl.logs.files import write_json_atomically
from laser_pl.logs.samples import SamplesFile
from laser_pl.logs.terminal import print_summary
from laser_pl.models.loading import resolve_path
from laser_pl.report import draw_evaluations, list_files, score_facts
from laser_pl.rollout.callback import calibrate
from laser_pl.rollout.micro_batches import make_plan
from laser_pl.rollout.scoring import add_scores
from laser_pl.setup import Inputs, check_output_dir, prepare_inputs, prepare_output_dir
from laser_pl.train import build_collector, build_module, quieten_libraries
from laser_pl.training.module import LaserModule


def evaluate(config: Config) -> int:
    """Sample K responses to each held-out problem and report accuracy, votes and self-judgement.

    Token, beta and c_ref come from the model's self_reward.json where it has one.

    Returns:
        The exit code, 0.
    Raises:
        UserError: whatever of the input will not do.
    """
    start = time.perf_counter()
    quieten_libraries()
    console = Console()
    config = with_exported_score(config, console)
    check_output_dir(config)
    inputs = prepare_inputs(config, console)
    folder = prepare_output_dir(config)
    try:
        torch.manual_seed(config.seed)
        if config.trainer.num_threads:
            torch.set_num_threads(config.trainer.num_threads)
        use_gpu = config.trainer.accelerator != "cpu" and torch.cuda.is_available()
        module = build_module(config, inputs)
        module.setup("predict")
        module.to("cuda" if use_gpu else "cpu")
        evaluation = _evaluate(config, inputs, module)
    finally:
        inputs.verifier.close()
    summary = evaluation_summary(evaluation.samples)
    SamplesFile(folder / "samples.jsonl").write(evaluation.lines)
    (folder / "figures").mkdir(exist_ok=True)
    draw_evaluations(None, evaluation.samples, folder / "figures")
    facts = score_facts(config, module, inputs)
    time_s = {"total": time.perf_counter() - start}
    write_json_atomically(folder / "summary.json", {**summary, **facts, "time": time_s})
    print_summary(None, summary, list_files(folder), console)
    return 0


def with_exported_score(config: Config, console: Console) -> Config:
    """The configuration with token, beta and c_ref of the model's self_reward.json, if any."""
    path = Path(resolve_path(config.model.path)) / "self_reward.json"
    if not path.is_file():
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
    }
    return validate(raw)


def _read_facts(path: Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads(path.read_text())
        return {name: facts[name] for name in ("special_token", "token_id", "beta", "c_ref")}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: {one_line(error)}; export the model again") from None


def _evaluate(config: Config, inputs: Inputs, module: LaserModule) -> Evaluation:
    collector = build_collector(config, inputs)
    settings = config.evaluation
    prompts = inputs.held_out[: settings.num_problems]
    if isinstance(config.self_reward.c_ref, str):
        # Evaluation alone has no training prompts; the held-out ones do, rewards are not looked at.
        data = PromptDataModule(prompts, [], config.prompts_per_step, 1, config.seed)
        calibrate(module, collector, data, config)
    else:
        module.c_ref = config.self_reward.c_ref
    with collector.engine.weights_of(module.policy), Progress(transient=True) as progress:
        return evaluate_prompts(
            collector,
            prompts,
            settings.samples_per_problem,
            lambda batch: add_scores(
                batch, module, lambda: make_plan(batch, config, module.policy.config)
            ),
            config.seed,
            step=0,
            track=lambda groups: progress.track(groups, description="evaluate"),
        )
