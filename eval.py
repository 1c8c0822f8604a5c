"""Test loss: of one checkpoint, or of a study's runs, with the error bars that tell an effect from noise.

    python eval.py --ckpt out/best.pt
    python eval.py --ckpt 'out/lab/*/*/best.pt' --baseline baseline --plot table.png
    python eval.py --ckpt config/results/lab.json --markdown          the README's table, from its data
    python eval.py --ckpt config/published.json --noise               which seeds make the noise, and how much
    python eval.py --ckpt config/published.json --fit_batch_size      loss over the global batch, and its optimum
    torchrun --standalone --nproc_per_node=8 eval.py --ckpt out/best.pt

The loss is the mean cross-entropy over all whole windows of the test split, each token predicted from its own window only.
It is computed in float32 unless --amp says otherwise, and is the same, to about 1e-6, for any batch size and number of
processes. A result is kept beside its checkpoint, in NAME.test.json, and not measured again while checkpoint and data stay
as they are.

--ckpt takes checkpoints, folders of runs, globs in quotes, and files of results: what --json writes, or by hand
[{"name": "baseline", "test_loss": 3.69, "seed": 42}, ...] with any option of config/__init__.py beside them.
"""

import argparse
import glob
import hashlib
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from config import OPTIONS, SEEDS, WITHOUT_EFFECT
from model import GPT, CheckpointError, DeviceError, autocast_dtype, mean_loss, read_checkpoint, start_processes
from prepare import DataError, Windows, describe, read_meta, write_atomically


class ResultsError(ValueError):
    """Runs that are not there, or that cannot be compared, told in one line."""


########################################
#         One checkpoint's loss        #
########################################

def evaluate(path, args, device, rank, world_size):
    """The test result of one checkpoint, as a dict, from the file beside it if it is there.
    Raises CheckpointError, DataError."""
    checkpoint = read_checkpoint(path, mmap=True)
    config = checkpoint["config"]
    data_dir, dataset = args.data_dir or config["data_dir"], args.dataset or config["dataset"]
    meta = read_meta(data_dir, dataset)
    if meta["tokenizer"] != checkpoint["tokenizer"]:
        raise DataError(f"{path} was trained on {checkpoint['tokenizer']} tokens, the data set {dataset} has "
                        f"{meta['tokenizer']}")
    test, dtype = meta["splits"].get("test"), autocast_dtype(args.amp, device)
    amp = str(dtype).removeprefix("torch.") if dtype else "off"
    is_run = config["dataset"] is not None  # or else weights of Hugging Face's, with neither a run nor a file of ours beside them
    kept = from_rank_0(lambda: read_kept(path), world_size) if is_run else {"results": []}
    for result in kept["results"]:
        if test and result["test_sha256"] == test["sha256"] and result["amp"] == amp:
            return {**result, "path": str(path), **effort(path, checkpoint)}

    windows = Windows(data_dir, dataset, "test", config["block_size"])
    model = GPT.from_checkpoint(read_checkpoint(path)).to(device)
    loss = mean_loss(model, windows, len(windows), args.batch_size, device, dtype, rank, world_size)
    result = {"name": config["name"], "path": str(path), "test_loss": loss, "perplexity": math.exp(min(loss, 700)),
              "bits_per_byte": loss / math.log(2) * test["tokens"] / test["bytes"],
              "windows": len(windows), "tokens": len(windows) * config["block_size"], "block_size": config["block_size"],
              "dataset": dataset, "test_sha256": test["sha256"], "amp": amp,
              "step": checkpoint["step"], "trained_tokens": checkpoint["tokens"], "config": unlike_the_defaults(config)}
    if rank == 0 and is_run:
        keep(path, {**kept, "results": [*kept["results"], result]})
        if config.get("wandb") and dataset == config["dataset"]:
            tell_wandb(path, config, loss)
    return {**result, **effort(path, checkpoint)}


def tell_wandb(path, config, loss):
    """Adds the test loss to the run of Weights & Biases that train.py logged to, if it can."""
    try:
        from wandb import init
        tracker = init(project=config["wandb"], id=Path(path).with_name("wandb_id").read_text(), resume="allow")
        tracker.summary.update({f"{Path(path).stem}_test_loss": loss})
        tracker.finish()
    except Exception as error:  # not installed, another machine, the network, the account: the result is kept here all the same
        print(f"{path}: the test loss could not be added to Weights & Biases ({type(error).__name__})", file=sys.stderr)


def from_rank_0(compute, world_size):
    """What compute() returns on the first process, on all of them: other machines may not see its disk."""
    if world_size == 1:
        return compute()
    box = [compute() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box)
    return box[0]


def beside(path):
    """The file that keeps the test results of a checkpoint."""
    return Path(path).with_suffix(".test.json")


def read_kept(path):
    """The results kept for the checkpoint as it is now: {"checkpoint_sha256": ..., "results": [...]}."""
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        kept = json.loads(beside(path).read_text())
        if kept["checkpoint_sha256"] == sha256:
            return kept
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none yet, or damaged: it is measured anew
    return {"checkpoint_sha256": sha256, "results": []}


