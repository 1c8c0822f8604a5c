"""The log of a run: its lines, and the curves that charts draw of it."""

import json
from contextlib import suppress
from pathlib import Path

import numpy as np


def read_entries(path):
    """The lines of a log.jsonl, as dicts, without damaged ones. None: a number not finite."""
    entries = []
    for line in Path(path).read_text(errors="replace").splitlines():
        with suppress(ValueError, AttributeError):
            entry = json.loads(line)
            entries += [entry] if {"step", "tokens"} <= entry.keys() else []
    return entries


def having(key, entries):
    return [entry for entry in entries if key in entry]


def series(entries, key):
    """One figure of a log's entries, as an array; NaN where the log has none."""
    return np.array([entry.get(key) for entry in entries], float)


def curve(entries, paired=()):
    """The curve of a run: its columns of the training and of the validations.

    -> two arrays (5, n): millions of tokens, loss, its difference to that of `paired`, entries of
    another log, at as many tokens, learning rate and gradient norm; NaN where there is none.
    """
    def columns(key):
        found = having(key, entries)
        theirs = {entry["tokens"]: entry[key] for entry in having(key, paired)}
        other = np.array([theirs.get(entry["tokens"]) for entry in found], float)
        losses = series(found, key)
        return np.stack([series(found, "tokens") / 1e6, losses, losses - other,
                         series(found, "lr"), series(found, "grad_norm")])

    return columns("loss"), columns("val_loss")
