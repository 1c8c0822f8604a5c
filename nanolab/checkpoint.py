"""Checkpoints: load one, and save atomically in the background. start.py resumes from them."""

import fcntl
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from textwrap import shorten

import torch
from tqdm import tqdm

from config import OPTIONS, Config, GPTConfig
from model import GPT
from nanolab.common import UserError, describe, load_tensors, versions, write_atomically
from nanolab.distributed import print0
from nanolab.options import check

CHECKPOINT_FORMAT = 1


def checkpoint_file(path):
    """The file that a path names: of a run's folder best.pt, and where that is missing last.pt,
    which is then said. Any other path is returned as it is."""
    path = Path(path)
    best = path / "best.pt" if path.is_dir() else path
    last = best.with_name("last.pt")
    if best.name == "best.pt" and not best.exists() and last.is_file():
        print0(f"note: there is no {best}, so this is {last}", file=sys.stderr)
        return last
    return best if best.is_file() else path


def read_checkpoint(path, mmap=False):
    """A file that train.py saved, or its run's folder (see checkpoint_file). -> a dict, tensors on
    the CPU. Executes nothing from the file.

    mmap: leave the tensors on disk until they are used. Raises UserError.
    """
    path = checkpoint_file(path)
    return checked(load_tensors(path, mmap), path)


def checked(checkpoint, path):
    """What a file held, if it is a checkpoint, with all options. Raises UserError."""
    if not (isinstance(checkpoint, dict) and checkpoint.get("format") == CHECKPOINT_FORMAT
            and {"model", "config", "tokenizer", "step", "tokens", "seconds"} <= checkpoint.keys()
            and isinstance(checkpoint["config"], dict) and are_weights(checkpoint["model"])):
        raise UserError(f"{path} is no checkpoint of nanolab or nanoGPT that this nanolab reads")
    config = {**vars(Config()), **checked_options(checkpoint["config"], path)}
    for key in {"model", "training_model"} & checkpoint.keys():  # some have old names
        checkpoint[key] = {name.replace(".value_share", ".v0_lambda").replace(
            ".embedding_share", ".ve_lambda"): p for name, p in checkpoint[key].items()}
    return {**checkpoint, "path": str(path), "config": config}


def are_weights(value):
    return isinstance(value, dict) and all(isinstance(p, torch.Tensor) for p in value.values())


def checked_options(options, source):
    """Options that a file holds, {name: value}, if Config allows their values. Raises UserError."""
    if unknown := sorted(map(str, options.keys() - OPTIONS.keys())):
        raise UserError(f"{source} has the option {unknown[0]}, which this nanolab does not have; "
                        "use the nanolab that made it")
    return {key: check(OPTIONS[key], value, source) for key, value in options.items()}


def load_model(checkpoint):
    """The GPT of what read_checkpoint or huggingface.read_any returned, in eval mode, on the CPU.
    Raises UserError."""
    model = GPT(GPTConfig.from_options(checkpoint["config"]))
    load_weights(model, checkpoint)
    return model.eval()


def load_weights(model, checkpoint):
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        reason = shorten(str(error).partition("\n")[2], 300, placeholder=" ...")
        raise UserError(f"{checkpoint['path']} does not fit its own config ({reason})") from None
    for name, weight in checkpoint["model"].items():
        if not (weight.is_floating_point() and weight.isfinite().all()):
            raise UserError(f"{checkpoint['path']} has weights that are not finite ({name})")


@dataclass
class RunState:
    """What a run has done so far. train.py's loop writes it, and every checkpoint holds it."""
    step: int = 0
    tokens: int = 0
    started: str | None = None  # UTC
    seconds: float = 0.0  # since the run began, validations and saves included
    timed_tokens: int = 0  # of training alone, without the first step
    timed_seconds: float = 0.0
    skipped: int = 0  # updates
    skipped_in_a_row: int = 0
    name_suffix: str = ""  # of a run whose schedule --extend changed: " (extended at step 8)"
    val_loss: float | None = None  # the last one
    averaged_steps: int = 0  # how many weights tail_average's mean is of
    code: list = field(default_factory=list)  # code_state(), and from which step on it ran

    def count_step(self, tokens, skipped, clock):
        """After a step. clock: a runlog.TrainingClock, of which this reads a lap."""
        seconds = clock.lap()
        if clock.n_laps > 1:  # a first step compiles, allocates, warms up
            self.timed_tokens += tokens
            self.timed_seconds += seconds
        self.step += 1
        self.tokens += tokens
        self.skipped += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        self.seconds = clock.total()

    def tokens_per_second(self):
        """Of training alone, unless the first step is all there is."""
        if self.timed_tokens:
            return self.timed_tokens / self.timed_seconds
        return self.tokens / self.seconds


def pack(config, meta, state, model, average, optimizer, scaler):
    """What last.pt and best.pt hold. "model" has the weights to use: inside the tail of
    tail_average their average; "training_model" then has those to go on from."""
    weights = {"model": model.state_dict()}
    if state.averaged_steps:
        weights = {"model": average.state_dict(), "training_model": model.state_dict()}
    return {"format": CHECKPOINT_FORMAT, **weights,
            "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), **vars(state),
            "config": vars(config), "tokenizer": meta["tokenizer"],
            "data_sha256": meta["splits"]["train"]["sha256"], "versions": versions()}


