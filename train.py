"""One training run: a GPT-2-class model from scratch, on one device or on many, to the same result.

    python train.py config/local_3090.py
    torchrun --standalone --nproc_per_node=8 train.py config/cloud.py --batch_size=12

Step s trains on windows s x G ... s x G + G - 1 of the data's order, G = global_batch_size, however many processes and
micro-steps share them. It sets the learning rate, accumulates gradients over the micro-steps, averages them over the
ranks, measures and clips their norm, and updates the weights unless the norm is not finite.

Everything random is a pure function of a seed and a place in the run: initial weights of init_seed, the order of windows
of (data_seed, epoch), dropout masks of (dropout_seed, step, micro-batch). So no random state needs saving.
"""

import json
import math
import os
import platform
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from tqdm import tqdm

import config as configuration
from config import ConfigError
from model import (CHECKPOINT_FORMAT, GPT, CheckpointError, DeviceError, GPTConfig, autocast, autocast_dtype, linear,
                   mean_loss, read_checkpoint, start_processes)
from prepare import NANOGPT, RANDOM, DataError, Windows, describe, prepare_stdlib, read_meta, window_ids, write_atomically


class TrainingError(RuntimeError):
    """A run that cannot go on, told in one line."""


########################################
#     Batch, budget, learning rate     #
########################################

def count_micro_steps(config, world_size):
    """Micro-batches per process in one step. Raises ConfigError where the global batch does not divide."""
    together = config.batch_size * world_size  # sequences that all processes take at once
    if config.global_batch_size % together:
        below = config.global_batch_size // together * together
        nearest = " or ".join(str(size) for size in (below, below + together) if size)
        raise ConfigError(f"global_batch_size={config.global_batch_size} is not divisible by batch_size={config.batch_size} x "
                          f"{world_size} processes; global_batch_size could be {nearest}")
    return config.global_batch_size // together


def count_steps(config):
    return config.max_steps or math.ceil(config.max_tokens / (config.global_batch_size * config.block_size))


def learning_rate_at(step, steps, config):
    """The learning rate of step 0 ... steps - 1.

    Linear warm-up over the first warmup_fraction of the steps, from 1e-5 of the peak; then constant; or down to min_lr_ratio x
    peak, which the last step has: by one half cosine, or ('wsd') in a straight line over the last cooldown_fraction of the
    steps (Hu et al., "MiniCPM", 2024; Haegele et al., "Scaling laws and compute-optimal training beyond fixed training
    durations", 2024). The published runs (part 32e) chained torch's LinearLR and CosineAnnealingLR, which would reach the
    minimum one step after the last: at 33,165 steps the rates differ by 1.2e-4 of themselves at most.
    """
    warmup_steps = int(config.warmup_fraction * steps + 1e-9)
    if step < warmup_steps:
        return config.learning_rate * (1e-5 + (1 - 1e-5) * step / warmup_steps)
    if config.schedule == "constant":
        return config.learning_rate
    if config.schedule == "cosine":
        progress = (step - warmup_steps) / max(steps - 1 - warmup_steps, 1)
        height = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        height = min((steps - 1 - step) / max(int(config.cooldown_fraction * steps + 1e-9), 1), 1.0)
    lowest = config.learning_rate * config.min_lr_ratio
    return lowest + (config.learning_rate - lowest) * height


########################################
#         Optimiser and dropout        #
########################################

