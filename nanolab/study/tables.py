"""Tables and sentences: what eval.py prints of a study."""

from nanolab import stats, study


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


def format_sampled(interval, form):
    """An interval of scaling.interval."""
    return format_interval(interval, form) or "without an end"


def format_comparison(rows, markdown, other=None, loss="test loss"):
    """The table of study.compare.

    other: (title, rows) of another study, whose differences get a column.
    """
    title, other_rows = other or ("", [])
    theirs = {row["experiment"]: f"{row['difference']:+.4f} {row.get('verdict', '')}".strip()
              for row in other_rows if "difference" in row}
    cells = [["experiment", "n", loss, "SD", "difference", "95 % interval",
              "other text", "compared", "p (corrected)", "verdict", "same seed", title, "tokens/s",
              "hours", "US$"]]
    for row in rows:
        interval = (row["low"], row["high"]) if "low" in row else None
        cost = row["cost"] or ""
        cells.append([row["experiment"], str(row["n"]), f"{row['test_loss']:.6f}",
                      format_number(row["sd"], ".6f"),
                      format_number(row.get("difference"), "+.4f"),
                      format_interval(interval, "+.4f"),
                      format_interval(row.get("other_text"), "+.4f"), row.get("compared", ""),
                      format_number(row.get("p_corrected"), ".3g"), row.get("verdict", ""),
                      format_number(row.get("same_seed"), "+.4f"),
                      theirs.get(row["experiment"], ""),
                      format_number(row["tokens_per_second"], ",.0f"),
                      format_number(row["hours"], ".3g"),
                      cost if isinstance(cost, str) else f"{cost:.2f}"])
    return format_table(cells, markdown)


def format_legend(rows, baseline):
    """What the columns of the table mean, and which effects it could have shown."""
    kinds = {row["compared"].split(",")[0] for row in rows if "compared" in row}
    if not kinds:
        advice = "" if baseline else " Nothing is compared: --baseline names one experiment."
        return f"n: runs with different seeds; SD: sample standard deviation.{advice}"
    tested = [row for row in rows if "low" in row]
    sentences = [f"Difference: to {baseline}, negative is better."]
    sentences += [sentence for kind, sentence in COMPARED.items() if kind in kinds]
    if tested:
        sentences.append(CORRECTED.format(n=len(tested)) if len(tested) > 1 else
                         "Interval and p: of the one test, not corrected.")
        sentences.append("Better, worse: the interval leaves out 0. Not shown: it does not, which "
                         "is no proof of no effect.")
    if any("other_text" in row for row in rows):
        n_groups = max(row.get("n_groups", 0) for row in rows)
        sentences.append(OTHER_TEXT.format(n=n_groups))
    if any("same_seed" in row for row in rows):
        sentences.append("Same seed: to the one baseline of the same seed; a single pair has no "
                         "interval.")
    sentences.append("n: seeds; SD: sample standard deviation; hours: per run.")
    lines = [" ".join(sentences)]
    if tested:
        lines += ["", f"Minimum detectable effect (80 % power at 5 % / {len(tested)}): "
                  f"{format_detectable(tested)}."]
    return "\n".join(lines)


COMPARED = {
    "paired": "Paired: seed by seed, over that many.",
    "partly paired": "Partly paired: all runs, that many seeds in common, by a mixed model.",
    "unpaired": "Unpaired: Welch's test; if a side has one or two runs, both are taken to have one "
                "spread; where the seeds of weights and loop cross, by a mixed model.",
    "identical": "Identical: the same losses bit for bit over that many seeds; not tested.",
    "one run each": "One run each: nothing shows the noise.",
    "reference": "Reference: differs in more than the options; not tested.",
}
CORRECTED = ("Intervals and p: corrected for {n} tests (Bonferroni), so that all {n} intervals "
             "hold together 95 times in 100.")

OTHER_TEXT = ("Other text: the interval if the test documents, too, were drawn anew (paired "
              "bootstrap over {n} groups of documents).")


def format_detectable(tested):
    effects = {}
    for row in tested:
        effects.setdefault(row["compared"], []).append(row["detectable"])
    return "; ".join(f"{compared}: " + " to ".join(dict.fromkeys(
        f"{effect:.4f}" for effect in (min(found), max(found))))
        for compared, found in effects.items())


def format_cautions(rows, experiments, baseline):
    """Lines that say for which experiments the seeds are too few, and that budgets differ."""
    lines = []
    for label, n, needed in study.too_few_seeds(rows):
        lines.append(f"{label}: {n} seeds are too few to show this difference; "
                     f"{f'about {needed}' if needed else 'more than 100'} would, if the spread is "
                     "as it seems.")
    if budgets := study.other_budgets(experiments, baseline):
        lines.append("Unequal budgets, so a difference is not of the change alone: "
                     + "; ".join(f"{label} {n:,} tokens" for label, n in budgets.items()) + ".")
    return "\n".join(lines)


def format_same_configurations(groups, experiments):
    """Lines that say which names are one configuration, and how far its runs lie apart."""
    lines = []
    for labels in groups:
        losses = sorted({(study.seeds_of(run), run["test_loss"])
                         for label in labels for run in experiments[label]}, key=lambda x: x[1])
        losses = [loss for _, loss in losses]
        found = (f"{len(losses)} different runs, {losses[0]:.6f} to {losses[-1]:.6f}, "
                 f"SD {stats.sample_sd(losses):.4f}" if len(losses) > 1 else
                 f"All runs have one loss, {losses[0]:.6f}")
        lines.append(f"One configuration, whatever ran it: {', '.join(labels)}. {found}.")
    return "\n".join(lines)


