"""Pictures: of a run its loss; of a study its table, noise, batch-size fit and loss curves.

matplotlib is imported at the first picture, because every process of train.py imports this file.
"""

import gc
import io
import itertools
import math

import numpy as np

from nanolab.common import UserError
from nanolab.logfile import smooth
from nanolab.stats import curve, curve_interval


def plot_run(train, val, config):
    """Draws a run's loss, learning rate and gradient norm over its tokens. -> a PNG file, bytes

    train, val: as read_log returns them.
    """
    tokens, losses = millions_of_tokens(train), series(train, "loss")
    n, means = smooth(losses)
    figure, (top, middle, bottom) = new_figure(3, 1, figsize=(9, 9), sharex=True,
                                               height_ratios=(4, 1, 1))

    per_bin = plot_band(top, tokens, losses)
    top.collections[-1].set_label(f"training, smallest to largest of {per_bin} steps"
                                  if per_bin > 1 else "training, each step")
    top.plot(tokens[n // 2:][:len(means)], means, color="black", linewidth=1.4,
             label=f"training, mean of the {n} steps around")
    top.plot(millions_of_tokens(val), series(val, "val_loss"), "o", color="black",
             markerfacecolor="white", label="validation")
    measured = [entry for entry in val if entry["val_loss"] is not None]
    if measured:
        best = min(measured, key=lambda entry: entry["val_loss"])
        top.plot(best["tokens"] / 1e6, best["val_loss"], "o", color="black",
                 label=f"best.pt: {best['val_loss']:.4f} after {best['step']:,} steps")
    skipped = [entry for entry in train if entry.get("skipped")]
    if skipped:
        top.plot(millions_of_tokens(skipped), [0.015] * len(skipped), "|", color="red",
                 transform=top.get_xaxis_transform(), label=f"skipped updates: {len(skipped):,}")
    finite = losses[np.isfinite(losses)]
    if len(finite):
        top.set_ylim(finite.min() - 0.1, np.quantile(finite, 0.98) + 0.1)
    top.set_ylabel("loss, nats per token")
    top.set_title(config.name)
    top.legend(frameon=False)

    middle.plot(tokens, series(train, "lr"), color="black", linewidth=1)
    middle.set_ylim(0)
    middle.set_ylabel("learning rate")

    plot_band(bottom, tokens, series(train, "grad_norm"))
    if config.grad_clip:
        bottom.axhline(config.grad_clip, color="black", linestyle="--", linewidth=1,
                       label=f"clipped at {config.grad_clip:g}")
        bottom.legend(frameon=False)
    bottom.set_yscale("log")
    bottom.set_ylabel("gradient norm")
    bottom.set_xlabel("training tokens, millions")
    png = io.BytesIO()
    save_figure(figure, png, dpi=120)
    return png.getvalue()


def plot_band(ax, x, y, n_bins=800):
    """Fills from the smallest to the largest y of each bin: about a pixel each, so that no value
    is lost among its neighbours. -> values in each bin"""
    per_bin = -(-len(y) // n_bins)
    starts = np.arange(0, len(y), per_bin)
    ax.fill_between(x[starts], np.fmin.reduceat(y, starts), np.fmax.reduceat(y, starts),
                    color="0.75", linewidth=0.6)
    return per_bin


def plot_comparison(rows, baseline, path):
    """Draws the rows of study.compare."""
    lines, band = [], None
    for row in rows:
        remark = ""
        if "difference" in row:
            remark = f"{row['difference']:+.4f}  {row.get('verdict', row['compared'])}"
        lines.append((f"{row['experiment']} ({row['n']})", row["losses"],
                      row.get("mean_interval"), remark))
        if row["experiment"] == baseline:
            band = row.get("one_more_run")
    title = ("Circles: runs. Diamond and bar: mean and its 95 % interval, uncorrected.\n"
             "Right: difference to the baseline, and verdict, corrected.\n"
             "Grey: where one more run of the baseline would fall, 95 times in 100.")
    plot_lines(lines, band, title, path)


def plot_noise(result, path):
    """Draws the sources of study.noise."""
    lines = [(f"{row['source'].split(' (')[0].split(',')[0]} ({row['n']})", row["losses"], None,
              f"SD {row['sd']:.4f}") for row in result["sources"]]
    title = ("Runs of one experiment that differ in their seeds, by what the seeds vary.\n"
             "Circles: runs. Diamond: their mean. Right: their standard deviation.\n"
             "Grey: where one more run would fall, 95 times in 100; its line: the middle.")
    plot_lines(lines, result["one_more_run"], title, path)


def plot_lines(lines, band, title, path):
    """Draws a line for each set of runs: a circle for each run, the mean and its interval.

    lines: (label, losses, interval of the mean or None, remark for the right margin).
    band: the ends of the grey band, or None.
    """
    figure, ax = new_figure(figsize=(10, 1.6 + 0.42 * len(lines)))
    if band:
        ax.axvspan(*band, color="0.9", linewidth=0)
        ax.axvline(np.mean(band), color="0.6", linewidth=0.8)
    heights = range(len(lines), 0, -1)
    for y, (_, losses, interval, remark) in zip(heights, lines):
        ax.plot(losses, [y] * len(losses), "o", color="0.45", markerfacecolor="none", markersize=5)
        if interval:
            ax.plot(interval, [y, y], color="black", linewidth=1.6)
        ax.plot(np.mean(losses), y, "D", color="black", markersize=5)
        ax.text(1.01, y, remark, transform=ax.get_yaxis_transform(), va="center", fontsize=9)
    ax.set_yticks(heights, [label for label, *_ in lines])
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.set_ylim(0.3, len(lines) + 0.7)
    ax.set_xlabel("test loss, nats per token")
    ax.set_title(title, loc="left", fontsize=10)
    save_figure(figure, path)


def plot_fit(name, fit, sizes, losses, path):
    """Draws stats.fit_batch_size over the runs that it fits."""
    figure, ax = new_figure(figsize=(8, 5))
    x = np.linspace(math.log(min(sizes)) - 0.2, math.log(max(sizes)) + 0.2, 200)
    if fit["df"]:
        ax.fill_between(np.exp(x), *curve_interval(fit, x), color="0.9", linewidth=0,
                        label="95 % interval of the curve")
    ax.plot(np.exp(x), curve(fit, x), color="black", linewidth=1.4,
            label=f"{fit['a']:.4f} ln(B)$^2$ {fit['b']:+.4f} ln(B) {fit['c']:+.4f}")
    ax.plot(sizes, losses, "o", color="black", markerfacecolor="white", label="runs")
    if fit["optimum"] and min(sizes) <= fit["optimum"] <= max(sizes):
        ends = fit["optimum_interval"]
        interval = " ({:.0f} to {:.0f})".format(*ends) if ends else ""
        ax.axvline(fit["optimum"], color="black", linestyle="--", linewidth=0.8,
                   label=f"optimum {fit['optimum']:.1f}{interval}")
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda size, _: f"{size:g}")
    ax.set_ylim(min(losses) - 0.3 * np.ptp(losses), max(losses) + 0.3 * np.ptp(losses))
    ax.set_xlabel("global batch, sequences")
    ax.set_ylabel("test loss, nats per token")
    ax.set_title(name, loc="left")
    ax.legend(frameon=False)
    save_figure(figure, path)


def plot_scaling(result, path):
    """Draws scaling.analyse: loss over parameters with the laws; the shares over parameters."""
    figure, (left, right) = new_figure(1, 2, figsize=(11, 4.5))
    target, without_end = result["target"], (np.nan, np.nan)
    x = np.geomspace(result["fitted"][0], target * 1.1, 100)
    names = [recipe["name"] for recipe in result["recipes"]]
    names += [row["name"] for row in result["shares"]]
    markers = dict(zip(dict.fromkeys(names), itertools.cycle("osD^v")))
    for recipe in result["recipes"]:
        law, points = recipe["law"], recipe["losses"]
        left.plot(x, law["floor"] + law["gain"] * (x / law["smallest"]) ** -law["exponent"],
                  color="black", linewidth=0.8)
        left.plot([row["parameters"] for row in points], [row["loss"] for row in points],
                  markers[recipe["name"]], color="black", markerfacecolor="white",
                  label=recipe["name"])
        left.plot([target, target], recipe["predicted_interval"] or without_end, color="black",
                  linewidth=5, alpha=0.3)
    left.axvline(target, color="0.8", linewidth=0.8, zorder=0)
    left.set_title("Curves: fitted to the sizes left of the grey line. Bars: predicted there.",
                   loc="left", fontsize=10)
    left.set_ylabel("test loss, nats per token")
    for name in dict.fromkeys(row["name"] for row in result["shares"]):
        rows = [row for row in result["shares"] if row["name"] == name]
        sizes, found = [row["parameters"] for row in rows], [row["share"] for row in rows]
        for row in rows:
            right.plot([row["parameters"]] * 2, row["interval"] or without_end, color="black",
                       linewidth=1)
        right.plot(sizes, found, f"{markers[name]}-", color="black", markerfacecolor="white",
                   linewidth=0.8, label=name)
    right.set_yscale("log")
    right.axhline(1, color="0.8", linewidth=0.8, zorder=0)
    ticks = [tick for tick in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
             if right.get_ylim()[0] <= tick <= right.get_ylim()[1]]
    right.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    right.set_title(f"Share of {result['baseline']}'s tokens for its loss", loc="left", fontsize=10)
    for ax in (left, right):
        ax.set_xscale("log")
        ax.set_xticks([*result["fitted"], target],
                      [f"{size / 1e6:.2g}M" for size in (*result["fitted"], target)])
        ax.minorticks_off()
        ax.set_xlabel("parameters")
        if ax.lines:
            ax.legend(frameon=False)
    save_figure(figure, path)


def plot_curves(logs, baseline, path):
    """Draws a panel for each experiment: the losses of its runs over those of the baseline.

    logs: {label: [log, ...]}, each log as read_log returns it.
    """
    labels = [label for label in logs if label != baseline] or [baseline]
    n_columns = min(len(labels), 3)
    n_rows = math.ceil(len(labels) / n_columns)
    figure, axes = new_figure(n_rows, n_columns, sharex=True, sharey=True, squeeze=False,
                              figsize=(4.2 * n_columns, 3 * n_rows + 0.6))
    for ax, label in zip(axes.flat, labels):
        for shown, color in ((baseline, "0.7"), (label, "black")):
            for i, (train, val) in enumerate(logs.get(shown, [])):
                n, means = smooth(series(train, "loss"))
                ax.plot(millions_of_tokens(train)[n - 1:], means, color=color, linewidth=0.8,
                        label=shown if i == 0 else None)
                ax.plot(millions_of_tokens(val), series(val, "val_loss"), "o", color=color,
                        markerfacecolor="white", markersize=3.5)
        ax.set_title(label, loc="left", fontsize=10)
        ax.legend(frameon=False, fontsize=8)
    for ax in axes.flat[len(labels):]:
        ax.set_visible(False)
    for ax in axes.flat[max(len(labels) - n_columns, 0):len(labels)]:  # the lowest of each column
        ax.tick_params(labelbottom=True)

    # The limits follow from the losses after the first tenth of each run.
    means = [smooth(series(train, "loss"))[1] for runs in logs.values() for train, _ in runs]
    late = np.concatenate([each[len(each) // 10:] for each in means])
    axes.flat[0].set_ylim(np.nanmin(late) - 0.1, np.nanquantile(late, 0.98) + 0.2)
    figure.supxlabel("training tokens, millions", fontsize=10)
    figure.supylabel("loss, nats per token\ntraining: lines, smoothed\nvalidation: circles",
                     fontsize=10)
    save_figure(figure, path)


def series(entries, key):
    """One figure of a log's entries, as an array; NaN where the log has none."""
    return np.array([entry[key] for entry in entries], float)


def millions_of_tokens(entries):
    return series(entries, "tokens") / 1e6


def import_matplotlib():
    """-> pyplot, for files only"""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def new_figure(*shape, **options):
    """plt.subplots without the frame's top and right line."""
    plt = import_matplotlib()
    figure, axes = plt.subplots(*shape, layout="constrained", **options)
    for ax in np.ravel(axes):
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure, path, dpi=150):
    import matplotlib.pyplot as plt
    try:
        figure.savefig(path, dpi=dpi)
    except ValueError as error:  # a suffix that matplotlib cannot write
        raise UserError(f"{path}: {error}") from None
    finally:
        plt.close(figure)
        gc.collect()  # its cycles hold megabytes, and a training loop hardly starts the collector
