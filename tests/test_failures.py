"""Numbers that are not finite, disks that are full: a run goes on, or ends with one line and
nothing lost."""

import contextlib
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

import nanolab.checkpoint
import nanolab.runlog
import train
from conftest import (HERE, SMALL, assert_same_run, call, equal_weights, losses,
                      no_file_larger_than, runs_with_a_bad_update, write_script)
from model import GPT
from nanolab.checkpoint import read_checkpoint
from nanolab.common import UserError
from nanolab.export import write_folder
from nanolab.logfile import read_log


NAN_ON_ONE_RANK = """
from model import GPT
real, calls = GPT.forward, [0]

def forward(self, tokens, targets=None):
    calls[0] += self.training
    bad = self.training and calls[0] in (3, 4) and os.environ["RANK"] == "1"
    return real(self, tokens, targets) * (float("nan") if bad else 1.0)

GPT.forward = forward
train.main()
"""


@pytest.mark.parametrize("amp", ["off", "float16"])
def test_bad_numbers_on_one_rank(tmp_path, data_dir, amp):
    """A loss that is not a number on one of two ranks: both leave out that update, log it and count
    it."""
    script = write_script(tmp_path / "nan.py", NAN_ON_ONE_RANK)
    flags = [*SMALL, "--dataset=stdlib", f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'out'}",
             "--batch_size=4", "--max_steps=6"]
    result = call(script, *flags, f"--amp={amp}", processes=2)
    assert result.returncode == 0, result.stderr
    log = read_log(tmp_path / "out" / "log.jsonl")[0]
    assert [e["skipped"] for e in log] == [False, False, True, True, False, False]
    assert log[2]["loss"] is None and math.isfinite(log[-1]["loss"])
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["skipped_steps"] == 2
    checkpoint = read_checkpoint(tmp_path / "out" / "last.pt")
    assert checkpoint["optimizer"]["state"][0]["step"] == 4
    assert amp == "off" or checkpoint["scaler"]["scale"] == 65536 / 4


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_bad_numbers_where_adamw_is_queued(small_run, monkeypatch, optimizer):
    """As on a GPU, where AdamW itself leaves the update out: the run is the same bit for bit."""
    waiting, queued = runs_with_a_bad_update(small_run, monkeypatch, ("cpu",),
                                             f"--optimizer={optimizer}")
    assert_same_run(waiting, queued)


def test_bad_numbers_without_end(small_run, monkeypatch):
    """20 in a row end the run with the step and the first bad parameter; last.pt and best.pt stay
    good."""
    folder = small_run("run", "--max_steps=6", "--eval_every=1")
    good = read_checkpoint(folder / "best.pt")["best_val_loss"]
    real = GPT.hidden_states

    def hidden(self, tokens):
        for name, p in self.named_parameters():
            if name == "blocks.1.mlp.fc.weight" and not hasattr(p, "broken"):
                p.broken = p.register_hook(lambda grad: grad * math.nan)
        return real(self, tokens)

    monkeypatch.setattr(GPT, "hidden_states", hidden)
    with pytest.raises(
            UserError, match=
            r"20 updates .* step 25; the first parameter that went bad is blocks.1.mlp.fc.weight"):
        small_run("run", "--max_steps=60", "--resume", "--eval_every=100")
    assert read_checkpoint(folder / "best.pt")["best_val_loss"] == good
    assert read_checkpoint(folder / "last.pt")["step"] == 6


def test_validation_that_is_not_finite_is_never_best(small_run, monkeypatch):
    monkeypatch.setattr(train, "mean_loss", lambda *args: math.nan)
    folder = small_run("run", "--eval_every=5")
    assert not (folder / "best.pt").exists() and read_log(
        folder / "log.jsonl")[1][0]["val_loss"] is None


def test_full_disk_in_training(small_run, tiny_data, capsys):
    """A save that fails says so and leaves the last one good; training goes on; with room again, so
    does the run."""
    flags = [*tiny_data, "--save_every=2", "--eval_every=5"]
    folder = small_run("run", *flags)
    size = (folder / "last.pt").stat().st_size
    before = (folder / "last.pt").read_bytes()
    with no_file_larger_than(size // 2), pytest.raises(UserError,
                                                       match="last.pt could not be saved"):
        small_run("run", *flags, "--resume", "--max_steps=20")
    assert (folder / "last.pt"
            ).read_bytes() == before and capsys.readouterr().err.count("could not save") > 3
    small_run("run", *flags, "--resume", "--max_steps=20")
    assert_same_run(small_run("whole", *flags, "--max_steps=20"), folder)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
@pytest.mark.parametrize("output", ["> /dev/full 2> /dev/full", "2>&1 | true"])
def test_output_that_fails_ends_no_run(tiny_data, tmp_path, output):
    """A full disk behind the output, or a reader that has gone: the run goes on and is saved."""
    command = [sys.executable, "train.py", *SMALL, *tiny_data, f"--out_dir={tmp_path}",
               "--save_weights=True"]
    done = subprocess.run(f"set -o pipefail; {' '.join(command)} {output}", shell=True, cwd=HERE,
                          executable="bash", timeout=120)
    assert done.returncode == 0 and (tmp_path / "summary.json").exists()