def keep(path, kept):
    try:
        write_atomically(beside(path), json.dumps(kept, indent=1) + "\n")
    except OSError as error:
        print(f"{path}: the result could not be kept ({describe(error)}); it will be measured anew", file=sys.stderr)


def unlike_the_defaults(config):
    """What tells a run from the published baseline, whose values are the defaults; and its seeds."""
    return {key: value for key, value in config.items()
            if key in SEEDS or key == "seed" or key not in WITHOUT_EFFECT and value != OPTIONS[key].default}


def effort(path, checkpoint):
    """What the run took: to its end if it has ended, else up to the checkpoint; nothing is known of weights of other makers."""
    if checkpoint["config"]["dataset"] is None:
        return {}
    summary = Path(path).with_name("summary.json")
    if summary.exists():
        done = json.loads(summary.read_text())
        return {key: done[key] for key in ("seconds", "tokens_per_second", "cost", "machine")}
    timed = checkpoint.get("timed_seconds")
    return {"seconds": checkpoint["seconds"], "tokens_per_second": checkpoint["timed_tokens"] / timed if timed else None,
            "cost": checkpoint["seconds"] / 3600 * checkpoint["config"]["dollars_per_hour"]}


########################################
#              Which runs              #
########################################

def find_runs(words):
    """What --ckpt asks for: (checkpoints, files of results, folders of runs that have not ended).

    A checkpoint named in full is taken as it is. Globs and folders leave out runs without an end, which they report.
    """
    checkpoints, files, unfinished = [], [], []
    for word in words:
        if not glob.has_magic(word) and not is_folder_of_runs(word):
            (files if word.endswith(".json") else checkpoints).append(word)
            continue
        found = find_in_glob(word) if glob.has_magic(word) else find_in_folder(word)
        if not found:
            raise ResultsError(f"there is no run in {word}" if is_folder_of_runs(word) else f"nothing matches '{word}'")
        for path in found:
            if path.endswith(".json"):
                files.append(path)
            elif os.path.exists(path) and (has_ended(path) or not Path(path).with_name("config.json").exists()):
                checkpoints.append(path)
            else:
                unfinished.append(os.path.dirname(path))
    return list(dict.fromkeys(checkpoints)), files, list(dict.fromkeys(unfinished))


def is_folder_of_runs(word):
    weights = ("model.safetensors", "model-*-of-*.safetensors", "pytorch_model.bin")  # of a model in Hugging Face's layout
    return os.path.isdir(word) and not any(any(Path(word).glob(name)) for name in weights)


def has_ended(path):
    return Path(path).with_name("summary.json").exists()


def find_in_folder(folder):
    return sorted(str(config.with_name("best.pt")) for config in Path(folder).rglob("config.json"))


def find_in_glob(pattern):
    """Files that match, best.pt of the runs in folders that match, and the files that would match if a run had got there."""
    found = {path for path in glob.glob(pattern, recursive=True) if not os.path.isdir(path)}
    for folder in glob.glob(pattern, recursive=True):
        found.update(find_in_folder(folder) if os.path.isdir(folder) else [])
    name = os.path.basename(pattern)
    if name.endswith(".pt") and not glob.has_magic(name):
        found.update(os.path.join(folder, name) for folder in glob.glob(os.path.dirname(pattern), recursive=True)
                     if Path(folder, "config.json").exists())
    return sorted(found)


def read_results(path):
    """The runs in a file of results. Raises ResultsError."""
    try:
        content = json.loads(Path(path).read_text())
        runs = content["runs"] if isinstance(content, dict) else content
        for run in runs:
            if not isinstance(run["name"], str) or not math.isfinite(run["test_loss"]):
                raise TypeError
            settings(run)
        return runs
    except FileNotFoundError:
        raise ResultsError(f"there is no file {path}") from None
    except (ValueError, KeyError, TypeError):
        raise ResultsError(f"{path} is no file of results: it wants a list of runs, each with a name and a test_loss") from None


def settings(run):
    """Every option of a run, seeds filled in as config.load does."""
    given = run.get("config", run)
    options = {key: given.get(key, option.default) for key, option in OPTIONS.items()}
    return {**options, **{key: options["seed"] if options[key] is None else options[key] for key in SEEDS}}


########################################
#              Experiments             #
########################################

def gather(runs):
    """Runs that differ in nothing but seeds, and in what cannot change the result, gathered: label -> runs.
    The label is the name; where one name stands for several experiments, with the options that tell them apart."""
    experiments = {}
    for run in runs:
        options = settings(run)
        ignored = WITHOUT_EFFECT.union(SEEDS, {"max_tokens"} if options["max_steps"] else ())
        what_matters = tuple((key, value) for key, value in options.items() if key not in ignored)
        experiments.setdefault((run["name"], what_matters), []).append(run)
    labelled = {}
    for (name, options), members in experiments.items():
        namesakes = [dict(others) for other_name, others in experiments if other_name == name]
        telling = [f"{key}={value}" for key, value in options if any(others.get(key) != value for others in namesakes)]
        labelled[", ".join([name, *telling])] = members
    return labelled


