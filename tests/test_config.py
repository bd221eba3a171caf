"""Every shipped configuration composes and validates; the contract's own arithmetic."""

import math

import pytest
from hydra import compose, initialize_config_dir

from laser_pl.cli import config_dir, to_config
from laser_pl.config import check_partition_excess

CHOICES = [
    (path.parent.name, path.stem)
    for path in sorted(config_dir().glob("*/*.yaml"))
]  # fmt: skip
NEEDED = {
    ("data", "file"): ["data.path=x.jsonl"],
    ("data", "hub"): ["data.name=x/y"],
    ("data", "benchmark"): ["data.name=x/y"],
    ("data", "choices"): ["data.name=x/y"],
    ("model", "hf"): ["model.path=x"],
    ("self_reward", "two_token"): ["self_reward.incorrect_token=7"],
    ("self_reward", "sft"): ["self_reward.incorrect_token=7"],
}


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_of_every_group_composes_and_validates(compose_config, group, choice):
    config = compose_config(f"{group}={choice}", *NEEDED.get((group, choice), []))
    assert config.num_sequences == (
        config.num_micro_batches * config.micro_batch_size * config.num_ranks
    )


@pytest.mark.parametrize("model", ["tiny", "smollm2-135m", "llama3-8b"])
@pytest.mark.parametrize("algorithm", ["grpo", "rloo", "dr_grpo"])
@pytest.mark.parametrize("self_reward", ["laser", "off"])
def test_the_main_groups_compose_in_all_combinations(compose_config, model, algorithm, self_reward):
    config = compose_config(
        f"model={model}", f"algorithm={algorithm}", f"self_reward={self_reward}"
    )
    assert config.self_reward.is_trained == (self_reward == "laser")


def test_the_command_line_overrides_what_a_model_brings(compose_config):
    assert compose_config("model=llama3-8b").prompts_per_step == 128
    config = compose_config("model=llama3-8b", "data=reasoning_gym", "prompts_per_step=16")
    assert (config.data.source, config.prompts_per_step) == ("reasoning_gym", 16)


def test_a_whole_number_does_for_a_float_as_sweeps_send_it(compose_config):
    assert compose_config("self_reward.alpha=0").self_reward.alpha == 0


def test_values_live_in_the_files_and_nowhere_else():
    with initialize_config_dir(version_base="1.3", config_dir=str(config_dir())):
        composed = compose("config", ["output_dir=x"])
    config = to_config(composed)
    dumped = config.model_dump(mode="json", by_alias=True)
    assert set(dumped) == set(composed) - {"experiment"}


def test_the_batch_equation_multiplies_out(compose_config):
    config = compose_config(
        "prompts_per_step=8", "rollouts_per_prompt=4", "micro_batch_size=4", "trainer.devices=2"
    )
    assert config.batch_equation() == (
        "8 prompts x 4 rollouts = 32 sequences = 4 micro-batches x 4 x 2 ranks"
    )


@pytest.mark.parametrize(
    ("c_ref", "beta", "fits"),
    [
        (-23.0, 0.1, True),  # Z - 1 = exp(-23) * (exp(10) - 1) = 2.3e-6, the paper's choice
        (-10.0, 0.1, False),  # exp(-10) * exp(10) = 1.0
        (-10.0, 0.2, True),  # exp(-10) * exp(5) = 0.0067
        (-12.9, 0.1, False),  # exp(-2.9) = 0.055
        (-13.1, 0.1, True),  # exp(-3.1) = 0.045
        (-23.0, 0.001, False),  # exp(977) overflows a float
    ],
)
def test_beta_must_fit_the_token(c_ref, beta, fits):
    if fits:
        check_partition_excess(c_ref, beta)
    else:
        with pytest.raises(ValueError, match="does not fit"):
            check_partition_excess(c_ref, beta)


def test_the_beta_that_is_proposed_fits():
    with pytest.raises(ValueError, match="does not fit") as error:
        check_partition_excess(-9.0, 0.05)
    proposed = float(str(error.value).split("self_reward.beta=")[1].split()[0])
    check_partition_excess(-9.0, proposed)
    assert math.exp(-9.0) * math.expm1(1 / (proposed - 0.01)) > 0.05


@pytest.mark.parametrize(
    ("data", "verifier", "samples"),
    [
        ("math500", "MathVerifier", 2), ("amc23", "MathVerifier", 32),
        ("aime24", "MathVerifier", 32), ("aime25", "MathVerifier", 32),
        ("olympiadbench", "MathVerifier", 2), ("gpqa", "MultipleChoiceVerifier", 4),
        ("mmlu_pro", "MultipleChoiceVerifier", 1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("model", ["tiny", "smollm2-135m", "llama3-8b"])
def test_a_benchmark_brings_its_verifier_and_the_papers_samples(
    compose_config, model, data, verifier, samples
):
    config = compose_config("task=evaluate", f"model={model}", f"data={data}")
    assert config.verifier.target.endswith(verifier)
    assert config.evaluation.samples_per_problem == samples
    assert config.data.num_held_out is config.evaluation.num_problems is None
    other = compose_config(
        f"data={data}", "verifier=exact", "evaluation.samples_per_problem=3", f"model={model}"
    )
    assert other.verifier.target.endswith("ExactVerifier")
    assert other.evaluation.samples_per_problem == 3


def test_several_loggers_compose(compose_config):
    logger = compose_config("logger=[wandb,tensorboard]").logger
    assert logger.wandb is not None and logger.tensorboard is not None
    for choice in ("csv", "none"):
        logger = compose_config(f"logger={choice}").logger
        assert logger.wandb is logger.tensorboard is None
