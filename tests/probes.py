"""What several tests need of the model: flags, a small one, and the GPU's head on a CPU."""

import random
from dataclasses import fields

import nanolab.head
from model import GPTConfig


def flag_sets(n, seed=0):
    """n dicts of GPTConfig's switches. Together they have each value of each switch, so a new one
    is covered without a change here; the first has the defaults."""
    draw, sets = random.Random(seed), [{} for _ in range(n)]
    for field in fields(GPTConfig):
        values = {bool: [False, True], str: list(field.metadata["choices"]),
                  float: [0.0, 0.1 if field.name == "dropout" else 9.0]}.get(field.type)
        if not values:
            continue  # a size
        column = (values * n)[:n - 1]
        draw.shuffle(column)
        for flags, value in zip(sets[1:], column):
            flags[field.name] = value
    for flags in sets[1:]:
        flags["qk_norm"] |= flags["qk_bound"] > 0  # without it, a bound has no effect
    return sets


def small_gpt_config(**flags):
    return GPTConfig(**{"vocab_size": 301, "block_size": 16, "n_layer": 2, "n_head": 2,
                        "n_embd": 32, "dropout": 0.0, **flags})


def force_gpu_head(monkeypatch):
    """The head takes the GPU's branch on a CPU."""
    monkeypatch.setattr(nanolab.head, "cpu_head_loss", nanolab.head.HeadLoss.apply)