def by_seed(runs):
    """(init_seed, data_seed, dropout_seed) -> test loss. A repeat of the same seeds is not another draw of the noise: such
    runs are averaged."""
    losses = {}
    for run in runs:
        losses.setdefault(tuple(settings(run)[key] for key in SEEDS), []).append(run["test_loss"])
    return {seeds: float(np.mean(values)) for seeds, values in losses.items()}


def choose_baseline(experiments, wanted):
    """The label of the experiment that the others are compared with, or None where nobody asked and none is called baseline.
    Raises ResultsError."""
    if wanted in experiments:
        return wanted
    matching = [label for label in experiments if label.startswith(f"{wanted or 'baseline'}, ")]
    if wanted and not matching:
        raise ResultsError(f"no run is named '{wanted}' (from --baseline); there are {', '.join(sorted(experiments))}")
    if wanted and len(matching) > 1:
        raise ResultsError(f"--baseline='{wanted}' could be any of: {'; '.join(sorted(matching))}")
    return "baseline" if "baseline" in experiments else matching[0] if len(matching) == 1 else None


def compare(experiments, baseline):
    """The rows of the table, from the worst to the best mean loss, as dicts. See `difference` for the statistics."""
    rows = []
    for label, runs in experiments.items():
        losses = by_seed(runs)
        rows.append({"experiment": label, "n": len(losses), "test_loss": float(np.mean(list(losses.values()))),
                     "sd": sample_sd(losses.values()), "losses": list(losses.values()),
                     "tokens_per_second": mean_of(runs, "tokens_per_second"),
                     "hours": scaled(mean_of(runs, "seconds"), 1 / 3600), "cost": mean_of(runs, "cost")})
        if baseline and label != baseline:
            rows[-1].update(difference(losses, by_seed(experiments[baseline])))
    correct_for_many(rows)
    return sorted(rows, key=lambda row: -row["test_loss"])


def mean_of(runs, key):
    values = [run[key] for run in runs if run.get(key) is not None]
    return float(np.mean(values)) if values else None


def scaled(value, factor):
    return None if value is None else value * factor


########################################
#              Statistics              #
########################################

NODES, WEIGHTS = np.polynomial.legendre.leggauss(200)  # of Gauss-Legendre quadrature on [-1, 1]


def incomplete_beta(x, a, b):
    """The regularised incomplete beta function I_x(a, b), from which the t and F distributions follow, by Gauss-Legendre
    quadrature over the angle whose squared sine is x. To about 1e-9 where 2a is whole, as it is here."""
    end = math.asin(math.sqrt(x))
    angles = end * (NODES + 1) / 2
    area = np.sum(WEIGHTS * np.sin(angles) ** (2 * a - 1) * np.cos(angles) ** (2 * b - 1)) * end / 2
    return 2 * area * math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b))


def t_p_value(t, df):
    """Two-sided p-value of Student's t with df degrees of freedom."""
    return max(1 - incomplete_beta(t * t / (df + t * t), 0.5, df / 2), 0.0)


def f_p_value(f, df1, df2):
    """Probability that F with (df1, df2) degrees of freedom is above f."""
    return max(1 - incomplete_beta(df1 * f / (df1 * f + df2), df1 / 2, df2 / 2), 0.0)


def chi2_cdf(x, df):
    return torch.special.gammainc(torch.tensor(df / 2, dtype=torch.float64), torch.tensor(x / 2, dtype=torch.float64)).item()


def where_reached(function, target, low, high):
    """The x in (low, high) at which a rising function reaches target, by bisection."""
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < target else (low, middle)
    return (low + high) / 2


def t_quantile(df):
    """The t that 95 % of Student's t distribution lie within: half the width of an interval, in standard errors."""
    return where_reached(lambda t: 1 - t_p_value(t, df), 0.95, 0.0, 1000.0)


def sample_sd(values):
    """The standard deviation with n - 1, or None for a single value."""
    return float(np.std(list(values), ddof=1)) if len(values) > 1 else None


def sd_interval(sd, n):
    """95 % interval of a normal population's standard deviation, from that of n values."""
    chi2 = [where_reached(lambda x: chi2_cdf(x, n - 1), p, 0.0, 10.0 * n + 100) for p in (0.975, 0.025)]
    return [sd * math.sqrt((n - 1) / x) for x in chi2]


def difference(losses, baseline):
    """How an experiment's mean test loss differs from the baseline's: the 95 % Student-t interval, the p-value, and how they
    were had. Both arguments: seeds -> test loss.

    Paired over the seeds that both have, where those are two or more; else Welch's unequal-variance interval; and where one
    side is a single run, Student's, which lends it the spread of the other.
    """
    matching = losses.keys() & baseline.keys()
    if len(matching) > 1:
        gaps = [losses[seeds] - baseline[seeds] for seeds in sorted(matching)]
        mean, df, how = float(np.mean(gaps)), len(gaps) - 1, f"paired, {len(gaps)}"
        error = sample_sd(gaps) / math.sqrt(len(gaps))
    else:
        ours, theirs = list(losses.values()), list(baseline.values())
        mean, df, how = float(np.mean(ours) - np.mean(theirs)), len(ours) + len(theirs) - 2, "unpaired"
        if not df:
            return {"difference": mean, "compared": "one run each", "p": None}
        parts = [sample_sd(values) ** 2 / len(values) for values in (ours, theirs) if len(values) > 1]
        error = math.sqrt(sum(parts))
        if len(parts) == 1:
            how = "unpaired, one run"
            error = (sample_sd(ours) or sample_sd(theirs)) * math.sqrt(1 / len(ours) + 1 / len(theirs))
        elif error:
            df = error ** 4 / sum(part ** 2 / (len(values) - 1) for part, values in zip(parts, (ours, theirs)))
    half = t_quantile(df) * error
    p = t_p_value(mean / error, df) if error else float(mean == 0)  # no spread at all: equal for certain, or not
    return {"difference": mean, "low": mean - half, "high": mean + half, "compared": how, "p": p}


