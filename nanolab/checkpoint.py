"""Checkpoints: load any kind, start or resume a run from one, save atomically in the background."""

import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from tqdm import tqdm

from config import (ARCHITECTURE_OPTIONS, INIT_OPTIONS, OPTIONS, RESUME_MAY_CHANGE, SEEDS, Config,
                    GPTConfig)
from model import GPT
from nanolab.common import UserError, describe, load_tensors, parse_json, utc_now, versions
from nanolab.distributed import print0
from nanolab.huggingface import OPENAI_REVISIONS, download_openai, read_hugging_face
from nanolab.optim import count_steps, is_averaged, learning_rate_at
from nanolab.options import check, config_error

CHECKPOINT_FORMAT = 1
OLD_NAMES = {"value_share": "v0_lambda", "embedding_share": "ve_lambda"}  # of parameters


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
    config = stored_options(checkpoint, source)
    for key in {"model", "training_model"} & checkpoint.keys():
        checkpoint[key] = {with_new_name(name): p for name, p in checkpoint[key].items()}
    return {**checkpoint, "path": str(source), "config": config}


def stored_options(checkpoint, source):
    """The config of a checkpoint, whose values are those that Config allows; options that it lacks
    have their defaults. Raises UserError."""
    is_intact = (isinstance(checkpoint["config"], dict) and checkpoint["config"].get("vocab_size")
                 and isinstance(checkpoint["model"], dict)
                 and all(isinstance(p, torch.Tensor) for p in checkpoint["model"].values())
                 and {"tokenizer", "step", "tokens", "seconds"} <= checkpoint.keys())
    if not is_intact:
        raise UserError(f"{source} is no checkpoint of nanolab")
    if unknown := sorted(map(str, checkpoint["config"].keys() - OPTIONS.keys())):
        raise UserError(f"{source} has the option {unknown[0]}, which this nanolab does not have; "
                        "use the nanolab that made it")
    stored = {key: check(OPTIONS[key], value, source)
              for key, value in checkpoint["config"].items()}
    return {**vars(Config()), **stored}


def with_new_name(name):
    module, _, parameter = name.rpartition(".")
    return f"{module}.{OLD_NAMES[parameter]}" if parameter in OLD_NAMES else name


def load_model(checkpoint):
    """The GPT in eval mode, on the CPU, from what read_checkpoint takes or returned. Raises
    UserError."""
    if not isinstance(checkpoint, dict):
        checkpoint = read_checkpoint(checkpoint)
    model = GPT(GPTConfig.from_options(checkpoint["config"]))
    load_weights(model, checkpoint)
    return model.eval()


def load_weights(model, checkpoint):
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise UserError(f"{checkpoint['path']} does not fit its own config ({reason})") from None
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
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
    name_suffix: str = ""  # marks a run whose schedule --extend changed, such as "_extended_400"
    val_loss: float | None = None  # the last one

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


@dataclass
class Start:
    """Where a run starts: at its own last checkpoint, at the weights of init_from, or (neither) at
    random weights. config is complete: nobody changes it after."""
    config: Config
    resumed: dict | None = None
    weights: dict | None = None
    name_suffix: str = ""
    best_val_loss: float = math.inf  # that of best.pt

    def restore(self, model, average, optimizer, scaler, world):
        """Loads what there is, and frees it. -> the RunState to go on from. Raises UserError."""
        state, resumed = RunState(started=utc_now()), self.resumed
        if self.weights:
            load_weights(model, self.weights)
            print0(f"start:  from the weights of {self.weights['path']}")
        if resumed:
            try:
                model.load_state_dict(resumed.get("training_model", resumed["model"]))
                # unless the run was extended, so that the average begins later
                if resumed.get("averaged_steps") and is_averaged(
                        resumed["step"] - 1, count_steps(self.config), self.config):
                    average.module.load_state_dict(resumed["model"])
                    average.n_averaged.fill_(resumed["averaged_steps"])
                optimizer.load_state_dict(resumed["optimizer"])
                if resumed["scaler"]:  # empty unless the run was in float16
                    scaler.load_state_dict(resumed["scaler"])
            except (AttributeError, KeyError, ValueError, TypeError, RuntimeError):
                raise UserError(f"{resumed['path']} does not fit this run, so it cannot be "
                                "resumed; start with --init_from instead") from None
            state = RunState(**{key: resumed[key] for key in vars(state) if key in resumed})
            state.name_suffix = self.name_suffix
            self.best_val_loss = resumed["best_val_loss"]
            print0(f"resume: {resumed['path']}, at step {state.step:,}")
        if not world.all(state.step == world.reduce(dist.ReduceOp.MAX, state.step)):
            raise UserError(f"the machines have different checkpoints in {self.config.out_dir}; "
                            "put it on a disk that they share")
        self.resumed = self.weights = None
        return state


