"""Which flags help at two sizes, and how often the sign of a difference is the same at both.

    python -m studies.flags.flags choose|agreement [RESULTS.json RESULTS.json]

The results are those of the two sizes, or else ours. The rule, written down before the runs at 2x48
were made: a flag is chosen if its mean validation loss is lower than the baseline's at both sizes,
and the mean of its differences, seed by seed at both sizes, is more than two standard errors below
0. What is stacked was chosen when 2x48 had three seeds.
"""

import sys

import numpy as np
from scipy.stats import binomtest

from nanolab.common import UserError, run_script
from nanolab.study.runs import read_file
from nanolab.study.stats import standard_error
from nanolab.study.tables import format_table

SIZES, BASELINE = ("2x32", "2x48"), "modern"


def read_losses(path):
    """-> {flag: {seed: validation loss}}"""
    losses = {}
    for run in read_file(path):
        losses.setdefault(run["name"], {})[run["config"]["seed"]] = run["val_loss"]
    return losses


def compare(name, sizes):
    """-> the mean difference in validation loss to the baseline, seed by seed, at each size; the
    mean of all of them; its standard error; whether the flag is chosen."""
    differences = [[losses[name][seed] - losses[BASELINE][seed] for seed in losses[name]]
                   for losses in sizes]
    means, both = [np.mean(each) for each in differences], sum(differences, [])
    mean, error = np.mean(both), standard_error(both)
    return means, mean, error, max(means) < 0 and mean < -2 * error


def choose(found):
    """The mean difference at each size, and of all seeds with its standard error."""
    rows = [["flag", *SIZES, "both", "chosen"]]
    for name, (means, both, error, helps) in sorted(found.items(), key=lambda item: item[1][1]):
        rows.append([name, *(f"{mean:+.4f}" for mean in means), f"{both:+.4f} ± {error:.4f}",
                     "yes" if helps else "no"])
    return format_table(rows, markdown=True)


def agreement(found):
    """The decision accuracy of Magnusson et al. ("DataDecide", 2025, arXiv 2504.11393): of all
    flags, the fraction whose difference has the same sign at both sizes, with Wilson's interval."""
    holds = [small * large > 0 for (small, large), *_ in found.values()]
    interval = binomtest(sum(holds), len(holds)).proportion_ci(method="wilson")
    return (f"{sum(holds)} of {len(holds)} signs at {SIZES[0]} hold at {SIZES[1]}: "
            f"{sum(holds) / len(holds):.2f} (95 % interval {interval.low:.2f} to "
            f"{interval.high:.2f})")


def main():
    what = {"choose": choose, "agreement": agreement}.get("".join(sys.argv[1:2]))
    paths = sys.argv[2:] or [f"studies/flags/{size}.json" for size in SIZES]
    if not what or len(paths) != 2:
        raise UserError("name choose or agreement, and two results files or none", exit_code=2)
    sizes = [read_losses(path) for path in paths]
    print(what({name: compare(name, sizes) for name in sizes[0] if name != BASELINE}))


if __name__ == "__main__":
    run_script(main)
