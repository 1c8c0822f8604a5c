"""study.py makes what a study lacks: every run once, seed by seed, through stops and failures."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

import study
from config import Config
from conftest import HERE
from nanolab.common import UserError
from nanolab.data import read_meta
from nanolab.optim import count_steps
from nanolab.options import load
from nanolab.start import find_start
from nanolab.study import jobs

BASE = str(HERE / "config/lab.py")
NEW = [BASE, "--out=nowhere", "--arms"]

# Instead of train.py: it notes that it was called, is stopped by SIGTERM while there is a file
# `wait`, fails as `bad`, and leaves what a run does.
TRAIN = """
import json, os, signal, sys, time
from config import Config
from nanolab.options import load
config = vars(load(Config, sys.argv[1:]))
folder, name = config["out_dir"], config["name"]
signal.signal(signal.SIGTERM, lambda *_: sys.exit(print("saved", file=open("saved", "a"))))
print(folder, os.environ["OMP_NUM_THREADS"], config["resume"], file=open("calls", "a"))
os.makedirs(folder, exist_ok=True)
json.dump(config, open(folder + "/config.json", "w"))
with open(folder + "/log.jsonl", "w") as log:
    print(json.dumps({"step": 4, "tokens": 5 * 512, "loss": 4.0}), file=log)
while os.path.exists("wait"):
    time.sleep(0.05)
if name == "killed":
    print("a bar", flush=True)
    os.kill(os.getpid(), 9)
if name == "bad":
    sys.exit("first\\ntrain.py: it diverged")
open(folder + "/best.pt", "w").close()
json.dump({"best_val_loss": 3.0}, open(folder + "/summary.json", "w"))
"""
EVAL = """
import json, sys
folder = sys.argv[2].removesuffix("best.pt")
config = json.load(open(folder + "config.json"))
loss = 3 + config["seed"] ** 2 / 100 - (config["name"] == "small") / 7
json.dump({"results": [{"name": config["name"], "test_loss": loss, "amp": "off",
                        "dataset": "stdlib", "config": config}]},
          open(folder + "best.test.json", "w"))
"""


def test_a_study_is_stopped_goes_on_and_grows(tmp_path):
    """With the stand-ins for train.py and eval.py, from another folder than theirs."""
    program = tmp_path / "program"
    program.mkdir()
    shutil.copy(HERE / "study.py", program)
    for folder in ("config", "nanolab"):
        (program / folder).symlink_to(HERE / folder)
    (program / "train.py").write_text(TRAIN)
    (program / "eval.py").write_text(EVAL)
    calls = tmp_path / "calls"
    words = [BASE, "--max_steps=10", "--arms", "small=--n_layer=2", "bad=--dropout=0", "--jobs=2",
             "--out=out/s"]

    def begin(*words):
        return subprocess.Popen(
            [sys.executable, program / "study.py", *words], cwd=tmp_path, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(HERE), "PYTHONUNBUFFERED": "1"})

    def command(*words):
        """-> its exit code, output and errors"""
        process = begin(*words)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    for number, whole_group in ((signal.SIGINT, True), (signal.SIGTERM, False)):
        (tmp_path / "wait").touch()
        process = begin(*words, "--seeds=1", "--plot=a.png")  # of nothing
        n_calls = 2 if whole_group else 4
        while not calls.exists() or len(calls.read_text().splitlines()) < n_calls:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        time.sleep(0.3)
        (os.killpg if whole_group else os.kill)(process.pid, number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130 and "the same command goes on" in err
        assert not list(tmp_path.glob("out/s/*/1/summary.json"))
        assert len((tmp_path / "saved").read_text().split()) == n_calls
        assert "out/s/baseline/1 has not ended" in out
        page = (tmp_path / "out/s/study.html").read_text()
        assert "0 of 3 runs are done" in page and "location.reload()" not in page
    (tmp_path / "wait").unlink()
    calls.unlink()

    code, out, err = command(*words, "--seeds=2")
    assert code == 1 and "failed: out/s/bad/1: train.py: it diverged; out/s/bad/2" in err
    assert "small       2  2.8821     -0.1429" in out and "wrote out/s/study.html" in err
    assert sorted(calls.read_text().splitlines()) == [
        f"out/s/{name}/{seed} 1 True" for name in ("bad", "baseline", "small") for seed in (1, 2)]
    assert "4 of 6 runs are done, 2 failed" in (tmp_path / "out/s/study.html").read_text()

    calls.unlink()  # one seed more, and no run twice
    code, out, _ = command(BASE, "--max_steps=10", "--arms", "small=--n_layer=2", "--seeds=3",
                           "--out=out/s", "--threads=2")
    assert code == 0 and "small       3" in out
    assert sorted(calls.read_text().splitlines()) == [
        "out/s/baseline/3 2 True", "out/s/small/3 2 True"]
    code, again, _ = command("out/s")
    assert code == 0 and again.split("missing")[0] in out
    code, _, err = command(BASE, "--max_steps=10", "--arms", "killed=--n_layer=1", "--seeds=1",
                           "--out=out/s")
    assert code == 1 and "killed/1: killed by signal 9, perhaps because memory ran out\n" in err
    code, _, err = command(BASE, "--max_steps=10", "--learning_rate=1", "--out=out/s")
    assert code == 2 and "out/s/baseline/1 was made with learning_rate=0.0004, not 1" in err


@pytest.fixture
def planned(monkeypatch):
    """planned(*words): the runs that this command would make"""
    def plan(*words):
        monkeypatch.setattr(sys, "argv", ["study.py", *words])
        return jobs.plan(study.parse_arguments())
    return plan


def test_what_an_arm_is(planned):
    plan = planned(*NEW, "qk_norm", "config/interventions/rope.py",
                   "mine=config/modern.py --batch_size='8' --beta2=0.9", "--seeds=2")
    assert [*plan] == [f"nowhere/{name}/{seed}" for seed in (1, 2)
                                            for name in ("baseline", "qk_norm", "rope", "mine")]
    words = [*plan.values()]
    assert words[1] == [BASE, "config/interventions/qk_norm.py", "--name=qk_norm", "--seed=1",
                        "--out_dir=nowhere/qk_norm/1", "--resume"]
    assert words[3][1:4] == ["config/modern.py", "--batch_size=8", "--beta2=0.9"]


def test_epochs_are_steps(planned, tmp_path, tiny_data):
    """As a run's config.json has them."""
    words = [BASE, *tiny_data]
    folder = tmp_path / "baseline/1"
    folder.mkdir(parents=True)
    n_steps = count_steps(find_start(load(Config, [*words, "--epochs=2"]), read_meta(
        tiny_data[1].removeprefix("--data_dir="), "tiny")).config)
    config = vars(load(Config, [*words, f"--max_steps={n_steps}", "--vocab_size=257"]))
    (folder / "config.json").write_text(json.dumps(config))
    assert planned(*words, "--epochs=2", "--seeds=1", f"--out={tmp_path}")
    with pytest.raises(UserError, match=f"was made with max_steps={n_steps}, not"):
        planned(*words, "--epochs=3", "--seeds=1", f"--out={tmp_path}")


