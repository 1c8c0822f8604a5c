"""A study: its runs found, grouped into experiments, compared, and put into tables and sentences.

A run is a dict with a name, a test_loss and options. eval.py writes the options in "config"; a file
written by hand may have them beside the name. An option that is missing has its default.
"""

import glob
import json
import math
import os
from pathlib import Path

import numpy as np

from config import OPTIONS, RESUME_MAY_CHANGE, SEEDS
from nanolab import stats
from nanolab.common import UserError
from nanolab.logfile import read_log

# Runs that differ only in these are one experiment: their results are the same up to noise.
# (Compiled code draws other dropout masks.)
SAME_EXPERIMENT = {*RESUME_MAY_CHANGE, *SEEDS, "compile"}

# What the seeds of a set of runs vary: the sources of noise.
ONE_SEED = "both, by one seed"
LOOP = "the loop (data order, dropout), initial weights fixed"
INITIAL_WEIGHTS = "initial weights, the loop fixed"


def find_runs(words):
    """What --ckpt names: (checkpoints, results files, folders of unfinished runs).

    A checkpoint named in full is taken as it is. Globs and folders leave out unfinished runs.
    Raises UserError.
    """
    checkpoints, results_files, unfinished = [], [], []
    for word in words:
        if glob.has_magic(word):
            found = find_in_glob(word)
        elif is_folder_of_runs(word):
            found = find_in_folder(word)
        else:
            (results_files if word.endswith(".json") else checkpoints).append(word)
            continue
        if not found:
            raise UserError(f"there is no run in {word}" if is_folder_of_runs(word)
                            else f"nothing matches '{word}'")
        for path in found:
            if path.endswith(".json"):
                results_files.append(path)
            elif is_unfinished(path):
                unfinished.append(os.path.dirname(path))
            else:
                checkpoints.append(path)
    return list(dict.fromkeys(checkpoints)), results_files, list(dict.fromkeys(unfinished))


def find_in_glob(pattern):
    """The files that match, best.pt of the runs in folders that match, and matching checkpoints
    that a run does not have yet."""
    found = set()
    for path in glob.glob(pattern, recursive=True):
        found.update(find_in_folder(path) if os.path.isdir(path) else [path])
    folder_pattern, name = os.path.split(pattern)
    if name.endswith(".pt") and not glob.has_magic(name):
        for folder in glob.glob(folder_pattern, recursive=True):
            path = os.path.join(folder, name)
            if has_beside(path, "config.json"):
                found.add(path)
    return sorted(found)


def find_in_folder(folder):
    return sorted(str(config.with_name("best.pt")) for config in Path(folder).rglob("config.json"))


def is_folder_of_runs(word):
    hugging_face = ("model.safetensors", "model-*-of-*.safetensors", "pytorch_model.bin")
    return os.path.isdir(word) and not any(any(Path(word).glob(name)) for name in hugging_face)


def is_unfinished(checkpoint):
    """Whether its run has not ended. A checkpoint that is there without its run counts as ended."""
    if not os.path.exists(checkpoint):
        return True
    return has_beside(checkpoint, "config.json") and not has_beside(checkpoint, "summary.json")


def has_beside(path, name):
    return Path(path).with_name(name).exists()


def read_results(path):
    """The runs in a results file. Raises UserError."""
    try:
        content = json.loads(Path(path).read_text())
        runs = content["runs"] if isinstance(content, dict) else content
        for run in runs:
            if not isinstance(run["name"], str) or not math.isfinite(run["test_loss"]):
                raise TypeError
            settings(run)
        return runs
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is no file of results: it needs a list of runs, each with a name "
                        "and a test_loss") from None


def read_logs(experiments):
    """The logs of all runs, as read_log returns them: {label: [log, ...]}. Raises UserError."""
    logs = {}
    for label, runs in experiments.items():
        for run in runs:
            path = Path(run.get("path", f"{run['name']}/best.pt")).with_name("log.jsonl")
            try:
                logs.setdefault(label, []).append(read_log(path))
            except (OSError, ValueError):
                raise UserError(f"--curves needs the run's {path}, "
                                "which is missing or damaged") from None
    return logs


