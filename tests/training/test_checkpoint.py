"""A checkpoint's folder is whole or not there; damage is found and named."""

import json

import pytest
import torch
from lightning.pytorch import Trainer

from laser_pl.errors import UserError
from laser_pl.training.checkpoint import (
    FOLDER,
    CheckpointCallback,
    CheckpointFolder,
    CheckpointReader,
    damage_of,
    find_checkpoint,
    list_checkpoints,
    newest_whole,
    partial_folder,
)

NAMES = ("a.weight", "b.weight")


@pytest.fixture
def weights():
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(3, 5),
        "b.weight": torch.nn.Parameter(torch.randn(4).bfloat16()),
    }


def save(path, weights):
    """A checkpoint after three steps of AdamW, as Lightning hands it over."""
    parameters = [w.detach().clone().requires_grad_() for w in weights.values()]
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    state = optimizer.state_dict()
    CheckpointFolder().save_checkpoint(
        {
            "epoch": 3,
            "state_dict": {
                f"policy.{name}": p for name, p in zip(weights, parameters, strict=True)
            },
            "optimizer_states": [state],
        },
        path,
    )
    return dict(zip(weights, parameters, strict=True)), state


def test_what_is_read_is_what_was_written(tmp_path, weights):
    parameters, state = save(tmp_path / "step-000003", weights)
    reader = CheckpointReader(tmp_path / "step-000003")
    assert sorted(reader.weight_names) == sorted(NAMES)
    for index, name in enumerate(NAMES):
        assert reader.weight(name).dtype == parameters[name].dtype
        assert torch.equal(reader.weight(name), parameters[name])
        assert torch.equal(reader.optimizer(name)["exp_avg"], state["state"][index]["exp_avg"])
    assert reader.state["epoch"] == 3


def test_the_optimizer_goes_on_where_it_was(tmp_path, weights):
    parameters, state = save(tmp_path / "step-000003", weights)
    loaded = CheckpointFolder().load_checkpoint(tmp_path / "step-000003")
    optimizers = []
    for given in (state, loaded["optimizer_states"][0]):
        copies = [p.detach().clone().requires_grad_() for p in parameters.values()]
        optimizer = torch.optim.AdamW(copies, lr=0.5)
        optimizer.load_state_dict(given)
        for copy in copies:
            copy.grad = torch.ones_like(copy)
        optimizer.step()
        optimizers.append(copies)
    for one, other in zip(*optimizers, strict=True):
        assert torch.equal(one, other)


def test_the_weights_are_no_pickle(tmp_path, weights):
    save(tmp_path / "step-000003", weights)
    folder = tmp_path / "step-000003"
    loaded = torch.load(folder / "trainer.ckpt", weights_only=True)
    assert not any(isinstance(value, torch.Tensor) and value.dim() for value in loaded.values())
    kinds = {path.suffix for path in folder.iterdir()}
    assert kinds == {".json", ".safetensors", ".ckpt"}


@pytest.mark.parametrize("name", ["weights-00000.safetensors", "trainer.ckpt"])
@pytest.mark.parametrize("damage", ["shorter", "flipped", "gone"])
def test_damage_is_found_and_named(tmp_path, weights, name, damage):
    folder = tmp_path / "step-000003"
    save(folder, weights)
    assert damage_of(folder) is None
    path, data = folder / name, (folder / name).read_bytes()
    if damage == "shorter":
        path.write_bytes(data[:100])
        expected = f"{name} has 100 bytes of {len(data)}"
    elif damage == "flipped":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        expected = f"the content of {name} has changed"
    else:
        path.unlink()
        expected = f"{name} is missing"
    assert damage_of(folder) == expected
    with pytest.raises(UserError, match=r"resume = .* is damaged"):
        find_checkpoint(str(folder), tmp_path, print)


@pytest.mark.parametrize("text", [None, "", "{}", "[1]", '{"files": [1]}'])
def test_a_manifest_that_is_missing_or_broken_is_damage(tmp_path, weights, text):
    folder = tmp_path / "step-000003"
    save(folder, weights)
    (folder / "manifest.json").unlink()
    if text is not None:
        (folder / "manifest.json").write_text(text)
    assert damage_of(folder) == "manifest.json is missing or unreadable"


def test_the_newest_whole_one_is_taken_and_the_damaged_told(tmp_path, weights):
    folder = tmp_path / FOLDER
    for step in (1, 2, 3):
        save(folder / f"step-{step:06d}", weights)
    (folder / "step-000003" / "trainer.ckpt").unlink()
    told: list[str] = []
    assert newest_whole(folder, told.append) == folder / "step-000002"
    assert len(told) == 1
    assert "step-000003: is damaged (trainer.ckpt is missing)" in told[0]


def test_a_save_that_is_killed_half_way_leaves_no_checkpoint(tmp_path, weights, monkeypatch):
    from laser_pl.training import checkpoint

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "seal", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "step-000003", weights)
    assert list_checkpoints(tmp_path) == []
    assert partial_folder(tmp_path / "step-000003").is_dir()


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path, weights):
    save(tmp_path / "step-000003", weights)
    parameters, _ = save(tmp_path / "step-000003", weights)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]
    assert damage_of(tmp_path / "step-000003") is None
    assert torch.equal(CheckpointReader(tmp_path / "step-000003").weight("a.weight"),
                       parameters["a.weight"])  # fmt: skip


@pytest.mark.parametrize("resume", ["nowhere", "step-000001", "run"])
def test_a_path_that_is_no_checkpoint_is_refused(tmp_path, resume):
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match=r"resume = .*: no such checkpoint; give a folder"):
        find_checkpoint(str(tmp_path / resume), tmp_path, print)


class FakeTrainer(Trainer):
    """Saves an empty folder where a checkpoint would be."""

    def __init__(self) -> None:
        super().__init__(accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=99)
        self.steps_done = 0

    @property
    def current_epoch(self) -> int:
        return self.steps_done

    def save_checkpoint(self, filepath, *_):
        partial_folder(filepath).rename(filepath)


def test_later_checkpoints_that_were_passed_over_do_not_push_out_newer_ones(tmp_path):
    damaged = tmp_path / "step-000030"
    damaged.mkdir()
    callback = CheckpointCallback(tmp_path, 5, 1, False, lambda step: None, lambda folder: None)
    trainer = FakeTrainer()
    for step in (20, 25):
        trainer.steps_done = step - 1
        callback.on_train_epoch_end(trainer, None)
    assert [int(path.name[-6:]) for path in list_checkpoints(tmp_path)] == [25, 30]


def test_the_last_few_and_the_best_are_kept(tmp_path):
    accuracies = {2: 0.3, 4: 0.8, 6: 0.8, 8: 0.5}
    callback = CheckpointCallback(
        tmp_path, every_n_steps=3, keep_last=2, keep_best=True, accuracy_after=accuracies.get,
        describe=lambda folder: None,
    )  # fmt: skip
    trainer = FakeTrainer()
    kept = {}
    for step in range(1, 13):
        trainer.steps_done = step - 1
        callback.on_train_epoch_end(trainer, None)
        kept[step] = [int(path.name[-6:]) for path in list_checkpoints(tmp_path)]
    assert kept[2] == [2]  # saved because it is the best so far, not because it is due
    assert kept[4] == [3, 4]
    assert kept[12] == [4, 9, 12]
    assert json.loads((tmp_path / "best.json").read_text()) == {"step": 4, "accuracy": 0.8}
    again = CheckpointCallback(tmp_path, 3, 2, True, accuracies.get, lambda folder: None)
    again.load_state_dict(callback.state_dict())
    assert again.best == (4, 0.8)
