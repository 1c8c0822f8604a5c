"""What people bring as text: folders as they are found, copies in another dress, bad records,
ready-made splits, nanoGPT's character-level data. Nothing is lost, and nothing leaks."""

import gzip
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
from conftest import SMALL, SPLITS, call, read_split, run_main, run_quickly
from nanolab import corpus
from nanolab.checkpoint import read_checkpoint
from nanolab.common import UserError
from nanolab.corpus import cut, file_ranges, own_files, undressed
from nanolab.data import read_meta
from nanolab.tokenizer import END_OF_TEXT


def make(monkeypatch, folder, *argv):
    """prepare.py of some source in this process. -> {split: [document]}"""
    run_main(monkeypatch, "prepare", *argv, f"--data_dir={folder}", "--tokenizer=bytes",
             "--name=made", "--workers=1")
    return {split: read_split(folder, "made", split) for split in SPLITS}


def stored_facts(folder):
    return json.loads((folder / "made" / "meta.json").read_text())


def sentences(n, first=0):
    return [f"Die Brücke {i} hat {i * i} Bögen.\nIhr Café ist ‘zu’, œuvre ﬁn.\n" for i in
            range(first, first + n)]


# Which files


def test_what_is_read_of_a_folder(tmp_path, monkeypatch, capsys):
    """A folder as it is found: what is not text of a known kind is left out and named; links are
    followed, each file counts once, a loop of links ends."""
    folder, elsewhere = tmp_path / "texts", tmp_path / "elsewhere"
    for path, content in {
            "a.txt": "Text a.", "B.TEXT": "Text b.", "c.md": "Text c.", "deep/er/d.txt": "Text d.",
            "e.jsonl": '{"text": "Text e."}', "f.ndjson": '{"text": "Text f."}',
            "empty.txt": "", "g.gz": gzip.compress(b"g"), "h.csv": "text\nh", "i.json": '["i"]',
            "j.py": "j", "LICENSE": "k", "Thumbs.db": b"\xff", ".DS_Store": b"\0",
            "._a.txt": b"\0", ".git/x.txt": "x", ".ipynb_checkpoints/a.txt": "Draft a.",
            "__MACOSX/._a.txt": b"\0", "../elsewhere/l.txt": "Text l."}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content if isinstance(content, bytes) else content.encode())
    (folder / "linked").symlink_to(elsewhere)
    (folder / "deep" / "loop").symlink_to(folder)
    (folder / "deep" / "loop2").symlink_to(folder / "deep")
    (folder / "z.txt").symlink_to(folder / "a.txt")
    (folder / "gone.txt").symlink_to(tmp_path / "nowhere")
    documents = sum(make(monkeypatch, tmp_path, folder).values(), [])
    assert sorted(documents) == [f"Text {letter}." for letter in "abcdefl"]
    line = next(line for line in capsys.readouterr().out.splitlines() if "read" in line)
    for part in ("files read: 7; left out: hidden 5, ", ".gz 1", ".csv 1", ".json 1", ".py 1",
                 ".db 1", "no suffix 1", "empty or a broken link 2"):
        assert part in line
    facts = stored_facts(tmp_path)
    assert facts["files"] == 7 and facts["files_left_out"]["hidden"] == 5
    for pattern in ("**", "**/*", "*", "**/*.*"):
        same = [set(map(os.path.realpath, own_files(each))) for each in (folder / pattern, folder)]
        assert same[0] == same[1] and len(same[0]) == 7, pattern
    assert len(own_files(folder / "**/*.txt")) == 3
    assert len(own_files(folder / "deep/**/*.txt")) == 3, "through the loop"
    assert len(own_files(folder / ".*/*.txt")) == 2, "asked for"
    assert len(own_files(folder / "._*.txt")) == 1, "asked for"
    (tmp_path / "[1] x").mkdir()
    (tmp_path / "[1] x" / "[2].txt").write_text("Text.")
    for pattern in ("[1] x", "[1] x/[2].txt", "?1] x/*", "*x/**"):
        assert len(own_files(tmp_path / pattern)) == 1, pattern


@pytest.mark.parametrize("name", ["enwik8", "notes.rst", "wiki.train.tokens", ".notes.txt",
                                  "a[1].txt", "notes.json"])