def correct_for_many(rows):
    """Adds each row's verdict: p-values corrected for their number (Holm, 1979), at 5 %."""
    tested = sorted((row for row in rows if row.get("p") is not None), key=lambda row: row["p"])
    largest = 0.0
    for i, row in enumerate(tested):
        row["p_holm"] = largest = max(largest, min(1.0, (len(tested) - i) * row["p"]))
        row["verdict"] = "within noise" if largest >= 0.05 else "better" if row["difference"] < 0 else "worse"
    for row in rows:
        if row.get("compared") == "one run each":
            row["verdict"] = "cannot be told"


########################################
#          Where noise is from         #
########################################

def sources_of_noise(runs):
    """The test losses of one experiment's runs by what varied between them: {source: losses}. A run may serve two sources."""
    losses = by_seed(runs)
    of_one_seed = {tuple(settings(run)[key] for key in SEEDS) for run in runs
                   if len({settings(run)[key] for key in ("seed", *SEEDS)}) == 1}

    def largest_set(fixed):
        """The seeds of the largest set of runs that have a seed, or seeds, in common."""
        sets = {}
        for seeds in losses:
            sets.setdefault(fixed(seeds), []).append(seeds)
        return max(sets.values(), key=len)

    chosen = {"both, by one seed": sorted(of_one_seed),
              "the loop (data order, dropout), initial weights fixed": largest_set(lambda seeds: seeds[0]),
              "initial weights, the loop fixed": largest_set(lambda seeds: seeds[1:])}
    return {source: [losses[seeds] for seeds in members] for source, members in chosen.items() if len(members) > 1}


def noise(runs):
    """The spread that each source of noise makes, and whether the sources differ, as a dict. Raises ResultsError."""
    sources = sources_of_noise(runs)
    if not sources:
        raise ResultsError("--noise wants at least two runs of the baseline that differ in their seeds; name it with --baseline")
    found = [spread(source, losses) for source, losses in sources.items()]
    result = {"sources": [*found, spread("all runs", list(by_seed(runs).values()))]}
    if len(sources) > 1 and all(len(losses) > 2 for losses in sources.values()):
        result["levene"] = brown_forsythe(list(sources.values()))
    by_source = {row["source"].split()[0]: row for row in found}
    if {"initial", "the"} <= by_source.keys() and by_source["the"]["sd"]:
        weights, loop = by_source["initial"], by_source["the"]
        f, df1, df2 = (weights["sd"] / loop["sd"]) ** 2, weights["n"] - 1, loop["n"] - 1
        above = f_p_value(f, df1, df2)
        result["f_test"] = {"f": f, "df": [df1, df2], "p": min(1.0, 2 * min(above, 1 - above))}
    return result


def spread(source, losses):
    return {"source": source, "n": len(losses), "mean": float(np.mean(losses)), "sd": sample_sd(losses),
            "sd_interval": sd_interval(sample_sd(losses), len(losses)), "population_sd": float(np.std(losses)),
            "lowest": min(losses), "highest": max(losses), "losses": losses}


def brown_forsythe(groups):
    """Levene's test with medians (Brown and Forsythe, 1974): do the groups differ in spread? -> F, its degrees of freedom, p."""
    distances = [np.abs(np.array(values) - np.median(values)) for values in groups]
    n, k = sum(map(len, distances)), len(distances)
    between = sum(len(d) * (d.mean() - np.concatenate(distances).mean()) ** 2 for d in distances)
    within = sum(((d - d.mean()) ** 2).sum() for d in distances)
    f = float(between / (k - 1) / (within / (n - k))) if within else 0.0
    return {"f": f, "df": [k - 1, n - k], "p": f_p_value(f, k - 1, n - k)}


########################################
#       Loss over the batch size       #
########################################

def points_to_fit(experiments, wanted):
    """The runs that differ in global_batch_size, of the name `wanted` or of the one that has most sizes:
    (name, sizes, losses). Raises ResultsError."""
    points = {}
    for runs in experiments.values():
        for loss in by_seed(runs).values():
            points.setdefault(runs[0]["name"], []).append((settings(runs[0])["global_batch_size"], loss))
    name = wanted or max(points, key=lambda name: len({size for size, _ in points[name]}))
    sizes, losses = np.array(sorted(points.get(name, [])), float).reshape(-1, 2).T
    if len(set(sizes)) < 3:
        raise ResultsError(f"--fit_batch_size wants runs of at least 3 global batch sizes; {name} has {len(set(sizes))}")
    return name, sizes, losses


