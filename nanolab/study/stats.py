"""Statistics: numbers in, numbers out. Which runs the numbers come from is study.py's business.

Losses come as {seeds: loss}. Seeds are a tuple: first the seed of the initial weights, then those
of the training loop. scipy loads scipy.stats at its first use, so importing this file is cheap.
"""

import math

import numpy as np
import scipy


def difference(ours, theirs):
    """The difference of two mean losses: a dict with its standard error and degrees of freedom.

    `compared` says how. Over two common seeds or more, seeds are paired; if both sides have the
    same seeds, that is the paired t-test. Unpaired, it is Welch's test, or, if a side has one or
    two runs, Student's, which takes both sides to have one spread. `mixed_model` allows for seeds
    that cross (one set of initial weights with several loops) or are common in part. Without a
    spread there is no test: p is None.
    """
    gaps = {seeds: loss - theirs[seeds] for seeds, loss in ours.items() if seeds in theirs}
    n_ours, n_theirs, n_common = len(ours), len(theirs), len(gaps)
    losses, side = [*ours.values(), *theirs.values()], [0] * n_ours + [1] * n_theirs
    result = {"difference": float(np.mean(losses[:n_ours]) - np.mean(losses[n_ours:])), "p": None}
    if n_common == 1:
        [result["same_seed"]] = gaps.values()
    if gaps and not any(gaps.values()):
        return {**result, "difference": 0.0, "compared": f"identical, {n_common}"}
    if n_ours == n_theirs == 1:
        return {**result, "compared": "one run each"}

    if n_common > 1 and ours.keys() == theirs.keys():
        compared = f"paired, {n_common}"
        mean, error, df = mean_loss(gaps)
    elif n_common > 1:
        compared = f"partly paired, {n_common}"
        wider = int(sample_sd([*theirs.values()]) > sample_sd([*ours.values()]))
        model = mixed_model(losses, [*ours, *theirs], side, wider)
        mean, error, df = estimate(model, best_weights(model))
    elif min(n_ours, n_theirs) > 2:
        compared, mean = "unpaired", result["difference"]
        (_, error_1, df_1), (_, error_2, df_2) = mean_loss(ours), mean_loss(theirs)
        error, df = add_error(error_1, df_1, error_2, df_2)
    else:
        compared = "unpaired, one run" if 1 in (n_ours, n_theirs) else "unpaired, two runs"
        seeds = [((i, first), i, *rest) for i, (first, *rest) in zip(side, [*ours, *theirs])]
        model = mixed_model(losses, seeds, side)
        mean, error, df = estimate(model, [1 / n_ours] * n_ours + [-1 / n_theirs] * n_theirs)
    result.update(difference=float(mean), compared=compared)
    if error <= 1e-12 * max(map(abs, losses)):
        return {**result, "compared": f"{compared}, no spread"}
    p = 2 * scipy.stats.t.sf(abs(mean) / error, df)
    return {**result, "error": float(error), "df": float(df), "p": float(p)}


def bootstrap_error(values, weights):
    """The standard error of the weighted mean of two values or more, drawn with their weights."""
    return float(scipy.stats.bootstrap(
        (np.multiply(values, weights), weights), paired=True, vectorized=True, n_resamples=2000,
        statistic=lambda sums, weights, axis: sums.sum(axis) / weights.sum(axis),
        method="percentile", rng=0).standard_error)


def add_error(error, df, other, other_df):
    """Adds an independent error. -> the standard error of both, and Satterthwaite's degrees of
    freedom."""
    both = math.hypot(error, other)
    return both, both ** 4 / (error ** 4 / df + other ** 4 / other_df) if both else 1


def detectable(error, df, level):
    """The effect that a two-sided t-test at this level shows in 80 % of studies."""
    critical = scipy.stats.t.ppf(1 - level / 2, df)

    def missed(effect):
        return scipy.stats.nct.cdf(critical, df, effect) - 0.2
    return error * scipy.optimize.brentq(missed, critical / 2, 3 * critical + 3)