def pack(config, meta, state, model, average, optimizer, scaler):
    """What last.pt and best.pt hold. "model" has the weights to use: inside the tail of
    tail_average their average; "training_model" then has those to go on from."""
    n_averaged = int(average.n_averaged) if average else 0
    weights = {"model": model.state_dict()}
    if n_averaged:
        weights = {"model": average.module.state_dict(), "training_model": model.state_dict()}
    return {"format": CHECKPOINT_FORMAT, **weights, "averaged_steps": n_averaged,
            "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), **vars(state),
            "config": vars(config), "tokenizer": meta["tokenizer"],
            "data_sha256": meta["splits"]["train"]["sha256"], "versions": versions()}


# --- where a run starts

def find_start(config, meta):
    """The Start of a run, from out_dir, init_from and resume, with a complete config.

    meta: the data set's read_meta. Raises UserError where config or data would make it another run.
    """
    if not config.init_from:
        config = replace(config, vocab_size=config.vocab_size or meta["vocab_size"])
    start = Start(config, resumed=checkpoint_to_resume(config, meta))
    if start.resumed:
        start.config = with_architecture(config, start.resumed)
        follow_schedule(start)
    elif config.init_from:
        start.weights = read_checkpoint(config.init_from)
        start.config = with_architecture(config, start.weights)
        check_init_from(start.weights, start.config, meta["tokenizer"])
    if start.config.vocab_size < meta["vocab_size"]:
        raise config_error(f"vocab_size={start.config.vocab_size} is less than the "
                           f"{meta['vocab_size']} of {config.dataset}")
    return start


def checkpoint_to_resume(config, meta):
    """The run's checkpoint with the most steps, last.pt or best.pt; None if there is neither. Both
    must belong to this run. Raises UserError."""
    paths = [Path(config.out_dir, name) for name in ("last.pt", "best.pt")]
    paths = [path for path in paths if path.exists()]
    if paths and not config.resume:
        raise config_error(f"{config.out_dir} holds a run already: --resume continues it, "
                           "--out_dir=ANOTHER starts one next to it")
    steps = {}
    for path in paths:
        checkpoint = read_run_checkpoint(path, mmap=True)
        then, now = checkpoint["config"], vars(with_architecture(config, checkpoint))
        if changed := config_diff(then, now, checkpoint["step"], config.extend or bool(steps)):
            raise config_error(f"{path} belongs to another run: {'; '.join(changed)}")
        if checkpoint["data_sha256"] != meta["splits"]["train"]["sha256"]:
            raise config_error(f"{path} was trained on another data set of the name "
                               f"{config.dataset}")
        steps[path] = checkpoint["step"]
    return read_run_checkpoint(max(steps, key=steps.get)) if steps else None


def read_run_checkpoint(path, mmap=False):
    """read_checkpoint; if last.pt is damaged and best.pt is not, the error says so."""
    try:
        return read_checkpoint(path, mmap)
    except UserError as error:
        best = path.with_name("best.pt")
        if path == best or not best.exists():
            raise
        step = read_checkpoint(best)["step"]
        raise UserError(f"{error}; {best} is intact: copy it over {path.name} to resume from step "
                        f"{step:,}") from None


def with_architecture(config, checkpoint):
    """The config with the architecture options that init_from left open, from a checkpoint."""
    source = GPTConfig.from_options(checkpoint["config"])
    return replace(config, **{key: getattr(source, key) for key in ARCHITECTURE_OPTIONS
                              if getattr(config, key) is None})


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


def config_diff(then, now, step, budget_may_change):
    """The changed options that would make it another run after `step` steps, as text.

    Compiled code draws other dropout masks. A longer run passes through the same states as long as
    its learning rates are the same.
    """
    may_change = RESUME_MAY_CHANGE | ({"compile"} if not now["dropout"] else set())
    if budget_may_change or same_schedule_so_far(then, now, step):
        may_change |= {"max_tokens", "max_steps"}
    return [f"{key} was {then[key]!r}, is {now[key]!r}"
            for key in now if key not in may_change and then[key] != now[key]]


