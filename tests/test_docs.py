"""What README.md and docs/ claim is what the program does."""

import os
import re
import subprocess
import sys

import pytest

from conftest import HERE, evaluate
from model import GPT
from nanolab.data import TokenDataset


def test_readme_tables_come_from_the_data(monkeypatch, capsys):
    """Each table in the README is, line for line, what the command above it prints."""
    readme = (HERE / "README.md").read_text()
    monkeypatch.chdir(HERE)
    commands = re.findall(r"^    python eval\.py (--ckpt config/\S+\.json.*)$", readme, re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        argv = [word for word in command.split("#")[0].split() if not word.endswith(".png") and word not in ("--plot", "--curves")]
        for line in evaluate(monkeypatch, capsys, *argv).splitlines():
            assert line.strip() in readme, f"{command}: {line}"


def test_notebook(small_run, data_dir, tmp_path):
    """The README's lines for a notebook, as they stand there."""
    run = small_run("out")
    (tmp_path / "data").symlink_to(data_dir)
    code = (HERE / "README.md").read_text().split("```python\n")[1].split("```")[0]
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(HERE)}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    text, loss = result.stdout.rsplit("\n", 2)[:2]
    inputs, targets = TokenDataset(data_dir, "stdlib", "test", 32).batch([0, 1, 2])
    assert text.startswith("def main():") and len(text) > 20
    assert float(loss) == pytest.approx(GPT.from_checkpoint(run / "best.pt")(inputs, targets).item(), abs=1e-4)