def test_a_file_that_is_named_is_read(tmp_path, name):
    (tmp_path / name).write_text('{"text": "Text."}')
    assert own_files(tmp_path / name) == [str(tmp_path / name)]
    if "." in name[1:] and "[" not in name and name[0] != ".":
        assert own_files(tmp_path / f"*{pathlib.Path(name).suffix}") == [str(tmp_path / name)]


@pytest.mark.parametrize("name, message", [
    ("x.gz", "is not UTF-8 text (byte 1)"),
    ("nothing*", "does not exist"), ("", "left out: .csv 1, .gz 1")])
def test_what_cannot_be_read_is_named(tmp_path, monkeypatch, name, message):
    (tmp_path / "table.csv").write_text("text\nx")
    (tmp_path / "x.gz").write_bytes(gzip.compress(b"x"))
    with pytest.raises(UserError, match=re.escape(message)):
        make(monkeypatch, tmp_path / "data", tmp_path / name)


def test_home_folder(tmp_path, monkeypatch):
    """The shell leaves the ~ of --data_dir=~/x as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["prepare.py", "~/x", "--val=~/x", "--data_dir=~/x"])
    args = prepare.parse_arguments()
    assert {args.source, args.val, args.data_dir} == {str(tmp_path / "x")}


# Equal texts


DRESSES = {
    "as it is": str, "CRLF": lambda text: text.replace("\n", "\r\n"),
    "CR": lambda text: text.replace("\n", "\r"), "BOM": lambda text: "\ufeff" + text,
    "no last line end": str.rstrip, "more line ends": lambda text: text + "\n\n",
    "trailing spaces": lambda text: text.replace("\n", "  \n"),
    "NFD": lambda text: unicodedata.normalize("NFD", text),
    "no-break spaces": lambda text: text.replace(" ", "\xa0"),
    "soft hyphens": lambda text: text.replace("ck", "c\u00adk"),
    "ligatures": lambda text: text.replace("ﬁ", "fi")}


@pytest.mark.parametrize("dress", DRESSES)
@pytest.mark.parametrize("kind", ["texts", "records", "long"])
def test_copies_in_another_dress_stay_together(tmp_path, monkeypatch, dress, kind):
    """Documents, or the pieces of a long one, and their copies are in one split; a BOM or a
    Windows line end of a text file is no token."""
    documents, folder = sentences(100), tmp_path / "texts"
    folder.mkdir()
    if kind == "long":  # with paragraphs, after a title of its own
        text = "\n".join(documents)
        (folder / "a.txt").write_text(text)
        (folder / "b.txt").write_bytes(DRESSES[dress](text).encode())
    elif kind == "texts":
        for i, text in enumerate(documents):
            (folder / f"a{i}.txt").write_text(text)
            (folder / f"b{i}.txt").write_bytes(DRESSES[dress](text).encode())
    else:
        write_table(Table.from_pydict({"text": documents}), folder / "a.parquet")
        (folder / "b.jsonl").write_text("".join(
            json.dumps({"text": DRESSES[dress](text)}) + "\r\n" for text in documents))
    made = make(monkeypatch, tmp_path, folder, "--heldout=0.3")
    n_documents = sum(map(len, made.values()))
    plain = {split: {undressed(text) for text in texts} for split, texts in made.items()}
    assert n_documents == 2 * sum(map(len, plain.values())), "each twice, in one split"
    assert all(plain.values()) and not plain["train"] & plain["val"]
    everything = "".join(sum(made.values(), []))
    assert "\ufeff" not in everything
    assert kind == "records" or "\r" not in everything


def test_pieces_are_cut_by_what_they_say():
    """A text after another title is cut at the same places, but for the first."""
    text = "\n".join(sentences(300))
    one, other = list(cut(text, 1000)), list(cut("A title.\n" * 40 + text, 1000))
    assert "".join(one) == text and len(set(one) - set(other)) <= 2
    assert all(1000 <= len(undressed(piece).encode()) <= 2100 for piece in one[:-1])
    assert sum(piece.endswith("\n\n") for piece in one[:-1]) == len(one) - 1, "at paragraphs' ends"


# The fractions


@pytest.mark.parametrize("kb, heldout", [(20, None), (20, 0.02), (100, 0.2), (1000, None)])
@pytest.mark.parametrize("kind", ["lines", "paragraphs", "one line", "Chinese", "records", "files",
                                  "one record"])
def test_fractions_are_those_asked_for(tmp_path, monkeypatch, kind, kb, heldout):
    """From 20 KB on, each held-out part is within two points of its fraction."""
    source, n = tmp_path / "mine.txt", kb * 1000
    words = " ".join(map(str, range(n)))[:n]
    if kind == "lines":
        source.write_text(re.sub("(.{60}) ", r"\1\n", words))
    elif kind == "paragraphs":
        source.write_text(re.sub("(.{600}) ", r"\1\n\n", words))
    elif kind == "one line":
        source.write_text(words)
    elif kind == "Chinese":
        source.write_text("".join(map(chr, range(0x4e00, 0x9000))) * (1 + n // 50_000))
        os.truncate(source, n // 3 * 3)
    elif kind == "files":
        source = tmp_path / "files"
        source.mkdir()
        for i in range(200):
            (source / f"{i}.txt").write_text(words[n // 200 * i:n // 200 * (i + 1)])
    else:
        source = tmp_path / "mine.jsonl"
        rows = [words] if kind == "one record" else [words[i:i + 100] for i in range(0, n, 100)]
        source.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    make(monkeypatch, tmp_path, source, *([f"--heldout={heldout}"] if heldout else []))
    splits = read_meta(tmp_path, "made")["splits"]
    total = sum(splits[split]["bytes"] for split in SPLITS)
    asked = (heldout or 0.1) / 2  # 0.1 is the default for less than 5 MB
    for split in ("val", "test"):
        assert asked <= splits[split]["bytes"] / total <= asked + 0.02, split


def test_long_documents_are_said(tmp_path, monkeypatch, capsys):
    """Records are cut only if they are longer than a held-out part; if they are nearly so, the
    fractions are said."""
    rows = [f"{i}" * 1900 for i in range(10, 60)]
    (tmp_path / "mine.jsonl").write_text("".join(f'{{"text": "{row}"}}\n' for row in rows))
    made = make(monkeypatch, tmp_path, tmp_path / "mine.jsonl")
    assert sorted(sum(made.values(), [])) == rows and len(made["test"]) == 3
    assert "note:" not in capsys.readouterr().out
    make(monkeypatch, tmp_path / "less", tmp_path / "mine.jsonl", "--heldout=0.05")
    assert "note: a held-out split is 4.0% of the text instead of 2.5%" in capsys.readouterr().out


# Ready-made splits


def test_ready_made_splits(tmp_path, monkeypatch, capsys):
    """--val and --test are as they are; a text of theirs, in any dress, is left out of train."""
    folder, parts = tmp_path / "texts", {"train": sentences(50), "valid": sentences(8, 50),
                                         "test": sentences(9, 60)}
    parts["train"][7] = "".join(sentences(20, 100))  # with both given, nothing needs to be cut
    parts["train"] += [DRESSES["CRLF"](parts["valid"][0]), DRESSES["NFD"](parts["test"][8])]
    folder.mkdir()
    for name, texts in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(
            json.dumps({"text": text}) + "\n" for text in texts))
    given = [f"--val={folder}/valid.jsonl", f"--test={folder}/test.jsonl"]
    made = make(monkeypatch, tmp_path / "both", folder, *given)
    assert made == {"train": parts["train"][:50], "val": parts["valid"], "test": parts["test"]}
    output = capsys.readouterr().out
    assert "files read: 3" in output
    assert "documents left out: in val or test 2\n" in output
    assert stored_facts(tmp_path / "both")["documents_left_out"]["in val or test"] == 2

    made = make(monkeypatch, tmp_path / "one", folder, given[1], "--heldout=0.2")
    assert made["test"] == parts["test"] and 5 <= len(made["val"]) <= 8
    del parts["train"][7]
    assert {*parts["train"][:50], *parts["valid"]} <= {*made["train"], *made["val"]}

    with pytest.raises(UserError, match="no text for train; documents left out: none"):
        make(monkeypatch, tmp_path / "x", folder / "test.jsonl", given[1])
    with pytest.raises(UserError, match="no text for train; .* left out: in val or test 9"):
        (tmp_path / "copy.jsonl").write_bytes((folder / "test.jsonl").read_bytes())
        make(monkeypatch, tmp_path / "y", tmp_path / "copy.jsonl", *given)


# Markers, and long files


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet"])
def test_end_of_text_separates_documents(tmp_path, monkeypatch, kind):
    """The published data aside, the marker is between documents and never in one."""
    texts = sentences(40)
    text = f"{END_OF_TEXT}\n".join(texts)
    if kind == "text":
        (tmp_path / "mine.txt").write_bytes(text.replace("\n", "\r\n").encode())
    elif kind == "jsonl":
        (tmp_path / "mine.jsonl").write_text(json.dumps({"text": text}))
    else:
        write_table(Table.from_pydict({"text": [text]}), tmp_path / "mine.parquet")
    made = make(monkeypatch, tmp_path, next(tmp_path.glob("mine.*")))
    assert sorted(sum(made.values(), [])) == sorted(texts)


def test_a_long_file_is_cut_at_its_markers(tmp_path, monkeypatch):
    """No text of a file of several shards is cut, so none is in two splits."""
    texts = [text.replace("\n", "\n\n") for text in sentences(400)]
    (tmp_path / "mine.txt").write_text(f"\n{END_OF_TEXT}\n".join(texts))
    monkeypatch.setattr(corpus, "SHARD_BYTES", 3000)
    assert len(file_ranges(str(tmp_path / "mine.txt"))) > 10
    made = make(monkeypatch, tmp_path, tmp_path / "mine.txt")
    assert sorted(map(str.strip, sum(made.values(), []))) == sorted(map(str.strip, texts))


# Records


BAD = {"a number": 7, "a list": ["x"], "a mapping": {"x": 1}, "true": True,
       "half a surrogate pair": "\ud800"}


@pytest.mark.parametrize("bad", [None, *BAD])
def test_bad_lines_of_json(tmp_path, monkeypatch, capsys, bad):
    """Null, missing and empty texts are left out and counted; what is no text is named with its
    line, wherever shards begin."""
    monkeypatch.setattr(corpus, "SHARD_BYTES", 700)
    values = [*sentences(60), None, "", " \n\t", *sentences(3, 60)]
    if bad:
        values.insert(57, BAD[bad])
    rows = [json.dumps({"id": i, "text": value}) for i, value in enumerate(values)]
    rows[3] = '{"id": 3}'
    (tmp_path / "mine.jsonl").write_text("".join(row + "\n" for row in rows))
    if bad:
        with pytest.raises(UserError, match="jsonl, line 58 has no text that can be encoded: "):
            make(monkeypatch, tmp_path, tmp_path / "mine.jsonl")
    else:
        made = make(monkeypatch, tmp_path, tmp_path / "mine.jsonl")
        assert sorted(sum(made.values(), [])) == sorted(sentences(63)[:3] + sentences(63)[4:])
        assert "documents left out: null or empty 4\n" in capsys.readouterr().out
        assert stored_facts(tmp_path)["documents_left_out"]["null or empty"] == 4


@pytest.mark.parametrize("row_group_size", [7, 66])
def test_bad_rows(tmp_path, monkeypatch, capsys, row_group_size):
    """The same of .parquet files."""
    monkeypatch.setattr(corpus, "SHARD_BYTES", 700)
    values = [*sentences(60), None, "", " \n\t", *sentences(3, 60)]
    for name, column in (("mine", values), ("bad", [*[None] * 57, 7, *[None] * 8])):
        write_table(Table.from_pydict({"text": column}), tmp_path / f"{name}.parquet",
                    row_group_size=row_group_size)
    made = make(monkeypatch, tmp_path, tmp_path / "mine.parquet")
    assert sorted(sum(made.values(), [])) == sorted(sentences(63))
    assert "documents left out: null or empty 3\n" in capsys.readouterr().out
    with pytest.raises(UserError, match="bad.parquet, row 58 has no text that can be encoded: "):
        make(monkeypatch, tmp_path / "bad", tmp_path / "bad.parquet")


@pytest.mark.parametrize("line, message", [
    ('{"text": "cut', "line 3 is no JSON object, as each line must be: '{\"text\": \"cut'"),
    ('["text"]', "line 3 is no JSON object"), ("[]", "line 3 is no JSON object"),
    ('"text"', "line 3 is no JSON object"), ("null", "line 3 is no JSON object"),
    (b'{"text": "\xe9"}', "mine.jsonl is not UTF-8 text (byte 33)"),
    (b'{"text": "a\0b"}', "mine.jsonl is not UTF-8 text (byte 34)"),
    ("x".join(["[" * 100_000, "]" * 100_000]), "line 3 is no JSON object")])
def test_bad_lines(tmp_path, monkeypatch, line, message):
    line = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "mine.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "first"}\n\r\n' + line)
    with pytest.raises(UserError, match=re.escape(message)):
        make(monkeypatch, tmp_path, tmp_path / "mine.jsonl")


@pytest.mark.parametrize("suffix, message", [
    ("jsonl", "null or empty 2; --text_column says which"),
    ("parquet", "has no column 'text' but id, body; choose with --text_column")])
def test_a_column_that_no_record_has(tmp_path, monkeypatch, suffix, message):
    if suffix == "jsonl":
        (tmp_path / "mine.jsonl").write_text('{"id": 1, "body": "x"}\n{"id": 2}\n')
    else:
        write_table(Table.from_pydict({"id": [1], "body": ["x"]}), tmp_path / "mine.parquet")
    with pytest.raises(UserError, match=message):
        make(monkeypatch, tmp_path, tmp_path / f"mine.{suffix}")


def test_a_damaged_table_is_named(tmp_path, monkeypatch):
    """Its footer is intact, so the damage is met when rows are decoded."""
    path = tmp_path / "mine.parquet"
    write_table(Table.from_pydict({"text": sentences(2000)}), path, use_dictionary=False)
    content = path.read_bytes()
    path.write_bytes(content[:2000] + b"x" * 1000 + content[3000:])
    with pytest.raises(UserError, match="mine.parquet is damaged"):
        make(monkeypatch, tmp_path, path)


@pytest.mark.parametrize("kind", ["dictionary", "large_string"])
def test_columns_of_text_of_other_types(tmp_path, monkeypatch, kind):
    column = array(sentences(40))
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(kind)
    write_table(Table.from_pydict({"text": column}), tmp_path / "mine.parquet")
    made = make(monkeypatch, tmp_path, tmp_path / "mine.parquet")
    assert sorted(sum(made.values(), [])) == sorted(sentences(40))


def test_line_separators_of_unicode_end_no_record(tmp_path, monkeypatch):
    texts = [f"{i}\u2028\u2029\x85\x0c\x1c{i}" for i in range(50)]
    (tmp_path / "mine.jsonl").write_text("".join(
        json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    made = make(monkeypatch, tmp_path, tmp_path / "mine.jsonl")
    assert sorted(sum(made.values(), [])) == sorted(texts)


@pytest.mark.parametrize("kind, place", [("txt", "mine.txt"), ("jsonl", "mine.jsonl, line 2")])
def test_a_text_that_tiktoken_refuses_is_named(tmp_path, monkeypatch, kind, place):
    """With its file, and a record's line."""
    texts = ["First\nof\nall.", "x" + " " * 1_100_000 + "x"]
    (tmp_path / "mine.txt").write_text(END_OF_TEXT.join(texts))
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps({"text": text}) + "\n"
                                                 for text in texts))
    with pytest.raises(UserError, match=f"{place} has no text that can be encoded: "):
        run_main(monkeypatch, "prepare", tmp_path / f"mine.{kind}", f"--data_dir={tmp_path}")