def settings(run):
    """Every option of a run. A seed that is None follows `seed`, as in config.load."""
    given = run.get("config", run)
    options = {key: given.get(key, option.default) for key, option in OPTIONS.items()}
    for key in SEEDS:
        if options[key] is None:
            options[key] = options["seed"]
    return options


def group_by_experiment(runs):
    """-> {label: runs}

    The runs of one experiment have one name and differ only in SAME_EXPERIMENT. The label is the
    name; if experiments share it, the options that differ too.
    """
    experiments = {}
    for run in runs:
        options = settings(run)
        ignored = SAME_EXPERIMENT.union({"max_tokens"} if options["max_steps"] else ())
        relevant = tuple((key, value) for key, value in options.items() if key not in ignored)
        experiments.setdefault((run["name"], relevant), []).append(run)
    labelled = {}
    for (name, options), members in experiments.items():
        namesakes = [dict(others) for other_name, others in experiments if other_name == name]
        differing = [f"{key}={value}" for key, value in options
                     if any(others.get(key) != value for others in namesakes)]
        labelled[", ".join([name, *differing])] = members
    return labelled


def seeds_of(run):
    options = settings(run)
    return tuple(options[key] for key in SEEDS)


def by_seed(runs):
    """-> {(init_seed, data_seed, dropout_seed): test loss}

    Runs with the same seeds are averaged: a repeat is not another sample of the noise.
    """
    losses = {}
    for run in runs:
        losses.setdefault(seeds_of(run), []).append(run["test_loss"])
    return {seeds: float(np.mean(repeats)) for seeds, repeats in losses.items()}


def choose_baseline(experiments, wanted):
    """The label of the experiment that the others are compared with. Raises UserError.

    None if `wanted` is None and no experiment is called baseline.
    """
    if wanted in experiments:
        return wanted
    matching = [label for label in experiments if label.startswith(f"{wanted or 'baseline'}, ")]
    if wanted and not matching:
        raise UserError(f"no run is named '{wanted}' (from --baseline); "
                        f"there are {', '.join(sorted(experiments))}")
    if wanted and len(matching) > 1:
        raise UserError(f"--baseline='{wanted}' could be any of: {'; '.join(sorted(matching))}")
    if "baseline" in experiments:
        return "baseline"
    return matching[0] if len(matching) == 1 else None


def compare(experiments, baseline):
    """The rows of the table, as dicts, from the highest mean loss to the lowest."""
    rows = []
    for label, runs in experiments.items():
        by_seeds = by_seed(runs)
        losses, seconds = list(by_seeds.values()), mean_of(runs, "seconds")
        rows.append({"experiment": label, "n": len(losses), "test_loss": float(np.mean(losses)),
                     "sd": stats.sample_sd(losses), "losses": losses,
                     "tokens_per_second": mean_of(runs, "tokens_per_second"),
                     "hours": seconds and seconds / 3600, "cost": mean_of(runs, "cost")})
        if baseline and label != baseline:
            rows[-1].update(difference_over_seeds(by_seeds, by_seed(experiments[baseline])))
    add_verdicts(rows)
    return sorted(rows, key=lambda row: -row["test_loss"])


def mean_of(runs, key):
    """The mean of a figure over the runs that have it, or None."""
    values = [run[key] for run in runs if run.get(key) is not None]
    return float(np.mean(values)) if values else None


def difference_over_seeds(ours, theirs):
    """The difference in mean loss, paired if two seeds or more are common to both sides.

    ours, theirs: seeds -> test loss.
    """
    common = sorted(ours.keys() & theirs.keys())
    if len(common) < 2:
        return stats.difference(list(ours.values()), list(theirs.values()), paired=False)
    return stats.difference([ours[seeds] for seeds in common],
                            [theirs[seeds] for seeds in common], paired=True)


