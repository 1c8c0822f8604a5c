"""Stopped, killed, restarted: a resumed run is the run that would have been."""

import errno
import math
import os
import random
import signal
import subprocess
import sys
import time
from unittest.mock import Mock

import pytest

from conftest import (HERE, assert_same_run, equal_weights, logged, losses, no_watch, read_json,
                      run_quickly, run_ranks, start, stop_at, wait_for)
from nanolab.checkpoint import CheckpointSaver, read_checkpoint
from nanolab.common import UserError
from nanolab.log import having, read_entries


def step_of(path):
    return read_checkpoint(path)["step"]


@pytest.mark.parametrize("options", [
    ["--schedule=cosine"],
    ["--schedule=wsd", "--amp=float16", "--optimizer=normuon", "--cautious_decay",
     "--weight_decay=5", "--value_embeddings", "--head_lr=2",
     "--tail_average=0.42"]])  # steps 8 to 12 are the tail
def test_resume_is_exact(small_run, tiny_data, options):
    """Stopped after any step and resumed, with dropout and a shuffled order, over epoch borders:
    bit for bit the run that would have been, and a log without gaps or repeats."""
    flags = [*tiny_data, "--eval_every=4", "--max_steps=12", *options]
    whole = small_run("whole", *flags)
    assert step_of(whole / "last.pt") == 12 and int(losses(whole)[0]) == 5
    for step in (0, 4, 7, 10):
        parts = small_run(f"stopped{step}", *flags, on_step=stop_at(step))
        assert step_of(parts / "last.pt") == step + 1
        with open(parts / "log.jsonl", "a") as file:  # a killed run logs more than it saves
            file.write(f'{{"step": {step + 1}, "tokens": 1, "loss": 0}}\n'
                       f'{{"step": {step + 2}, "tok')
        small_run(f"stopped{step}", *flags, "--resume")
        assert_same_run(whole, parts)


def test_resume_on_two_processes(small_run, tiny_data):
    """Two processes resume exactly. A run may go from one process to two and back, on one curve."""
    flags = [*tiny_data, "--batch_size=4", "--max_steps=12", "--resume"]
    whole = small_run("whole", *flags, ranks=2)
    small_run("parts", *flags, "--max_steps=5", ranks=2)
    parts = small_run("parts", *flags, ranks=2)
    assert equal_weights(whole / "last.pt", parts / "last.pt") and losses(whole) == losses(parts)
    small_run("moved", *flags, "--max_steps=4")
    small_run("moved", *flags, "--max_steps=8", ranks=2)
    moved = small_run("moved", *flags)
    assert losses(moved) == pytest.approx(losses(whole), rel=1e-5)


@pytest.mark.parametrize("last", ["older", "missing"])
def test_resume_is_exact_from_best(small_run, tiny_data, tmp_path, capsys, last):
    """Where best.pt has more steps than last.pt, or is alone, the run continues from it."""
    flags = [*tiny_data, "--max_steps=12", "--eval_every=4", "--save_every=5", "--tail_average=0.5"]
    parts = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):  # before step 9
        small_run("parts", *flags, on_step=Mock(side_effect=[*range(9), KeyboardInterrupt]))
    assert (step_of(parts / "last.pt"), step_of(parts / "best.pt")) == (5, 8)
    if last == "missing":
        (parts / "last.pt").unlink()
    small_run("parts", *flags, "--resume")
    assert f"resume: {parts / 'best.pt'}, at step 8" in capsys.readouterr().out
    assert_same_run(small_run("whole", *flags), parts)


