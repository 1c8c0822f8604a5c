"""Numbers that are not finite, disks that are full: a run goes on, and nothing is lost."""

import contextlib
import math
import os
import sys
import time

import numpy as np
import pytest
import torch

import nanolab.checkpoint
import nanolab.runlog
import train
from conftest import (SMALL, assert_same_run, equal_weights, logged, losses, no_file_larger_than,
                      read_json, run_quickly, run_ranks, start)
from config import Config
from nanolab.checkpoint import CheckpointSaver, load_model, read_checkpoint
from nanolab.common import UserError
from nanolab.data import TokenDataset
from nanolab.distributed import World


def run_with_a_bad_rank(argv):
    """A run in whose steps 2 and 3 rank 1 has a loss that is not a number."""
    def on_step(step, model):
        if step == 2 and os.environ["RANK"] == "1":
            on_step.hook = model.register_forward_hook(lambda model, args, loss: loss * math.nan)
        if step == 4 and os.environ["RANK"] == "1":
            on_step.hook.remove()
    run_quickly(argv, on_step)


def test_bad_numbers_on_one_rank(small_flags, tmp_path):
    """A loss that is not a number on one of two ranks: both skip, log and count the update."""
    out = tmp_path / "out"
    flags = small_flags("out", "--batch_size=4", "--max_steps=6", "--amp=float16")
    run_ranks(2, run_with_a_bad_rank, flags, output=tmp_path / "output")
    assert logged("skipped", out) == [False, False, True, True, False, False]
    assert losses(out)[2] is None and math.isfinite(losses(out)[-1])
    assert read_json(out / "summary.json")["skipped_steps"] == 2
    checkpoint = read_checkpoint(out / "last.pt")
    assert checkpoint["optimizer"]["state"][0]["step"] == 4
    assert checkpoint["scaler"]["scale"] == 65536 / 4


def spoil(p):
    """Makes a parameter's gradients not a number, from now on."""
    if not hasattr(p, "spoilt"):
        p.spoilt = p.register_hook(lambda grad: grad * math.nan)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_bad_numbers_leave_no_trace(small_run, optimizer):
    """A skipped update changes neither weights nor moments, also where gradients are clipped."""
    flags = [f"--optimizer={optimizer}", "--grad_clip=0.5"]
    good = small_run("good", *flags, "--max_steps=2")
    bad = small_run("bad", *flags, "--max_steps=3",
                    on_step=lambda step, model: spoil(model.head.weight) if step == 2 else None)
    assert equal_weights(good / "last.pt", bad / "last.pt")
    assert logged("skipped", bad) == [False, False, True]
    assert logged("clipped", bad) == [True, True, False]


def test_bad_numbers_without_end(small_run):
    """20 in a row end the run with the step and the first bad parameter; checkpoints stay good."""
    folder = small_run("run", "--max_steps=6", "--eval_every=1")
    good = read_checkpoint(folder / "best.pt")["best_val_loss"]
    with pytest.raises(UserError, match="20 updates in a row .* step 25: the first gradient that "
                                        "is not finite is that of blocks.1.mlp.fc.weight"):
        small_run("run", "--max_steps=60", "--resume", "--eval_every=100",
                  on_step=lambda step, model: spoil(model.blocks[1].mlp.fc.weight))
    assert read_checkpoint(folder / "best.pt")["best_val_loss"] == good
    assert read_checkpoint(folder / "last.pt")["step"] == 6


