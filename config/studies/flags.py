"""Each newer flag alone on the ladder's modern recipe, and then together what helped.

    python -m config.studies.flags baseline  the ladder's own runs that the others are compared with
    python -m config.studies.flags alone     every flag, at 2x32 and 2x48, five seeds
    python -m config.studies.flags choose    what helped, by out/flags_*.json, or else by ours
    python -m config.studies.flags rates     what helped ours, together, at 2x64: three rates
    python -m config.studies.flags stack     the same at the modern recipe's rate, five seeds

All but `choose` print arguments for train.py, a line a run; flags.sh runs them. Every run has 20
tokens a parameter and the values that the ladder found for the modern recipe at its size
(config/studies/ladder.py); those of `rates` have a seed of their own and half, once and twice its
learning rate.

The rule, written down before the runs at 2x48 were made: a flag is chosen if its mean validation
loss is lower than the baseline's at both sizes, and the mean of its differences, seed by seed at
both sizes, is more than two standard errors below 0. STACK was chosen when 2x48 had three seeds.
"""

import json
import math
import statistics
from pathlib import Path

from config.studies.ladder import RECIPES, arguments, run_command, runs_of, tuned

SIZES, THIRD_SIZE = ("2x32", "2x48"), "2x64"
SEEDS = {"2x32": (1, 2, 3, 4, 5), "2x48": (1, 2, 3, 4, 5), "2x64": (1, 2, 3, 4, 5)}
SEEDS_OF_CHOICE = {**SEEDS, "2x48": (1, 2, 3)}

# The files in config/interventions/ have the values of models of another size. A rate that is a
# multiple of the matrices' is tried at a third and at three times.
FLAGS = {
    "cosine_to_zero": "--min_lr_ratio=0",
    "decay_to_zero": "--schedule=wsd --cooldown_fraction=0.7 --min_lr_ratio=0",
    "embedding_lr_0.3": "--embedding_lr=0.3",
    "embedding_lr_3": "--embedding_lr=3",
    "head_lr_0.3": "--head_lr=0.3",
    "head_lr_3": "--head_lr=3",
    "scalar_lr_0.3": "--scalar_lr=0.3",
    "scalar_lr_3": "--scalar_lr=3",
    "beta2_0.95": "--beta2=0.95",
    "adamw_weight_decay_0.001": "--adamw_weight_decay=0.001",
    "one_head": "--n_head=1",
    **{name: f"config/interventions/{name}.py" for name in (
        "cautious_decay", "embed_norm", "logit_softcap", "normuon", "qkv_bias", "relu2", "rmsnorm",
        "swiglu", "tail_average", "value_embeddings", "value_residual", "x0_lambdas",
        "zero_init")},
    "gpt2_init": "--init=gpt2",
}
STACK = ("decay_to_zero", "embedding_lr_3", "one_head", "swiglu", "tail_average",
         "value_embeddings", "value_residual")  # by SEEDS_OF_CHOICE


def baseline():
    for size in (*SIZES, THIRD_SIZE):
        for line in runs_of(size, SEEDS[size], RECIPES if size == THIRD_SIZE else ["modern"]):
            if "_1_1/" in line:  # all its tokens
                yield line


def alone():
    for size in SIZES:
        for seed in SEEDS[size]:
            for name, flags in FLAGS.items():
                yield run(name, flags, size, seed)


def choose():
    """A Markdown table: the mean difference at each size and of all seeds, with its standard error;
    and whether the flag is chosen."""
    yield f"| flag | {' | '.join(SIZES)} | both | chosen |\n| --- | ---: | ---: | ---: | --- |"
    rows = {name: compare(name) for name in FLAGS}
    for name, (means, both, error) in sorted(rows.items(), key=lambda row: row[1][1]):
        cells = (*(f"{mean:+.4f}" for mean in means), f"{both:+.4f} ± {error:.4f}")
        yield f"| `{name}` | {' | '.join(cells)} | {'yes' if helped(*rows[name]) else ''} |"


def helped(means, both, error):
    return max(means) < 0 and both < -2 * error


def compare(name, seeds=SEEDS):
    """-> the mean difference in validation loss to the baseline, seed by seed, at each size; the
    mean of all of them; its standard error."""
    differences = []
    for size in SIZES:
        own, recorded = (Path(folder, f"flags_{size}.json") for folder in ("out", "config/results"))
        runs = json.loads((own if own.exists() else recorded).read_text())["runs"]
        losses = {(run["name"], run["config"]["seed"]): run["val_loss"] for run in runs}
        differences.append([losses[name, seed] - losses["modern", seed] for seed in seeds[size]])
    both = sum(differences, [])
    error = statistics.stdev(both) / math.sqrt(len(both))
    return [statistics.mean(each) for each in differences], statistics.mean(both), error


def rates():
    for multiple in (0.5, 1, 2):
        yield stack_run(f"stack_rate_{multiple}", 100, multiple)


def stack():
    for seed in SEEDS[THIRD_SIZE]:
        yield stack_run("stack", seed)


def stack_run(name, seed, multiple=1):
    return run(name, " ".join(FLAGS[flag] for flag in STACK), THIRD_SIZE, seed, multiple)


def run(name, flags, size, seed, multiple=1):
    """multiple: of the modern recipe's learning rate."""
    values = tuned("modern", size)
    values["learning_rate"] *= multiple
    line = arguments("modern", size, values, f"out/flags/{size}/{name}/{seed}", seed)
    return f"{line} {flags} --name={name}"


if __name__ == "__main__":
    run_command(__doc__, baseline, alone, choose, rates, stack)
