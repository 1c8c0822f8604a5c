"""Pictures of a study: its differences, and its loss curves. Text is at least 9 points high where
the picture is 830 pixels wide."""

import math
from pathlib import Path

import numpy as np

from nanolab.common import UserError
from nanolab.plots import millions_of_tokens, new_figure, read_log, save_figure, series, smooth

# Blue and orange, filled and hollow: everybody can tell them apart, also in black and white.
LOOK = {"better": ("#0072b2", "#0072b2"), "worse": ("#d55e00", "white")}
NOT_SHOWN = ("0.45", "white")
WIDTH = 8.3  # inches


def plot_comparison(rows, baseline, path):
    """Draws each difference with the interval that its verdict uses; the best on top."""
    rows = [row for row in rows if "difference" in row]
    if not rows:
        raise UserError("--plot draws differences: --baseline must name an experiment")
    figure, ax = new_figure(figsize=(WIDTH, 1.1 + 0.32 * len(rows)))
    ax.axvline(0, color="0.6", linewidth=1)
    for y, row in enumerate(rows):
        edge, face = LOOK.get(row["verdict"], NOT_SHOWN)
        ax.plot(row["gaps"], [y] * len(row["gaps"]), "|", color="0.6", markersize=7)
        if "low" in row:
            ax.plot([row["low"], row["high"]], [y, y], color=edge, linewidth=2)
        ax.plot(row["difference"], y, "o", color=edge, markerfacecolor=face, markersize=7)
        ax.text(1.01, y, f"{row['difference']:+.4f}  {row['verdict']}", va="center",
                transform=ax.get_yaxis_transform())
    ax.set_yticks(range(len(rows)), [f"{row['experiment']} ({row['n']})" for row in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.set_xlabel(f"difference in loss to {baseline}, nats per token; bars: the 95 % intervals of "
                  "the verdicts")
    save_figure(figure, path)


def plot_curves(experiments, baseline, path):
    """Draws a panel for each experiment: the loss curves of its runs, smoothed, and over them the
    baseline's. Raises UserError if a log is missing."""
    logs = {label: [read_run_log(run) for run in runs] for label, runs in experiments.items()}
    curves = {label: [smooth_curve(train) for train, _ in each] for label, each in logs.items()}
    labels = [label for label in logs if label != baseline] or [baseline]
    n_columns = min(len(labels), 2)
    n_rows = math.ceil(len(labels) / n_columns)
    figure, axes = new_figure(n_rows, n_columns, sharex=True, sharey=True, squeeze=False,
                              figsize=(WIDTH, 2.8 * n_rows + 0.6))
    for ax, label in zip(axes.flat, labels):
        shown = dict.fromkeys([label, baseline or label])
        for each in shown:  # the baseline last, so on top
            color = "black" if each == baseline else LOOK["better"][0]
            for tokens, losses in curves[each]:
                ax.plot(tokens, losses, color=color, linewidth=0.8)
            for _, val in logs[each]:
                ax.plot(millions_of_tokens(val), series(val, "val_loss"), "o", color=color,
                        markerfacecolor="white", markersize=3.5)
        lowest_first = sorted(shown, key=lambda each: curves[each][0][1][-1])
        for each, above in zip(lowest_first, (len(shown) == 1, True)):
            tokens, losses = curves[each][0]
            ax.annotate(each, (tokens[-1], losses[-1]), (0, 14 if above else -14), ha="right",
                        va="center", textcoords="offset points",
                        color="black" if each == baseline else LOOK["better"][0])
    for ax in axes.flat[len(labels):]:
        ax.set_visible(False)
    for ax in axes.flat[max(len(labels) - n_columns, 0):len(labels)]:  # the lowest of each column
        ax.tick_params(labelbottom=True)
    late = np.concatenate([losses[len(losses) // 10:] for each in curves.values()
                           for _, losses in each])
    axes.flat[0].set_ylim(np.nanmin(late) - 0.2, np.nanquantile(late, 0.98) + 0.2)
    figure.supxlabel("training tokens, millions", fontsize=10)
    figure.supylabel("loss: lines training, circles validation", fontsize=10)
    save_figure(figure, path)


def smooth_curve(train):
    """-> millions of tokens, running means of the training loss"""
    n, means = smooth(series(train, "loss"))
    return millions_of_tokens(train)[n - 1:], means


def read_run_log(run):
    """-> (training entries, validation entries). Raises UserError."""
    path = Path(run.get("path", f"{run['name']}/best.pt")).with_name("log.jsonl")
    try:
        return read_log(path)
    except (OSError, ValueError, TypeError):
        raise UserError(f"--curves needs the run's {path}, which is missing or damaged") from None
