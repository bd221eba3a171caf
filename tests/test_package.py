"""The wheel holds the configurations and the tiny model, and its command works from it."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_wheel_runs_without_the_checkout(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        (entry_points,) = (n for n in archive.namelist() if n.endswith("entry_points.txt"))
        assert "laser-pl = laser_pl.cli:main" in archive.read(entry_points).decode()
    assert (site / "laser_pl" / "models" / "tiny" / "model.safetensors").is_file()
    shipped = {path.relative_to(ROOT / "conf") for path in (ROOT / "conf").rglob("*.yaml")}
    packed = site / "laser_pl" / "conf"
    assert shipped == {path.relative_to(packed) for path in packed.rglob("*.yaml")}
    shown = subprocess.run(
        [sys.executable, "-c", "from laser_pl.cli import main; main()", "--cfg", "job"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0, shown.stderr
    assert "path: builtin:tiny" in shown.stdout
