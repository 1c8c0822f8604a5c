"""A study: its runs found, grouped into experiments, and compared.

A run is a dict with a name, a test_loss and options. eval.py writes the options in "config"; a file
written by hand may have them beside the name. An option that is missing has its default. A run with
"reference" is shown beside the others but not tested: it differs in more than options.
"""

import glob
import math
import os
from pathlib import Path

import numpy as np

from config import OPTIONS, RESUME_MAY_CHANGE, SEEDS, parse
from nanolab import stats
from nanolab.common import UserError, parse_json
from nanolab.logfile import read_log

# Runs that differ only in these are one experiment: their results are the same up to noise.
# (Compiled code draws other dropout masks.)
SAME_EXPERIMENT = {*RESUME_MAY_CHANGE, *SEEDS, "compile"}

# What the seeds of a set of runs vary: the sources of noise.
ONE_SEED = "both, by one seed"
LOOP = "the loop (data order, dropout), initial weights fixed"
INITIAL_WEIGHTS = "initial weights, the loop fixed"


def find_runs(words):
    """What --ckpt names: (checkpoints, results files, folders of unfinished runs).

    A checkpoint named in full is taken as it is. Globs and folders leave out unfinished runs.
    Raises UserError.
    """
    checkpoints, results_files, unfinished = [], [], []
    for word in words:
        if glob.has_magic(word):
            found = find_in_glob(word)
        elif is_folder_of_runs(word):
            found = find_in_folder(word)
        else:
            (results_files if word.endswith(".json") else checkpoints).append(word)
            continue
        if not found:
            raise UserError(f"there is no run in {word}" if is_folder_of_runs(word)
                            else f"nothing matches '{word}'")
        for path in found:
            if path.endswith(".json"):
                results_files.append(path)
            elif is_unfinished(path):
                unfinished.append(os.path.dirname(path))
            else:
                checkpoints.append(path)
    return list(dict.fromkeys(checkpoints)), results_files, list(dict.fromkeys(unfinished))


def find_in_glob(pattern):
    """The files that match, best.pt of the runs in folders that match, and matching checkpoints
    that a run does not have yet."""
    found = set()
    for path in glob.glob(pattern, recursive=True):
        found.update(find_in_folder(path) if os.path.isdir(path) else [path])
    folder_pattern, name = os.path.split(pattern)
    if name.endswith(".pt") and not glob.has_magic(name):
        for folder in glob.glob(folder_pattern, recursive=True):
            path = os.path.join(folder, name)
            if has_beside(path, "config.json"):
                found.add(path)
    return sorted(found)


def find_in_folder(folder):
    return sorted(str(config.with_name("best.pt")) for config in Path(folder).rglob("config.json"))


def is_folder_of_runs(word):
    hugging_face = ("model.safetensors", "model-*-of-*.safetensors", "pytorch_model.bin")
    return os.path.isdir(word) and not any(any(Path(word).glob(name)) for name in hugging_face)


def is_unfinished(checkpoint):
    """Whether its run has not ended. A checkpoint that is there without its run counts as ended."""
    if not os.path.exists(checkpoint):
        return True
    return has_beside(checkpoint, "config.json") and not has_beside(checkpoint, "summary.json")


def has_beside(path, name):
    return Path(path).with_name(name).exists()


def read_results(path, loss="test_loss"):
    """The runs in a results file, each with this loss. Raises UserError."""
    try:
        content = parse_json(Path(path).read_text())
        runs = content["runs"] if isinstance(content, dict) else content
        if runs == []:
            raise UserError(f"{path} has no runs")
        for run in runs:
            if not isinstance(run["name"], str) or not math.isfinite(run[loss]):
                raise TypeError
            check_settings(run, path)
        return runs
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise UserError(f"{path} is no file of results: it needs a list of runs, each with a name "
                        f"and a {loss}") from None


