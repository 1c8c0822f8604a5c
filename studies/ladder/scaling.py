"""How fast the loss falls with a model's size, what that predicts of a larger one, and with which
fraction of another recipe's tokens a recipe reaches its loss.

    python -m studies.ladder.scaling FILE.json ... [--target N] [--against NAME ...] [--validation]

A ladder is recipes (runs of one name) at several sizes, where tokens grow with parameters. A size
is a shape, n_layer x n_embd. It counts as many parameters as the largest model of that shape has:
recipes differ by a few per cent, in their position embeddings for one. Each recipe has a power law
over the smaller sizes, which predicts the largest; where these are fewer than four, there is none.
"""

import math

import numpy as np
from scipy.optimize import minimize_scalar, nnls
from scipy.special import fdtrc

from config import GPTConfig
from model import GPT
from nanolab.common import UserError, argument_parser, run_script
from nanolab.study import stats
from nanolab.study.runs import losses_by_seed, read_file, relevant_options, settings
from nanolab.study.tables import (budget, format_interval, format_number, format_p, format_table,
                                  mean_group_losses)

N_SAMPLES = 2000  # of the bootstrap


def analyse(runs, target=None, against=("published", "rope_qk_norm"), loss="test_loss"):
    """The laws of all recipes, and their differences and token fractions to those in `against`.

    target: a number of parameters whose loss to predict. None: the largest size. The laws leave
    its losses out, so that these test them. -> a dict. Raises UserError.
    """
    cells = collect_cells([with_size(run, loss) for run in runs])
    full = {cell[:2]: cell for cell in sorted(cells)}  # (name, size): the one with the most tokens
    sizes = sorted({size for _, size in full})
    target = target or sizes[-1]
    fitted = [size for size in sizes if size < target]
    sds, warnings = noise(cells)
    same_text, samples = (sample_means(cells, sds, with_text)
                          for with_text in (False, loss == "test_loss"))
    recipes = {name: [full[name, size] for size in fitted if (name, size) in full]
               for name, _ in full}
    pairs = [(full[name, size], full[other, size]) for i, other in enumerate(against)
             for name, size in full if name not in against[:i + 1] and (other, size) in full]
    return {"fitted": fitted, "target": target, "warnings": warnings,
            "losses": {cell: values(cells[cell]) for cell in full.values()},
            "laws": [fit_recipe(chosen, full.get((name, target)), target, cells, sds, same_text)
                     for name, chosen in recipes.items()
                     if len(chosen) > 3],  # a law has three unknowns
            "differences": {pair: stats.compare_means(*(losses_by_seed(cells[cell], "loss")
                                                        for cell in pair)) for pair in pairs},
            "fractions": {pair: found for pair in pairs
                          if (found := token_fraction(*pair, cells, samples))}}


def with_size(run, loss):
    """The run with its loss, parameters and tokens; the record of a validation lacks the sizes."""
    options = settings(run)
    step = options["global_batch_size"] * options["block_size"]
    run = {"trained_tokens": -(-budget([run]) // step) * step, **run, "loss": run[loss]}
    if "parameters" not in run:
        run["parameters"] = GPT(GPTConfig.from_options(options)).num_params()
    return run


def collect_cells(runs):
    """-> {(name, parameters of the size, training tokens): runs}. Raises UserError."""
    def shape(run):
        return settings(run)["n_layer"], settings(run)["n_embd"]
    largest, cells = {}, {}
    for run in sorted(runs, key=lambda run: run["parameters"]):
        largest[shape(run)] = run["parameters"]
    for run in runs:
        cell = run["name"], largest[shape(run)], run["trained_tokens"]
        members = cells.setdefault(cell, [])
        members.append(run)
        if relevant_options(run) != relevant_options(members[0]):
            raise UserError(f"the runs of {cell[0]} with {cell[1]:,} parameters and {cell[2]:,} "
                            "tokens differ in their options, so they are not one recipe")
    return cells


def values(runs):
    return np.array(list(losses_by_seed(runs, "loss").values()))


def noise(cells):
    """-> {cell: (SD of one run, its degrees of freedom)}, warnings.

    The cells of a recipe have one SD in common, but for a cell whose own is larger than that of
    the others (F test at 5 %, corrected for the recipe's cells).
    """
    sds, warnings = {}, []
    for recipe in sorted({name for name, *_ in cells}):
        mine = [cell for cell in cells if cell[0] == recipe]
        losses = {cell: values(cells[cell]) for cell in mine}
        squares = {cell: np.array([np.var(each) * len(each), len(each) - 1])
                   for cell, each in losses.items() if len(each) > 1}
        if not squares:
            raise UserError(f"one run of {recipe} in each cell shows no noise: run more seeds")
        total, df = sum(squares.values())
        own = {}
        for cell, (square, own_df) in squares.items():
            others = (total - square) / (df - own_df) if own_df < df else math.inf
            f = square / own_df / others
            if len(squares) * fdtrc(own_df, df - own_df, f) < 0.05:
                own[cell] = sds[cell] = math.sqrt(square / own_df), own_df
                warnings.append(f"{recipe} with {cell[1]:,} parameters and {cell[2]:,} tokens has "
                                f"the SD {sds[cell][0]:.4f}, its other cells "
                                f"{math.sqrt(others):.4f} (F = {f:.1f}). It counts with its own.")
        total, df = sum(each for cell, each in squares.items() if cell not in own)
        sds.update({cell: (math.sqrt(total / df), df) for cell in mine if cell not in own})
    return sds, warnings


def sample_means(cells, sds, with_text):
    """N_SAMPLES draws of each cell's mean loss, with Student's noise of the seeds: {cell: array}.

    with_text: the test documents are resampled, too, the same for all cells.
    """
    rng = np.random.default_rng(0)
    means = {cell: np.full(N_SAMPLES, values(runs).mean()) for cell, runs in cells.items()}
    _, sizes = mean_group_losses([run for runs in cells.values() for run in runs])
    if with_text and sizes:
        counts = rng.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), N_SAMPLES)
        weights = counts * sizes / (counts @ sizes)[:, None]  # (N_SAMPLES, groups)
        means = {cell: weights @ mean_group_losses(runs)[0] for cell, runs in cells.items()}
    sampled_sds = {}  # cells with an SD in common have its error in common
    for cell, runs in sorted(cells.items()):
        sd, df = sds[cell]
        if (cell[0], sd) not in sampled_sds:
            sampled_sds[cell[0], sd] = sd * np.sqrt(df / rng.chisquare(df, N_SAMPLES))
        error = sampled_sds[cell[0], sd] / math.sqrt(len(values(runs)))
        means[cell] = means[cell] + error * rng.standard_normal(N_SAMPLES)
    return means


