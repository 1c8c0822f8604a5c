"""Test loss: of one checkpoint, or of a study's runs, compared with a baseline.

    python eval.py --ckpt out/best.pt
    python eval.py --ckpt 'out/lab/*/*/best.pt' --baseline baseline --plot table.png
    python eval.py --ckpt config/results/lab.json --markdown       the lab's table, from its data
    python eval.py --ckpt config/published.json --noise            which seeds cause how much noise
    python eval.py --ckpt config/published.json --fit_batch_size   the best global batch, by a fit
    python eval.py --ckpt out/ladder/runs --baseline published --scaling   loss over model size
    torchrun --standalone --nproc_per_node=8 eval.py --ckpt out/best.pt

The loss is the mean cross-entropy over all whole windows of the test split. Each token is predicted
from its own window only. It is computed in float32 unless --amp says otherwise, and is the same, to
about 1e-6, for any batch size and number of processes. A result is saved beside its checkpoint, in
NAME.test.json, and not measured again until the checkpoint or the data change.

--ckpt takes checkpoints, folders of runs, globs in quotes, and results files: what --json writes,
or by hand [{"name": "baseline", "test_loss": 3.69, "seed": 42}, ...] with any other options of
config/__init__.py. A comparison ends in better, worse, not shown (its interval has 0 in it, which
is no proof of no effect) or identical (to the last bit). The table's legend states the rules.
"""

if __name__ == "__main__":
    import nanolab.ctrl_c  # first, because the other imports take seconds

import json
import math
import os
import sys
from pathlib import Path

import numpy as np

from config import OPTIONS, SEEDS
from model import GPT
from nanolab import plots, scaling, study, tables
from nanolab.checkpoint import read_checkpoint
from nanolab.common import UserError, argument_parser, parse_json, run_script
from nanolab.cpu import plan_for_eval, share_batches
from nanolab.data import TokenDataset
from nanolab.devices import autocast_dtype, end_distributed, from_rank_0, init_distributed
from nanolab.measure import mean_losses
from nanolab.results import load_result, save_result
from nanolab.stats import fit_batch_size
from nanolab.token_files import read_meta


def main():
    args = parse_arguments()
    rank, runs, unfinished = measure_all(args)
    if rank == 0:
        report(args, runs, unfinished)
    end_distributed()


def measure_all(args):
    """-> this process's rank, all runs that --ckpt names, folders of unfinished runs"""
    checkpoints, results_files, unfinished = study.find_runs(args.ckpt)
    needed = "val_loss" if args.validation else "test_loss"
    runs = [run for file in results_files for run in study.read_results(file, needed)]
    rank = 0
    if checkpoints:
        device, rank, world_size = init_distributed(args.device)
        configs = [read_checkpoint(path, mmap=True)["config"] for path in checkpoints]
        datasets = {config["dataset"] for config in configs}
        if None in datasets:  # Hugging Face's weights are tested on the data of the others
            args.dataset = args.dataset or min(datasets - {None}, default="fineweb")
        check_one_of_each_run(checkpoints, configs)
        names = {run["name"] for run in configs + runs}
        if args.baseline and not any(f"{args.baseline}, ".startswith(f"{name}, ")
                                     for name in names):  # hours before it is needed
            raise UserError(f"no run is named '{args.baseline}' (from --baseline); "
                            f"there are {', '.join(sorted(names))}")
        for path in checkpoints:
            runs.append(evaluate(path, args, device, rank, world_size))
            if rank == 0 and len(checkpoints) > 1 and not args.validation:
                print(f"{path}: {runs[-1]['test_loss']:.6f}", file=sys.stderr)
    if not runs:
        raise UserError(f"no run has ended yet: {', '.join(unfinished)}")
    if args.validation and len({study.settings(run)["dataset"] for run in runs}) > 1:
        raise UserError("these runs were validated on different data, so their losses cannot be "
                        "compared")
    if not args.validation and len({run.get("test_sha256", run.get("dataset"))
                                    for run in runs}) > 1:
        raise UserError("these runs were tested on different data, so their losses cannot be "
                        "compared; choose one data set with --dataset, or show another study's "
                        "results with --beside")
    return rank, runs, unfinished


