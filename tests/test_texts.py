"""What people bring as text: folders as they are found, copies in another dress, bad records,
ready-made splits, nanoGPT's character-level data. Nothing is lost, and nothing leaks."""

import gzip
import io
import itertools
import json
import os
import pathlib
import pickle
import re
import unicodedata

import numpy as np
import pytest
from pyarrow import Table, array
from pyarrow.parquet import write_table

import prepare
from conftest import (SMALL, SPLITS, Code, call, logged, read_json, read_split, run_main,
                      run_quickly)
from nanolab import corpus, dataset_writer
from nanolab.checkpoint import read_checkpoint
from nanolab.common import UserError, run_script
from nanolab.corpus import cut, file_ranges, own_files, undressed
from nanolab.data import read_meta
from nanolab.tokenizer import END_OF_TEXT


def make(monkeypatch, folder, *argv):
    """prepare.py of some source in this process. -> {split: [document]}"""
    run_main(monkeypatch, "prepare", *argv, f"--data_dir={folder}", "--tokenizer=bytes",
             "--name=made", "--workers=1")
    return {split: read_split(folder, "made", split) for split in SPLITS}


def sentences(n, first=0):
    return [f"Die Brücke {i} hat {i * i} Bögen.\nIhr Café ist ‘zu’, œuvre ﬁn.\n" for i in
            range(first, first + n)]


def jsonl(texts, end="\n", **options):
    return "".join(json.dumps({"text": text}, **options) + end for text in texts)


def parquet(columns, **options):
    """The bytes of a .parquet file. columns: {name: list}."""
    file = io.BytesIO()
    write_table(Table.from_pydict(columns), file, **options)
    return file.getvalue()


def write(folder, files):
    """files: {path: str, bytes, or a Path to which it links}."""
    for path, content in files.items():
        path = folder / path
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, pathlib.Path):
            path.symlink_to(content)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())


# Which files


def test_what_is_read_of_a_folder(tmp_path, monkeypatch, capsys):
    """A folder as it is found: what is not text of a known kind is left out and named; links are
    followed, each file counts once, a loop of links ends."""
    folder = tmp_path / "texts"
    write(folder, {
        "a.txt": "Text a.", "B.TEXT": "Text b.", "c.md": "Text c.", "deep/er/\n🐙.txt": "Text d.",
        "e.jsonl": '{"text": "Text e."}', "f.ndjson": '{"text": "Text f."}', "empty.txt": "",
        "g.gz": gzip.compress(b"g"), "h.csv": "text\nh", "LICENSE": "k", ".DS_Store": b"\0",
        ".git/x.txt": "x", "__MACOSX/._a.txt": b"\0", "../elsewhere/l.txt": "Text l.",
        "linked": tmp_path / "elsewhere", "deep/loop": folder, "deep/loop2": folder / "deep",
        "z.txt": folder / "a.txt", "gone.txt": tmp_path / "nowhere", "0.parquet": b""})
    documents = sum(make(monkeypatch, tmp_path, folder).values(), [])
    assert sorted(documents) == [f"Text {letter}." for letter in "abcdefl"]
    line = next(line for line in capsys.readouterr().out.splitlines() if "read" in line)
    for part in ("files read: 7; left out: ", "hidden 3", ".gz 1", ".csv 1", "no suffix 1",
                 "empty or a broken link 3"):
        assert part in line
    facts = read_json(tmp_path / "made/meta.json")
    assert facts["files"] == 7 and facts["files_left_out"]["hidden"] == 3
    for pattern, n in {"**": 7, "**/*": 7, "*": 7, "**/*.*": 7, "**/*.txt": 3,
                       "deep/**/*.txt": 3, ".*/*.txt": 1, "__MACOSX/._*.txt": 1}.items():
        assert len(set(map(os.path.realpath, own_files(folder / pattern)))) == n, pattern
    write(tmp_path, {"[1] x/[2].txt": "Text."})
    for pattern in ("[1] x", "[1] x/[2].txt", "?1] x/*", "*x/**"):
        assert len(own_files(tmp_path / pattern)) == 1, pattern
    with pytest.raises(UserError, match=r"has \*\* twice; give a folder"):
        own_files(folder / "**/er/**")