def fit_recipe(chosen, largest, target, cells, sds, samples):
    """The power law of one recipe over the chosen cells, and what it, and a line through the last
    two on logarithmic axes, predict for the target. largest: the cell of that size, or None."""
    sizes = np.array([size for _, size, _ in chosen])
    losses = np.array([values(cells[cell]).mean() for cell in chosen])
    errors = np.array([sds[cell][0] / math.sqrt(len(values(cells[cell]))) for cell in chosen])
    law = fit_power_law(sizes, losses)
    predictions = np.array([loss_at(fit_power_law(sizes, sample), target) for sample in
                            np.array([samples[cell] for cell in chosen]).T])
    slope = math.log(losses[-1] / losses[-2]) / math.log(sizes[-1] / sizes[-2])
    result = {"name": chosen[0][0], "law": law, "predicted": loss_at(law, target), "measured": None,
              "line": losses[-1] * (target / sizes[-1]) ** slope,
              "lack_of_fit": lack_of_fit(sizes, losses, errors, sds[chosen[-1]][1])}
    if largest:  # the noise of its own seeds is part of the interval
        result["measured"] = values(cells[largest]).mean()
        predictions = predictions + samples[largest] - result["measured"]
    return {**result, "interval": interval(predictions)}


def fit_power_law(sizes, losses, errors=1.0):
    """Least squares of loss = floor + gain (N / N of the smallest size)^-exponent, floor >= 0.
    Floor and gain follow from the exponent; gain is NaN where the losses do not fall."""
    x, errors = sizes / sizes[0], errors * np.ones(len(sizes))

    def linear_fit(exponent):
        return nnls(np.array([1 / errors, x ** -exponent / errors]).T, losses / errors)
    exponent = minimize_scalar(lambda exponent: linear_fit(exponent)[1], bounds=(0.01, 3),
                               options={"xatol": 1e-7}).x
    floor, gain = linear_fit(exponent)[0]
    return {"floor": floor, "gain": gain or math.nan, "exponent": exponent, "smallest": sizes[0]}


def loss_at(law, size):
    return law["floor"] + law["gain"] * (size / law["smallest"]) ** -law["exponent"]


def lack_of_fit(sizes, losses, errors, df):
    """The p of an F test: do the mean losses miss the law by more than the seeds explain? A small
    one says that the loss does not follow the law. errors: standard errors of the losses."""
    law = fit_power_law(sizes, losses, errors)
    misses = (losses - loss_at(law, sizes)) / errors
    n_free = len(sizes) - (3 if law["floor"] > 0 else 2)  # a floor at its bound is not fitted
    return float(fdtrc(n_free, df, misses @ misses / n_free))


