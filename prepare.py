"""Turns text into a data set.

    python prepare.py stdlib                 Python's own library as bytes; needs no network
    python prepare.py pypi                   the source of packages (studies/ladder/pypi.txt)
    python prepare.py fineweb                FineWeb sample-10BT as GPT-2 tokens, as published
    python prepare.py fineweb --from=FOLDER  the same from a copy, or from the published token files
    python prepare.py fineweb-edu            FineWeb-Edu sample-10BT in the same way
    python prepare.py PATH [--name=NAME]     your own .txt .md .jsonl .parquet: file, folder or glob
    python prepare.py PATH --val=PATH --test=PATH   the same, in its ready-made splits
    python prepare.py info NAME              what a data set has: counts, checksums, its beginning

A data set is a folder data/NAME with train.bin, val.bin, test.bin and meta.json. After a kill, run
the same command again: it continues where it was.
"""

import os
import re
from collections import Counter
from pathlib import Path

import numpy as np

from nanolab.common import UserError, argument_parser, run_script
from nanolab.corpus import (FINEWEBS, file_ranges, fineweb_files, format_counts, identity,
                            own_files, pypi_wheels, wheel_documents)
from nanolab.data import print_info, read_meta
from nanolab.dataset_writer import (HELDOUT, DatasetWriter, dataset_lock, fingerprint,
                                    is_complete, prepare_stdlib, prepare_text)
from nanolab.tokenizer import encode, get_tokenizer, token_dtype

PYPI = Path(__file__).parent / "studies" / "ladder" / "pypi.txt"

# The options that only some sources take, with their defaults.
FINEWEB_OPTIONS = {"from_folder": None, "train_tokens": 33_165 * 96 * 1024, "heldout": 0.01,
                   "test_offset": 50_000_000, "test_tokens": 19_200 * 1024}
OPTIONS = {**dict.fromkeys(FINEWEBS, FINEWEB_OPTIONS), "stdlib": {"heldout": HELDOUT},
           "pypi": {}, "own": {"heldout": None, "text_column": "text", "val": None, "test": None}}
SPLIT_WORDS = {"val", "valid", "validation", "dev", "test"}


def main():
    args = parse_arguments()
    if args.dataset:
        print_info(args.data_dir, args.dataset)
        return
    folder = Path(args.data_dir, args.name)
    get_tokenizer(args.tokenizer)  # fails before anything is read or downloaded
    if args.source == "stdlib":
        prepare_stdlib(args.data_dir, args.tokenizer, args.name, args.workers, args.heldout)
    elif args.source == "pypi":
        prepare_pypi(folder, args.tokenizer)
    elif args.source not in FINEWEBS:
        prepare_own(args, folder)
    elif (args.source == "fineweb" and args.from_folder
          and Path(args.from_folder, "train.safetensors").exists()):
        if args.tokenizer != "gpt2" or args.heldout != FINEWEB_OPTIONS["heldout"]:
            raise UserError(f"{args.from_folder} has GPT-2 tokens that are split already: "
                            "neither --tokenizer nor --heldout changes them")
        prepare_published_tokens(args.from_folder, folder, args.train_tokens, args.test_offset,
                                 args.test_tokens)
    else:
        title, repository = FINEWEBS[args.source]
        prepare_fineweb(fineweb_files(args.from_folder, repository), folder, args.tokenizer,
                        args.workers, f"{title} sample-10BT", args.train_tokens, args.heldout,
                        args.test_offset, args.test_tokens)
    for split, facts in read_meta(args.data_dir, args.name)["splits"].items():
        print(f"{split:6}{facts['tokens']:15,} tokens  {facts['documents']:12,} documents  "
              f"{facts['bytes']:15,} bytes of text")