def seeds_to_show(effect, error, n, level):
    """How many paired seeds would show this effect in 80 % of studies, with the spread that n seeds
    had. None: more than 100."""
    return next((more for more in range(n + 1, 101)
                 if detectable(error * math.sqrt(n / more), more - 1, level) <= abs(effect)), None)


def mixed_model(losses, seeds, side=None, wider=None):
    """loss = mean of its side + effect of the weights' seed + effect of the loop's seed + the rest.

    The variances of the three effects are estimated by REML. -> a dict. An effect that the seeds
    cannot separate from the rest, or that they do not vary, has the variance None. wider: the side
    whose rest may vary more than the other's.
    """
    n = len(losses)
    side = np.zeros(n, int) if side is None else np.array(side)
    means = np.eye(side.max() + 1)[side]  # (n, sides)
    shared = {"rest": np.eye(n)}  # 1 where two runs have an effect in common
    centre = np.eye(n) - means @ np.linalg.pinv(means)
    for effect, matrix in (("weights", [[a[0] == b[0] for b in seeds] for a in seeds]),
                           ("loop", [[a[1:] == b[1:] for b in seeds] for a in seeds]),
                           ("wider", np.diag(side == wider))):
        candidate = {**shared, effect: np.array(matrix, float)}
        projected = [(centre @ each @ centre).ravel() for each in candidate.values()]
        if np.linalg.matrix_rank(projected) == len(candidate):  # it can be told from the others
            shared = candidate
    matrices, y = list(shared.values()), centre @ losses

    def at(logs):
        """For variances expm1(logs) times that of the rest: the fit, and what it gives."""
        ratios = [1, *np.expm1(logs)]
        covariance = np.tensordot(ratios, matrices, 1)
        inverse = np.linalg.inv(covariance)
        information = means.T @ inverse @ means
        projection = inverse - inverse @ means @ np.linalg.solve(information, means.T @ inverse)
        rest = max(y @ projection @ y, 1e-30) / (n - means.shape[1])
        deviance = ((n - means.shape[1]) * math.log(rest) + np.linalg.slogdet(covariance)[1]
                    + np.linalg.slogdet(information)[1])
        gradient = [math.exp(log) * (np.sum(projection * matrix)
                                     - y @ projection @ matrix @ projection @ y / rest)
                    for log, matrix in zip(logs, matrices[1:])]
        return deviance, np.array(gradient), inverse, projection, rest

    logs = []
    if len(matrices) > 1:  # from two starting points, for there may be two maxima
        fits = [scipy.optimize.minimize(lambda x: at(x)[:2], [start] * (len(matrices) - 1),
                                        jac=True, bounds=[(0, 16)] * (len(matrices) - 1))
                for start in (0.1, 2)]
        logs = min(fits, key=lambda fit: fit.fun).x
    _, _, inverse, projection, rest = at(logs)
    variances = rest * np.array([1, *np.expm1(logs)])
    found = dict(zip(shared, map(float, variances)))
    return {"losses": np.array(losses), "means": means, "matrices": matrices,
            "inverse": inverse / rest, "projection": projection / rest, "variances": variances,
            **{effect: found.get(effect) for effect in ("weights", "loop", "rest")}}


def estimate(model, weights, n_new_runs=0):
    """The weighted sum of a model's losses, its standard error, its degrees of freedom.

    n_new_runs=1 adds the variance of one run with seeds of its own. Degrees of freedom:
    Satterthwaite's, from the information in the losses about the variances.
    """
    weights = np.array(weights)
    gradient = np.array([weights @ matrix @ weights for matrix in model["matrices"]]) + n_new_runs
    variance = gradient @ model["variances"]
    projected = [model["projection"] @ matrix for matrix in model["matrices"]]
    information = np.array([[np.sum(a * b.T) for b in projected] for a in projected]) / 2
    df = 2 * variance ** 2 / (gradient @ np.linalg.solve(information, gradient))
    return float(weights @ model["losses"]), math.sqrt(variance), max(1.0, float(df))