def token_fraction(ours, theirs, cells, samples):
    """With which fraction of the tokens of another recipe's cell a recipe reaches its loss, by a
    line through its own losses over ln(tokens), and the interval. None if it has one budget, or its
    losses do not fall."""
    mine = sorted(cell for cell in cells if cell[:2] == ours[:2])
    x = np.log([tokens / theirs[2] for *_, tokens in mine])
    found = crossing(x, [values(cells[cell]).mean() for cell in mine],
                     values(cells[theirs]).mean())
    limits = interval([crossing(x, losses, loss) for losses, loss in
                       zip(np.array([samples[cell] for cell in mine]).T, samples[theirs])])
    return None if math.isnan(found) else (math.exp(found), np.exp(limits))


def crossing(x, losses, target):
    """Where the line through the points is at the target; beyond them, on its first or last part.
    NaN if there is one point, or the losses do not fall there."""
    i = int(np.clip(np.searchsorted(-np.array(losses), -target), 1, max(len(x) - 1, 1)))
    if len(x) < 2 or losses[i] >= losses[i - 1]:
        return math.nan
    return x[i] + (target - losses[i]) * (x[i] - x[i - 1]) / (losses[i] - losses[i - 1])


def interval(samples):
    """The middle 95 %; NaN, without an end, if more than the outer 5 % are not numbers."""
    is_bounded = np.isnan(samples).mean() <= 0.05
    return np.nanquantile(samples, (0.025, 0.975)) if is_bounded else np.full(2, np.nan)


def format_analysis(result):
    """Tables in Markdown, and sentences."""
    smallest = f"{min(size for _, size, _ in result['losses']):,}"
    losses = [["recipe", "parameters", "tokens", "n", "loss", "SD"]]
    for (name, size, tokens), found in result["losses"].items():
        losses.append([name, f"{size:,}", f"{tokens:,}", str(len(found)), f"{found.mean():.4f}",
                       format_number(stats.sample_sd(found), ".4f")])
    laws = [["recipe", "law", "lack of fit, p", "predicted", "95 % interval", "measured", "error",
             "error of the line"]]
    for each in result["laws"]:
        law, measured = each["law"], each["measured"]
        errors = [f"{measured / each[key] - 1:+.1%}" if measured else ""
                  for key in ("predicted", "line")]
        floor = f"{law['floor']:.3f} + " if law["floor"] > 0 else ""
        formula = f"{floor}{law['gain']:.3f} (N / {smallest})^-{law['exponent']:.3f}"
        laws.append([each["name"], formula, format_p(each["lack_of_fit"]),
                     f"{each['predicted']:.4f}", format_interval(each["interval"], ".4f"),
                     format_number(measured, ".4f"), *errors])
    differences = [["recipe", "against", "parameters", "difference", "95 % interval"]]
    for (ours, theirs), row in result["differences"].items():
        limits = row["p"] and stats.t_interval(row["difference"], row["error"], row["df"])
        differences.append([ours[0], theirs[0], f"{ours[1]:,}", f"{row['difference']:+.4f}",
                            format_interval(limits, "+.4f")])
    fractions = [["recipe", "against", "parameters", "fraction of tokens", "95 % interval"]]
    for (ours, theirs), (fraction, limits) in result["fractions"].items():
        fractions.append([ours[0], theirs[0], f"{ours[1]:,}", f"{fraction:.3f}",
                          format_interval(limits, ".3f")])
    tables = {
        f"Laws over {len(result['fitted'])} sizes, {smallest} to "
        f"{max(result['fitted'], default=0):,} parameters, and their predictions for "
        f"{result['target']:,}. The line: through the last two of these sizes, on logarithmic "
        "axes. The intervals cover the seeds, not a law of another form.": laws,
        "Differences in loss, seed by seed. Each interval is for one test.": differences,
        "With which fraction of the other recipe's tokens a recipe reaches its loss, by a line "
        "over ln(tokens) between its own budgets. The intervals cover the seeds and, on the test "
        "split, the choice of its documents.": fractions}
    parts = [format_table(losses, markdown=True), "\n".join(result["warnings"])]
    for words, rows in tables.items():
        parts += [words, format_table(rows, markdown=True)] * (len(rows) > 1)
    return "\n\n".join(filter(None, parts))


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("results", nargs="+", metavar="RESULTS.json")
    parser.add_argument("--target", type=int, metavar="N",
                        help="parameters of the model to predict (default: the largest measured)")
    parser.add_argument("--against", nargs="+", metavar="NAME",
                        default=["published", "rope_qk_norm"],
                        help="with which recipes the others are compared (default: %(default)s)")
    parser.add_argument("--validation", action="store_const", dest="loss", const="val_loss",
                        default="test_loss", help="by validation loss")
    args = parser.parse_args()
    runs = [run for path in args.results for run in read_file(path, args.loss)]
    print(format_analysis(analyse(runs, args.target, args.against, args.loss)))


if __name__ == "__main__":
    run_script(main)
