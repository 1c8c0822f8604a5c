"""Compares the experiments of a study, and writes the table and its sentences."""

import math

import numpy as np

from nanolab.study import stats
from nanolab.study.runs import code_states, losses_by_seed, settings


def compare(experiments, baseline, loss="test_loss", test=stats.compare_means):
    """The rows of the table, as dicts, from the lowest mean loss to the highest.

    experiments: as group_by_experiment returns them. baseline: a label, or None. test: takes
    {seeds: loss} of two sides, and returns what stats.compare_means does.
    """
    rows = []
    for label, runs in experiments.items():
        ours = losses_by_seed(runs, loss)
        losses = list(ours.values())
        row = {"experiment": label, "n": len(ours), "loss": float(np.mean(losses)),
               "sd": stats.sample_sd(losses), "losses": losses, "verdict": "",
               "tokens": budget(runs), "block_size": settings(runs[0])["block_size"],
               "tokens_per_second": mean_of(runs, "tokens_per_second"),
               "hours": (mean_of(runs, "seconds") or 0) / 3600 or None, "cost": cost_of(runs),
               "seeds_cross": any(len(set(column)) < len(ours) for column in zip(*ours)),
               "code": code_states(runs)}
        if label == baseline:
            row["verdict"] = "baseline"
        elif baseline:
            row.update(test(ours, losses_by_seed(experiments[baseline], loss)))
            row.update(verdict="not exercised" if "equal" in row["compared"] else "not shown",
                       text_error=None if loss == "val_loss" else text_error(
                           runs, experiments[baseline]),
                       n_groups=len(runs[0].get("group_losses", ())))
            if all(run.get("reference") for run in runs):
                row.update(verdict="reference", p=None, compared="", gaps=[])
        rows.append(row)
    add_verdicts([row for row in rows if row.get("p") is not None])
    return sorted(rows, key=lambda row: row["loss"])


def add_verdicts(tested):
    """Adds to each row that was tested its verdict and interval.

    The rule is Bonferroni's. Of m tests each is made at 5 % / m, so that all m intervals hold
    together 95 times in 100. A difference is shown if its interval leaves out 0.
    """
    for row in tested:
        level = 0.05 / len(tested)
        low, high = stats.t_interval(row["difference"], row["error"], row["df"], level)
        row.update(low=low, high=high, p_corrected=min(1.0, len(tested) * row["p"]),
                   verdict="better" if high < 0 else "worse" if low > 0 else "not shown",
                   detectable=stats.detectable(row["error"], row["df"], level))
        if row["verdict"] == "not shown" and row["compared"].startswith("paired"):
            row["seeds_needed"] = stats.seeds_to_show(row["difference"], row["error"],
                                                      len(row["gaps"]), level)
        if row["text_error"] is not None:
            _, text = stats.t_interval(0, row["text_error"], row["n_groups"] - 1, level)
            half = math.hypot((high - low) / 2, text)  # so never below that of the seeds alone
            row["resampled"] = [row["difference"] - half, row["difference"] + half]


def text_error(runs, others):
    """The standard error of a difference of two mean losses from the choice of the test documents:
    by the spread of the differences over groups of them. None if unknown."""
    (ours, sizes), (theirs, other_sizes) = mean_group_losses(runs), mean_group_losses(others)
    if sizes is None or sizes != other_sizes:
        return None
    return stats.weighted_error(ours - theirs, sizes)


def mean_group_losses(runs):
    """The loss of each group of test documents, a mean over the runs, and the groups' sizes."""
    sizes = [run.get("group_windows") for run in runs]
    if any(each is None or each != sizes[0] for each in sizes):
        return None, None
    return np.mean([run["group_losses"] for run in runs], axis=0), sizes[0]


def budget(runs):
    """Training tokens."""
    options = settings(runs[0])
    steps = options["max_steps"] * options["global_batch_size"] * options["block_size"]
    return steps or options["max_tokens"]


def mean_of(runs, key):
    """The mean of a figure over the runs that have it, or None."""
    values = [run[key] for run in runs if run.get(key) is not None]
    return float(np.mean(values)) if values else None


def cost_of(runs):
    """The mean cost in US$; or the words of a file written by hand, as "35 to 42"; or None."""
    words = [run["cost"] for run in runs if isinstance(run.get("cost"), str)]
    return words[0] if words else mean_of(runs, "cost")


def format_table(rows, markdown=False):
    """The text of a table. rows: lists of cells, the header first.

    Columns without a value are left out. Columns of numbers, but the first, are aligned to the
    right.
    """
    columns = [column for column in zip(*rows) if any(column[1:])]
    lines, rule = [[] for _ in rows], []
    for i, column in enumerate(columns):
        width = max(map(len, column))
        is_text = i == 0 or any(cell[:1] not in "+-.<0123456789" for cell in column[1:])
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


def format_p(p):
    return "" if p is None else "<0.0001" if p < 0.0001 else f"{p:.4f}"


