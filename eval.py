"""Test loss of checkpoints: how good is a model on text that no run has seen?

    python eval.py --ckpt out/best.pt
    python eval.py --ckpt out/a/best.pt out/b/best.pt --baseline a --markdown
    torchrun --standalone --nproc_per_node=8 eval.py --ckpt out/best.pt

The loss is the mean cross-entropy over all whole windows of the test split, each token predicted from its own window only.
It is computed in float32 unless --amp says otherwise, and is the same, to about 1e-6, for any batch size and number of
processes.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch.distributed as dist

from model import GPT, CheckpointError, DeviceError, autocast_dtype, mean_loss, read_checkpoint, start_processes
from prepare import DataError, Windows, describe, read_meta


def evaluate(path, args, device, rank, world_size):
    """The test results of one checkpoint, as a dict. Raises CheckpointError, DataError."""
    checkpoint = read_checkpoint(path)
    config = checkpoint["config"]
    data_dir, dataset = args.data_dir or config["data_dir"], args.dataset or config["dataset"]
    meta = read_meta(data_dir, dataset)
    if meta["tokenizer"] != checkpoint["tokenizer"]:
        raise DataError(f"{path} was trained on {checkpoint['tokenizer']} tokens, the data set {dataset} has "
                        f"{meta['tokenizer']}")
    windows = Windows(data_dir, dataset, "test", config["block_size"])
    model = GPT.from_checkpoint(checkpoint).to(device)
    loss = mean_loss(model, windows, len(windows), args.batch_size, device, autocast_dtype(args.amp, device), rank, world_size)
    test = meta["splits"]["test"]
    return {"name": config["name"], "path": str(path), "test_loss": loss, "perplexity": math.exp(min(loss, 700)),
            "bits_per_byte": loss / math.log(2) * test["tokens"] / test["bytes"],
            "windows": len(windows), "tokens": len(windows) * config["block_size"], "block_size": config["block_size"],
            "dataset": dataset, "test_sha256": test["sha256"], "amp": args.amp,
            "seed": config["seed"], "step": checkpoint["step"], "trained_tokens": checkpoint["tokens"],
            "seconds": checkpoint["seconds"]}


def table(results, baseline):
    """The rows of the table, header first: from the worst to the best test loss, as the published one, with the improvement
    over the run named `baseline` where there is one."""
    reference = next((r["test_loss"] for r in results if r["name"] == baseline), None)
    improvement = ["improvement"] if reference is not None else []
    rows = [["name", "seed", "test loss", *improvement, "perplexity", "bits per byte", "checkpoint"]]
    for r in sorted(results, key=lambda r: -r["test_loss"]):
        improvement = [f"{reference - r['test_loss']:+.6f}"] if reference is not None else []
        rows.append([r["name"], str(r["seed"]), f"{r['test_loss']:.6f}", *improvement, f"{r['perplexity']:.3f}",
                     f"{r['bits_per_byte']:.6f}", r["path"]])
    return rows


def as_text(rows, markdown=False):
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    if markdown:
        lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"eval.py: {message}; --help lists what there is\n")
    parser.add_argument("--ckpt", nargs="+", default=["out/best.pt"], help="checkpoints (default: out/best.pt)")
    parser.add_argument("--baseline", metavar="NAME", help="the run that the others' improvement is measured against")
    parser.add_argument("--json", metavar="FILE", help="write the results there as well")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--batch_size", type=int, default=16, help="windows at a time (default: %(default)s)")
    parser.add_argument("--dataset", help="default: the one the checkpoint was trained on")
    parser.add_argument("--data_dir", help="default: the one the checkpoint was trained with")
    parser.add_argument("--amp", default="off", choices=("auto", "off", "bfloat16", "float16"),
                        help="autocast; the published losses were measured in float16 (default: %(default)s)")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    args = parser.parse_args()
    if args.batch_size < 1:
        parser.error("--batch_size must be at least 1")
    return args


def evaluate_all(args):
    device, rank, world_size = start_processes(args.device)
    if args.baseline:  # a typo is found before hours of evaluation
        names = sorted({read_checkpoint(path)["config"]["name"] for path in args.ckpt})
        if args.baseline not in names:
            raise CheckpointError(f"no checkpoint is named '{args.baseline}' (from --baseline); there are {', '.join(names)}")
    results = []
    for path in args.ckpt:
        results.append(evaluate(path, args, device, rank, world_size))
        if rank == 0 and len(args.ckpt) > 1:
            print(f"{path}: {results[-1]['test_loss']:.6f}", file=sys.stderr)
    if len({r["test_sha256"] for r in results}) > 1:
        raise DataError("these checkpoints were tested on different data, so their losses don't compare; choose one data set "
                        "with --dataset")
    if rank == 0:
        if args.json:
            Path(args.json).write_text(json.dumps(results, indent=1) + "\n")
        if len(results) > 1 or args.markdown:
            print(as_text(table(results, args.baseline), args.markdown))
        else:
            r = results[0]
            print(f"{r['path']}: {r['name']}, step {r['step']:,}, on the test split of {r['dataset']}\n"
                  f"test loss      {r['test_loss']:.6f} nats per token\n"
                  f"perplexity     {r['perplexity']:.3f}\n"
                  f"bits per byte  {r['bits_per_byte']:.6f}\n"
                  f"windows        {r['windows']:,} of {r['block_size']:,} tokens, {r['tokens']:,} tokens")
    if dist.is_initialized():
        dist.destroy_process_group()


def main():
    try:
        evaluate_all(parse_arguments())
    except (CheckpointError, DataError, DeviceError) as error:
        sys.exit(f"eval.py: {error}")
    except OSError as error:
        sys.exit(f"eval.py: {describe(error)}")
    except KeyboardInterrupt:
        sys.exit("eval.py: stopped")


if __name__ == "__main__":
    main()