def test_a_log_without_room(small_run, tiny_data, capsys):
    """Lines that a full disk does not take are kept until there is room; else the end says how many
    are missing, and so does --resume."""
    flags = [*tiny_data, "--max_steps=20", "--save_weights=True"]
    whole = small_run("whole", *flags)
    real, room = nanolab.runlog.RunLog.write, contextlib.ExitStack()

    def write(self, entry):
        if entry["step"] == 5:
            room.enter_context(no_file_larger_than(self.file.tell() + 40))
        if entry["step"] == 12:
            room.close()
        real(self, entry)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nanolab.runlog.RunLog, "write", write)
        late = small_run("late", *flags)
    assert losses(late) == losses(whole) and capsys.readouterr().err.count(
        "kept until there is room") == 1
    log = late / "log.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:8]))
    small_run("late", *flags, "--resume", "--max_steps=22")
    assert f"{log} lacks the steps 8 to 19" in capsys.readouterr().out


@pytest.mark.parametrize("replaced", [False, True])
def test_a_folder_that_is_deleted(small_run, tiny_data, monkeypatch, tmp_path, replaced):
    """The next save notices it, and saves where the folder was, so that --resume continues; another
    folder is not touched."""
    real, folder = train.learning_rate_at, tmp_path / "run"

    def learning_rate_at(step, *args):
        if step == 5:
            shutil.rmtree(folder)
            if replaced:
                folder.mkdir()
        return real(step, *args)

    flags = [*tiny_data, "--max_steps=40", "--save_every=8"]
    monkeypatch.setattr(train, "learning_rate_at", learning_rate_at)
    with pytest.raises(UserError, match="run was deleted during the run"):
        small_run("run", *flags)
    monkeypatch.undo()
    if replaced:
        assert not list(folder.iterdir())
    else:
        assert read_checkpoint(folder / "last.pt")["step"] == 8
        small_run("run", *flags, "--resume")
        assert equal_weights(small_run("whole", *flags) / "last.pt", folder / "last.pt")


