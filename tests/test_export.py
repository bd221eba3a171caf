"""An exported folder is an ordinary model with the weights of the run, whatever trained it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from laser_pl import cli
from laser_pl import train as train_file
from laser_pl.config import ExportConfig
from laser_pl.errors import UserError
from laser_pl.export import export
from laser_pl.logs.metrics_file import read_metrics
from laser_pl.train import train
from laser_pl.training.checkpoint import CheckpointReader

ROOT = Path(__file__).parent.parent
SMALL = (
    "prompts_per_step=4", "rollouts_per_prompt=4", "micro_batch_size=4", "max_steps=2",
    "data.num_train=64", "data.num_held_out=8", "evaluation.num_problems=4",
    "evaluation.samples_per_problem=2", "evaluation.every_n_steps=0",
    "evaluation.interim_samples_per_problem=2", "self_reward.reasoning_warmup_steps=0",
    "self_reward.warmup_steps=1", "checkpoint.every_n_steps=2", "optimizer.lr=1.0e-3", "logger=csv",
)  # fmt: skip
LORA = "model.lora.enabled=true"
SHARD_ALL = "strategy.extra_config.zero_optimization.stage3_param_persistence_threshold=0"
IDS = torch.arange(1, 30).unsqueeze(0)


@pytest.fixture
def trained(compose_config, monkeypatch):
    """Train in this process; returns the run's folder and the trained policy."""

    def call(*overrides):
        modules = []
        build = train_file.build_module

        def keep(*arguments):
            modules.append(build(*arguments))
            return modules[-1]

        monkeypatch.setattr(train_file, "build_module", keep)
        config = compose_config(*SMALL, *overrides)
        assert train(config) == 0
        return Path(config.output_dir), modules[-1].policy.eval()

    return call


@pytest.fixture(scope="module")
def zero3(tmp_path_factory):
    """A run under ZeRO-3 on two processes, with a checkpoint of every second step."""
    folder = tmp_path_factory.mktemp("zero3") / "run"
    launch(folder, "trainer.devices=2", "strategy=deepspeed_zero3", SHARD_ALL, "max_steps=4")
    return folder


def launch(folder: Path, *overrides: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *SMALL, f"output_dir={folder}", *overrides],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


def newest(folder: Path) -> Path:
    return sorted((folder / "checkpoints").glob("step-*"))[-1]


@pytest.mark.parametrize("adapter", [(), (LORA,)])
def test_the_exported_model_gives_the_logits_of_the_trained_one(trained, tmp_path, adapter):
    folder, policy = trained(*adapter)
    output = tmp_path / "exported"
    assert export(ExportConfig(checkpoint=str(newest(folder)), output=str(output), merge=True)) == 0
    for path in (output, folder / "model"):  # training has written the same
        loaded = AutoModelForCausalLM.from_pretrained(path).eval()
        assert not any("lora" in name for name, _ in loaded.named_parameters())
        difference = (logits(loaded) - logits(policy)).abs().max()
        assert difference <= 1e-6 * max(1.0, float(logits(policy).abs().max()))


def test_an_adapter_can_be_exported_by_itself(trained, tmp_path):
    peft = pytest.importorskip("peft")
    folder, policy = trained(LORA)
    export(ExportConfig(checkpoint=str(folder), output=str(tmp_path / "adapter"), merge=False))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 2_000_000
    model = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(ROOT / "laser_pl" / "models" / "tiny"),
        tmp_path / "adapter",
    ).eval()
    assert torch.allclose(logits(model), logits(policy), atol=1e-5)


