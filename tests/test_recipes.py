"""Every choice of every group composes with the others, and every recipe is a model that exists."""

import itertools

import pytest

from laser_pl.cli import config_dir
from laser_pl.preflight import empty_model, model_settings, model_shape

# Published numbers of parameters.
PARAMETERS = {
    "llama3-8b": 8_030_261_248,
    "qwen2.5-7b": 7_615_616_512,
    "orz-7b": 7_615_616_512,
    "octothinker-3b": 3_212_749_824,
    "qwen3-4b": 4_022_468_096,
    "llama3.2-1b": 1_235_814_400,
}
NEEDED = {
    "model=hf": ("model.path=x",),
    "data=file": ("data.path=x",),
    "data=hub": ("data.name=x",),
    "data=benchmark": ("data.name=x",),
    "data=choices": ("data.name=x",),
    "self_reward=two_token": ("self_reward.incorrect_token=7",),
    "self_reward=sft": ("self_reward.incorrect_token=7",),
}


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


def compose_choices(compose_config, *chosen: str):
    needed = [key for choice in chosen for key in NEEDED.get(choice, ())]
    return compose_config(*chosen, *needed)


@pytest.mark.parametrize("model", choices("model"))
def test_every_model_composes_with_every_strategy_and_engine(compose_config, model):
    for strategy, rollout in itertools.product(choices("strategy"), choices("rollout")):
        config = compose_choices(
            compose_config, f"model={model}", f"strategy={strategy}", f"rollout={rollout}"
        )
        assert config.rollout.engine == rollout


@pytest.mark.parametrize("algorithm", choices("algorithm"))
def test_every_algorithm_composes_with_every_self_reward_optimizer_and_logger(
    compose_config, algorithm
):
    groups = ("self_reward", "optimizer", "logger")
    for chosen in itertools.product(*(choices(group) for group in groups)):
        pairs = [f"{group}={choice}" for group, choice in zip(groups, chosen, strict=True)]
        compose_choices(compose_config, f"algorithm={algorithm}", *pairs)


@pytest.mark.parametrize("model", choices("model"))
@pytest.mark.parametrize("data", choices("data"))
def test_every_model_composes_with_every_data(compose_config, model, data):
    config = compose_choices(compose_config, f"model={model}", f"data={data}")
    generated = data in ("chain_sum", "reasoning_gym", "small_sums")
    assert config.verifier.target.endswith("ReasoningGymVerifier") == generated


@pytest.mark.parametrize("model", PARAMETERS)
def test_a_recipe_is_the_model_that_was_published(compose_config, model):
    config = compose_config(f"model={model}")
    settings = model_settings(config)
    assert model_shape(config, settings).num_parameters == PARAMETERS[model]
    parameters = empty_model(config, settings).parameters()
    assert all(parameter.device.type == "meta" for parameter in parameters)


def test_the_recipe_is_the_papers(compose_config):
    config = compose_config("model=orz-7b")
    assert (config.prompts_per_step, config.rollouts_per_prompt) == (128, 8)
    assert (config.optimizer.lr, config.optimizer.betas) == (1e-6, (0.9, 0.999))
    assert (config.data.max_prompt_tokens, config.rollout.max_response_tokens) == (2048, 8192)
    score = config.self_reward
    assert (score.alpha, score.beta, score.tau, score.token, score.c_ref) == (
        0.1, 0.1, 0.1, 151652, -23.0,
    )  # fmt: skip
    assert (score.reasoning_warmup_steps, score.warmup_steps) == (0, 200)
    assert (config.checkpoint.every_n_steps, config.evaluation.every_n_steps) == (50, 20)
    assert config.data.name == "zwhe99/DeepMath-103K"


def test_any_part_of_a_recipe_can_be_overridden(compose_config):
    config = compose_config(
        "model=llama3-8b", "rollout=hf", "data=gsm8k", "strategy=deepspeed_zero2", "seed=3"
    )
    assert (config.rollout.engine, config.data.name) == ("hf", "openai/gsm8k")
    assert config.strategy.model_extra == {"stage": 2}
    assert config.rollout.max_response_tokens == 6144
