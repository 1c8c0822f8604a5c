"""Checkpoints: read any kind, start or resume a run from one, save in the background, whole or not
at all."""

import math
import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from config import (ARCHITECTURE_OPTIONS, OPTIONS, Config, GPTConfig, config_error, parse,
                    resume_may_change)
from nanolab.common import UserError, describe, load_tensors
from nanolab.devices import print0
from nanolab.huggingface import OPENAI_REVISIONS, download_openai, read_hugging_face

CHECKPOINT_FORMAT = 1


def read_checkpoint(source, mmap=False):
    """A checkpoint as a dict, tensors on the CPU. Executes nothing from a file.

    source: a file that train.py saved, or its run's folder, for best.pt; a folder in Hugging Face's
    layout; or one of OpenAI's names, such as gpt2, which is downloaded once. mmap: leave the
    tensors on disk until they are used.
    Raises UserError.
    """
    if Path(source, "best.pt").is_file():
        source = Path(source, "best.pt")
    if Path(source).is_dir():
        return {"format": CHECKPOINT_FORMAT, **read_hugging_face(Path(source), source)}
    if not Path(source).exists():
        if str(source) in OPENAI_REVISIONS:
            folder = download_openai(str(source))
            return {"format": CHECKPOINT_FORMAT, **read_hugging_face(folder, source)}
        names = ", ".join(OPENAI_REVISIONS)
        hint = f"; OpenAI's weights are {names}" if str(source).startswith("gpt") else ""
        raise UserError(f"there is no checkpoint {source}{hint}")
    checkpoint = load_tensors(source, mmap)
    if not isinstance(checkpoint, dict) or not {"format", "model", "config"} <= checkpoint.keys():
        raise UserError(f"{source} is no checkpoint of nanolab")
    if checkpoint["format"] != CHECKPOINT_FORMAT:
        raise UserError(f"{source} has format {checkpoint['format']}; this nanolab reads format "
                        f"{CHECKPOINT_FORMAT}")
    return {**checkpoint, "path": str(source), "config": stored_options(checkpoint, source)}


def stored_options(checkpoint, source):
    """The config of a checkpoint, whose values are those that Config allows; options that it lacks
    have their defaults. Raises UserError."""
    is_whole = (isinstance(checkpoint["config"], dict) and checkpoint["config"].get("vocab_size")
                and isinstance(checkpoint["model"], dict)
                and all(isinstance(tensor, torch.Tensor) for tensor in checkpoint["model"].values())
                and {"tokenizer", "step", "tokens", "seconds"} <= checkpoint.keys())
    if not is_whole:
        raise UserError(f"{source} is no checkpoint of nanolab")
    if unknown := sorted(map(str, checkpoint["config"].keys() - OPTIONS.keys())):
        raise UserError(f"{source} has the option {unknown[0]}, which this nanolab does not have; "
                        "use the nanolab that made it")
    stored = {key: parse(key, value, source) for key, value in checkpoint["config"].items()}
    return {**vars(Config()), **stored}


@dataclass
class RunState:
    """What a run has done so far. Every checkpoint holds it."""
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0  # since the run began, validations and saves included
    timed_tokens: int = 0  # of training alone, without the first step
    timed_seconds: float = 0.0
    timed_outside: float = 0.0  # of these, outside forward, backward and optimiser
    skipped: int = 0
    name_suffix: str = ""  # names what no other run has been through, such as "_extended_400"
    val_loss: float | None = None
    best_val_loss: float = math.inf
    cpu_plan: dict | None = None  # see nanolab/cpu.py

    def tokens_per_second(self):
        """Of training alone, unless the first step is all there is."""
        if self.timed_tokens:
            return self.timed_tokens / self.timed_seconds
        return self.tokens / self.seconds


