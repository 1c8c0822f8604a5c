"""Data sets: what prepare.py makes of text, and the batches that training reads from it."""

import hashlib
import json
import math
import os
import pathlib
import re
import shutil
import time
import types
import zipfile

import numpy as np
import pytest
import torch

import prepare
from config import Config
from conftest import (call, losses, no_file_larger_than, run_main, start, write_texts)
from nanolab import common, corpus, data, dataset_writer, tokenizer
from nanolab.checkpoint import read_checkpoint
from nanolab.common import UserError, run_script
from nanolab.corpus import own_files
from nanolab.data import UNFINISHED, TokenDataset, read_meta, window_ids
from nanolab.dataset_writer import DatasetWriter, prepare_text
from nanolab.optim import count_steps
from nanolab.tokenizer import encode, get_tokenizer

SPLITS = ("train", "val", "test")


def read_split(data_dir, name, split):
    """The documents of a split, as text."""
    meta = read_meta(data_dir, name)
    tokens = np.fromfile(pathlib.Path(data_dir, name, f"{split}.bin"), meta["dtype"])
    ends = np.flatnonzero(tokens == meta["eot_id"])
    assert ends[-1] == len(tokens) - 1, "an end-of-text token closes every document"
    decode = get_tokenizer(meta["tokenizer"]).decode
    return [decode(document[:-1].tolist()) for document in np.split(tokens, ends + 1)[:-1]]


def read_bytes(folder):
    return {split: (folder / f"{split}.bin").read_bytes() for split in SPLITS}