def format_noise(result, markdown):
    cells = [["varies", "n", "mean", "SD (sample)", "95 % interval", "SD (population)", "lowest",
              "highest"]]
    for row in result["sources"]:
        cells.append([row["source"], str(row["n"]), f"{row['mean']:.6f}", f"{row['sd']:.6f}",
                      format_interval(row.get("sd_interval"), ".4f"),
                      f"{row['population_sd']:.6f}",
                      f"{row['lowest']:.6f}", f"{row['highest']:.6f}"])
    named = [f"{name} {sd:.4f}" for effect, name in EFFECTS.items()
             if (sd := result["sd_by_effect"][effect]) is not None]
    mixed_in = [name for effect, name in EFFECTS.items() if result["sd_by_effect"][effect] is None]
    remark = f" ({', '.join(mixed_in)}: not varied, or part of the rest)" if mixed_in else ""
    return "\n".join([
        format_table(cells, markdown), "",
        f"SD by a mixed model of all runs (REML): {', '.join(named)}{remark}.",
        f"95 % interval of the mean: {format_interval(result['mean_interval'], '.4f')}; "
        f"of one more run: {format_interval(result['one_more_run'], '.4f')}."])


EFFECTS = {"weights": "initial weights", "loop": "loop", "rest": "rest"}


def format_fit(name, fit, sizes):
    lines = [f"{name}: {fit['n']} runs, global batch {min(sizes):g} to {max(sizes):g}",
             "loss = a ln(B)^2 + b ln(B) + c: "
             f"a {fit['a']:.7f}, b {fit['b']:.7f}, c {fit['c']:.7f}"]
    if fit["optimum"] is None:
        return "\n".join([*lines, "the curve has no lowest point: a is not positive"])
    optimum = f"optimum {fit['optimum']:.1f}"
    predicted = f"predicted loss there {fit['predicted']:.3f}"
    if fit["df"]:
        interval = format_interval(fit["optimum_interval"], ".1f") or "without an end"
        optimum += f" (95 % interval, Fieller's: {interval})"
        predicted += f" (95 % interval {format_interval(fit['predicted_interval'], '.3f')})"
    else:
        exact = " (no interval: three runs fit three coefficients exactly)"
        optimum, predicted = optimum + exact, predicted + exact
    if not min(sizes) <= fit["optimum"] <= max(sizes):
        optimum += "; beyond the sizes measured, so do not trust it"
    return "\n".join([*lines, optimum, predicted])


def format_scaling(result, markdown):
    """The power laws of scaling.analyse, its predictions and token shares."""
    target, baseline = result["target"], result["baseline"]
    losses = [["experiment", "n", "parameters", "tokens", "test loss"]]
    laws = [["experiment", "law", "95 % of the floor", "95 % of the exponent", "predicted",
             "95 % interval", "measured", "error"]]
    for recipe in result["recipes"]:
        losses += [[recipe["name"], str(row["n"]), f"{row['parameters']:,}", f"{row['tokens']:,}",
                    f"{row['loss']:.6f}"] for row in recipe["losses"]]
        law, intervals, measured = recipe["law"], recipe["law_intervals"], recipe.get("measured")
        laws.append([recipe["name"], f"{law['floor']:.3f} + {law['gain']:.3f} "
                     f"(N / {law['smallest']:,})^-{law['exponent']:.3f}",
                     format_sampled(intervals["floor"], ".3f"),
                     format_sampled(intervals["exponent"], ".3f"), f"{recipe['predicted']:.4f}",
                     format_sampled(recipe["predicted_interval"], ".4f"),
                     format_number(measured, ".4f"),
                     measured and f"{measured / recipe['predicted'] - 1:+.2%}" or ""])
    shares = [["experiment", "parameters", f"share of {baseline}'s tokens", "95 % interval",
               "times fewer", "beyond"]]
    shares += [[row["name"], f"{row['parameters']:,}", f"{row['share']:.3f}",
                format_sampled(row["interval"], ".3f"),
                format_number(1 / row["share"] if row["share"] else None, ".2f"),
                "beyond" * row["beyond"]] for row in result["shares"]]
    parts = [format_table(losses, markdown), *[
        f"No law for {name}: at some size it has no runs of {baseline}'s tokens."
        for name in result["without_law"]],
             f"Loss = floor + gain (N / smallest N)^-exponent over {len(result['fitted'])} sizes, "
             f"{result['fitted'][0]:,} to {result['fitted'][-1]:,} parameters; predicted: at "
             f"{target:,}. The intervals cover the seeds, not a law of another form.",
             format_table(laws, markdown)]
    if len(shares) > 1:
        parts += [f"With which share of {baseline}'s tokens the others reach its loss, by a line "
                  "over ln(tokens) between their budgets (beyond: outside them). The intervals "
                  "cover seeds and, where results have them, the choice of the test documents.",
                  format_table(shares, markdown)]
        parts += [f"{name}: share ~ N^{trend['exponent']:.3f} (95 % interval "
                  f"{format_sampled(trend['interval'], '.3f')})."
                  for name, trend in sorted(result["trends"].items())]
    return "\n\n".join(parts)
