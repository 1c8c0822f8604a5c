"""One training run: a GPT-2-class model from scratch, on one device or many, with the same result.

    python train.py config/local_3090.py
    torchrun --standalone --nproc_per_node=8 train.py config/cloud.py

Step s trains on windows s*G to (s+1)*G - 1 of the data's order, however many processes and
micro-steps share them. G is global_batch_size; a window is block_size + 1 tokens.

Everything random is a pure function of a seed and a position in the run, so no random state is
saved: the initial weights depend on init_seed, the order of the windows on (data_seed, epoch), the
dropout masks on (dropout_seed, step, micro-batch). config/__init__.py has every option.
"""

import math
import os
import sys
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from config import Config, divisors_near
from model import GPT, GPTConfig
from nanolab.checkpoint import CheckpointSaver, pack
from nanolab.common import OutputThatMayFail, StopSignal, UserError, run_script
from nanolab.data import TokenDataset, read_meta, window_ids
from nanolab.dataset_writer import prepare_stdlib
from nanolab.distributed import (DEFAULT_THREADS, SharedModel, end_distributed, init_distributed,
                                 n_threads, print0, use_threads)
from nanolab.evaluation import mean_loss
from nanolab.memory import dry_run, largest_batch_size
from nanolab.optim import (average_weights, count_steps, is_averaged, learning_rate_at,
                           make_optimizer, set_learning_rate)
from nanolab.options import format_config, load
from nanolab.runlog import RunLog, TrainingClock
from nanolab.start import find_start

MAX_SKIPPED = 20  # updates in a row that may be skipped


def train(config, on_step=lambda step, model: None):
    """One run. on_step is called before each step; tests watch by it."""
    world = init_distributed(config.device, config.amp, config.tf32, config.fp16_sums)

    # data, and what the run starts from: its last checkpoint, the weights of init_from, or neither
    make_stdlib_if_missing(config, world)
    meta = read_meta(config.data_dir, config.dataset, config.vocab_size)
    start = find_start(config, meta)
    config = start.config  # complete from here on: nobody changes it
    train_data, val_data = open_split(config, "train"), open_split(config, "val")

    # model and optimiser
    max_steps = count_steps(config)
    model = GPT(GPTConfig.from_options(vars(config)), seed=config.init_seed).to(world.device)
    average = deepcopy(model) if config.tail_average else None  # of the last steps' weights
    optimizer = make_optimizer(model, config)
    scaler = torch.amp.GradScaler(world.device.type, enabled=world.dtype is torch.float16)
    state = start.restore(model, average, optimizer, scaler, world)  # steps done, seconds, ...
    if is_finished(start, state, max_steps, world):
        return

    # how a step is computed: compiled, in micro-steps, by processes or threads that share batches
    batch_size, grad_accum_steps = split_batch(config, model, optimizer, train_data, world)
    fast_model = make_fast(model, config, batch_size, world)
    fast_average = make_fast(average, config, batch_size, world) if average else None
    ddp_model = wrap_ddp(fast_model, world)
    print_setup(config, meta, model, train_data, max_steps, batch_size, grad_accum_steps, world)
    if config.dry_run:
        return dry_run(config, max_steps - state.step, ddp_model, optimizer, train_data, batch_size,
                       grad_accum_steps, world)

    # what it leaves: a log with samples and charts, and checkpoints
    clock = TrainingClock(state.seconds)
    log = RunLog(config, meta, state, max_steps, model, clock, world)
    saver = CheckpointSaver(config, partial(pack, config, meta, state, model, average, optimizer,
                                            scaler), start.best_val_loss, world)
    stop = StopSignal()
    validate = lambda model: mean_loss(model, val_data, config.eval_tokens, batch_size, world)
    batches = micro_batches(train_data, config, batch_size, state.step, world)

    with log, saver:  # on exit: waits for the last save, then closes the log and frees its folder
        if state.step == 0 and config.eval_every:
            log.validation(validate(fast_model))  # of the initial weights
        inputs, targets = next(batches)
        for step in range(state.step, max_steps):
            on_step(step, model)
            lr = learning_rate_at(step, max_steps, config)
            set_learning_rate(optimizer, lr)

            # forward and backward, one micro-batch after the other
            loss_sum = torch.zeros((), device=world.device)
            for micro_step in range(grad_accum_steps):
                if world.size > 1:  # DDP averages the gradients, in the last backward pass only
                    ddp_model.require_backward_grad_sync = micro_step == grad_accum_steps - 1
                seed_dropout(config, step, micro_step * world.size + world.rank)
                with world.autocast():
                    loss = ddp_model(inputs, targets, config.z_loss)
                inputs, targets = next(batches)  # prefetched while the device computes
                scaler.scale(loss / grad_accum_steps).backward()  # scaled up only in float16
                loss_sum += loss.detach()  # no .item(): it would wait for the device

            # unscale, measure, clip, update; all ranks skip an update if a number is not finite
            scaler.unscale_(optimizer)
            grad_norm = get_total_norm([p.grad for p in model.parameters()])
            loss, norm, n_asked = average_over_ranks(loss_sum / grad_accum_steps, grad_norm,
                                                     stop.requested)  # the step's one wait
            skipped = not (math.isfinite(loss) and math.isfinite(norm))
            if not skipped:
                if config.grad_clip:
                    clip_grads_with_norm_(model.parameters(), config.grad_clip, grad_norm)
                optimizer.step()  # not by the scaler, which would wait for the device once more
            scaler.update()  # a lower scale after a skipped update
            if is_averaged(step, max_steps, config):
                state.averaged_steps = average_weights(average, model, state.averaged_steps)
            # a skipped step counts: its windows are not read again
            state.count_step(config.global_batch_size * config.block_size, skipped, clock)
            last_step, stopping = state.step == max_steps, n_asked > 0
            log.step(loss, lr, norm, skipped, last_step or is_due(config.log_every, step))
            if state.skipped_in_a_row == MAX_SKIPPED:
                raise_too_many_bad_updates(model, step, saver)
            optimizer.zero_grad(set_to_none=world.size == 1)  # under DDP they are views of buckets

            # sample, validate, report, save: none of them changes the training or its timing
            with clock.stopped():
                if last_step or is_due(config.sample_every, state.step):
                    log.sample(average if state.averaged_steps else model)
                if last_step or is_due(config.eval_every, state.step):
                    state.val_loss = validate(fast_average if state.averaged_steps else fast_model)
                    state.seconds = clock.total()
                    log.validation(state.val_loss, is_best=saver.is_best(state.val_loss))
                    if saver.is_best(state.val_loss):
                        saver.save("best.pt", wait=last_step)
                if last_step or stopping:
                    break
                log.report(saver.best_val_loss)
                if is_due(config.save_every, state.step):
                    saver.save("last.pt")
        log.report(saver.best_val_loss)  # before last.pt: on_save then copies it too
        saver.save("last.pt", wait=True)
        log.finish(saver.best_val_loss)