def test_the_folder_has_all_that_a_user_needs(trained, tmp_path):
    folder, _ = trained("evaluation.every_n_steps=1")
    # It stands alone: neither the run nor its configuration is needed.
    checkpoint = Path(shutil.copytree(newest(folder), tmp_path / newest(folder).name))
    shutil.rmtree(folder)
    output = tmp_path / "out"
    export(ExportConfig(checkpoint=str(checkpoint), output=str(output), merge=True))
    assert {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "generation_config.json", "chat_template.jinja", "self_reward.json", "README.md",
    } == {path.name for path in output.iterdir()}  # fmt: skip
    facts = json.loads((output / "self_reward.json").read_text())
    assert set(facts) == {
        "special_token", "token_id", "incorrect_token_id", "eos_token_ids", "score", "loss",
        "beta", "c_ref", "threshold",
    }  # fmt: skip
    card = (output / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "transformers"
    assert "held_out/accuracy" in card
    assert "rollouts_per_prompt: 4" in card
    code = card.split("```python\n")[1].split("```")[0].replace('"."', repr(str(output)))
    names = {"prompt": "1 + 2 =\n", "answer": "3"}
    exec(code, names)  # the card's own example
    assert isinstance(names["score"], float)
    assert (
        AutoTokenizer.from_pretrained(output).convert_tokens_to_ids("<|reserved_0|>")
        == (facts["token_id"])
    )


def test_a_sharded_run_exports_its_weights(zero3, tmp_path):
    reader = CheckpointReader(newest(zero3))
    assert len(list(newest(zero3).glob("weights-*"))) == 2  # each rank wrote its share
    output = tmp_path / "out"
    assert cli_export(f"checkpoint={newest(zero3)}", f"output={output}") == 0
    exported = dict(AutoModelForCausalLM.from_pretrained(output).named_parameters())
    assert set(exported) == set(reader.weight_names)
    for name, weight in exported.items():
        assert torch.equal(weight, reader.weight(name))


@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_zero1", "deepspeed_zero2"])
def test_two_ranks_go_on_to_the_same_bits_and_export_them(tmp_path, strategy):
    how = ("trainer.devices=2", f"strategy={strategy}", "checkpoint.every_n_steps=1",
           "optimizer.schedule=constant")  # fmt: skip
    whole, part, output = tmp_path / "whole", tmp_path / "part", tmp_path / "out"
    launch(whole, *how, "max_steps=2")
    launch(part, *how, "max_steps=1")
    launch(part, *how, "max_steps=2", "resume=auto")
    weights = "model/model.safetensors"
    assert (part / weights).read_bytes() == (whole / weights).read_bytes()
    assert cli_export(f"checkpoint={newest(part)}", f"output={output}") == 0
    trained = load_file(whole / weights)
    exported = load_file(output / "model.safetensors")
    assert exported.keys() == trained.keys()
    assert all(torch.equal(exported[name], trained[name]) for name in trained)


@pytest.mark.parametrize(
    "how",
    [("trainer.devices=2", "strategy=ddp"), ("trainer.devices=2", "strategy=deepspeed_zero2")],
    ids=["ddp", "zero2"],
)
def test_a_sharded_run_goes_on_under_another_strategy(zero3, tmp_path, how):
    folder = tmp_path / "other"
    launch(folder, *how, "max_steps=4", f"resume={zero3}/checkpoints/step-000002")
    there, here = (read_metrics(path / "metrics.csv")[-2:] for path in (zero3, folder))
    for name in ("train/loss", "train/grad_norm", "train/lr"):
        expected = [row[name] for row in there]
        assert [row[name] for row in here] == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_a_sharded_run_goes_on_in_one_process_and_back(zero3, tmp_path):
    alone, back = tmp_path / "alone", tmp_path / "back"
    launch(alone, "max_steps=6", "optimizer.schedule=linear", "resume_force=true",
           f"resume={zero3}/checkpoints/step-000004")  # fmt: skip
    assert [row["step"] for row in read_metrics(alone / "metrics.csv")] == [5, 6]
    launch(back, "max_steps=7", "trainer.devices=2", "strategy=deepspeed_zero3", SHARD_ALL,
           f"resume={alone}/checkpoints/step-000006")  # fmt: skip
    moments = [
        CheckpointReader(folder / "checkpoints" / name).optimizer("model.norm.weight")["exp_avg"]
        for folder, name in ((alone, "step-000006"), (back, "step-000007"))
    ]
    # One update of beta 0.9 from the moments of the other, not from zero.
    assert torch.nn.functional.cosine_similarity(*moments, dim=0) > 0.5


def cli_export(*arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["run.py", "task=export", *arguments])
        cli.main()
    return int(stop.value.code or 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "export.checkpoint: missing; give checkpoint="),
        (("checkpoint=/nowhere",), "export.checkpoint = /nowhere: no such checkpoint"),
        (("checkpoint=a=b c/step-1",), "export.checkpoint = a=b c/step-1: no such checkpoint"),
    ],
)
def test_a_mistake_of_an_export_is_told(capsys, arguments, message):
    assert cli_export(*arguments, "output=/tmp/never") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_an_export_overwrites_nothing(trained, tmp_path, capsys):
    folder, _ = trained()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    assert cli_export(f"checkpoint={folder}", f"output={tmp_path}/mine") == 2
    assert "already holds files" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"export\.output: missing"):
        export(ExportConfig(checkpoint=str(folder), output=None, merge=True))
    newest(folder).joinpath("trainer.ckpt").unlink()
    assert cli_export(f"checkpoint={newest(folder)}", f"output={tmp_path}/new") == 2
    assert "is damaged (trainer.ckpt is missing)" in capsys.readouterr().err