def test_a_file_that_is_named_is_read(tmp_path):
    for name in ("enwik8", "wiki.train.tokens", ".notes.txt", "notes.json"):
        write(tmp_path, {name: "Text."})
        assert own_files(tmp_path / name) == [str(tmp_path / name)]
    assert own_files(tmp_path / "*.tokens") == [str(tmp_path / "wiki.train.tokens")]


def test_names(tmp_path, monkeypatch):
    """A data set is named after its source. The shell leaves the ~ of --data_dir=~/x as it is."""
    def parse(*argv):
        monkeypatch.setattr("sys.argv", ["prepare.py", *argv])
        parsed = []
        run_script(lambda: parsed.append(prepare.parse_arguments()))
        return parsed[0]

    monkeypatch.setenv("HOME", str(tmp_path))
    args = parse("x", "--val=~/x", "--data_dir=~/x")
    assert {args.val, args.data_dir} == {str(tmp_path / "x")}
    write(tmp_path, {"one-2.0/a.b.txt": "Text.", "loop": tmp_path / "loop"})
    for path, name in {"one-2.0": "one-2.0", "one-2.0/a.b.txt": "a.b", "loop": "loop"}.items():
        assert parse(str(tmp_path / path)).name == name


# Equal texts


DRESSES = [
    str, lambda text: text.replace("\n", "\r\n"), lambda text: text.replace("\n", "\r"),
    lambda text: "\ufeff" + text, str.rstrip, lambda text: text + "\n\n",
    lambda text: re.sub("(?=\n)|(?<= )", "  ", text),
    lambda text: unicodedata.normalize("NFD", text),
    lambda text: text.replace(" ", "\xa0"), lambda text: text.replace("ck", "c\u00adk"),
    lambda text: text.replace("ﬁ", "fi"), lambda text: re.sub("(.)\n(?=.)", r"\1 ", text)]


@pytest.mark.parametrize("kind", ["texts", "records", "long", "one line"])
def test_copies_in_another_dress_stay_together(tmp_path, monkeypatch, kind):
    """Documents, or the pieces of a long one, and their copies are in one split; a BOM or a
    Windows line end of a text file is no token."""
    documents, folder = sentences(100), tmp_path / "texts"
    if kind == "long":  # with paragraphs
        documents = ["\n".join(documents)]
    elif kind == "one line":
        documents = ["".join(documents).replace("\n", " ")]
    for i, dress in enumerate(DRESSES):
        dressed = [dress(text) for text in documents]
        write(folder, {f"{i}.jsonl": jsonl(dressed, "\r\n")} if kind == "records" else
              {f"{i}.{j}.txt": text for j, text in enumerate(dressed)})
    made = make(monkeypatch, tmp_path, folder, "--heldout=0.1")
    plain = {split: {undressed(text) for text in texts} for split, texts in made.items()}
    assert sum(map(len, made.values())) == len(DRESSES) * sum(map(len, plain.values()))
    assert all(plain.values()) and not plain["train"] & plain["val"]
    everything = "".join(sum(made.values(), []))
    assert "\ufeff" not in everything
    assert kind == "records" or "\r" not in everything


def test_pieces_are_cut_by_what_they_say():
    """A text after another title is cut at the same places, but for the first."""
    paragraphs = "\n".join(sentences(300))
    for text, end in (paragraphs, "\n\n"), (" ".join(paragraphs.split()), ". "):
        one, other = list(cut(text, 1000)), list(cut(f"A title.{end}" * 40 + text, 1000))
        assert "".join(one) == text and len(set(one) - set(other)) <= 2
        assert all(1000 <= len(undressed(piece).encode()) <= 2100 for piece in one[:-1])
        assert all(piece.endswith(end) for piece in one[:-1]), "of paragraphs or sentences"


