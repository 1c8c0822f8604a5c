"""How much of the published recipe's time the modern one needs for the same loss, by size.

    python bench/seconds.py --repeats=3                 # --sizes, --steps, --json

A modern step costs more, but fewer are needed. At each size of the ladder (docs/ladder.md), short
runs of both recipes take turns, with nothing beside them. Their speeds turn the share of tokens in
config/results/ladder.json into a share of seconds. Needs `python prepare.py pypi`.

Prints a Markdown table: tokens/s, median (lowest to highest), and the two shares. The interval is
that of the share of tokens, at the median speeds. Close other programs first.
"""

import json
import statistics
import sys
import tempfile
from pathlib import Path

from shared import ROOT, log_mean, parse_timing_arguments, run_python, spread, write_json

from config.studies.ladder import LADDER, LARGEST, arguments, parameters, tuned
from nanolab.common import argument_parser, run_script

RECIPES, SIZES = ("published", "modern"), [*LADDER, LARGEST]


def main():
    args = parse_arguments()
    rates = {size: {recipe: [] for recipe in RECIPES} for size in args.sizes}
    for i in range(args.repeats):
        for size in args.sizes:
            for recipe in RECIPES[::-1] if i % 2 else RECIPES:
                rates[size][recipe].append(time_recipe(recipe, size, args))
            print(f"round {i + 1}, {size}: " + ", ".join(
                f"{recipe} {each[-1]:,.0f} tokens/s" for recipe, each in rates[size].items()),
                file=sys.stderr, flush=True)
    print("| size | published, tokens/s | modern, tokens/s | share of tokens | share of seconds "
          "| 95 % interval |\n| --- | --- | --- | ---: | ---: | ---: |")
    shares = {row["parameters"]: row for row in
              json.loads(args.results.read_text())["scaling"]["shares"] if row["name"] == "modern"}
    for size, each in rates.items():
        row = shares[parameters(size)]
        published, modern = (statistics.median(each[recipe]) for recipe in RECIPES)
        low, share, high = (published / modern * value for value in
                            (row["interval"][0], row["share"], row["interval"][1]))
        print(f"| {size} | {spread(each['published'])} | {spread(each['modern'])} "
              f"| {row['share']:.3f} | {share:.3f} | {low:.3f} to {high:.3f} |")
    if args.json:
        write_json(args.json, tokens_per_second=rates)


def time_recipe(recipe, size, args):
    """Tokens per second of a short run, its start not counted."""
    with tempfile.TemporaryDirectory() as out_dir:
        line = arguments(recipe, size, tuned(recipe, size), out_dir)
        run_python("train.py", *line.split(), f"--max_tokens={args.steps * 16 * 128}",
                   "--eval_tokens=1", "--save_weights=False", "--log_every=1", "--device=cpu",
                   f"--data_dir={args.data_dir}")
        return log_mean(out_dir, "tokens_per_second")


def parse_arguments():
    parser = argument_parser(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES, help="default: all")
    parser.add_argument("--results", type=Path, default=ROOT / "config/results/ladder.json",
                        help="of eval.py --scaling --json (default: the repository's)")
    return parse_timing_arguments(parser, 100, "pypi")


if __name__ == "__main__":
    run_script(main)
