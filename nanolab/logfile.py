"""Reads log.jsonl, the log of a run, and smooths its loss."""

from pathlib import Path

import numpy as np

from nanolab.common import parse_json


def read_log(path):
    """-> (training entries, validation entries), as dicts. None: a number that was not finite."""
    entries = [parse_json(line) for line in Path(path).read_text().splitlines()]
    return [e for e in entries if "loss" in e], [e for e in entries if "val_loss" in e]


def smooth(losses):
    """The running mean over a fiftieth of the run: (n, means), means[i] that of losses[i:i + n]."""
    n = max(len(losses) // 50, 1)
    return n, np.convolve(losses, np.ones(n) / n, mode="valid")