def parse_arguments():
    parser = argument_parser(__doc__)
    path = os.path.expanduser  # the shell leaves the ~ of --data_dir=~/x as it is
    parser.add_argument("source", type=path,
                        help="stdlib, pypi, fineweb, fineweb-edu, or a file, folder or glob of "
                             ".txt .md .jsonl .parquet; or info")
    parser.add_argument("dataset", nargs="?", metavar="NAME", help="of the data set, after info")
    parser.add_argument("--name", help="the data set's folder in data_dir; default: as the source")
    parser.add_argument("--data_dir", default="data", type=path)
    parser.add_argument("--tokenizer", choices=("gpt2", "bytes"),
                        help="default: bytes for stdlib and pypi, else gpt2")
    parser.add_argument("--text_column", help="of your .jsonl and .parquet files (default: text)")
    parser.add_argument("--val", metavar="PATH", type=path,
                        help="your own text for val, left out of train (default: a part of it)")
    parser.add_argument("--test", metavar="PATH", type=path, help="the same for test")
    parser.add_argument("--heldout", type=float,
                        help="fraction for val and test: of your own text and stdlib, by a hash, "
                             f"half each (default: {HELDOUT}; of your text below 26 MB more, up to "
                             "0.1); of FineWeb, the last rows (default: "
                             f"{FINEWEB_OPTIONS['heldout']})")
    parser.add_argument("--workers", type=int, default=os.cpu_count(),
                        help="processes; any number gives the same bytes")
    fineweb = parser.add_argument_group("fineweb and fineweb-edu")
    fineweb.add_argument("--from", dest="from_folder", metavar="FOLDER", type=path,
                         help="a local copy instead of the hub's: of the text, or of gpjt/fineweb-"
                              "gpt2-tokens (train.safetensors and validation.safetensors)")
    fineweb.add_argument("--train_tokens", type=int,
                         help=f"default: the baseline's {FINEWEB_OPTIONS['train_tokens']}")
    fineweb.add_argument("--test_offset", type=int,
                         help="where test starts in the held-out tokens; val is all before "
                              f"(default: {FINEWEB_OPTIONS['test_offset']})")
    fineweb.add_argument("--test_tokens", type=int,
                         help=f"default: {FINEWEB_OPTIONS['test_tokens']}")
    args = parser.parse_args()
    has_own_name = args.source in OPTIONS and args.source != "own"
    taken = OPTIONS[args.source if has_own_name else "own"]
    for key in {key: None for options in OPTIONS.values() for key in options}:
        if key in taken and getattr(args, key) is None:
            setattr(args, key, taken[key])
        elif key not in taken and getattr(args, key) is not None:
            sources = ", ".join(source for source in OPTIONS if key in OPTIONS[source])
            parser.error(f"--{key.removesuffix('_folder')} does nothing for {args.source}, only "
                         f"for {sources.replace('own', 'text of your own')}")
    args.name = args.name or (args.source if has_own_name else Path(args.source).resolve().stem)
    args.tokenizer = args.tokenizer or ("bytes" if args.source in ("stdlib", "pypi") else "gpt2")
    for is_wrong, message in (
            (args.dataset and args.source != "info", f"unrecognized argument: {args.dataset}"),
            (args.source == "info" and not args.dataset and not Path("info").exists(),
             "info wants the NAME of a data set"),
            (not args.name or set(args.name) & set("*?["),
             f"'{args.source}' gives no name; choose one with --name"),
            ("/" in args.name or args.name in (".", ".."),
             f"--name={args.name} is a path; choose the folder with --data_dir"),
            (args.workers < 1, "--workers must be at least 1"),
            (args.train_tokens is not None and min(args.train_tokens, args.test_tokens) < 1,
             "--train_tokens and --test_tokens must be at least 1"),
            (args.test_offset is not None and args.test_offset < 1,
             "--test_offset must be at least 1: val is before it"),
            (args.heldout is not None and not 0 < args.heldout < 1,
             "--heldout must be between 0 and 1"),
            (args.heldout and args.val and args.test,
             "--heldout does nothing with both --val and --test")):
        if is_wrong:
            parser.error(message)
    return args


