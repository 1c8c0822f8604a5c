"""One training run: a GPT-2-class model from scratch, on one device or many, with the same result.

    python train.py config/local_3090.py
    torchrun --standalone --nproc_per_node=8 train.py config/cloud.py --batch_size=12

Step s trains on windows s*G to (s+1)*G - 1 of the data's order, however many processes and
micro-steps share them. G is global_batch_size; a window is block_size + 1 tokens.

Everything random is a pure function of a seed and a position in the run, so no random state is
saved: the initial weights depend on init_seed, the order of the windows on (data_seed, epoch), the
dropout masks on (dropout_seed, step, micro-batch). config/__init__.py has every option.
"""

if __name__ == "__main__":
    import nanolab.ctrl_c  # first, because the other imports take seconds

import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

import config as configuration
from config import OPTIONS, divisors_near
from model import GPT, GPTConfig
from nanolab.checkpoint import CheckpointSaver, find_start
from nanolab.common import OutputThatMayFail, UserError, run_script
from nanolab.cpu import choose_plan, share_batches
from nanolab.data import TokenDataset, window_ids
from nanolab.devices import (StopSignal, autocast, autocast_dtype, end_distributed,
                             init_distributed, print0, same_on_all_ranks, torchrun_restarted)
from nanolab.dryrun import dry_run
from nanolab.measure import mean_loss
from nanolab.memory import check_weights_fit, largest_batch_size
from nanolab.optim import TailAverage, make_optimizer, set_learning_rate, step_if_finite
from nanolab.runlog import RunLog
from nanolab.samples import make_sampler
from nanolab.schedule import count_steps, follow_plan, learning_rate_at
from nanolab.token_files import NANOGPT, read_meta
from prepare import prepare_stdlib


MAX_SKIPPED = 20  # updates in a row that may be skipped