def fit_batch_size(sizes, losses):
    """Least squares of loss = a ln(B)^2 + b ln(B) + c over the global batch B (part 29's formula), as a dict: the coefficients,
    the optimum and the loss predicted there, each with its 95 % interval (None without a spare run to tell the error)."""
    x = np.log(sizes)
    design = np.stack((x ** 2, x, np.ones_like(x)), axis=1)
    a, b, c = np.linalg.lstsq(design, losses, rcond=None)[0]
    fit = {"a": a, "b": b, "c": c, "n": len(sizes), "df": len(sizes) - 3, "covariance": None,
           "optimum": None, "optimum_interval": None, "predicted": None, "predicted_interval": None}
    if fit["df"]:
        residuals = losses - design @ (a, b, c)
        fit["covariance"] = residuals @ residuals / fit["df"] * np.linalg.inv(design.T @ design)
    if a > 0:
        lowest = -b / (2 * a)
        fit.update(optimum=math.exp(lowest), predicted=a * lowest ** 2 + b * lowest + c)
        if fit["df"]:
            half = interval_at(fit, lowest)
            fit["predicted_interval"] = [fit["predicted"] - half, fit["predicted"] + half]
            slope = np.array([-lowest / a, -1 / (2 * a), 0])  # of the lowest point, by a, b, c: the delta method
            half = t_quantile(fit["df"]) * math.sqrt(slope @ fit["covariance"] @ slope)
            fit["optimum_interval"] = [math.exp(min(lowest + sign * half, 700)) for sign in (-1, 1)]
    return fit


def interval_at(fit, x):
    """Half the width of the fitted curve's 95 % interval at ln(B) = x."""
    at = np.array([x ** 2, x, np.ones_like(x)])
    return t_quantile(fit["df"]) * np.sqrt(np.einsum("i...,ij,j...", at, fit["covariance"], at))


########################################
#             Told in words            #
########################################

def as_text(rows, markdown=False):
    """A table from rows of cells, header first. Columns without a value are left out; all but those of words stand right."""
    columns = [column for column in zip(*rows) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    in_words = [column[0] in ("experiment", "name", "source", "checkpoint", "compared", "verdict", "varies") for column in columns]
    lines = [[cell.ljust(width) if words else cell.rjust(width) for cell, width, words in zip(line, widths, in_words)]
             for line in zip(*columns)]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in lines)
    rule = ["-" * (width + 1) + ("-" if words else ":") for width, words in zip(widths, in_words)]
    return "\n".join(["| " + " | ".join(lines[0]) + " |", "|" + "|".join(rule) + "|"] +
                     ["| " + " | ".join(line) + " |" for line in lines[1:]])


def number(value, form):
    return "" if value is None else format(value, form)


def interval(low_and_high, form):
    return "" if low_and_high is None else f"{low_and_high[0]:{form}} to {low_and_high[1]:{form}}"


def comparison_table(rows, markdown, other=None):
    """The table of `compare`. other: (title, rows) of another study, whose differences stand beside ours, by name."""
    title, theirs = (other[0], {row["experiment"]: row for row in other[1]}) if other else ("", {})
    cells = [["experiment", "n", "test loss", "SD", "difference", "95 % interval", "compared", "p (Holm)", "verdict", title,
              "tokens/s", "hours", "US$"]]
    for row in rows:
        their = theirs.get(row["experiment"], {})
        beside_ours = f"{their['difference']:+.4f} {their['verdict']}" if "difference" in their else ""
        span = (row["low"], row["high"]) if "low" in row else None
        cells.append([row["experiment"], str(row["n"]), f"{row['test_loss']:.6f}", number(row["sd"], ".6f"),
                      number(row.get("difference"), "+.4f"), interval(span, "+.4f"), row.get("compared", ""),
                      number(row.get("p_holm"), ".2g"), row.get("verdict", ""), beside_ours,
                      number(row["tokens_per_second"], ",.0f"), number(row["hours"], ".3g"), number(row["cost"] or None, ".2f")])
    return as_text(cells, markdown)


def tell_table(rows, baseline):
    """What the columns of the table mean."""
    compared = [row for row in rows if "verdict" in row]
    if not compared:
        return "n: runs with different seeds; SD: sample standard deviation. No experiment is called baseline; --baseline names one."
    return (f"Difference: to {baseline}, negative is better, with its 95 % Student-t interval; paired: over that many equal seeds; "
            "unpaired: Welch's, or where one side is one run, with the other side's spread. Verdict: at 5 %, corrected for "
            f"{len(compared)} comparisons (Holm). n: seeds; SD: sample standard deviation; hours: per run.")