# The fractions


@pytest.mark.parametrize("kb, heldout", [(20, 0.02), (100, None), (100, 0.2)])
@pytest.mark.parametrize("kind", ["lines", "paragraphs", "one line", "Chinese", "records", "files",
                                  "one record"])
def test_fractions_are_those_asked_for(tmp_path, monkeypatch, kind, kb, heldout):
    """From 20 KB on, each held-out part is within two points of its fraction."""
    n = kb * 1000
    words = " ".join(map(str, range(n)))[:n]
    parts = [words[i:i + n // 200] for i in range(0, n, n // 200)]
    write(tmp_path / "mine", {
        "lines": {"a.txt": re.sub("(.{60}) ", r"\1\n", words)},
        "paragraphs": {"a.txt": re.sub("(.{600}) ", r"\1\n\n", words)},
        "one line": {"a.txt": words},
        "Chinese": {"a.txt": "".join(chr(0x4e00 + i % 0x4000) for i in range(n // 3))},
        "files": {f"{i}.txt": part for i, part in enumerate(parts)},
        "records": {"a.jsonl": jsonl(parts)}, "one record": {"a.jsonl": jsonl([words])}}[kind])
    make(monkeypatch, tmp_path, tmp_path / "mine", *([f"--heldout={heldout}"] if heldout else []))
    splits = read_meta(tmp_path, "made")["splits"]
    total = sum(splits[split]["bytes"] for split in SPLITS)
    asked = (heldout or 0.1) / 2  # 0.1 is the default for less than 5 MB
    for split in ("val", "test"):
        assert asked <= splits[split]["bytes"] / total <= asked + 0.02, split


def test_the_fraction_is_of_the_text(tmp_path, monkeypatch):
    """Not of what else is in a file: 5 % of little text, 1 % of much."""
    write(tmp_path, {"a.jsonl": "".join(json.dumps({"text": f"{i:0100}", "id": "x" * 9900}) + "\n"
                                        for i in range(1000))})
    made = make(monkeypatch, tmp_path, tmp_path / "a.jsonl")
    assert 50 <= len(made["val"]) <= 51 and 50 <= len(made["test"]) <= 51
    documents = np.zeros(1000, dataset_writer.DOCUMENT)
    documents["hash"], documents["n_bytes"] = np.arange(1000), 100_000
    assert dataset_writer.choose_hash_limits(documents, None, 2) == [9, 19]


def test_documents_are_measured_in_bytes(tmp_path):
    write(tmp_path, {"a.txt": "é" * 10})
    shard = dataset_writer.tokenize_shard("bytes", tmp_path / "a.npz",
                                          file_ranges(str(tmp_path / "a.txt")))
    assert np.load(shard)["documents"]["n_bytes"].tolist() == [20]


def test_long_documents_are_said(tmp_path, monkeypatch, capsys):
    """Records are cut only if they are longer than a held-out part; if they are nearly so, the
    fractions are said."""
    rows = [f"{i}" * 1900 for i in range(10, 60)]
    write(tmp_path, {"mine.jsonl": jsonl(rows)})
    made = make(monkeypatch, tmp_path, tmp_path / "mine.jsonl")
    assert sorted(sum(made.values(), [])) == rows and len(made["test"]) == 3
    assert "note:" not in capsys.readouterr().out
    make(monkeypatch, tmp_path / "less", tmp_path / "mine.jsonl", "--heldout=0.05")
    assert "note: a held-out split is 4.0% of the text instead of 2.5%" in capsys.readouterr().out


# Ready-made splits


def test_ready_made_splits(tmp_path, monkeypatch, capsys):
    """--val and --test are as they are; a text of theirs, in any dress, is left out of train. A
    file that two of the sources have is counted once."""
    folder, parts = tmp_path / "texts", {"train": sentences(50), "val/id": sentences(8, 50),
                                         "test": sentences(9, 60)}
    parts["train"][7] = "".join(sentences(20, 100))  # with both given, nothing needs to be cut
    copies = [parts["val/id"][0].replace("\n", "\r\n"),
              unicodedata.normalize("NFD", parts["test"][8])]
    files = {f"{name}.jsonl": jsonl(texts + copies * (name == "train"))
             for name, texts in parts.items()}
    write(folder, {"test.json": files.pop("test.jsonl"), "val/id.csv": "x", **files})
    given = [f"--val={folder}/val", f"--test={folder}/test.json"]
    made = make(monkeypatch, tmp_path / "both", folder, *given)
    assert made == {"train": parts["train"], "val": parts["val/id"], "test": parts["test"]}
    output = capsys.readouterr().out
    assert "files read: 3; left out: .csv 1\n" in output
    assert "documents left out: in val or test 2\n" in output
    facts = read_json(tmp_path / "both/made/meta.json")
    assert facts["documents_left_out"]["in val or test"] == 2

    make(monkeypatch, tmp_path / "named", folder)
    assert "val/id.jsonl has the name of a split, but goes into all" in capsys.readouterr().out
    make(monkeypatch, tmp_path / "same", folder, given[1], given[1].replace("--test", "--val"))
    assert "note: 9 documents of val are in test too" in capsys.readouterr().out

    made = make(monkeypatch, tmp_path / "one", folder, given[1], "--heldout=0.2")
    assert made["test"] == parts["test"] and 5 <= len(made["val"]) <= 8
    del parts["train"][7]
    assert {*parts["train"], *parts["val/id"]} <= {*made["train"], *made["val"]}

    write(tmp_path, {"copy.jsonl": jsonl(parts["test"])})
    for source, reason in (folder / "test.json", "none"), (tmp_path / "copy.jsonl", "in val .* 9"):
        with pytest.raises(UserError, match=f"no text for train; documents left out: {reason}"):
            make(monkeypatch, tmp_path / "x", source, given[1])


# Markers, and long files


def test_end_of_text_separates_documents(tmp_path, monkeypatch):
    """The published data aside, the marker is between documents and never in one. A file of several
    shards is cut at it, so that no text of it is in two splits."""
    texts = [text.replace("\n", "\n\n") for text in sentences(400)]
    text = f"{END_OF_TEXT}\n".join(texts)
    write(tmp_path, {"mine.txt": text.replace("\n", "\r\n"), "mine.jsonl": jsonl([text]),
                     "mine.parquet": parquet({"text": [text]})})
    monkeypatch.setattr(corpus, "SHARD_BYTES", 3000)
    assert len(file_ranges(str(tmp_path / "mine.txt"))) > 10
    for kind in ("txt", "jsonl", "parquet"):
        made = make(monkeypatch, tmp_path / kind, tmp_path / f"mine.{kind}")
        assert sorted(sum(made.values(), [])) == sorted(texts), kind


# Records


@pytest.mark.parametrize("name, row_group_size", [
    ("line 58", None), ("row 58", 7), ("row 58", 66)])
def test_records_without_text(tmp_path, monkeypatch, capsys, name, row_group_size):
    """Null and empty texts are left out and counted; what is no text is named with its line or
    row, wherever shards begin."""
    monkeypatch.setattr(corpus, "SHARD_BYTES", 700)
    values = [*sentences(60), None, "", " \n\t", END_OF_TEXT * 2, *sentences(3, 60)]
    for folder, column in {"good": values, "bad": [*[None] * 57, 7, *[None] * 8]}.items():
        write(tmp_path, {f"{folder}.jsonl": jsonl(column)} if name == "line 58" else
              {f"{folder}.parquet": parquet({"text": column}, row_group_size=row_group_size)})
    made = make(monkeypatch, tmp_path, tmp_path / "good.*")
    assert sorted(sum(made.values(), [])) == sorted(sentences(63))
    assert "documents left out: null or empty 4\n" in capsys.readouterr().out
    with pytest.raises(UserError, match=f"{name} has no text that can be encoded: "):
        make(monkeypatch, tmp_path / "bad", tmp_path / "bad.*")


GOOD = parquet({"text": sentences(2000)}, use_dictionary=False)
DAMAGED = GOOD[:2000] + b"x" * 1000 + GOOD[3000:]  # met when rows are decoded: its footer is good
SPACES = "x" + " " * 1_100_000 + "x"  # too many for tiktoken


@pytest.mark.parametrize("name, content, message", [
    ("mine.txt.gz", gzip.compress(b"x"), "is not UTF-8 text (byte 1); unpack"),
    ("mine.txt", "x".encode("utf-16"), "mine.txt is not UTF-8 text (byte 0)"),
    ("mine.txt", f"First\nof\nall.{END_OF_TEXT}{SPACES}", "mine.txt has no text that can be enc"),
    ("mine.jsonl", jsonl(["First\nof\nall.", SPACES]), "line 2 has no text that can be encoded: "),
    ("mine.jsonl", b'\xef\xbb\xbf{"text": "first"}\n\r\n{"text": "cut',
     "line 3 is no JSON object, as each line must be: see column 10, '\"cut'"),
    ("mine.jsonl", jsonl(["A text."], ",\n"), "line 1 is no JSON object, as each line must be: "
     "see column 20, ','"),
    ("mine.jsonl", '["text"]', "line 1 is no JSON object"),
    ("mine.jsonl", b'{"text": "\xe9"}', "mine.jsonl is not UTF-8 text (byte 10)"),
    ("mine.jsonl", b'{"text": "a\0b"}', "mine.jsonl is not UTF-8 text (byte 11)"),
    ("mine.jsonl", "[" * 100_000 + "]" * 100_000, "line 1 is no JSON object"),
    ("mine.jsonl", jsonl([{"content": "x"}]), "line 1 has no text that can be encoded: \"{'content'"
     ": 'x'}\" (type dict)"),
    ("mine.jsonl", jsonl([0]), "line 1 has no text that can be encoded: '0' (type int)"),
    ("mine.jsonl", jsonl([[]]), "line 1 has no text that can be encoded: '[]' (type list)"),
    ("mine.jsonl", jsonl(["\ud800"]), "line 1 has no text that can be encoded: '\\ud800' ('utf-8'"),
    ("mine.jsonl", '{"id": 1, "body": "x"}\n{"id": 2}\n', "null or empty 2; --text_column says"),
    ("mine.parquet", parquet({"id": [1], "body": ["x"]}), "no column 'text' but id, body; choose"),
    ("mine.parquet", parquet({"text": [b"x"]}), "row 1 has no text that can be encoded: \"b'x'\""),
    ("mine.parquet", parquet({"text": [None]}), "no text for train; documents left out: null or"),
    ("mine.parquet", parquet({"text": array([b"\xe9"]).view("string")}), "mine.parquet is damaged"),
    ("mine.parquet", DAMAGED, "mine.parquet is damaged")], ids=itertools.count())
def test_what_is_refused(tmp_path, monkeypatch, name, content, message):
    write(tmp_path, {name: content})
    with pytest.raises(UserError, match=re.escape(message)):
        run_main(monkeypatch, "prepare", tmp_path / name, f"--data_dir={tmp_path}")


def test_a_bad_byte_is_counted_from_the_files_start(tmp_path, monkeypatch):
    write(tmp_path, {"a.txt": b"A line.\n" * 9 + b"\xff"})
    monkeypatch.setattr(corpus, "SHARD_BYTES", 20)
    with pytest.raises(UserError, match=r"a.txt is not UTF-8 text \(byte 72\)"):
        make(monkeypatch, tmp_path, tmp_path / "a.txt")


def test_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch):
    """As one that is still downloaded. Then it is read again, not taken from what was kept."""
    path, encode = tmp_path / "mine.txt", dataset_writer.encode

    def encode_and_append(*args):
        with open(path, "a") as file:
            file.write("More.")
        return encode(*args)

    write(tmp_path, {"mine.txt": END_OF_TEXT.join(sentences(40))})
    monkeypatch.setattr(dataset_writer, "encode", encode_and_append)
    with pytest.raises(UserError, match="mine.txt changed while they were read"):
        make(monkeypatch, tmp_path, path)
    monkeypatch.undo()
    assert "More." in "".join(sum(make(monkeypatch, tmp_path, path).values(), []))


def test_records_of_every_kind_are_read(tmp_path, monkeypatch):
    """Columns of other types; line separators of Unicode, which end no record."""
    texts = [f"{i}\u2028\u2029\x85\x0c\x1c{i}" for i in range(50)]
    write(tmp_path, {
        "dictionary.parquet": parquet({"text": array(texts).dictionary_encode()}),
        "large.parquet": parquet({"text": array(texts).cast("large_string")}),
        "lines.jsonl": jsonl(texts, ensure_ascii=False)})
    for name in ("dictionary.parquet", "large.parquet", "lines.jsonl"):
        made = make(monkeypatch, tmp_path / f"data_{name}", tmp_path / name)
        assert sorted(sum(made.values(), [])) == sorted(texts), name


# Memory


def test_a_large_row_group_is_read_in_parts(tmp_path, monkeypatch):
    """The same bytes as from small groups, each row decoded once; the shards depend on the file."""
    rows, opened = sentences(900), []
    write(tmp_path, {f"{name}.parquet": parquet({"text": rows}, row_group_size=size)
                     for name, size in (("one", 900), ("small", 7))})
    monkeypatch.setattr(corpus, "SHARD_BYTES", 2000)
    ranges = file_ranges(str(tmp_path / "one.parquet"))
    assert len(ranges) > 5 and all(r.n_bytes < 4000 for r in ranges)
    open_parquet = corpus.open_parquet
    monkeypatch.setattr(corpus, "open_parquet", lambda path, only_footer=False: (
        opened.append(only_footer), open_parquet(path, only_footer))[1])
    one = make(monkeypatch, tmp_path / "one", tmp_path / "one.parquet")
    assert opened == [True, False], "once for the footer, once for all rows"
    assert sorted(sum(one.values(), [])) == sorted(rows)
    assert make(monkeypatch, tmp_path / "small", tmp_path / "small.parquet") == one
    for name in ("one", "small"):  # as FineWeb
        prepare.prepare_fineweb([str(tmp_path / f"{name}.parquet")], tmp_path / name / "web",
                                "bytes", 1, name, 10_000, 0.3, 900, 1000)
    for split in SPLITS:
        one, small = (tmp_path / name / "web" / f"{split}.bin" for name in ("one", "small"))
        assert one.read_bytes() == small.read_bytes()


def test_memory_for_a_large_row_group(tmp_path):
    """Reading 100 MB in one row group takes a few megabytes, and decodes each row once."""
    rows = [f"{i} {i * i} {i * i * i}\n" * 150 for i in range(25_000)]
    write(tmp_path, {"one.parquet": parquet({"text": rows}, row_group_size=len(rows),
                                            compression="none", use_dictionary=False)})
    script = """
import pathlib, sys, pyarrow.parquet
from nanolab.corpus import file_ranges, records
def peak():
    return int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
ranges, before = file_ranges(sys.argv[1]), peak()
n_rows = sum(1 for file_range in ranges for _ in records(file_range))
print(len(ranges), n_rows, peak() - before)
"""
    n_ranges, n_rows, megabytes = call("-c", script, tmp_path / "one.parquet").stdout.split()
    assert int(n_ranges) > 20 and int(n_rows) == 25_000 and float(megabytes) < 90


# nanoGPT's character-level data


def nanogpt_folder(folder, characters, **meta):
    """data/shakespeare_char of nanoGPT's, of other text."""
    ids = (np.arange(5000) % len(characters)).astype("<u2")
    itos = dict(enumerate(characters))
    meta = {"vocab_size": len(itos), "itos": itos, "stoi": {v: k for k, v in itos.items()}, **meta}
    write(folder, {"train.bin": ids[:4000].tobytes(), "val.bin": ids[4000:].tobytes(),
                   "meta.pkl": pickle.dumps(meta)})


def test_nanogpt_characters(tmp_path, output_of):
    """A character-level data set of nanoGPT's has its own characters everywhere."""
    nanogpt_folder(tmp_path / "chars", "\n abcdeé“漢")
    output = output_of("prepare", "info", "chars", f"--data_dir={tmp_path}")
    assert 'character:"\\n abcdeé“漢" tokens of 10 kinds' in output
    assert "\n\n abcdeé“漢\n abc" in output
    run_quickly([*SMALL, "--dataset=chars", f"--data_dir={tmp_path}", f"--out_dir={tmp_path}/out",
                 "--max_steps=60", "--learning_rate=1e-2", "--sample_every=60",
                 "--sample_prompt=abc"])
    assert logged("sample", tmp_path / "out")[0].startswith("abcdeé“漢\n abcd")
    assert read_checkpoint(tmp_path / "out/best.pt")["config"]["vocab_size"] == 10
    assert output_of("sample", f"--ckpt={tmp_path}/out", "--prompt=abc", "--temperature=0",
                     "--max_new_tokens=8", "--device=cpu") == "abcdeé“漢\n a\n"
    for prompt in ("abz", "ü", END_OF_TEXT):
        with pytest.raises(UserError, match="has characters that the model has no tokens for"):
            output_of("sample", f"--ckpt={tmp_path}/out", f"--prompt={prompt}")
    output_of("nanolab.huggingface", "export", tmp_path / "out/best.pt", tmp_path / "hf")
    files = {path.name for path in (tmp_path / "hf").iterdir()}
    assert files == {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert read_json(tmp_path / "hf/config.json")["eos_token_id"] is None


@pytest.mark.parametrize("meta, tokenizer", [
    ({"itos": ["a", "b"], "vocab_size": 2.0, "author": "x"}, 'character:"ab"'),
    ({"itos": {}, "vocab_size": 50257}, "gpt2"), ({"itos": {}, "vocab_size": 2}, "unknown"),
    ({"itos": {0: "the", 1: "a"}}, "unknown"), ({"itos": {0: "a", 1: "a"}}, "unknown"),
    ({"itos": {0: "a"}}, "unknown"), ({"itos": {0: "a", 5: "b"}}, None),
    ({"itos": {0: "a", 1: "\ud800"}}, None), ({"vocab_size": 0}, None),
    ({"vocab_size": 10**9}, None), ({"stoi": Code()}, None)])
def test_vocabularies_in_meta_pkl(tmp_path, monkeypatch, meta, tokenizer):
    """No pickle is run; what is not one character a token is unknown, not GPT-2's."""
    monkeypatch.chdir(tmp_path)
    nanogpt_folder(tmp_path / "chars", "ab", **meta)
    if tokenizer:
        read = read_meta(tmp_path, "chars")
        assert read["tokenizer"] == tokenizer and isinstance(read["vocab_size"], int)
    else:
        with pytest.raises(UserError, match="meta.pkl is damaged, or has more than a vocabulary"):
            read_meta(tmp_path, "chars")
        assert not (tmp_path / "executed").exists()