def comparison_cells(rows, all_columns=False, beside=None):
    """The cells of compare's table, the header first. beside: (title, rows) of another study, whose
    differences get a column."""
    title, other_rows = beside or ("", [])
    theirs = {row["experiment"]: row.get("difference") for row in other_rows}

    def cells(row):
        gaps, cost = row.get("gaps", ()), row["cost"]
        return {"experiment": row["experiment"], "n": str(row["n"]),
                "loss": f"{row['loss']:{'.6f' if all_columns else '.4f'}}",
                "SD": format_number(row["sd"], ".6f"),
                "difference": format_number(row.get("difference"), "+.4f"),
                "95 % interval": format_interval((row["low"], row["high"]) if "low" in row
                                                 else None, "+.4f"),
                "p": format_p(row.get("p_corrected")), "verdict": row["verdict"],
                "beside": format_number(theirs.get(row["experiment"]), "+.4f"),
                "if test set resampled": format_interval(row.get("resampled"), "+.4f"),
                "compared": row.get("compared", ""),
                "same seed": format_number(gaps[0] if len(gaps) == 1 else None, "+.4f"),
                "tokens/s": format_number(row["tokens_per_second"], ",.0f"),
                "hours": format_number(row["hours"], ".3g"),
                "US$": cost if isinstance(cost, str) else format_number(cost or None, ".2f")}

    lines = [cells(row) for row in rows]
    names = list(lines[0]) if all_columns else [
        "experiment", "n", "loss", "difference", "95 % interval", "p", "verdict", "beside"]
    header = [title if name == "beside" else name for name in names]
    return [header, *([line[name] for name in names] for line in lines)]


def format_heading(rows, baseline, loss):
    """The sentence above the table."""
    start = f"{'Validation' if loss == 'val_loss' else 'Test'} loss in nats per token, best first"
    if not baseline:
        return f"{start}."
    sd = next(row["sd"] for row in rows if row["experiment"] == baseline)
    over_seeds = "" if sd is None else f", whose SD over seeds is {sd:.4f}"
    n_tests = sum("low" in row for row in rows)
    tests = f"; corrected for {n_tests} tests" if n_tests > 1 else ""
    return f"{start}. Differences are to {baseline}{over_seeds}{tests}."


def format_legend(rows):
    """What the words of the table mean."""
    n_tests = sum("low" in row for row in rows)
    words = " ".join(f"{row['verdict']}, {row.get('compared', '')}" for row in rows)
    lines = {
        "Nothing is compared: --baseline names an experiment.": not words.strip(", "),
        f"95 % intervals and p are corrected for the {n_tests} tests of this table (Bonferroni): "
        "all intervals hold together 95 times in 100, and p is below 0.05 where an interval "
        "leaves out 0.": n_tests > 1,
        "There is one test, so its interval and p are not corrected.": n_tests == 1,
        "better, worse: the interval leaves out 0. not shown: it contains 0. That does not prove "
        "that there is no effect.": n_tests,
        "not exercised: the option changed nothing. The losses equal the baseline's to the last "
        "bit.": "not exercised" in words,
        "reference: differs in more than its options, so it is not tested.": "reference" in words,
        "Experiments with common seeds are compared seed by seed (paired).": ", paired" in words,
        "Without common seeds: Welch's test; if a side has one or two runs, Student's, which "
        "assumes equal variances.": "unpaired" in words,
        "One run a side shows no noise, so nothing can be tested: run more seeds.":
            "one run each" in words,
        "Where nothing varies over the seeds, nothing can be tested.": "no spread" in words}
    return "\n".join(line for line, applies in lines.items() if applies)


def format_notes(rows, baseline, independent=True):
    """What else a reader must know of this study: a line each.

    independent: the tests took the runs of one experiment for independent.
    """
    def listed(sentence, chosen, detail=lambda row: ""):
        names = "; ".join(f"{row['experiment']}{detail(row)}" for row in chosen)
        return [sentence.format(names)] if names else []

    tested, lines = [row for row in rows if "low" in row], []
    if tested:
        effects = [f"{f([row['detectable'] for row in tested]):.4f}" for f in (min, max)]
        lines.append("Minimum detectable effect (80 % power): "
                     f"{' to '.join(dict.fromkeys(effects))}.")
    lines += listed("Seeds that would show a difference as large as the one measured (80 % power): "
                    "{}.", [row for row in tested if "seeds_needed" in row],
                    lambda row: f": {row['seeds_needed'] or 'over 100'}")
    lines += listed("Not shown if the test set were resampled (by its documents' spread): {}.",
                    [row for row in tested if row["verdict"] != "not shown" and "resampled" in row
                     and row["resampled"][0] < 0 < row["resampled"][1]])
    lines += listed("Over the common seeds only, so not the difference of the losses above: {}.",
                    [row for row in rows if " of " in row.get("compared", "")],
                    lambda row: f": {row['compared'].removeprefix('paired, ')}")
    if tested and independent:
        lines += listed("Some runs of {} have a seed in common, so they are not independent, and "
                        "the intervals are too narrow.",
                        [row for row in rows if row["seeds_cross"]])
    base = next((row for row in rows if row["experiment"] == baseline), None)
    if base and base["n"] > 1 and not base["seeds_cross"]:
        low, high = stats.prediction_interval(base["losses"])
        lines.append(f"One more run of {baseline} would fall between {low:.4f} and {high:.4f}, 95 "
                     "times in 100.")
    if base and base["tokens"]:
        lines += listed(f"Other training budgets than {baseline}'s {base['tokens']:,} tokens, so a "
                        "difference is not due to the option alone: {}.",
                        [row for row in rows if row["verdict"] != "reference"
                         and abs(row["tokens"] / base["tokens"] - 1) > 0.01],
                        lambda row: f": {row['tokens']:,}")
    if base:
        lines += listed(f"Other windows than {baseline}'s of {base['block_size']:,} tokens, so the "
                        "losses are for other contexts: {}.",
                        [row for row in rows if row["block_size"] != base["block_size"]],
                        lambda row: f": {row['block_size']:,}")
    if len({sha256 for row in rows for sha256 in row["code"]}) > 1:
        lines += listed("Different code, so a difference may not be due to the option alone "
                        "(code.diff in a run's folder has its changes): {}.",
                        [row for row in rows if row is base or len(row["code"]) > 1
                         or not base or row["code"].keys() != base["code"].keys()],
                        lambda row: f": {', '.join(row['code'].values())}")
    return "\n".join(lines)
