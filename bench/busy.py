"""What a busy machine costs: the quickstart's speed beside programs that keep cores busy.

    python bench/busy.py --repeats=3

Each neighbour is an endless Python loop, bound to a core of its own: none, one on the first core,
one on each core. The order of the three changes from round to round. Prints a Markdown table:
tokens/s, median (lowest to highest), and the share of the quiet speed.

Linux only. Close other programs first.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from shared import ROOT, log_mean, parse_timing_arguments, run_python, spread, write_json

from nanolab.common import argument_parser, run_script


def main():
    args = parse_arguments()
    cores = sorted(os.sched_getaffinity(0))
    situations = {"no neighbour": [], "one on one core": cores[:1], "one on each core": cores}
    rates = {name: [] for name in situations}
    for i in range(args.repeats):
        names = list(situations)
        for name in names[i % 3:] + names[:i % 3]:
            rates[name].append(time_beside(situations[name], args))
            print(f"round {i + 1}, {name}: {rates[name][-1]:,.0f} tokens/s", file=sys.stderr)
    quiet = statistics.median(rates["no neighbour"])
    print("| neighbours | tokens/s | share of the quiet speed |\n| --- | --- | --- |")
    for name, each in rates.items():
        print(f"| {name} | {spread(each)} | {statistics.median(each) / quiet:.2f} |")
    if args.json:
        write_json(args.json, tokens_per_second=rates)


def time_beside(busy_cores, args):
    """Tokens per second of a short run of the quickstart, its start not counted."""
    neighbours = [subprocess.Popen([sys.executable, "-c", "while True: pass"])
                  for _ in busy_cores]
    for process, core in zip(neighbours, busy_cores):
        os.sched_setaffinity(process.pid, {core})
    try:
        with tempfile.TemporaryDirectory() as out_dir:
            run_python("train.py", "config/quickstart.py", "--eval_every=0",
                       f"--max_steps={args.steps}", "--eval_tokens=1", "--device=cpu",
                       f"--data_dir={args.data_dir}", f"--out_dir={out_dir}", cwd=args.checkout)
            return log_mean(out_dir, "tokens_per_second")
    finally:
        for process in neighbours:
            process.kill()
            process.wait()


def parse_arguments():
    parser = argument_parser(__doc__)
    parser.add_argument("--checkout", type=Path, default=ROOT,
                        help="another version's folder, to compare with")
    return parse_timing_arguments(parser, 150, "stdlib")


if __name__ == "__main__":
    run_script(main)