def make_optimizer(model, config):
    """AdamW of all parameters; or, with optimizer='muon', Muon of the matrices in the blocks and AdamW of all others.

    decay='all': every parameter decays, as published; 'matrices': only 2-D weights, not biases and norms.
    """
    matrices = {name: p for name, p in model.named_parameters()
                if config.optimizer == "muon" and name.startswith("blocks.") and p.ndim == 2}
    stacked = {"qkv.weight": 3, "fc.weight": 2 if config.activation == "swiglu" else 1}  # matrices in one weight
    by_pieces = {}
    for name, p in matrices.items():
        by_pieces.setdefault(stacked.get(name.split(".", 3)[-1], 1), []).append(p)
    rest = [p for name, p in model.named_parameters() if name not in matrices]
    decays = [p for p in rest if config.decay == "all" or p.ndim >= 2]
    others = [p for p in rest if config.decay == "matrices" and p.ndim < 2]
    owned = [id(p) for part in (*by_pieces.values(), decays, others) for p in part]
    assert sorted(owned) == sorted(id(p) for p in model.parameters()), "each parameter has exactly one owner"
    groups = [{"params": decays}, {"params": others, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW([group for group in groups if group["params"]], lr=config.learning_rate, fused=True,
                              betas=(config.beta1, config.beta2), eps=config.eps, weight_decay=config.weight_decay)
    if config.optimizer == "adamw":
        return adamw
    muon = Muon([{"params": params, "pieces": pieces} for pieces, params in by_pieces.items()],
                config.learning_rate, config.weight_decay)
    return Together(muon, adamw)


class Muon(torch.optim.Optimizer):
    """Descends along the nearest orthogonal matrix to the (Nesterov) momentum of each weight matrix (Jordan et al., "Muon: An
    optimizer for hidden layers in neural networks", 2024).

    The update's root mean square is 0.2 for every shape, about AdamW's, so that one learning rate and one weight decay serve
    both (Liu et al., "Muon is scalable for LLM training", 2025). It is torch.optim.Muon with adjust_lr_fn=
    "match_rms_adamw", but for two things: the numbers it computes in follow the device, and a group whose parameters are
    "pieces" matrices stacked in one, such as Q, K and V, has each orthogonalised by itself.
    """

    def __init__(self, groups, lr, weight_decay, momentum=0.95):
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "pieces": 1})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params, grads = group["params"], [p.grad for p in group["params"]]
            for p in params:
                if p not in self.state:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            momenta = [self.state[p]["momentum"] for p in params]
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            directions = torch._foreach_lerp(grads, momenta, group["momentum"])
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            for shape in {p.shape for p in params}:  # all matrices of one shape at once
                alike = [i for i, p in enumerate(params) if p.shape == shape]
                stack = torch.stack([directions[i] for i in alike])
                pieces = stack.view(len(alike) * group["pieces"], -1, shape[1])
                size = 0.2 * max(pieces.shape[1:]) ** 0.5
                torch._foreach_add_([params[i] for i in alike], list(orthogonal(pieces).reshape(stack.shape)),
                                    alpha=-group["lr"] * size)


