"""Speed and memory against nanoGPT: the same shapes, each run in a process of its own.

    git clone https://github.com/karpathy/nanoGPT
    python bench/nanogpt.py nanoGPT --pairs=5
    python bench/nanogpt.py nanoGPT --device=cuda --compile --shapes 12x768-gpt2 --batch_size=12

nanoGPT's side is its model.py with its own optimiser, clipping and batches; nanolab's is train.py
config/bench.py. Both: no dropout, tied embeddings, AdamW, clipping at 1, bytes of Python's library
as tokens; float32 on a CPU, bfloat16 and TF32 on a GPU. As in its own script, nanoGPT has no
biases, which nanolab always has, and on a GPU 50,304 tokens for 50,257. Threads: OMP_NUM_THREADS,
or one a core. Prints medians over the pairs, and the ratios with their lowest and highest pair.
Close other programs first: they slow down the two sides unequally.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import harmonic_mean, median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from nanolab.common import UserError, argument_parser, git, run_script, write_atomically
from nanolab.distributed import World, machine
from nanolab.log import having, read_entries
from nanolab.memory import peak_memory

DATA_DIR = ROOT / "data"  # of the data set stdlib, which the first run makes
STEPS_NOT_TIMED = 3  # they allocate and compile
STEPS_ON_GPU = 103
OPTIONS = ("n_layer", "n_head", "n_embd", "vocab_size", "block_size", "batch_size", "max_steps")
SHAPES = {"4x128": (4, 4, 128, 257, 64, 12, 400), "6x384": (6, 6, 384, 257, 256, 8, 20),
          "6x384-gpt2": (6, 6, 384, 50257, 256, 8, 12),
          "12x768-gpt2": (12, 12, 768, 50257, 1024, 2, 6)}
# train.py with settings of torch's compiler
TRAIN_WITH = """
import torch._inductor.config, train
from nanolab.common import run_script
with torch._inductor.config.patch({settings}):
    run_script(train.main)
