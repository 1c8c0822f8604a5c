"""A dry run: what a run will need, from one step that is measured and thrown away."""

import re
import time
from collections import Counter
from statistics import median

import torch.distributed as dist

from nanolab.common import format_duration
from nanolab.devices import all_reduce_scalar, autocast, print0, synchronize
from nanolab.memory import count_training_memory, free_memory, peak_memory, step_fits, trial_state


def dry_run(config, state, model, ddp_model, optimizer, data, max_steps, grad_accum_steps, device,
            dtype):
    """Prints shapes, memory and time of the run from `state` on. Writes no file."""
    print0(format_shapes(model, config))
    needed, free = count_training_memory(model, config.batch_size, dtype), free_memory(device)
    print0(f"memory: {needed / 2**20:,.0f} MB predicted on each device: weights, gradients, "
           "optimiser state and what one micro-step keeps for its backward pass; "
           f"{free / 2**20:,.0f} MB are free")
    with trial_state(model, optimizer, device):
        fits = needed < free and step_fits(model, data, config.batch_size, device, dtype,
                                           n_passes=1)
        if not all_reduce_scalar(dist.ReduceOp.MIN, float(fits), device):
            print0("time:   not measured, because a step does not fit; use a smaller --batch_size, "
                   "or 'auto'")
            return
        micro_step, update = measure_step(ddp_model, optimizer, data, config, device, dtype)
    seconds = micro_step * grad_accum_steps + update
    rate = config.global_batch_size * config.block_size / seconds
    total = seconds * (max_steps - state.step)
    cost = total / 3600 * config.dollars_per_hour
    print0(f"time:   {seconds:.3g} s a step as measured ({grad_accum_steps} micro-steps of "
           f"{micro_step:.3g} s, {update:.3g} s for the update), {rate:,.0f} tokens/s; "
           f"{max_steps - state.step:,} steps take about {format_duration(total)}, validations and "
           f"saves not counted{f', and cost {cost:,.2f} dollars' if cost else ''}; peak memory of "
           f"the step {peak_memory(device) / 2**20:,.0f} MB\n"
           f"dry run: nothing was written to {config.out_dir}")


def measure_step(ddp_model, optimizer, data, config, device, dtype):
    """-> seconds of one micro-step, seconds of the optimiser's update: the median of as many as fit
    into a second, at least one."""
    inputs, targets = data.batch([i % len(data) for i in range(config.batch_size)], device)

    def micro_step():
        with autocast(dtype, device):
            loss = ddp_model(inputs, targets)
        loss.backward()

    def median_time(work):
        times = []
        while sum(times) < 1:
            synchronize(device)
            start = time.perf_counter()
            work()
            synchronize(device)
            times.append(all_reduce_scalar(dist.ReduceOp.MAX, time.perf_counter() - start, device))
        return median(times)

    return median_time(micro_step), median_time(optimizer.step)


def format_shapes(model, config):
    """The shapes of a micro-batch and of the parameters, with a line for those that all blocks
    have alike."""
    alike = Counter((re.sub(r"\d+", "*", name), tuple(p.shape))
                    for name, p in model.named_parameters())
    lines = [f"{'one micro-batch':32} {(config.batch_size, config.block_size)} tokens"]
    lines += [f"{name:32} {shape}{f' x {n}' if n > 1 else ''}"
              for (name, shape), n in alike.items()]
    return "shapes: " + "\n        ".join(lines)
