"""Moved to nanolab/plots.py; what still imports this file does so until it is rewritten."""

from nanolab.plots import having, read_entries, read_log, smooth  # noqa: F401
