"""Which flags help at two sizes, and how often the sign of a difference is the same at both.

    python -m studies.flags.flags choose|agreement SMALLER.json LARGER.json

A size is the end of its file's name, as in 2x32.json or again_2x32.json. The rule, written down
before the runs at 2x48 were made: a flag is chosen if its mean validation loss is lower than the
baseline's at both sizes, and the mean of its differences, seed by seed at both sizes, is more than
two standard errors below 0. What is stacked was chosen when 2x48 had three seeds.
"""

import sys
from pathlib import Path

import numpy as np
from scipy.stats import binomtest

from nanolab.common import UserError, run_script
from nanolab.study.runs import group_by_experiment, losses_by_seed, read_file
from nanolab.study.stats import standard_error
from nanolab.study.tables import format_table

BASELINE = "modern"


def compare(name, sizes):
    """-> the mean difference in validation loss to the baseline, seed by seed, at each size; the
    mean of all of them; its standard error; whether the flag is chosen."""
    differences = [[losses[name][seed] - losses[BASELINE][seed] for seed in losses[name]]
                   for losses in sizes]
    means, both = [np.mean(each) for each in differences], sum(differences, [])
    mean, error = np.mean(both), standard_error(both)
    return means, mean, error, max(means) < 0 and mean < -2 * error


def choose(found, labels):
    """The mean difference at each size, and of all seeds with its standard error."""
    rows = [["flag", *labels, "both", "chosen"]]
    for name, (means, both, error, helps) in sorted(found.items(), key=lambda item: item[1][1]):
        rows.append([name, *(f"{mean:+.4f}" for mean in means), f"{both:+.4f} ± {error:.4f}",
                     "yes" if helps else "no"])
    return format_table(rows, markdown=True)


def agreement(found, labels):
    """The decision accuracy of Magnusson et al. ("DataDecide", 2025, arXiv 2504.11393): of all
    flags, the fraction whose difference has the same sign at both sizes, with Wilson's interval."""
    holds = [small * large > 0 for (small, large), *_ in found.values()]
    interval = binomtest(sum(holds), len(holds)).proportion_ci(method="wilson")
    return (f"{sum(holds)} of {len(holds)} signs at {labels[0]} hold at {labels[1]}: "
            f"{sum(holds) / len(holds):.2f} (95 % interval {interval.low:.2f} to "
            f"{interval.high:.2f})")


def main():
    what = {"choose": choose, "agreement": agreement}.get("".join(sys.argv[1:2]))
    if not what or len(sys.argv) != 4:
        raise UserError("name choose or agreement, and two results files", exit_code=2)
    sizes = [{flag: losses_by_seed(runs, "val_loss") for flag, runs in
              group_by_experiment(read_file(path, "val_loss")).items()} for path in sys.argv[2:]]
    labels = [Path(path).stem.split("_")[-1] for path in sys.argv[2:]]
    print(what({name: compare(name, sizes) for name in sizes[0]
                if name in sizes[1] and name != BASELINE}, labels))


if __name__ == "__main__":
    run_script(main)
