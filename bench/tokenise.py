"""prepare.py against tiktoken alone, with as many processes, on the same text.

    python bench/tokenise.py FOLDER_OF_PARQUET --repeats=3

tiktoken's side has the documents in memory and throws its tokens away: only encoding is timed.
prepare.py's side is the whole command: it starts, reads, encodes, writes three splits and their
checksums. The two take turns. Prints a line for each round and the median ratio.
"""

import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from shared import ROOT, write_json

from nanolab.common import UserError, argument_parser, run_script
from nanolab.tokenizer import get_tokenizer


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count(),
                        help="default: all cores")
    parser.add_argument("--repeats", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--json", metavar="FILE", help="write every round's times")
    args = parser.parse_args()
    global documents
    documents = read_documents(args.folder)
    size = sum(len(text.encode()) for text in documents) / 1e6
    rounds = []
    for i in range(args.repeats):
        sides = [time_tiktoken, time_prepare] if i % 2 == 0 else [time_prepare, time_tiktoken]
        seconds = {side.__name__: side(args) for side in sides}
        rounds.append([seconds["time_tiktoken"], seconds["time_prepare"]])
        print(f"round {i + 1}: tiktoken {rounds[-1][0]:.1f} s, prepare.py {rounds[-1][1]:.1f} s")
    ratios = [tiktoken / prepare for tiktoken, prepare in rounds]
    print(f"{size:,.0f} MB of text, {args.workers} processes: prepare.py has "
          f"{statistics.median(ratios):.2f} of tiktoken's speed "
          f"({min(ratios):.2f} to {max(ratios):.2f})")
    if args.json:
        write_json(args.json, megabytes=size, seconds_of_tiktoken_and_prepare=rounds)


def read_documents(folder):
    from pyarrow.parquet import read_table
    files = sorted(folder.rglob("*.parquet"))
    if not files:
        raise UserError(f"there is no .parquet file in {folder}")
    return [text for file in files for text in read_table(file)["text"].to_pylist()]


def time_tiktoken(args):
    """Seconds that processes, which have the documents and the vocabulary already, need."""
    context = multiprocessing.get_context("fork")
    with context.Pool(args.workers, initializer=get_tokenizer, initargs=("gpt2",)) as pool:
        pool.map(encode, [range(10)] * args.workers, chunksize=1)  # loads the vocabulary
        parts = [range(i, len(documents), 64) for i in range(64)]
        start = time.perf_counter()
        pool.map(encode, parts, chunksize=1)
        return time.perf_counter() - start


def encode(ids):
    tokenizer = get_tokenizer("gpt2")
    return sum(len(tokenizer.encode_ordinary(documents[i])) for i in ids)


def time_prepare(args):
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run([sys.executable, "prepare.py", args.folder.resolve(), "--name=bench",
                        f"--data_dir={folder}", f"--workers={args.workers}"], cwd=ROOT, check=True,
                       capture_output=True)
        return time.perf_counter() - start


if __name__ == "__main__":
    run_script(main)