def orthogonal(matrices):
    """(n, rows, columns) -> for each matrix U S V' about U V': its singular values pushed to between 0.7 and 1.2 by five
    Newton-Schulz iterations with Jordan's coefficients; in 16 bits where the device computes in them."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value above 1
    x = x.to(autocast_dtype("auto", x.device) or x.dtype)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Together:
    """Optimisers of different parameters, which step, save and load as one."""

    def __init__(self, *parts):
        self.parts = parts

    @property
    def param_groups(self):
        return [group for part in self.parts for group in part.param_groups]

    def step(self):
        for part in self.parts:
            part.step()

    def state_dict(self):
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states):
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def seed_dropout(dropout_seed, step, micro_batch):
    """Makes the masks of one micro-batch a function of its place in the run: ranks differ, a resumed run draws what it
    would have drawn, and 8 processes draw the masks of one process with 8 micro-steps."""
    torch.manual_seed(int(np.random.SeedSequence([dropout_seed, step, micro_batch]).generate_state(1, np.uint64)[0] >> 1))


########################################
#         What fits, how fast          #
########################################

def over_ranks(reduce, value, device):
    """The sum, least or greatest of a number over all processes."""
    if not dist.is_initialized():
        return value
    value = torch.tensor(value, device=device)
    dist.all_reduce(value, reduce)
    return value.item()


def largest_batch_size(model, windows, config, device, dtype, world_size):
    """The largest micro-batch that fits every device, found by trying the divisors of a process's share, smallest first.

    A trial holds what a step holds: weights, gradients, room for AdamW's two moments, and what the backward pass keeps.
    On a CPU, whose memory the system hands out beyond what it has, a size that would need more than is free is not tried.
    """
    if config.global_batch_size % world_size:
        raise ConfigError(f"global_batch_size={config.global_batch_size} is not divisible by {world_size} processes")
    share = config.global_batch_size // world_size
    before, best = peak_memory(device), 0
    for size in (d for d in range(1, share + 1) if share % d == 0):
        expected = (peak_memory(device) - before) * size / best if best else 0
        fits = device.type != "cpu" or expected < free_memory()
        fits = fits and trial_fits(model, windows, size, device, dtype)
        if not over_ranks(dist.ReduceOp.MIN, float(fits), device):
            break
        best = size
    if not best:
        raise TrainingError("not even batch_size=1 fits in memory; use a smaller model or --block_size")
    return best


def trial_fits(model, windows, size, device, dtype):
    try:
        copies = 3 if dist.is_initialized() else 2  # two moments, and the gradients once more in the buckets that are sent
        held = [torch.empty_like(p) for p in model.parameters() for _ in range(copies)]
        for _ in range(3):  # a first pass may fit where a later one does not
            inputs, targets = windows.batch([i % len(windows) for i in range(size)], device)
            with autocast(dtype, device):
                loss = model(inputs, targets)
            loss.backward()
        del held
        return True
    except (RuntimeError, MemoryError, OSError) as error:  # of torch, of numpy, of the token file
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        return False
    finally:
        model.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def free_memory():
    """Bytes of memory that are free, page cache not counted; unlimited where the system does not tell (macOS)."""
    if "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return math.inf
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_memory(device):
    """The most that this process held so far, in bytes: of the GPU's memory, elsewhere of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def matmul_peak(device, dtype):
    """Floating-point operations per second that this device reaches here and now in square matrix products: what mfu is
    measured against, on any device, without a table of cards. The best of what half a second allows, the first left out."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype or torch.float32)

    def seconds(rows):
        synchronize(device)
        start = time.perf_counter()
        linear(rows, a)
        synchronize(device)
        return time.perf_counter() - start

    # A CPU without 16-bit units would take seconds for each.
    rows = a[:128] if device.type == "cpu" and seconds(a[:128]) > 0.05 else a
    times, end = [], time.perf_counter() + 0.5
    while len(times) < 3 or time.perf_counter() < end:
        times.append(seconds(rows))
    return 2 * len(rows) * size * size / min(times[1:])


def synchronize(device):
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


########################################
#          What a run writes           #
########################################

def save_checkpoint(path, checkpoint):
    """Writes a checkpoint whole or not at all: to a temporary file, then to the disk, then under its name.
    -> whether it could; where it could not, it says why, and the file that was there is as it was."""
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
        tqdm.write(f"could not save {path} ({describe(error)}); what was there before is kept", file=sys.stderr)
        return False


def copied(checkpoint, buffers, copy=torch.Tensor.copy_):
    """A copy of a checkpoint, to be written while the training changes what it was made of.

    buffers: {place of a tensor in memory: its copy on the CPU}, filled by the first call and used again by the next ones, for
    fresh memory takes the system longer than the copy. Tied weights have one place, so they stay one in the file.
    """
    if isinstance(checkpoint, dict):
        return {key: copied(value, buffers, copy) for key, value in checkpoint.items()}
    if isinstance(checkpoint, list):
        return [copied(value, buffers, copy) for value in checkpoint]
    if not isinstance(checkpoint, torch.Tensor):
        return checkpoint
    place = (checkpoint.data_ptr(), checkpoint.shape)
    if place not in buffers:
        buffers[place] = torch.empty_like(checkpoint, device="cpu")
    copy(buffers[place], checkpoint)
    return buffers[place]


def copy_alone(buffer, tensor):
    """Copies in one thread. If another than the main thread ever computes in parallel, there are more OpenMP threads than cores,
    and all of them sleep from then on where they would spin: a small model's steps take twice as long."""
    np.copyto(buffer.numpy(), tensor.cpu().numpy())


def start_log(path, step):
    """The log, open for more lines. What a killed run logged after its last checkpoint, at `step`, is taken out."""
    kept = []
    if step:
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # the end of a line that was being written
            if entry["step"] < step + ("val_loss" in entry):
                kept.append(line + "\n")
    write_atomically(path, "".join(kept))
    return open(path, "a", buffering=1)


def finite(value):
    """A number as JSON can hold it: null where it is not finite."""
    return value if math.isfinite(value) else None


def read_log(path):
    """-> the training lines of a log.jsonl, its validation lines."""
    entries = [json.loads(line) for line in Path(path).read_text().splitlines()]  # null: a number that was not finite
    return [e for e in entries if "val_loss" not in e], [e for e in entries if "val_loss" in e]