def check_one_of_each_run(checkpoints, configs):
    """Raises UserError if two checkpoints are of one run: they are no two samples of its noise."""
    seen = {}
    for path, config in zip(checkpoints, configs):
        other = seen.setdefault(os.path.dirname(path), path)
        if other != path and config["dataset"] is not None:
            raise UserError(f"{other} and {path} are of one run; name one of them")


def evaluate(path, args, device, rank, world_size):
    """The test result of one checkpoint, as a dict: the saved one, or measured and saved."""
    checkpoint = read_checkpoint(path, mmap=True)
    config = checkpoint["config"]
    data_dir, dataset = args.data_dir or config["data_dir"], args.dataset or config["dataset"]
    if args.validation:  # nothing is measured
        return {"name": config["name"], "path": str(path), "dataset": config["dataset"],
                "config": changed_options(config), **training_facts(path, checkpoint)}
    meta = read_meta(data_dir, dataset)
    if meta["tokenizer"] != checkpoint["tokenizer"]:
        raise UserError(f"{path} was trained on {checkpoint['tokenizer']} tokens, "
                        f"the data set {dataset} has {meta['tokenizer']}")
    split, dtype = meta["splits"].get("test"), autocast_dtype(args.amp, device)
    amp = str(dtype).removeprefix("torch.") if dtype else "off"
    is_ours = config["dataset"] is not None  # nothing is saved beside Hugging Face's weights
    # other machines may not see rank 0's disk
    saved = from_rank_0(lambda: load_result(path)) if is_ours else {"results": []}
    for result in saved["results"]:
        if (split and result["test_sha256"] == split["sha256"] and result["amp"] == amp
                and "group_losses" in result):  # results of before lack these
            return {**result, "path": str(path), **training_facts(path, checkpoint)}

    test_data = TokenDataset(data_dir, dataset, "test", config["block_size"])
    model = GPT.from_checkpoint(path).to(device)
    n_parameters = model.num_params()
    model = share_batches(model, plan_for_eval(checkpoint, device))
    groups = test_data.groups_of_documents(meta["eot_id"])
    losses = mean_losses(model, test_data, groups, args.batch_size, device, dtype, rank,
                         world_size)
    sizes = [len(group) for group in groups]
    loss = math.fsum(map(math.prod, zip(losses, sizes))) / len(test_data)
    if not math.isfinite(loss):
        raise UserError(f"the test loss of {path} is not finite: its weights are too large")
    result = {"name": config["name"], "path": str(path),
              "test_loss": loss, "perplexity": math.exp(min(loss, 700)),
              "bits_per_byte": loss / math.log(2) * split["tokens"] / split["bytes"],
              "windows": len(test_data), "tokens": len(test_data) * config["block_size"],
              "group_windows": sizes, "group_losses": [round(each, 5) for each in losses],
              "block_size": config["block_size"], "parameters": n_parameters,
              "dataset": dataset, "test_sha256": split["sha256"], "amp": amp,
              "step": checkpoint["step"], "trained_tokens": checkpoint["tokens"],
              "averaged_steps": checkpoint.get("averaged_steps", 0),
              "config": changed_options(config)}
    if rank == 0 and is_ours:
        save_result(path, {**saved, "results": [*saved["results"], result]})
        if config.get("wandb") and dataset == config["dataset"]:
            log_to_wandb(path, config, loss)
    return {**result, **training_facts(path, checkpoint)}


def log_to_wandb(path, config, loss):
    """Adds the test loss to the Weights & Biases run that train.py logged to, if possible."""
    try:
        from wandb import init
        run_id = Path(path).with_name("wandb_id").read_text()
        tracker = init(project=config["wandb"], id=run_id, resume="allow")
        tracker.summary.update({f"{Path(path).stem}_test_loss": loss})
        tracker.finish()
    except Exception as error:  # not installed, another machine, network, account
        print(f"{path}: the test loss could not be added to Weights & Biases "
              f"({type(error).__name__})", file=sys.stderr)