"""


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("nanogpt", type=nanogpt_folder, metavar="PATH_OF_NANOGPT",
                        help="a copy of github.com/karpathy/nanoGPT")
    parser.add_argument("--pairs", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES),
                        help="default: all")
    parser.add_argument("--compile", action="store_true", help="torch.compile for both sides")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu",
                        help="default: %(default)s")
    parser.add_argument("--batch_size", type=int, help="default: by shape")
    parser.add_argument("--json", metavar="FILE", help="write the figures of every run")
    args = parser.parse_args()

    threads = os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    conditions = (f"threads: {threads}; {describe(args.device)}; pairs: {args.pairs}, "
                  f"{'both' if args.compile else 'neither'} compiled")
    print(f"{conditions}\n")
    print_row("job", "nanoGPT, tokens/s", "nanolab, tokens/s", "ratio, lowest to highest pair",
              "peak memory, MB: nanoGPT", "nanolab", "ratio")
    print_row("---", *["---:"] * 6)
    shapes = {name: shape_of(name, args.device, args.batch_size) for name in args.shapes}
    pairs = {name: [] for name in shapes}
    for name, shape in shapes.items():
        flags = [*flags_of(shape), f"--device={args.device}", f"--compile={args.compile}"]
        sides = {"nanolab": lambda: run_nanolab(flags),
                 "nanogpt": lambda: run_nanogpt(shape, args.compile, args.device, args.nanogpt)}
        for i in range(args.pairs):
            order = list(sides)[::-1] if i % 2 else list(sides)  # each side is first in turn
            pairs[name].append({side: sides[side]() for side in order})
        print_pairs(shape, pairs[name])
        if args.json:  # after each shape: a run that is stopped has measured something
            content = {"conditions": conditions, "shapes": shapes, "pairs": pairs}
            write_atomically(args.json, json.dumps(content, indent=1) + "\n")


def describe(device):
    """What a reader needs to judge the figures or to repeat them."""
    return (f"{date.today()}, commit {git('describe', '--always', '--dirty')}, "
            f"torch {version('torch')}; {machine(World(torch.device(device), None))}; "
            f"`python {' '.join(sys.argv)}`")


def shape_of(name, device, batch_size=None):
    """The options of one of SHAPES, with another batch size if it is given."""
    shape = dict(zip(OPTIONS, SHAPES[name]))
    if device == "cuda":
        shape["max_steps"] = STEPS_ON_GPU
    return shape | ({"batch_size": batch_size} if batch_size else {})


def flags_of(shape):
    """For train.py, so that it computes what nanoGPT does."""
    return [*(f"--{key}={value}" for key, value in shape.items()), "--tie_weights=True",
            f"--global_batch_size={shape['batch_size']}", "--init=gpt2", "--grad_clip=1"]


def run_python(*command):
    """Runs one of the scripts. -> what it prints. Raises UserError if it fails."""
    result = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        last_line = (result.stderr.strip().splitlines() or ["no message; out of memory?"])[-1]
        raise UserError(f"exit code {result.returncode}: {last_line[:300]}")
    return result.stdout


def run_nanolab(flags, settings=None):
    """A run of train.py. settings: of torch._inductor.config. -> its figures. Raises UserError."""
    script = ["-c", TRAIN_WITH.format(settings=settings)] if settings else ["train.py"]
    with tempfile.TemporaryDirectory() as out_dir:
        run_python(*script, "config/bench.py", *flags, f"--data_dir={DATA_DIR}",
                   f"--out_dir={out_dir}")
        log = having("loss", read_entries(Path(out_dir, "log.jsonl")))
        summary = json.loads(Path(out_dir, "summary.json").read_text())
    rates = [step["tokens_per_second"] for step in log[STEPS_NOT_TIMED:]]
    return {"tokens_per_second": harmonic_mean(rates), "peak_memory_mb": summary["peak_memory_mb"],
            "loss": log[-1]["loss"], "skipped": summary["skipped_steps"]}


def run_nanogpt(shape, compiled, device, path):
    """-> tokens per second, peak memory in MB, the last loss. Raises UserError."""
    job = json.dumps({"shape": shape, "compiled": compiled, "device": device, "path": str(path),
                      "tokens": str(DATA_DIR / "stdlib/train.bin")})
    return json.loads(run_python(__file__, "--one_nanogpt_run", job).splitlines()[-1])


def time_nanogpt(shape, compiled, device, path, tokens):
    """nanoGPT's training loop without its logging, in this process. Prints the figures as JSON."""
    sys.path.insert(0, path)
    import numpy as np
    from model import GPT, GPTConfig  # nanoGPT's

    B, T, n_steps = shape.pop("batch_size"), shape["block_size"], shape.pop("max_steps")
    on_gpu, world = device == "cuda", World(torch.device(device), None)
    if on_gpu and shape["vocab_size"] == 50257:
        shape["vocab_size"] = 50304
    torch.set_float32_matmul_precision("high" if on_gpu else "highest")
    model = GPT(GPTConfig(**shape, dropout=0.0, bias=False)).to(device)
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
            world.synchronize()
            start = time.perf_counter()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=on_gpu):
            _, loss = run(*batch)
        batch = get_batch()  # while a GPU computes
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    world.synchronize()
    seconds = time.perf_counter() - start
    print(json.dumps({"tokens_per_second": B * T * (n_steps - STEPS_NOT_TIMED) / seconds,
                      "peak_memory_mb": round(peak_memory(world.device) / 2**20),
                      "loss": loss.item()}))


def print_pairs(shape, runs):
    job = (f"{shape['n_layer']} x {shape['n_embd']}, vocabulary {shape['vocab_size']:,}, "
           f"context {shape['block_size']:,}, batch {shape['batch_size']}")
    (theirs, ours), (their_mb, our_mb) = (
        [median(run[side][key] for run in runs) for side in ("nanogpt", "nanolab")]
        for key in ("tokens_per_second", "peak_memory_mb"))
    ratios = [run["nanolab"]["tokens_per_second"] / run["nanogpt"]["tokens_per_second"]
              for run in runs]
    print_row(job, f"{theirs:,.0f}", f"{ours:,.0f}",
              f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
              f"{their_mb:,.0f}", f"{our_mb:,.0f}", f"{our_mb / their_mb:.2f}")


def print_row(*cells):
    """A row of a Markdown table."""
    print(f"| {' | '.join(cells)} |", flush=True)


def nanogpt_folder(word):
    """A copy of nanoGPT that the user names. Raises UserError."""
    if not Path(word, "model.py").is_file():
        raise UserError(f"there is no model.py in {word}; "
                        "git clone https://github.com/karpathy/nanoGPT")
    return Path(word).resolve()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one_nanogpt_run"]:
        time_nanogpt(**json.loads(sys.argv[2]))
    else:
        run_script(main)
