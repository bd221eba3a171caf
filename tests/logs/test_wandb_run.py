"""The wandb run where wandb does not take it; what it shows is tested with a sweep."""

import pytest
import wandb

from laser_pl.errors import UserError
from laser_pl.logs.sweep import report_failed_start
from laser_pl.logs.wandb_run import start_wandb


def test_a_key_that_wandb_refuses_gets_one_line(compose_config, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "abc")
    monkeypatch.delenv("WANDB_MODE")
    config = compose_config()
    with pytest.raises(UserError, match="WANDB_MODE=offline or logger=csv") as caught:
        start_wandb(config, config.logger.wandb, tmp_path)
    assert str(caught.value).startswith("logger.wandb: ")
    assert "\n" not in str(caught.value)


def test_a_sweep_that_cannot_be_reached_does_not_hide_the_mistake(monkeypatch, capsys):
    def refuse(**_):
        raise wandb.errors.CommError("no such server")

    monkeypatch.setattr(wandb, "init", refuse)
    report_failed_start("seed = -1: must not be negative")
    assert "wandb: hears nothing of this: CommError: no such server" in capsys.readouterr().err
