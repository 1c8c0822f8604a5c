"""Statistics: numbers in, numbers out. Which runs the numbers come from is study.py's business.

All intervals are 95 %. scipy loads scipy.stats at its first use, so importing this file is cheap.
"""

import math
import warnings

import numpy as np
import scipy


def difference(ours, theirs, paired):
    """The difference of two means, with the interval and the p-value of a t-test, as a dict.

    paired: ours[i] belongs to theirs[i]. If not, Welch's test, which does not assume equal
    variances. If one side is a single value, Student's, which uses the other side's variance.
    """
    mean = float(np.mean(ours) - np.mean(theirs))
    if len(ours) == len(theirs) == 1:
        return {"difference": mean, "compared": "one run each", "p": None}
    with warnings.catch_warnings(action="ignore"):  # if the values have no spread
        if paired:
            compared = f"paired, {len(ours)}"
            test = scipy.stats.ttest_rel(ours, theirs)
        elif min(len(ours), len(theirs)) > 1:
            compared = "unpaired"
            test = scipy.stats.ttest_ind(ours, theirs, equal_var=False)
        else:
            compared = "unpaired, one run"
            test = scipy.stats.ttest_ind(ours, theirs, equal_var=True)
    low, high = map(float, test.confidence_interval(0.95))
    p = 1.0 if math.isnan(test.pvalue) else float(test.pvalue)  # NaN: no difference, no spread
    return {"difference": mean, "low": low, "high": high, "compared": compared, "p": p}


def holm(p_values):
    """p-values corrected for their number (Holm, 1979), in the order given."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values, stable=True)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def spread(losses):
    """The mean, the standard deviations and the range of two values or more."""
    sd, n = sample_sd(losses), len(losses)
    chi2 = scipy.stats.chi2.ppf((0.975, 0.025), n - 1)
    return {"n": n, "mean": float(np.mean(losses)), "sd": sd,
            "sd_interval": [sd * math.sqrt((n - 1) / x) for x in chi2],  # of a normal population's
            "population_sd": float(np.std(losses)), "lowest": min(losses), "highest": max(losses),
            "losses": losses}


def sample_sd(values):
    """The standard deviation with n - 1, or None for a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def levene_test(groups):
    """Do the groups differ in spread? Levene's test with medians (Brown and Forsythe, 1974)."""
    with warnings.catch_warnings(action="ignore"):  # if the values have no spread
        f, p = scipy.stats.levene(*groups, center="median")
    if not math.isfinite(f):
        f, p = 0.0, 1.0
    df = [len(groups) - 1, sum(map(len, groups)) - len(groups)]
    return {"f": float(f), "df": df, "p": float(p)}


def variance_f_test(ours, theirs):
    """The two-sided F test of equal variances."""
    f, df = (sample_sd(ours) / sample_sd(theirs)) ** 2, [len(ours) - 1, len(theirs) - 1]
    above, below = scipy.stats.f.sf(f, *df), scipy.stats.f.cdf(f, *df)
    return {"f": f, "df": df, "p": float(2 * min(above, below))}


def mean_interval(values):
    """The interval of the mean of two values or more."""
    n = len(values)
    return t_interval(np.mean(values), sample_sd(values) / math.sqrt(n), n - 1)


def prediction_interval(values):
    """Where one more value would fall, 95 times in 100."""
    n = len(values)
    return t_interval(np.mean(values), sample_sd(values) * math.sqrt(1 + 1 / n), n - 1)


def t_interval(estimate, standard_error, df):
    half = scipy.stats.t.ppf(0.975, df) * standard_error
    return [estimate - half, estimate + half]


def fit_batch_size(sizes, losses):
    """Least squares of loss = a ln(B)^2 + b ln(B) + c over the global batch size B, as in part 29.

    -> a dict. If a is not positive, the curve has no lowest point: optimum and predicted, the loss
    there, are None. Three runs fit three coefficients exactly: covariance and intervals are None.
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
            gradient = np.array([-lowest / a, -1 / (2 * a), 0])  # of `lowest`: the delta method
            error = math.sqrt(gradient @ covariance @ gradient)
            fit["optimum_interval"] = [exp(end) for end in t_interval(lowest, error, df)]
            fit["predicted_interval"] = curve_interval(fit, lowest)
    return fit


def curve_interval(fit, x):
    """The interval of the fitted curve at x = ln(B), a number or an array: [low, high]."""
    powers = np.array([x ** 2, x, np.ones_like(x)])
    variance = np.einsum("i...,ij,j...", powers, fit["covariance"], powers)
    return t_interval(curve(fit, x), np.sqrt(variance), fit["df"])


def curve(fit, x):
    return np.polyval((fit["a"], fit["b"], fit["c"]), x)


def exp(x):
    return math.exp(min(x, 700))  # beyond that it overflows
