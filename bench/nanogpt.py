"""Speed and memory against nanoGPT: the same shapes, each run in a process of its own.

    git clone https://github.com/karpathy/nanoGPT
    python bench/nanogpt.py nanoGPT --pairs=5
    python bench/nanogpt.py nanoGPT --device=cuda --compile=both --shapes 12x768-gpt2 \
        --batch_size=12 --steps=60

nanoGPT's side is its model.py with its own optimiser, gradient clipping and batches; nanolab's is
`python train.py config/bench.py`. Both: no dropout, tied embeddings, AdamW, clipping at 1, and
bytes of Python's library as tokens; float32 on a CPU, bfloat16 and TF32 on a GPU. nanoGPT has no
biases, as in its own training script, unless --biases gives it those of GPT-2, which nanolab always
has. On a GPU nanoGPT's vocabulary of 50,257 becomes 50,304, as in its script. The first three steps
are not timed.

Prints a Markdown table: medians over the pairs, and the ratios with their lowest and highest pair.
Close other programs first: they slow down the two sides unequally.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from shared import ROOT, STEPS_NOT_TIMED, commit, log_mean, run_python

from nanolab.common import UserError, argument_parser, run_script
from nanolab.devices import machine, synchronize
from nanolab.memory import peak_memory

SHAPES = {
    "4x128": dict(n_layer=4, n_head=4, n_embd=128, vocab_size=257, block_size=64, batch_size=12,
                  max_steps=400),
    "6x384": dict(n_layer=6, n_head=6, n_embd=384, vocab_size=257, block_size=256, batch_size=8,
                  max_steps=20),
    "6x384-gpt2": dict(n_layer=6, n_head=6, n_embd=384, vocab_size=50257, block_size=256,
                       batch_size=8, max_steps=12),
    "12x768-gpt2": dict(n_layer=12, n_head=12, n_embd=768, vocab_size=50257, block_size=1024,
                        batch_size=2, max_steps=6),
}


def main():
    args = parse_arguments()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    conditions = describe_conditions(args)
    print(f"{conditions}\n", flush=True)
    if not (args.data_dir / "stdlib/meta.json").exists():
        run_python("prepare.py", "stdlib", f"--data_dir={args.data_dir}")
    shapes = {name: shape_of(name, args) for name in args.shapes}
    pairs = {name: [] for name in shapes}
    for i in range(args.pairs):
        for name, shape in shapes.items():
            pair = run_pair(shape, i, args)
            pairs[name].append(pair)
            print(f"pair {i + 1}, {name}: nanoGPT {pair['nanogpt']['tokens_per_second']:,.0f} "
                  f"tokens/s, nanolab {pair['nanolab']['tokens_per_second']:,.0f}",
                  file=sys.stderr, flush=True)
    print(format_table(shapes, pairs))
    if args.json:
        content = {"conditions": conditions, "shapes": shapes, "pairs": pairs}
        Path(args.json).write_text(json.dumps(content, indent=1) + "\n")


def shape_of(name, args):
    given = {"max_steps": args.steps, "batch_size": args.batch_size}
    return SHAPES[name] | {key: value for key, value in given.items() if value}


def run_pair(shape, i, args):
    """One run of each side; which is first alternates from pair to pair. -> {side: figures}"""
    sides = {"nanogpt": lambda: run_nanogpt(shape, args.compile != "none", args),
             "nanolab": lambda: run_nanolab(shape, args.compile == "both", args)}
    order = list(sides)[::-1] if i % 2 else list(sides)
    return {side: sides[side]() for side in order}


def run_nanolab(shape, compiled, args):
    """-> tokens per second, peak memory in MB, share of the speed of matrix products."""
    flags = [f"--{key}={value}" for key, value in shape.items()]
    with tempfile.TemporaryDirectory() as out_dir:
        run_python("train.py", "config/bench.py", *flags,
                   f"--global_batch_size={shape['batch_size']}", "--tie_weights=True",
                   "--init=gpt2", "--grad_clip=1.0", f"--device={args.device}",
                   f"--compile={compiled}",
                   f"--data_dir={args.data_dir}", f"--out_dir={out_dir}")
        summary = json.loads(Path(out_dir, "summary.json").read_text())
        return {"tokens_per_second": log_mean(out_dir, "tokens_per_second"),
                "peak_memory_mb": summary["peak_memory_mb"],
                "share_of_matmul_speed": log_mean(out_dir, "mfu")}


def run_nanogpt(shape, compiled, args):
    """-> tokens per second, peak memory in MB."""
    job = json.dumps({"path": str(args.nanogpt), "shape": shape, "compiled": compiled,
                      "biases": args.biases, "tokens": str(args.data_dir / "stdlib/train.bin"),
                      "device": args.device})
    return json.loads(run_python(__file__, "--one_nanogpt_run", job).splitlines()[-1])


def time_nanogpt(path, shape, compiled, biases, tokens, device):
    """nanoGPT's training loop without its logging, in this process. Prints the figures as JSON."""
    sys.path.insert(0, path)
    import numpy as np
    from model import GPT, GPTConfig  # nanoGPT's

    shape = dict(shape)
    B, T, n_steps = shape.pop("batch_size"), shape["block_size"], shape.pop("max_steps")
    on_gpu = device == "cuda"
    if on_gpu and shape["vocab_size"] == 50257:
        shape["vocab_size"] = 50304
    torch.set_float32_matmul_precision("high" if on_gpu else "highest")
    model = GPT(GPTConfig(**shape, dropout=0.0, bias=biases)).to(device)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), device)
    run = torch.compile(model) if compiled else model
    data = np.memmap(tokens, dtype=np.uint16, mode="r")

    def get_batch():  # as in nanoGPT's train.py
        starts = torch.randint(len(data) - T, (B,))
        x = torch.stack([torch.from_numpy(data[i:i + T].astype(np.int64)) for i in starts])
        y = torch.stack([torch.from_numpy(data[i + 1:i + 1 + T].astype(np.int64)) for i in starts])
        if on_gpu:
            x, y = (each.pin_memory().to(device, non_blocking=True) for each in (x, y))
        return x, y

    batch = get_batch()
    for step in range(n_steps):
        if step == STEPS_NOT_TIMED:
            synchronize(torch.device(device))
            start = time.perf_counter()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=on_gpu):
            _, loss = run(*batch)
        batch = get_batch()  # while a GPU computes
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    synchronize(torch.device(device))
    seconds = time.perf_counter() - start
    print(json.dumps({"tokens_per_second": B * T * (n_steps - STEPS_NOT_TIMED) / seconds,
                      "peak_memory_mb": round(peak_memory(torch.device(device)) / 2**20)}))


