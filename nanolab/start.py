"""Where a run starts: at its own last checkpoint, at given weights, or at random ones."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch.distributed as dist

from config import ARCHITECTURE_OPTIONS, BUDGETS, RESUME_MAY_CHANGE, Config, GPTConfig
from nanolab.checkpoint import RunState, load_weights, read_checkpoint
from nanolab.common import UserError, code_state, utc_now
from nanolab.distributed import print0
from nanolab.huggingface import read_any
from nanolab.optim import count_steps, is_averaged, learning_rate_at
from nanolab.options import config_error


@dataclass
class Start:
    """resumed, a checkpoint of this run; or weights, those of init_from; or neither. config is
    complete: nobody changes it after."""
    config: Config
    resumed: dict | None = None
    weights: dict | None = None
    has_ended: bool = False  # its last.pt and its summary are there
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
                # unless the run was extended, so that the average begins again, later
                goes_on = is_averaged(resumed["step"] - 1, count_steps(self.config), self.config)
                if resumed.get("averaged_steps") and goes_on:
                    average.load_state_dict(resumed["model"])
                optimizer.load_state_dict(resumed["optimizer"])
                if resumed["scaler"]:  # empty unless the run was in float16
                    scaler.load_state_dict(resumed["scaler"])
            except (AttributeError, KeyError, ValueError, TypeError, RuntimeError):
                raise UserError(f"{resumed['path']} does not fit this run, so it cannot be "
                                "resumed; start with --init_from instead") from None
            state = RunState(**{key: resumed[key] for key in vars(state) if key in resumed})
            if not goes_on:
                state.averaged_steps = 0
            self.best_val_loss = resumed["best_val_loss"]
            print0(f"resume: {resumed['path']}, at step {state.step:,}")
        if not state.code or state.code[-1]["sha256"] != code_state()["sha256"]:
            state.code = [*state.code, {**code_state(), "step": state.step}]
        if not world.all(state.step == world.reduce(dist.ReduceOp.MAX, state.step)):
            raise UserError(f"the machines have different checkpoints in {self.config.out_dir}; "
                            "put it on a disk that they share")
        self.resumed = self.weights = None
        return state


def find_start(config, meta):
    """The Start of a run, from out_dir, init_from and resume, with a complete config.

    meta: the data set's read_meta. Raises UserError where config or data would make it another run.
    """
    if not config.init_from:
        config = with_budget(replace(config, vocab_size=config.vocab_size or meta["vocab_size"]),
                             meta)
    start = Start(config, resumed=checkpoint_to_resume(config, meta))
    if start.resumed:
        start.has_ended = (start.resumed["path"].endswith("last.pt")
                           and Path(config.out_dir, "summary.json").exists())
        start.config = with_architecture(config, start.resumed, meta)
        follow_schedule(start)
    elif config.init_from:
        start.weights = read_any(config.init_from)
        start.config = with_architecture(config, start.weights, meta)
        check_init_from(start.weights, start.config, meta["tokenizer"])
    if start.config.vocab_size < meta["vocab_size"]:
        raise config_error(f"vocab_size={start.config.vocab_size} is less than the "
                           f"{meta['vocab_size']} of {config.dataset}")
    return start


def checkpoint_to_resume(config, meta):
    """The run's checkpoint with the most steps, last.pt or best.pt; None if there is neither. Both
    must belong to this run. Raises UserError."""
    paths = [Path(config.out_dir, name) for name in ("last.pt", "best.pt")]
    paths = [path for path in paths if path.exists() and (config.resume or not config.dry_run)]
    if not (paths or config.dry_run) and all(
            Path(config.out_dir, name).exists() for name in ("config.json", "summary.json")):
        raise config_error(f"{config.out_dir} has the record of a finished run, without its "
                           "checkpoints; --out_dir=ANOTHER keeps it")
    if paths and not config.resume:
        raise config_error(f"{config.out_dir} holds a run already: --resume continues it, "
                           "--out_dir=ANOTHER starts one next to it")
    steps = {}
    for path in paths:
        checkpoint = read_run_checkpoint(path, mmap=True)
        then, now = checkpoint["config"], vars(with_architecture(config, checkpoint, meta))
        if changed := config_diff(then, now, checkpoint["step"], config.extend or bool(steps)):
            raise config_error(f"{path} belongs to another run: {'; '.join(changed)}")
        if checkpoint["data_sha256"] != meta["splits"]["train"]["sha256"]:
            raise config_error(f"{path} was trained on another data set of the name "
                               f"{config.dataset}")
        steps[path] = checkpoint["step"]
    if not steps:
        return None
    best = checkpoint["best_val_loss"] if path.name == "best.pt" else math.inf  # of the file there
    return {**read_run_checkpoint(max(steps, key=steps.get)), "best_val_loss": best}


def read_run_checkpoint(path, mmap=False):
    """read_checkpoint; if it cannot, the error says how to go on."""
    try:
        return read_checkpoint(path, mmap)
    except UserError as error:
        other = path.with_name("best.pt" if path.name == "last.pt" else "last.pt")
        advice = f"; without it, --resume goes on from {other}" if other.exists() else ""
        raise UserError(f"{error}{advice}") from None


def with_architecture(config, checkpoint, meta):
    """The config with what init_from left open: architecture, from a checkpoint, and budget."""
    source = GPTConfig.from_options(checkpoint["config"])
    return with_budget(replace(config, **{key: getattr(source, key) for key in ARCHITECTURE_OPTIONS
                                          if getattr(config, key) is None}), meta)


def with_budget(config, meta):
    """The config with max_steps in the place of epochs."""
    if not config.epochs:
        return config
    n_windows = (meta["splits"]["train"]["tokens"] - 1) // config.block_size
    n_steps = config.epochs * n_windows / config.global_batch_size
    return replace(config, epochs=0.0, max_steps=math.ceil(n_steps - 1e-9))  # 1.1 * 100 is 110.0...


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
    if config.tie_weights and config.head_lr != 1:
        raise config_error(f"head_lr={config.head_lr} has no effect: the head of init_from="
                           f"'{config.init_from}' is the embedding's matrix, see embedding_lr")
    if weights["tokenizer"] != tokenizer:
        raise config_error(f"init_from='{config.init_from}' reads {weights['tokenizer']} tokens, "
                           f"but the data set {config.dataset} has {tokenizer} tokens")
    if "wpe.weight" in weights["model"]:
        weights["model"]["wpe.weight"] = weights["model"]["wpe.weight"][:config.block_size]


def config_diff(then, now, step, budget_may_change):
    """The changed options that would make it another run after `step` steps, as text."""
    # compiled code draws other dropout masks
    may_change = RESUME_MAY_CHANGE | ({"compile"} if not now["dropout"] else set())
    if budget_may_change or same_schedule_so_far(then, now, step):
        may_change |= BUDGETS
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
    """Says it if a resumed run gets another number of steps than was planned. Unless it also had
    the learning rates of the new length so far, bit for bit, no other run has been through its
    states, and its name says so from now on."""
    then, config, step = start.resumed["config"], start.config, start.resumed["step"]
    planned, now = count_steps(SimpleNamespace(**then)), count_steps(config)
    if now == step < planned:
        raise config_error(f"{step:,} steps are done, without what the end of a run needs; "
                           f"--max_steps={step + 1} or more can end it")
    is_same = same_schedule_so_far(then, vars(config), step)
    suffix = start.resumed.get("name_suffix", "")
    new_suffix = suffix if is_same else f"{suffix} (extended at step {step})"
    start.resumed["name_suffix"] = new_suffix
    start.config = replace(config, name=config.name.removesuffix(suffix) + new_suffix)
    if now != planned and step < now:
        print0(f"resume: {now:,} steps instead of {planned:,}, from here on at the learning rates "
               f"of a run of {now:,} steps" + ("" if is_same else
               f"; the steps done had others, so this one is now {start.config.name}"))