# Memory


def test_a_large_row_group_is_read_in_parts(tmp_path, monkeypatch):
    """The same bytes as from small groups, each row decoded once; the shards depend on the file."""
    rows, opened = sentences(900), []
    for name, size in (("one", 900), ("small", 7)):
        write_table(Table.from_pydict({"text": rows}), tmp_path / f"{name}.parquet",
                    row_group_size=size)
    monkeypatch.setattr(corpus, "SHARD_BYTES", 2000)
    ranges = file_ranges(str(tmp_path / "one.parquet"))
    assert len(ranges) > 5 and all(r.n_bytes < 4000 for r in ranges)
    open_parquet = corpus.open_parquet
    monkeypatch.setattr(corpus, "open_parquet", lambda path, only_footer=False: (
        opened.append(only_footer), open_parquet(path, only_footer))[1])
    made = [make(monkeypatch, tmp_path / "one", tmp_path / "one.parquet")]
    assert opened == [True, False], "once for the footer, once for all rows"
    made.append(make(monkeypatch, tmp_path / "small", tmp_path / "small.parquet"))
    assert made[0] == made[1] and sorted(sum(made[0].values(), [])) == sorted(rows)
    for name in ("one", "small"):  # as FineWeb
        prepare.prepare_fineweb([str(tmp_path / f"{name}.parquet")], tmp_path / f"{name}_web",
                                "bytes", 1, name, 10_000, 0.3, 900, 1000)
    for split in SPLITS:
        assert ((tmp_path / "one_web" / f"{split}.bin").read_bytes()
                == (tmp_path / "small_web" / f"{split}.bin").read_bytes())