@pytest.mark.parametrize("n_kills", [18, pytest.param(300, marks=pytest.mark.fuzz)])
def test_killed_at_any_moment(small_run, small_flags, tiny_data, tmp_path, n_kills):
    """SIGKILL again and again: while it starts, after a save, while a file is written. There is
    always an intact checkpoint or none, and in the end the run is the one that would have been."""
    flags = [*tiny_data, "--n_layer=1", f"--max_steps={12 * n_kills}", "--eval_every=10",
             "--eval_tokens=16", "--save_every=1", "--tail_average=0.5", "--resume"]
    folder, argv = tmp_path / "killed", small_flags("killed", *flags)
    last, best = folder / "last.pt", folder / "best.pt"
    draw, steps, kills_in_a_save = random.Random(1), [], 0

    def is_saving():
        return any(folder.glob("*.pt.unfinished"))

    def saved_at():
        return last.exists() and last.stat().st_mtime_ns

    for kill in range(n_kills):
        moment, before = kill % 3, saved_at()
        process = start(run_quickly, argv, output=tmp_path / "output")
        while process.is_alive() and (moment and saved_at() == before
                                      or moment == 2 and not is_saving()):
            time.sleep(0.001)
        time.sleep(draw.uniform(0, (0.2, 0.1, 0.003)[moment]))
        process.kill()
        process.join()
        if process.exitcode == 0:  # it ended before it was killed
            break
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "output").read_text()
        kills_in_a_save += is_saving()
        steps.append(step_of(last) if last.exists() else 0)
        if best.exists():
            step_of(best)
    assert len(steps) > n_kills / 2 and len(set(steps)) > n_kills / 4 and kills_in_a_save > 2
    assert steps == sorted(steps)
    (folder / "old.pt.unfinished").touch()
    small_run("killed", *flags)
    assert not is_saving(), "left-over files are cleaned"
    assert_same_run(small_run("whole", *flags, "--save_every=0"), folder)


def run_and_stop_rank_1(argv):
    run_quickly(argv, stop_at(5, signal.SIGTERM) if os.environ["RANK"] == "1" else no_watch)


def test_asked_to_stop_in_one_rank(small_flags, tmp_path):
    """A signal to one rank stops all after the same step, saved, with exit code 0."""
    flags = small_flags("out", "--batch_size=4", "--max_steps=500")
    printed = run_ranks(2, run_and_stop_rank_1, flags, output=tmp_path / "output")
    assert "--resume continues from here" in printed
    assert step_of(tmp_path / "out/last.pt") == len(losses(tmp_path / "out")) == 6


def long_run(small_flags, tmp_path, *flags):
    """A run that has made its first step. -> Process"""
    process = start(run_quickly, small_flags("out", "--max_steps=100000", *flags),
                    output=tmp_path / "output")
    wait_for(lambda: has_text(tmp_path / "out/log.jsonl"), process.is_alive)
    return process


def has_text(path):
    return path.exists() and path.stat().st_size > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_asked_to_stop(small_flags, tmp_path, number):
    """By Ctrl-C, kill or a closed terminal: it saves, says how to go on, exits with 0."""
    process = long_run(small_flags, tmp_path)
    os.kill(process.pid, number)
    process.join(30)
    assert process.exitcode == 0
    assert "--resume continues from here" in (tmp_path / "output").read_text()
    assert step_of(tmp_path / "out" / "last.pt") == len(losses(tmp_path / "out"))


def test_second_ctrl_c_ends_at_once(small_flags, tmp_path):
    process = long_run(small_flags, tmp_path, "--eval_every=1", "--eval_tokens=100_000_000",
                       "--block_size=64")  # it is in a long validation
    for _ in range(2):
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.3)
    process.join(2)
    assert process.exitcode == -signal.SIGINT


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_torchrun_is_stopped(small_flags, tmp_path, number):
    """Killed or by Ctrl-C, it leaves no process behind, and they save."""
    torchrun = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         "train.py", *small_flags("out", "--batch_size=4", "--max_steps=100000")],
        cwd=HERE, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out = tmp_path / "out"
    wait_for(lambda: has_text(out / "log.jsonl"), lambda: torchrun.poll() is None)
    torchrun.send_signal(number)
    _, stderr = torchrun.communicate(timeout=60)  # ends when no process has its pipes any more
    assert step_of(out / "last.pt") == len(losses(out)) and not (out / "run.lock").exists()
    assert 'train.py", line' not in stderr