def stop_after(function, calls):
    """The function, interrupted as by Ctrl-C after so many calls."""
    left = [calls]

    def stopping(*args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return function(*args)
    return stopping


def prepare_mine(source, folder, tokenizer="bytes", workers=1):
    prepare_text(own_files(source), folder, tokenizer, "text", workers, "mine")


# Own text


@pytest.mark.parametrize("tokenizer", ["gpt2", "bytes"])
def test_own_text_round_trip(tmp_path, monkeypatch, tokenizer):
    """All documents come back, none twice, split by their text and not by the order of files."""
    rows = write_texts(tmp_path / "one", "abcd")
    write_texts(tmp_path / "two", "dcba")
    for name in ("one", "two"):
        run_main(monkeypatch, "prepare", tmp_path / name, f"--data_dir={tmp_path}/data",
                 f"--tokenizer={tokenizer}")
    one, two = ({split: read_split(tmp_path / "data", name, split) for split in SPLITS}
                for name in ("one", "two"))
    assert sorted(one["train"] + one["val"] + one["test"]) == sorted(rows)
    assert all(one[split] and sorted(one[split]) == sorted(two[split]) for split in SPLITS)
    by_hash = sorted(rows, key=lambda row: hashlib.blake2b(row.encode(), digest_size=8).digest())
    assert (one["test"], one["val"]) == (by_hash[:1], by_hash[1:2]), "1 %, at least one"
    meta = read_meta(tmp_path / "data", "one")
    n_bytes = sum(facts["bytes"] for facts in meta["splits"].values())
    assert n_bytes == sum(len(row.encode()) for row in rows)


def test_heldout_of_your_own_text(tmp_path, monkeypatch):
    """Half of the share is test, half is val; the default leaves a data set as it was."""
    (tmp_path / "mine.jsonl").write_text("".join(f'{{"text": "Line number {i:04d}."}}\n'
                                                 for i in range(1000)))

    def make(name, *flags):
        run_main(monkeypatch, "prepare", tmp_path / "mine.jsonl", f"--data_dir={tmp_path}",
                 "--tokenizer=bytes", f"--name={name}", *flags)
        splits = read_meta(tmp_path, name)["splits"]
        return [splits[split]["documents"] for split in SPLITS]

    assert make("default") == [980, 10, 10]
    assert make("default", "--heldout=0.02") == [980, 10, 10], "which is there already"
    assert make("more", "--heldout=0.3") == [700, 150, 150]
    with pytest.raises(UserError, match="holds another data set"):
        make("default", "--heldout=0.3")


def test_any_number_of_processes_gives_the_same_bytes(tmp_path, monkeypatch):
    write_texts(tmp_path / "mine", "abcd")
    monkeypatch.setattr(corpus, "SHARD_BYTES", 300)  # 20 shards
    for workers in (1, 3):
        prepare_mine(tmp_path / "mine", tmp_path / f"{workers}", "gpt2", workers)
    assert read_bytes(tmp_path / "1") == read_bytes(tmp_path / "3")


def test_tokenising_processes_do_not_load_torch():
    """They import prepare.py and what it imports: with torch, each would start seconds later."""
    command = "import sys, prepare; print({'torch', 'pyarrow', 'datasets'} & set(sys.modules))"
    assert call("-c", command).stdout == "set()\n"


def test_a_line_of_12_megabytes_is_cut(tmp_path):
    """A text without line ends is cut where it must be, and comes back intact."""
    text = " ".join(map(str, range(1_000_000, 2_500_000)))
    (tmp_path / "long.txt").write_text(text)
    prepare_mine(tmp_path / "long.txt", tmp_path / "long")
    splits = read_meta(tmp_path, "long")["splits"]
    assert sum(facts["bytes"] for facts in splits.values()) == len(text)
    assert splits["test"]["documents"] > 0
    assert all(0.01 <= splits[split]["bytes"] / len(text) < 0.031 for split in ("val", "test"))


def test_two_at_once_make_one_data_set(tmp_path):
    """Of two processes that make the same data set, one waits for the other and finds it made."""
    write_texts(tmp_path / "mine", "abcd")
    both = [start(prepare_mine, tmp_path / "mine", tmp_path / "made", output=tmp_path / f"{i}")
            for i in range(2)]
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert sum("is there already" in (tmp_path / f"{i}").read_text() for i in range(2)) == 1


def test_full_disk_and_kill_in_prepare(tmp_path, monkeypatch):
    """Whatever stops prepare.py, it keeps what is done and then makes the bytes of a whole run."""
    rows = write_texts(tmp_path / "mine", "abcd")
    monkeypatch.setattr(corpus, "SHARD_BYTES", 500)

    def make(name):
        prepare_mine(tmp_path / "mine", tmp_path / name)

    make("whole")
    size = (tmp_path / "whole" / "train.bin").stat().st_size
    with no_file_larger_than(size // 2), pytest.raises(OSError):
        make("full")
    progress = json.loads((tmp_path / "full" / UNFINISHED / "progress.json").read_text())
    assert progress["n_shards"]["text"] > 0 and not (tmp_path / "full" / "meta.json").exists()

    names = ["full"]
    for owner, function, calls in (
            (dataset_writer, "encode", 20), (dataset_writer, "choose_hash_limits", 0),
            (DatasetWriter, "append", 7), (dataset_writer, "write_atomically", 3),
            (DatasetWriter, "finish", 0), (dataset_writer, "count_tokens", 1)):
        names.append(f"killed in {function}")
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(owner, function, stop_after(getattr(owner, function), calls))
            make(names[-1])
    tokenised = []
    monkeypatch.setattr(dataset_writer, "encode",
                        lambda tokenizer, text: tokenised.append(text) or encode(tokenizer, text))
    make("killed in encode")
    assert len(rows) - 20 <= len(tokenised) < len(rows), "finished shards are not tokenised again"
    tokenised.clear()
    for name in names:
        make(name)
    assert not tokenised
    for name in names:
        assert read_bytes(tmp_path / name) == read_bytes(tmp_path / "whole")
        left = sorted(file.name for file in (tmp_path / name).iterdir())
        assert left == ["meta.json", "test.bin", "train.bin", "val.bin"]
    splits = read_meta(tmp_path, "full")["splits"]
    assert sum(facts["documents"] for facts in splits.values()) == len(rows)


def test_a_disk_without_room_is_refused(tmp_path, monkeypatch):
    """Before anything is tokenised."""
    write_texts(tmp_path / "mine", "abcd")
    monkeypatch.setattr(dataset_writer.shutil, "disk_usage",
                        lambda folder: types.SimpleNamespace(free=999))
    monkeypatch.setattr(dataset_writer, "encode", None)
    with pytest.raises(UserError, match="its disk has 0 MB free"):
        prepare_mine(tmp_path / "mine", tmp_path / "made")


# FineWeb


@pytest.fixture(scope="session")
def fineweb_copy(tmp_path_factory):
    """A folder with a repository in FineWeb's layout, 400 rows in 2 files; FineWeb-Edu has the same
    layout. -> folder, rows."""
    from pyarrow import Table
    from pyarrow.parquet import write_table
    folder = tmp_path_factory.mktemp("hub") / "HuggingFaceFW" / "fineweb"
    (folder / "sample" / "10BT").mkdir(parents=True)
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: sample-10BT\n  data_files:\n"
                                      "  - split: train\n    path: sample/10BT/*.parquet\n---\n")
    rows = [f"Row {i} says that {i} times {i} is {i * i}." for i in range(400)]
    for i in range(2):
        columns = {"text": rows[200 * i:200 * (i + 1)], "id": list(range(200))}
        write_table(Table.from_pydict(columns),
                    folder / "sample" / "10BT" / f"{i:03d}_00000.parquet", row_group_size=64)
    (folder.parent / "fineweb-edu").symlink_to(folder)
    return folder.parent.parent, rows


@pytest.mark.parametrize("name, title", [("fineweb", "FineWeb"), ("fineweb-edu", "FineWeb-Edu")])
def test_fineweb_split(tmp_path, fineweb_copy, monkeypatch, name, title):
    """Train is the first rows up to its budget; val and test are cut from the last 10 % as one
    stream."""
    folder, rows = fineweb_copy
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # which prepare.py sets: undone after the test
    run_main(monkeypatch, "prepare", name, f"--from={folder}", f"--data_dir={tmp_path}",
             "--heldout=0.1", "--test_offset=100", "--test_tokens=320", "--train_tokens=2048")
    train_tokens, heldout = (np.concatenate([encode(get_tokenizer("gpt2"), row) for row in part])
                             for part in (rows[:360], rows[360:]))
    for split, expected in (("train", train_tokens[:2049]), ("val", heldout[:100]),
                            ("test", heldout[100:421])):
        tokens = np.fromfile(tmp_path / name / f"{split}.bin", "<u2")
        assert tokens.tolist() == expected.tolist()
    assert len(TokenDataset(tmp_path, name, "test", 32)) == 10
    assert read_meta(tmp_path, name)["source"] == f"{title} sample-10BT"


def test_fineweb_after_a_kill(tmp_path, fineweb_copy, monkeypatch):
    """The same bytes after a kill at any append or save, by any number of processes."""
    folder, _ = fineweb_copy
    monkeypatch.setattr(corpus, "SHARD_BYTES", 1000)
    files = sorted(map(str, folder.rglob("*.parquet")))

    def make(name, workers=1):
        prepare.prepare_fineweb(files, tmp_path / name, "bytes", workers, "copy", 8000, 0.3, 2500,
                                1000)

    make("whole", workers=2)
    for function in ("append", "save", "finish_shard", "finish"):
        for calls in range(12):
            name = f"{function} {calls}"
            with monkeypatch.context() as patch:
                patch.setattr(DatasetWriter, function,
                              stop_after(getattr(DatasetWriter, function), calls))
                try:
                    make(name)
                    break
                except KeyboardInterrupt:
                    pass
            assert not (tmp_path / name / "meta.json").exists()
            make(name)
            assert read_bytes(tmp_path / name) == read_bytes(tmp_path / "whole")
        assert calls > 0, "it was killed"


def test_fineweb_on_the_hub(tmp_path, fineweb_copy, monkeypatch):
    """Footers are read from afar, whole files through the hub's cache, only as many as the budget
    needs, at one revision."""
    import huggingface_hub
    folder, rows = fineweb_copy
    downloaded = []

    class Hub:
        def open(self, path):
            return open(folder / path.removeprefix("hf://datasets/").replace("@abc", ""), "rb")

        def resolve_path(self, path):
            return types.SimpleNamespace(repo_id="HuggingFaceFW/fineweb", repo_type="dataset",
                                         revision="abc", path_in_repo=path.split("@abc/")[1])

    def download(repo_id, path_in_repo, repo_type, revision):
        downloaded.append((repo_type, revision, path_in_repo))
        return folder / repo_id / path_in_repo

    monkeypatch.setattr(huggingface_hub, "HfFileSystem", Hub)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(corpus, "SHARD_BYTES", 1000)
    names = [f"sample/10BT/{i:03d}_00000.parquet" for i in range(2)]
    files = [f"hf://datasets/HuggingFaceFW/fineweb@abc/{name}" for name in names]
    prepare.prepare_fineweb(files, tmp_path / "fineweb", "gpt2", 1, "hub", 512, 0.1, 100, 320)
    expected = np.concatenate([encode(get_tokenizer("gpt2"), row) for row in rows[:100]])[:513]
    tokens = np.fromfile(tmp_path / "fineweb" / "train.bin", "<u2")
    assert tokens.tolist() == expected.tolist()
    assert set(downloaded) == {("dataset", "abc", name) for name in names}
    assert downloaded.count(("dataset", "abc", names[0])) == 1, "one shard of train is enough"


def test_published_budget_is_the_default():
    assert prepare.FINEWEB_OPTIONS["train_tokens"] == 3_260_252_160
    assert count_steps(Config()) * 96 * 1024 == 3_260_252_160
    assert prepare.FINEWEB_OPTIONS["test_tokens"] == 19_660_800


# Token files


@pytest.fixture(scope="session")
def published_tokens(tmp_path_factory):
    """Token files as gpjt/fineweb-gpt2-tokens has them. -> folder, train and heldout tokens."""
    from safetensors.torch import save_file
    folder = tmp_path_factory.mktemp("tokens")
    streams = [np.random.default_rng(seed).integers(50257, size=size).astype("<u2")
               for seed, size in ((1, 3000), (2, 600))]
    for name, tokens in zip(("train", "validation"), streams):
        save_file({"tokens": torch.from_numpy(tokens)}, folder / f"{name}.safetensors")
    return folder, *streams


def test_published_token_files(tmp_path, published_tokens, monkeypatch):
    """The same windows as `prepare.py fineweb` cuts, and the same after a kill."""
    folder, train_tokens, heldout = published_tokens

    def make(name):
        run_script(lambda: run_main(monkeypatch, "prepare", "fineweb", f"--from={folder}",
                                    "--test_offset=100", "--test_tokens=320", "--train_tokens=2048",
                                    f"--data_dir={tmp_path}/{name}"))

    make("whole")
    whole = tmp_path / "whole" / "fineweb"
    for split, expected in (("train", train_tokens[:2049]), ("val", heldout[:100]),
                            ("test", heldout[100:421])):
        assert np.fromfile(whole / f"{split}.bin", "<u2").tolist() == expected.tolist()
    meta = read_meta(tmp_path / "whole", "fineweb")
    assert meta["tokenizer"] == "gpt2"
    assert meta["splits"]["train"]["documents"] == (train_tokens[:2049] == 50256).sum()
    for calls in range(3):
        folder_of_killed = tmp_path / str(calls) / "fineweb"
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_:
            patch.setattr(DatasetWriter, "append", stop_after(DatasetWriter.append, calls))
            make(calls)
        assert exit_.value.code == 130 and not (folder_of_killed / "meta.json").exists()
        make(calls)
        for file in ("train.bin", "val.bin", "test.bin", "meta.json"):
            assert (folder_of_killed / file).read_bytes() == (whole / file).read_bytes()


def test_files_of_nanogpt(tmp_path, small_run, capsys):
    """train.bin and val.bin without meta.json are read when --vocab_size says what they hold."""
    folder = tmp_path / "data" / "theirs"
    folder.mkdir(parents=True)
    tokens = np.random.default_rng(1).integers(65, size=1_200_000).astype("<u2")
    assert tokens.nbytes > 2 * 2**20, "more than what is hashed"
    for split in ("train", "val"):
        tokens.tofile(folder / f"{split}.bin")
    flags = ["--dataset=theirs", f"--data_dir={tmp_path}/data"]
    run = small_run("run", *flags, "--vocab_size=65", "--max_steps=2")
    assert "no meta.json" in capsys.readouterr().out
    inputs, targets = TokenDataset(tmp_path / "data", "theirs", "train", 32, 65).batch([3])
    assert inputs[0].tolist() == tokens[96:128].tolist()
    assert targets[0].tolist() == tokens[97:129].tolist()
    with pytest.raises(UserError, match="has the token 64, beyond its vocabulary of 64"):
        TokenDataset(tmp_path / "data", "theirs", "train", 32, 64).batch(range(50))
    assert losses(run)[0] == pytest.approx(math.log(65), abs=0.7)
    assert read_checkpoint(run / "last.pt")["tokenizer"] == "unknown"
    gpt2_run = small_run("gpt2", *flags, "--vocab_size=50304", "--max_steps=1")
    assert read_checkpoint(gpt2_run / "last.pt")["tokenizer"] == "gpt2"
    tokens[-1] = 64 - tokens[-1]
    tokens.tofile(folder / "train.bin")
    with pytest.raises(UserError, match="another data set"):
        small_run("run", *flags, "--vocab_size=65", "--max_steps=3", "--resume")


def test_info(tmp_path, data_dir, monkeypatch, capsys):
    """Counts, checksums and the beginning; a flipped bit or a short file of any split is an error
    that names it."""
    shutil.copytree(data_dir / "stdlib", tmp_path / "mine")
    info = ["info", "mine", f"--data_dir={tmp_path}"]
    run_main(monkeypatch, "prepare", *info)
    out = capsys.readouterr().out
    splits = read_meta(tmp_path, "mine")["splits"]
    for split in SPLITS:
        assert re.search(rf"{split} .* {splits[split]['tokens']:,} tokens .* "
                         rf"{splits[split]['documents']:,} documents .*checksum matches", out)
    assert read_split(tmp_path, "mine", "train")[0][:200] in out
    with open(tmp_path / "mine" / "train.bin", "r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\x09")
    with open(tmp_path / "mine" / "test.bin", "ab") as file:
        file.truncate(1000)
    with pytest.raises(UserError, match="train.bin is damaged: bytes .*test.bin has 1,000 bytes"):
        run_main(monkeypatch, "prepare", *info)
    assert re.search("train .*DAMAGED\nval .*matches\ntest .*DAMAGED", capsys.readouterr().out)
    for file in ("meta.json", "test.bin"):
        (tmp_path / "mine" / file).unlink()
    run_main(monkeypatch, "prepare", *info)
    assert "from nanoGPT's prepare.py; gpt2 tokens of 50,257 kinds" in capsys.readouterr().out


def test_a_file_that_becomes_shorter(tmp_path, data_dir):
    """Is refused, when it is opened and while it is read."""
    folder = tmp_path / "torn"
    shutil.copytree(data_dir / "stdlib", folder)
    opened = TokenDataset(tmp_path, "torn", "train", 16)
    opened.batch([0, len(opened) - 1])
    with open(folder / "train.bin", "ab") as file:
        file.truncate(1000)
    with pytest.raises(UserError, match="has become shorter"):
        opened.batch([0, len(opened) - 1])
    with pytest.raises(UserError, match="train.bin has 1,000 bytes"):
        TokenDataset(tmp_path, "torn", "train", 16)


# Batches


def test_gpt2_tokens_and_batches(tmp_path):
    """Window i is tokens i x T ... (i + 1) x T of the file, targets one further."""
    tokens = encode(get_tokenizer("gpt2"), "Every effort moves you")
    assert tokens.tolist() == [6109, 3626, 6100, 345, 50256]
    write_texts(tmp_path / "mine", "abcd")
    prepare_mine(tmp_path / "mine", tmp_path / "data" / "mine", "gpt2")
    dataset = TokenDataset(tmp_path / "data", "mine", "train", 16)
    tokens = np.fromfile(dataset.path, "<u2").astype(np.int64)
    inputs, targets = dataset.batch([0, 3, len(dataset) - 1])
    assert inputs[1].tolist() == tokens[48:64].tolist()
    assert targets[1].tolist() == tokens[49:65].tolist()
    assert len(dataset) == (len(tokens) - 1) // 16 and targets.shape == (3, 16)


def test_shuffled_order():
    """Every window once an epoch, in another order each epoch; a pure function of the position."""
    run = window_ids("shuffled", 1, 10, 0, 30)
    epochs = [run[:10], run[10:20], run[20:]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert window_ids("shuffled", 1, 10, 7, 6) == run[7:13] != window_ids("shuffled", 2, 10, 7, 6)
    assert window_ids("shuffled", 2, 10, 0, 10) not in epochs, "no epoch of seed 1"
    assert window_ids("sequential", 1, 10, 8, 4) == [8, 9, 0, 1]


# Tokenizers


def test_no_vocabulary_no_network(tmp_path, monkeypatch):
    """Where nothing answers, an error within 2 seconds that says what to do."""
    for proxy in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(proxy, raising=False)
    start = time.perf_counter()
    assert not common.reachable("192.0.2.1")  # an address that belongs to nobody (RFC 5737)
    assert time.perf_counter() - start < 1.8
    monkeypatch.setattr(tokenizer, "reachable", lambda host: False)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR"):
        get_tokenizer.__wrapped__("gpt2")


def write_wheels(folder, requirements):
    """Three wheels and the requirements file that names them; `shared` is in all, and latin-1 is no
    UTF-8."""
    folder.mkdir(parents=True)
    lines = []
    for split in ("test", "val", "train"):
        with zipfile.ZipFile(folder / f"pack_{split}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("pack/z.py", f"print('{split} z')\n")
            wheel.writestr("pack/a.py", "shared = 'é'\n")
            wheel.writestr("pack/b.py", f"b = '{split}'\n")
            wheel.writestr("pack/copy_of_b.py", f"b = '{split}'\n")
            wheel.writestr("pack/latin.py", "é".encode("latin-1"))
            wheel.writestr("pack/empty.py", "\n")
            wheel.writestr("pack/data.json", "{}")
        lines += [f"# {split}", f"pack-{split}==1.0 --hash=sha256:{'0' * 64}"]
    requirements.write_text("\n".join(lines) + "\n")


def test_wheels_are_split_by_package(tmp_path):
    """Whole packages are held out, in the order of the files' names; a file that is there twice
    counts once, in test."""
    write_wheels(tmp_path / "data" / "pypi.wheels", tmp_path / "wheels.txt")
    prepare.prepare_pypi(tmp_path / "data" / "pypi", "bytes", tmp_path / "wheels.txt")
    for split in ("test", "val", "train"):
        shared = ["shared = 'é'\n"] if split == "test" else []
        assert read_split(tmp_path / "data", "pypi", split) == [*shared, f"b = '{split}'\n",
                                                                f"print('{split} z')\n"]


def test_wheels_that_cannot_be_had(tmp_path, monkeypatch):
    """Without an index it is one line; after a kill the same command makes the same bytes."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    write_wheels(tmp_path / "data" / "pypi.wheels", tmp_path / "wheels.txt")
    whole = tmp_path / "data" / "pypi"
    wheel = tmp_path / "data" / "pypi.wheels" / "pack_train-1.0-py3-none-any.whl"
    content = wheel.read_bytes()
    wheel.write_bytes(content[:40])
    with pytest.raises(UserError, match="pack_train.*is damaged"):
        prepare.prepare_pypi(whole, "bytes", tmp_path / "wheels.txt")
    wheel.unlink()
    with pytest.raises(UserError, match="could not be downloaded .*No matching distribution"):
        prepare.prepare_pypi(whole, "bytes", tmp_path / "wheels.txt")
    wheel.write_bytes(content)
    prepare.prepare_pypi(whole, "bytes", tmp_path / "wheels.txt")
    assert len(read_split(tmp_path / "data", "pypi", "train")) == 2


def flip(path, place):
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def test_a_flipped_token_is_noticed(tmp_path, monkeypatch):
    """In train when its chunk is first read, in val and test at the start; also where meta.json has
    no sums of chunks."""
    for module in (data, dataset_writer):
        monkeypatch.setattr(module, "CHUNK_BYTES", 300)
    write_texts(tmp_path / "mine", "abcd")
    prepare_mine(tmp_path / "mine", tmp_path / "data" / "mine")
    folder = tmp_path / "data" / "mine"
    dataset = TokenDataset(tmp_path / "data", "mine", "train", 16)
    dataset.batch(range(len(dataset)))
    assert not dataset.unchecked

    flip(folder / "train.bin", 1000)  # in the fourth chunk
    dataset = TokenDataset(tmp_path / "data", "mine", "train", 16)
    dataset.batch(range(900 // 32 - 1))  # windows of 32 bytes and a token
    with pytest.raises(UserError,
                       match=r"train.bin is damaged: bytes 900 to 1,200 .*make it again"):
        dataset.batch([900 // 32])  # its last tokens are the chunk's first
    flip(folder / "train.bin", 1000)
    for split in ("val", "test"):
        flip(folder / f"{split}.bin", 10)
        with pytest.raises(UserError, match=f"{split}.bin is damaged: bytes 0 to 300"):
            TokenDataset(tmp_path / "data", "mine", split, 16)
        flip(folder / f"{split}.bin", 10)

    meta = json.loads((folder / "meta.json").read_text())
    for facts in meta["splits"].values():
        del facts["chunks"]
    (folder / "meta.json").write_text(json.dumps(meta))
    TokenDataset(tmp_path / "data", "mine", "train", 16).batch([0])
    flip(folder / "train.bin", 1000)
    with pytest.raises(UserError, match="train.bin is damaged"):
        TokenDataset(tmp_path / "data", "mine", "train", 16)
