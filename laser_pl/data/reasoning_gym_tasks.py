"""The tasks of reasoning_gym by name and parameters, for the problems and for their scorers."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

import reasoning_gym
from reasoning_gym.composite import DatasetSpec
from reasoning_gym.dataset import ProceduralDataset
from reasoning_gym.factory import DATASETS

from laser_pl.errors import UserError, one_line, suggestion

_SET_BY_US = {"size": "data.num_train and data.num_held_out", "seed": "seed"}


def create_task(name: str, params: Mapping[str, Any], size: int, seed: int) -> ProceduralDataset:
    """A dataset of reasoning_gym.

    Args:
        name: its name there, such as "chain_sum".
        params: its own parameters.
        size: how many problems it has; its generators may refuse a size.
        seed: of its problems. Problem i often comes from seed + i: near seeds share problems.
    Returns:
        The dataset: indexed from 0, with `score_answer(answer, entry)`.
    Raises:
        UserError: there is no such dataset or parameter, or the dataset refuses a value.
    """
    if name not in DATASETS:
        raise UserError(
            f"data.name = {name}: no such reasoning_gym dataset{suggestion(name, DATASETS)}"
        )
    _check_params(name, params)
    arguments = dict(params)
    if name == "composite":
        arguments["datasets"] = _composite_parts(arguments.get("datasets"))
    try:
        return reasoning_gym.create_dataset(name, size=size, seed=seed, **arguments)
    except Exception as error:
        raise UserError(f"{_blame(error, params)}: {name} refuses it: {one_line(error)}") from error


def _check_params(name: str, params: Mapping[str, Any]) -> None:
    """Names, and the types of plain values: the datasets themselves check only ranges."""
    types = typing.get_type_hints(DATASETS[name][1])
    known = [field.name for field in dataclasses.fields(DATASETS[name][1])]
    own = [field for field in known if field not in _SET_BY_US]
    for param, value in params.items():
        key = f"data.params.{param}"
        if param in _SET_BY_US:
            raise UserError(f"{key}: set by {_SET_BY_US[param]}; leave it out here")
        if param not in own:
            raise UserError(
                f"{key}: no such parameter of {name}{suggestion(param, own)}; it has "
                f"{', '.join(own)}"
            )
        if not _fits(value, types[param]):
            raise UserError(f"{key} = {value!r}: must be {types[param].__name__}")


def _fits(value: Any, expected: Any) -> bool:
    if expected is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if expected is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if expected in (bool, str):
        return isinstance(value, expected)
    return True


def _composite_parts(parts: Any) -> list[DatasetSpec]:
    try:
        return [DatasetSpec(**{"weight": 1.0, "config": {}} | dict(part)) for part in parts]
    except (TypeError, ValueError):
        raise UserError(
            "data.params.datasets: composite needs a list such as "
            "[{name: gcd, weight: 1.0, config: {}}]"
        ) from None


def _blame(error: Exception, params: Mapping[str, Any]) -> str:
    """The parameter that the dataset's message is about, where it names one that was given."""
    named = [param for param in params if param in str(error)]
    return f"data.params.{named[0]} = {params[named[0]]!r}" if named else "data.params"