def add_verdicts(rows):
    """Adds p_holm and the verdict, at 5 %, to each row that was compared."""
    tested = [row for row in rows if row.get("p") is not None]
    for row, p in zip(tested, stats.holm([row["p"] for row in tested])):
        direction = "better" if row["difference"] < 0 else "worse"
        row.update(p_holm=p, verdict=direction if p < 0.05 else "within noise")
    for row in rows:
        if row.get("compared") == "one run each":
            row["verdict"] = "cannot be told"


def noise(runs):
    """The spread of one experiment's losses by its source, and whether the sources differ.

    -> a dict. Raises UserError.
    """
    sources = sources_of_noise(runs)
    if not sources:
        raise UserError("--noise needs at least two runs of the baseline that differ in their "
                        "seeds; name it with --baseline")
    rows = {**sources, "all runs": list(by_seed(runs).values())}
    result = {"sources": [{"source": source, **stats.spread(losses)}
                          for source, losses in rows.items()]}
    if len(sources) > 1 and all(len(losses) > 2 for losses in sources.values()):
        result["levene"] = stats.levene_test(list(sources.values()))
    if sources.keys() >= {INITIAL_WEIGHTS, LOOP} and stats.sample_sd(sources[LOOP]):
        result["f_test"] = stats.variance_f_test(sources[INITIAL_WEIGHTS], sources[LOOP])
    return result


def sources_of_noise(runs):
    """The losses of one experiment by what varied: {source: losses}. A run may count twice."""
    losses = by_seed(runs)
    one_seed = {seeds_of(run) for run in runs if len({settings(run)["seed"], *seeds_of(run)}) == 1}
    same_weights, same_loop = {}, {}
    for seeds in losses:
        init_seed, *loop_seeds = seeds
        same_weights.setdefault(init_seed, []).append(seeds)
        same_loop.setdefault(tuple(loop_seeds), []).append(seeds)
    chosen = {ONE_SEED: sorted(one_seed),
              LOOP: max(same_weights.values(), key=len, default=[]),
              INITIAL_WEIGHTS: max(same_loop.values(), key=len, default=[])}
    return {source: [losses[seeds] for seeds in members]
            for source, members in chosen.items() if len(members) > 1}


def points_to_fit(experiments, wanted):
    """The runs named `wanted`, or of the name that has the most global batch sizes.

    -> name, sizes, losses. Raises UserError.
    """
    points = {}
    for runs in experiments.values():
        name, size = runs[0]["name"], settings(runs[0])["global_batch_size"]
        points.setdefault(name, []).extend((size, loss) for loss in by_seed(runs).values())
    name = wanted or max(points, key=lambda name: len({size for size, _ in points[name]}))
    sizes, losses = np.array(sorted(points.get(name, [])), float).reshape(-1, 2).T
    if len(set(sizes)) < 3:
        raise UserError("--fit_batch_size needs runs of at least 3 global batch sizes; "
                        f"{name} has {len(set(sizes))}")
    return name, sizes, losses


def format_table(rows, markdown=False):
    """The text of a table. rows: lists of cells, the header first.

    Columns without a value are left out. Words are aligned to the left, numbers to the right.
    """
    lines, rule = [[] for _ in rows], []
    for column in zip(*rows):
        if any(column[1:]):
            width = max(map(len, column))
            is_text = column[0] in ("experiment", "compared", "verdict", "varies")
            rule.append("-" * (width + 1) + ("-" if is_text else ":"))
            for line, cell in zip(lines, column):
                line.append(cell.ljust(width) if is_text else cell.rjust(width))
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in lines)
    header, *body = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([header, "|" + "|".join(rule) + "|", *body])


def format_number(value, form):
    return "" if value is None else format(value, form)


def format_interval(interval, form):
    return "" if interval is None else f"{interval[0]:{form}} to {interval[1]:{form}}"


