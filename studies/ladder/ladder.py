"""The ladder: three recipes at five sizes, each trained on 20 tokens a parameter.

    python -m studies.ladder.ladder tuning|rates|runs|largest|values

All but `values`, which is the README's table, print arguments for train.py, a line a run; run.sh
runs them. A trial has seed 100, which no tested run has, and counts by validation loss. `tuning`
draws learning rate, weight decay, beta2 and warm-up at random. All else reads the trials: those in
out/ladder/tuning.json, or else ours. `rates` prints what these still lack, in the end nothing. It
keeps the best trial's other values, and halves or doubles its rate until the best
lies between two others. A parabola through these three gives a size's optimum, and a power law of
the number of parameters through the four smaller sizes' optima gives the rate of every size.
"""

import math
import sys
from functools import cache
from pathlib import Path

import numpy as np

from nanolab.common import UserError, run_script
from nanolab.study.runs import read_file
from nanolab.study.tables import format_table

RECIPES = {  # these runs are older than the bound of attention logits (studies/qk_bound)
    "published": "config/cloud.py",
    "rope_qk_norm": "config/cloud.py config/interventions/rope.py config/interventions/qk_norm.py "
                    "--qk_bound=0",
    "modern": "config/modern.py --qk_bound=0",
}
RATES = {"published": (2e-3, 6.4e-2), "rope_qk_norm": (2e-3, 6.4e-2), "modern": (4e-3, 1.28e-1)}
SIZES = {"2x32": (2, 2, 32), "2x48": (2, 3, 48), "2x64": (2, 2, 64), "3x80": (3, 5, 80),
         "3x112": (3, 7, 112)}  # n_layer, n_head, n_embd
LADDER, LARGEST = ("2x32", "2x48", "2x64", "3x80"), "3x112"
TUNED = "2x64"
SEEDS = {"2x32": 5, "2x48": 5, "2x64": 5, "3x80": 2, "3x112": 3}
N_TRIALS = 24
COLLECTED, RECORDED = Path("out/ladder/tuning.json"), Path("studies/ladder/tuning.json")
DRAWN = ("learning_rate", "weight_decay", "beta2", "warmup_fraction")


def parameters(size):
    """Of the published recipe; the others lack its 128 position embeddings. All get its budget."""
    n_layer, _, n_embd = SIZES[size]
    block = 12 * n_embd ** 2 + 10 * n_embd
    return n_layer * block + (2 * 257 + 128 + 2) * n_embd


def arguments(recipe, size, values, folder, seed=100, fraction=1):
    """For one run. fraction: of the 20 tokens a parameter."""
    n_layer, n_head, n_embd = SIZES[size]
    tuned = " ".join(f"--{key}={value:.4g}" for key, value in values.items())
    return (f"{RECIPES[recipe]} config/ladder.py --dataset=pypi --name={recipe} "
            f"--n_layer={n_layer} --n_head={n_head} --n_embd={n_embd} {tuned} --seed={seed} "
            f"--max_tokens={round(20 * parameters(size) * fraction)} --out_dir={folder}")


def random_values(seed, recipe):
    """What a random trial draws: {option: value}."""
    rng = np.random.default_rng(seed)
    return {"learning_rate": np.exp(rng.uniform(*np.log(RATES[recipe]))),
            "weight_decay": np.exp(rng.uniform(*np.log((1e-3, 1.0)))),
            "beta2": rng.choice([0.95, 0.98, 0.99, 0.999]),
            "warmup_fraction": rng.choice([0.0, 0.02, 0.05, 0.1])}


def tuning():
    for i in range(N_TRIALS):
        for j, recipe in enumerate(RECIPES):
            yield arguments(recipe, TUNED, random_values([i, j], recipe),
                            f"out/ladder/tuning/{recipe}/{TUNED}/{i}")


def rates():
    """The best trial's learning rate, its half and its double; then, at each size, the next one
    beyond the best until the best is no longer at an edge."""
    for recipe in RECIPES:
        for size in LADDER:
            losses, neighbours = losses_by_step(recipe, size)
            best = best_trial(recipe)
            for step in neighbours:
                if step not in losses:
                    rate = 2.0 ** step * best["learning_rate"]
                    yield arguments(recipe, size, {**best, "learning_rate": rate},
                                    f"out/ladder/rates/{recipe}/{size}/{best['beta2']}_{rate:.4g}")


