"""Each newer flag alone on the ladder's modern recipe, and then together what helped.

    python -m studies.flags.flags baseline|alone|choose|agreement|stack

`choose` and `agreement` print what is found in out/flags_*.json, or else in our results. The others
print arguments for train.py, a line a run: the ladder's own runs, to compare with; every flag alone
at two sizes; and what helped, together, at the third, as on record: with the ladder's values for
the modern recipe, and with 24 random trials of values of its own, drawn as the ladder's.

The rule, written down before the runs at 2x48 were made: a flag is chosen if its mean validation
loss is lower than the baseline's at both sizes, and the mean of its differences, seed by seed at
both sizes, is more than two standard errors below 0. What is stacked was chosen when 2x48 had
three seeds.
"""

from pathlib import Path

import numpy as np
from scipy.stats import binomtest

from config import Config
from nanolab.common import run_script
from nanolab.study.runs import read_file
from nanolab.study.stats import standard_error
from nanolab.study.tables import format_table
from studies.ladder.ladder import RECIPES, arguments, run_command, run_of, tuned

SIZES, THIRD_SIZE = ("2x32", "2x48"), "2x64"
SEEDS = (1, 2, 3, 4, 5)

# The files in config/interventions/ have the values of models of another size. A rate that is a
# multiple of the matrices' is tried at a third and at three times.
FLAGS = {
    "cosine_to_zero": "--min_lr_ratio=0",
    "decay_to_zero": "--schedule=wsd --cooldown_fraction=0.7 --min_lr_ratio=0",
    **{f"{rate}_{multiple}": f"--{rate}={multiple}"
       for rate in ("embedding_lr", "head_lr", "scalar_lr") for multiple in (0.3, 3)},
    "beta2_0.95": "--beta2=0.95",
    "adamw_weight_decay_0.001": "--adamw_weight_decay=0.001",
    "one_head": "--n_head=1",
    **{name: f"config/interventions/{name}.py" for name in (
        "cautious_decay", "embed_norm", "logit_softcap", "normuon", "qkv_bias", "relu2", "rmsnorm",
        "swiglu", "tail_average", "value_embeddings", "value_residual", "x0_lambdas",
        "zero_init")},
    "gpt2_init": "--init=gpt2",
}


def baseline():
    for seed in SEEDS:
        for recipe, size in (*(("modern", size) for size in SIZES),
                             *((recipe, THIRD_SIZE) for recipe in RECIPES)):
            yield run_of(recipe, size, seed)


def alone():
    for size in SIZES:
        for seed in SEEDS:
            for name, flags in FLAGS.items():
                folder = f"out/flags/{size}/{name}/{seed}"
                line = arguments("modern", size, tuned("modern", size), folder, seed)
                yield f"{line} {flags} --name={name}"


def choose():
    """The mean difference at each size, and of all seeds with its standard error."""
    rows = [["flag", *SIZES, "both", "chosen"]]
    found = {name: compare(name) for name in FLAGS}
    for name, (means, both, error, helps) in sorted(found.items(), key=lambda item: item[1][1]):
        rows.append([name, *(f"{mean:+.4f}" for mean in means), f"{both:+.4f} ± {error:.4f}",
                     "yes" if helps else "no"])
    yield format_table(rows, markdown=True)


def compare(name):
    """-> the mean difference in validation loss to the baseline, seed by seed, at each size; the
    mean of all of them; its standard error; whether the flag is chosen."""
    differences = []
    for size in SIZES:
        losses = {(run["name"], run["config"]["seed"]): run["val_loss"] for run in read_runs(size)}
        differences.append([losses[name, seed] - losses["modern", seed] for seed in SEEDS])
    means, both = [np.mean(each) for each in differences], sum(differences, [])
    mean, error = np.mean(both), standard_error(both)
    return means, mean, error, max(means) < 0 and mean < -2 * error


def agreement():
    """The decision accuracy of Magnusson et al. ("DataDecide", 2025, arXiv 2504.11393): of all
    flags, the fraction whose difference has the same sign at both sizes, with Wilson's interval."""
    holds = [small * large > 0 for (small, large), *_ in map(compare, FLAGS)]
    interval = binomtest(sum(holds), len(holds)).proportion_ci(method="wilson")
    yield (f"{sum(holds)} of {len(holds)} signs at {SIZES[0]} hold at {SIZES[1]}: "
           f"{sum(holds) / len(holds):.2f} (95 % interval {interval.low:.2f} to "
           f"{interval.high:.2f})")


def read_runs(results):
    """The runs of flags_RESULTS.json, one's own if there are any."""
    own = Path(f"out/flags_{results}.json")
    return read_file(own if own.exists() else f"studies/flags/{results}.json")


def stack():
    """The runs of the stack on record, with the options that they had."""
    for results in ("stack_rates", "stack_tuning", "stack"):
        for each in read_file(f"studies/flags/{results}.json"):
            if each["name"].startswith("stack"):
                options = [f"--{key}={value}" for key, value in each["config"].items()
                           if value != getattr(Config(), key)]
                yield " ".join([*options, f"--name={each['name']}",
                                f"--out_dir={Path(each['path']).parent}"])


def main():
    run_command(baseline, alone, choose, agreement, stack)


if __name__ == "__main__":
    run_script(main)