def best_weights(model):
    """The weights of the generalised least-squares difference of a model's two sides."""
    half = model["inverse"] @ model["means"]
    return half @ np.linalg.solve(model["means"].T @ half, [1, -1])


def mean_loss(losses, n_new_runs=0):
    """The mean of two losses (or gaps) or more, its standard error and degrees of freedom."""
    values = list(losses.values())
    if not np.ptp(values):
        return values[0], 0.0, len(values) - 1
    model = mixed_model(values, list(losses))
    return estimate(model, [1 / len(values)] * len(values), n_new_runs)


def mean_interval(losses):
    """The 95 % interval of the mean of two losses or more."""
    return t_interval(*mean_loss(losses))


def prediction_interval(losses):
    """Where one more run, with seeds of its own, would fall, 95 times in 100."""
    return t_interval(*mean_loss(losses, n_new_runs=1))


def t_interval(mean, error, df, level=0.05):
    half = scipy.stats.t.ppf(1 - level / 2, df) * error
    return [mean - half, mean + half]


def spread(losses):
    """The mean, the standard deviations and the range of two values or more."""
    return {"n": len(losses), "mean": float(np.mean(losses)), "sd": sample_sd(losses),
            "population_sd": float(np.std(losses)), "lowest": min(losses), "highest": max(losses),
            "losses": losses}


def sd_interval(losses):
    """The 95 % interval of the standard deviation of independent, normally distributed values."""
    n = len(losses)
    return [sample_sd(losses) * math.sqrt((n - 1) / scipy.stats.chi2.ppf(p, n - 1))
            for p in (0.975, 0.025)]


def sample_sd(values):
    """The standard deviation with n - 1, or None for a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def fit_batch_size(sizes, losses):
    """Least squares of loss = a ln(B)^2 + b ln(B) + c over the global batch size B, as in part 29.

    -> a dict. If a is not positive, the curve has no lowest point: optimum and predicted, the loss
    there, are None. Three runs fit three coefficients exactly: covariance and intervals are None.
    optimum_interval is also None if the runs do not bound the optimum.
    """
    x, df, covariance = np.log(sizes), len(sizes) - 3, None
    if df:
        (a, b, c), covariance = np.polyfit(x, losses, 2, cov=True)
    else:
        a, b, c = np.polyfit(x, losses, 2)
    fit = {"a": a, "b": b, "c": c, "n": len(sizes), "df": df, "covariance": covariance,
           "optimum": None, "optimum_interval": None, "predicted": None, "predicted_interval": None}
    if a > 0:
        lowest = -b / (2 * a)  # ln of the optimum
        fit.update(optimum=exp(lowest), predicted=np.polyval((a, b, c), lowest))
        if df:
            fit["optimum_interval"] = optimum_interval(fit)
            fit["predicted_interval"] = curve_interval(fit, lowest)
    return fit


def optimum_interval(fit):
    """Fieller's interval: the sizes at which the curve's slope, 2 a ln(B) + b, may be 0.

    None if the fit does not bound them, because a may be 0.
    """
    a, b, v, t = fit["a"], fit["b"], fit["covariance"], scipy.stats.t.ppf(0.975, fit["df"])
    quadratic = (4 * (a ** 2 - t ** 2 * v[0, 0]), 4 * (a * b - t ** 2 * v[0, 1]),
                 b ** 2 - t ** 2 * v[1, 1])
    return [exp(end) for end in sorted(np.roots(quadratic).real)] if quadratic[0] > 0 else None


def curve_interval(fit, x):
    """The interval of the fitted curve at x = ln(B), a number or an array: [low, high]."""
    powers = np.array([x ** 2, x, np.ones_like(x)])
    variance = np.einsum("i...,ij,j...", powers, fit["covariance"], powers)
    return t_interval(curve(fit, x), np.sqrt(variance), fit["df"])


def curve(fit, x):
    return np.polyval((fit["a"], fit["b"], fit["c"]), x)


def exp(x):
    return math.exp(min(x, 700))  # beyond that it overflows