def micro_batches(data, config, batch_size, step, world):
    """Yields this rank's (inputs, targets), each (batch_size, block_size), from `step` on,
    forever."""
    while True:
        first, end = step * config.global_batch_size, (step + 1) * config.global_batch_size
        for i in range(first + world.rank * batch_size, end, world.size * batch_size):
            ids = window_ids(config.order, config.data_seed, len(data), i, batch_size)
            yield data.batch(ids, world.device)
        step += 1


def seed_dropout(config, step, micro_batch):
    """Seeds dropout by (step, micro-batch): the same masks after a resume, and on any number of
    processes with one micro-batch each."""
    if config.dropout:
        sequence = np.random.SeedSequence([config.dropout_seed, step, micro_batch])
        torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> 1))  # it takes 63 bits


def average_over_ranks(loss, grad_norm, stop_requested):
    """-> [the mean loss, the gradient norm (DDP has averaged the gradients), how many ranks were
    asked to stop], the same on all ranks."""
    sums = torch.stack((loss, loss.new_full((), float(stop_requested))))  # one message for both
    if dist.is_initialized():
        dist.all_reduce(sums)
        sums[0] /= dist.get_world_size()
    return torch.stack((sums[0], grad_norm, sums[1])).tolist()


def raise_too_many_bad_updates(model, step, saver):
    saver.wait()  # last.pt may be half written
    bad = [name for name, p in model.named_parameters() if not p.grad.isfinite().all()]
    reason = (f"the first gradient that is not finite is that of {bad[0]}" if bad else
              "all gradients are finite, but their norm or the loss is not")
    last = saver.out_dir / "last.pt"
    saved = f"{last} is the last good checkpoint" if last.exists() else "no checkpoint was saved"
    raise UserError(f"{MAX_SKIPPED} updates in a row were skipped, the last at step {step}: "
                    f"{reason}. {saved}. Try a lower --learning_rate, or --grad_clip")


def is_due(every, step):
    return every and step % every == 0  # 0: never


def open_split(config, split):
    return TokenDataset(config.data_dir, config.dataset, split, config.block_size,
                        config.vocab_size)


def split_batch(config, model, optimizer, train_data, world):
    """-> the micro-batch's size, and the micro-steps of each process in one step. Raises UserError
    if the global batch does not divide."""
    batch_size, total = config.batch_size, config.global_batch_size
    if batch_size == "auto":
        trial_model = make_fast(model, config, batch_size, world)
        batch_size = largest_batch_size(trial_model, optimizer, train_data, total, world)
    sequences = batch_size * world.size  # of one micro-step, over all processes
    if total % sequences == 0:
        return batch_size, total // sequences
    part, rest = divmod(total, world.size)
    below = total // sequences * sequences
    advice = f"batch_size could be {divisors_near(part, batch_size)}"
    if rest:
        nearest = " or ".join(str(size) for size in (below, below + sequences) if size)
        advice = f"global_batch_size could be {nearest}"
    raise UserError(f"global_batch_size={total} is not divisible by batch_size={batch_size} x "
                    f"{world.size} processes; {advice}", exit_code=2)


