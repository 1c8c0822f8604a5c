"""Where the noise of a study comes from: the initial weights, or data order and dropout.

    python -m studies.noise.mixed_model RESULTS.json    # its runs of NAMES
    python -m studies.noise.mixed_model RESULTS.json --baseline=NAME    # study.py's table

Each loss is taken for a mean, plus an effect of the seed of the initial weights, one of the seeds
of data order and dropout, and a rest. REML estimates their three variances from
all runs at once. `difference` compares two experiments by such a model, for runs that share seeds
with each other and so are not independent.
"""

import math
from collections import Counter

import numpy as np
from scipy.linalg import null_space
from scipy.optimize import Bounds, minimize
from scipy.special import chdtri, stdtr

from nanolab.common import UserError, argument_parser, run_script
from nanolab.study import stats, tables
from nanolab.study.runs import (group_by_experiment, losses_by_seed, read_file, seeds_of,
                                settings)

NAMES = ("baseline", "weights", "loop")  # the last two: the baseline with seeds of these alone
EFFECTS = {"weights": "initial weights", "loop": "data order and dropout", "rest": "rest"}


def mixed_model(losses, seeds, side=None):
    """Fits loss = mean of its side + effect of weights' seed + effect of loop's seeds + rest.

    losses: n of them. seeds: n tuples, first the weights' seed. side: n of 0 or 1. -> a dict. An
    effect that the seeds do not vary, or cannot tell from the rest, has the variance NaN.
    """
    n = len(losses)
    side = np.zeros(n, int) if side is None else np.array(side)
    contrasts = null_space(np.eye(side.max() + 1)[side].T).T  # what the means cannot change
    y = contrasts @ losses
    shared = {"rest": np.eye(n)}  # 1 where two runs have an effect in common
    for effect, ids in (("weights", [a[0] for a in seeds]), ("loop", [a[1:] for a in seeds])):
        candidates = {**shared, effect: np.array([[float(a == b) for b in ids] for a in ids])}
        projected = [contrasts @ each @ contrasts.T for each in candidates.values()]
        if np.linalg.matrix_rank([each.ravel() for each in projected]) == len(candidates):
            shared = candidates
    matrices = list(shared.values())
    projected = [contrasts @ each @ contrasts.T for each in matrices]

    def fit(logs):
        """For variances expm1(logs) times that of the rest: REML's deviance, and the rest."""
        covariance = np.tensordot([1, *np.expm1(logs)], projected, 1)
        rest = y @ np.linalg.solve(covariance, y) / len(y)
        return len(y) * math.log(rest) + np.linalg.slogdet(covariance)[1], rest

    # from two starting points, for there may be two minima
    fits = [minimize(lambda x: fit(x)[0], [start] * (len(matrices) - 1),
                     bounds=Bounds(0, 16)) for start in (0.1, 2)]
    logs = min(fits, key=lambda each: each.fun).x
    variances = fit(logs)[1] * np.array([1, *np.expm1(logs)])
    inverse = np.linalg.inv(np.tensordot(variances, projected, 1))
    return {"losses": np.array(losses), "matrices": matrices, "variances": variances,
            "projection": contrasts.T @ inverse @ contrasts,
            **dict.fromkeys(EFFECTS, math.nan), **dict(zip(shared, variances))}


def estimate(model, weights, n_new_runs=0):
    """The weighted sum of a model's losses, its standard error, its degrees of freedom.

    n_new_runs=1 adds the variance of one run with seeds of its own. Degrees of freedom:
    Satterthwaite's, from the information that the losses have about the variances.
    """
    weights = np.array(weights)
    gradient = np.array([weights @ matrix @ weights for matrix in model["matrices"]]) + n_new_runs
    variance = gradient @ model["variances"]
    projected = [model["projection"] @ matrix for matrix in model["matrices"]]
    information = np.array([[np.sum(a * b.T) for b in projected] for a in projected]) / 2
    df = 2 * variance ** 2 / (gradient @ np.linalg.solve(information, gradient))
    return float(weights @ model["losses"]), math.sqrt(variance), max(1.0, float(df))


