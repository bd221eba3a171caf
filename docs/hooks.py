"""What mkdocs does beside its own: the page of all keys, and links to files of the repository."""

import json
import re
from collections.abc import Iterator
from typing import Any

from hydra import compose, initialize_config_dir
from mkdocs.structure.files import File, Files
from omegaconf import OmegaConf

from laser_pl.cli import config_dir
from laser_pl.config import Config, flatten

RANGES = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}


def on_files(files: Files, config: Any) -> Files:
    """Add schema.md, made from the contract in laser_pl/config.py."""
    files.append(File.generated(config, "schema.md", content=schema_page()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Turn links that leave docs/ into plain words: the site has no such files."""
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)]*\)", r"\1", markdown)


def schema_page() -> str:
    """Every key with what it takes, as the contract has it, and its value in the first run."""
    schema = Config.model_json_schema(by_alias=True)
    values: dict[str, list[str]] = {}
    for key, value in keys_of(schema, schema["$defs"]):
        found = values.setdefault(key, [])
        if value not in found:
            found.append(value)
    defaults = first_run()
    rows = [
        "# Every key",
        "",
        "Made from `laser_pl/config.py`. Meanings: [configuration.md](configuration.md). Keys "
        "without a value belong to another choice of their group than `python run.py` takes.",
        "",
        "| key | takes | value of `python run.py` |",
        "| --- | --- | --- |",
    ]
    for key in sorted(values):
        default = f"`{json.dumps(defaults[key])}`".replace("|", "\\|") if key in defaults else ""
        rows.append(f"| `{key}` | {'; or '.join(values[key])} | {default} |")
    return "\n".join(rows) + "\n"


def first_run() -> dict[str, Any]:
    """The values of the default configuration by dotted key, interpolations as they are written."""
    with initialize_config_dir(version_base="1.3", config_dir=str(config_dir())):
        plain: Any = OmegaConf.to_container(compose("config"), resolve=False)
    return flatten(plain)


def keys_of(
    schema: dict[str, Any], groups: dict[str, Any], prefix: str = ""
) -> Iterator[tuple[str, str]]:
    """Dotted keys of a JSON schema with what they take; those of a union's members in turn."""
    for name, value in schema["properties"].items():
        members = [part for part in parts_of(value) if "$ref" in part]
        for member in members:
            group = groups[member["$ref"].rpartition("/")[2]]
            yield from keys_of(group, groups, f"{prefix}{name}.")
        if not members:
            yield f"{prefix}{name}", takes(value)


def parts_of(value: dict[str, Any]) -> list[dict[str, Any]]:
    """The alternatives of a union, or the value itself."""
    parts: list[dict[str, Any]] = value.get("anyOf") or value.get("oneOf") or [value]
    return parts


def takes(value: dict[str, Any]) -> str:
    """What a key takes, in words: types, ranges and choices."""
    return " or ".join(_part(part) for part in parts_of(value))


def _part(part: dict[str, Any]) -> str:
    if "enum" in part or "const" in part:
        return ", ".join(f"`{choice}`" for choice in part.get("enum", [part.get("const")]))
    if "prefixItems" in part:
        return f"[{', '.join(takes(item) for item in part['prefixItems'])}]"
    if part.get("type") == "array":
        return f"list of {takes(part['items'])}"
    kind = {"null": "`null`", "object": "mapping"}.get(part["type"], part["type"])
    ranges = [f"{word} {part[name]:,}" for name, word in RANGES.items() if name in part]
    return " ".join([kind, *ranges])