def train(config):
    # processes, data, where to start
    device, rank, world_size = init_distributed(config.device)
    warn_if_cpu(config, device)
    make_stdlib_if_missing(config, rank, world_size)
    meta = read_meta(config.data_dir, config.dataset, config.vocab_size)
    # last.pt, the weights of init_from, or neither; completes config
    start = find_start(config, meta, torchrun_restarted(device))
    train_data = open_split(config, "train")
    val_data = open_split(config, "val")
    n_val_windows = min(max(config.eval_tokens // config.block_size, 1), len(val_data))

    # model and optimiser
    check_weights_fit(config)
    torch.set_float32_matmul_precision("high" if config.tf32 else "highest")  # high: TF32
    dtype = autocast_dtype(config.amp, device)  # None: float32
    model = GPT(GPTConfig.from_options(vars(config)), seed=config.init_seed).to(device)
    optimizer = make_optimizer(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    max_steps = count_steps(config)
    tail = TailAverage(model, config, max_steps)
    state = start.restore(tail, optimizer, scaler)  # steps done, seconds, best validation loss
    if start.resumed:
        follow_plan(config, state, start.resumed)
    del start  # frees the checkpoint's memory
    if not same_on_all_ranks(state.step, device):
        raise UserError(f"the machines have different checkpoints in {config.out_dir}; "
                        "put it on a disk that they share")
    if state.step >= max_steps:
        print0(f"{config.out_dir} is finished: {state.step:,} steps are done, "
               f"{max_steps:,} were asked for; --resume --extend --max_steps=MORE goes on")
        return
    cpu_plan, busy_cores = choose_plan(model, config, state, device, dtype)  # None on a GPU
    # each shares model's weights
    compiled_model = share_batches(compile_model(model, config, device), cpu_plan)
    compiled_mean = share_batches(compile_model(tail.mean, config, device), cpu_plan)
    if config.batch_size == "auto":
        config.batch_size = largest_batch_size(model, compiled_model, optimizer, train_data,
                                               config.global_batch_size, world_size, device, dtype)
    grad_accum_steps = count_grad_accum_steps(config, world_size)
    ddp_model = wrap_ddp(compiled_model, device, world_size)

    # logging, saving, stop signals, batches
    print_setup(config, meta, model, train_data, n_val_windows, max_steps, grad_accum_steps, dtype,
                world_size)
    print_cpu_plan(cpu_plan, busy_cores)
    if config.dry_run:
        dry_run(config, state, model, ddp_model, optimizer, train_data, max_steps,
                grad_accum_steps, device, dtype)
        return
    sample = make_sampler(model, config, meta["tokenizer"], device, dtype)
    log = RunLog(config, state, max_steps, model, device, dtype, rank)
    saver = CheckpointSaver(config, meta, state, tail, optimizer, scaler, max_steps, rank)
    stop = StopSignal()
    parameters = list(model.parameters())
    skipped_in_a_row = 0
    batches = log.timed(micro_batches(train_data, config, state.step, rank, world_size, device))

    def validate():
        """The loss on the first n_val_windows: of the weights, or in the tail of their mean."""
        return mean_loss(compiled_mean if tail.n_averaged else compiled_model, val_data,
                         n_val_windows, config.batch_size, device, dtype, rank, world_size)

    model.train()
    with log, saver:  # on exit: waits for the last save, then closes the log and frees its folder
        inputs, targets = next(batches)
        for step in range(state.step, max_steps):
            lr = learning_rate_at(step, max_steps, config)
            set_learning_rate(optimizer, lr)

            # forward and backward, one micro-batch after the other
            loss_sum = torch.zeros((), device=device)
            for micro_step in range(grad_accum_steps):
                if world_size > 1:  # all-reduce the gradients in the last backward pass only
                    ddp_model.require_backward_grad_sync = micro_step == grad_accum_steps - 1
                if config.dropout:
                    seed_dropout(config.dropout_seed, step, micro_step * world_size + rank)
                with autocast(dtype, device):
                    loss = ddp_model(inputs, targets)
                inputs, targets = next(batches)  # prefetched while the device computes
                scaler.scale(loss / grad_accum_steps).backward()
                loss_sum += loss.detach()

            # unscale, measure, clip; update the weights unless a number is not finite
            scaler.unscale_(optimizer)
            grad_norm = get_total_norm([p.grad for p in parameters])
            numbers = average_over_ranks(loss_sum / grad_accum_steps, grad_norm, stop.requested)
            finite = numbers.isfinite().all()
            if config.grad_clip:  # a norm of 0 clips nothing, NaN would spread
                clip_grads_with_norm_(parameters, config.grad_clip, grad_norm.where(finite, 0))
            loss, norm, n_stops = step_if_finite(optimizer, numbers, finite)  # waits for the device
            skipped = not (math.isfinite(loss) and math.isfinite(norm))
            skipped_in_a_row = skipped_in_a_row + 1 if skipped else 0
            if skipped_in_a_row == MAX_SKIPPED:
                end_for_bad_numbers(model, step, saver)
            scaler.update()
            optimizer.zero_grad(set_to_none=world_size == 1)  # under DDP they are views of buckets
            state.step += 1
            state.skipped += skipped
            tail.update(state.step)
            log.step(loss, lr, norm, clipped=not skipped and 0 < config.grad_clip < norm,
                     skipped=skipped)
            saver.allocate_buffers()

            # sample, validate, save: none of them changes the training or its timing
            last_step = state.step == max_steps
            stopping = n_stops > 0
            with log.clock_stopped():
                log.sample_if_due(sample)
                if last_step or is_due(config.eval_every, state.step):
                    val_loss = validate()
                    log.validation(val_loss, is_best=saver.save_best(val_loss, wait=last_step))
                if last_step:
                    log.write_summary()  # before last.pt, which marks the run as finished
                log.draw_if_due(stopping)
                if last_step or stopping or is_due(config.save_every, state.step):
                    saver.save_last(wait=last_step or stopping)
            if stopping:
                break
    log.finish()


def micro_batches(data, config, step, rank, world_size, device):
    """Yields this rank's (inputs, targets), each (batch_size, block_size), from `step` on,
    forever."""
    while True:
        first, end = step * config.global_batch_size, (step + 1) * config.global_batch_size
        for i in range(first + rank * config.batch_size, end, world_size * config.batch_size):
            ids = window_ids(config.order, config.data_seed, len(data), i, config.batch_size)
            yield data.batch(ids, device)
        step += 1


def seed_dropout(dropout_seed, step, micro_batch):
    """Makes the masks of one micro-batch a function of its place in the run: ranks differ, a
    resumed run draws what it would have drawn, and 8 processes draw the masks of one process with 8
    micro-steps."""
    seed = np.random.SeedSequence([dropout_seed, step, micro_batch]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(seed >> 1))  # which takes 63 bits


def average_over_ranks(loss, grad_norm, stop_requested):
    """-> (3,) on the device, the same on all ranks: the mean loss, the gradient norm (DDP has
    averaged the gradients), how many ranks were asked to stop."""
    sums = torch.stack((loss, loss.new_full((), float(stop_requested))))
    if dist.is_initialized():
        dist.all_reduce(sums)
        sums[0] /= dist.get_world_size()
    return torch.stack((sums[0], grad_norm, sums[1]))


def end_for_bad_numbers(model, step, saver):
    saver.wait()
    bad = [name for name, p in model.named_parameters() if not p.grad.isfinite().all()]
    last = saver.out_dir / "last.pt"
    saved = f"{last} is the last good checkpoint" if last.exists() else "no checkpoint was saved"
    raise UserError(f"{MAX_SKIPPED} updates in a row were skipped because the loss or a gradient "
                    f"was not finite, the last at step {step}; the first parameter that went bad "
                    f"is {bad[0] if bad else 'none of them alone'}. {saved}. "
                    "Try a lower --learning_rate, or --grad_clip")


def is_due(every, step):
    return every and step % every == 0


def count_grad_accum_steps(config, world_size):
    """Micro-steps of each process in one step. Raises UserError if the global batch does not
    divide."""
    sequences = config.batch_size * world_size  # of one micro-step, over all processes
    if config.global_batch_size % sequences:
        share, rest = divmod(config.global_batch_size, world_size)
        below = config.global_batch_size // sequences * sequences
        advice = f"batch_size could be {divisors_near(share, config.batch_size)}"
        if rest:
            nearest = " or ".join(str(size) for size in (below, below + sequences) if size)
            advice = f"global_batch_size could be {nearest}"
        raise UserError(f"global_batch_size={config.global_batch_size} is not divisible by "
                        f"batch_size={config.batch_size} x {world_size} processes; {advice}",
                        exit_code=2)
    return config.global_batch_size // sequences


def open_split(config, split):
    return TokenDataset(config.data_dir, config.dataset, split, config.block_size,
                        config.vocab_size)


def compile_model(model, config, device):
    if config.compile is True or config.compile == "auto" and device.type == "cuda":
        return torch.compile(model)
    return model


def wrap_ddp(model, device, world_size):
    if world_size == 1:
        return model
    return DistributedDataParallel(
        model, device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True, forward_sync_buffers=False)


def warn_if_cpu(config, device):
    if device.type == "cpu" and config.device == "auto":
        print0("no GPU found, falling back to the CPU: fine for small models such as "
               "config/quickstart.py, far too slow for GPT-2 small")


def make_stdlib_if_missing(config, rank, world_size):
    """Makes the stdlib data set on rank 0, then on each machine that does not share its disk."""
    if config.dataset != "stdlib":
        return
    for my_turn in (rank == 0, os.environ.get("LOCAL_RANK", "0") == "0"):
        if my_turn and not Path(config.data_dir, "stdlib", "meta.json").exists():
            prepare_stdlib(config.data_dir)
        if world_size > 1:
            dist.barrier()


def print_setup(config, meta, model, train_data, n_val_windows, max_steps, grad_accum_steps, dtype,
                world_size):
    sequences, tokens = config.global_batch_size, config.global_batch_size * config.block_size
    print0(configuration.as_text(config))
    print0(f"model:  {model.num_params():,} parameters on {world_size} x "
           f"{model.wte.weight.device.type}, {str(dtype or torch.float32).removeprefix('torch.')}")
    print0(f"data:   {config.dataset}, {train_data.n_tokens:,} training tokens; the run reads "
           f"{max_steps * tokens:,}, {max_steps * sequences / len(train_data):.2f} epochs; "
           f"validation on {n_val_windows:,} windows")
    print0(f"batch:  {sequences} sequences x {config.block_size:,} tokens = {tokens:,} tokens a "
           f"step, {max_steps:,} steps; {world_size} processes x {grad_accum_steps} micro-steps x "
           f"batch_size {config.batch_size}")
    if config.optimizer != "adamw" and config.learning_rate == OPTIONS["learning_rate"].default:
        print0(f"note:   learning_rate={config.learning_rate} is the baseline's, for AdamW; in the "
               "lab Muon's best rate was twice AdamW's best (config/interventions/muon.py)")
    if meta["source"] == NANOGPT:
        print0(f"note:   {config.dataset} has no meta.json; it is read as uint16 tokens of "
               f"{config.vocab_size:,} kinds, tokenizer {meta['tokenizer']}; it has no test split, "
               "so eval.py needs another --dataset")


def print_cpu_plan(plan, busy_cores):
    if plan:
        print0(f"cpu:    {plan}")
    if busy_cores and busy_cores > 0.3:
        print0(f"note:   other programs keep {busy_cores:.1f} of {os.cpu_count()} cores busy; "
               "this run gets the rest")


def main():
    sys.stdout, sys.stderr = OutputThatMayFail(sys.stdout), OutputThatMayFail(sys.stderr)
    train(configuration.load(sys.argv[1:]))
    end_distributed()


if __name__ == "__main__":
    run_script(main, if_interrupted="stopped before the first step")
