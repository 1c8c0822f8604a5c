"""What fits in memory, by trying real steps: batch_size='auto', and a dry run."""

import resource
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from statistics import median

import torch
import torch.distributed as dist

from config import divisors
from nanolab.common import UserError, is_out_of_memory
from nanolab.distributed import print0

MARGIN = 0.1  # the fraction of a GPU that a trial leaves free, for what comes later in a run
CPU_TOKENS = 2**13  # of a micro-batch by 'auto' on a CPU, where a larger one is no faster


def peak_memory(device):
    """The most bytes this process has held so far: of the GPU's memory, or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def largest_batch_size(model, optimizer, dataset, global_batch_size, world):
    """The largest micro-batch that fits on every GPU, a divisor of a process's part of the global
    batch. Tries real steps, from the largest down. On a CPU or a Mac, whose system promises more
    memory than it has: the largest of at most CPU_TOKENS. Raises UserError."""
    sizes = divisors(max(global_batch_size // world.size, 1))[::-1]
    on_gpu = world.device.type == "cuda"
    if world.device.type in ("cpu", "mps"):
        return next(size for size in sizes if size == 1 or size * dataset.block_size <= CPU_TOKENS)
    if on_gpu:
        torch.cuda.set_per_process_memory_fraction(1 - MARGIN, world.device)
    buckets = [torch.empty_like(p) for p in model.parameters() if world.size > 1]  # as DDP's
    with trial_state(model, optimizer, world):
        found = next((size for size in sizes
                      if world.all(step_fits(model, dataset, size, world))), None)
    del buckets
    if on_gpu:
        torch.cuda.set_per_process_memory_fraction(1.0, world.device)
    torch.compiler.reset()  # the trials leave graphs for any batch size
    if not found:
        raise UserError("not even batch_size=1 fits in memory; use a smaller model or a smaller "
                        "--block_size")
    return found


@contextmanager
def trial_state(model, optimizer, world):
    """What a step finds in memory: gradients and the optimiser's state. They are freed afterwards;
    a step at learning rate 0 makes the state, so no weight changes."""
    optimizers = getattr(optimizer, "optimizers", [optimizer])
    is_new = not any(each.state for each in optimizers)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    if is_new:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.step()
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)  # of larger trials
    try:
        yield
    finally:
        model.zero_grad(set_to_none=True)
        for each in optimizers if is_new else []:
            each.state.clear()
        if world.device.type == "cuda":
            torch.cuda.empty_cache()


def step_fits(model, dataset, size, world):
    """Whether forward and backward passes over `size` sequences fit. A first pass may fit where a
    later one does not."""
    try:
        for _ in range(3):
            forward_and_backward(model, dataset, size, world)
        return True
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        if world.device.type == "cuda":
            torch.cuda.empty_cache()


def forward_and_backward(model, dataset, size, world):
    batch = dataset.batch([i % len(dataset) for i in range(size)], world.device)
    with world.autocast():
        loss = model(*batch)
    loss.backward()


def dry_run(config, n_steps, model, optimizer, dataset, batch_size, grad_accum_steps, world):
    """Prints memory and time of a run of n_steps more steps, by steps that are measured and thrown
    away. Writes no file."""
    def measure(work):
        """The median of as many times as fit into a second, at least one."""
        times = []
        while sum(times) < 1:
            world.synchronize()
            start = time.perf_counter()
            work()
            world.synchronize()
            times.append(world.reduce(dist.ReduceOp.MAX, time.perf_counter() - start))
        return median(times)

    with trial_state(model, optimizer, world):
        work = partial(forward_and_backward, model, dataset, batch_size, world)
        work()  # compiles
        last_micro_step = measure(work)
        if world.size > 1:
            model.require_backward_grad_sync = False  # DDP averages in the last micro-step only
        micro_step = measure(work)
        update = measure(optimizer.step)
    seconds = micro_step * (grad_accum_steps - 1) + last_micro_step + update
    rate = config.global_batch_size * config.block_size / seconds
    cost = seconds * n_steps / 3600 * config.dollars_per_hour
    print0(f"memory: {peak_memory(world.device) / 2**20:,.0f} MB at the peak of a step\n"
           f"time:   {seconds:,.4f} s a step ({grad_accum_steps} micro-steps of "
           f"{micro_step:,.4f} s, {update:,.4f} s for the update), {rate:,.0f} tokens/s; "
           f"{n_steps:,} steps take about {timedelta(seconds=round(seconds * n_steps))} hours, "
           "validations and saves not counted"
           f"{f', and cost {cost:,.2f} dollars' if cost else ''}\n"
           f"dry run: nothing was written to {config.out_dir}")
