"""The test results of a checkpoint, which are saved beside it: NAME.test.json."""

import hashlib
import json
import sys
from pathlib import Path

from nanolab.common import describe, parse_json, write_atomically


def result_path(path):
    return Path(path).with_suffix(".test.json")


def load_result(path):
    """What is saved for the checkpoint as it is: {"checkpoint_sha256": ..., "results": [...]}."""
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        saved = parse_json(result_path(path).read_text())
        if saved["checkpoint_sha256"] == sha256 and type(saved["results"]) is list:
            return saved
    except (OSError, ValueError, KeyError, TypeError):
        pass  # missing or damaged: measure again
    return {"checkpoint_sha256": sha256, "results": []}


def save_result(path, saved):
    try:
        write_atomically(result_path(path), json.dumps(saved, indent=1) + "\n")
    except OSError as error:
        print(f"{path}: the result could not be saved ({describe(error)}); "
              "it will be measured again", file=sys.stderr)