LARGEST_SHARED = 2**24  # parameters up to which each CPU thread may have gradients of its own


def make_fast(model, config, batch_size, world):
    """The model compiled or, on a CPU, with threads that share each batch where they can. A rule
    chooses, not a timing: so the same command gives the same bits."""
    is_small = sum(p.numel() for p in model.parameters()) <= LARGEST_SHARED
    on_gpu, one_gpu = world.device.type == "cuda", world.device.type == "cuda" and world.size == 1
    compiled = config.compile in (True, "graphs") or config.compile == "auto" and on_gpu
    if compiled:
        # Not mode="reduce-overhead": with its trees, autograd takes a graph's own buffer as .grad,
        # which the next micro-step overwrites (pytorch issue 96693). Without them it copies.
        graphs = one_gpu and config.compile == "graphs"
        # Dynamic only while sizes are tried: else the short last batch of a validation, which comes
        # first, would give training a graph for any batch size.
        dynamic = None if batch_size == "auto" else False
        # A CUDA graph has the addresses of its weights: the averaged model needs one of its own.
        # Only then: an older torch may lack isolate_recompiles.
        isolated = config.compile == "graphs" and config.tail_average > 0
        model = torch.compile(model, fullgraph=one_gpu, dynamic=dynamic, options={
            "triton.cudagraphs": graphs, "triton.cudagraph_trees": False},
            **{"isolate_recompiles": True} if isolated else {})
    if on_gpu or world.device.type == "mps":
        return model
    # dropout masks would depend on which thread draws first
    may_share = is_small and batch_size != 1 and not (compiled or config.dropout)
    # a small model gains little from threads that share operators, and waits for busy cores
    n = config.threads or (DEFAULT_THREADS if may_share or not is_small else 1)
    use_threads(n, shared=may_share and n > 1)
    return SharedModel(model) if may_share and n > 1 else model


def wrap_ddp(model, world):
    if world.size == 1:
        return model
    return DistributedDataParallel(
        model, device_ids=[world.device.index] if world.device.type == "cuda" else None,
        gradient_as_bucket_view=True,  # else gradients exist twice
        forward_sync_buffers=False)  # rope's tables are constants


def make_stdlib_if_missing(config, world):
    """Makes the stdlib data set on rank 0, then on each machine that does not share its disk."""
    if config.dataset != "stdlib":
        return
    for my_turn in (world.rank == 0, os.environ.get("LOCAL_RANK", "0") == "0"):
        if my_turn and not Path(config.data_dir, "stdlib", "meta.json").exists():
            prepare_stdlib(config.data_dir)
        if world.size > 1:
            dist.barrier()  # nobody opens the files before they are there


def is_finished(start, state, max_steps, world):
    """Whether nothing is left to do, which it then prints."""
    has_ended = world.all(start.has_ended)
    # killed between the last step and summary.json: what the end leaves is made again
    if state.step < max_steps or state.step == max_steps and not has_ended:
        return False
    print0(f"{start.config.out_dir} is finished: {state.step:,} steps are done, {max_steps:,} were "
           "asked for; --resume --extend --max_steps=MORE goes on")
    return True


def print_setup(config, meta, model, train_data, max_steps, batch_size, grad_accum_steps, world):
    sequences, tokens = config.global_batch_size, config.global_batch_size * config.block_size
    threads = f" of {n_threads()} threads" if world.device.type == "cpu" else ""
    print0(format_config(config))
    print0(f"model:  {model.num_params():,} parameters on {world.size} x {world.device.type}"
           f"{threads}, {str(world.dtype or torch.float32).removeprefix('torch.')}")
    print0(f"data:   {config.dataset}, {train_data.n_tokens:,} training tokens; the run reads "
           f"{max_steps * tokens:,}, {max_steps * sequences / len(train_data):.2f} epochs")
    print0(f"batch:  {sequences} sequences x {config.block_size:,} tokens = {tokens:,} tokens a "
           f"step, {max_steps:,} steps; {world.size} processes x {grad_accum_steps} micro-steps x "
           f"batch_size {batch_size}")


def main():
    # a full disk or a closed terminal ends no run
    sys.stdout, sys.stderr = OutputThatMayFail(sys.stdout), OutputThatMayFail(sys.stderr)
    train(load(Config, sys.argv[1:]))
    end_distributed()


if __name__ == "__main__":
    run_script(main, if_interrupted="stopped before the first step")