def tell_noise(result, markdown):
    cells = [["varies", "n", "mean", "SD (sample)", "95 % interval", "SD (population)", "lowest", "highest"]]
    for row in result["sources"]:
        cells.append([row["source"], str(row["n"]), f"{row['mean']:.6f}", f"{row['sd']:.6f}", interval(row["sd_interval"], ".4f"),
                      f"{row['population_sd']:.6f}", f"{row['lowest']:.6f}", f"{row['highest']:.6f}"])
    lines = [as_text(cells, markdown), ""]
    if test := result.get("levene"):
        differ = "do the sources differ in spread? " + ("Yes" if test["p"] < 0.05 else "Not that these runs could show")
        lines.append(f"Levene's test (Brown-Forsythe): {differ}: F({test['df'][0]}, {test['df'][1]}) = {test['f']:.3f}, "
                     f"p = {test['p']:.3f}.")
    if test := result.get("f_test"):
        lines.append(f"F test, variance by initial weights over variance by the loop: F({test['df'][0]}, {test['df'][1]}) = "
                     f"{test['f']:.3f}, two-sided p = {test['p']:.3f}.")
    return "\n".join(lines)


def tell_fit(name, fit, sizes):
    lines = [f"{name}: {fit['n']} runs, global batch {min(sizes):g} to {max(sizes):g}",
             f"loss = a ln(B)^2 + b ln(B) + c: a {fit['a']:.7f}, b {fit['b']:.7f}, c {fit['c']:.7f}"]
    if fit["optimum"] is None:
        return "\n".join([*lines, "the curve has no lowest point: a is not positive"])
    beyond = "" if min(sizes) <= fit["optimum"] <= max(sizes) else "; beyond the sizes measured, so do not trust it"
    for what, value, form in (("optimum", "optimum", ".1f"), ("predicted loss there", "predicted", ".3f")):
        span = fit[f"{value}_interval"]
        told = f"95 % interval {interval(span, form)}" if span else "no interval: three runs fit three coefficients exactly"
        lines.append(f"{what} {fit[value]:{form}} ({told}){beyond if value == 'optimum' else ''}")
    return "\n".join(lines)


def tell_one(r):
    return (f"{r['path']}: {r['name']}, step {r['step']:,}, on the test split of {r['dataset']}\n"
            f"test loss      {r['test_loss']:.6f} nats per token\n"
            f"perplexity     {r['perplexity']:.3f}\n"
            f"bits per byte  {r['bits_per_byte']:.6f}\n"
            f"windows        {r['windows']:,} of {r['block_size']:,} tokens, {r['tokens']:,} tokens")


########################################
#             Told in pictures         #
########################################

def new_figure(*shape, **how):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(*shape, layout="constrained", **how)
    for ax in np.ravel(axes):
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure, path):
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:  # a suffix that matplotlib cannot write
        raise ResultsError(f"{path}: {error}") from None


def plot_rows(rows, baseline, path, title):
    """One row per experiment: each run a dot, the mean and its 95 % interval; the band is where another run of the baseline
    would fall in 95 of 100 cases. rows: dicts with a label, losses, and a remark for the right margin."""
    figure, ax = new_figure(figsize=(10, 1.6 + 0.42 * len(rows)))
    if baseline and len(baseline) > 1:
        mean, half = np.mean(baseline), t_quantile(len(baseline) - 1) * sample_sd(baseline) * math.sqrt(1 + 1 / len(baseline))
        ax.axvspan(mean - half, mean + half, color="0.9", linewidth=0)
        ax.axvline(mean, color="0.6", linewidth=0.8)
    for y, row in zip(range(len(rows), 0, -1), rows):
        losses = row["losses"]
        ax.plot(losses, [y] * len(losses), "o", color="0.45", markerfacecolor="none", markersize=5)
        if len(losses) > 1:
            half = t_quantile(len(losses) - 1) * sample_sd(losses) / math.sqrt(len(losses))
            ax.plot([np.mean(losses) - half, np.mean(losses) + half], [y, y], color="black", linewidth=1.6)
        ax.plot(np.mean(losses), y, "D", color="black", markersize=5)
        ax.text(1.01, y, row["remark"], transform=ax.get_yaxis_transform(), va="center", fontsize=9)
    ax.set_yticks(range(len(rows), 0, -1), [row["label"] for row in rows])
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.set_ylim(0.3, len(rows) + 0.7)
    ax.set_xlabel("test loss, nats per token")
    ax.set_title(title, loc="left", fontsize=10)
    save_figure(figure, path)


def plot_table(rows, baseline, path):
    remarks = [f"{row['difference']:+.4f}  {row['verdict']}" if "verdict" in row else "" for row in rows]
    plot_rows([{"label": f"{row['experiment']} ({row['n']})", "losses": row["losses"], "remark": remark}
               for row, remark in zip(rows, remarks)],
              next((row["losses"] for row in rows if row["experiment"] == baseline), None), path,
              "Circles: runs. Diamond and bar: their mean and its 95 % interval. Right: difference to the baseline,\n"
              "and verdict. Grey: where one more run of the baseline would fall, 95 times in 100.")


def plot_noise(result, path):
    plot_rows([{"label": f"{row['source'].split(',')[0]} ({row['n']})", "losses": row["losses"], "remark": f"SD {row['sd']:.4f}"}
               for row in result["sources"]], None, path, "Runs of one experiment that differ in their seeds, by what the seeds vary")


