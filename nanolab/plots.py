"""What a run looks like: its log read, and loss.png.

matplotlib is imported at the first picture: every process of train.py imports this file.
"""

import gc
import io
import os
from pathlib import Path

import numpy as np

from nanolab.common import UserError, parse_json


def read_entries(path):
    """All lines, as dicts. None: a number that was not finite."""
    return [parse_json(line) for line in Path(path).read_text().splitlines()]


def last_entry(path):
    """The last whole line of a log that may be being written, as a dict; None if there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(os.path.getsize(path) - 2**14, 0))
            for line in reversed(file.read().split(b"\n")[:-1]):
                return parse_json(line)
    except (OSError, ValueError):
        return None


def read_log(path):
    """-> (training entries, validation entries)"""
    entries = read_entries(path)
    return having("loss", entries), having("val_loss", entries)


def having(key, entries):
    return [entry for entry in entries if key in entry]


def smooth(losses):
    """The running mean over a fiftieth of the run: (n, means), means[i] that of losses[i:i + n]
    without those that are NaN."""
    n = max(len(losses) // 50, 1)
    is_number = np.isfinite(losses)
    sums, counts = (np.cumsum(np.concatenate(([0.0], values)))
                    for values in (np.where(is_number, losses, 0), is_number))
    sums, counts = sums[n:] - sums[:-n], counts[n:] - counts[:-n]
    return n, np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)


def plot_run(train, val, config):
    """Draws a run's loss, learning rate and gradient norm over its tokens. -> a PNG file, bytes

    train, val: as read_log returns them. The grey band has a bin for about every pixel, from its
    smallest to its largest value, so that no spike is lost.
    """
    from matplotlib.ticker import LogLocator, NullLocator
    tokens, losses = millions_of_tokens(train), series(train, "loss")
    n, means = smooth(losses)
    figure, (top, middle, bottom) = new_figure(3, 1, figsize=(9, 9), sharex=True,
                                               height_ratios=(4, 1, 1))

    per_bin = plot_band(top, tokens, losses)
    top.collections[-1].set_label(f"training, range of {per_bin} steps" if per_bin > 1
                                  else "training, each step")
    if n > 1:
        top.plot(tokens[n // 2:][:len(means)], means, color="black", linewidth=1.4,
                 label=f"training, mean of {n} steps")
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
    bottom.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator(),
                     major_formatter="{x:g}")
    bottom.set_ylabel("gradient norm")
    bottom.set_xlabel("training tokens, millions")
    png = io.BytesIO()
    save_figure(figure, png, dpi=120)
    return png.getvalue()


def plot_band(ax, x, y, n_bins=800):
    """Fills from the smallest to the largest y of each bin. -> values in each bin"""
    per_bin = -(-len(y) // n_bins)
    starts = np.arange(0, len(y), per_bin)
    ax.fill_between(x[starts], np.fmin.reduceat(y, starts), np.fmax.reduceat(y, starts),
                    color="0.75", linewidth=0.6)
    return per_bin


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