@dataclass
class Start:
    """Where a run starts: at its own last checkpoint, at the weights of init_from, or (neither) at
    random weights."""
    resumed: dict | None = None
    weights: dict | None = None

    def restore(self, tail, optimizer, scaler):
        """Loads what there is. -> the RunState to go on from."""
        if self.weights:
            tail.model.load_weights(self.weights)
            print0(f"start:  from the weights of {self.weights['path']}")
        if not self.resumed:
            return RunState()
        try:
            tail.load_state_dict(self.resumed)
            optimizer.load_state_dict(self.resumed["optimizer"])
            if self.resumed["scaler"]:  # empty unless the run was in float16
                scaler.load_state_dict(self.resumed["scaler"])
        except (AttributeError, KeyError, ValueError, TypeError, RuntimeError):
            raise UserError(f"{self.resumed['path']} does not fit this run, so it cannot be "
                            "resumed; start with --init_from instead") from None
        print0(f"resume: at step {self.resumed['step']:,}")
        known = [key for key in vars(RunState()) if key in self.resumed]
        return RunState(**{key: self.resumed[key] for key in known})


def find_start(config, meta, restarted):
    """The Start of a run, from out_dir, init_from and resume. Completes config with the options
    that given weights determine.

    meta: the data set's read_meta; restarted: torchrun started this run again after a process died,
    which may resume without --resume if it is the same run. Raises UserError where config or data
    would make it another run.
    """
    if not config.init_from:
        config.vocab_size = config.vocab_size or meta["vocab_size"]
    data_sha256 = meta["splits"]["train"]["sha256"]
    start = Start(resumed=checkpoint_to_resume(config, data_sha256, restarted))
    if config.init_from and not start.resumed:
        start.weights = read_checkpoint(config.init_from)
        inherit_architecture(config, start.weights)
        check_init_from(start.weights, config, meta["tokenizer"])
    if config.vocab_size < meta["vocab_size"]:
        raise config_error(f"vocab_size={config.vocab_size} is less than the {meta['vocab_size']} "
                           f"of {config.dataset}")
    return start


def checkpoint_to_resume(config, data_sha256, restarted):
    """last.pt in out_dir, or None if there is none. best.pt, too, must belong to this run."""
    paths = [Path(config.out_dir, name) for name in ("last.pt", "best.pt")]
    files = [path for path in paths if path.exists()]
    may_resume = config.resume or (
        restarted and files and read_run_checkpoint(files[0])["launch"] == torchrun_run_id())
    if files and not may_resume:
        raise config_error(f"{config.out_dir} holds a run already: --resume continues it, "
                           "--out_dir=ANOTHER starts one beside it")
    found = {}
    for path in files:  # best.pt may be from before an extension of which last.pt knows
        checkpoint = read_run_checkpoint(path)
        inherit_architecture(config, checkpoint)
        if changed := config_diff(checkpoint["config"], vars(config), config.extend or found):
            raise config_error(f"{path} belongs to another run: {'; '.join(changed)}")
        if checkpoint["data_sha256"] != data_sha256:
            raise config_error(f"{path} was trained on another data set of the name "
                               f"{config.dataset}")
        found[path.name] = checkpoint
    return found.get("last.pt")


def read_run_checkpoint(path):
    """read_checkpoint; if last.pt is damaged and best.pt beside it is not, the error says so."""
    try:
        return read_checkpoint(path)
    except UserError as error:
        best = path.with_name("best.pt")
        if path == best or not best.exists():
            raise
        step = read_checkpoint(best)["step"]
        raise UserError(f"{error}; {best} is whole: copy it over {path.name} to resume from step "
                        f"{step:,}") from None


def inherit_architecture(config, checkpoint):
    """Takes the architecture options that init_from left open from a checkpoint."""
    source = GPTConfig.from_options(checkpoint["config"])
    for key in ARCHITECTURE_OPTIONS:
        if getattr(config, key) is None:
            setattr(config, key, getattr(source, key))


