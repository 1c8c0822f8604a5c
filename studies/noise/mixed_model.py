"""Where the noise of a study comes from: the seed of the initial weights, or those of the loop.

    python -m studies.noise.mixed_model RESULTS.json      # its runs called baseline

Each loss is taken for a mean, plus an effect of the seed of the initial weights, one of the seeds
of the training loop (data order, dropout), and a rest. REML estimates their three variances from
all runs at once. `difference` compares two experiments by such a model, for runs that share seeds
with each other and so are not independent.
"""

import math

import numpy as np
from scipy.linalg import null_space
from scipy.optimize import minimize
from scipy.special import chdtri, stdtr

from nanolab.common import argument_parser, run_script
from nanolab.study import stats
from nanolab.study.runs import SEEDS, losses_by_seed, read_file, settings
from nanolab.study.tables import format_interval, format_table

EFFECTS = {"weights": "initial weights", "loop": "loop", "rest": "rest"}


def mixed_model(losses, seeds, side=None):
    """Fits loss = mean of its side + effect of weights' seed + effect of loop's seeds + rest.

    losses: n of them. seeds: n tuples, first the weights' seed. side: n of 0 or 1. -> a dict. An
    effect that the seeds do not vary, or cannot tell from the rest, has the variance None.
    """
    n = len(losses)
    side = np.zeros(n, int) if side is None else np.array(side)
    means = np.eye(side.max() + 1)[side]  # (n, sides)
    contrasts = null_space(means.T).T  # (n - sides, n): what the means cannot change
    y = contrasts @ losses
    shared = {"rest": np.eye(n)}  # 1 where two runs have an effect in common
    projected = [np.eye(len(contrasts))]
    for effect, matrix in (("weights", [[a[0] == b[0] for b in seeds] for a in seeds]),
                           ("loop", [[a[1:] == b[1:] for b in seeds] for a in seeds])):
        candidates = [*projected, contrasts @ matrix @ contrasts.T]
        if np.linalg.matrix_rank([each.ravel() for each in candidates]) == len(candidates):
            shared[effect], projected = np.array(matrix, float), candidates
    matrices = list(shared.values())

    def fit(logs):
        """For variances expm1(logs) times that of the rest: REML's deviance, and the rest."""
        covariance = np.tensordot([1, *np.expm1(logs)], projected, 1)
        rest = max(y @ np.linalg.solve(covariance, y), 1e-30) / len(y)
        return len(y) * math.log(rest) + np.linalg.slogdet(covariance)[1], rest

    logs = []
    if len(matrices) > 1:  # from two starting points, for there may be two minima
        fits = [minimize(lambda x: fit(x)[0], [start] * (len(matrices) - 1),
                         bounds=[(0, 16)] * (len(matrices) - 1)) for start in (0.1, 2)]
        logs = min(fits, key=lambda each: each.fun).x
    variances = fit(logs)[1] * np.array([1, *np.expm1(logs)])
    inverse = np.linalg.inv(np.tensordot(variances, projected, 1))
    found = dict(zip(shared, map(float, variances)))
    return {"losses": np.array(losses), "matrices": matrices, "variances": variances,
            "projection": contrasts.T @ inverse @ contrasts,
            **{effect: found.get(effect) for effect in EFFECTS}}


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
    p = 2 * float(stdtr(df, -abs(result["difference"]) / error))
    return {**result, "error": error, "df": df, "p": p}


def sources_of_noise(runs):
    """The losses of one experiment by what its seeds vary: {source: losses}. A run may count in
    several."""
    losses = losses_by_seed(runs)
    one_seed = {tuple(options[key] for key in SEEDS) for options in map(settings, runs)
                if len({options[key] for key in ("seed", *SEEDS)}) == 1}
    same_weights, same_loop = {}, {}
    for seeds in losses:
        same_weights.setdefault(seeds[0], []).append(seeds)
        same_loop.setdefault(seeds[1:], []).append(seeds)
    chosen = {"both, by one seed": [seeds for seeds in losses if seeds in one_seed],
              "the loop, with the same initial weights": max(same_weights.values(), key=len),
              "initial weights, with the same loop": max(same_loop.values(), key=len)}
    return {source: [losses[seeds] for seeds in members] for source, members in chosen.items()
            if len(members) > 1}


def sd_interval(losses):
    """The 95 % interval of the standard deviation of independent, normally distributed values."""
    n = len(losses)
    return [np.std(losses, ddof=1) * math.sqrt((n - 1) / chdtri(n - 1, p)) for p in (0.025, 0.975)]


def format_noise(runs):
    losses, rows = losses_by_seed(runs), [["varies", "n", "mean", "SD", "95 % interval"]]
    for source, values in sources_of_noise(runs).items():
        rows.append([source, str(len(values)), f"{np.mean(values):.6f}",
                     f"{np.std(values, ddof=1):.6f}", format_interval(sd_interval(values), ".4f")])
    model = mixed_model(list(losses.values()), list(losses))
    sds = [f"{name} {math.sqrt(model[effect]):.4f}" if model[effect] is not None else
           f"{name} not varied, or part of the rest" for effect, name in EFFECTS.items()]
    mean, one_more = (format_interval(stats.t_interval(*mean_loss(losses, n_new)), ".4f")
                      for n_new in (0, 1))
    return (f"{format_table(rows, markdown=True)}\n\n"
            f"SD by the mixed model of all {len(losses)} runs: {', '.join(sds)}. "
            f"Mean {np.mean(list(losses.values())):.6f} (95 % interval {mean}); "
            f"one more run falls between {one_more.replace('to', 'and')}, 95 times in 100.")


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("results", metavar="RESULTS.json")
    runs = read_file(parser.parse_args().results)
    print(format_noise([run for run in runs if run["name"] == "baseline"]))


if __name__ == "__main__":
    run_script(main)
