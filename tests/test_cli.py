"""Every mistake in the input ends with exit code 2 and one line, before any weight is loaded."""

import shutil
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from laser_pl import cli
from laser_pl.models import loading

SMALL = [
    "prompts_per_step=4", "rollouts_per_prompt=4", "micro_batch_size=8", "max_steps=2",
    "data.num_train=64", "data.num_held_out=8", "evaluation.num_problems=4",
    "evaluation.samples_per_problem=4", "rollout.max_response_tokens=12", "logger=csv",
]  # fmt: skip


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Call the command line in this process; returns (exit code, lines of stderr)."""

    def call(*arguments: str) -> tuple[int, list[str]]:
        output = [] if any(a.startswith("output_dir=") for a in arguments) else [
            f"output_dir={tmp_path}/run"
        ]  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["run.py", *SMALL, *output, *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0), capsys.readouterr().err.splitlines()

    return call


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    """A mistake that is found only after the weights are loaded fails its test."""

    def refuse(*_: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("laser_pl.train.load_policy", refuse)


MISTAKES = [
    (["algorithm.clip_lo=0.3"], "algorithm.clip_lo: unknown key; did you mean algorithm.clip_low?"),
    (["+algorithm.clip_lo=1"], "algorithm.clip_lo: unknown key; did you mean algorithm.clip_low?"),
    (["model=tinny"], "model = tinny: no such choice of"),
    (["modl=tiny"], "modl: unknown key; did you mean model?"),
    (["algorithm.clip_low=abc"], "algorithm.clip_low = 'abc': must be a valid number"),
    (["algorithm.clip_low=2"], "algorithm.clip_low = 2: must be less than or equal to 1"),
    (["max_steps=1.5"], "max_steps = 1.5: must be a valid integer"),
    (["max_steps=0"], "max_steps = 0: must be greater than 0"),
    (["optimizer.lr=nan"], "optimizer.lr = nan: must be a finite number"),
    (["task=trian"], "task = 'trian': must be 'train', 'evaluate', 'score', 'calibrate'"),
    (["~optimizer.lr"], "optimizer.lr: missing"),
    (["data=file"], "data.path: missing; give it with data.path=VALUE"),
    (
        ["data=file", "data.path=x.jsonl", "verifier=reasoning_gym"],
        "verifier = reasoning_gym: knows no problems of",
    ),
    (["data.system_prompt=None"], "data.system_prompt = None: is a text to Hydra; write null"),
    (
        ["self_reward={'alpha': 0.1}"],
        "in a sweep's file write one parameter a key, such as self_reward.NAME",
    ),
    (["self_reward=two_token"], "self_reward.incorrect_token = None: two are used; give the one"),
    (["self_reward.incorrect_token=3"], "log_ratio with mse uses one token; use null"),
    (
        ["self_reward=sft", "self_reward.incorrect_token=tiny-reserved-0"],
        "self_reward.incorrect_token = tiny-reserved-0: is self_reward.token as well",
    ),
    (
        ["self_reward=sft", "self_reward.incorrect_token=3", "self_reward.score=two_token"],
        "self_reward.loss = sft: has a score of its own",
    ),
    (
        ["self_reward=two_token", "self_reward.incorrect_token=3", "rollout=vllm"],
        "rollout.engine = vllm: reads one score token; use rollout=hf",
    ),
    (["algorithm.overlong_fraction=2"], "algorithm.overlong_fraction = 2: must be less than"),
    (["data.num_held_out=null"], "data.num_held_out = None: must be a valid integer"),
    (["logger.wandb.projct=x"], "logger.wandb.projct: unknown key"),
    (["task=evaluate", "self_reward.c_ref=model"], "self_reward.c_ref = model: an evaluation has"),
    (["micro_batch_size=5"], "micro_batch_size = 5: must divide the 16 sequences of a rank"),
    (
        ["training.max_tokens_per_micro_batch=10"],
        "training.max_tokens_per_micro_batch = 10: must hold the longest sequence",
    ),
    (["training.share_prompts=maybe"], "training.share_prompts = 'maybe': must be"),
    (["trainer.devices=3"], "prompts_per_step = 4: must be a multiple of the 3 ranks"),
    (["evaluation.num_problems=9"], "evaluation.num_problems = 9: must be at most"),
    (["algorithm=rloo", "rollouts_per_prompt=1", "micro_batch_size=4"], "use at least 2"),
    (["self_reward.token=<|nope|>"], "self_reward.token=<|nope|>: cannot be read"),
    (["self_reward.token='<|nope|>'"], "self_reward.token = <|nope|>: not in the vocabulary"),
    (["self_reward.token=100000"], "self_reward.token = 100000: the vocabulary has ids 0 to"),
    (["self_reward.token='<|eos|>'"], "self_reward.token = <|eos|>: is the EOS token"),
    (["self_reward.token='<|pad|>'"], "self_reward.token = <|pad|>: is the pad token"),
    (["self_reward.c_ref=-5", "self_reward.beta=0.1"], "self_reward.beta = 0.1 does not fit"),
    (["rollout.stop=[a,None]"], "rollout.stop = None: is a text to Hydra"),
    (["self_reward.c_ref=often"], "must be a valid number, or 'calibrated' or 'model'"),
    (
        ["data=file", "verifier=exact", "data.path=/no/such/file.jsonl"],
        "data.path = /no/such/file.jsonl",
    ),
    (["data.name=chain_summ"], "chain_sum"),
    (["data.params={min_tems: 2}"], "data.params.min_tems"),
    (["model.path=/no/such/folder"], "model.path = /no/such/folder: no such folder"),
    (["model.path=builtin:big"], "model.path = builtin:big"),
    (["verifier._target_=no.such.function"], "verifier._target_ = no.such.function"),
    (["verifier.arguments={depth: 3}"], "depth"),
    (["strategy.name=foo"], "strategy.name: strategy=auto takes no arguments"),
    (["strategy=ddp", "strategy.bucket=1"], "strategy.bucket"),
    (["optimizer=deepspeed_cpu_adam"], "optimizer.name = deepspeed_cpu_adam: works with the"),
    (["evaluation.interim_samples_per_problem=0"], "evaluation.interim_samples_per_problem = 0:"),
    (["seed=5000000000"], "seed = 5000000000: must be less than"),
    (["self_reward=5"], "config: cannot be composed"),
    (["foo"], "foo: is no KEY=VALUE"),
    (["+new.key=1"], "new: unknown key"),
    (["trainer.accelerator=gpu"], "trainer.accelerator = gpu: no GPU is there"),
    (["output_dir=/proc/nothing"], "output_dir = /proc/nothing"),
    (["self_reward.c_ref=0.5"], "self_reward.c_ref = 0.5: must be less than 0"),
    (["resume=/no/such.ckpt"], "resume = /no/such.ckpt: no such checkpoint"),
    (["data.max_prompt_tokens=2"], "data.max_prompt_tokens"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=lambda v: str(v)[:60])
def test_a_mistake_gets_one_line_and_exit_code_2(run, arguments, message):
    code, lines = run(*arguments)
    assert code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert message in lines[0]


def test_all_mistakes_of_the_configuration_are_told_at_once(run):
    code, lines = run("algorithm.clip_low=2", "seed=x", "rollout.top_p=0")
    assert code == 2
    keys = {line.split(" = ")[0] for line in lines}
    assert keys == {"error: algorithm.clip_low", "error: seed", "error: rollout.top_p"}


def test_a_score_token_that_a_prompt_contains_is_refused(run):
    tokenizer = Tokenizer.from_file(str(Path(loading.__file__).parent / "tiny/tokenizer.json"))
    used = tokenizer.encode("1 + 2 =\n").ids[1]
    code, lines = run(f"self_reward.token={used}")
    assert code == 2
    assert "occurs in the prompt of problem" in lines[0]


def test_a_folder_that_holds_another_run_is_not_touched(run, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "notes.txt").write_text("precious")
    code, lines = run(f"output_dir={folder}")
    assert code == 2
    assert "already holds files" in lines[0]
    assert [p.name for p in folder.iterdir()] == ["notes.txt"]
    assert (folder / "notes.txt").read_text() == "precious"


def test_a_corrected_command_can_use_the_same_folder(run, tmp_path):
    assert run("self_reward.token=100000")[0] == 2
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("number", ["2", "null"])
def test_nothing_left_to_train_on_is_told(run, tmp_path, number):
    path = tmp_path / "p.jsonl"
    path.write_text('{"problem": "1 + 1", "answer": 2}\n{"problem": "1 + 2", "answer": 3}\n')
    arguments = (f"data.path={path}", f"data.num_held_out={number}", "evaluation.num_problems=2")
    code, lines = run("data=file", "data.num_train=null", *arguments)
    assert code == 2
    assert f"data.num_held_out = {number}: all 2 problems are held out" in lines[-1]


def test_too_little_disk_is_told_before_the_weights_are_loaded(run, monkeypatch):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("laser_pl.setup.shutil.disk_usage", lambda _: usage)
    code, lines = run()
    assert code == 2
    assert "GB are free" in lines[0]


def test_resume_auto_needs_a_folder(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", "resume=auto", "hydra.run.dir=/tmp"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "resume = auto: needs output_dir=FOLDER" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("", "broken.jsonl"),
        ('{"problem": "1 + 1", "answer": "2"}\n{"problem": ', "broken.jsonl:2"),
        ('{"question": "1 + 1", "answer": "2"}\n', "broken.jsonl:1"),
    ],
)
def test_a_broken_data_file_is_told_with_its_line(run, tmp_path, text, where):
    path = tmp_path / "broken.jsonl"
    path.write_text(text)
    code, lines = run("data=file", f"data.path={path}", "verifier=exact", "data.num_held_out=1",
                      "evaluation.num_problems=1")  # fmt: skip
    assert code == 2
    assert len(lines) == 1
    assert where in lines[0]


@pytest.mark.parametrize("text", ["{", "{}", "[]"])
def test_a_broken_self_reward_file_is_told(run, tmp_path, text):
    folder = tmp_path / "model"
    shutil.copytree(Path(loading.__file__).parent / "tiny", folder)
    (folder / "self_reward.json").write_text(text)
    code, lines = run("task=evaluate", f"model.path={folder}")
    assert code == 2
    assert "self_reward.json" in lines[0]


def test_a_hub_name_without_a_network_is_told_at_once(run, monkeypatch):
    monkeypatch.setattr(loading, "hub_answers", lambda: False)
    code, lines = run("model.path=nobody/no-such-model")
    assert code == 2
    assert lines[0].startswith("error: model.path = nobody/no-such-model: the Hugging Face hub")
    assert len(lines) == 1


def test_help_names_the_groups_and_the_usage(run, capsys):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["run.py", "--help"])
        cli.main()
    text = capsys.readouterr().out
    assert not stop.value.code
    for expected in (
        "python run.py",
        "model: hf, llama3-8b, llama3.2-1b, octothinker-3b, orz-7b, qwen2.5-7b, qwen3-4b,",
        "self_reward.alpha",
    ):
        assert expected in text