def format_comparison(rows, markdown, other=None):
    """The table of `compare`.

    other: (title, rows) of another study, whose differences get a column.
    """
    title, other_rows = other or ("", [])
    theirs = {row["experiment"]: f"{row['difference']:+.4f} {row['verdict']}"
              for row in other_rows if "difference" in row}
    cells = [["experiment", "n", "test loss", "SD", "difference", "95 % interval", "compared",
              "p (Holm)", "verdict", title, "tokens/s", "hours", "US$"]]
    for row in rows:
        interval = (row["low"], row["high"]) if "low" in row else None
        cells.append([row["experiment"], str(row["n"]), f"{row['test_loss']:.6f}",
                      format_number(row["sd"], ".6f"),
                      format_number(row.get("difference"), "+.4f"),
                      format_interval(interval, "+.4f"), row.get("compared", ""),
                      format_number(row.get("p_holm"), ".2g"), row.get("verdict", ""),
                      theirs.get(row["experiment"], ""),
                      format_number(row["tokens_per_second"], ",.0f"),
                      format_number(row["hours"], ".3g"),
                      format_number(row["cost"] or None, ".2f")])
    return format_table(cells, markdown)


def format_legend(rows, baseline):
    """What the columns of the table mean."""
    n_compared = sum("verdict" in row for row in rows)
    if not n_compared:
        return ("n: runs with different seeds; SD: sample standard deviation. "
                "No experiment is called baseline; --baseline names one.")
    return (f"Difference: to {baseline}, negative is better, with its 95 % Student-t interval; "
            "paired: over that many equal seeds; unpaired: Welch's, or where one side is one run, "
            "with the other side's spread. Verdict: at 5 %, corrected for "
            f"{n_compared} comparisons (Holm). "
            "n: seeds; SD: sample standard deviation; hours: per run.")


def format_noise(result, markdown):
    cells = [["varies", "n", "mean", "SD (sample)", "95 % interval", "SD (population)", "lowest",
              "highest"]]
    for row in result["sources"]:
        cells.append([row["source"], str(row["n"]), f"{row['mean']:.6f}", f"{row['sd']:.6f}",
                      format_interval(row["sd_interval"], ".4f"), f"{row['population_sd']:.6f}",
                      f"{row['lowest']:.6f}", f"{row['highest']:.6f}"])
    lines = [format_table(cells, markdown), ""]
    if test := result.get("levene"):
        answer = "Yes" if test["p"] < 0.05 else "Not that these runs could show"
        lines.append("Levene's test (Brown-Forsythe): do the sources differ in spread? "
                     f"{answer}: {format_f(test)}, p = {test['p']:.3f}.")
    if test := result.get("f_test"):
        lines.append("F test, variance by initial weights over variance by the loop: "
                     f"{format_f(test)}, two-sided p = {test['p']:.3f}.")
    return "\n".join(lines)


def format_f(test):
    return "F({}, {}) = {:.3f}".format(*test["df"], test["f"])


def format_fit(name, fit, sizes):
    lines = [f"{name}: {fit['n']} runs, global batch {min(sizes):g} to {max(sizes):g}",
             "loss = a ln(B)^2 + b ln(B) + c: "
             f"a {fit['a']:.7f}, b {fit['b']:.7f}, c {fit['c']:.7f}"]
    if fit["optimum"] is None:
        return "\n".join([*lines, "the curve has no lowest point: a is not positive"])
    optimum = f"optimum {fit['optimum']:.1f}"
    predicted = f"predicted loss there {fit['predicted']:.3f}"
    if fit["df"]:
        optimum += f" (95 % interval {format_interval(fit['optimum_interval'], '.1f')})"
        predicted += f" (95 % interval {format_interval(fit['predicted_interval'], '.3f')})"
    else:
        exact = " (no interval: three runs fit three coefficients exactly)"
        optimum, predicted = optimum + exact, predicted + exact
    if not min(sizes) <= fit["optimum"] <= max(sizes):
        optimum += "; beyond the sizes measured, so do not trust it"
    return "\n".join([*lines, optimum, predicted])
