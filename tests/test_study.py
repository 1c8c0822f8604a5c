"""What study.py shows and what not: on numbers whose answer scipy or a simulation gives, and on
runs' folders in every state; its page, in a real browser if there is one."""

import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import scipy

from conftest import HERE, read_json
from nanolab import charts, report
from nanolab.common import UserError
from nanolab.study import page as study_page
from nanolab.study import runs, stats


@pytest.fixture
def compare(output_of, tmp_path):
    """compare(runs, *arguments): what study.py prints of these runs, or of a path."""
    def call(runs, *argv):
        if isinstance(runs, list):
            (tmp_path / "runs.json").write_text(json.dumps(runs))
            runs = tmp_path / "runs.json"
        return output_of("study", runs, *argv)
    return call


@pytest.fixture
def rows_of(compare, tmp_path):
    """rows_of({name: {seed: loss}}, **what all runs share) -> {label: row}, what study.py
    prints."""
    def call(losses, **options):
        out = tmp_path / "out.json"
        printed = compare([{"name": name, "seed": seed, "test_loss": loss, **options}
                           for name in losses for seed, loss in losses[name].items()],
                          "--json", out)
        return {row["experiment"]: row for row in read_json(out)["rows"]}, printed
    return call


def draws(n, mean, sd, seed, first=0):
    """n normal losses, by seeds `first` and on."""
    return dict(enumerate(np.random.default_rng(seed).normal(mean, sd, n).tolist(), first))


@pytest.mark.parametrize("n, n_baseline, shift, compared", [
    (5, 5, 0, "paired, 5"), (2, 2, 0, "paired, 2"), (5, 7, 2, "paired, 5 of 7"),
    (5, 5, 3, "paired, 2 of 5"),  # over the common seeds
    (40, 3, 100, "unpaired"), (5, 5, 4, "unpaired"),  # one in common
    (1, 7, 0, "unpaired, one run"), (7, 1, 0, "unpaired, one run"),
    (2, 9, 100, "unpaired, two runs")])
def test_intervals_are_scipys(rows_of, n, n_baseline, shift, compared):
    ours, theirs = draws(n, 3.65, 0.02, n, first=shift), draws(n_baseline, 3.67, 0.01, 99)
    rows, printed = rows_of({"baseline": dict(reversed(theirs.items())), "mine": ours})
    row, a, b = rows["mine"], list(ours.values()), list(theirs.values())
    test = scipy.stats.ttest_ind(a, b, equal_var=min(n, n_baseline) < 3)
    difference = np.mean(a) - np.mean(b)
    common = sorted(ours.keys() & theirs.keys())
    if len(common) > 1:
        a, b = [ours[seed] for seed in common], [theirs[seed] for seed in common]
        test, difference = scipy.stats.ttest_rel(a, b), np.mean(np.subtract(a, b))
    low, high = test.confidence_interval()
    assert (row["compared"], row["n"]) == (compared, n)
    assert [row[key] for key in ("difference", "low", "high", "p", "p_corrected", "loss")] == (
        pytest.approx([difference, low, high, test.pvalue, test.pvalue, np.mean([*ours.values()])],
                      rel=1e-6, abs=1e-9))
    assert row["sd"] == (None if n == 1 else pytest.approx(np.std([*ours.values()], ddof=1)))
    verdict = "not shown" if low < 0 < high else "better" if difference < 0 else "worse"
    assert ("mine: 5 of 7." in printed) == (compared == "paired, 5 of 7")  # a note
    [line] = [line for line in printed.splitlines() if line.startswith("mine ")]
    assert f"{difference:+.4f}  {low:+.4f} to {high:+.4f}" in line and line.endswith(verdict)