class CheckpointSaver:
    """Saves last.pt and best.pt in the background: a thread writes one file after the other. Only
    rank 0 has one that is enabled. As a context manager it waits for the last file and command.

    pack: a function that returns the checkpoint of this moment; best_val_loss: that of best.pt.
    """

    def __init__(self, config, pack, best_val_loss, world):
        self.out_dir, self.pack = Path(config.out_dir), pack
        self.enabled = world.rank == 0 and config.save_weights
        self.best_val_loss = best_val_loss  # only a best.pt on disk counts
        self.writer = ThreadPoolExecutor(max_workers=1)
        self.pending_save = self.writer.submit(bool)  # a finished Future: nothing is pending
        self.buffers, self.snapshot = {}, {}
        self.on_save, self.runner = config.on_save, ThreadPoolExecutor(max_workers=1)
        self.last_command = self.runner.submit(bool)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.writer.shutdown()
        if not self.last_command.done():
            tqdm.write("waiting for the last --on_save", file=sys.stderr)
        self.runner.shutdown()

    def wait(self):
        self.pending_save.result()

    def is_best(self, val_loss):
        self.wait()
        return self.enabled and val_loss < self.best_val_loss

    def save(self, name, wait=False):
        """Hands a file to the writer. With wait, training is paused, so no copy is needed; then
        last.pt must succeed: raises UserError if not."""
        if not self.enabled:
            return
        checkpoint = self.pack()
        if wait:
            self.wait()
        else:
            if self.snapshot.get("step") != checkpoint["step"]:  # one copy serves both files
                self.wait()  # the writer may still read the buffers
                self.snapshot = snapshot_to_cpu(checkpoint, self.buffers)
            checkpoint = self.snapshot
        self.pending_save = self.writer.submit(self.write, name, checkpoint)
        if wait and not self.pending_save.result() and name == "last.pt":
            (self.out_dir / "summary.json").unlink(missing_ok=True)  # the run has not ended
            raise UserError(f"the last steps are lost: {self.out_dir / name} could not be saved")

    def write(self, name, checkpoint):
        """Writes a file, in the writer's thread. -> whether it could."""
        with suppress(OSError), open(self.out_dir / "log.jsonl") as log:
            os.fsync(log.fileno())  # a lost machine's log reaches as far as its checkpoint
        best = checkpoint["val_loss"] if name == "best.pt" else self.best_val_loss
        saved = save_checkpoint(self.out_dir / name, {**checkpoint, "best_val_loss": best})
        if saved:
            self.best_val_loss = best
            # a command that still waits for the one before it sees this file too
            if self.on_save and (self.last_command.running() or self.last_command.done()):
                self.last_command = self.runner.submit(run_on_save, self.on_save, self.out_dir)
        return saved


def save_checkpoint(path, checkpoint):
    """Writes a checkpoint. -> whether it could. If not, it prints why, and the file that was there
    is unchanged."""
    try:
        write_atomically(path, partial(torch.save, checkpoint))
        return True
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        tqdm.write(f"could not save {path} ({describe(error)}); what was there before is kept",
                   file=sys.stderr)
        return False


def run_on_save(command, out_dir):
    """Runs a shell command to its end. If it fails, one line says so and the run goes on."""
    folder = os.open(out_dir, os.O_RDONLY)
    with suppress(OSError):  # some disks have no locks
        fcntl.flock(folder, fcntl.LOCK_EX)  # which the command has too: it may outlive a killed run
    try:
        # in a session of its own: Ctrl-C, which ends a run in good order, must not end the copy
        subprocess.run(command, shell=True, stdin=subprocess.DEVNULL, text=True, check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, errors="replace",
                       start_new_session=True, pass_fds=[folder])
    except (subprocess.CalledProcessError, OSError) as error:  # OSError: no memory for a process
        said = ((getattr(error, "stderr", "") or "").strip() or str(error)).splitlines()[-1]
        tqdm.write(f"--on_save failed ({said[:500]}): {command}", file=sys.stderr)
    finally:
        os.close(folder)


def snapshot_to_cpu(checkpoint, buffers):
    """Copies a checkpoint, so that it can be written while training changes its tensors.

    buffers: {(address, shape) of a tensor: its copy on the CPU}, which the first call fills: fresh
    memory costs the system more than the copy. Tied weights share storage, so they are saved once.
    """
    if isinstance(checkpoint, dict):
        return {key: snapshot_to_cpu(value, buffers) for key, value in checkpoint.items()}
    if isinstance(checkpoint, list):
        return [snapshot_to_cpu(value, buffers) for value in checkpoint]
    if not isinstance(checkpoint, torch.Tensor):
        return checkpoint
    place = (checkpoint.data_ptr(), checkpoint.shape)
    if place not in buffers:
        buffers[place] = torch.empty_like(checkpoint, device="cpu")
    return buffers[place].copy_(checkpoint)
