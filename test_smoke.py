"""The newcomer's minute: the quickstart (a smaller one), evaluated and sampled by the README's
commands. Every other promise has a file in tests/.

    python -m pytest test_smoke.py
"""

import json
import math
import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.xdist_group("smoke")  # one process: all look at the same run


def call(*command):
    """Runs a script as a user would. -> what it prints to stdout, to stderr"""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=pathlib.Path(__file__).parent,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The quickstart at a smaller size. -> the folder"""
    folder = tmp_path_factory.mktemp("quickstart")
    out, err = call("train.py", "config/quickstart.py", f"--data_dir={folder}/data",
                    f"--out_dir={folder}/out", "--n_layer=1", "--n_embd=64", "--batch_size=8",
                    "--global_batch_size=8", "--max_steps=80", "--eval_every=40",
                    "--eval_tokens=4096", "--device=cpu")
    assert "tokens/s" in err and "python eval.py --ckpt" in out and "python sample.py" in out
    return folder / "out"


def test_train(run):
    """The run leaves what the README says, and the loss falls."""
    made = {"config.json", "log.jsonl", "last.pt", "best.pt", "loss.png", "summary.json"}
    assert made <= {file.name for file in run.iterdir()}
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    steps = [entry for entry in log if "loss" in entry]
    assert [entry["step"] for entry in steps] == list(range(80))
    assert set(steps[0]) == {"step", "tokens", "loss", "lr", "grad_norm", "clipped", "skipped",
                             "tokens_per_second", "mfu", "seconds"}
    assert steps[0]["loss"] > 5 and steps[-1]["loss"] < 3.5
    assert [entry["step"] for entry in log if "val_loss" in entry] == [40, 80]
    assert json.loads((run / "summary.json").read_text())["tokens"] == 80 * 8 * 128


def test_evaluate(run):
    out, _ = call("eval.py", "--ckpt", run / "best.pt", "--json", run / "one.json", "--device=cpu")
    result = json.loads((run / "one.json").read_text())["runs"][0]
    assert f"{result['test_loss']:.6f}" in out and result["test_loss"] < 3.5
    assert result["bits_per_byte"] == pytest.approx(result["test_loss"] / math.log(2), rel=1e-2)


def test_sample(run):
    """Two samples, which differ, of a prompt longer than the context."""
    prompt = "def prompt_longer_than_the_context(" + "argument, " * 10
    text, _ = call("sample.py", "--ckpt", run / "best.pt", "--prompt", prompt, "--num_samples=2",
                   "--max_new_tokens=80", "--device=cpu")
    _, one, other = text.split(prompt)
    assert one.splitlines()[0] != other.splitlines()[0]
