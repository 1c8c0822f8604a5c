"""The first minutes on a GPU: what to change, decided by measurements in one call. About ten on an
H200, half an hour or more on a 3090 (predicted).

    python bench/first_minutes.py --nanogpt=nanoGPT --json=first_minutes.json

First it times the card (bench/gpu.py), and float16 products with 32-bit and 16-bit sums. Then it
compiles all variants at once into one cache, as many at a time as fit in memory, and times them in
turn, A B A B. The JSON file is written after each row, so a call that is cut off still counts.
Every variant is a run of train.py. "Of the limit" is of V0's. The last loss of V2 to V4 should be
V0's to 1e-3, those of V5 each other's. Close other programs first.
"""

import json
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from bench.gpu import RATES, cells, print_rates, tokens_per_second
from bench.nanogpt import (describe, flags_of, nanogpt_folder, print_row, run_nanogpt, run_nanolab,
                           shape_of)
from nanolab.common import UserError, argument_parser, run_script, write_atomically
from nanolab.distributed import World
from nanolab.runlog import matmul_peak

SHAPE = {**shape_of("12x768-gpt2", "cuda", batch_size=12), "max_steps": 60}
V0 = flags_of(SHAPE)  # the code as it is, as bench/gpu.py runs it
# name: (files and flags of train.py, settings of torch._inductor.config)
VARIANTS = {
    "V0 as it is": (V0, {}),
    "V2 CUDA graphs": ([*V0, "--compile=graphs"], {}),
    **{f"V3 split size {n}": (V0, {"triton.mix_order_reduction_split_size": n})
       for n in (32, 64, 128)},
    "V3 no mixed order": (V0, {"triton.mix_order_reduction": False}),
    "V4 max-autotune": (V0, {"max_autotune": True}),
    "V5 6 sequences": ([*V0, "--batch_size=6", "--global_batch_size=48"], {}),
    "V5 24 sequences": ([*V0, "--batch_size=24", "--global_batch_size=48"], {}),
    "V5 48 sequences": ([*V0, "--batch_size=48", "--global_batch_size=48"], {}),
    "V6 overnight": (["config/overnight_3090.py", "--global_batch_size=64", "--eval_every=0",
                      "--save_every=0"], {}),
    "V7 float16": ([*V0, "--amp=float16"], {}),
    "V7 16-bit sums": ([*V0, "--amp=float16", "--fp16_sums"], {}),
}
GIB_EACH = 10  # of GPU memory, about: how many variants compile at a time


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("--nanogpt", type=nanogpt_folder, metavar="PATH", help="a copy of nanoGPT")
    parser.add_argument("--json", default="first_minutes.json", metavar="FILE",
                        help="what was measured (default: %(default)s)")
    args, start = parser.parse_args(), time.perf_counter()
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.mkdtemp())
    rates = print_rates(SHAPE)
    limit = tokens_per_second(SHAPE, rates)
    print(f"the limit of 12 x 1,024 tokens a step: {limit:,.0f} tokens/s", flush=True)
    sums = {f"float16, {bits}-bit sums": float16_products(bits == 16) for bits in (32, 16)}
    print(", ".join(f"{name}: {rate:,.0f} TFLOP/s" for name, rate in sums.items()), flush=True)
    record = {"conditions": describe("cuda"), "rates": {**dict(zip(RATES, rates)), **sums},
              "rows": []}

    def run(name, steps=SHAPE["max_steps"]):
        try:
            if name == "nanoGPT":
                return run_nanogpt(SHAPE, True, "cuda", args.nanogpt)
            flags, settings = VARIANTS[name]
            flags = [*flags, "--device=cuda", f"--max_steps={steps}"]
            return {**run_nanolab(flags, settings), "flags": flags, "inductor": settings}
        except UserError as error:
            return {"error": str(error)}

    n_at_once = max(int(torch.cuda.mem_get_info()[0] / 2**30 / GIB_EACH), 1)
    with ThreadPoolExecutor(n_at_once) as pool:
        list(pool.map(lambda name: run(name, steps=4), VARIANTS))
    print(f"compiled, {n_at_once} at a time, {time.perf_counter() - start:.0f} s after the start\n")

    print_row("variant", "turn", "tokens/s", "of the limit", "peak memory, MB", "loss", "skipped")
    print_row("---", *["---:"] * 6)
    for turn in (1, 2):
        for name in [*VARIANTS, *["nanoGPT"] * bool(args.nanogpt)]:
            row = run(name)
            record["rows"].append({"variant": name, "turn": turn, **row})
            write_atomically(args.json, json.dumps(record, indent=1) + "\n")
            figures = [row["error"], *[""] * 4] if "error" in row else [
                *cells(row, limit), f"{row['loss']:.4f}", f"{row.get('skipped', '')}"]
            print_row(name, f"{turn}", *figures)


def float16_products(sums_in_16_bits):
    """TFLOP/s of large matrix products."""
    torch.backends.cuda.matmul.allow_fp16_accumulation = sums_in_16_bits
    return matmul_peak(World(torch.device("cuda"), torch.float16)) / 1e12


if __name__ == "__main__":
    run_script(main)