def test_verdicts_follow_bonferroni(rows_of):
    """An interval at 5 % / 6 leaves out 0 where p times 6 is below 0.05, and then only it is
    shown. Equal losses and references are no tests."""
    baseline = draws(6, 3.6, 0.01, 1)
    shifted = {f"by {shift}": {seed: loss + shift + 0.01 * math.sin(9 * seed + 1e4 * shift)
                               for seed, loss in baseline.items()}
               for shift in (-0.03, -0.012, -0.008, 0.001, 0.009, 0.02)}
    rows, printed = rows_of({"baseline": baseline, "repeat": dict(baseline), **shifted})
    assert "corrected for 6 tests" in printed and [*rows] == sorted(
        rows, key=lambda label: rows[label]["loss"])  # the best first
    for label in shifted:
        row = rows[label]
        test = scipy.stats.ttest_rel(row["losses"], list(baseline.values()))
        assert (row["low"], row["high"]) == pytest.approx(
            tuple(test.confidence_interval(1 - 0.05 / 6)))
        assert row["p_corrected"] == pytest.approx(min(1, 6 * test.pvalue))
        is_shown = row["verdict"] != "not shown"
        assert is_shown == (row["p_corrected"] < 0.05) == (row["low"] * row["high"] > 0)
    assert {row["verdict"] for row in rows.values()} == {
        "better", "worse", "not shown", "not exercised", "baseline"}
    assert rows["repeat"]["verdict"] == "not exercised" and rows["repeat"]["p"] is None

    rows, _ = rows_of({"baseline": {1: 3.0, 2: 3.1}, "elsewhere": {1: 2.0, 2: 2.1}},
                      reference="another program")
    assert rows["elsewhere"]["verdict"] == "reference" and "low" not in rows["elsewhere"]


def test_nothing_is_shown_where_nothing_varies(rows_of):
    rows, printed = rows_of({"baseline": {1: 3.5, 2: 3.75}, "shifted": {1: 3.0, 2: 3.25}})
    assert (rows["shifted"]["compared"], rows["shifted"]["verdict"]) == ("paired, 2, no spread",
                                                                         "not shown")
    assert "nothing varies over the seeds" in printed
    rows, printed = rows_of({"baseline": {1: 3.0}, "other": {1: 2.0}, "equal": {1: 3.0}})
    assert rows["other"]["verdict"] == "not shown" and "run more seeds" in printed
    assert rows["equal"]["verdict"] == "not exercised"


def test_the_effect_and_the_seeds_that_would_show_it(rows_of):
    """80 % power, by simulation; and two pairs are told how many seeds would do."""
    effect = stats.detectable(1 / math.sqrt(5), 4, 0.01)
    gaps = np.random.default_rng(1).normal(effect, 1, (20_000, 5))
    found = scipy.stats.ttest_1samp(gaps, 0, axis=1).pvalue < 0.01
    assert np.mean(found) == pytest.approx(0.8, abs=0.01)

    rows, printed = rows_of({"baseline": {1: 3.00, 2: 3.02}, "mine": {1: 2.97, 2: 3.01}})
    needed = rows["mine"]["seeds_needed"]  # the gaps -0.03 and -0.01: an error of 0.01
    powers = {n: stats.detectable(0.01 * math.sqrt(2 / n), n - 1, 0.05) for n in range(3, 20)}
    assert needed == min(n for n, effect in powers.items() if effect <= 0.02)
    assert f"mine: {needed}." in printed


def test_one_more_run(rows_of):
    losses = draws(5, 3.6, 0.01, 3)
    low, high = scipy.stats.t.interval(0.95, 4, np.mean(list(losses.values())),
                                       np.std(list(losses.values()), ddof=1) * math.sqrt(1.2))
    assert f"would fall between {low:.4f} and {high:.4f}" in rows_of({"baseline": losses})[1]


