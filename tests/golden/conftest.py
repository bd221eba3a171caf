"""Recorded inputs and outputs of the reference code, read from the folder next to the repository.

A test that takes an argument `<file>_case` runs once for every case of `<file>.json`.
"""

import json
from pathlib import Path

import pytest

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden"
MISSING = f"the recorded vectors are not part of the repository: no folder {GOLDEN}"


@pytest.fixture
def golden_folder() -> Path:
    if not GOLDEN.is_dir():
        pytest.skip(MISSING)
    return GOLDEN


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name in metafunc.fixturenames:
        if not name.endswith("_case"):
            continue
        path = GOLDEN / f"{name.removesuffix('_case')}.json"
        if path.is_file():
            cases = json.loads(path.read_text())["cases"]
            metafunc.parametrize(name, cases, ids=[case["name"] for case in cases])
        else:
            skipped = pytest.param(None, marks=pytest.mark.skip(reason=MISSING), id="missing")
            metafunc.parametrize(name, [skipped])