def test_memory_for_a_large_row_group(tmp_path):
    """Reading 100 MB in one row group takes a few megabytes, and decodes each row once."""
    rows = [f"{i} {i * i} {i * i * i}\n" * 150 for i in range(25_000)]
    write_table(Table.from_pydict({"text": rows}), tmp_path / "one.parquet",
                row_group_size=len(rows), compression="none", use_dictionary=False)
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


class Trap:
    def __reduce__(self):
        return pathlib.Path("trap").touch, ()


def nanogpt_folder(folder, characters, **meta):
    """data/shakespeare_char of nanoGPT's, of other text."""
    folder.mkdir()
    ids = np.arange(5000) % len(characters)
    ids[:4000].astype("<u2").tofile(folder / "train.bin")
    ids[4000:].astype("<u2").tofile(folder / "val.bin")
    itos = dict(enumerate(characters))
    meta = {"vocab_size": len(itos), "itos": itos, "stoi": {v: k for k, v in itos.items()}, **meta}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


def test_nanogpt_characters(tmp_path, monkeypatch, capsys):
    """A character-level data set of nanoGPT's has its own characters everywhere."""
    nanogpt_folder(tmp_path / "chars", "\n abcdeé“漢")
    run_main(monkeypatch, "prepare", "info", "chars", f"--data_dir={tmp_path}")
    output = capsys.readouterr().out
    assert 'character:"\\n abcdeé“漢" tokens of 10 kinds' in output
    assert "\n\n abcdeé“漢\n abc" in output
    run_quickly([*SMALL, "--dataset=chars", f"--data_dir={tmp_path}", f"--out_dir={tmp_path}/out",
                 "--max_steps=60", "--learning_rate=1e-2", "--sample_every=60",
                 "--sample_prompt=abc"])
    assert 'tokenizer character:"\\n abc' in capsys.readouterr().out
    log = map(json.loads, (tmp_path / "out/log.jsonl").read_text().splitlines())
    assert any(entry.get("sample", "").startswith("abcdeé“漢\n abcd") for entry in log)
    assert read_checkpoint(tmp_path / "out/best.pt")["config"]["vocab_size"] == 10
    run_main(monkeypatch, "sample", f"--ckpt={tmp_path}/out", "--prompt=abc", "--temperature=0",
             "--max_new_tokens=8", "--device=cpu")
    assert capsys.readouterr().out == "abcdeé“漢\n a\n"
    for prompt in ("abz", "ü", END_OF_TEXT):
        with pytest.raises(UserError, match="has characters that the model has no tokens for"):
            run_main(monkeypatch, "sample", f"--ckpt={tmp_path}/out", f"--prompt={prompt}")
    run_main(monkeypatch, "nanolab.huggingface", "export", tmp_path / "out/best.pt",
             tmp_path / "hf")
    files = {path.name for path in (tmp_path / "hf").iterdir()}
    assert files == {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert json.loads((tmp_path / "hf/config.json").read_text())["eos_token_id"] is None


@pytest.mark.parametrize("meta, tokenizer", [
    ({"itos": ["a", "b"], "vocab_size": 2}, 'character:"ab"'),
    ({"itos": {}, "vocab_size": 50257}, "gpt2"), ({"itos": {}, "vocab_size": 2}, "unknown"),
    ({"itos": {0: "the", 1: "a"}, "vocab_size": 2}, "unknown"),
    ({"itos": {0: "a", 1: "a"}, "vocab_size": 2}, "unknown"),
    ({"itos": {0: "a"}, "vocab_size": 2}, "unknown"),
    ({"vocab_size": 2, "itos": {0: "a", 5: "b"}}, UserError), ({"stoi": Trap()}, UserError)])
def test_vocabularies_in_meta_pkl(tmp_path, monkeypatch, meta, tokenizer):
    """No pickle is run; what is not one character a token is unknown, not GPT-2's."""
    monkeypatch.chdir(tmp_path)
    nanogpt_folder(tmp_path / "chars", "ab", **meta)
    if tokenizer is UserError:
        with pytest.raises(UserError, match="meta.pkl is damaged, or has more than a vocabulary"):
            read_meta(tmp_path, "chars")
        assert not (tmp_path / "trap").exists()
    else:
        assert read_meta(tmp_path, "chars")["tokenizer"] == tokenizer