def mean_loss(losses, n_new_runs=0):
    """The mean of {seeds: loss}, its standard error and degrees of freedom."""
    model = mixed_model(list(losses.values()), list(losses))
    return estimate(model, [1 / len(losses)] * len(losses), n_new_runs)


def difference(ours, theirs):
    """As nanolab.study.stats.compare_means, for runs that share seeds with each other."""
    result = stats.compare_means(ours, theirs)
    if result["p"] is None:
        return result
    if result["compared"].startswith("paired"):
        _, error, df = mean_loss({seeds: loss - theirs[seeds] for seeds, loss in ours.items()
                                  if seeds in theirs})
    else:  # a seed has no effect in common on the two sides
        seeds = [((side, first), side, *rest) for side, runs in enumerate((ours, theirs))
                 for first, *rest in runs]
        n, m = len(ours), len(theirs)
        model = mixed_model([*ours.values(), *theirs.values()], seeds, [0] * n + [1] * m)
        _, error, df = estimate(model, [1 / n] * n + [-1 / m] * m)
    return {**result, "error": error, "df": df,
            "p": 2 * float(stdtr(df, -abs(result["difference"]) / error))}


def sources_of_noise(runs):
    """The losses of one experiment by what its seeds vary: {source: losses}. A run may count in
    several."""
    losses = losses_by_seed(runs)
    one_seed = {seeds_of(run) for run in runs if set(seeds_of(run)) == {settings(run)["seed"]}}
    weights = Counter(seeds[0] for seeds in losses).most_common(1)[0][0]
    loop = Counter(seeds[1:] for seeds in losses).most_common(1)[0][0]
    sources = {"both, by one seed": one_seed.__contains__,
               "data order and dropout, same initial weights": lambda seeds: seeds[0] == weights,
               "initial weights, same data order and dropout": lambda seeds: seeds[1:] == loop}
    return {source: [loss for seeds, loss in losses.items() if belongs(seeds)]
            for source, belongs in sources.items()}


def sd_interval(losses):
    """The 95 % interval of the standard deviation of independent, normally distributed values."""
    n = len(losses)
    return [np.std(losses, ddof=1) * math.sqrt((n - 1) / chdtri(n - 1, p)) for p in (0.025, 0.975)]


def format_noise(runs):
    losses, rows = losses_by_seed(runs), [["varies", "n", "mean", "SD", "95 % interval"]]
    for source, values in sources_of_noise(runs).items():
        if len(values) > 1:
            rows.append([source, str(len(values)), f"{np.mean(values):.6f}",
                         f"{np.std(values, ddof=1):.6f}",
                         tables.format_interval(sd_interval(values), ".4f")])
    model = mixed_model(list(losses.values()), list(losses))
    sds = [f"{name} {math.sqrt(model[effect]):.4f}" for effect, name in EFFECTS.items()]
    mean, one_more = (tables.format_interval(stats.t_interval(*mean_loss(losses, n_new)), ".4f")
                      for n_new in (0, 1))
    return (f"{tables.format_table(rows, markdown=True)}\n\n"
            f"SD by the mixed model of all {len(losses)} runs: {', '.join(sds)}. "
            f"Mean {np.mean(list(losses.values())):.6f} (95 % interval {mean}); "
            f"one more run falls between {one_more.replace('to', 'and')}, 95 times in 100.")


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("results", metavar="RESULTS.json")
    parser.add_argument("--baseline", metavar="NAME", help="compare the others with it")
    args = parser.parse_args()
    runs = read_file(args.results, "test_loss")
    if args.baseline:
        rows = tables.compare(group_by_experiment(runs), args.baseline, test=difference)
        print(tables.format_heading(rows, args.baseline, "test_loss"), "",
              tables.format_table(tables.comparison_cells(rows, all_columns=True), markdown=True),
              "", tables.format_notes(rows, args.baseline, independent=False), sep="\n")
        return
    runs = [run for run in runs if run["name"] in NAMES]
    if len(losses_by_seed(runs)) < 3:
        raise UserError(f"the model needs three seeds or more of runs named {', '.join(NAMES)}")
    print(format_noise(runs))


if __name__ == "__main__":
    run_script(main)