def format_table(shapes, pairs):
    lines = ["| job | nanoGPT, tokens/s | nanolab, tokens/s | ratio, lowest to highest pair "
             "| peak memory, MB: nanoGPT | nanolab | ratio | share of matrix-product speed |",
             "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    for name, runs in pairs.items():
        shape = shapes[name]
        job = (f"{shape['n_layer']} x {shape['n_embd']}, vocabulary {shape['vocab_size']:,}, "
               f"context {shape['block_size']:,}, batch {shape['batch_size']}")
        rates = medians(runs, "tokens_per_second")
        memory = medians(runs, "peak_memory_mb")
        share = statistics.median(run["nanolab"]["share_of_matmul_speed"] for run in runs)
        ratios = [run["nanolab"]["tokens_per_second"] / run["nanogpt"]["tokens_per_second"]
                  for run in runs]
        lines.append(f"| {job} | {rates[0]:,.0f} | {rates[1]:,.0f} "
                     f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) "
                     f"| {memory[0]:,.0f} | {memory[1]:,.0f} | {memory[1] / memory[0]:.2f} "
                     f"| {share:.0%} |")
    return "\n".join(lines)


def medians(runs, key):
    """Over the pairs: nanoGPT's and nanolab's."""
    return [statistics.median(run[side][key] for run in runs) for side in ("nanogpt", "nanolab")]


def describe_conditions(args):
    """The caption: what a reader needs to judge the figures or to repeat them."""
    compiled = {"none": "neither compiled", "nanogpt": "nanoGPT compiled, nanolab not",
                "both": "both compiled"}[args.compile]
    return (f"{machine(torch.device(args.device))}, threads: {args.threads}; {date.today()}, "
            f"commit {commit()}, torch {version('torch')}; pairs: {args.pairs}, {compiled}. "
            f"Command: `python {' '.join(sys.argv)}`")


def parse_arguments():
    parser = argument_parser(__doc__)
    parser.add_argument("nanogpt", type=Path, metavar="PATH_OF_NANOGPT",
                        help="a copy of github.com/karpathy/nanoGPT")
    parser.add_argument("--pairs", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES),
                        help="default: all")
    parser.add_argument("--compile", choices=("none", "nanogpt", "both"), default="none",
                        help="which side torch.compile compiles (default: %(default)s)")
    parser.add_argument("--biases", action="store_true", help="nanoGPT has GPT-2's biases too")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu",
                        help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--steps", type=int, help="steps of a run (default: by shape)")
    parser.add_argument("--batch_size", type=int, help="sequences of a step (default: by shape)")
    parser.add_argument("--data_dir", type=Path, default=ROOT / "data",
                        help="where the data set stdlib is, or is made (default: data)")
    parser.add_argument("--json", metavar="FILE", help="write the figures of every run")
    args = parser.parse_args()
    args.nanogpt, args.data_dir = args.nanogpt.resolve(), args.data_dir.resolve()
    at_least_1 = [args.pairs, args.threads, 1 if args.batch_size is None else args.batch_size]
    if min(at_least_1) < 1 or args.steps is not None and args.steps < 5:
        parser.error("--pairs, --threads and --batch_size must be at least 1, --steps at least 5")
    if not (args.nanogpt / "model.py").is_file():
        raise UserError(f"there is no model.py in {args.nanogpt}; "
                        "git clone https://github.com/karpathy/nanoGPT")
    return args


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one_nanogpt_run"]:
        time_nanogpt(**json.loads(sys.argv[2]))
    else:
        run_script(main)
