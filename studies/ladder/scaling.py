"""Scaling: how fast the loss falls with a model's size, and what that predicts of a larger one.

A ladder is recipes (runs of one name) at several sizes, where tokens grow with parameters. A size
is a shape, n_layer x n_embd. It counts as many parameters as the largest model of that shape has:
recipes differ by a few per cent, in their position embeddings for instance.
"""

import math

import numpy as np
import scipy

from nanolab import stats, study
from nanolab.common import UserError

N_SAMPLES = 1000  # of the bootstrap


def analyse(runs, baseline, target=None):
    """The ladder of each recipe, its power law, and its token share against the baseline's.

    target: a number of parameters whose loss to predict. None: the largest size, which the laws
    then leave out, so that its losses test them. -> a dict. Raises UserError.
    """
    cells = collect_cells(runs)  # {(name, parameters, tokens): runs}
    names = sorted({name for name, _, _ in cells})
    if baseline not in names:
        raise UserError(f"--scaling compares with a recipe named --baseline; there are "
                        f"{', '.join(names)}")
    budgets = {}  # of each size: the most tokens that the baseline has
    for name, size, tokens in cells:
        if name == baseline:
            budgets[size] = max(tokens, budgets.get(size, 0))
    sizes = sorted(budgets)
    largest = target or sizes[-1]
    fitted = [size for size in sizes if size < largest]
    if len(fitted) < 4:
        raise UserError(f"a power law has three unknowns, so it needs at least 4 sizes below the "
                        f"one it predicts; {baseline} has {len(fitted)} below {largest:,}")
    same_text = sample_means(cells, other_text=False)
    samples = sample_means(cells, other_text=True)
    recipes, shares = [], []
    for name in names:
        full = {size: (name, size, budgets[size]) for size in sizes
                if (name, size, budgets[size]) in cells}
        if set(fitted) <= full.keys():
            recipes.append(fit_recipe(name, full, fitted, largest, cells, same_text))
        if name != baseline:
            shares += token_shares(name, baseline, budgets, cells, samples)
    slopes = trends(shares)
    for row in shares:
        del row["samples"]
    return {"baseline": baseline, "fitted": fitted, "target": largest, "recipes": recipes,
            "without_law": sorted({*names} - {recipe["name"] for recipe in recipes}),
            "shares": shares, "trends": slopes}


def collect_cells(runs):
    """-> {(name, parameters of the size, training tokens): runs}. Raises UserError."""
    for run in runs:
        if not (run.get("parameters") and run.get("trained_tokens")):
            raise UserError("--scaling needs each run's parameters and trained_tokens, as eval.py "
                            f"--json writes them; {run['name']} lacks them")
    largest = {}
    for run in runs:
        largest[shape(run)] = max(run["parameters"], largest.get(shape(run), 0))
    cells = {}
    for run in runs:
        key = run["name"], largest[shape(run)], run["trained_tokens"]
        cells.setdefault(key, []).append(run)
    for (name, size, tokens), members in cells.items():
        if len({study.relevant_options(run) for run in members}) > 1:
            raise UserError(f"the runs of {name} with {size:,} parameters and {tokens:,} tokens "
                            "differ in their options, so they are not one recipe; --ckpt must name "
                            "those of one recipe only, or they need names of their own")
    return cells


def shape(run):
    options = study.settings(run)
    return options["n_layer"], options["n_embd"]


def mean(runs):
    return float(np.mean(list(study.by_seed(runs).values())))


def sample_means(cells, other_text):
    """N_SAMPLES draws of each cell's mean loss: {cell: array}.

    The noise of the seeds is Student's, with the standard deviation that the recipe's cells have in
    common and its degrees of freedom. other_text: test documents are drawn anew too, the same for
    all cells. Raises UserError if no cell of a recipe has two seeds.
    """
    rng = np.random.default_rng(0)
    means = {cell: np.full(N_SAMPLES, mean(runs)) for cell, runs in cells.items()}
    _, sizes = study.group_losses([run for runs in cells.values() for run in runs])
    if other_text and sizes:  # results of before have no losses of groups
        drawn = rng.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), N_SAMPLES)
        weights = drawn * sizes / (drawn @ sizes)[:, None]  # (N_SAMPLES, groups)
        means = {cell: weights @ study.group_losses(runs)[0] for cell, runs in cells.items()}
    for name in sorted({name for name, *_ in cells}):
        mine = {cell: list(study.by_seed(runs).values()) for cell, runs in cells.items()
                if cell[0] == name}
        df = sum(len(losses) - 1 for losses in mine.values())
        if not df:
            raise UserError(f"nothing shows the noise of {name}: at one size or more it needs two "
                            "runs with different seeds")
        squares = sum(np.var(losses) * len(losses) for losses in mine.values())
        sd = np.sqrt(squares / rng.chisquare(df, N_SAMPLES))  # as far as df tell it
        for cell, losses in mine.items():
            means[cell] = means[cell] + sd / len(losses) ** 0.5 * rng.standard_normal(N_SAMPLES)
    return means