def check_init_from(weights, config, tokenizer):
    """Checks init_from's weights against the config and the data; crops their positions to
    block_size."""
    source = GPTConfig.from_options(weights["config"])
    for key in ARCHITECTURE_OPTIONS:
        wanted, there = getattr(config, key), getattr(source, key)
        if wanted != there and not (key == "block_size" and wanted < there):
            raise config_error(f"{key}={wanted!r} was asked for, but init_from="
                               f"'{config.init_from}' has {key}={there!r}; leave out one of the "
                               "two")
    if weights["tokenizer"] != tokenizer:
        raise config_error(f"init_from='{config.init_from}' reads {weights['tokenizer']} tokens, "
                           f"but the data set {config.dataset} has {tokenizer} tokens")
    if "wpe.weight" in weights["model"]:
        weights["model"]["wpe.weight"] = weights["model"]["wpe.weight"][:config.block_size]


def config_diff(then, now, budget_may_change):
    """The changed options that would make it another run, as text."""
    may_change = resume_may_change(now)
    fixed_plan = now["schedule"] != "constant" or now["warmup_fraction"] or now["tail_average"]
    if budget_may_change or not fixed_plan:
        # (a longer run at a constant rate passes through the same states)
        may_change = may_change | {"max_tokens", "max_steps"}
    then = {key: then.get(key, option.default) for key, option in OPTIONS.items()}
    return [f"{key} was {then[key]!r}, is {now[key]!r}"
            for key in now if key not in may_change and then[key] != now[key]]


def torchrun_run_id():
    """Identifies one call of torchrun, restarts included; '' without torchrun."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "")


class CheckpointSaver:
    """Saves last.pt and best.pt in the background: a thread writes one file after the other.

    Only rank 0 has one that is enabled. As a context manager it waits for the last file.
    """

    def __init__(self, config, meta, state, tail, optimizer, scaler, max_steps, rank):
        self.config, self.meta, self.state = config, meta, state
        self.tail, self.optimizer, self.scaler = tail, optimizer, scaler
        self.enabled = rank == 0 and config.save_weights
        self.out_dir = Path(config.out_dir)
        self.folder = os.open(self.out_dir, os.O_RDONLY) if self.enabled else None
        self.writer = ThreadPoolExecutor(max_workers=1)
        self.pending_save = self.writer.submit(bool)  # a finished Future: nothing is pending
        self.buffers, self.snapshot = {}, None
        first_save = min(config.eval_every or max_steps, config.save_every or max_steps)
        self.needs_buffers = self.enabled and first_save < max_steps

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.writer.shutdown()
        if self.enabled:
            os.close(self.folder)

    def allocate_buffers(self):
        """Once the optimizer has its state, after the first step: makes room for the snapshots, in
        the background, so that the first save need not wait for fresh memory."""
        if self.needs_buffers:
            self.needs_buffers = False
            self.pending_save = self.writer.submit(snapshot_to_cpu, self.checkpoint(), self.buffers,
                                                   copy_single_threaded)

    def save_best(self, val_loss, wait):
        """Saves best.pt if val_loss is the lowest so far that has a file. -> whether it is."""
        self.state.val_loss = val_loss
        self.wait()  # then state.best_val_loss is that of the best.pt on disk
        is_best = self.enabled and val_loss < self.state.best_val_loss
        if is_best:
            self.submit("best.pt", wait)
        return is_best

    def save_last(self, wait):
        """Saves last.pt. With wait, it must succeed: raises UserError if not."""
        if self.enabled:
            self.submit("last.pt", wait)
        if self.enabled and wait and not self.pending_save.result():
            raise UserError(f"the last steps are lost: {self.out_dir / 'last.pt'} could not be "
                            "saved")

    def wait(self):
        self.pending_save.result()

    def submit(self, name, wait):
        """Hands a file to the writer. With wait, training is paused, so no copy is needed."""
        self.check_folder()
        if wait:
            self.wait()
            checkpoint = self.checkpoint()
        else:
            checkpoint = self.take_snapshot()
        self.pending_save = self.writer.submit(self.write, name, checkpoint)
        if wait:
            self.wait()

    def check_folder(self):
        """Raises UserError if out_dir was deleted since the run began, after saving it there again;
        or if there is another folder of that name now."""
        if not self.out_dir.exists():
            self.wait()
            self.out_dir.mkdir(parents=True)
            saved = save_checkpoint(self.out_dir / "last.pt", self.checkpoint())
            raise UserError(f"{self.out_dir} was deleted during the run" + saved * (
                f"; last.pt of step {self.state.step:,} is there again: the same command with "
                "--resume continues from it"))
        if not os.path.samestat(os.stat(self.out_dir), os.fstat(self.folder)):
            raise UserError(f"{self.out_dir} was deleted during the run, and another folder is "
                            "there now; nothing is written to it")

    def take_snapshot(self):
        """This step's checkpoint, copied once for both files."""
        if not self.snapshot or self.snapshot["step"] != self.state.step:
            self.wait()  # it may still be reading the buffers
            self.snapshot = snapshot_to_cpu(self.checkpoint(), self.buffers)
        return self.snapshot

    def checkpoint(self):
        return {"format": CHECKPOINT_FORMAT, **self.tail.state_dict(),
                "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                **vars(self.state), "config": vars(self.config),
                "tokenizer": self.meta["tokenizer"],
                "data_sha256": self.meta["splits"]["train"]["sha256"],
                "launch": torchrun_run_id(), "versions": versions()}

    def write(self, name, checkpoint):
        """Writes a file, in the writer's thread. -> whether it could. Only a best.pt on disk counts
        as the best."""
        best = checkpoint["val_loss"] if name == "best.pt" else checkpoint["best_val_loss"]
        saved = save_checkpoint(self.out_dir / name, {**checkpoint, "best_val_loss": best})
        if saved:
            self.state.best_val_loss = checkpoint["best_val_loss"] = best
        return saved