def plot_run(log, path, config):
    """Draws loss, learning rate and gradient norm over tokens."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    train, val = read_log(log)
    tokens = [e["tokens"] / 1e6 for e in train]
    fig, (top, middle, bottom) = plt.subplots(3, 1, figsize=(9, 9), sharex=True, height_ratios=(4, 1, 1), layout="constrained")
    losses = np.array([e["loss"] for e in train], float)
    span = max(len(losses) // 50, 1)
    smooth = np.convolve(losses, np.ones(span) / span, mode="valid")
    top.plot(tokens, losses, color="0.75", linewidth=0.6, label="training, each step")
    top.plot(tokens[span - 1:], smooth, color="black", linewidth=1.4, label=f"training, mean of {span} steps")
    top.plot([e["tokens"] / 1e6 for e in val], np.array([e["val_loss"] for e in val], float), "o", color="black",
             markerfacecolor="white", label="validation")
    shown = losses[np.isfinite(losses)]
    if len(shown):
        top.set_ylim(shown.min() - 0.1, np.quantile(shown, 0.98) + 0.1)
    top.set_ylabel("loss, nats per token")
    top.set_title(config.name)
    top.legend(frameon=False)
    middle.plot(tokens, [e["lr"] for e in train], color="black", linewidth=1)
    middle.set_ylim(0)
    middle.set_ylabel("learning rate")
    bottom.plot(tokens, np.array([e["grad_norm"] for e in train], float), color="0.4", linewidth=0.6)
    if config.grad_clip:
        bottom.axhline(config.grad_clip, color="black", linestyle="--", linewidth=1, label=f"clipped at {config.grad_clip:g}")
        bottom.legend(frameon=False)
    bottom.set_yscale("log")
    bottom.set_ylabel("gradient norm")
    bottom.set_xlabel("training tokens, millions")
    for axes in (top, middle, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    try:
        fig.savefig(path, dpi=120)
    except OSError as error:
        tqdm.write(f"could not write {path} ({describe(error)})", file=sys.stderr)
    plt.close(fig)


########################################
#               Resuming               #
########################################

def checkpoint_to_resume(config, data_sha256, restarted):
    """The checkpoint in out_dir that the run goes on from, or None to start. Raises ConfigError where the config or the data
    would make it another run, CheckpointError where a file that is no checkpoint stands under the name of one.

    restarted: torchrun has started this run anew after a process died, which is leave to resume if it was this run.
    """
    files = [path for path in (Path(config.out_dir, "last.pt"), Path(config.out_dir, "best.pt")) if path.exists()]
    if files and not config.resume and not (restarted and read_checkpoint(files[0])["launch"] == launch()):
        raise ConfigError(f"{config.out_dir} holds a run already: --resume continues it, "
                          "--out_dir=ANOTHER starts one beside it")
    found = {}
    for path in files:
        found[path.name] = checkpoint = read_checkpoint(path)
        fill_in(config, checkpoint)
        if changed := what_changed(checkpoint["config"], vars(config)):
            raise ConfigError(f"{path} belongs to another run: {'; '.join(changed)}")
        if checkpoint["data_sha256"] != data_sha256:
            raise ConfigError(f"{path} was trained on another data set of the name {config.dataset}")
    return found.get("last.pt")


def fill_in(config, source):
    """The model's options that init_from leaves open, as a checkpoint has them."""
    options = GPTConfig.of(source["config"])
    for key in configuration.OF_THE_SOURCE:
        if getattr(config, key) is None:
            setattr(config, key, getattr(options, key))


def fit_to_config(source, config, tokenizer):
    """Makes the weights that init_from names the run's own: cut to its block_size. Raises ConfigError where they are those of
    another model than the one that was asked for, or of other tokens than the data set's."""
    options = GPTConfig.of(source["config"])
    for key in configuration.OF_THE_SOURCE:
        wanted, there = getattr(config, key), getattr(options, key)
        if wanted != there and not (key == "block_size" and wanted < there):
            raise ConfigError(f"{key}={wanted!r} was asked for, but init_from='{config.init_from}' has {key}={there!r}; "
                              f"leave out one of the two")
    if source["tokenizer"] != tokenizer:
        raise ConfigError(f"init_from='{config.init_from}' reads {source['tokenizer']} tokens, but the data set {config.dataset} has "
                          f"{tokenizer} tokens")
    if "wpe.weight" in source["model"]:  # or else its weights are refused when they are taken
        source["model"]["wpe.weight"] = source["model"]["wpe.weight"][:config.block_size]


def what_changed(then, now):
    """Options that make another run of it, told one by one."""
    may_change = configuration.WITHOUT_EFFECT
    if now["schedule"] == "constant" and not now["warmup_fraction"]:
        may_change = may_change | {"max_tokens", "max_steps"}  # a longer run passes through the same states
    then = {key: then.get(key, option.default) for key, option in configuration.OPTIONS.items()}
    return [f"{key} was {then[key]!r}, is {now[key]!r}" for key in now if key not in may_change and then[key] != now[key]]


