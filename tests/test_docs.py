"""The documentation says what the code says: metrics, keys, links, and the example that runs."""

import contextlib
import importlib
import importlib.util
import io
import re
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from laser_pl.cli import config_dir
from laser_pl.config import known_keys
from laser_pl.logs.files import write_json_atomically
from laser_pl.logs.names import METRICS, metrics_as_markdown
from laser_pl.models import loading

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md")) + [path for path in [ROOT / "README.md"] if path.is_file()]
TINY = Path(loading.__file__).parent / "tiny"


def leaves(keys: set[str]) -> set[str]:
    """The keys that are not a group of others."""
    return {key for key in keys if not any(other.startswith(key + ".") for other in keys)}


def without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", without_code(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_table_of_metrics_is_the_one_of_the_code():
    text = (DOCS / "outputs.md").read_text(encoding="utf-8")
    assert metrics_as_markdown() in text
    # A row that was added to the page alone would stand beside it.
    rows = re.findall(r"^\| `(\w+/\w+)` \|", text, flags=re.M)
    assert rows == list(METRICS)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("data=file", "data.path=x", "verifier=math"),
        ("data=hub", "data.name=x", "verifier=math"),
    ],
)
def test_every_key_is_documented(compose_config, overrides):
    config = compose_config(*overrides).model_dump(by_alias=True)
    text = (DOCS / "configuration.md").read_text(encoding="utf-8")
    missing = {key for key in leaves(known_keys(config)) if f"`{key}`" not in text}
    assert not missing


def test_the_page_of_every_key_has_types_ranges_and_defaults(compose_config):
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    rows = hooks.schema_page().splitlines()
    assert "| `self_reward.alpha` | number at least 0 | `0.05` |" in rows
    assert '| `self_reward.score` | `log_ratio`, `two_token` | `"log_ratio"` |' in rows
    keys = {row.split("`")[1] for row in rows if row.startswith("| `")}
    config = compose_config().model_dump(by_alias=True)
    # The parameters of a dataset or a verifier are its own.
    wanted = {k for k in leaves(known_keys(config)) if not k.startswith("data.params.")}
    # A logger that is off is null, and its own keys are in the page.
    assert wanted - keys == {"logger.tensorboard"}
    assert "logger.tensorboard.subfolder" in keys


def test_every_choice_of_every_group_is_documented():
    text = (DOCS / "configuration.md").read_text(encoding="utf-8")
    rows = {row[1]: row[0] for row in re.findall(r"^(\| `(\w+)` \|.*)$", text, flags=re.M)}
    for path in config_dir().glob("*/*.yaml"):
        group, choice = path.parent.name, path.stem
        assert f"`{choice}`" in rows[group], f"{group}={choice}"


def test_every_alias_of_a_token_is_documented():
    text = (DOCS / "configuration.md").read_text(encoding="utf-8")
    for alias, token in loading.TOKEN_ALIASES.items():
        escaped = token.replace("|", "\\|")
        assert f"| `{alias}` | `{escaped}` |" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", without_code(page))
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{page.name}: {target}"


FACTS = {
    "special_token": "<|reserved_0|>", "token_id": 2, "eos_token_ids": [1], "beta": 0.5,
    "c_ref": -21.0, "threshold": 0.5,
}  # fmt: skip


def run_example(page: str, tmp_path: Path) -> tuple[str, dict[str, object]]:
    """What the marked example of a page prints on a model folder, and its names."""
    for kind in (AutoModelForCausalLM, AutoTokenizer):
        kind.from_pretrained(TINY).save_pretrained(tmp_path / "model")
    write_json_atomically(tmp_path / "model" / "self_reward.json", FACTS)
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.search(r"<!-- test: model folder -->\n```python\n(.*?)```", text, flags=re.S)
    assert found
    code = found[1].replace("outputs/mine/model", str(tmp_path / "model"))
    names: dict[str, object] = {}
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile(code, page, "exec"), names)
    return output.getvalue(), names


def test_the_example_that_reads_the_score_runs(tmp_path):
    output, names = run_example("outputs.md", tmp_path)
    expected = 0.5 * (float(names["logprobs"][2]) + 21.0)
    verdict = "correct" if expected > 0.5 else "incorrect"
    assert output == f"score {expected:.3f}, judged {verdict}\n"


def test_the_example_that_scores_and_generates_runs(tmp_path):
    output, _ = run_example("evaluation.md", tmp_path)
    by_hand, _ = run_example("outputs.md", tmp_path)
    first, *answers = output.splitlines()
    assert f"score {float(first.strip('[]')):.3f}" == by_hand.partition(",")[0]
    assert sum(line.startswith(("True", "False")) for line in answers) == 2


def test_the_table_of_memory_and_communication_is_the_computed_one(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    table = importlib.import_module("scaling_table").table()
    assert table in (DOCS / "scaling.md").read_text(encoding="utf-8")


def test_the_defaults_that_are_documented_are_those_of_the_code(compose_config):
    config = compose_config()
    values = flat(config.model_dump(mode="json", by_alias=True))
    text = (DOCS / "configuration.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.]+)` \| [^\n]*? \| ((?:[^|\n])*?) \| ", text, flags=re.M)
    numbers = {
        key: shown
        for key, shown in rows
        if isinstance(values.get(key), int | float) and not isinstance(values[key], bool)
    }
    assert len(numbers) > 25
    wrong = {k: (shown, values[k]) for k, shown in numbers.items() if float(shown) != values[k]}
    assert not wrong


def flat(tree: dict, prefix: str = "") -> dict:
    """Nested mappings as one, with dotted keys."""
    result = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{name}.")
        else:
            result[f"{prefix}{name}"] = value
    return result
