"""Makes the runs of a study and compares them: which idea lowers the loss, by how much, and what is
not shown.

    python study.py config/lab.py --arms qk_norm config/interventions/relu2.py --seeds=5 --jobs=2
    python study.py out/study                        compares what is there
    python study.py 'out/lab/*/*' --baseline=modern --plot=lab.png
    python study.py studies/lab/results.json         a study that is on record
    python study.py out/lab --validation             by validation loss: nothing need be measured

With config files it makes the runs that --out lacks: of the baseline (these files alone) and of
each arm, seed by seed. Flags of train.py apply to all runs. An arm is a name in
config/interventions/, a config file, or NAME='config/x.py --flag=value'. The same command goes on
after Ctrl-C; with a larger --seeds it adds runs. Fix the number of seeds before you look: a study
that stops when it likes its verdict is wrong more often than 5 times in 100.

Else RUNS are run folders, folders of runs, checkpoints, globs in quotes, and results files: what
--json writes, or by hand [{"name": "baseline", "test_loss": 3.69, "seed": 42}, ...] with any
options. Runs of one name that differ only in their seeds are one experiment.
"""

import csv
import sys
import textwrap
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

from nanolab.common import UserError, argument_parser, run_script, write_atomically
from nanolab.study import tables
from nanolab.study.runs import (as_json, choose_baseline, group_by_experiment, has_loss, read_file,
                                read_runs, settings)


def main():
    args = parse_arguments()
    status, failures, stopped = "", {}, False
    if args.words:
        from nanolab.study.jobs import make_runs, plan
        status, failures, stopped = make_runs(plan(args), args,
                                              lambda status: draw_live_page(args, status))
    try:
        study = read_study(args)
        if not (study.rows or args.words):
            raise UserError("; ".join(study.missing) or f"{' '.join(args.runs)}: no runs")
        if study.rows:
            print_table(args, study)
        print(*study.missing, sep="\n", end="\n" if study.missing else "")
        write_files(args, study, status)
    finally:  # what became of the runs says more than an error here, as of --plot without rows
        if failures:
            raise UserError("failed: " + "; ".join(map(": ".join, failures.items())))
        if stopped:
            raise KeyboardInterrupt


def read_study(args):
    """What there is of a study: the table's rows, its baseline, the experiments in the table;
    measured runs, the other ones, and lines about what is missing. Raises UserError."""
    exists = not args.words or any(Path(args.out).rglob("config.json"))
    runs, others, missing = read_runs(args.runs if exists else [], args.loss)
    compared = [run for run in runs if has_loss(run, args.loss)]
    check_data(compared, args.loss)
    experiments = group_by_experiment(compared)
    is_to_come = args.words and args.baseline not in experiments
    baseline = choose_baseline(experiments, None if is_to_come else args.baseline)
    return SimpleNamespace(rows=tables.compare(experiments, baseline, args.loss), baseline=baseline,
                           experiments=experiments, runs=runs, others=others, missing=missing)


def draw_live_page(args, status):
    with suppress(Exception):  # no run of the baseline yet, a full disk: a page ends no study
        write_page(args, read_study(args), status, is_running=True)


def write_page(args, study, status, is_running=False):
    from nanolab.study.page import study_page
    page = study_page(args.page, status, [*study.runs, *study.others], study.rows, study.baseline,
                      args.loss, "\n".join(study.missing), is_running)
    write_atomically(args.page, page)


def check_data(runs, loss):
    """Raises UserError if the runs were tested, or validated, on different data."""
    data = {(loss == "test_loss" and run.get("test_sha256") or run.get("dataset")
             or run["config"].get("dataset"),
             loss == "val_loss" and settings(run)["eval_tokens"]) for run in runs}
    if len(data) > 1:
        raise UserError("these runs were measured on different data, so their losses cannot be "
                        "compared; show another study's differences with --beside")


def print_table(args, study):
    beside, rows, baseline = None, study.rows, study.baseline
    if args.beside:
        others = group_by_experiment([run for run in read_file(args.beside)
                                      if has_loss(run, args.loss)])
        theirs = baseline if baseline in others else choose_baseline(others, None)
        if not theirs:
            raise UserError(f"{args.beside} has no {baseline or 'baseline'} with a {args.loss}")
        path = Path(args.beside)
        title = path.parent.name if path.stem == "results" else path.stem
        beside = title, tables.compare(others, theirs, args.loss)
    cells = tables.comparison_cells(rows, args.all, beside)
    print(wrapped(tables.format_heading(rows, baseline, args.loss), args.markdown), "",
          tables.format_table(cells, args.markdown), sep="\n")
    notes = ["" if args.markdown else tables.format_legend(rows),  # studies/README.md has it
             tables.format_notes(rows, baseline)]
    for text in filter(None, notes):
        print("", wrapped(text, args.markdown), sep="\n")