def fit_recipe(name, full, fitted, target, cells, samples):
    """The power law of one recipe over the fitted sizes, and what it predicts for the target."""
    losses = [mean(cells[full[size]]) for size in fitted]
    law = fit_power_law(fitted, losses)
    laws = []
    for draw in np.array([samples[full[size]] for size in fitted]).T:
        try:
            laws.append(fit_power_law(fitted, draw, law))
        except UserError:  # losses that no law fits: see interval()
            laws.append(dict.fromkeys(law, math.nan))
    predictions = np.array([loss_at(each, target) for each in laws])
    result = {"name": name, "law": law, "predicted": loss_at(law, target),
              "law_intervals": {key: interval([each[key] for each in laws])
                                for key in ("floor", "gain", "exponent")},
              "losses": [{"parameters": size, "tokens": cell[2], "loss": mean(cells[cell]),
                          "n": len(study.by_seed(cells[cell]))} for size, cell in full.items()]}
    if target in full:  # the noise of its own seeds is part of the interval
        result["measured"] = mean(cells[full[target]])
        predictions = predictions + samples[full[target]] - result["measured"]
    result["predicted_interval"] = interval(predictions)
    return result


def fit_power_law(sizes, losses, start=None):
    """Least squares of loss = floor + gain (N / N of the smallest size)^-exponent. -> a dict"""
    x = np.array(sizes) / sizes[0]
    low, high = min(losses), max(losses)
    start = start or {"floor": 0.5 * low, "gain": high - 0.5 * low, "exponent": 0.3}
    bounds = [0, 0, 0.01], [low, 10 * high, 3]
    try:
        (floor, gain, exponent), _ = scipy.optimize.curve_fit(
            lambda x, floor, gain, exponent: floor + gain * x ** -exponent, x, losses,
            np.clip([start[key] for key in ("floor", "gain", "exponent")], *bounds), bounds=bounds)
    except (RuntimeError, ValueError):  # no convergence; a loss or a size that is not positive
        raise UserError(f"no power law fits the losses {losses} of {sizes} parameters") from None
    return {"floor": float(floor), "gain": float(gain), "exponent": float(exponent),
            "smallest": sizes[0]}


def loss_at(law, size):
    return law["floor"] + law["gain"] * (size / law["smallest"]) ** -law["exponent"]


def token_shares(name, baseline, budgets, cells, samples):
    """At each size where the recipe has two budgets or more: the share of the baseline's tokens
    with which it reaches the baseline's loss, by a line through its losses over ln(tokens)."""
    rows = []
    for size, budget in sorted(budgets.items()):
        tokens = sorted(t for other, n, t in cells if (other, n) == (name, size))
        if len(tokens) < 2:
            continue
        x = np.log(np.array(tokens) / budget)
        mine, theirs = [(name, size, t) for t in tokens], (baseline, size, budget)
        found = crossing(x, [mean(cells[cell]) for cell in mine], mean(cells[theirs]))
        if math.isnan(found):
            continue
        sampled = np.array([crossing(x, losses, target) for losses, target in
                            zip(np.array([samples[cell] for cell in mine]).T, samples[theirs])])
        limits = interval(sampled)
        rows.append({"name": name, "parameters": size, "share": stats.exp(found),
                     "interval": limits and [*map(stats.exp, limits)],
                     "beyond": bool(not x[0] <= found <= x[-1]), "samples": sampled})
    return rows


def crossing(x, losses, target):
    """Where the line through the points is at the target; beyond them, on its first or last part.
    NaN if the losses do not fall there."""
    i = int(np.clip(np.searchsorted(-np.array(losses), -target), 1, len(x) - 1))
    slope = (losses[i] - losses[i - 1]) / (x[i] - x[i - 1])
    return x[i] + (target - losses[i]) / slope if slope < 0 else math.nan


def trends(shares):
    """Of each recipe with shares at three sizes or more: the exponent b of share ~ N^b."""
    found = {}
    for name in sorted({row["name"] for row in shares}):
        rows = [row for row in shares if row["name"] == name]
        if len(rows) > 2:
            x = np.log([row["parameters"] for row in rows])
            exponent, _ = np.polyfit(x, np.log([row["share"] for row in rows]), 1)
            samples, _ = np.polyfit(x, [row["samples"] for row in rows], 1)
            found[name] = {"exponent": float(exponent), "interval": interval(samples)}
    return found


def interval(samples):
    """The middle 95 %; None, without an end, if more than the outer 5 % are not numbers."""
    if np.isnan(samples).mean() > 0.05:
        return None
    return np.nanquantile(samples, (0.025, 0.975)).tolist()
