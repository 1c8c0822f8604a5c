"""Statistics of losses: numbers in, numbers out.

Losses come as {seeds: loss}. The tests compare with scipy.stats, which takes a second to import;
scipy.special takes less, and is imported by its first use.
"""

import math

import numpy as np
import scipy


def compare_means(ours, theirs):
    """The difference of two mean losses: a dict with its standard error and degrees of freedom.

    `compared` says how. Over two common seeds or more it is the paired t-test, and runs with other
    seeds are left out. Otherwise it is Welch's test; or, if a side has one or two runs, whose
    variance says too little (with 2 against 7, Welch's 5 % are 8 %), Student's, with one variance
    for both. Without a spread, there is no error, and p is None.
    """
    gaps = [loss - theirs[seeds] for seeds, loss in ours.items() if seeds in theirs]
    a, b = list(ours.values()), list(theirs.values())
    result = {"difference": float(np.mean(a) - np.mean(b)), "p": None, "gaps": gaps}
    if gaps and not any(gaps):
        return {**result, "difference": 0.0, "compared": "equal to the last bit"}
    if len(gaps) > 1:
        left_out = f" of {max(len(a), len(b))}" if len(gaps) < max(len(a), len(b)) else ""
        result.update(difference=float(np.mean(gaps)), compared=f"paired, {len(gaps)}{left_out}")
        error, df = standard_error(gaps), len(gaps) - 1
    elif len(a) == len(b) == 1:
        return {**result, "compared": "one run each"}
    elif min(len(a), len(b)) < 3:
        result["compared"] = f"unpaired, {'one run' if 1 in (len(a), len(b)) else 'two runs'}"
        df = len(a) + len(b) - 2
        variance = (np.var(a) * len(a) + np.var(b) * len(b)) / df
        error = math.sqrt(variance * (1 / len(a) + 1 / len(b)))
    else:
        result["compared"] = "unpaired"
        errors = np.array([standard_error(a), standard_error(b)])
        error = math.hypot(*errors)
        df = error ** 4 / sum(errors ** 4 / [len(a) - 1, len(b) - 1]) if error else 1
    if error <= 1e-12 * max(map(abs, a + b)):
        return {**result, "compared": f"{result['compared']}, no spread"}
    p = 2 * scipy.special.stdtr(df, -abs(result["difference"]) / error)
    return {**result, "error": float(error), "df": df, "p": float(p)}


def standard_error(values):
    return float(np.std(values, ddof=1)) / math.sqrt(len(values))


def t_interval(mean, error, df, level=0.05):
    half = float(scipy.special.stdtrit(df, 1 - level / 2)) * error
    return [mean - half, mean + half]


def prediction_interval(values):
    """Where one more value would fall, 95 times in 100."""
    error = float(np.std(values, ddof=1)) * math.sqrt(1 + 1 / len(values))
    return t_interval(float(np.mean(values)), error, len(values) - 1)


def sample_sd(values):
    """The standard deviation with n - 1; None for a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def detectable(error, df, level):
    """The minimum detectable effect: a two-sided t-test at this level shows it in 80 % of
    studies."""
    t = scipy.special.stdtrit(df, 1 - level / 2)
    return error * float(scipy.special.nctdtrinc(df, 0.2, t))


def seeds_to_show(effect, error, n, level):
    """How many paired seeds would show this effect in 80 % of studies, with the spread that n
    seeds had. None: more than 100."""
    return next((more for more in range(n + 1, 101)
                 if detectable(error * math.sqrt(n / more), more - 1, level) <= abs(effect)), None)


def weighted_error(values, weights):
    """The standard error of a weighted mean, such as that of a test loss from the choice of the
    documents; None of a single value."""
    n, shares = len(values), np.array(weights) / np.sum(weights)
    deviations = shares * np.subtract(values, shares @ values)
    return math.sqrt(deviations @ deviations * n / (n - 1)) if n > 1 else None