def test_full_disk_in_training(small_run, tiny_data, capsys):
    """A failed save leaves the last one good, and training goes on; with room, so do saves."""
    flags = [*tiny_data, "--save_every=2", "--eval_every=5"]
    last = small_run("run", *flags) / "last.pt"
    before = last.read_bytes()
    with no_file_larger_than(len(before) // 2):
        with pytest.raises(UserError, match="last.pt could not be saved"):
            small_run("run", *flags, "--resume", "--max_steps=20")
    assert last.read_bytes() == before and not [*last.parent.glob("*.unfinished")]
    assert capsys.readouterr().err.count("could not save") > 3
    small_run("run", *flags, "--resume", "--max_steps=20")
    assert_same_run(small_run("whole", *flags, "--max_steps=20"), last.parent)


def train_main(*argv):
    nanolab.runlog.matmul_peak = lambda *args: 1e12  # which takes longer than the run
    sys.argv += argv
    train.main()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_output_that_fails_ends_no_run(tiny_data, tmp_path):
    """stdout and stderr on a full disk: the run goes on and is saved."""
    run = start(train_main, *SMALL, *tiny_data, f"--out_dir={tmp_path}", output="/dev/full")
    run.join(60)
    assert run.exitcode == 0 and (tmp_path / "summary.json").exists()


def test_full_disk_under_the_log(small_run, tiny_data, capsys):
    """Lines are kept until there is room."""
    flags = [*tiny_data, "--max_steps=20"]
    whole = small_run("whole", *flags)
    log, room = whole.with_name("late") / "log.jsonl", contextlib.ExitStack()

    def on_step(step, model):
        if step == 5:
            room.enter_context(no_file_larger_than(log.stat().st_size + 40))
        if step == 12:
            room.close()

    late = small_run("late", *flags, on_step=on_step)
    assert losses(late) == losses(whole)
    assert capsys.readouterr().err.count("kept until there is room") == 1


def test_best_that_cannot_be_saved(small_run, tiny_data, monkeypatch):
    """The best validation loss is that of a best.pt that is on disk or being written, and a
    number."""
    real, saved = nanolab.checkpoint.save_checkpoint, []

    def save(path, checkpoint):
        if path.name == "best.pt":
            time.sleep(0.3)  # longer than the steps to the next validation
        if path.name == "best.pt" and checkpoint["step"] == 4:
            return False
        saved.append((path.name, checkpoint["step"], checkpoint["best_val_loss"]))
        return real(path, checkpoint)

    val_losses = iter([5.0, 3.0, 3.5, 4.0, math.nan])  # the first before step 0
    monkeypatch.setattr(train, "mean_loss", lambda *args: next(val_losses))
    monkeypatch.setattr(nanolab.checkpoint, "save_checkpoint", save)
    folder = small_run("run", *tiny_data, "--max_steps=16", "--eval_every=4", "--save_every=4")
    assert saved == [("last.pt", 4, math.inf), ("best.pt", 8, 3.5), ("last.pt", 8, 3.5),
                     ("last.pt", 12, 3.5), ("last.pt", 16, 3.5)]
    assert logged("val_loss", folder)[4] is None


def test_saving_does_not_stop_the_training(small_run, tiny_data, monkeypatch):
    """Steps go on while a file is written, and none of them gets into it; the end waits for it."""
    flags = [*tiny_data, "--max_steps=12", "--eval_every=4"]
    whole = small_run("whole", *flags, "--save_every=0")
    real, steps_beside, done = nanolab.checkpoint.save_checkpoint, {}, [0]

    def save_slowly(path, checkpoint):
        end = time.monotonic() + 5
        while done[0] < min(checkpoint["step"] + 3, 11) and time.monotonic() < end:
            time.sleep(0.01)
        steps_beside[path.name, checkpoint["step"]] = done[0] - checkpoint["step"]
        return real(path, checkpoint)

    monkeypatch.setattr(nanolab.checkpoint, "save_checkpoint", save_slowly)
    slowly = small_run("slowly", *flags, "--save_every=4",
                       on_step=lambda step, model: done.__setitem__(0, step))
    assert_same_run(whole, slowly)
    assert steps_beside["best.pt", 4] >= 3


def test_validation_leaves_no_trace(small_run, data_dir):
    """And is without dropout."""
    often = small_run("often", "--dropout=0.2", "--eval_every=1", "--save_every=3")
    assert losses(often) == losses(small_run("never", "--dropout=0.2"))
    batch = TokenDataset(data_dir, "stdlib", "val", 32).batch(range(2048 // 32))
    gpt = load_model(read_checkpoint(often / "last.pt"))
    assert logged("val_loss", often)[-1] == pytest.approx(gpt(*batch).item(), rel=1e-6)


def test_float16_scales_and_unscales(small_run):
    """Losses and logged norms are those of float32, and norms above grad_clip are clipped."""
    full, half = (small_run(amp, "--grad_clip=0.8", f"--amp={amp}") for amp in ("off", "float16"))
    for folder in full, half:
        norms = logged("grad_norm", folder)
        assert logged("clipped", folder) == [norm > 0.8 for norm in norms]
        assert min(norms) < 0.8 < max(norms)
    assert losses(half) == pytest.approx(losses(full), rel=1e-2)
    assert logged("grad_norm", half) == pytest.approx(logged("grad_norm", full), rel=5e-2)
    assert read_checkpoint(half / "last.pt")["scaler"]["scale"] == 65536


def test_a_flipped_bit_is_noticed(small_run, tiny_data):
    """In a checkpoint, wherever it is: the file is refused, or what is read is what was saved.
    --resume says how to go on from best.pt."""
    flags = [*tiny_data, "--max_steps=4", "--eval_every=4", "--resume"]
    last = small_run("run", *flags) / "last.pt"
    content, good = last.read_bytes(), read_checkpoint(last)
    draw, n_refused = np.random.default_rng(1), 0
    for position in [*draw.integers(len(content), size=60).tolist(), len(content) // 2]:
        flipped = bytearray(content)
        flipped[position] ^= 1 << draw.integers(8)
        last.write_bytes(flipped)
        try:
            read = read_checkpoint(last)
        except UserError as error:
            assert str(error).startswith(str(last)) and "\n" not in str(error)
            n_refused += 1
        else:
            assert str((read["config"], read["optimizer"])) == str((good["config"],
                                                                    good["optimizer"]))
            assert all(torch.equal(read["model"][key], good["model"][key]) for key in good["model"])
    assert n_refused > 40
    with pytest.raises(UserError, match="last.pt is damaged: .*; without it, --resume goes on"):
        small_run("run", *flags)
    last.unlink()
    small_run("run", *flags)


def test_a_save_waits_for_the_one_before(tmp_path, monkeypatch):
    """Whose file may not get the newer weights."""
    written, weight, steps = [], torch.zeros(1), iter((1, 2))
    monkeypatch.setattr(nanolab.checkpoint, "save_checkpoint", lambda path, checkpoint: (
        time.sleep(0.2), written.append(checkpoint["model"].item())))
    pack = lambda: {"step": next(steps), "model": weight.add_(1)}
    world = World(torch.device("cpu"), None)
    with CheckpointSaver(Config(out_dir=str(tmp_path)), pack, 9.0, world) as saver:
        saver.save("last.pt")
        saver.save("last.pt")
    assert written == [1, 2]


def test_bad_numbers_now_and_then(small_run, monkeypatch):
    """Only skipped updates in a row end a run."""
    real, calls = train.average_over_ranks, iter(range(10))
    monkeypatch.setattr(train, "MAX_SKIPPED", 2)
    monkeypatch.setattr(train, "average_over_ranks", lambda *args: (
        [math.nan, *real(*args)[1:]] if next(calls) % 2 else real(*args)))
    assert read_checkpoint(small_run("run") / "last.pt")["skipped"] == 5
    monkeypatch.setattr(train, "average_over_ranks", lambda *args: [math.nan, *real(*args)[1:]])
    with pytest.raises(UserError, match="2 updates in a row .* all gradients are finite"):
        small_run("bad")