def save_checkpoint(path, checkpoint):
    """Writes a checkpoint whole or not at all: to a temporary file, then to the disk, then under
    its name. -> whether it could. If not, it prints why, and the file that was there is
    unchanged."""
    unfinished = Path(f"{path}.unfinished")
    try:
        with open(unfinished, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        return True
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        unfinished.unlink(missing_ok=True)
        tqdm.write(f"could not save {path} ({describe(error)}); what was there before is kept",
                   file=sys.stderr)
        return False


def snapshot_to_cpu(checkpoint, buffers, copy=torch.Tensor.copy_):
    """Copies a checkpoint, so that it can be written while training changes the tensors it was made
    of.

    buffers: {(address, shape) of a tensor: its copy on the CPU}. The first call fills it and the
    next ones reuse it: fresh memory costs the system more than the copy. Tied weights share
    storage, so they are saved once.
    """
    if isinstance(checkpoint, dict):
        return {key: snapshot_to_cpu(value, buffers, copy) for key, value in checkpoint.items()}
    if isinstance(checkpoint, list):
        return [snapshot_to_cpu(value, buffers, copy) for value in checkpoint]
    if not isinstance(checkpoint, torch.Tensor):
        return checkpoint
    place = (checkpoint.data_ptr(), checkpoint.shape)
    if place not in buffers:
        buffers[place] = torch.empty_like(checkpoint, device="cpu")
    copy(buffers[place], checkpoint)
    return buffers[place]


def copy_single_threaded(buffer, tensor):
    """torch would copy in parallel. In a second thread that starts a second OpenMP pool, which
    makes all threads sleep between products; small models then run at half speed."""
    np.copyto(buffer.numpy(), tensor.cpu().numpy())


def versions():
    return {"python": platform.python_version(), "torch": str(torch.__version__),
            "numpy": np.__version__}