def wrapped(text, markdown):
    return text if markdown else "\n".join(textwrap.fill(line, 100) for line in text.splitlines())


def write_files(args, study, status):
    rows = study.rows
    if args.json:
        write_atomically(args.json, as_json(study.runs, rows=rows))
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            columns = [key for key in dict.fromkeys(key for row in rows for key in row)
                       if key not in ("losses", "gaps", "resampled")]
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
    if args.page:
        write_page(args, study, status)
    if args.plot or args.curves:
        draw_pictures(args, study)
    for path in filter(None, (args.json, args.csv, args.plot, args.curves, args.page)):
        print(f"wrote {path}", file=sys.stderr)


def draw_pictures(args, study):
    from nanolab import charts
    from nanolab.study import page
    if args.plot:
        if not any("difference" in row for row in study.rows):
            raise UserError("--plot draws differences: --baseline must name an experiment")
        charts.save_picture(charts.differences_chart(study.rows, study.baseline), args.plot)
    if args.curves:
        logs = page.read_logs(study.runs)
        if not logs:
            raise UserError("--curves needs the runs' log.jsonl, which is missing or damaged")
        experiments = page.in_order(study.experiments, study.rows, study.baseline)
        charts.save_picture(page.study_curves(experiments, study.baseline, logs), args.curves)


def parse_arguments():
    """-> the arguments; in `words`, what the command lines of all runs share, or nothing if there
    is nothing to run."""
    parser = argument_parser(__doc__)
    parser.allow_abbrev = False
    add = parser.add_argument
    add("runs", nargs="+", metavar="FILE.py|RUNS",
        help="config files, to make runs; or folders, checkpoints, globs, results files")
    add("--arms", nargs="+", action="extend", metavar="ARM", default=[],
        help="what is compared with the baseline")
    add("--seeds", type=seeds, default="5", metavar="[M-]N",
        help="seeds M, or 1, to N (default: %(default)s)")
    add("--jobs", type=int, default=1, metavar="N",
        help="runs at a time; each has its own GPU, if there are some (default: %(default)s)")
    add("--threads", type=int, default=1, metavar="N",
        help="CPU threads of a run, on which its bits depend (default: %(default)s)")
    add("--out", default="out/study", metavar="FOLDER",
        help="where runs go: FOLDER/NAME/SEED, and study.html (default: %(default)s)")
    add("--baseline", metavar="NAME",
        help="the experiment that the others are compared with (default: baseline)")
    add("--validation", action="store_const", dest="loss", const="val_loss", default="test_loss",
        help="compare validation losses: to choose among experiments without the test split")
    add("--beside", metavar="FILE.json", help="results of another study, to show its differences")
    add("--all", action="store_true", help="more columns: SD, the interval if the test set were "
                                           "resampled, how it was tested, speed, hours, cost")
    add("--markdown", action="store_true", help="print the table as Markdown, without a legend")
    add("--json", metavar="FILE", help="write the runs and the table's rows")
    add("--csv", metavar="FILE", help="write the table's rows")
    add("--page", metavar="FILE.html", help="write a page with table, differences, curves, samples")
    add("--plot", metavar="FILE.png", help="draw the differences and their intervals")
    add("--curves", metavar="FILE.png", help="draw the curves of the baseline and the four best")
    args, flags = parser.parse_known_args()
    makes_runs = [word.endswith(".py") for word in args.runs]
    if any(makes_runs) != all(makes_runs):
        parser.error("config files make runs, anything else is compared: give one of the two")
    if not any(makes_runs):
        if flags or args.arms:
            parser.error(f"{' '.join(flags) or '--arms'} needs a config file, to make runs")
        args.words = []
        return args
    if not args.seeds or min(args.jobs, args.threads) < 1:
        parser.error("--jobs, --threads and the number of --seeds must be at least 1")
    args.words = [*args.runs, *flags]
    args.runs, args.page = [args.out], args.page or f"{args.out}/study.html"
    args.baseline = args.baseline or "baseline"
    return args


def seeds(text):
    first, _, last = text.rpartition("-")
    return range(int(first or 1), int(last) + 1)


if __name__ == "__main__":
    run_script(main, if_interrupted="stopped; the same command goes on")