def plot_fit(name, fit, sizes, losses, path):
    figure, ax = new_figure(figsize=(8, 5))
    x = np.linspace(math.log(min(sizes)) - 0.2, math.log(max(sizes)) + 0.2, 200)
    curve = fit["a"] * x ** 2 + fit["b"] * x + fit["c"]
    if fit["df"]:
        half = interval_at(fit, x)
        ax.fill_between(np.exp(x), curve - half, curve + half, color="0.9", linewidth=0, label="95 % interval of the curve")
    ax.plot(np.exp(x), curve, color="black", linewidth=1.4,
            label=f"{fit['a']:.4f} ln(B)$^2$ {fit['b']:+.4f} ln(B) {fit['c']:+.4f}")
    ax.plot(sizes, losses, "o", color="black", markerfacecolor="white", label="runs")
    if fit["optimum"] and min(sizes) <= fit["optimum"] <= max(sizes):
        span = f" ({interval(fit['optimum_interval'], '.0f')})" if fit["df"] else ""
        ax.axvline(fit["optimum"], color="black", linestyle="--", linewidth=0.8, label=f"optimum {fit['optimum']:.1f}{span}")
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda size, _: f"{size:g}")
    ax.set_ylim(min(losses) - 0.3 * np.ptp(losses), max(losses) + 0.3 * np.ptp(losses))
    ax.set_xlabel("global batch, sequences")
    ax.set_ylabel("test loss, nats per token")
    ax.set_title(name, loc="left")
    ax.legend(frameon=False)
    save_figure(figure, path)


