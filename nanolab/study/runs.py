"""Finds runs, reads what is on record of them, and groups them into experiments.

A run is a dict: its name, test_loss or val_loss, its options in "config", and what else is known.
A results file has a list of runs: {"runs": [...]}, or just the list. Options that all its runs
share may stand once, at the top: {"options": {...}, "runs": [...]}. A file written by hand may have
the options next to the name. A run with "reference" is shown and not tested: more than its options
differ.
"""

import glob
import json
import math
import os
import shlex
from dataclasses import fields
from pathlib import Path

import numpy as np

from config import OBJECTIVE_OPTIONS, RESUME_MAY_CHANGE, SEEDS, Config
from nanolab.common import UserError, code_name

DEFAULTS = {option.name: option.default for option in fields(Config)}

# Runs that differ only in these are one experiment: their results are the same up to noise.
SAME_EXPERIMENT = RESUME_MAY_CHANGE | {*SEEDS, "compile", "save_weights"}

# Of a machine or a command, so no part of a result.
NOT_RECORDED = {"name", "out_dir", "data_dir", "resume", "extend", "dry_run", "on_save", "wandb",
                "dollars_per_hour"}

FACTS = ("seconds", "tokens_per_second", "cost", "machine", "versions", "started", "ended", "code")
SIZES = ("max_steps", "max_tokens", "global_batch_size", "block_size")
NUMBERS = ("test_loss", "val_loss", "seconds", "tokens_per_second", "parameters", "trained_tokens")


def read_runs(words, loss):
    """The runs that words name: run folders, folders of runs, checkpoints, globs, results files.

    -> measured runs, the others as far as they are known, and lines that say what is missing. A
    checkpoint named in full is taken as it is. Raises UserError.
    """
    runs, unmeasured, unfinished = [], [], []
    for path in dict.fromkeys(path for word in words for path in find_paths(word)):
        if path.endswith(".json"):
            runs += read_file(path)
        elif path not in words and (Path(path).with_name("config.json").exists()
                                    and not Path(path).with_name("summary.json").exists()):
            unfinished.append(path)
        elif run := read_run(path, validation=loss == "val_loss"):
            runs.append(run)
        else:
            unmeasured.append(path)
    missing = [f"not measured: python eval.py --ckpt {shlex.join(unmeasured)}"] * bool(unmeasured)
    missing += [f"missing: {os.path.dirname(path)} has not ended (the same command with --resume "
                "goes on)" for path in unfinished]
    missing += [f"missing: {run.get('path', run['name'])} has no {loss} that is a number"
                for run in runs if not has_loss(run, loss)]
    others = [read_run(path, validation=True) for path in unmeasured + unfinished
              if Path(path).with_name("config.json").exists()]
    return runs, others, missing


def find_paths(word):
    """The checkpoints and results files that a word names. Raises UserError if there is none."""
    is_glob = glob.has_magic(word) and not os.path.exists(word)
    matches = glob.glob(word, recursive=True) if is_glob else [word]
    paths = {path for match in matches for path in (
        [str(config.with_name("best.pt")) for config in configs_below(match)]
        if os.path.isdir(match) else [match]) if path.endswith((".pt", ".json"))}
    if not paths:
        raise UserError(f"there is no run in '{word}'")
    return sorted(paths)


def configs_below(folder):
    """The config.json of each run below a folder, also in linked folders."""
    found = glob.glob("**/config.json", root_dir=folder, recursive=True)
    return [path for path in (Path(folder, name) for name in found)
            if not path.with_name("model.safetensors").exists()]  # our export is no run


def read_run(checkpoint, validation):
    """What is on record of a run, or None if it is not measured. Raises UserError."""
    path = Path(checkpoint)
    result_path, summary_path = path.with_suffix(".test.json"), path.with_name("summary.json")
    summary = read_json(summary_path) if summary_path.exists() else {}
    facts = {"path": checkpoint, **{key: summary[key] for key in FACTS if key in summary}}
    if validation:
        config = read_json(path.with_name("config.json"))
        config.pop("code", None)  # it is no option
        return {"name": config.get("name"), "dataset": config.get("dataset"), **facts,
                "config": config, "val_loss": summary.get("best_val_loss")}
    try:
        if path.exists() and path.stat().st_mtime > result_path.stat().st_mtime:
            return None
        results = json.loads(result_path.read_text())["results"]
        own = [result for result in results if result["amp"] == "off"
               and result["dataset"] == result["config"]["dataset"]]
        return {**(own or results)[-1], **facts}
    except (OSError, ValueError, KeyError, TypeError, IndexError):  # missing or damaged
        return None


def read_json(path):
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        raise UserError(f"{path} is missing or damaged") from None