def check_settings(run, path):
    """Raises TypeError if a figure of a run in a results file has a wrong type, UserError if an
    option has (words may stand for a seed), or if this nanolab lacks an option."""
    if unknown := sorted(run.get("config", {}).keys() - OPTIONS.keys()):
        raise UserError(f"{path} has the option {unknown[0]}, which this nanolab does not have; "
                        "use the nanolab that made it")
    losses, sizes = (run.get(key) or [] for key in ("group_losses", "group_windows"))
    numbers = [run.get(key) or 0 for key in ("seconds", "tokens_per_second", "parameters",
                                             "trained_tokens")] + [*losses, *sizes]
    words = [run.get(key, "") for key in ("path", "dataset", "test_sha256")]
    if not (len(losses) == len(sizes) and all(isinstance(n, (int, float)) for n in numbers)
            and all(isinstance(word, str) for word in words)
            and isinstance(run.get("cost", 0), (str, int, float))):
        raise TypeError
    for key, value in settings(run).items():
        if key in (*SEEDS, "seed"):
            hash(value)
        elif value is not None:
            parse(key, value, path)


def read_logs(experiments):
    """The logs of all runs, as read_log returns them: {label: [log, ...]}. Raises UserError."""
    logs = {}
    for label, runs in experiments.items():
        for run in runs:
            path = Path(run.get("path", f"{run['name']}/best.pt")).with_name("log.jsonl")
            try:
                logs.setdefault(label, []).append(read_log(path))
            except (OSError, ValueError, TypeError):
                raise UserError(f"--curves needs the run's {path}, "
                                "which is missing or damaged") from None
    return logs


def settings(run):
    """Every option of a run. A seed that is None follows `seed`, as in config.load."""
    given = run.get("config", run)
    options = {key: given.get(key, option.default) for key, option in OPTIONS.items()}
    for key in SEEDS:
        if options[key] is None:
            options[key] = options["seed"]
    return options


def group_by_experiment(runs):
    """-> {label: runs}

    The runs of one experiment have one name and differ only in SAME_EXPERIMENT. The label is the
    name; if experiments share it, the options that differ too.
    """
    experiments = {}
    for run in runs:
        experiments.setdefault((run["name"], relevant_options(run)), []).append(run)
    labelled = {}
    for (name, options), members in experiments.items():
        namesakes = [dict(others) for other_name, others in experiments if other_name == name]
        differing = [f"{key}={value}" for key, value in options
                     if any(others.get(key) != value for others in namesakes)]
        labelled[", ".join([name, *differing])] = members
    return labelled


def relevant_options(run):
    """The options that tell experiments apart, as pairs."""
    options = settings(run)
    ignored = SAME_EXPERIMENT.union({"max_tokens"} if options["max_steps"] else ())
    return tuple((key, value) for key, value in options.items() if key not in ignored)


def seeds_of(run):
    options = settings(run)
    return tuple(options[key] for key in SEEDS)


def by_seed(runs):
    """-> {(init_seed, data_seed, dropout_seed): test loss}

    Runs with the same seeds are averaged: a repeat is not another sample of the noise.
    """
    losses = {}
    for run in runs:
        losses.setdefault(seeds_of(run), []).append(run["test_loss"])
    return {seeds: float(np.mean(repeats)) if len(set(repeats)) > 1 else repeats[0]
            for seeds, repeats in losses.items()}


def choose_baseline(experiments, wanted):
    """The label of the experiment that the others are compared with. Raises UserError.

    None if `wanted` is None and no experiment is called baseline.
    """
    if wanted in experiments:
        return wanted
    matching = [label for label in experiments if label.startswith(f"{wanted or 'baseline'}, ")]
    if wanted and not matching:
        raise UserError(f"no run is named '{wanted}' (from --baseline); "
                        f"there are {', '.join(sorted(experiments))}")
    if wanted and len(matching) > 1:
        raise UserError(f"--baseline='{wanted}' could be any of: {'; '.join(sorted(matching))}")
    if not wanted and "baseline" in experiments:
        return "baseline"
    return matching[0] if len(matching) == 1 else None


