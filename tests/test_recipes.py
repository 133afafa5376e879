"""The examples keep their own claims, which they assert; here at a tiny size. `make examples` runs the whole."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(ROOT.glob("examples/*.py"))
SHOWN = re.compile(r"^\$ python (examples/\w+\.py)\n(.*?)^```$", re.M | re.S)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_an_example_keeps_its_claims_at_a_tiny_size(path: Path, tmp_path: Path):
    done = subprocess.run(
        [sys.executable, str(path), "--tiny", "-o", str(tmp_path / "out")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()
    assert any((tmp_path / "out").iterdir()), "it leaves its files where -o says"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_an_example_writes_to_a_new_folder_only(path: Path, tmp_path: Path):
    done = subprocess.run([sys.executable, str(path), "-o", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"{tmp_path} exists" in done.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_an_example_is_short_and_has_a_page_with_what_it_prints(path: Path):
    assert len(path.read_text().splitlines()) <= 150
    shown = SHOWN.findall((ROOT / f"docs/recipes/{path.stem}.md").read_text())
    assert [name for name, _ in shown] == [f"examples/{path.name}"]
    assert shown[0][1].strip(), f"run: python docs/generate.py --examples {path.stem}"
    assert f"recipes/{path.stem}.md" in (ROOT / "docs/recipes.md").read_text()