def changed_options(config):
    """The seeds, and the options that differ from the published baseline's, the defaults."""
    return {key: value for key, value in config.items()
            if key in SEEDS or key == "seed"
            or key not in study.SAME_EXPERIMENT and value != OPTIONS[key].default}


def judged_by_validation(run):
    """The run with its validation loss in the place of the test loss. Raises UserError."""
    if run.get("val_loss") is None:
        raise UserError(f"{run['path']} has no validation loss that is a number")
    without = {key: value for key, value in run.items() if not key.startswith("group_")}
    return {**without, "test_loss": run["val_loss"]}


def training_facts(path, checkpoint):
    """The last validation loss up to this checkpoint; what the run took."""
    if checkpoint["config"]["dataset"] is None:
        return {}
    val_loss = checkpoint["val_loss"]
    known = val_loss is not None and math.isfinite(val_loss)
    return {"val_loss": val_loss if known else None, **time_and_cost(path, checkpoint)}


def time_and_cost(path, checkpoint):
    """Of the whole run, by its summary.json, or if it has not ended up to this checkpoint."""
    summary = Path(path).with_name("summary.json")
    if summary.exists():
        try:
            done = parse_json(summary.read_text())
            return {key: done[key] for key in ("seconds", "tokens_per_second", "cost", "machine")}
        except (OSError, ValueError, KeyError, TypeError):
            print(f"{summary} is damaged; the run's cost is left out", file=sys.stderr)
            return {}
    timed = checkpoint.get("timed_seconds")
    return {"seconds": checkpoint["seconds"],
            "tokens_per_second": checkpoint["timed_tokens"] / timed if timed else None,
            "cost": checkpoint["seconds"] / 3600 * checkpoint["config"]["dollars_per_hour"]}


def report(args, runs, unfinished):
    """Prints, draws and writes what was asked for."""
    content = {"runs": runs}
    if args.validation:
        runs = [judged_by_validation(run) for run in runs]
    experiments = study.group_by_experiment(runs)
    if args.fit_batch_size:
        name, sizes, losses = study.points_to_fit(experiments, args.baseline)
        content["fit"] = fit = fit_batch_size(sizes, losses)
        print(tables.format_fit(name, fit, sizes))
        if args.plot:
            plots.plot_fit(name, fit, sizes, losses, args.plot)
    elif args.scaling is not None:
        content["scaling"] = result = scaling.analyse(runs, args.baseline or "baseline",
                                                      args.scaling)
        print(tables.format_scaling(result, args.markdown))
        if args.plot:
            plots.plot_scaling(result, args.plot)
    else:
        baseline = study.choose_baseline(experiments, args.baseline)
        if args.noise:
            only = next(iter(experiments)) if len(experiments) == 1 else None
            content["noise"] = noise = study.noise(experiments.get(baseline or only, []))
            print(tables.format_noise(noise, args.markdown))
            if args.plot:
                plots.plot_noise(noise, args.plot)
        else:
            rows = study.compare(experiments, baseline)
            if not args.validation:
                content["rows"] = rows
            measured = len(runs) == 1 and {"perplexity", "path"} <= runs[0].keys()
            if measured and not (args.markdown or args.validation):
                print(format_result(runs[0]))
            else:
                print(format_study(args, experiments, rows, baseline))
            if args.plot:
                plots.plot_comparison(rows, baseline, args.plot)
        if args.curves:
            plots.plot_curves(study.read_logs(experiments), baseline, args.curves)
    for folder in unfinished:
        print(f"missing: {folder} has not ended (the same command with --resume goes on)")
    if args.json:
        Path(args.json).write_text(as_json(content))


def format_result(result):
    n = result.get("averaged_steps", 0)
    mean = f"mean of the last {n:,} steps' weights, " if n else ""
    return (f"{result['path']}: {result['name']}, step {result['step']:,}, {mean}"
            f"on the test split of {result['dataset']}\n"
            f"test loss      {result['test_loss']:.6f} nats per token\n"
            f"other text     {format_text_error(result)}\n"
            f"perplexity     {result['perplexity']:.3f}\n"
            f"bits per byte  {result['bits_per_byte']:.6f}\n"
            f"windows        {result['windows']:,} of {result['block_size']:,} tokens, "
            f"{result['tokens']:,} tokens")


