"""The learning rate of every step, and the number of steps."""

import math
from types import SimpleNamespace

from nanolab.devices import print0


def count_steps(config):
    tokens_per_step = config.global_batch_size * config.block_size
    return config.max_steps or math.ceil(config.max_tokens / tokens_per_step)


def learning_rate_at(step, max_steps, config):
    """The learning rate of step 0 ... max_steps - 1.

    Linear warm-up from 1e-5 of the peak over the first warmup_fraction of the steps. Then
    'constant' stays; 'cosine' falls along half a cosine; 'wsd' stays, then falls linearly over the
    last cooldown_fraction of the steps (Hu et al., "MiniCPM", 2024; Haegele et al., "Scaling laws
    and compute-optimal training beyond fixed training durations", 2024). Both reach min_lr_ratio x
    peak at the last step. The published runs (part 32e) chained torch's LinearLR and
    CosineAnnealingLR, which would reach it one step later: at 33,165 steps the rates differ by at
    most 1.2e-4 of themselves.
    """
    warmup_steps = int(config.warmup_fraction * max_steps + 1e-9)  # 1e-9: 0.29 * 100 is 28.99...
    if step < warmup_steps:
        return config.learning_rate * (1e-5 + (1 - 1e-5) * step / warmup_steps)
    if config.schedule == "constant":
        return config.learning_rate
    if config.schedule == "cosine":
        progress = (step - warmup_steps) / max(max_steps - 1 - warmup_steps, 1)
        coeff = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        cooldown_steps = max(int(config.cooldown_fraction * max_steps + 1e-9), 1)
        coeff = min((max_steps - 1 - step) / cooldown_steps, 1.0)
    min_lr = config.learning_rate * config.min_lr_ratio
    return min_lr + (config.learning_rate - min_lr) * coeff


def follow_plan(config, state, resumed):
    """Says what it means that a resumed run is to have another number of steps than was planned.

    From here on it has the learning rates of a run of the new length. Unless it also had them so
    far, bit for bit, no other run has been through its states, and its name says so from now on.
    state: RunState; resumed: the checkpoint that it is from.
    """
    planned, now = count_steps(SimpleNamespace(**resumed["config"])), count_steps(config)
    as_planned = planned == now or not config.tail_average and all(
        learning_rate_at(step, planned, config) == learning_rate_at(step, now, config)
        for step in range(state.step))
    name = config.name.removesuffix(state.name_suffix)
    if not as_planned:
        state.name_suffix += f"_extended_{state.step}"
    config.name = name + state.name_suffix
    if now != planned and state.step < now:
        rate = learning_rate_at(state.step, now, config)
        print0(f"plan:   {now:,} steps instead of {planned:,}; from here on the learning rate is "
               f"that of a run of {now:,} steps, now {rate:.4g}. " + (
                   "The steps done are those of that run too" if as_planned else
                   f"The steps done are not those of that run: this one is now {config.name}"))