def test_cautions(compare, tmp_path):
    """Seeds that cross make runs dependent; budgets may differ; another test set may differ."""
    crossed = [{"name": name, "test_loss": 3 + loss, "seed": seed, "init_seed": init}
               for seed, init, loss in ((1, 1, 0), (1, 2, 0.1), (2, 1, 0.2))
               for name, loss in (("baseline", loss), ("a", 2 * loss - 0.1))]
    assert "Some runs of baseline; a have a seed in common" in compare(crossed)
    printed = compare([{"name": "baseline", "test_loss": 3.0, "max_steps": 100},
                       {"name": "a", "test_loss": 2.9, "max_steps": 200},
                       {"name": "b", "test_loss": 2.9, "max_steps": 200, "block_size": 512}])
    assert "baseline's 9,830,400 tokens" in printed and "alone: a: 19,660,800." in printed
    assert "baseline's of 1,024 tokens" in printed and "contexts: b: 512." in printed

    rng = np.random.default_rng(0)
    text, sizes = rng.normal(0, 0.3, 100), [5] * 100
    for spread, wider, seeds in ((0.5, True, (1, 2, 3)), (0.02, False, (1, 2))):  # helps some
        uneven = text + spread * rng.standard_normal(100)
        made = [{"name": name, "seed": seed, "test_loss": loss + 0.002 * rng.standard_normal(),
                 "group_windows": sizes, "group_losses": (loss + groups).tolist()}
                for name, loss, groups in (("baseline", 3.0, text), ("a", 2.95, uneven))
                for seed in seeds]
        printed = compare(made, "--all", "--json", tmp_path / "out.json")
        row = read_json(tmp_path / "out.json")["rows"][0]
        assert row["text_error"] == pytest.approx(np.std(uneven - text, ddof=1) / 10)
        low, high = row["resampled"]
        assert (high - low > 3 * (row["high"] - row["low"])) == wider and low <= row["low"]
        assert ("Not shown if the test set were resampled" in printed) == wider
        assert row["verdict"] == "better" and "if test set resampled" in printed
    compare([{**run, "group_windows": [run["seed"]] * 100} for run in made],
            "--json", tmp_path / "out.json")  # the groups of some runs are others
    assert "resampled" not in read_json(tmp_path / "out.json")["rows"][0]
    made = [{**run, "val_loss": run["test_loss"]} for run in made]
    assert "resampled" not in compare(made, "--all", "--validation"), "its documents are others"
    made[0]["eval_tokens"] = 100
    with pytest.raises(UserError, match="on different data"):
        compare(made, "--validation")


def test_what_counts_as_one_experiment():
    """Seeds and what cannot change the result do not tell runs apart; a repeat of the same seeds
    counts once. Options and values that this code does not know do."""
    found = runs.group_by_experiment([
        {"name": "a", "test_loss": 3.0, "config": {"seed": 1}},
        {"name": "a", "test_loss": 3.2, "config": {"seed": 1, "device": "cuda", "out_dir": "x"}},
        {"name": "a", "test_loss": 3.3, "config": {"seed": 2, "batch_size": 1, "compile": True}},
        {"name": "a", "test_loss": 2.0, "config": {"seed": 1, "dropout": 0.0}},
        {"name": "a", "test_loss": 2.0, "config": {"seed": 1, "new_loss": 1e-4, "norm": "new"}}])
    assert found.keys() == {"a, dropout=0.1, norm=layernorm", "a, dropout=0.0, norm=layernorm",
                            "a, dropout=0.1, new_loss=0.0001, norm=new"}
    losses = runs.losses_by_seed(found["a, dropout=0.1, norm=layernorm"])
    assert list(losses.values()) == pytest.approx([3.1, 3.3])
    assert len(runs.group_by_experiment([  # max_steps decides
        {"name": "a", "config": {"max_steps": 9, "max_tokens": n}} for n in (5, 7)])) == 1


def test_options_next_to_a_config(tmp_path):
    """They count where neither the config nor the options of all runs say otherwise; and Windows'
    editors write a mark before the text."""
    file = tmp_path / "runs.json"
    file.write_text(json.dumps({"options": {"amp": "bfloat16"}, "runs": [
        {"name": "a", "seed": 3, "amp": "off", "dropout": 0.3, "config": {"dropout": 0.0}}]}),
        "utf-8-sig")
    [run] = runs.read_file(file)
    assert [runs.settings(run)[key] for key in ("seed", "amp", "dropout")] == [3, "bfloat16", 0.0]


def test_a_changed_default_does_not_relabel(compare, monkeypatch):
    """Results on record and new ones keep their options, whatever the defaults become."""
    recorded = "studies/lab/results.json"
    before = compare(recorded)
    for key, value in {"dropout": 0.0, "norm": "rmsnorm", "new_option": 1}.items():
        monkeypatch.setitem(runs.DEFAULTS, key, value)
    assert compare(recorded) == before
    assert {runs.settings(run)["norm"] for run in runs.read_file(recorded)
            if run["name"] == "baseline"} == {"layernorm"}