def prepare_own(args, folder):
    """Your own text. Says which files are read, and whether their names are those of splits."""
    left_out = Counter()
    given = {split: own_files(path, left_out)
             for split, path in (("val", args.val), ("test", args.test)) if path}
    taken = {identity(file) for files in given.values() for file in files}
    files = [file for file in own_files(args.source, left_out) if identity(file) not in taken]
    if not files:
        raise UserError(f"'{args.source}' has nothing that --val and --test do not have")
    n_files = len(files) + sum(map(len, given.values()))
    print(f"{n_files:,} file{'s' if n_files > 1 else ''} read; left out: "
          f"{format_counts(left_out) or 'none'}")
    names = [os.path.relpath(file, args.source) for file in files]
    split_names = [name for name in names if SPLIT_WORDS & set(re.split(r"[\W\d_]+", name.lower()))]
    if split_names and len(files) > 1 and not given:
        print(f"note: {split_names[0]} has the name of a split; all files are read as one text and "
              "split anew, unless you give --val=PATH and --test=PATH")
    prepare_text(files, folder, args.tokenizer, args.text_column, args.workers, args.source,
                 args.heldout, given, {"files": n_files, "files_left_out": left_out})


def prepare_pypi(folder, tokenizer_name, requirements=PYPI):
    """The Python files of pinned wheels from PyPI: the same bytes on every machine.

    Whole packages are held out. A file that is there twice counts once, in test before val before
    train. After a kill it starts again, but for the download. Raises UserError.
    """
    plan = fingerprint(Path(requirements).read_text(), tokenizer_name)
    with dataset_lock(folder):
        if is_complete(folder, plan):
            return
        wheels = pypi_wheels(requirements, folder.with_suffix(".wheels"))
        tokenizer = get_tokenizer(tokenizer_name)
        writer = DatasetWriter(folder, plan, tokenizer_name)
        writer.n_tokens.clear()
        seen = set()
        for split in ("test", "val", "train"):
            for wheel in wheels[split]:
                texts = [text for text in wheel_documents(wheel) if text not in seen]
                seen.update(texts)
                tokens = [encode(tokenizer, text) for text in dict.fromkeys(texts)]
                writer.append(split, np.concatenate(tokens).astype(token_dtype(tokenizer)))
        writer.save()
        writer.finish(f"the wheels of {requirements}")


def prepare_fineweb(files, folder, tokenizer, workers, source, train_tokens, heldout, test_offset,
                    test_tokens):
    """FineWeb as published. Raises UserError.

    The last `heldout` of the rows are one stream of tokens: val is the first `test_offset`, test
    the `test_tokens` after them. Train is the first `train_tokens` of the rows before. Train and
    test have one token more, the target of their last window.
    """
    plan = fingerprint(source, files, tokenizer, train_tokens, heldout, test_offset, test_tokens)
    with dataset_lock(folder):
        if is_complete(folder, plan):
            return
        ranges = [file_range for file in files for file_range in file_ranges(file)]
        train_ranges, heldout_ranges = split_rows(ranges, heldout)
        test_end = test_offset + test_tokens + 1
        writer = DatasetWriter(folder, plan, tokenizer)
        with writer.progress_bar(train_tokens + 1 + test_end) as bar:
            sizes = {"val": test_offset, "test": test_tokens + 1}
            n_heldout = fill_splits(writer, "heldout", heldout_ranges, sizes, workers, bar)
            if n_heldout < test_end:
                raise UserError(f"the last {heldout:.2%} of the rows have {n_heldout:,} tokens, "
                                f"and test ends at {test_end:,}; use a smaller --test_offset and "
                                "--test_tokens or a larger --heldout")
            sizes = {"train": train_tokens + 1}
            if not fill_splits(writer, "train", train_ranges, sizes, workers, bar):
                raise UserError(f"with --heldout={heldout} no row is left for training")
        writer.finish(source)