def compare(experiments, baseline):
    """The rows of the table, as dicts, from the highest mean loss to the lowest."""
    rows = []
    for label, runs in experiments.items():
        by_seeds = by_seed(runs)
        losses, seconds = list(by_seeds.values()), mean_of(runs, "seconds")
        rows.append({"experiment": label, "n": len(losses), "test_loss": float(np.mean(losses)),
                     "sd": stats.sample_sd(losses), "losses": losses,
                     "tokens_per_second": mean_of(runs, "tokens_per_second"),
                     "hours": seconds and seconds / 3600, "cost": cost_of(runs)})
        if len(losses) > 1:
            rows[-1]["mean_interval"] = stats.mean_interval(by_seeds)
        if label == baseline and len(losses) > 1:
            rows[-1]["one_more_run"] = stats.prediction_interval(by_seeds)
        elif baseline and label != baseline:
            result = stats.difference(by_seeds, by_seed(experiments[baseline]))
            if all(run.get("reference") for run in runs):
                result = {"difference": result["difference"], "compared": "reference"}
            rows[-1].update(result, text_error=text_error(runs, experiments[baseline]),
                            n_groups=len(runs[0].get("group_losses", ())))
    add_verdicts(rows)
    return sorted(rows, key=lambda row: -row["test_loss"])


def text_error(runs, others=None):
    """The standard error of a mean loss, or of a difference of two, from the choice of the test
    documents: by a bootstrap over groups of them, paired for a difference. None if unknown."""
    losses, sizes = group_losses(runs)
    if others:
        their_losses, their_sizes = group_losses(others)
        if losses is None or sizes != their_sizes:
            return None
        losses = losses - their_losses
    return None if sizes is None or len(sizes) < 2 else stats.bootstrap_error(losses, sizes)


def group_losses(runs):
    """The loss of each group of test documents, a mean over the runs, and the groups' sizes."""
    sizes = [run.get("group_windows") for run in runs]
    if any(each is None or each != sizes[0] for each in sizes):
        return None, None
    return np.mean([run["group_losses"] for run in runs], axis=0), sizes[0]


def mean_of(runs, key):
    """The mean of a figure over the runs that have it, or None."""
    values = [run[key] for run in runs if run.get(key) is not None]
    return float(np.mean(values)) if values else None


def cost_of(runs):
    """The mean cost in US$; or the words of a file written by hand, such as "35 to 42"; or None."""
    words = [run["cost"] for run in runs if isinstance(run.get("cost"), str)]
    return words[0] if words else mean_of(runs, "cost")


def add_verdicts(rows):
    """Adds the verdict to each row that was compared, and to each that was tested its interval.

    The rule is Bonferroni's. Of m tests each is made at 5 % / m, so that all m intervals hold
    together 95 times in 100. A difference is shown if its interval leaves out 0.
    """
    tested = [row for row in rows if row.get("p") is not None]
    for row in tested:
        level = 0.05 / len(tested)
        low, high = stats.t_interval(row["difference"], row["error"], row["df"], level)
        verdict = "better" if high < 0 else "worse" if low > 0 else "not shown"
        row.update(low=low, high=high, p_corrected=min(1.0, len(tested) * row["p"]),
                   verdict=verdict,
                   detectable=stats.detectable(row["error"], row["df"], level))
        if row["text_error"] is not None:
            both = stats.add_error(row["error"], row["df"], row["text_error"], row["n_groups"] - 1)
            row["other_text"] = stats.t_interval(row["difference"], *both, level)
    for row in rows:
        if row.get("compared", "").startswith("identical"):
            row["verdict"] = "identical"
        elif "p" in row:
            row.setdefault("verdict", "not shown")


