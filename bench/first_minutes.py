"""The first ten minutes on a GPU: what to change, decided by measurements in one call.

    python bench/first_minutes.py --nanogpt=nanoGPT --json=first_minutes.json
    python bench/first_minutes.py --device=cpu        # tries the script, at a tiny shape

First it times the card's products, attention and copies (bench/gpu.py). Then it compiles all
variants at once into one cache, as many at a time as fit in memory, and times them in turn, A B A
B, from the cache. Each row is printed as it is known, and the JSON file is written again after each
row, so that a call that is cut off still counts. Every variant is a run of train.py; its loss after
its last step stands next to its speed, and should be V0's to 1e-3. Close other programs first.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from bench.gpu import RATES, least_seconds, measure_rates
from bench.nanogpt import describe, nanogpt_folder, print_row, run_nanogpt, shape_of
from nanolab.common import UserError, argument_parser, run_script, write_atomically
from nanolab.distributed import World, autocast_dtype, pick_device
from nanolab.plots import read_log

# name: (flags of train.py, settings of torch._inductor.config). V0 is the code as it is.
VARIANTS = {
    "V0 as it is": ([], {}),
    "V2 CUDA graphs": (["--compile=graphs"], {}),
    "V3 split size 32": ([], {"triton.mix_order_reduction_split_size": 32}),
    "V3 split size 64": ([], {"triton.mix_order_reduction_split_size": 64}),
    "V3 split size 128": ([], {"triton.mix_order_reduction_split_size": 128}),
    "V3 no mixed order": ([], {"triton.mix_order_reduction": False}),
    "V4 max-autotune": ([], {"max_autotune": True}),
    "V5 6 sequences": (["--batch_size=6", "--global_batch_size=48"], {}),
    "V5 24 sequences": (["--batch_size=24", "--global_batch_size=48"], {}),
    "V5 48 sequences": (["--batch_size=48", "--global_batch_size=48"], {}),
    "V6 overnight": (["config/overnight_3090.py", "--batch_size=32", "--global_batch_size=64",
                      "--dataset=stdlib", "--vocab_size=50257", "--save_every=0"], {}),
    "V7 float16": (["--amp=float16"], {}),
    "V7 16-bit sums": (["--amp=float16", "--fp16_sums"], {}),
}
# float32, as in the ladder
SMALL = ["--n_layer=3", "--n_head=4", "--n_embd=128", "--block_size=128", "--vocab_size=257",
         "--batch_size=16", "--global_batch_size=16", "--amp=off", "--tf32=False"]
SMALL_VARIANTS = {"0.7M eager": ([*SMALL, "--compile=False"], {}), "0.7M compiled": (SMALL, {}),
                  "0.7M CUDA graphs": ([*SMALL, "--compile=graphs"], {})}
GIB_EACH = 10  # of GPU memory, about: how many variants compile at a time
NOT_TIMED = 5  # steps of a run


def main():
    args, start = parse_arguments(), time.perf_counter()
    on_gpu = args.device == "cuda"
    shape = shape_of("12x768-gpt2" if on_gpu else "4x128", 12 if on_gpu else 4, args.steps)
    variants = {**VARIANTS, **SMALL_VARIANTS}
    if not on_gpu:  # what a CPU can run too
        variants = {name: variants[name] for name in ("V0 as it is", "0.7M eager")}
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.mkdtemp())
    record = {"conditions": describe(args.device), "rows": []}
    print(record["conditions"], flush=True)

    device = pick_device(args.device)
    rates = measure_rates(shape, World(device, autocast_dtype("auto", device)))
    record["rates"] = dict(zip(RATES, rates))
    least = sum(least_seconds(shape, rates).values())
    limit = shape["batch_size"] * shape["block_size"] / least
    print(f"rates: {record['rates']}\nthe limit of 12 x 1,024 tokens a step: {limit:,.0f} tokens/s",
          flush=True)

    def run(name, steps):
        flags, settings = variants[name]
        flags = [f"--{key}={value}" for key, value in shape.items()] * (name[0] == "V") + flags
        return run_variant(flags, settings, steps, args)

    n_at_once = 1
    if on_gpu:
        torch.cuda.empty_cache()
        n_at_once = max(int(torch.cuda.mem_get_info()[0] / 2**30 / GIB_EACH), 1)
        with ThreadPoolExecutor(n_at_once) as pool:  # compiles
            list(pool.map(lambda name: run(name, 2), variants))
    print(f"compiled, {n_at_once} at a time, {time.perf_counter() - start:.0f} s after the start\n")

    print_row("variant", "tokens/s", "of the limit", "peak memory, MB", "loss", "second run")
    print_row("---", *["---:"] * 5)
    nanogpt = {}
    if args.nanogpt:
        nanogpt = {"nanoGPT": False, "nanoGPT with biases": True}
    for turn in (1, 2):
        for name in [*variants, *nanogpt]:
            try:
                row = run_nanogpt(dict(shape), on_gpu, args.device, args.data_dir, args.nanogpt,
                                  nanogpt[name]) if name in nanogpt else run(name, args.steps)
            except UserError as error:
                row = {"error": str(error)}
            record["rows"].append({"variant": name, "turn": turn, **row})
            write_atomically(args.json, json.dumps(record, indent=1) + "\n")
            print_figures(name, row, limit, turn)


def print_figures(name, row, limit, turn):
    if "error" in row:
        print_row(name, row["error"], *[""] * 3, "yes" * (turn == 2))
        return
    rate = row["tokens_per_second"]
    of_limit = f"{rate / limit:.2f}" if not name.startswith("0.7M") else ""
    print_row(name, f"{rate:,.0f}", of_limit, f"{row['peak_memory_mb']:,}",
              f"{row.get('loss', float('nan')):.4f}", "yes" * (turn == 2))


def run_variant(flags, settings, steps, args):
    """A run of train.py in a process of its own. -> its figures, or {"error": its last line}."""
    with tempfile.TemporaryDirectory() as out_dir:
        files = [flag for flag in flags if flag.endswith(".py")]
        sequences = 12 if args.device == "cuda" else 4
        command = ["config/bench.py", *files, "--dropout=0", "--grad_clip=1", "--eval_every=0",
                   "--save_weights=False", f"--global_batch_size={sequences}", *(
                       flag for flag in flags if flag not in files), f"--max_steps={steps}",
                   f"--device={args.device}", f"--data_dir={args.data_dir}", f"--out_dir={out_dir}"]
        result = subprocess.run([sys.executable, __file__, "--one_run", json.dumps(settings),
                                 *command], cwd=ROOT, capture_output=True, text=True)
        if result.returncode:
            return {"error": (result.stderr.strip().splitlines() or ["no message"])[-1][:200]}
        log = read_log(Path(out_dir, "log.jsonl"))[0]
        summary = json.loads(Path(out_dir, "summary.json").read_text())
    rates = [entry["tokens_per_second"] for entry in log[NOT_TIMED:]] or [float("nan")]
    return {"tokens_per_second": len(rates) / sum(1 / rate for rate in rates),
            "peak_memory_mb": summary["peak_memory_mb"], "loss": log[-1]["loss"],
            "skipped": summary["skipped_steps"], "command": command, "inductor": settings}


def train_with(settings, argv):
    """train.py in this process, with settings of torch's compiler."""
    import torch._inductor.config as inductor
    for name, value in settings.items():
        setattr(inductor, name, value)
    sys.argv = ["train.py", *argv]
    import train
    run_script(train.main)


def parse_arguments():
    parser = argument_parser(__doc__)
    parser.add_argument("--nanogpt", type=nanogpt_folder, metavar="PATH", help="a copy of nanoGPT")
    parser.add_argument("--json", default="first_minutes.json", metavar="FILE",
                        help="what was measured (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="of a run (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda",
                        help="default: %(default)s")
    parser.add_argument("--data_dir", type=Path, default=ROOT / "data",
                        help="where the data set stdlib is, or is made (default: data)")
    args = parser.parse_args()
    if args.steps <= NOT_TIMED:
        parser.error(f"--steps must be above {NOT_TIMED}, which are not timed")
    args.data_dir = args.data_dir.resolve()
    return args


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one_run"]:
        train_with(json.loads(sys.argv[2]), sys.argv[3:])
    else:
        run_script(main)