def test_each_job_has_a_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    slots = jobs.each_environment(3, 2)
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots] == ["4", "7", "4"]
    assert {slot["OMP_NUM_THREADS"] for slot in slots} == {"2"}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    slots = jobs.each_environment(2, 1)
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots] == ["0", "1"]


@pytest.mark.parametrize("text, seeds", [("3", [1, 2, 3]), ("9001-9003", [9001, 9002, 9003]),
                                         ("7-7", [7])])
def test_seeds(planned, text, seeds):
    assert [*planned(BASE, f"--seeds={text}", "--out=nowhere")] == [
        f"nowhere/baseline/{seed}" for seed in seeds]


@pytest.mark.parametrize("argv, message", [
    (["out/study", "--arms", "x"], "--arms needs a config file"),
    (["out/study", "--n_layer=2"], "--n_layer=2 needs a config file"),
    (["config/lab.py", "out/study"], "give one of the two"),
    (["config/lab.py", "--jobs=0"], "must be at least 1"),
    (["config/lab.py", "--seeds=5-2"], "must be at least 1"),
    (["config/lab.py", "--seeds=five"], "invalid seeds value: 'five'"),
    (["config/lab.py", "--arms", "a=--n_lyer=2", "--arms", "b=--n_layer=3"], "n_lyer"),
    ([*NEW, "qk_norm", "qk_norm=--n_layer=1"], "'qk_norm' cannot be the name of an arm"),
    ([*NEW, "baseline=--n_layer=1"], "'baseline' cannot be the name"),
    ([*NEW, "../x=--n_layer=1"], "cannot be the name"),
    ([*NEW, "..=--n_layer=1"], "cannot be the name"),
    ([*NEW, "a=--seed=3"], "--seed is no flag for a study"),
    ([*NEW, "qk_norm", "--dry_run"], "--dry_run is no flag for a study"),
    ([*NEW, "a=--save_weights=False"], "--save_weights is no flag"),
    ([*NEW, "a=--name=it's"], "cannot be read: No closing quotation"),
    ([*NEW, "qk_nrm"], "qk_nrm.py"), ([*NEW, "a=--n_lyer=2"], "n_lyer"),
    ([*NEW, "muon", "--optimizer=adamw"],
     "--optimizer would win over config/interventions/muon")])
def test_commands_that_do_not_fit(monkeypatch, capsys, argv, message):
    """They get one line, before anything runs."""
    monkeypatch.setattr(subprocess, "Popen", None)
    monkeypatch.setattr(sys, "argv", ["study.py", *argv])
    with pytest.raises((SystemExit, UserError)) as error:
        study.main()
    assert message in capsys.readouterr().err + str(error.value)
