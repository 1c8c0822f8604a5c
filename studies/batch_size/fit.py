"""The best global batch: a parabola over its logarithm, as in part 29 of the published study.

    python -m studies.batch_size.fit studies/published/results.json batch_size

The arguments are a results file and, if not all of it is meant, the names of runs. The optimum's
interval is Fieller's: the sizes at which the slope of the curve may be 0.
"""

import math
import sys

import numpy as np
from scipy.special import stdtrit

from nanolab.common import UserError, run_script
from nanolab.study.runs import read_file, settings
from nanolab.study.stats import t_interval
from nanolab.study.tables import format_interval


def fit_batch_size(sizes, losses):
    """Least squares of loss = a ln(B)^2 + b ln(B) + c over the global batch size B.

    -> a dict. optimum is None if the curve has no lowest point; its interval, if the runs do not
    bound it. Raises UserError for less than four runs of three sizes.
    """
    if len(set(sizes)) < 3 or len(sizes) < 4:
        raise UserError("the fit needs at least four runs of three global batch sizes")
    (a, b, c), covariance = np.polyfit(np.log(sizes), losses, 2, cov=True)
    t = stdtrit(len(sizes) - 3, 0.975)
    quadratic = (4 * (a ** 2 - t ** 2 * covariance[0, 0]),
                 4 * (a * b - t ** 2 * covariance[0, 1]), b ** 2 - t ** 2 * covariance[1, 1])
    is_bounded, ends = a > 0 and quadratic[0] > 0, sorted(np.roots(quadratic).real)
    return {"coefficients": (a, b, c), "covariance": covariance, "df": len(sizes) - 3,
            "optimum": math.exp(min(-b / (2 * a), 700)) if a > 0 else None,
            "optimum_interval": np.exp(ends).tolist() if is_bounded else None}


def points(path, *names):
    """-> global batch sizes and losses of the runs of these names, or of all"""
    found = [(settings(run)["global_batch_size"], run["test_loss"])
             for run in read_file(path, "test_loss") if not names or run["name"] in names]
    return np.array(sorted(found), float).reshape(-1, 2).T


def format_fit(fit, sizes):
    a, b, c = fit["coefficients"]
    start = (f"{len(sizes)} runs, global batch {min(sizes):g} to {max(sizes):g}: loss = "
             f"{a:.7f} ln(B)^2 {b:+.7f} ln(B) {c:+.7f}.")
    if fit["optimum"] is None or not min(sizes) <= fit["optimum"] <= max(sizes):
        return f"{start} It has no lowest point between these sizes."
    x = math.log(fit["optimum"])
    at = np.array([x ** 2, x, 1])
    loss, error = at @ fit["coefficients"], math.sqrt(at @ fit["covariance"] @ at)
    at_optimum = format_interval(t_interval(loss, error, fit["df"]), ".3f")
    ends = format_interval(fit["optimum_interval"], ".1f") or "without an end"
    return (f"{start} Optimum {fit['optimum']:.1f} (95 % interval, Fieller's: {ends}); loss there "
            f"{loss:.3f} ({at_optimum}).")


def main():
    if len(sys.argv) < 2:
        raise UserError("name a results file", exit_code=2)
    sizes, losses = points(*sys.argv[1:])
    print(format_fit(fit_batch_size(sizes, losses), sizes))


if __name__ == "__main__":
    run_script(main)