def format_text_error(result):
    error = study.text_error([result])
    return f"standard error {error:.4f}, by a bootstrap over the test documents" if error else "-"


def format_study(args, experiments, rows, baseline):
    """The table, with a column for the other study that --beside names, and its legend."""
    other = None
    if args.beside:
        others = study.group_by_experiment(study.read_results(args.beside))
        other_baseline = study.choose_baseline(others, None)
        if not other_baseline:
            raise UserError(f"--beside={args.beside} has no experiment called baseline")
        other = Path(args.beside).stem, study.compare(others, other_baseline)
    loss = "validation loss" if args.validation else "test loss"
    table = tables.format_comparison(rows, args.markdown, other, loss)
    same = tables.format_same_configurations(study.same_configurations(experiments), experiments)
    cautions = tables.format_cautions(rows, experiments, baseline)
    return "\n\n".join(filter(None, [table, tables.format_legend(rows, baseline), cautions, same]))


def as_json(content):
    """JSON with a line for each run and each row, so that a changed figure is one changed line."""
    parts = []
    for key, value in content.items():
        if isinstance(value, list):
            lines = ",\n".join("  " + json.dumps(entry) for entry in value)
            parts.append(f' "{key}": [\n{lines}\n ]')
        else:
            parts.append(f' "{key}": {json.dumps(value, default=np.ndarray.tolist)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def parse_arguments():
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--ckpt", nargs="+", default=["out/best.pt"],
        help="checkpoints, folders, globs, results files (default: out/best.pt)")
    add("--baseline", metavar="NAME",
        help="the experiment that the others are compared with (default: the one called baseline)")
    add("--validation", action="store_true",
        help="compare the validation losses that the runs had: to choose among experiments without "
             "a look at the test split")
    add("--noise", action="store_true", help="print the baseline's spread by what its seeds vary")
    add("--fit_batch_size", action="store_true",
        help="fit the loss over the global batch size, of the runs named --baseline "
             "or of those that vary it most")
    add("--scaling", nargs="?", type=int, const=0, metavar="PARAMETERS",
        help="fit each recipe's loss over the size of the model and predict it for a larger one "
             "(default: for the largest measured, which the fit leaves out); and the share of the "
             "baseline's tokens with which the others reach its loss")
    add("--beside", metavar="FILE.json",
        help="another study's results: its differences stand beside ours")
    add("--markdown", action="store_true", help="print tables as Markdown")
    add("--json", metavar="FILE", help="write runs and statistics; --ckpt reads the file back")
    add("--plot", metavar="FILE.png",
        help="draw what is printed: the table, --noise, --fit_batch_size or --scaling")
    add("--curves", metavar="FILE.png", help="draw the runs' loss curves over the baseline's")
    add("--batch_size", type=int, default=16, help="windows at a time (default: %(default)s)")
    add("--dataset", help="default: the one the checkpoint was trained on")
    add("--data_dir", help="default: the one the checkpoint was trained with")
    add("--amp", default="off", choices=("auto", "off", "bfloat16", "float16"),
        help="autocast; the published losses were measured in float16 (default: %(default)s)")
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    args = parser.parse_args()
    if args.batch_size < 1:
        parser.error("--batch_size must be at least 1")
    is_fit = args.fit_batch_size or args.scaling is not None
    if args.validation and (args.plot or args.beside or args.noise or is_fit or args.dataset):
        parser.error("--validation is for the table of runs; --plot, --beside, --noise, "
                     "--fit_batch_size, --scaling and --dataset are for test losses")
    if args.beside and (args.noise or is_fit) or args.curves and is_fit:
        parser.error("--beside is for the table of runs, --curves for it and --noise")
    if args.noise + args.fit_batch_size + (args.scaling is not None) > 1:
        parser.error("--noise, --fit_batch_size and --scaling are three views; ask for one")
    return args


if __name__ == "__main__":
    run_script(main)
