"""What a user does after a run: the commands that it prints, a data set without a test split, the
loss before and after fine-tuning."""

import os
import re
import shlex
import shutil

import pytest
import torch
from scipy.stats import ttest_rel

import conftest
from conftest import read_json
from eval import paired_difference
from nanolab import huggingface
from nanolab.checkpoint import read_checkpoint
from nanolab.common import UserError
from nanolab.study.stats import weighted_error


def without_test_split(tiny_data, folder):
    """The same data set as nanoGPT's prepare.py would leave it. -> flags"""
    source = tiny_data[1].removeprefix("--data_dir=")
    (folder / "plain").mkdir()
    for split in ("train", "val"):
        shutil.copy(f"{source}/tiny/{split}.bin", folder / "plain")
    return [*tiny_data, "--dataset=plain", f"--data_dir={folder}", "--vocab_size=257"]


def test_the_next_commands_work(small_run, output_of, capsys, tiny_data, tmp_path, monkeypatch):
    """Of a plain run; of one that has neither a test split nor a tokenizer; of one from weights
    with a longer context, where the loss is measured before and after."""
    def next_commands(name, *flags):
        """Makes a run, runs the commands that it prints. -> [(command, what it prints)]"""
        small_run(name, *flags)
        results = []
        for line in capsys.readouterr().out.partition("\nnext:")[2].splitlines():
            python, script, *words = shlex.split(line)
            assert python == "python"
            output = output_of(script.removesuffix(".py"), *words, "--device=cpu")
            results.append((line.strip(), output))
        return results
    (evaluating, result), (sampling, text) = next_commands("a run", *tiny_data)
    assert "'" in evaluating and "test loss" in result and sampling.startswith("python sample.py")
    assert text.startswith("Every effort moves you")

    flags = without_test_split(tiny_data, tmp_path)
    [(evaluating, result)] = next_commands("plain", *flags)
    assert evaluating.endswith("--split=val") and "val loss" in result

    monkeypatch.setattr(conftest, "SMALL", [  # the model's shape is that of init_from
        flag for flag in conftest.SMALL if not flag.startswith("--n_")])
    (evaluating, result), _ = next_commands("tuned", *tiny_data, "--block_size=8",
                                            f"--init_from={tmp_path / 'a run'}")
    before, after, difference = result.splitlines()
    change = float(re.search(r"difference: (\S+), 95 % interval", difference)[1])
    assert change < 0 and change == pytest.approx(
        float(after.split()[-1]) - float(before.split()[-1]), abs=1e-4)


def test_a_run_without_best(tiny_data, small_run, capsys, monkeypatch):
    """No validation was the best: last.pt is what the commands name."""
    monkeypatch.setattr("nanolab.checkpoint.CheckpointSaver.is_best", lambda self, loss: False)
    run = small_run("run", *tiny_data)
    assert capsys.readouterr().out.count(str(run / "last.pt")) == 2


def test_no_split_named_test(small_run, tiny_data, tmp_path, monkeypatch, output_of):
    """The result of val is saved apart from that of test, and read again until the data change."""
    run = small_run("run", *without_test_split(tiny_data, tmp_path))
    command = ["eval", "--ckpt", run, "--split=val"]
    printed = output_of(*command)
    assert "on the val split of plain" in printed and "not known" in printed
    [result] = read_json(run / "best.val.json")["results"]
    assert result["val_loss"] == pytest.approx(read_checkpoint(run)["val_loss"], abs=0.2)
    assert not (run / "best.test.json").exists()
    os.utime(run / "best.val.json", (1, 1))  # as in a copy
    with monkeypatch.context() as patch:
        patch.setattr("eval.measure_loss", None)
        assert output_of(*command) == printed
    assert (run / "best.val.json").stat().st_mtime > 1
    output_of(*command, "--block_size=8")
    assert read_json(run / "best.val.json")["results"] == [result], "nothing of shorter windows"
    with pytest.raises(UserError, match="reads at most 16 tokens, not 17"):
        output_of(*command, "--block_size=17")


def test_a_copy_of_the_data(small_run, tiny_data, tmp_path, output_of):
    """The result on a copy of the data, under another name, is not that on the run's own. A run
    of a glob that has saved nothing yet is left out."""
    run = small_run("run 1", *tiny_data)
    shutil.copytree(tiny_data[1].removeprefix("--data_dir=") + "/tiny", tmp_path / "data" / "copy")
    (tmp_path / "run 2").mkdir()
    (tmp_path / "run 2" / "log.jsonl").touch()
    for flags in ["--dataset=copy", f"--data_dir={tmp_path / 'data'}"], []:
        output_of("eval", "--ckpt", tmp_path / "run *", *flags)
    results = read_json(run / "best.test.json")["results"]
    assert [result["dataset"] for result in results] == ["copy", "tiny"]


def test_a_checkpoint_is_read_once(small_run, output_of, monkeypatch):
    reads, load = [], huggingface.load_tensors
    monkeypatch.setattr(huggingface, "load_tensors", lambda path: reads.append(path) or load(path))
    output_of("eval", "--ckpt", small_run("run"), "--split=val", "--device=cpu")
    assert len(reads) == 1


def test_paired_difference():
    """With groups of equal size it is scipy's; unequal groups weigh by their windows."""
    draw = torch.Generator().manual_seed(1)
    one = (3 + torch.rand(9, generator=draw)).tolist()
    other = [loss - 0.1 + 0.02 * torch.rand(1, generator=draw).item() for loss in one]

    def result(losses, windows):
        mean = sum(a * b for a, b in zip(losses, windows)) / sum(windows)
        return {"group_losses": losses, "group_windows": windows, "split": "val", "val_loss": mean}

    _, (low, high) = paired_difference(result(one, [4] * 9), result(other, [4] * 9))
    interval = ttest_rel(other, one).confidence_interval(0.95)
    assert [low, high] == pytest.approx(list(interval))
    assert high - low < 0.02, "the documents' own spread is not in it"
    sizes, spread = [1000] * 2 + [1] * 7, [3.0] * 2 + [9.0] * 7
    difference, _ = paired_difference(result([3.0] * 9, sizes), result(spread, sizes))
    assert difference == pytest.approx(6 * 7 / 2007)
    assert paired_difference(result([3.0], [5]), result([2.0], [5])) == (-1.0, None)
    assert weighted_error([0.0, 1.0], [3, 1]) == pytest.approx(0.375)  # around 1 / 4


def test_no_difference_of_other_windows(small_run, tiny_data, output_of):
    runs = [small_run(f"run{size}", *tiny_data, f"--block_size={size}") for size in (16, 8)]
    assert "difference: none, the windows are not the same" in output_of("eval", "--ckpt", *runs)
    assert "difference: " in output_of("eval", "--ckpt", *runs, "--block_size=8")


def test_no_fraction_above_all(small_run, tiny_data, monkeypatch, capsys):
    """Products timed on a busy machine may be slower than the training later."""
    for rate, expected in ((1.0, "products here (0.0%);"),
                           (1e12, "products here when the run started, on a busy machine;")):
        monkeypatch.setattr("nanolab.checkpoint.RunState.tokens_per_second", lambda self: rate)
        small_run(f"run{rate}", *tiny_data)
        assert expected in re.search("speed: .*", capsys.readouterr().out)[0]
