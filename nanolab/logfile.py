"""Reads log.jsonl, the log of a run, and smooths its loss."""

from pathlib import Path

import numpy as np

from nanolab.common import parse_json


def read_entries(path):
    """All lines, as dicts. None: a number that was not finite."""
    return [parse_json(line) for line in Path(path).read_text().splitlines()]


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