def runs(sizes=LADDER):
    """The tested runs: each recipe on all its tokens; the modern one, with two seeds if there are
    three or more, on fewer too."""
    for size in sizes:
        seeds = range(1, SEEDS[size] + 1)
        for seed in seeds:
            for recipe in RECIPES:
                yield run_of(recipe, size, seed)
        for seed in seeds[:2 if len(seeds) > 2 else 1]:
            for part in (2, 4, 8):
                yield run_of("modern", size, seed, part)


def largest():
    return runs([LARGEST])


def run_of(recipe, size, seed, part=1):
    """A tested run, on 1 / part of the tokens."""
    return arguments(recipe, size, tuned(recipe, size),
                     f"out/ladder/runs/{size}/{recipe}_1_{part}/{seed}", seed, 1 / part)


def tuned(recipe, size):
    return {**best_trial(recipe), "learning_rate": rate_law(recipe, size)}


@cache  # every run asks for the trials
def read_trials(stage, recipe, size):
    """The trials of `tuning` or `rates`: their options, and val_loss."""
    return [{**run["config"], "val_loss": run["val_loss"] or math.inf}  # None: it diverged
            for run in read_file(COLLECTED if COLLECTED.exists() else RECORDED)
            if run["path"].startswith(f"out/ladder/{stage}/{recipe}/{size}/")]


def best_trial(recipe):
    """What the best of the random trials drew: {option: value}."""
    best = min(read_trials("tuning", recipe, TUNED), key=lambda each: each["val_loss"])
    return {key: best[key] for key in DRAWN}


def losses_by_step(recipe, size):
    """Validation losses by rate: {how often the best trial's was doubled, negative if halved:
    loss}; and the three steps around the lowest."""
    best, losses = best_trial(recipe), {}
    for each in read_trials("rates", recipe, size) + read_trials("tuning", recipe, size):
        step = math.log2(each["learning_rate"] / best["learning_rate"])
        if abs(step - round(step)) < 0.01 and all(each[key] == best[key] for key in DRAWN[1:]):
            losses[round(step)] = each["val_loss"]
    lowest = min(losses, key=losses.get, default=0)
    return losses, (lowest - 1, lowest, lowest + 1)


def best_rate(recipe, size):
    """By a parabola over the logarithm of the rate, through the best trial and its neighbours."""
    losses, steps = losses_by_step(recipe, size)
    if not losses.keys() >= set(steps):  # tuning was interrupted
        raise UserError(f"the best learning rate of {recipe} at {size} is not between two others "
                        "yet: run the trials of `rates` until it prints nothing")
    a, b, _ = np.polyfit(steps, [losses[step] for step in steps], 2)
    return best_trial(recipe)["learning_rate"] * 2 ** (-b / (2 * a))


def rate_law(recipe, size):
    """The learning rate that the law over LADDER has for a size."""
    law = np.polyfit(np.log([parameters(each) for each in LADDER]),
                     np.log([best_rate(recipe, each) for each in LADDER]), 1)
    return math.exp(np.polyval(law, math.log(parameters(size))))


def values():
    rows = [["recipe", "weight decay", "beta2", "warm-up",
             *(f"best rate at {size}" for size in LADDER), f"law's rate at {LARGEST}"]]
    for recipe in RECIPES:
        best = best_trial(recipe)
        found = [*(best_rate(recipe, size) for size in LADDER), rate_law(recipe, LARGEST)]
        rows.append([recipe, f"{best['weight_decay']:.3g}", f"{best['beta2']:g}",
                     f"{best['warmup_fraction']:g}", *(f"{rate:.4f}" for rate in found)])
    yield format_table(rows, markdown=True)


def run_command(*functions):
    """Calls the function that the command line names, and prints the lines that it yields."""
    commands = {each.__name__: each for each in functions}
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        raise UserError(f"name one of {', '.join(commands)}", exit_code=2)
    for line in commands[sys.argv[1]]():
        print(line)


def main():
    run_command(tuning, rates, runs, largest, values)


if __name__ == "__main__":
    run_script(main)
