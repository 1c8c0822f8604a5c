"""The first minute without data or GPU, and the learning-rate schedule of the quickstart as it is
logged."""

import re
import subprocess
import sys

import pytest
import torch

from conftest import HERE, SMALL, call
from nanolab.logfile import read_log


def test_quickstart_schedule(tmp_path, data_dir):
    """Shortened, the quickstart still warms up, learns, and ends at a rate of zero."""
    result = call("train.py", "config/quickstart.py", f"--data_dir={data_dir}",
                  f"--out_dir={tmp_path}/out", "--max_steps=50", "--eval_every=25",
                  "--batch_size=4", "--global_batch_size=4", "--eval_tokens=4096", "--device=cpu")
    assert result.returncode == 0, result.stderr
    made = {file.name for file in (tmp_path / "out").iterdir()}
    assert made == {
        "config.json", "log.jsonl", "last.pt", "best.pt", "loss.png", "report.html", "summary.json"
    }
    log = read_log(tmp_path / "out" / "log.jsonl")[0]
    assert log[-1]["loss"] < 3.5 < log[0]["loss"] and log[0]["lr"] < log[2]["lr"] > log[25][
        "lr"] > log[-1]["lr"] == 0


def test_dry_run(small_run, tmp_path, capsys):
    """Shapes, memory, steps and time, for a new run and for one that goes on; no file is made or
    changed."""
    small_run("new", "--dry_run", "--global_batch_size=32")
    out = capsys.readouterr().out
    assert "blocks.*.attn.qkv.weight         (96, 32) x 2" in out
    assert re.search(
        r"memory: [1-9]\d* MB predicted .* are free\n"
        r"time:   [\d.e-]+ s a step as measured \(4 micro-steps .* 10 steps take about \d", out)
    assert list(tmp_path.iterdir()) == []
    run = small_run("run", "--max_steps=4")
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in run.iterdir()}
    small_run("run", "--resume", "--dry_run")
    assert "6 steps take about" in capsys.readouterr().out
    assert before == {
        file.name: (file.read_bytes(), file.stat().st_mtime_ns)
        for file in run.iterdir()
    }


def test_3090_config_without_data_or_gpu(tmp_path):
    result = call("train.py", "config/local_3090.py", f"--data_dir={tmp_path}", "--device=cpu")
    assert result.returncode == 1 and result.stderr.count(
        "\n") == 1 and "python prepare.py fineweb" in result.stderr
    if not torch.backends.mps.is_available():
        assert "falling back to the CPU" in call("train.py", "config/local_3090.py",
                                                 f"--data_dir={tmp_path}").stdout


def test_windows_gets_one_line():
    code = "import socket, sys, zipfile; sys.platform = 'win32'; import nanolab.common"
    result = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == "nanolab runs on Linux and macOS; on Windows, use it inside WSL\n"


def test_torchrun_ends_with_our_line(tmp_path):
    """A mistake in the configuration: each rank exits with 2, and the summary of torchrun has our
    line."""
    result = call("train.py", *SMALL, f"--out_dir={tmp_path}/out", "--batch_size=16", processes=2)
    lines = result.stderr.splitlines()
    ours = "train.py: global_batch_size=8 (from --global_batch_size) is not divisible by batch_size=16 "
    assert any(line.startswith(ours) for line in lines) and ours in lines[-2]
    assert result.returncode == 1 and "exitcode  : 2" in result.stderr.split("Root Cause")[1]


def test_muon_at_the_baselines_rate_gets_a_note(small_run, capsys):
    small_run("run", "--optimizer=muon", "--learning_rate=4e-4", "--max_steps=1")
    assert "learning_rate=0.0004 is the baseline's, for AdamW" in capsys.readouterr().out
    small_run("other", "--optimizer=muon", "--learning_rate=8e-3", "--max_steps=1")
    assert "is the baseline's" not in capsys.readouterr().out