def launch():
    """What tells one call of torchrun from another, the same after its restarts; '' without torchrun."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "")


########################################
#               The run                #
########################################

def train(config):
    # --- processes, device, data
    device, rank, world_size = start_processes(config.device)
    is_main = rank == 0

    def say(text):
        if is_main:
            print(text, flush=True)

    if device.type == "cpu" and config.device == "auto":
        say("no GPU found, falling back to the CPU: right for small models such as config/quickstart.py, "
            "but a GPT-2-small run takes two cores a hundred days (config/bench.py: 370 tokens/s at best)")
    if config.dataset == "stdlib":
        for is_my_turn in (is_main, os.environ.get("LOCAL_RANK", "0") == "0"):  # then machines that do not share its disk
            if is_my_turn and not Path(config.data_dir, "stdlib", "meta.json").exists():
                prepare_stdlib(config.data_dir)
            if world_size > 1:
                dist.barrier()
    keeps = config.dataset != RANDOM  # such weights are worth no file
    meta = read_meta(config.data_dir, config.dataset, config.vocab_size)
    if not config.init_from:
        config.vocab_size = config.vocab_size or meta["vocab_size"]
    out_dir = Path(config.out_dir)

    # --- where it starts
    restarted = over_ranks(dist.ReduceOp.MAX, float(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"), device)
    data_sha256 = meta["splits"]["train"]["sha256"]
    checkpoint, source = checkpoint_to_resume(config, data_sha256, restarted), None
    if config.init_from and not checkpoint:
        source = read_checkpoint(config.init_from)
        fill_in(config, source)
        fit_to_config(source, config, meta["tokenizer"])
    if config.vocab_size < meta["vocab_size"]:
        raise ConfigError(f"vocab_size={config.vocab_size} is less than the {meta['vocab_size']} of {config.dataset}")
    train_windows = Windows(config.data_dir, config.dataset, "train", config.block_size, config.vocab_size)
    val_windows = Windows(config.data_dir, config.dataset, "val", config.block_size, config.vocab_size)
    n_val_windows = min(max(config.eval_tokens // config.block_size, 1), len(val_windows))
    if is_main:
        out_dir.mkdir(parents=True, exist_ok=True)

    # --- model and optimiser
    torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    dtype = autocast_dtype(config.amp, device)
    raw_model = GPT(GPTConfig.of(vars(config)), seed=config.init_seed)
    if source:
        raw_model.take_weights(source)
    raw_model.to(device)
    optimizer = make_optimizer(raw_model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    # What the run has done so far, kept in every checkpoint.
    state = {"step": 0, "tokens": 0, "seconds": 0.0, "timed_tokens": 0, "timed_seconds": 0.0, "timed_outside": 0.0, "skipped": 0,
             "val_loss": None, "best_val_loss": math.inf}
    if checkpoint:
        raw_model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["scaler"]:  # empty where the run was not in float16 before
            scaler.load_state_dict(checkpoint["scaler"])
        state |= {key: checkpoint[key] for key in state if key in checkpoint}
    first, last = (over_ranks(reduce, float(state["step"]), device) for reduce in (dist.ReduceOp.MIN, dist.ReduceOp.MAX))
    if first != last:
        raise TrainingError(f"the machines have different checkpoints in {out_dir}; put it on a disk that they share")
    steps = count_steps(config)
    if state["step"] >= steps:
        say(f"{config.out_dir} is finished: {state['step']:,} steps are done, {steps:,} were asked for")
        return

    # --- batch arithmetic
    if config.batch_size == "auto":
        config.batch_size = largest_batch_size(raw_model, train_windows, config, device, dtype, world_size)
    micro_steps = count_micro_steps(config, world_size)
    tokens_per_step = config.global_batch_size * config.block_size

    model = raw_model
    if config.compile is True or config.compile == "auto" and device.type == "cuda":
        model = torch.compile(model)
    if world_size > 1:
        model = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None,
                                        gradient_as_bucket_view=True, broadcast_buffers=False)
    peak = over_ranks(dist.ReduceOp.SUM, matmul_peak(device, dtype), device)
    mfu_per_token_rate = raw_model.flops_per_token() / peak

    # --- tell, and open the log
    versions = {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}
    say(configuration.as_text(config))
    say(f"model:  {raw_model.num_params():,} parameters on {world_size} x {device.type}, "
        f"{str(dtype).removeprefix('torch.') if dtype else 'float32'}; matrix products reach {peak / 1e9:,.0f} GFLOP/s")
    say(f"data:   {config.dataset}, {train_windows.n_tokens:,} training tokens; the run reads {steps * tokens_per_step:,}, "
        f"{steps * config.global_batch_size / len(train_windows):.2f} epochs; validation on {n_val_windows:,} windows")
    say(f"batch:  {config.global_batch_size} sequences x {config.block_size:,} tokens = {tokens_per_step:,} tokens a step, "
        f"{steps:,} steps; processes {world_size} x micro-steps {micro_steps} x batch_size {config.batch_size}")
    if meta["source"] == NANOGPT:
        say(f"note:   {config.dataset} has no meta.json; it is read as uint16 tokens of {config.vocab_size:,} kinds, tokenizer "
            f"{meta['tokenizer']}; it has no test split, so eval.py needs another --dataset")
    if source:
        say(f"start:  from the weights of {config.init_from}")
    if checkpoint:
        say(f"resume: at step {state['step']:,}")
    tracker = start_wandb(config, out_dir / "wandb_id", bool(checkpoint)) if is_main and config.wandb else None
    if is_main:
        if keeps:  # by which eval.py knows a run
            write_atomically(out_dir / "config.json", json.dumps(vars(config), indent=1) + "\n")
        log = start_log(out_dir / "log.jsonl", state["step"])
    checkpoint = source = None  # frees their memory

    def record(entry):
        try:
            log.write(json.dumps({key: finite(value) for key, value in entry.items()}) + "\n")
        except OSError as error:  # a full disk; the line stays in the buffer for the next time
            tqdm.write(f"could not write {out_dir / 'log.jsonl'} ({describe(error)})", file=sys.stderr)
        if tracker:
            tracker.log({key: value for key, value in entry.items() if key != "step"}, step=entry["step"])

    def as_checkpoint():
        return {"format": CHECKPOINT_FORMAT, "model": raw_model.state_dict(), "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(), **state, "config": vars(config), "tokenizer": meta["tokenizer"],
                "data_sha256": data_sha256, "launch": launch(), "versions": versions}

    def write(name, checkpoint):
        """Writes a file, in the writer's thread. -> whether it could. The best validation loss is that of a best.pt that is there."""
        best = checkpoint["val_loss"] if name == "best.pt" else checkpoint["best_val_loss"]
        could = save_checkpoint(out_dir / name, {**checkpoint, "best_val_loss": best})
        if could:
            state["best_val_loss"] = checkpoint["best_val_loss"] = best
        return could

    def load_micro_batch(step, micro_step):
        """This rank's inputs and targets. Micro-step `micro_steps` is micro-step 0 of the next step."""
        first = step * config.global_batch_size + (micro_step * world_size + rank) * config.batch_size
        ids = window_ids(config.order, config.data_seed, len(train_windows), first, config.batch_size)
        return train_windows.batch(ids, device)

    # --- the loop
    stop = StopSignal()
    parameters = list(raw_model.parameters())
    foreach = device.type != "mps"  # which lacks those kernels
    skipped_in_a_row = 0
    writer = ThreadPoolExecutor(max_workers=1)  # saves beside the training, one file after the other
    writing, buffers = writer.submit(bool), {}  # the last thing it was asked to do: nothing yet
    seconds_before, started = state["seconds"], time.perf_counter()
    batch = load_micro_batch(state["step"], 0)
    clock, plotted, since_log, is_first, outside = started, started, (0, 0.0), True, 0.0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    raw_model.train()

    with writer, tqdm(total=steps, initial=state["step"], unit="step", disable=not is_main,
                      mininterval=0.5 if sys.stderr.isatty() else 10.0) as bar:
        while state["step"] < steps:
            step = state["step"]
            lr = learning_rate_at(step, steps, config)
            for group in optimizer.param_groups:
                group["lr"] = lr

            loss_sum = torch.zeros((), device=device)
            for micro_step in range(micro_steps):
                if world_size > 1:  # gradients are averaged over the ranks in the last backward pass only; set before forward
                    model.require_backward_grad_sync = micro_step == micro_steps - 1
                if config.dropout:
                    seed_dropout(config.dropout_seed, step, micro_step * world_size + rank)
                with autocast(dtype, device):
                    loss = model(*batch)
                loading = time.perf_counter()
                batch = load_micro_batch(step, micro_step + 1)  # read while the device computes
                outside += time.perf_counter() - loading
                scaler.scale(loss / micro_steps).backward()
                loss_sum += loss.detach()

            scaler.unscale_(optimizer)
            grad_norm = get_total_norm([p.grad for p in parameters], foreach=foreach)
            sums = torch.stack((loss_sum / micro_steps, loss_sum.new_full((), float(stop.asked))))
            if world_size > 1:
                dist.all_reduce(sums)
            loss, stops, norm = torch.cat((sums, grad_norm[None])).tolist()  # the step's one wait for the device
            loss /= world_size

            skipped = not (math.isfinite(loss) and math.isfinite(norm))  # on all ranks alike: both are averages over them
            clipped = False
            if skipped:
                state["skipped"] += 1
                skipped_in_a_row += 1
                if skipped_in_a_row == 20:
                    writing.result()
                    raise TrainingError(bad_numbers(raw_model, step, out_dir / "last.pt"))
            else:
                clipped = 0 < config.grad_clip < norm
                if clipped:
                    clip_grads_with_norm_(parameters, config.grad_clip, grad_norm, foreach=foreach)
                scaler.step(optimizer)
                skipped_in_a_row = 0
            scaler.update()
            raw_model.zero_grad(set_to_none=True)
            state["step"] += 1
            state["tokens"] += tokens_per_step
            at_end = state["step"] == steps

            now = time.perf_counter()
            state["seconds"] = seconds_before + now - started
            since_log = (since_log[0] + tokens_per_step, since_log[1] + now - clock)
            if not is_first:  # a first step compiles, allocates, warms up
                state["timed_tokens"] += tokens_per_step
                state["timed_seconds"] += now - clock
                state["timed_outside"] += outside
            elif is_main and keeps and min(config.eval_every or steps, config.save_every or steps) < steps:
                writing = writer.submit(copied, as_checkpoint(), buffers, copy_alone)  # the first save finds its buffers made
            clock, is_first, outside = now, False, 0.0
            if is_main and (step % config.log_every == 0 or at_end):
                rate, since_log = since_log[0] / since_log[1], (0, 0.0)
                record({"step": step, "tokens": state["tokens"], "loss": loss, "lr": lr, "grad_norm": norm, "clipped": clipped,
                        "skipped": skipped, "tokens_per_second": rate, "mfu": rate * mfu_per_token_rate,
                        "seconds": state["seconds"]})
                bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s", refresh=False)
            bar.update()

            # --- validate and save: outside the training clock, and without a trace in the training
            validates = at_end or config.eval_every and state["step"] % config.eval_every == 0
            saves = keeps and (at_end or stops or config.save_every and state["step"] % config.save_every == 0)
            is_best = False
            if validates:
                val_loss = mean_loss(raw_model, val_windows, n_val_windows, config.batch_size, device, dtype, rank, world_size)
                state["val_loss"], state["seconds"] = val_loss, seconds_before + time.perf_counter() - started
                writing.result()  # and with it whether the best so far has its file
                is_best = keeps and val_loss < state["best_val_loss"]
                if is_main:
                    tqdm.write(f"step {state['step']:,}: validation loss {val_loss:.4f}" + ", the best so far" * is_best)
                    record({"step": state["step"], "tokens": state["tokens"], "val_loss": val_loss})
            if is_main and (is_best or saves or at_end):
                writing.result()
                checkpoint = as_checkpoint()
                if not (at_end or stops):  # then training waits, and needs no copy
                    checkpoint = copied(checkpoint, buffers)
                if is_best:
                    writing = writer.submit(write, "best.pt", checkpoint)
                if at_end:  # before the last checkpoint, which says that the run is finished
                    writing.result()
                    log.close()
                    write_summary(config, state, peak_memory(device), versions)
                if saves and (at_end or time.perf_counter() - plotted > 60):
                    plot_run(out_dir / "log.jsonl", out_dir / "loss.png", config)
                    plotted = time.perf_counter()
                if saves:
                    writing = writer.submit(write, "last.pt", checkpoint)
                if saves and (at_end or stops) and not writing.result():
                    raise TrainingError(f"the last steps are lost: {out_dir / 'last.pt'} could not be saved")
                checkpoint = None
            if stops and not at_end:
                bar.close()
                if tracker:
                    tracker.finish()
                say(f"stopped after step {step:,}" + " and saved; the same command with --resume goes on from here" * keeps)
                return
            if validates or saves:
                clock = time.perf_counter()
            else:
                outside = time.perf_counter() - now

    # --- the end
    if tracker:
        finish_wandb(tracker, out_dir)
    if is_main:
        tell_the_end(out_dir, state, raw_model.flops_per_token(), peak, peak_memory(device), keeps)


