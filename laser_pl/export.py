"""`task=export`: an ordinary Hugging Face folder from a checkpoint, of whatever strategy."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from laser_pl.config import Config, ExportConfig, validate
from laser_pl.errors import UserError
from laser_pl.logs.files import write_json_atomically, write_text_atomically
from laser_pl.models.loading import load_policy
from laser_pl.models.lora import merge_adapter
from laser_pl.training.checkpoint import FOLDER, CheckpointReader, damage_of, newest_whole

MODEL_FOLDER, SCORE_FILE = "model", "self_reward.json"
_CONFIG, _MEASURES = "config.yaml", "measures.json"


def export(settings: ExportConfig) -> int:
    """Write the folder that `export.output` names from the checkpoint `export.checkpoint`.

    Returns:
        The exit code, 0.
    Raises:
        UserError: a path is missing, the checkpoint is damaged, or the output is not empty.
    """
    console = Console()
    checkpoint = _find(settings.checkpoint, console)
    if settings.output is None:
        raise UserError("export.output: missing; give output=FOLDER, a new one")
    output = Path(settings.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(
            f"export.output = {output}: already holds files, which are not overwritten; give a new "
            "folder"
        )
    export_checkpoint(checkpoint, output, settings.merge)
    console.print(f"exported {checkpoint} to {output}", highlight=False, markup=False)
    return 0


def describe_run(
    folder: Path,
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    policy: PreTrainedModel,
    self_reward: dict[str, Any],
    measures: dict[str, Any],
) -> None:
    """Put into a checkpoint what an export needs beside the weights, so that it stands alone.

    Args:
        folder: of the checkpoint, still partial.
        config: of the run.
        tokenizer: of the policy.
        policy: for its settings, not its weights.
        self_reward: the content of self_reward.json.
        measures: the latest held-out evaluation, for the model card; may be empty.
    """
    raw = config.model_dump(mode="json", by_alias=True)
    write_text_atomically(folder / _CONFIG, yaml.safe_dump(raw, sort_keys=False))
    write_json_atomically(folder / SCORE_FILE, self_reward)
    write_json_atomically(folder / _MEASURES, measures)
    policy.config.save_pretrained(folder / MODEL_FOLDER)
    if policy.can_generate():
        policy.generation_config.save_pretrained(folder / MODEL_FOLDER)
    tokenizer.save_pretrained(folder / MODEL_FOLDER)


def export_checkpoint(checkpoint: Path, output: Path, merge: bool) -> None:
    """Write a Hugging Face folder with self_reward.json and a model card, whole or not at all.

    Args:
        checkpoint: a whole checkpoint.
        output: is replaced if it is there.
        merge: add a LoRA adapter to the weights; False writes the adapter alone.
    Raises:
        UserError: with an adapter, its base model cannot be loaded.
    """
    config = validate(yaml.safe_load((checkpoint / _CONFIG).read_text()))
    reader = CheckpointReader(checkpoint)
    if config.model.lora.enabled:
        model = _with_adapter(reader, config, merge)
    else:
        model = _with_weights(reader, config)
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    source = checkpoint / MODEL_FOLDER
    AutoTokenizer.from_pretrained(source).save_pretrained(partial)
    if (source / "generation_config.json").is_file():
        GenerationConfig.from_pretrained(source).save_pretrained(partial)
    facts = json.loads((checkpoint / SCORE_FILE).read_text())
    measures = json.loads((checkpoint / _MEASURES).read_text())
    write_json_atomically(partial / SCORE_FILE, facts)
    write_text_atomically(partial / "README.md", model_card(config, facts, measures))
    shutil.rmtree(output, ignore_errors=True)
    os.replace(partial, output)


def model_card(config: Config, facts: dict[str, Any], measures: dict[str, Any]) -> str:
    """The README.md of an exported model.

    Args:
        config: of the run.
        facts: the content of self_reward.json.
        measures: of the latest held-out evaluation; empty if there was none.
    """
    header = {"library_name": "transformers", "pipeline_tag": "text-generation",
              "tags": ["laser", "grpo", "self-reward", "reinforcement-learning"]}  # fmt: skip
    if not config.model.path.startswith(("builtin:", ".", "/", "~")):
        header["base_model"] = config.model.path
    rows = "\n".join(f"| {name} | {value} |" for name, value in measures.items())
    raw = yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False)
    return _CARD.format(
        header=yaml.safe_dump(header, sort_keys=False).strip(),
        base=config.model.path,
        table=f"| measure | value |\n| --- | --- |\n{rows}" if rows else "None was made.",
        config=raw.strip(),
        **facts,
    )


_CARD = """---
{header}
---

# A policy that judges its own answers

Trained from `{base}` with [LaSeR](https://arxiv.org/abs/2510.14943): reinforcement learning with
verifiable rewards, in which the log-probability of the token `{special_token}` (id {token_id}),
read right after the answer's EOS, is the model's own verdict on the answer:

    score = {beta} * (log p(token | prompt, answer) - ({c_ref}))

About 1 says right, about 0 wrong; above {threshold} counts as right.

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
text = prompt + answer + tokenizer.eos_token
ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
logprobs = torch.log_softmax(model(ids).logits[0, -1].float(), dim=-1)
score = {beta} * (logprobs[{token_id}].item() - ({c_ref}))
```

## Held-out evaluation

{table}

<details><summary>Configuration of the run</summary>

```yaml
{config}
```

</details>
"""


def _find(checkpoint: str | None, console: Console) -> Path:
    if checkpoint is None:
        raise UserError("export.checkpoint: missing; give checkpoint=RUN/checkpoints/step-NUMBER")
    path = Path(checkpoint)
    if (path / FOLDER).is_dir():  # a run's folder
        newest = newest_whole(path / FOLDER, lambda line: console.print(line, highlight=False))
        if newest is not None:
            return newest
    if not path.match("step-*") or not path.is_dir():
        raise UserError(
            f"export.checkpoint = {path}: no such checkpoint; give RUN/checkpoints/step-NUMBER"
        )
    if damage := damage_of(path):
        raise UserError(f"export.checkpoint = {path}: is damaged ({damage}); give another")
    return path


def _with_weights(reader: CheckpointReader, config: Config) -> PreTrainedModel:
    """The model of a checkpoint that holds all weights."""
    trust = config.model.trust_remote_code
    settings = AutoConfig.from_pretrained(reader.folder / MODEL_FOLDER, trust_remote_code=trust)
    weights = {name: reader.weight(name) for name in reader.weight_names}
    settings.dtype = next(iter(weights.values())).dtype
    with torch.device("meta"):  # random weights would take their time
        model = AutoModelForCausalLM.from_config(settings, trust_remote_code=trust)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    return model


def _with_adapter(reader: CheckpointReader, config: Config, merge: bool) -> PreTrainedModel:
    """The base model with the adapter of a checkpoint."""
    model = load_policy(config.model)
    weights = {name: reader.weight(name) for name in reader.weight_names}
    model.load_state_dict(weights, strict=False)
    return merge_adapter(model) if merge else model