def same_schedule_so_far(then, now, step):
    """Whether two runs that differ in their length have the same learning rates, and no averaged
    weights, up to `step`. then, now: {option: value}."""
    then, now = SimpleNamespace(**then), SimpleNamespace(**now)
    old, new = count_steps(then), count_steps(now)
    return old == new or not now.tail_average and all(
        learning_rate_at(i, old, then) == learning_rate_at(i, new, now) for i in range(step))


def follow_schedule(start):
    """Says what it means that a resumed run gets another number of steps than was planned.

    From here on it has the learning rates of a run of the new length. Unless it also had them so
    far, bit for bit, no other run has been through its states, and its name says so from now on.
    """
    then, config, step = start.resumed["config"], start.config, start.resumed["step"]
    planned, now = count_steps(SimpleNamespace(**then)), count_steps(config)
    is_same = same_schedule_so_far(then, vars(config), step)
    suffix = start.resumed.get("name_suffix", "")
    start.name_suffix = suffix if is_same else f"{suffix}_extended_{step}"
    start.config = replace(config, name=config.name.removesuffix(suffix) + start.name_suffix)
    if now != planned and step < now:
        rate = learning_rate_at(step, now, config)
        print0(f"resume: {now:,} steps instead of {planned:,}; from here on the learning rate is "
               f"that of a run of {now:,} steps, now {rate:.4g}. " + (
                   "The steps done are those of that run too" if is_same else "The steps done are "
                   f"not those of that run: this one is now {start.config.name}"))


def options_of_run(files, given):
    """For options.load: where --resume stands without a config file or a flag that makes another
    run, the options in out_dir/config.json. -> (path, {option: value}). Raises UserError."""
    path = Path(given.get("out_dir", OPTIONS["out_dir"].default), "config.json")
    alone = not files and given.keys() <= RESUME_MAY_CHANGE | {"max_steps", "max_tokens"}
    if not (given.get("resume") and alone and path.exists()):
        return None, {}
    try:
        options = dict(parse_json(path.read_text()))
    except (OSError, ValueError, TypeError):
        raise config_error(f"{path} is damaged; resume with the config files and flags that the "
                           "run was started with") from None
    replaced = {"resume", "extend", "out_dir"}
    replaced |= set(SEEDS) if "seed" in given else set()
    replaced |= {"max_steps"} if "max_tokens" in given else set()
    replaced |= set(INIT_OPTIONS) if options.get("init_from") else set()
    return path, {key: options[key] for key in options.keys() - replaced}


# --- saving

class CheckpointSaver:
    """Saves last.pt and best.pt in the background: a thread writes one file after the other.

    Only rank 0 has one that is enabled. As a context manager it waits for the last file.
    pack: a function that returns the checkpoint of this moment; best_val_loss: that of best.pt.
    """

    def __init__(self, out_dir, pack, best_val_loss, enabled):
        self.out_dir, self.pack, self.enabled = Path(out_dir), pack, enabled
        self.best_val_loss = best_val_loss  # only a best.pt on disk counts
        self.writer = ThreadPoolExecutor(max_workers=1)
        self.pending_save = self.writer.submit(bool)  # a finished Future: nothing is pending
        self.buffers, self.snapshot = {}, None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.writer.shutdown()

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
            checkpoint = self.take_snapshot(checkpoint)
        self.pending_save = self.writer.submit(self.write, name, checkpoint)
        if wait and not self.pending_save.result() and name == "last.pt":
            raise UserError(f"the last steps are lost: {self.out_dir / name} could not be saved")

    def take_snapshot(self, checkpoint):
        """This step's checkpoint, copied once for both files."""
        if not self.snapshot or self.snapshot["step"] != checkpoint["step"]:
            self.wait()  # the writer may still read the buffers
            self.snapshot = snapshot_to_cpu(checkpoint, self.buffers)
        return self.snapshot

    def write(self, name, checkpoint):
        """Writes a file, in the writer's thread. -> whether it could."""
        best = checkpoint["val_loss"] if name == "best.pt" else self.best_val_loss
        saved = save_checkpoint(self.out_dir / name, {**checkpoint, "best_val_loss": best})
        if saved:
            self.best_val_loss = best
        return saved


def save_checkpoint(path, checkpoint):
    """Writes a checkpoint completely or not at all: to a temporary file, then to the disk, then
    under its name. -> whether it could. If not, it prints why, and the file that was there is
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


def snapshot_to_cpu(checkpoint, buffers):
    """Copies a checkpoint, so that it can be written while training changes the tensors it was made
    of.

    buffers: {(address, shape) of a tensor: its copy on the CPU}. The first call fills it and the
    next ones reuse it: fresh memory costs the system more than the copy. Tied weights share
    storage, so they are saved once.
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
