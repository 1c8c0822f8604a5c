"""The newcomer's minute: the quickstart (shortened), resumed, evaluated and sampled by the README's
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

HERE = pathlib.Path(__file__).parent
pytestmark = pytest.mark.xdist_group("smoke")  # one process: all look at the same run


def call(*command, processes=0):
    """Runs a script as a user would. -> CompletedProcess."""
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*launcher, *map(str, command)], cwd=HERE, env=environment,
                          capture_output=True, text=True, timeout=120)


def read_json(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The quickstart, shortened: 40 steps, then 40 more by --resume. -> the run's folder."""
    folder = tmp_path_factory.mktemp("quickstart")
    command = ["train.py", "config/quickstart.py", f"--data_dir={folder}/data",
               f"--out_dir={folder}/out", "--schedule=constant", "--warmup_fraction=0",
               "--eval_every=40", "--eval_tokens=4096", "--device=cpu"]
    first = call(*command, "--max_steps=40")
    assert first.returncode == 0, first.stderr
    assert "tokens/s" in first.stderr
    assert "python eval.py --ckpt" in first.stdout and "python sample.py" in first.stdout
    second = call(*command, "--max_steps=80", "--resume")
    assert second.returncode == 0 and "resume: at step 40" in second.stdout, second.stderr
    return folder / "out"


def test_train(run):
    """The run leaves what the README says, and the loss falls."""
    made = {
        "config.json", "log.jsonl", "last.pt", "best.pt", "loss.png", "report.html", "summary.json"
    }
    assert made <= {file.name for file in run.iterdir()}
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    steps = [entry for entry in log if "loss" in entry]
    assert [entry["step"] for entry in steps] == list(range(80))
    assert set(steps[0]) == {"step", "tokens", "loss", "lr", "grad_norm", "clipped", "skipped",
                             "tokens_per_second", "mfu", "seconds"}
    assert steps[0]["loss"] > 5 and steps[-1]["loss"] < 3
    assert [entry["step"] for entry in log if "val_loss" in entry] == [40, 80]
    assert read_json(run / "summary.json")["tokens"] == 80 * 16 * 128


def test_evaluate(run):
    """One process and two find the same test loss, and the table takes it."""
    one = call("eval.py", "--ckpt", run / "best.pt", "--json", run / "one.json", "--device=cpu")
    assert one.returncode == 0, one.stderr
    result = read_json(run / "one.json")["runs"][0]
    assert f"{result['test_loss']:.6f}" in one.stdout and result["test_loss"] < 3
    assert result["bits_per_byte"] == pytest.approx(result["test_loss"] / math.log(2), rel=1e-2)

    (run / "best.test.json").unlink()  # or it would not be measured again
    two = call("eval.py", "--ckpt", run / "best.pt", "--batch_size=50", "--json", run / "two.json",
               "--device=cpu", processes=2)
    assert two.returncode == 0, two.stderr
    other = read_json(run / "two.json")["runs"][0]
    assert other["test_loss"] == pytest.approx(result["test_loss"], abs=1e-6)

    table = call("eval.py", "--ckpt", run / "best.pt", run / "two.json", "--baseline=quickstart",
                 "--markdown", "--device=cpu").stdout
    assert table.startswith("| experiment") and f" {other['test_loss']:.6f} |" in table


def test_sample(run):
    """Two samples, which differ, and are the same a second time; a prompt longer than the
    context."""
    prompt = "def prompt_longer_than_the_context(" + "argument, " * 10
    command = ["sample.py", "--ckpt", run / "best.pt", "--prompt", prompt, "--max_new_tokens=80",
               "--num_samples=2", "--seed=1", "--device=cpu"]
    texts = [call(*command).stdout for _ in range(2)]
    assert texts[0] == texts[1]
    _, one, other = texts[0].split(prompt)
    assert one.splitlines()[0] != other.splitlines()[0]
