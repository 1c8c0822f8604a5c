"""Each recipe's values, by the ladder's trials: the README's table.

    python -m studies.ladder.rates

A trial has seed 100, which no tested run has, and counts by validation loss. The best of 24 random
trials at 2x64 gives a recipe its values. Its rate was halved and doubled at each smaller size until
the best lay between two others. A parabola through these three gives a size's optimum, and a power
law of the number of parameters through the optima the rate of every size.
"""

import math

import numpy as np

from nanolab.common import run_script
from nanolab.study.runs import read_file
from nanolab.study.tables import format_table

RECIPES = ("published", "rope_qk_norm", "modern")
SIZES = {"2x32": 45_824, "2x48": 87_168, "2x64": 140_800, "3x80": 284_320}  # parameters
TUNED, LARGEST, LARGEST_PARAMETERS = "2x64", "3x112", 527_072
DRAWN = ("learning_rate", "weight_decay", "beta2", "warmup_fraction")


def read_trials(stage, recipe, size):
    """Trials of the stage `tuning`, which is random, or `rates`: their options, and val_loss."""
    return [{**run["config"], "val_loss": run["val_loss"] or math.inf}  # None: it diverged
            for run in read_file("studies/ladder/tuning.json")
            if run["path"].startswith(f"out/ladder/{stage}/{recipe}/{size}/")]


def best_trial(recipe):
    """What the best of the random trials drew: {option: value}."""
    best = min(read_trials("tuning", recipe, TUNED), key=lambda each: each["val_loss"])
    return {key: best[key] for key in DRAWN}


def best_rate(recipe, size):
    """By a parabola over the logarithm of the rate, through the best trial and its neighbours."""
    best, losses = best_trial(recipe), {}  # by how often the best trial's rate was doubled
    for each in read_trials("rates", recipe, size) + read_trials("tuning", recipe, size):
        step = math.log2(each["learning_rate"] / best["learning_rate"])
        if abs(step - round(step)) < 0.01 and all(each[key] == best[key] for key in DRAWN[1:]):
            losses[round(step)] = each["val_loss"]
    lowest = min(losses, key=losses.get)
    steps = (lowest - 1, lowest, lowest + 1)
    a, b, _ = np.polyfit(steps, [losses[step] for step in steps], 2)
    return best["learning_rate"] * 2 ** (-b / (2 * a))


def main():
    rows = [["recipe", "weight decay", "beta2", "warm-up",
             *(f"best rate at {size}" for size in SIZES), f"law's rate at {LARGEST}"]]
    for recipe in RECIPES:
        best, rates = best_trial(recipe), [best_rate(recipe, size) for size in SIZES]
        law = np.polyfit(np.log(list(SIZES.values())), np.log(rates), 1)
        rates.append(math.exp(np.polyval(law, math.log(LARGEST_PARAMETERS))))
        rows.append([recipe, f"{best['weight_decay']:.3g}", f"{best['beta2']:g}",
                     f"{best['warmup_fraction']:g}", *(f"{rate:.4f}" for rate in rates)])
    print(format_table(rows, markdown=True))


if __name__ == "__main__":
    run_script(main)
