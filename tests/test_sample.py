"""Texts: by sample.py, where each depends on its own seed and not on those made beside it; and
while training."""

import json
import re

import pytest

import train
from conftest import SMALL, assert_same_run, call, losses, run_main
from nanolab.common import UserError
from test_resume import stop_at


def test_a_sample_depends_on_its_own_seed(small_run, monkeypatch, capsys):
    run = small_run("run", "--max_steps=1")
    flags = ["--ckpt", run / "best.pt", "--prompt=def main", "--max_new_tokens=60", "--device=cpu"]
    run_main(monkeypatch, "sample", *flags, "--num_samples=3", "--seed=1")
    side_by_side = re.split(r"^--- sample \d\n", capsys.readouterr().out, flags=re.M)[1:]
    for i, text in enumerate(side_by_side):
        run_main(monkeypatch, "sample", *flags, f"--seed={1 + i}")
        assert capsys.readouterr().out == text
    assert len(set(side_by_side)) == 3


def test_the_runs_own_prompt_is_the_default(small_run, monkeypatch, capsys):
    run = small_run("run", "--max_steps=1", "--sample_prompt=import o")
    flags = ["--ckpt", run, "--max_new_tokens=5", "--device=cpu"]
    for given, begins in ([], "import o"), (["--prompt=def"], "def"):
        capsys.readouterr()
        run_main(monkeypatch, "sample", *flags, *given)
        assert capsys.readouterr().out.startswith(begins)


def samples(run):
    entries = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return {entry["step"]: entry["sample"] for entry in entries if "sample" in entry}


def test_samples_leave_no_trace(small_run, tiny_data, tmp_path, monkeypatch, capsys):
    """In one process or two, with dropout, stopped or not: the same bits as without them, and the
    same texts."""
    flags = [*tiny_data, "--batch_size=4", "--eval_every=4", "--max_steps=12"]
    sampling = [*flags, "--sample_every=3", "--sample_prompt=12 t"]
    without, whole = small_run("without", *flags), small_run("whole", *sampling)
    texts = samples(whole)
    assert list(texts) == [3, 6, 9, 12] and len(set(texts.values())) > 1
    assert all(text.startswith("12 t") and len(text) > 9 for text in texts.values())
    assert "step 9, a sample:\n  | 12 t" in capsys.readouterr().out
    monkeypatch.setattr(train, "learning_rate_at", stop_at(5))
    parts = small_run("parts", *sampling)
    monkeypatch.undo()
    small_run("parts", *sampling, "--resume")
    assert_same_run(whole, parts)
    assert samples(parts) == texts
    for log in (whole / "log.jsonl", parts / "log.jsonl"):
        log.write_text("".join(line for line in log.read_text().splitlines(True)
                               if "sample" not in line))
    assert_same_run(without, parts)
    two = call("train.py", *SMALL, *sampling, f"--out_dir={tmp_path / 'two'}", processes=2)
    assert two.returncode == 0, two.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(whole), rel=1e-5) and list(
        samples(tmp_path / "two")) == list(texts)


def test_a_model_that_diverged_still_trains(small_run, tiny_data):
    run = small_run("run", *tiny_data, "--learning_rate=1e25", "--sample_every=1", "--max_steps=3")
    assert "no sample" in samples(run)[3]


def test_samples_need_a_tokenizer(small_run, tiny_data, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "read_meta", lambda *args: {**real(*args), "tokenizer": "unknown"})
    with pytest.raises(UserError, match="tokenizer is unknown.*without --sample_every"):
        small_run("run", *tiny_data, "--sample_every=1")
    assert not (tmp_path / "run").exists()


real = train.read_meta
