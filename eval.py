"""The test loss of one checkpoint or of many.

    python eval.py --ckpt out/best.pt
    python eval.py --ckpt 'out/lab/*/*'        every run in these folders; study.py compares them
    python eval.py --ckpt gpt2 out/finetune --dataset=mine        before and after fine-tuning
    torchrun --standalone --nproc_per_node=8 eval.py --ckpt out/best.pt

The loss is the mean cross-entropy over all whole windows of the test split. Each token is predicted
from its own window only. It is computed in float32 unless --amp says otherwise, and is the same, to
about 1e-6, for any batch size and number of processes. A result is saved next to its checkpoint, in
NAME.test.json, and not measured again until the checkpoint or the data change.
"""

import glob
import json
import os
from contextlib import suppress
from pathlib import Path

from nanolab.checkpoint import checkpoint_file
from nanolab.common import UserError, argument_parser, run_script, write_atomically
from nanolab.data import read_meta
from nanolab.distributed import end_distributed, init_distributed
from nanolab.evaluation import (amp_name, load_results, loss_of, measure_loss, result_path,
                                save_results)
from nanolab.huggingface import read_any
from nanolab.study.stats import t_interval, weighted_error


def main():
    args = parse_arguments()
    paths = find_checkpoints(args.ckpt)
    world = init_distributed(args.device, args.amp)
    results = []
    for path in paths:
        results.append(evaluate(path, args, world))
        if world.rank == 0:
            print(format_result(results[-1]) if len(paths) == 1 else
                  f"{path}: {loss_of(results[-1]):.6f}", flush=True)
    if world.rank == 0 and len(paths) == 2:
        print(format_difference(*results))
    if world.rank == 0 and args.json:
        write_atomically(args.json, json.dumps({"runs": results}, indent=1) + "\n")
    end_distributed()


def find_checkpoints(words):
    """The checkpoints that --ckpt names: files, runs' folders, folders of runs, globs, and weights
    in Hugging Face's layout. Raises UserError."""
    found = {}
    for word in words:
        is_glob, paths = glob.has_magic(word) and not os.path.exists(word), []
        for match in sorted(glob.glob(word, recursive=True)) if is_glob else [word]:
            runs = {Path(match, file).parent for name in ("best.pt", "last.pt")
                    for file in glob.glob(f"**/{name}", root_dir=match, recursive=True)}
            if runs or not (is_glob and Path(match, "log.jsonl").exists()):  # a run's first steps
                paths += map(str, map(checkpoint_file, sorted(runs) or [match]))
        if not paths:
            raise UserError(f"no checkpoint matches '{word}'")
        found |= dict.fromkeys(paths)
    return list(found)


def evaluate(path, args, world):
    """The test result of one checkpoint: the saved one, or measured and saved."""
    # other machines may not see rank 0's disk
    saved = world.from_rank_0(lambda: load_results(path, args.split))
    for result in saved["results"]:
        if is_current(result, args, world):
            with suppress(OSError):  # as study.py wants it: in a copy it may be the older file
                os.utime(result_path(path, args.split))
            return {**result, "path": path}
    checkpoint = read_any(path)
    config = checkpoint["config"]
    dataset = args.dataset or config["dataset"] or "fineweb"  # None: of Hugging Face's weights
    block_size = args.block_size or config["block_size"]
    result = measure_loss(checkpoint, args.data_dir or config["data_dir"], dataset, args.split,
                          block_size, args.batch_size, world)
    if world.rank == 0 and config["dataset"] and block_size == config["block_size"]:
        save_results(path, args.split, {**saved, "results": [*saved["results"], result]})
    return result


def is_current(result, args, world):
    """Whether a saved result is what would be measured now."""
    config = result["config"]
    meta = read_meta(args.data_dir or config["data_dir"], args.dataset or config["dataset"],
                     config["vocab_size"])
    sha256 = meta["splits"].get(args.split, {}).get("sha256")
    return (result.get("split"), result["dataset"], result[f"{args.split}_sha256"], result["amp"],
            result.get("block_size")) == (
                args.split, args.dataset or config["dataset"], sha256, amp_name(world),
                args.block_size or config["block_size"])


def paired_difference(first, other):
    """The difference of two results' losses on the same windows, and its 95 % interval; None for a
    single document. What is hard for one is hard for the other, so it is narrower than an interval
    of either."""
    gaps = [b - a for a, b in zip(first["group_losses"], other["group_losses"], strict=True)]
    error = weighted_error(gaps, first["group_windows"])
    difference = loss_of(other) - loss_of(first)
    return difference, error and t_interval(difference, error, len(gaps) - 1)


def format_difference(first, other):
    """Of two results, such as before and after fine-tuning."""
    same = ("split", "block_size", "group_windows", f"{first['split']}_sha256")
    if any(first[key] != other[key] for key in same):
        return "difference: none, the windows are not the same (--block_size=N cuts both alike)"
    difference, interval = paired_difference(first, other)
    words = "no interval, for the text is a single document"
    if interval:
        words = (f"95 % interval {interval[0]:+.4f} to {interval[1]:+.4f} for other such "
                 "documents; another seed is not in it")
    return f"difference: {difference:+.4f}, {words}"


def format_result(result):
    n, bits = result["averaged_steps"], result["bits_per_byte"]
    error = weighted_error(result["group_losses"], result["group_windows"])
    average = f"average of the last {n:,} steps' weights, " if n else ""
    of_text = "a single document" if error is None else f"{error:.4f} nats, by the documents"
    bits = f"{bits:.6f}" if bits else "not known: the data set does not say its bytes"
    split = result["split"]
    return (f"{result['path']}: {result['name']}, step {result['step']:,}, {average}"
            f"on the {split} split of {result['dataset']}\n"
            f"{f'{split} loss':16}{loss_of(result):.6f} nats per token\n"
            f"standard error  {of_text}\n"
            f"perplexity      {result['perplexity']:.3f}\n"
            f"bits per byte   {bits}\n"
            f"windows         {result['windows']:,} of {result['block_size']:,} tokens, "
            f"{result['tokens']:,} tokens")


def parse_arguments():
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--ckpt", nargs="+", default=["out/best.pt"],
        help="checkpoints, nanoGPT's too, runs' folders, folders of runs, globs in quotes, folders "
             "in Hugging Face's layout, or gpt2, gpt2-medium, ... (default: out/best.pt)")
    add("--json", metavar="FILE", help="write the results, for study.py")
    add("--batch_size", type=int, default=16, help="windows at a time (default: %(default)s)")
    add("--dataset", help="default: the one the checkpoint was trained on")
    add("--data_dir", help="default: the one the checkpoint was trained with")
    add("--split", default="test", choices=("test", "val"),
        help="val is saved in NAME.val.json, which study.py does not read (default: %(default)s)")
    add("--block_size", type=int,
        help="tokens in a window, if fewer than the checkpoint's; such a result is not saved")
    add("--amp", default="off", choices=("auto", "off", "bfloat16", "float16"),
        help="autocast; the published losses were measured in float16 (default: %(default)s)")
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    args = parser.parse_args()
    for key in ("batch_size", "block_size"):
        if getattr(args, key) is not None and getattr(args, key) < 1:
            parser.error(f"--{key} must be at least 1")
    return args


if __name__ == "__main__":
    run_script(main)