def make_run(folder, loss, name="baseline", seed=1, ended=True, measured=True, **options):
    """The files of a run as train.py and eval.py leave them."""
    folder.mkdir(parents=True)
    config = {"name": name, "seed": seed, "dataset": "stdlib", "out_dir": str(folder), **options}
    (folder / "config.json").write_text(json.dumps({**config, "code": [{"commit": "c0ffee"}]}))
    (folder / "best.pt").touch()
    lines = [{"step": i, "tokens": 100 * i, "loss": 3 + 1 / (i + 1)} for i in range(60)]
    lines.append({"step": 60, "tokens": 6000, "val_loss": loss})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if ended:
        (folder / "summary.json").write_text(json.dumps({
            "best_val_loss": loss and loss + 0.5, "seconds": 7.0, "ended": "2026-11-28T20:00:00",
            "code": [{"commit": "c0ffee"}]}))
    if measured:
        standard = {"name": name, "test_loss": loss, "dataset": "stdlib", "test_sha256": "5",
                    "amp": "off", "config": config}
        (folder / "best.test.json").write_text(json.dumps({"results": [
            standard, {**standard, "test_loss": 9.0, "amp": "float16"},
            {**standard, "test_loss": 8.0, "dataset": "other"}]}))
    return folder


def test_runs_in_every_state(compare, tmp_path):
    """Measured runs are compared, by the result of their own data in float32. The others are
    named, with what to do."""
    for seed in (1, 2, 3):
        make_run(tmp_path / f"baseline/{seed}", 3 + seed / 10, seed=seed)
        make_run(tmp_path / f"mine/{seed}", 2.9 + seed / 9, "mine", seed, n_layer=2)
    make_run(tmp_path / "baseline/4", 3.0, seed=4, measured=False)
    make_run(tmp_path / "mine/4", 3.0, "mine", 4)
    os.utime(tmp_path / "mine/4/best.test.json", (1, 1))  # measured before it was trained on
    make_run(tmp_path / "mine/5", 3.0, "mine", 5, ended=False)
    (tmp_path / "baseline/1/export").mkdir()  # as cloud.sh leaves it
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "baseline/1/export" / name).write_text('{"architectures": []}')
    (tmp_path / "mine/5/best.pt").unlink()
    make_run(tmp_path / "baseline/6", 3.0, seed=6, ended=False, measured=False, dropout=0.3)

    out, table_csv = tmp_path / "out.json", tmp_path / "a.csv"
    pictures = [tmp_path / "a.png", tmp_path / "b.png"]
    table = compare(tmp_path, "--plot", pictures[0], "--curves", pictures[1], "--csv", table_csv,
                    "--json", out, "--page", tmp_path / "a.html")
    assert f"eval.py --ckpt {tmp_path}/baseline/4/best.pt {tmp_path}/mine/4/best.pt\n" in table
    assert f"missing: {tmp_path}/mine/5 has not ended" in table and "export" not in table
    assert all(picture.stat().st_size > 10_000 for picture in pictures)
    with open(table_csv) as file:
        [baseline] = [row for row in csv.DictReader(file) if row["verdict"] == "baseline"]
    assert (float(baseline["loss"]), baseline["n"]) == (pytest.approx(3.2), "3")
    assert float(baseline["hours"]) == 7 / 3600

    content = read_json(out)  # the options of all runs once, at the top
    assert content["options"]["dataset"] == "stdlib" and "out_dir" not in out.read_text()
    assert content["runs"][0]["ended"]
    assert content["runs"][-1]["config"] == {"seed": 3, "n_layer": 2}
    assert table.startswith(compare(out).rstrip())
    assert compare(f"{tmp_path}/base*", tmp_path / "mine") == table
    (tmp_path / "[1] linked").mkdir()
    (tmp_path / "[1] linked/mine").symlink_to(tmp_path / "mine")
    assert "mine        3" in compare(tmp_path / "[1] linked")
    (tmp_path / "[1] linked/mine").unlink()
    named_in_full = compare(make_run(tmp_path / "new", 3.0, ended=False) / "best.pt")
    assert "missing" not in named_in_full and "3.0000" in named_in_full

    with pytest.raises(UserError, match="not measured: python eval.py --ckpt"):
        compare(tmp_path / "baseline/4")
    path = make_run(tmp_path / "elsewhere", 3.0, dataset="fineweb") / "best.test.json"
    path.write_text(path.read_text().replace('"test_sha256": "5"', '"test_sha256": "6"'))
    with pytest.raises(UserError, match="on different data"):
        compare(tmp_path / "elsewhere", tmp_path / "baseline")