def too_few_seeds(rows):
    """[(label, seeds, how many would show the difference)] of the experiments whose two or three
    paired seeds did not show it."""
    tested = [row for row in rows if row.get("p") is not None]
    return [(row["experiment"], row["n"],
             stats.seeds_to_show(row["difference"], row["error"], row["n"], 0.05 / len(tested)))
            for row in tested if row["verdict"] == "not shown" and row["n"] < 4
            and row["compared"].startswith("paired")]


def other_budgets(experiments, baseline):
    """{label: training tokens} of the experiments that were compared and whose budget differs from
    the baseline's by more than 1 %; the baseline's own comes first. {} if there is none."""
    def budget(label):
        options = settings(experiments[label][0])
        tokens = options["max_steps"] * options["global_batch_size"] * options["block_size"]
        return tokens or options["max_tokens"]

    compared = [label for label, runs in experiments.items()
                if baseline and not all(run.get("reference") for run in runs)]
    others = {label: budget(label) for label in compared
              if abs(budget(label) / budget(baseline) - 1) > 0.01}
    return others and {baseline: budget(baseline), **others}


def same_configurations(experiments):
    """Labels of experiments with different names but equal options, in lists."""
    labels = {}
    for label, runs in experiments.items():
        if all("config" in run and not run.get("reference") for run in runs):
            labels.setdefault(relevant_options(runs[0]), []).append(label)
    return [members for members in labels.values() if len(members) > 1]


def noise(runs):
    """The spread of one experiment's losses by its source. -> a dict. Raises UserError."""
    losses, groups = by_seed(runs), sources_of_noise(runs)
    if not groups:
        raise UserError("--noise needs at least two runs of the baseline, each with one seed for "
                        "all, or with a seed in common; name the baseline with --baseline")
    rows = [{"source": source, **stats.spread(group), "sd_interval": stats.sd_interval(group)}
            for source, group in groups.items()]
    rows.append({"source": "all runs", **stats.spread(list(losses.values()))})
    model = stats.mixed_model(list(losses.values()), list(losses))
    sds = {effect: model[effect] and math.sqrt(model[effect])
           for effect in ("weights", "loop", "rest")}
    return {"sources": rows, "sd_by_effect": sds, "mean_interval": stats.mean_interval(losses),
            "one_more_run": stats.prediction_interval(losses)}


def sources_of_noise(runs):
    """The losses of one experiment by what varied: {source: losses}. A run may count twice."""
    losses = by_seed(runs)
    one_seed = {seeds_of(run) for run in runs if len({settings(run)["seed"], *seeds_of(run)}) == 1}
    same_weights, same_loop = {}, {}
    for seeds in losses:
        init_seed, *loop_seeds = seeds
        same_weights.setdefault(init_seed, []).append(seeds)
        same_loop.setdefault(tuple(loop_seeds), []).append(seeds)
    chosen = {ONE_SEED: [seeds for seeds in losses if seeds in one_seed],
              LOOP: max(same_weights.values(), key=len, default=[]),
              INITIAL_WEIGHTS: max(same_loop.values(), key=len, default=[])}
    return {source: [losses[seeds] for seeds in members]
            for source, members in chosen.items() if len(members) > 1}


def points_to_fit(experiments, wanted):
    """The runs named `wanted`, or of the name that has the most global batch sizes.

    -> name, sizes, losses. Raises UserError.
    """
    points = {}
    for runs in experiments.values():
        name, size = runs[0]["name"], settings(runs[0])["global_batch_size"]
        points.setdefault(name, []).extend((size, loss) for loss in by_seed(runs).values())
    name = wanted or max(points, key=lambda name: len({size for size, _ in points[name]}))
    sizes, losses = np.array(sorted(points.get(name, [])), float).reshape(-1, 2).T
    if len(set(sizes)) < 3:
        raise UserError("--fit_batch_size needs runs of at least 3 global batch sizes; "
                        f"{name} has {len(set(sizes))}")
    return name, sizes, losses