def test_an_extended_tail(small_run, tiny_data):
    """The average goes on counting, under a name of its own, or starts again in the new tail."""
    flags = [*tiny_data, "--tail_average=0.5", "--name=tail", "--resume", "--extend"]
    for steps, n_averaged in ((10, 5), (12, 7), (24, 12)):
        run = small_run("run", *flags, f"--max_steps={steps}")
        last = read_checkpoint(run / "last.pt")
        assert (last["step"], last["averaged_steps"]) == (steps, n_averaged)
    assert last["config"]["name"] == "tail (extended at step 10) (extended at step 12)"


def test_resume_refuses_another_run(small_run, tiny_data):
    small_run("run", *tiny_data)
    for flag in ("--learning_rate=0.5", "--n_layer=3", "--block_size=8", "--global_batch_size=16",
                 "--init_seed=1", "--dropout=0.3", "--tail_average=0.1", "--order=sequential",
                 "--amp=bfloat16", "--weight_decay=0", "--optimizer=muon", "--compile=True",
                 "--save_weights=False"):
        key = flag[2:].split("=")[0]
        with pytest.raises(UserError, match=f"belongs to another run: .*{key} was .*, is "):
            small_run("run", *tiny_data, "--resume", flag)


@pytest.mark.parametrize("option", ["warmup_fraction=0.5", "schedule=cosine", "tail_average=0.5"])
def test_resume_refuses_another_length(small_run, option):
    """Where the rates of the steps done, or where the tail starts, depend on it."""
    small_run("run", f"--{option}", "--max_steps=2")
    with pytest.raises(UserError, match="max_steps was 2, is 4"):
        small_run("run", f"--{option}", "--max_steps=4", "--resume")


def test_resume_allows_what_changes_nothing(small_run):
    small_run("run", "--max_steps=2")
    run = small_run("run", "--resume", "--max_steps=4", "--batch_size=2", "--eval_every=3",
                    "--save_every=2", "--log_every=2", "--threads=1", "--dollars_per_hour=2",
                    "--name=other", "--compile=False")  # without dropout: no other masks
    assert step_of(run / "last.pt") == 4


@pytest.mark.parametrize("schedule, steps, stop, extend", [
    ("constant", 12, 99, []), ("wsd", 16, 11, ["--extend"])])  # falls in the last 3 of 16
def test_an_extended_run_is_the_longer_run(small_run, tiny_data, schedule, steps, stop, extend):
    """Stopped at a rate that a longer run has there too, it becomes that run, bit for bit."""
    flags = [*tiny_data, f"--schedule={schedule}", "--eval_every=4"]
    whole = small_run("whole", *flags, "--max_steps=24")
    parts = small_run("parts", *flags, f"--max_steps={steps}", on_step=stop_at(stop))
    assert (parts / "summary.json").exists() == (schedule == "constant")
    small_run("parts", *flags, "--resume", *extend, "--max_steps=24", on_step=stop_at(15))
    assert not (parts / "summary.json").exists(), "it has not ended"
    small_run("parts", *flags, "--resume", "--max_steps=24")
    assert_same_run(whole, parts)
    assert read_checkpoint(parts / "last.pt")["config"]["name"] == "baseline"


def test_an_extended_cosine_has_a_name_of_its_own(small_run, tiny_data, capsys):
    """From then on it has the rates of the longer run, but not its beginning; its name says so."""
    flags = [*tiny_data, "--schedule=cosine", "--warmup_fraction=0.25", "--name=short"]
    whole = small_run("whole", *flags, "--max_steps=12")
    parts = small_run("parts", *flags, "--max_steps=8")
    small_run("parts", *flags, "--resume", "--extend", "--max_steps=10")
    assert "this one is now short (extended at step 8)" in capsys.readouterr().out
    small_run("parts", *flags, "--resume", "--extend", "--max_steps=12")
    small_run("parts", *flags, "--max_steps=12", "--resume")
    assert f"{parts} is finished: 12 steps" in capsys.readouterr().out
    rates, longer = (logged("lr", folder) for folder in (parts, whole))
    assert rates[10:] == longer[10:] and rates[2:8] != longer[2:8]
    name = read_checkpoint(parts / "last.pt")["config"]["name"]
    assert name == "short (extended at step 8) (extended at step 10)"