def test_validation_needs_no_test_result(compare, tmp_path):
    for seed in (1, 2):
        make_run(tmp_path / f"runs/{seed}", 3 + seed, seed=seed, measured=False)
    make_run(tmp_path / "runs/3", None, seed=3, measured=False)  # it diverged
    table = compare(tmp_path / "runs", "--validation", "--json", tmp_path / "out.json")
    assert "Validation loss" in table and "baseline    2  5.0000" in table
    assert "runs/3/best.pt has no val_loss that is a number" in table
    assert compare(tmp_path / "out.json", "--validation") == table
    content = read_json(tmp_path / "out.json")
    assert content["runs"][0]["code"] and "code" not in content["options"]
    with pytest.raises(UserError, match="has no test_loss"):
        compare(tmp_path / "out.json")


def test_tables_fit_100_columns(compare):
    for name in ("published/results", "lab/results", "modern/alone", "modern/small_2x",
                 "heads_of_32/runs_32", "flags/stack", "batch_size/results"):
        printed = compare(f"studies/{name}.json")
        assert max(map(len, printed.splitlines())) <= 100, name


def test_columns_and_markdown(compare):
    table = compare("studies/lab/results.json", "--markdown", "--all", "--beside",
                    "studies/published/results.json")
    [line] = [line for line in table.splitlines() if line.startswith("| qkv_bias")]
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[2:6] == ["5", "2.114703", "0.007601", "-0.0022"] and cells[8] == "not shown"
    assert cells[9] == "-0.0047" and "published" in table  # the other study's difference
    assert "better, worse:" not in table  # studies/README.md explains the words


def test_beside_another_study(compare, tmp_path):
    """Its column may be called as another, and its baseline as ours."""
    made = [{"name": name, "test_loss": loss} for name, loss in (("modern", 3.0), ("a", 2.75))]
    other, p = [{**run, "test_loss": run["test_loss"] * 2} for run in made], tmp_path / "p.json"
    p.write_text(json.dumps(other))
    header, _, line, *_ = [line for line in compare(
        made, "--baseline=modern", "--beside", p, "--markdown").splitlines() if line[:1] == "|"]
    assert header.split()[-2] == "p" and line.split()[-2] == "-0.5000"
    with pytest.raises(UserError, match="p.json has no a with a test_loss"):
        p.write_text(json.dumps(other[:1]))
        compare(made, "--baseline=a", "--beside", p)


def test_the_baseline_that_was_asked_for(compare, tmp_path):
    made = [{"name": "a", "test_loss": 3.0, "dropout": 0.1},
            {"name": "a", "test_loss": 2.0, "dropout": 0.0},
            {"name": "b", "test_loss": 1.0, "dropout": 0.3}]
    assert "Differences are to a, dropout=0.0" in compare(made, "--baseline=a, dropout=0.0")
    assert "Differences are to b" in compare(made, "--baseline=b")
    assert "Nothing is compared" in compare(made, "--page", tmp_path / "a.html")
    assert "a, dropout=0.0" in (tmp_path / "a.html").read_text()
    for wanted in ("a", "c"):
        with pytest.raises(UserError, match=f"no run is named '{wanted}'.*there are a, dropout"):
            compare(made, f"--baseline={wanted}")


@pytest.mark.parametrize("content, message", [
    ("{", "is no file of results"), ("[3]", "is no file of"), ('{"rows": []}', "is no file of"),
    ('[{"test_loss": 3}]', "each with a name"),
    ('[{"name": "a", "test_loss": "3"}]', "figures must be numbers"),
    ('[{"name": "a", "test_loss": 3, "max_steps": "9"}]', "figures must be numbers"),
    ('[{"name": "a", "test_loss": 3, "seed": "1"}]', "seeds whole ones"),
    ('[{"name": "a", "test_loss": 3, "init_seed": 1.5}]', "seeds whole ones"),
    ('[{"name": 5, "test_loss": 3}]', "each with a name"),
    ('[{"name": "a", "test_loss": 3, "code": "abc"}]', "is no file of results"),
    ('[{"name": "a", "test_loss": 3, "config": {"dropout": [1]}}]', "figures must be numbers"),
    ('[{"name": "a", "test_loss": NaN}]', "has no test_loss that is a number"), ("[]", "no runs")])
