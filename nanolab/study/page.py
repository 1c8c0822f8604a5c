"""study.html: a study on one page, while it goes and after."""

import html
import os
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

from nanolab.charts import curves_chart, differences_chart
from nanolab.common import UserError, code_name
from nanolab.log import curve, having, read_entries
from nanolab.report import ZOOMING, chart, format_page, format_samples, html_table
from nanolab.study import tables
from nanolab.study.runs import (changed_objective, group_by_experiment, read_run, relevant_options,
                                seeds_of, settings)


def study_page(path, status, runs, rows, baseline, loss, more="", is_running=False):
    """The page for the file `path`, as text.

    runs: all that there are, measured or not; rows: tables.compare's, of those that are; baseline:
    an experiment, or None; loss: "test_loss" or "val_loss"; more: lines about what is missing.
    """
    experiments = in_order(group_by_experiment(runs), rows, baseline)
    logs = read_logs(runs)
    sections, charts = {}, {}
    if rows:
        header, *cells = tables.comparison_cells(rows)
        sections["Verdicts"] = (
            paragraphs(tables.format_heading(rows, baseline, loss)) + html_table(cells, header)
            + paragraphs(tables.format_legend(rows))
            + paragraphs(tables.format_notes(rows, baseline)))
    sections["Missing"] = paragraphs(more)
    if any("difference" in row for row in rows):
        charts["differences"] = differences_chart(rows, baseline)
        sections["Differences"] = chart("differences", "Bars: the 95 % intervals of the verdicts. "
                                                       "Grey ticks: the seeds.")
    if logs:
        charts["curves"] = study_curves(experiments, baseline, logs)
        sections["Curves"] = chart("curves", ZOOMING) + paragraphs(
            format_objectives(experiments, baseline))
    sections["Options that differ"] = html_table(
        differing_options(experiments, baseline if baseline in experiments else
                          next(iter(experiments), None)).items())
    sections["Samples"] = format_samples(last_samples(experiments, logs))
    sections["Runs"] = html_table(
        [cells_of_run(label, run, path) for label, runs in experiments.items() for run in runs],
        ["run", "seed", "test loss", "validation", "minutes", "tokens/s", "code", "machine"])
    return format_page(str(Path(path).parent), status, sections, charts, is_running)


def paragraphs(text):
    return "".join(f"<p>{html.escape(line)}</p>\n" for line in text.splitlines())


def in_order(experiments, rows, baseline):
    """The experiments, the baseline first, then from the best to the worst."""
    order = [baseline, *(row["experiment"] for row in rows), *experiments]
    return {label: experiments[label] for label in dict.fromkeys(order) if label in experiments}


def read_logs(runs):
    """{path of a run: the entries of its log}, without those that are missing, empty or of another
    run, which has since been made where one on record was."""
    logs = {}
    for run in runs:
        with suppress(OSError, KeyError, UserError):
            if read_run(run["path"], validation=True).get("ended") == run.get("ended"):
                logs[run["path"]] = read_entries(Path(run["path"]).with_name("log.jsonl"))
    return {path: entries for path, entries in logs.items() if entries}


def study_curves(experiments, baseline, logs):
    """The chart of the losses, and of their differences to the baseline's of the same seeds at as
    many tokens."""
    of_baseline = {seeds_of(run): run.get("path") for run in experiments.get(baseline, ())}
    curves = [(e, f"seed {settings(run)['seed']}",
               *curve(logs[run["path"]], logs.get(of_baseline.get(seeds_of(run)), ())))
              for e, runs in enumerate(experiments.values()) for run in runs
              if run.get("path") in logs]
    return curves_chart(list(experiments), curves, baseline)


def format_objectives(experiments, baseline):
    """Says whose training loss is none to compare; "" if all are."""
    if baseline not in experiments:
        return ""
    changed = {label: changed_objective(runs[0], experiments[baseline][0])
               for label, runs in experiments.items()}
    return "\n".join(f"{label} changes the training loss itself ({', '.join(keys)}): compare its "
                     "circles only." for label, keys in changed.items() if keys)


def differing_options(experiments, usual):
    """{label: its options that differ from those of the experiment `usual`}"""
    options = {label: set(relevant_options(runs[0]).items()) for label, runs in experiments.items()}
    return {label: ", ".join(f"{key}={value}" for key, value in sorted(each - options[usual]))
            for label, each in options.items() if label != usual}


def last_samples(experiments, logs):
    """[(where from, text)]: of each experiment the last sample of its first run that has one."""
    for label, runs in experiments.items():
        samples = [having("sample", logs.get(run.get("path"), ()))[-1:] for run in runs]
        for entry in sum(samples, [])[:1]:
            yield f"{label}, after {entry['tokens']:,} tokens", entry["sample"]


def cells_of_run(label, run, page):
    if "path" in run:  # which a file written by hand has not
        report = os.path.relpath(Path(run["path"]).with_name("report.html"), Path(page).parent)
        label = quote(report), label
    minutes = run["seconds"] / 60 if run.get("seconds") is not None else None
    numbers = ((run.get("test_loss"), ".4f"), (run.get("val_loss"), ".4f"), (minutes, ".1f"),
               (run.get("tokens_per_second"), ",.0f"))
    return [label, settings(run)["seed"],
            *(tables.format_number(*number) for number in numbers),
            ", then ".join(map(code_name, run.get("code") or ())), run.get("machine", "")]