def read_file(path, loss=None):
    """The runs in a results file; each must have this loss, if one is named. Raises UserError."""
    def options_of(run):
        beside = {key: run[key] for key in DEFAULTS if key in run}  # some of them eval.py's
        return {**beside, **shared, **run["config"]} if "config" in run else {**shared, **beside}

    try:
        content = json.loads(Path(path).read_text("utf-8-sig"))
        content = content if isinstance(content, dict) else {"runs": content}
        shared = content.get("options", {})
        runs = [{**run, "config": options_of(run)} for run in content["runs"]]
        for run in runs:
            hash((run["name"], *run["config"].values()))  # a TypeError if one is a list
            figures = [run.get(key) or 0 for key in NUMBERS]
            figures += [settings(run)[key] for key in SIZES]
            if not (isinstance(run["name"], str) and all(isinstance(state, dict) for state in
                                                         run.get("code") or ())
                    and all(isinstance(figure, (int, float)) for figure in figures)
                    and all(type(seed) is int or seed == "not fixed" for seed in seeds_of(run))):
                raise TypeError
        if loss and not (runs and all(has_loss(run, loss) for run in runs)):
            raise UserError(f"{path} is no file for this: it needs runs, each with a {loss}")
        return runs
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is no file of results: it needs a list of runs, each with a name, "
                        "and figures must be numbers, seeds whole ones") from None


def settings(run):
    """Every option of a run: what is on record, else today's default."""
    options = {**DEFAULTS, **run["config"]}
    return {**options, **{key: options["seed"] for key in SEEDS if options[key] is None}}


def relevant_options(run):
    """The options that tell experiments apart."""
    options = settings(run)
    ignored = SAME_EXPERIMENT | ({"max_tokens"} if options["max_steps"] else set())
    return {key: value for key, value in options.items() if key not in ignored}


def changed_objective(run, other):
    """The options by which the training losses of two runs cannot be compared."""
    ours, theirs = settings(run), settings(other)
    return [key for key in OBJECTIVE_OPTIONS if ours[key] != theirs[key]]


def group_by_experiment(runs):
    """-> {label: runs}. The runs of one experiment have one name and differ only in
    SAME_EXPERIMENT. The label is the name; if experiments share it, then also the options that
    differ.
    """
    experiments = {}
    for run in runs:
        options = relevant_options(run)
        experiments.setdefault((run["name"], frozenset(options.items())), []).append(run)
    labelled = {}
    for name, options in experiments:
        namesakes = [others for other_name, others in experiments if other_name == name]
        common = frozenset.intersection(*namesakes)
        differing = sorted((key, value) for key, value in options if (key, value) not in common)
        label = ", ".join([name, *(f"{key}={value}" for key, value in differing)])
        labelled[label] = experiments[name, options]
    return labelled


def seeds_of(run):
    options = settings(run)
    return tuple(options[key] for key in SEEDS)


def code_states(runs):
    """The code that runs ran with: {SHA-256 of its files: a name}. {None: ...}: not on record."""
    return {state.get("sha256"): code_name(state) if state.get("sha256") else "not on record"
            for run in runs for state in run.get("code") or [{}]}


def losses_by_seed(runs, loss="test_loss"):
    """-> {(init_seed, data_seed, dropout_seed): loss}

    Runs with the same seeds are averaged: a repeat is not another sample of the noise.
    """
    losses = {}
    for run in runs:
        losses.setdefault(seeds_of(run), []).append(run[loss])
    return {seeds: float(np.mean(repeats)) if len(set(repeats)) > 1 else repeats[0]
            for seeds, repeats in losses.items()}


def choose_baseline(experiments, wanted):
    """The label of the experiment that the others are compared with; without `wanted`, the one
    called baseline, or None. Raises UserError."""
    if wanted and wanted not in experiments:
        raise UserError(f"no run is named '{wanted}' (from --baseline); "
                        f"there are {', '.join(sorted(experiments))}")
    return wanted or ("baseline" if "baseline" in experiments else None)


def has_loss(run, loss):
    return isinstance(run.get(loss), (int, float)) and math.isfinite(run[loss])


def as_json(runs, **more):
    """The text of a results file. Options that all runs share stand once; each run is a line."""
    configs = [{key: value for key, value in run["config"].items() if key not in NOT_RECORDED}
               for run in runs]
    shared = {key: value for key, value in (configs or [{}])[0].items()
              if all(key in each and each[key] == value for each in configs)}
    lines = [json.dumps({**run, "config": {key: value for key, value in config.items()
                                           if key not in shared}})
             for run, config in zip(runs, configs)]
    parts = [f'"options": {json.dumps(shared)}', '"runs": [\n  ' + ",\n  ".join(lines) + "\n ]",
             *(f'"{key}": {json.dumps(value)}' for key, value in more.items())]
    return "{\n " + ",\n ".join(parts) + "\n}\n"