def test_bad_results_get_one_line(compare, tmp_path, content, message):
    (tmp_path / "runs.json").write_text(content)
    with pytest.raises(UserError, match=message):
        compare(tmp_path / "runs.json")


def test_no_run_and_damaged_records(compare, tmp_path):
    with pytest.raises(UserError, match="there is no run in"):
        compare(tmp_path)
    with pytest.raises(UserError, match="there is no file"):
        compare(tmp_path / "no.json")
    make_run(tmp_path / "a", 3.0)
    (tmp_path / "a/best.test.json").write_text("{")
    (tmp_path / "a").rename(tmp_path / "a run")
    with pytest.raises(UserError, match="not measured.*'.*/a run/best.pt'"):  # for a shell
        compare(tmp_path / "a run")
    (tmp_path / "a run/summary.json").write_text("[")
    with pytest.raises(UserError, match="summary.json is missing or damaged"):
        compare(tmp_path / "a run")
    with pytest.raises(UserError, match="log.jsonl, which is missing"):
        compare("studies/lab/results.json", "--curves", tmp_path / "curves.png")


def test_study_needs_neither_torch_nor_scipy_stats():
    """They take seconds to import."""
    code = ("import sys, study; sys.argv = ['study.py', 'studies/lab/results.json']; study.main();"
            "print(sorted({'torch', 'scipy.stats', 'vl_convert'} & sys.modules.keys()))")
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert done.stdout.endswith("[]\n"), done.stderr


def test_training_needs_no_statistics():
    code = "import sys, train; print(sorted({'scipy', 'nanolab.study'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_different_code_is_said(compare):
    """Where an experiment and its baseline, or runs of one experiment, ran with different code."""
    hashes = {"baseline": ["aa"], "same": ["aa"], "other": ["dd"],
              "mixed": ["aa", "bb"]}  # another commit from a resume on

    def table(*names):
        return " ".join(compare([{"name": name, "test_loss": 3.0, "code": [
            {"commit": f"c{each}", "changed": False, "sha256": each} for each in hashes[name]]}
            for name in names]).split())
    assert "Different code" not in table("baseline", "same")
    printed = table(*hashes)
    assert "Different code" in printed and "same: c" not in printed
    assert "baseline: caa" in printed and "mixed: caa, cbb" in printed and "other: cdd" in printed


# --- the page

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")

WATCH = "<script>window.onerror = console.error = console.warn = (...words) => { " \
        "document.documentElement.dataset.errors = words.join(' ') }</script>"

# Ticks a box and takes the view of differences, as a reader would; the test reads what is then
# drawn.
USE = """<script>
const drawn = () => document.querySelectorAll("#curves .mark-line path").length;
const wait = (ready, next) => ready() ? next() : setTimeout(wait, 50, ready, next);
const found = document.documentElement.dataset, box = () => document.querySelector("[name=on2]");
wait(() => box() && drawn() == 10, () => {
  const names = [...document.querySelectorAll("#curves .role-mark text")];
  found.places = new Set(names.map(each => each.getAttribute("transform"))).size;
  box().focus();
  found.focused = document.activeElement === box();
  box().click();
  wait(() => drawn() == 7, () => {
    document.querySelectorAll("[type=radio]")[1].click();
    const title = () => document.querySelector("#curves .role-title").textContent;
    wait(() => title().startsWith("difference"), () => found.title = title());
  });
});</script>"""


@pytest.fixture
def page(tmp_path, compare):
    """The page of two ideas and a baseline, three seeds each, and a run that has not ended."""
    for seed in (1, 2, 3):
        make_run(tmp_path / f"baseline/{seed}", 3 + seed / 10, seed=seed)
        make_run(tmp_path / f"mine/{seed}", 2.5 + seed / 9, "mine", seed, n_layer=2)
        make_run(tmp_path / f"x/{seed}", 3 + seed ** 2 / 20, "</script>", seed, z_loss=1e-4)
    log = tmp_path / "mine/1/log.jsonl"
    log.write_text(log.read_text() + json.dumps(
        {"step": 60, "tokens": 6000, "sample": "a </script> b"}) + "\n")
    make_run(tmp_path / "mine/4", 3.0, "mine", 4, ended=False, measured=False, n_layer=2)
    compare(tmp_path, f"--page={tmp_path}/study.html")
    return tmp_path / "study.html"