def test_a_finished_run_has_its_summary(small_run, tmp_path, monkeypatch):
    """It is there before last.pt: killed between the two, the run would never get it."""
    found, summary = [], tmp_path / "run/summary.json"
    monkeypatch.setattr(CheckpointSaver, "save", lambda self, name, wait: found.append(
        (name, summary.exists())))
    small_run("run", "--max_steps=2")
    assert found == [("best.pt", False), ("last.pt", True)]


def test_an_end_that_was_killed(small_run):
    """Between the summary and last.pt: best.pt alone is no end."""
    run = small_run("run", "--max_steps=2")
    (run / "last.pt").unlink()
    small_run("run", "--max_steps=2", "--resume")
    assert step_of(run / "last.pt") == 2


def test_no_run_ends_where_it_was_stopped(small_run):
    """It would have no validation of its last step, and no average of its tail."""
    small_run("run", on_step=stop_at(5))
    with pytest.raises(UserError, match="6 steps are done, .* --max_steps=7 or more can end it"):
        small_run("run", "--resume", "--max_steps=6")
    assert step_of(small_run("run", "--resume", "--max_steps=7") / "last.pt") == 7


def test_two_runs_in_one_folder(small_flags, small_run, tmp_path):
    """The second is one line and changes nothing; after a kill of the first the folder is free."""
    folder, flags = tmp_path / "out", ["--resume", "--name=second", "--max_steps=100000"]
    first = long_run(small_flags, tmp_path, "--save_every=5")
    wait_for((folder / "last.pt").exists)
    config_json = (folder / "config.json").read_text()
    with pytest.raises(UserError, match=f"^another run is writing to {folder}; "):
        small_run("out", *flags)
    assert first.is_alive() and (folder / "config.json").read_text() == config_json
    first.kill()
    first.join()
    small_run("out", *flags, f"--max_steps={step_of(folder / 'last.pt') + 2}")
    assert (folder / "summary.json").exists() and not (folder / "run.lock").exists()


def test_a_disk_without_locks(small_run, tiny_data, monkeypatch, capsys):
    """Some network disks have none: a note, and the run goes on."""
    no_lock = OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=no_lock))
    folder = small_run("run", *tiny_data, "--max_steps=2")
    assert "cannot be locked (No locks available)" in capsys.readouterr().out
    assert (folder / "summary.json").exists()


def test_a_damaged_log(small_run, tiny_data):
    """Garbage in log.jsonl does not stop a resumed run: the good lines stay."""
    flags = [*tiny_data, "--max_steps=4"]
    log = small_run("run", *flags) / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    garbage = [b"5\n", b"null\n", b'{"a": 1}\n', b'{"step": "x"}\n', b"\xff\n"]
    log.write_bytes(b"".join([lines[0], *garbage, *lines[1:]]))
    small_run("run", *flags, "--resume", "--max_steps=6")
    assert [entry["step"] for entry in having("loss", read_entries(log))] == [0, 1, 2, 3, 4, 5]


def test_what_is_gone_is_made_again(small_run):
    """A best.pt that was lost, and the summary of a run that was killed before it."""
    flags = ["--eval_every=5", "--max_steps=10"]
    run = small_run("run", *flags, on_step=stop_at(7))
    (run / "best.pt").unlink()
    lost = read_checkpoint(run / "last.pt")["best_val_loss"]
    small_run("run", *flags, "--resume")
    best = read_checkpoint(run / "best.pt")
    assert best["step"] == 10 and best["best_val_loss"] == best["val_loss"] and lost < math.inf
    summary = read_json(run / "summary.json")
    (run / "summary.json").unlink()
    small_run("run", *flags, "--resume")
    again = read_json(run / "summary.json")
    assert (again["steps"], again["final_val_loss"]) == (10, summary["final_val_loss"])
