"""Compares runs: which change lowers the loss, by how much, and what is not shown.

    python study.py out/lab                          every run in the folder that eval.py measured
    python study.py 'out/lab/*/*' --baseline=modern --plot=lab.png
    python study.py studies/lab/results.json         a study that is on record
    python study.py out/lab --validation             by validation loss: nothing need be measured

RUNS are run folders, folders of runs, checkpoints, globs in quotes, and results files: what --json
writes, or by hand [{"name": "baseline", "test_loss": 3.69, "seed": 42}, ...] with any options.
Runs of one name that differ only in their seeds are one experiment. Without --baseline, the
experiments are compared with the one named baseline.
"""

import csv
import sys
import textwrap
from pathlib import Path

from nanolab.common import UserError, argument_parser, run_script, write_atomically
from nanolab.study import tables
from nanolab.study.runs import (FACTS, as_json, choose_baseline, group_by_experiment, has_loss,
                                read_file, read_runs)


def main():
    args = parse_arguments()
    loss = "val_loss" if args.validation else "test_loss"
    runs, unmeasured, unfinished = read_runs(args.runs, args.validation)
    compared = [run for run in runs if has_loss(run, loss)]
    missing = format_missing(runs, loss, unmeasured, unfinished)
    if not compared:
        raise UserError("; ".join(missing) or f"{' '.join(args.runs)}: no runs")
    check_data(compared, args.validation)
    experiments = group_by_experiment(compared)
    baseline = choose_baseline(experiments, args.baseline)
    rows = tables.compare(experiments, baseline, loss)
    print_table(args, rows, baseline, loss)
    print(*missing, sep="\n", end="\n" if missing else "")
    write_files(args, runs, rows, experiments, baseline)


def format_missing(runs, loss, unmeasured, unfinished):
    """Lines that name the runs that are not in the table, and say why."""
    lines = []
    if unmeasured:
        lines.append(f"not measured: python eval.py --ckpt {' '.join(unmeasured)}")
    lines += [f"missing: {folder} has not ended (the same command with --resume goes on)"
              for folder in unfinished]
    lines += [f"missing: {run.get('path', run['name'])} has no {loss} that is a number"
              for run in runs if not has_loss(run, loss)]
    return lines


def check_data(runs, validation):
    """Raises UserError if the runs were tested, or validated, on different data."""
    data = {not validation and run.get("test_sha256") or run.get("dataset")
            or run["config"].get("dataset") for run in runs}
    if len(data) > 1:
        raise UserError("these runs were measured on different data, so their losses cannot be "
                        "compared; show another study's differences with --beside")


def print_table(args, rows, baseline, loss):
    beside = None
    if args.beside:
        others = group_by_experiment([run for run in read_file(args.beside)
                                      if has_loss(run, loss)])
        path = Path(args.beside)
        title = path.parent.name if path.stem == "results" else path.stem
        beside = title, tables.compare(others, choose_baseline(others, None), loss)
    sentences = [tables.format_heading(rows, baseline, loss), tables.format_legend(rows),
                 tables.format_notes(rows, baseline)]
    if args.markdown:
        sentences[1] = ""  # studies/README.md explains the words
    else:
        sentences = map(wrapped, sentences)
    heading, *more = sentences
    table = tables.format_comparison(rows, args.markdown, args.all, beside)
    print("\n\n".join(filter(None, [heading, table, *more])))


def wrapped(text):
    return "\n".join(textwrap.fill(line, 100) for line in text.splitlines())


def write_files(args, runs, rows, experiments, baseline):
    if args.json:
        write_atomically(args.json, as_json(runs, rows=rows))
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            columns = [key for key in dict.fromkeys(key for row in rows for key in row)
                       if key not in ("losses", "gaps", "resampled")]
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
    if args.plot or args.curves:
        from nanolab.study import plots  # matplotlib takes a second
        if args.plot:
            plots.plot_comparison(rows, baseline, args.plot)
        if args.curves:
            plots.plot_curves(experiments, baseline, args.curves)
    for path in filter(None, (args.json, args.csv, args.plot, args.curves)):
        print(f"wrote {path}", file=sys.stderr)


def parse_arguments():
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUNS", help="folders, checkpoints, globs, results files")
    add("--baseline", metavar="NAME",
        help="the experiment that the others are compared with (default: baseline)")
    add("--validation", action="store_true",
        help="compare validation losses: to choose among experiments without the test split")
    add("--beside", metavar="FILE.json", help="results of another study, to show its differences")
    add("--all", action="store_true", help="more columns: SD, the interval if the test set were "
                                           "resampled, how it was tested, speed, hours, cost")
    add("--markdown", action="store_true", help="print the table as Markdown, without a legend")
    add("--json", metavar="FILE", help="write the runs and the table's rows")
    add("--csv", metavar="FILE", help="write the table's rows")
    add("--plot", metavar="FILE.png", help="draw the differences and their intervals")
    add("--curves", metavar="FILE.png", help="draw the loss curves over the baseline's")
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main)