def bad_numbers(model, step, last):
    bad = next((name for name, p in model.named_parameters() if not p.grad.isfinite().all()), "none of them alone")
    kept = f"{last} is the last good checkpoint" if last.exists() else "no checkpoint was saved before"
    return (f"20 updates in a row were skipped for a loss or gradient that is not finite, the last at step {step}; the first "
            f"parameter that went bad is {bad}. {kept}. Try a lower --learning_rate, or --grad_clip")


class StopSignal:
    """Turns Ctrl-C and SIGTERM into a wish to stop after the step; the ranks agree on it there. A second Ctrl-C ends at
    once; SIGTERM never does, for whoever sends it twice sends SIGKILL if in earnest."""

    def __init__(self):
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask)

    def ask(self, number, frame):
        self.asked = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def start_wandb(config, id_file, resumes):
    """The run of Weights & Biases to log to; a resumed run goes on in the one that it began, whose id is in id_file.
    Raises ConfigError, TrainingError."""
    try:
        from wandb import init  # not `import wandb`: any folder of that name, such as the one it writes, would do for that
    except ImportError:
        raise ConfigError(f"wandb={config.wandb!r}: the package is not installed; pip install wandb") from None
    begun = id_file.read_text() if resumes and id_file.exists() else None
    try:
        tracker = init(project=config.wandb, name=config.name, config=vars(config), id=begun, resume="allow", allow_val_change=True)
    except Exception as error:  # of the network or the account, in the many classes of wandb
        raise TrainingError(f"Weights & Biases did not start ({str(error).strip().splitlines()[0]}); run `wandb login` first, set "
                            "WANDB_MODE=offline, or leave out --wandb") from None
    write_atomically(id_file, tracker.id)
    return tracker