def test_what_a_page_has(page):
    """Verdicts, links, options, what is missing, a warning; texts are escaped, nothing is loaded,
    and it is small."""
    text = page.read_text()
    body = text[text.index("<body>"):text.index("<script>")]
    assert len(text) < 2e6 and not re.search(r'(src|href)="(https?:|//)', text)
    for part in ("<td>better</td>", "<td>not shown</td>", 'href="mine/1/report.html"',
                 "n_layer=2", "mine/4 has not ended", "a &lt;/script&gt; b",
                 "&lt;/script&gt; changes the training loss itself (z_loss)", "c0ffee",
                 "<td class=number>0.1</td>"):  # minutes
        assert part in body, part
    assert text.split("Object.entries(")[-1].count("</script>") == 1  # its own


def test_a_record_has_the_curves_of_its_own_runs(page, compare):
    """Not those of runs that were made in the same folders since."""
    record = page.with_name("out.json")
    compare(page.parent, "--json", record)
    for is_there in (True, False):
        compare(record, "--page", page)
        assert ("<h2>Curves</h2>" in page.read_text()) == is_there
        for summary in page.parent.glob("*/*/summary.json"):
            summary.write_text(summary.read_text().replace("2026", "2027"))


def test_differences_are_to_the_run_of_the_same_seed(monkeypatch):
    monkeypatch.setattr(study_page, "curves_chart", lambda labels, curves, baseline: curves)
    logs = {f"{name}{seed}": [{"step": 0, "tokens": 9, "loss": seed ** 2 + (name == "mine")}]
            for name in ("baseline", "mine") for seed in (1, 2)}
    experiments = {name: [{"path": f"{name}{seed}", "config": {"seed": seed}} for seed in (1, 2)]
                   for name in ("baseline", "mine")}
    curves = study_page.study_curves(experiments, "baseline", logs)
    assert [losses[2, 0] for _, _, losses, _ in curves] == [0, 0, 1, 1]


@pytest.mark.skipif(not BROWSER, reason="there is no browser to open the page with")
def test_a_browser_draws_it(page):
    """Its charts are drawn without a warning, no wider than the window; boxes have the focus, and
    say what is drawn."""
    page.write_text(page.read_text().replace("<head>", "<head>" + WATCH, 1) + USE)
    done = subprocess.run([BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu",
                           "--window-size=400,900", "--virtual-time-budget=30000",
                           f"--user-data-dir={page.parent}/browser", "--dump-dom",
                           f"file://{page}"],
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=120)
    found = dict(re.findall(r'data-(\w+)="([^"]*)"', done.stdout[:done.stdout.index(">", 20)]))
    assert "errors" not in found
    assert (found["focused"], found["places"]) == ("true", "3")  # no name over another
    assert "difference in loss to the run of baseline" in found["title"]
    widths = [float(each) for each in re.findall(r'<svg[^>]* width="([\d.]+)"', done.stdout)]
    assert len(widths) == 2 and max(widths) <= 500  # headless windows are no narrower


def test_differences_have_the_intervals_of_the_verdicts():
    rows = [{"experiment": "a", "difference": -0.1, "low": -0.3, "high": -0.05, "gaps": [-0.1],
             "verdict": "better"},
            {"experiment": "b", "difference": 0.0, "gaps": [], "verdict": "not exercised"},
            {"experiment": "baseline", "verdict": "baseline"}]
    a, b = charts.differences_chart(rows, "baseline")["data"]["values"]
    assert (a["low"], a["high"], b["low"], b["high"]) == (-0.3, -0.05, 0, 0)
    assert "a  -0.1000 better" == a["label"] and a["edge"] != b["edge"]


def test_curves_are_thinned_to_their_means():
    columns = charts.np.arange(20_000.0).reshape(2, 10_000)
    columns[1, 5] = charts.np.nan
    thin = charts.thin(columns, 100)
    assert thin.shape == (2, 100) and thin[0, 0] == 49.5
    assert thin[1, 0] == pytest.approx((sum(range(10_000, 10_100)) - 10_005) / 99)


def test_a_page_of_what_goes_on_is_loaded_again():
    for is_running in (True, False):
        text = report.format_page("mine", "goes on", {"A": "B", "C": ""}, {}, is_running)
        assert ("location.reload()" in text) == is_running and "<h2>C</h2>" not in text