def plot_curves(experiments, baseline, path):
    """A panel for each experiment: its runs' smoothed training loss and validation points over those of the baseline."""
    labels = [label for label in experiments if label != baseline] or [baseline]
    curves = {label: [read_curves(run) for run in experiments[label]] for label in experiments}
    across = min(len(labels), 3)
    figure, axes = new_figure(math.ceil(len(labels) / across), across, sharex=True, sharey=True, squeeze=False,
                              figsize=(4.2 * across, 3 * math.ceil(len(labels) / across) + 0.6))
    for ax, label in zip(axes.flat, labels):
        for shown, color, width in ((baseline, "0.7", 0.8), (label, "black", 0.8)):
            for i, (tokens, loss, val_tokens, val_loss) in enumerate(curves.get(shown, [])):
                ax.plot(tokens, loss, color=color, linewidth=width, label=shown if not i else None)
                ax.plot(val_tokens, val_loss, "o", color=color, markerfacecolor="white", markersize=3.5)
        ax.set_title(label, loc="left", fontsize=10)
        ax.legend(frameon=False, fontsize=8)
    for ax in axes.flat[len(labels):]:
        ax.set_visible(False)
    for ax in axes.flat[max(len(labels) - across, 0):len(labels)]:  # the lowest of each column
        ax.tick_params(labelbottom=True)
    ends = np.concatenate([loss[len(loss) // 10:] for runs in curves.values() for _, loss, _, _ in runs])
    axes.flat[0].set_ylim(np.nanmin(ends) - 0.1, np.nanquantile(ends, 0.98) + 0.2)
    figure.supxlabel("training tokens, millions", fontsize=10)
    figure.supylabel("loss, nats per token: training (lines, smoothed), validation (circles)", fontsize=10)
    save_figure(figure, path)


def read_curves(run):
    """(tokens in millions, training loss as a mean over a fiftieth of the run, tokens of validations, validation losses)."""
    log = Path(run.get("path", f"{run['name']}/best.pt")).with_name("log.jsonl")
    try:
        entries = [json.loads(line) for line in log.read_text().splitlines()]
    except (OSError, ValueError):
        raise ResultsError(f"--curves wants the run's {log}, which is not there or is damaged") from None
    train, val = [e for e in entries if "loss" in e], [e for e in entries if "val_loss" in e]
    span = max(len(train) // 50, 1)
    smooth = np.convolve(np.array([e["loss"] for e in train], float), np.ones(span) / span, mode="valid")
    return ([e["tokens"] / 1e6 for e in train][span - 1:], smooth,
            [e["tokens"] / 1e6 for e in val], np.array([e["val_loss"] for e in val], float))


########################################
#           The command line           #
########################################

def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"eval.py: {message}; --help lists what there is\n")
    parser.add_argument("--ckpt", nargs="+", default=["out/best.pt"],
                        help="checkpoints, folders, globs, files of results (default: out/best.pt)")
    parser.add_argument("--baseline", metavar="NAME", help="the experiment that the others are compared with (default: the one "
                                                           "called baseline)")
    parser.add_argument("--noise", action="store_true", help="tell the baseline's spread by what its seeds vary")
    parser.add_argument("--fit_batch_size", action="store_true", help="fit the loss over the global batch size, of the runs "
                                                                      "named --baseline or of those that vary it most")
    parser.add_argument("--beside", metavar="FILE.json", help="another study's results: its differences stand beside ours")
    parser.add_argument("--markdown", action="store_true", help="print tables as Markdown")
    parser.add_argument("--json", metavar="FILE", help="write runs and statistics; --ckpt reads the file back")
    parser.add_argument("--plot", metavar="FILE.png", help="draw what is printed: the table, --noise or --fit_batch_size")
    parser.add_argument("--curves", metavar="FILE.png", help="draw the runs' loss curves over the baseline's")
    parser.add_argument("--batch_size", type=int, default=16, help="windows at a time (default: %(default)s)")
    parser.add_argument("--dataset", help="default: the one the checkpoint was trained on")
    parser.add_argument("--data_dir", help="default: the one the checkpoint was trained with")
    parser.add_argument("--amp", default="off", choices=("auto", "off", "bfloat16", "float16"),
                        help="autocast; the published losses were measured in float16 (default: %(default)s)")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    args = parser.parse_args()
    if args.batch_size < 1:
        parser.error("--batch_size must be at least 1")
    if args.noise and args.fit_batch_size:
        parser.error("--noise and --fit_batch_size are two views; ask for one")
    return args


def measure_all(args):
    """-> (this process's rank, all runs that --ckpt asks for, folders of those without an end). Raises as evaluate does."""
    checkpoints, files, unfinished = find_runs(args.ckpt)
    runs = [run for file in files for run in read_results(file)]
    rank = 0
    if checkpoints:
        device, rank, world_size = start_processes(args.device)
        configs = [read_checkpoint(path, mmap=True)["config"] for path in checkpoints]
        names = {config["name"] for config in configs} | {run["name"] for run in runs}
        if None in (datasets := {config["dataset"] for config in configs}):  # OpenAI's weights, tested on what the others are
            args.dataset = args.dataset or min(datasets - {None}, default="fineweb")
        if args.baseline and args.baseline.split(", ")[0] not in names:  # a typo is found before hours of evaluation
            raise ResultsError(f"no run is named '{args.baseline}' (from --baseline); there are {', '.join(sorted(names))}")
        for path in checkpoints:
            runs.append(evaluate(path, args, device, rank, world_size))
            if rank == 0 and len(checkpoints) > 1:
                print(f"{path}: {runs[-1]['test_loss']:.6f}", file=sys.stderr)
    if not runs:
        raise ResultsError(f"no run has ended yet: {', '.join(unfinished)}")
    if len({run.get("test_sha256", run.get("dataset")) for run in runs}) > 1:
        raise DataError("these runs were tested on different data, so their losses don't compare; choose one data set with "
                        "--dataset, or put another study's results --beside")
    return rank, runs, unfinished


def report(args, runs, unfinished):
    """Prints, writes and draws what was asked for."""
    experiments = gather(runs)
    told = {"runs": runs}
    if args.fit_batch_size:
        name, sizes, losses = points_to_fit(experiments, args.baseline)
        told["fit"] = fit = fit_batch_size(sizes, losses)
        print(tell_fit(name, fit, sizes))
        if args.plot:
            plot_fit(name, fit, sizes, losses, args.plot)
    else:
        baseline = choose_baseline(experiments, args.baseline)
        rows = compare(experiments, baseline)
        if args.noise:
            told["noise"] = result = noise(experiments[baseline] if baseline else runs if len(experiments) == 1 else [])
            print(tell_noise(result, args.markdown))
        else:
            told["rows"] = rows
            print(tell_one(runs[0]) if is_one_checkpoint(args, runs) else table_and_legend(args, rows, baseline))
        if args.plot:
            plot_noise(result, args.plot) if args.noise else plot_table(rows, baseline, args.plot)
        if args.curves:
            plot_curves(experiments, baseline, args.curves)
    for folder in unfinished:
        print(f"missing: {folder} has not ended (the same command with --resume goes on)")
    if args.json:
        Path(args.json).write_text(as_json(told))


def is_one_checkpoint(args, runs):
    return len(runs) == 1 and not args.markdown and "perplexity" in runs[0]


def table_and_legend(args, rows, baseline):
    other = None
    if args.beside:
        theirs = gather(read_results(args.beside))
        other = Path(args.beside).stem, compare(theirs, choose_baseline(theirs, None))
    return comparison_table(rows, args.markdown, other) + "\n\n" + tell_table(rows, baseline)


def as_json(told):
    """JSON with a line for each run and each row, so that a changed figure is one changed line."""
    parts = []
    for key, value in told.items():
        if isinstance(value, list):
            lines = ",\n".join("  " + json.dumps(entry, default=np.ndarray.tolist) for entry in value)
            parts.append(f' "{key}": [\n{lines}\n ]')
        else:
            parts.append(f' "{key}": {json.dumps(value, default=np.ndarray.tolist)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main():
    try:
        args = parse_arguments()
        rank, runs, unfinished = measure_all(args)
        if rank == 0:
            report(args, runs, unfinished)
        if dist.is_initialized():
            dist.destroy_process_group()
    except (CheckpointError, DataError, DeviceError, ResultsError) as error:
        sys.exit(f"eval.py: {error}")
    except OSError as error:
        sys.exit(f"eval.py: {describe(error)}")
    except KeyboardInterrupt:
        sys.exit("eval.py: stopped")


if __name__ == "__main__":
    main()