def finish_wandb(tracker, out_dir):
    """Adds what a run leaves at its end: the plot, unless the disk was full, and summary.json's figures as the run's own."""
    from wandb import Image
    if (out_dir / "loss.png").exists():
        tracker.log({"plot": Image(str(out_dir / "loss.png"))})
    tracker.summary.update(json.loads((out_dir / "summary.json").read_text()))
    tracker.finish()


def write_summary(config, state, peak_bytes, versions):
    seconds = state["seconds"]
    write_atomically(Path(config.out_dir, "summary.json"), json.dumps({
        "name": config.name, "steps": state["step"], "tokens": state["tokens"], "final_val_loss": finite(state["val_loss"]),
        "best_val_loss": finite(state["best_val_loss"]), "skipped_steps": state["skipped"], "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens_per_second(state), 1), "peak_memory_mb": round(peak_bytes / 2**20),
        "cost": round(seconds / 3600 * config.dollars_per_hour, 2), "machine": machine(),
        "versions": versions}, indent=1) + "\n")


def machine():
    """What the run ran on: its GPUs, or its processor."""
    if torch.cuda.is_available():
        return f"{dist.get_world_size() if dist.is_initialized() else 1} x {torch.cuda.get_device_name()}"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {os.cpu_count()} cores"


def tokens_per_second(state):
    """Of training alone: without the first step, validations and saves, unless the first step is all there is."""
    return state["timed_tokens"] / state["timed_seconds"] if state["timed_tokens"] else state["tokens"] / state["seconds"]


