"""sample.py: a text depends on its own seed, not on those that are made beside it."""

import re

from conftest import run_main


def test_a_sample_depends_on_its_own_seed(small_run, monkeypatch, capsys):
    run = small_run("run", "--max_steps=1")
    flags = ["--ckpt", run / "best.pt", "--prompt=def main", "--max_new_tokens=60", "--device=cpu"]
    run_main(monkeypatch, "sample", *flags, "--num_samples=3", "--seed=1")
    side_by_side = re.split(r"^--- sample \d\n", capsys.readouterr().out, flags=re.M)[1:]
    for i, text in enumerate(side_by_side):
        run_main(monkeypatch, "sample", *flags, f"--seed={1 + i}")
        assert capsys.readouterr().out == text
    assert len(set(side_by_side)) == 3