def test_left_over_files_are_cleaned(small_run, tmp_path):
    """Those of a killed run of ours; a file of the user's stays."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("last.pt.unfinished", "log.jsonl.unfinished", "mine.unfinished"):
        (folder / name).write_text("")
    small_run("run", "--max_steps=2")
    assert [path.name for path in folder.glob("*.unfinished")] == ["mine.unfinished"]


def test_best_that_cannot_be_saved(small_run, tiny_data, monkeypatch):
    """The best validation loss is that of a best.pt that is there, in the run and in the last.pt
    saved with it; one that is still being written counts."""
    real, saved = nanolab.checkpoint.save_checkpoint, []

    def save(path, checkpoint):
        if path.name == "best.pt":
            time.sleep(0.3)  # longer than the steps to the next validation
        if path.name == "best.pt" and checkpoint["step"] == 4:
            return False
        saved.append((path.name, checkpoint["step"], checkpoint["best_val_loss"]))
        return real(path, checkpoint)

    val_losses = iter([3.0, 3.5, 4.0])
    monkeypatch.setattr(train, "mean_loss", lambda *args: next(val_losses))
    monkeypatch.setattr(nanolab.checkpoint, "save_checkpoint", save)
    small_run("run", *tiny_data, "--max_steps=12", "--eval_every=4", "--save_every=4")
    assert saved == [("last.pt", 4, math.inf), ("best.pt", 8, 3.5), ("last.pt", 8, 3.5),
                     ("last.pt", 12, 3.5)]


def test_saving_does_not_stop_the_training(small_run, tiny_data, monkeypatch):
    """Steps go on while a file is written, and none of them gets into it; the end waits for the
    last one."""
    flags = [*tiny_data, "--max_steps=12", "--eval_every=4"]
    real, slow = nanolab.checkpoint.save_checkpoint, []

    def save_slowly(path, checkpoint):
        log = path.parent / "log.jsonl"
        before = len(log.read_text().splitlines())
        end = time.monotonic() + 5
        while checkpoint["step"] < 12 and len(
                log.read_text().splitlines()) < before + 3 and time.monotonic() < end:
            time.sleep(0.01)
        slow.append((path.name, checkpoint["step"], len(log.read_text().splitlines()) - before))
        return real(path, checkpoint)

    whole = small_run("whole", *flags, "--save_every=0")
    copied, beside = nanolab.checkpoint.snapshot_to_cpu, []

    def watch(*args):
        if threading.current_thread() is not threading.main_thread():
            beside.append(args[2:])
        return copied(*args)

    monkeypatch.setattr(nanolab.checkpoint, "snapshot_to_cpu", watch)
    monkeypatch.setattr(nanolab.checkpoint, "save_checkpoint", save_slowly)
    slowly = small_run("slowly", *flags, "--save_every=4")
    monkeypatch.undo()
    assert beside and set(beside) == {(nanolab.checkpoint.copy_single_threaded,)
                                      }, "see test_the_thread_that_saves_starts_no_others"
    assert_same_run(whole, slowly)
    assert [at for at in slow if at[:2] == ("best.pt", 4)][0][2] >= 3, slow


@pytest.mark.skipif(not pathlib.Path("/proc/self/task").exists(),
                    reason="counts threads as Linux shows them")
def test_the_thread_that_saves_starts_no_others():
    """torch's copy in a second thread brings it OpenMP helpers of its own, and then everybody's
    sleep between two products."""
    code = """if True:
        import os, threading, torch, nanolab.checkpoint
        tensor = torch.ones(2**22)
        torch.empty_like(tensor).copy_(tensor)
        before, found = len(os.listdir("/proc/self/task")), []
        for how in ([nanolab.checkpoint.copy_single_threaded], []):
            def save():
                nanolab.checkpoint.snapshot_to_cpu({"model": tensor}, {}, *how)
                found.append(len(os.listdir("/proc/self/task")))
            thread = threading.Thread(target=save)
            thread.start()
            thread.join()
        print(before, *found)"""
    result = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "2"})
    before, alone, in_parallel = map(int, result.stdout.split())
    assert alone == before + 1 < in_parallel


def test_validation_leaves_no_trace(small_run):
    often = small_run("often", "--dropout=0.2", "--eval_every=1", "--save_every=3")
    assert losses(often) == losses(small_run("never", "--dropout=0.2"))


def test_float16_scales_and_unscales(small_run):
    """With float16 and its scaler, losses and the logged (unscaled) norms are those of float32,
    and those above grad_clip are clipped."""
    full = small_run("full", "--grad_clip=0.8")
    half = small_run("half", "--grad_clip=0.8", "--amp=float16")
    assert losses(half) == pytest.approx(losses(full), rel=1e-2)
    logs = [read_log(folder / "log.jsonl")[0] for folder in (full, half)]
    norms = [[entry["grad_norm"] for entry in log] for log in logs]
    assert norms[1] == pytest.approx(norms[0], rel=5e-2) and min(norms[0]) < 0.8 < max(norms[0])
    assert all(entry["clipped"] == (entry["grad_norm"] > 0.8) for log in logs for entry in log)
    assert read_checkpoint(half / "last.pt")["scaler"]["scale"] == 65536 and not read_checkpoint(
        full / "last.pt")["scaler"]
    small_run("bfloat16", "--amp=bfloat16", "--max_steps=2")


def test_a_flipped_bit_is_noticed(small_run, tiny_data):
    """In a checkpoint, wherever it is: the file is refused, or what is read is what was saved."""
    folder = small_run("run", *tiny_data, "--max_steps=2")
    last = folder / "last.pt"
    content, good = last.read_bytes(), read_checkpoint(last)
    rng = np.random.default_rng(1)
    outcomes = []
    for place in rng.integers(len(content), size=150).tolist():
        flipped = bytearray(content)
        flipped[place] ^= 1 << rng.integers(8)
        last.write_bytes(flipped)
        try:
            read = read_checkpoint(last)
        except UserError as error:
            assert str(error).startswith(str(last)) and "\n" not in str(error)
            outcomes.append("refused")
        else:
            assert str(read["config"]) == str(good["config"]) and str(read["optimizer"]) == str(
                good["optimizer"])
            assert all(torch.equal(read["model"][key], good["model"][key]) for key in good["model"])
            outcomes.append("the same")
    assert outcomes.count("refused") > 100


def test_a_damaged_last_names_the_best(small_run, tiny_data):
    """--resume refuses a damaged last.pt, and best.pt, copied over it, is a way out; if both are
    damaged, none is named."""
    flags = [*tiny_data, "--max_steps=4", "--eval_every=4"]
    folder = small_run("run", *flags)
    last, best = folder / "last.pt", folder / "best.pt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    with pytest.raises(
            UserError, match=
            r"last.pt is damaged: .*; .*best.pt is whole: copy it over last.pt to resume from step 4$"
    ):
        small_run("run", *flags, "--resume")
    shutil.copy(best, last)
    small_run("run", *flags, "--resume")
    last.write_bytes(content)
    best.write_bytes(content)
    with pytest.raises(UserError, match=r"best.pt is damaged: the checksum of [^;]*$"):
        small_run("run", *flags, "--resume")


def test_export_has_temporary_names_of_its_own(tmp_path):
    """A user's folder beside the exported one stays."""
    (tmp_path / "model.unfinished").mkdir()
    write_folder(tmp_path / "model", {"config.json": b"{}"}, {"weight": torch.ones(2)})
    assert {path.name for path in tmp_path.iterdir()} == {"model", "model.unfinished"}
