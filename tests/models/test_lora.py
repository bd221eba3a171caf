"""The adapter where peft and transformers do not go together."""

import pytest

from laser_pl.config import LoraConfig
from laser_pl.errors import UserError
from laser_pl.models.lora import add_adapter


def test_a_peft_that_transformers_refuses_is_told_as_such(make_model, monkeypatch):
    def refuse(_):
        raise ValueError("The version of PEFT you are using is not compatible")

    model = make_model()
    monkeypatch.setattr(model, "add_adapter", refuse)
    settings = LoraConfig(enabled=True, rank=2, alpha=4.0, dropout=0.0, target_modules="all-linear")
    with pytest.raises(UserError, match=r"model.lora.enabled = True: .* or an older transformers"):
        add_adapter(model, settings)