def tell_the_end(out_dir, state, flops_per_token, peak, peak_bytes, keeps):
    rate = tokens_per_second(state)
    beside = "" if not state["timed_seconds"] else (f"; {state['timed_outside'] / state['timed_seconds']:.2%} of the time outside "
                                                    "forward, backward and optimiser (data, log)")
    print(f"speed:  {rate:,.0f} tokens/s, {rate * flops_per_token / 1e9:,.1f} GFLOP/s of the {peak / 1e9:,.1f} of matrix products "
          f"here ({rate * flops_per_token / peak:.1%}); peak memory {peak_bytes / 2**20:,.0f} MB" + beside)
    if keeps:
        print(f"done:   {state['tokens']:,} tokens in {state['seconds']:,.0f} s; validation loss {state['val_loss']:.4f}, "
              f"best {state['best_val_loss']:.4f}")
        where = "" if str(out_dir) == "out" else f" --ckpt {out_dir / 'best.pt'}"
        print(f"next:   python eval.py --ckpt {out_dir / 'best.pt'}\n        python sample.py{where}")


def main():
    try:
        train(configuration.load(sys.argv[1:]))
    except ConfigError as error:
        stop_with(2, error, everyone_knows=True)
    except (CheckpointError, DataError, TrainingError) as error:
        stop_with(1, error, everyone_knows=True)
    except DeviceError as error:
        stop_with(1, error)
    except OSError as error:
        stop_with(1, describe(error))
    except RuntimeError as error:
        if "gloo" not in str(error) and not isinstance(error, dist.DistError):
            raise
        stop_with(1, "another process of this run has ended")
    except KeyboardInterrupt:
        stop_with(130, "stopped before the first step")
    if dist.is_initialized():
        dist.destroy_process_group()


def stop_with(code, message, everyone_knows=False):
    """Ends the process with one line. An error that every rank meets alike is told by the first one of each machine."""
    if not everyone_knows or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"train.py: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