def split_rows(ranges, heldout):
    """The ranges of the first 1 - heldout of all rows, and those of the rest."""
    n_train = round(sum(r.stop - r.start for r in ranges) * (1 - heldout))
    train, rest = [], []
    for r in ranges:
        cut = min(r.start + n_train, r.stop)
        n_train -= cut - r.start
        if cut > r.start:
            train.append(r._replace(stop=cut))
        if cut < r.stop:
            rest.append(r._replace(start=cut))
    return train, rest


def fill_splits(writer, group, ranges, sizes, workers, bar):
    """Tokenises file ranges as one stream that fills one split after the other.

    sizes: {split: tokens}. -> how many tokens the splits have; fewer if the stream is too short.
    """
    def n_tokens():
        return sum(writer.n_tokens[split] for split in sizes)

    paths = writer.tokenize(group, ranges, workers)
    while n_tokens() < sum(sizes.values()) and (path := next(paths, None)):
        with np.load(path) as shard:
            tokens = shard["tokens"]
        for split, size in sizes.items():
            head = tokens[:size - writer.n_tokens[split]]
            writer.append(split, head)
            bar.update(len(head))
            tokens = tokens[len(head):]
        writer.finish_shard(group, path)
    paths.close()  # cancels the shards that no process has begun
    return n_tokens()


def prepare_published_tokens(source, folder, train_tokens, test_offset, test_tokens):
    """FineWeb from the token files of the published runs, gpjt/fineweb-gpt2-tokens on the hub.

    train.safetensors and validation.safetensors are the first 99 % and the last 1 % of the rows as
    GPT-2 tokens. The splits are those of prepare_fineweb. Raises UserError.
    """
    train, heldout = Path(source, "train.safetensors"), Path(source, "validation.safetensors")
    n_train, n_heldout = (open_tokens(file).get_shape()[0] for file in (train, heldout))
    test_end, n_vocab = test_offset + test_tokens + 1, get_tokenizer("gpt2").n_vocab
    if n_heldout < test_end:
        raise UserError(f"{heldout} has {n_heldout:,} tokens, and test ends at {test_end:,}; "
                        "use a smaller --test_offset and --test_tokens")
    ranges = {"val": (heldout, 0, test_offset), "test": (heldout, test_offset, test_end),
              "train": (train, 0, min(train_tokens + 1, n_train))}
    stats = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in (train, heldout)]
    plan = fingerprint(stats, *[[start, stop] for _, start, stop in ranges.values()])
    with dataset_lock(folder):
        if is_complete(folder, plan):
            return
        writer = DatasetWriter(folder, plan, "gpt2")
        with writer.progress_bar(sum(stop - start for _, start, stop in ranges.values())) as bar:
            for split, (file, start, stop) in ranges.items():
                for i in range(start + writer.n_tokens[split], stop, 2**23):
                    # Opened again for each chunk: memory does not grow with the file.
                    tokens = open_tokens(file)[i:min(i + 2**23, stop)]
                    if tokens.max() >= n_vocab:
                        raise UserError(f"{file} has the token {tokens.max()}, "
                                        f"beyond GPT-2's vocabulary of {n_vocab}")
                    writer.append(split, tokens)
                    writer.save()
                    bar.update(len(tokens))
        writer.finish("gpjt/fineweb-gpt2-tokens")


def open_tokens(path):
    """The one tensor of a token file, read lazily. Raises UserError."""
    from safetensors import SafetensorError, safe_open
    try:
        tokens = safe_open(path, "numpy").get_slice("tokens")
    except FileNotFoundError:
        raise UserError(f"there is no {path}") from None
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or no file of tokens ({error})") from None
    if tokens.get_dtype() != "U16" or len(tokens.get_shape()) != 1:
        raise UserError(f"{path} holds {tokens.get_dtype()} numbers of the shape "
                        f"{tokens.get_shape()}; tokens are a row of U16")
    return tokens


if __name__ == "__main__":
    run_script(main, if_interrupted="stopped; the same command continues from here",
               if_failed="; what is done is kept, the same command continues from here")
