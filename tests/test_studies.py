"""The studies: their commands make the runs on record, their pages have the tables of their data,
and what a study alone computes is right."""

import functools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import scipy
import torch

import study
from config import OPTIONS, Config
from conftest import HERE, read_json
from model import GPT, GPTConfig
from nanolab import charts
from nanolab.common import UserError
from nanolab.options import load
from nanolab.study import jobs, runs
from nanolab.study import page as study_page
from studies import update
from studies.batch_size import fit
from studies.fp16_sums import emulate
from studies.heads_of_32 import by_position
from studies.ladder import scaling
from studies.noise import mixed_model

STUDIES = sorted(path.parent.name for path in (HERE / "studies").glob("*/run.sh"))

# The files on record that a study writes: out/STUDY.json is "results", out/STUDY_FILE.json FILE.
RECORDED = {
    **dict.fromkeys(("lab", "noise", "batch_size", "quickstart"), ["results"]),
    "ladder": ["results", "prediction"],
    "flags": ["2x32", "2x48", "stack", "again_2x32", "again_2x64", "again_2x96"],
    "modern": ["alone", "later", "core", "small_1x", "small_2x", "wide_tuned", "wide_trials"],
    "heads_of_32": ["rates_32", "runs_32", "runs_64", "runs_96", "runs_128", "runs_192",
                    "checks_96", "checks_128", "why_128", "heads_64", "around_32", "values_32",
                    "values_64", "values_96", "fewer"]}

# Instead of Python and torchrun: writes the command line down.
FAKE = """#!/bin/sh
IFS=$(printf '\\037'); echo "$*" >> "$COMMAND_LINES"
"""


def command_lines(script, folder, *words):
    """What a study's script runs: lists of words, without python or torchrun."""
    (folder / "bin").mkdir()
    for program in ("python", "torchrun"):
        (folder / "bin" / program).write_text(FAKE)
        (folder / "bin" / program).chmod(0o755)
    for needed in ("studies", "config", "nanolab"):  # and no folder out, whose files would match
        (folder / needed).symlink_to(HERE / needed)
    env = {**os.environ, "PATH": f"{folder}/bin:{os.environ['PATH']}", "PYTHONPATH": str(HERE),
           "COMMAND_LINES": str(folder / "commands")}
    subprocess.run(["bash", f"studies/{script}", *words], cwd=folder, env=env, check=True,
                   stdout=subprocess.DEVNULL, timeout=120)
    lines = [line.split("\x1f") for line in (folder / "commands").read_text().splitlines()]
    lines = [line[2:] if line[0] == "--standalone" else line for line in lines]
    return [["train.py", *line[3:]] if "studies.fp16_sums.emulate" in line and "--resume" in line
            else line for line in lines]


def trained(lines):
    """The command lines of train.py in these, and those of the runs that study.py would make."""
    for line in lines:
        if line[0] == "train.py":
            yield line[1:]
        elif line[0] == "study.py":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", line)
                args = study.parse_arguments()
            if args.words:
                yield from jobs.plan(args).values()


def experiment(config, name):
    """The name, the options that tell experiments apart, and the seeds, to compare and sort by."""
    given = {key: config[key] for key in OPTIONS if key in config}
    settings = runs.settings({"config": given})
    seeds = {key: settings[key] for key in runs.SEEDS}
    compared = {**runs.relevant_options({"config": given}), **seeds, "name": name}
    compared["vocab_size"] = compared["vocab_size"] or 257  # 0: that of the data, bytes
    return json.dumps(compared, sort_keys=True)


@pytest.mark.skipif(not shutil.which("bash"), reason="the studies are scripts for bash")
@pytest.mark.parametrize("name", STUDIES)
def test_a_study_makes_its_results(name, tmp_path, monkeypatch):
    """Its commands are valid; they train the runs on record, and its tables gather them all."""
    lines = command_lines(f"{name}/run.sh", tmp_path)
    monkeypatch.setattr(sys, "stderr", sys.stdout)
    for argv in trained(lines):
        config = vars(load(Config, argv))
        assert config["resume"]
        folder = tmp_path / config["out_dir"]
        folder.mkdir(parents=True, exist_ok=True)  # as a run leaves it
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "summary.json").write_text('{"best_val_loss": 2.0}')
        (folder / "best.pt").touch()
        (folder / "best.test.json").write_text(json.dumps({"results": [
            {"name": config["name"], "test_loss": 3.0, "amp": "off", "test_sha256": "5",
             "dataset": config["dataset"], "config": config}]}))
    monkeypatch.chdir(tmp_path)
    written = set()
    monkeypatch.setattr(charts, "save_picture", lambda chart, path: None)
    monkeypatch.setattr(study_page, "study_page", lambda *args: "")
    for argv in (line for line in lines if line[0] == "study.py"):
        monkeypatch.setattr(sys, "argv", argv)
        study.main()
        if json_file := study.parse_arguments().json:
            written.add(Path(json_file).stem)
    if name in ("published", "fp16_sums"):
        return  # runs made with other code; runs that have not ended
    recorded = {name if file == "results" else f"{name}_{file}": file
                for file in RECORDED.get(name, [])}
    assert written == recorded.keys()
    for key, file in recorded.items():
        made, on_record = (sorted(experiment(run["config"], run["name"])
                                  for run in runs.read_file(path))
                           for path in (f"out/{key}.json", f"studies/{name}/{file}.json"))
        assert made == on_record, key


def test_the_plan_for_a_gpu_is_valid(tmp_path):
    lines = command_lines("heads_of_32/run.sh", tmp_path, "gpu", "--max_steps=2")
    configs = [load(Config, argv) for argv in trained(lines)]
    assert [(config.n_embd, config.name, config.seed) for config in configs[:4]] == [
        (448, "published", 1), (448, "rope", 1), (448, "modern", 1), (320, "published", 1)]
    assert len(configs) == 27 and {config.max_steps for config in configs} == {2}


@pytest.mark.parametrize("page", update.pages(), ids=lambda page: page.parent.name)
def test_pages_have_the_tables_of_their_data(page):
    text = page.read_text()
    assert text == update.updated(text, draw=False), "python -m studies.update"
    if page.parent.parent.name == "studies":  # no result is typed by hand
        typed = update.TABLE.sub("", text)
        assert "| -0." not in typed and "paired, 5" not in typed


SIZES = {16: 40_000, 24: 90_000, 32: 200_000, 48: 400_000, 64: 800_000}  # width: parameters
FRACTION = 0.3  # of the other's tokens with which `better` has its loss


def true_loss(parameters, budget):
    return 0.9 + 1.1 * (parameters * budget / 40_000) ** -0.35


def ladder(widths=SIZES, groups=None):
    """Runs: `published` with 20 tokens a parameter, `better` also with fewer."""
    rng, found = np.random.default_rng(0), []
    for width in widths:
        for name, budgets in (("published", (1,)), ("better", (1, 1/2, 1/4))):
            for budget in budgets:
                for seed in (1, 2, 3):
                    tokens = round(20 * SIZES[width] * budget)
                    loss = true_loss(SIZES[width], budget / (FRACTION if name == "better" else 1))
                    loss += 0.003 * rng.standard_normal()
                    config = {"seed": seed, "n_layer": 2, "n_embd": width, "max_tokens": tokens}
                    found.append({"name": name, "test_loss": loss, "loss": loss,
                                  "trained_tokens": tokens,
                                  "parameters": SIZES[width] - 4 * (name == "better"),
                                  "config": config})
                    if groups:
                        found[-1].update(group_windows=[3] * 50,
                                         group_losses=(loss + groups[name]).tolist())
    return found


@pytest.fixture
def few_samples(monkeypatch):
    monkeypatch.setattr(scaling, "N_SAMPLES", 200)  # quick


def test_the_law_is_found_and_predicts(few_samples):
    result = scaling.analyse(ladder())
    assert result["target"] == 800_000 and result["fitted"] == [40_000, 90_000, 200_000, 400_000]
    for law, scale in zip(result["laws"], (1 / FRACTION, 1)):
        assert law["law"]["exponent"] == pytest.approx(0.35, abs=0.05)
        low, high = law["interval"]
        assert low < law["measured"] < high < low + 0.05
        assert law["predicted"] == pytest.approx(true_loss(800_000, scale), abs=0.01)
        assert law["lack_of_fit"] > 0.01
    for fraction, (low, high) in result["fractions"].values():
        assert low < fraction < high and fraction == pytest.approx(FRACTION, abs=0.015)
    assert all(row["p"] < 1e-3 for row in result["differences"].values())
    printed = scaling.format_analysis(result)
    assert f"{result['laws'][0]['predicted']:.4f}" in printed

    largest_unknown = scaling.analyse(ladder(widths=[16, 24, 32, 48]), 800_000)
    low, high = largest_unknown["laws"][0]["interval"]
    assert low < largest_unknown["laws"][0]["predicted"] < high
    assert largest_unknown["laws"][0]["measured"] is None


def test_fits_are_scipys():
    sizes, losses = np.array([40, 90, 200, 400]) * 1000, np.array([2.0, 1.75, 1.59, 1.45])
    for errors in (np.ones(4), np.array([0.01, 0.02, 0.01, 0.05])):
        law = scaling.fit_power_law(sizes, losses, errors)
        found, _ = scipy.optimize.curve_fit(lambda x, a, b, c: a + b * x ** -c, sizes / 40_000,
                                            losses, (1, 1, 0.4), errors, bounds=(0, 3))
        assert [float(law[key]) for key in ("floor", "gain", "exponent")] == pytest.approx(
            found, rel=2e-3)
    power = scaling.fit_power_law(sizes, (sizes / 40_000) ** -0.3 - 0.2)
    assert power["floor"] == 0  # a floor below 0 is none
    assert math.isnan(scaling.fit_power_law(sizes, losses[::-1])["gain"])


def test_lack_of_fit():
    """p is uniform where the losses follow a law, and small where they do not."""
    rng, sizes = np.random.default_rng(0), np.array([40, 90, 200, 400, 800]) * 1000
    losses = true_loss(sizes, 1) + 0.01 * rng.standard_normal((400, 5))
    ps = [scaling.lack_of_fit(sizes, each, np.full(5, 0.01), 1e6) for each in losses]
    assert 0.02 < np.mean(np.array(ps) < 0.05) < 0.09
    bent = true_loss(sizes, 1) + [0, 0.05, 0, 0, 0]
    assert scaling.lack_of_fit(sizes, bent, np.full(5, 0.01), 20) < 0.01


def test_crossing():
    """On the line between the two budgets around the loss; beyond them, on the nearest line."""
    for target, found in ((2.5, -1.5), (1.75, -0.5), (3.5, -2.5), (1.25, 0.5)):
        assert scaling.crossing([-2, -1, 0], [3, 2, 1.5], target) == pytest.approx(found)
    assert math.isnan(scaling.crossing([-1, 0], [2, 2], 3))
    assert math.isnan(scaling.crossing([0], [2], 2))
    assert np.isnan(scaling.interval(np.array([1.0, 2.0] * 10 + [np.nan] * 2))).all()


def test_fractions_depend_on_the_text(few_samples):
    """Where recipes differ by document, other documents would give another fraction."""
    uneven = {"published": np.zeros(50), "better": np.random.default_rng(0).normal(0, 0.2, 50)}
    widths = []
    for groups in (None, uneven):
        found = scaling.analyse(ladder(groups=groups))["fractions"].values()
        widths.append([high - low for _, (low, high) in found])
    assert min(widths[1]) > 3 * max(widths[0])


def test_a_noisy_cell_counts_with_its_own_sd(monkeypatch):
    """The noise is Student's with the recipe's common SD; a cell that departs from it is named."""
    found = ladder()
    sds, warnings = scaling.noise(scaling.collect_cells(found))
    pooled, df = sds["published", 40_000, 800_000]
    assert not warnings and df == 10 and pooled == pytest.approx(0.003, rel=0.5)
    assert len({sd for (name, *_), sd in sds.items() if name == "published"}) == 1
    for i, run in enumerate(found[:3]):
        run["loss"] += 0.1 * i
    sds, [warning] = scaling.noise(scaling.collect_cells(found))
    assert "published with 40,000 parameters" in warning
    assert sds["published", 40_000, 800_000] == (pytest.approx(0.1, rel=0.1), 2)
    assert sds["published", 90_000, 1_800_000] == (pytest.approx(0.003, rel=0.5), 8)
    with pytest.raises(UserError, match="one run of better in each cell shows no noise"):
        scaling.analyse([run for run in found if run["config"]["seed"] == 1])

    monkeypatch.setattr(scaling, "N_SAMPLES", 20_000)
    pair = [{"name": "a", "loss": loss, "config": {"seed": loss}} for loss in (1.0, 1.2)]
    cells = {("a", 100, 100): pair, ("a", 200, 200): pair[:1]}
    samples = scaling.sample_means(cells, scaling.noise(cells)[0], with_text=False)
    low, high = scaling.interval(samples["a", 200, 200])
    assert high - 1 == pytest.approx(12.706 * 0.2 / 2 ** 0.5, rel=0.1) == 1 - low


def test_recipes_that_change_are_refused():
    found = ladder()
    found.append({**found[0], "config": {**found[0]["config"], "seed": 9, "weight_decay": 0.5}})
    with pytest.raises(UserError, match="differ in their options"):
        scaling.analyse(found)


def test_few_sizes_and_validation():
    """Three sizes have no law. The record of a validation has the options instead of the sizes."""
    found = ladder(widths=[16, 24, 32])
    shape = {"n_head": 1, "vocab_size": 257, "block_size": 10, "position": "rope"}
    for run in found:
        run["config"] |= shape | {"max_tokens": run.pop("trained_tokens") - 1,  # whole steps
                                  "global_batch_size": 1}
        run["val_loss"] = run.pop("test_loss")
        del run["parameters"], run["loss"]
    result = scaling.analyse(found, None, ["published"], "val_loss")
    assert not result["laws"] and "Laws" not in scaling.format_analysis(result)
    gpt = GPT(GPTConfig(n_layer=2, n_embd=16, **shape))
    assert ("better", gpt.num_params(), 800_000) in result["losses"]
    for fraction, _ in result["fractions"].values():
        assert fraction == pytest.approx(FRACTION, abs=0.015)


def test_a_recipe_may_lack_a_size():
    found = [run for run in ladder() if (run["name"], run["config"]["n_embd"]) != ("better", 24)]
    result = scaling.analyse(found, None, ["published"])
    assert [law["name"] for law in result["laws"]] == ["published"]  # the other has three sizes


def test_batch_size_fit_is_the_published_one():
    sizes, losses = fit.points("studies/published/results.json", "batch_size")
    found = fit.fit_batch_size(sizes, losses)
    assert found["coefficients"] == pytest.approx((0.0323126, -0.2957154, 4.3687459), abs=1e-7)
    low, high = found["optimum_interval"]
    assert (round(low), round(found["optimum"]), round(high)) == (62, 97, 595)
    for end in (low, high):  # where the slope's t statistic is at its 5 % point
        at = np.array([2 * math.log(end), 1, 0])
        t = abs(at @ found["coefficients"]) / math.sqrt(at @ found["covariance"] @ at)
        assert t == pytest.approx(scipy.stats.t.ppf(0.975, 2))
    assert "Optimum 97.1" in fit.format_fit(found, sizes) and "3.623 to 3.761" in fit.format_fit(
        found, sizes)
    for losses, words in (([3.1, 3.3, 3.2, 3.0], "no lowest point"),
                          ([3.0, 3.1, 3.2, 3.4], "no lowest point"),
                          ([3.2, 3.0, 3.15, 3.1], "without an end")):
        assert words in fit.format_fit(fit.fit_batch_size([2, 4, 8, 16], losses), [2, 16])
    with pytest.raises(UserError, match="at least four runs of three"):
        fit.fit_batch_size([2, 2, 4, 4], [3, 3, 3, 3])


@pytest.mark.parametrize("script, runs, message", [
    ("batch_size.fit", [], "it needs runs, each with a test_loss"),
    ("batch_size.fit", [{"val_loss": 3}], "each with a test_loss"),
    ("ladder.scaling", [{"val_loss": 3}], "each with a test_loss"),
    ("ladder.scaling --validation", [{"test_loss": 3}], "each with a val_loss"),
    ("ladder.scaling", [{"test_loss": 3, "vocab_size": 9}], "one run of"),  # no shape
    ("noise.mixed_model", [{"val_loss": 3}], "each with a test_loss"),
    ("noise.mixed_model", [{"test_loss": 3}] * 3, "needs three seeds or more"),
    ("flags.flags choose", [{"test_loss": 3}], "each with a val_loss")])
def test_files_that_a_study_cannot_use_get_one_line(output_of, tmp_path, script, runs, message):
    file = tmp_path / "runs.json"
    file.write_text(json.dumps([{"name": "baseline", **run} for run in runs]))
    script, *words = script.split()
    n_files = 2 if "flags" in script else 1
    with pytest.raises(UserError, match=message):
        output_of(f"studies.{script}", *words, *[file] * n_files)


def test_emulated_gradients(monkeypatch):
    """Those of a small model: as coarse as 16 bits, whatever the product."""
    for owner, name in ((emulate.nn.Linear, "forward"), (emulate.nanolab.head, "cpu_head_loss"),
                        (emulate, "precision")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # what emulate changes
    monkeypatch.setattr(emulate, "GPTConfig", functools.partial(
        GPTConfig, n_layer=1, n_head=2, n_embd=64))
    rows = emulate.gradients()
    assert {"wte.weight", "mlp.fc.weight", "head.weight", "all"} < {r["gradient"] for r in rows}
    for row in rows:
        assert 0.001 < row["bfloat16"] < 0.02 and 1e-4 < row["float16"] < row["fp16_sums"] < 0.02


SEEDS = [(42, 42), (22, 22), (67, 67), (42, 23), (42, 67), (23, 23), (67, 23)]  # weights, loop
LOSSES = [3.691526, 3.673453, 3.653593, 3.681356, 3.680505, 3.673943, 3.664345]


def reml(losses, matrices):
    """The variances of greatest likelihood of contrasts that the mean cannot change, by search."""
    contrasts = scipy.linalg.null_space(np.ones((1, len(losses)))).T
    projected, y = [contrasts @ matrix @ contrasts.T for matrix in matrices], contrasts @ losses

    def minus_log_likelihood(logs):
        covariance = np.tensordot(np.exp(logs), projected, 1)
        return -scipy.stats.multivariate_normal.logpdf(y, cov=covariance)
    start = [math.log(np.var(y))] * len(matrices)
    return np.exp(scipy.optimize.minimize(minus_log_likelihood, start, method="Nelder-Mead",
                                          options={"xatol": 1e-6, "fatol": 1e-10}).x)


def test_the_mixed_model_of_the_published_baselines():
    """REML by another search, the audit's figures, and the intervals' formulas."""
    matrices = [np.eye(7), *(np.equal.outer(ids, ids) for ids in zip(*SEEDS))]
    variances = reml(LOSSES, matrices)
    model = mixed_model.mixed_model(LOSSES, SEEDS)
    assert [model[key] for key in ("rest", "weights", "loop")] == pytest.approx(variances, 3e-3)
    covariance, baseline = np.tensordot(variances, matrices, 1), dict(zip(SEEDS, LOSSES))
    for n_new, expected in ((0, 3.27), (1, 3.82)):
        mean, error, df = mixed_model.mean_loss(baseline, n_new)
        assert (mean, df) == (pytest.approx(np.mean(LOSSES)), pytest.approx(expected, abs=0.01))
        assert error ** 2 == pytest.approx(covariance.sum() / 49 + n_new * sum(variances), 5e-3)
    row = mixed_model.difference({seeds: 2 * loss for seeds, loss in baseline.items()}, baseline)
    assert row["compared"] == "paired, 7" and row["error"] == pytest.approx(
        mixed_model.mean_loss(baseline)[1])
    single = mixed_model.difference({(42, 42): 3.577761}, baseline)
    assert (single["difference"], single["df"]) == (pytest.approx(-0.0963, abs=1e-4),
                                                    pytest.approx(3.82, abs=0.01))

    # one run each of seven seeds: nothing separates weights, loop and rest: the textbook holds
    mean, error, df = mixed_model.mean_loss({(i, i): loss for i, loss in enumerate(LOSSES)}, 1)
    assert (df, error) == pytest.approx((6, math.sqrt(8 / 7) * np.std(LOSSES, ddof=1)), rel=1e-4)


@pytest.mark.parametrize("sds", [(0.0097, 0.0050, 0.0045), (0.002, 0.01, 0.002)])
def test_intervals_over_crossed_seeds_hold(sds):
    """Coverage of the published design by simulation: the mean, and one more run."""
    rng, held = np.random.default_rng(7), []
    for _ in range(150):
        weights, loop = ({seed: rng.normal(0, sd) for seed in (22, 23, 42, 67)} for sd in sds[:2])
        losses = {(a, b): weights[a] + loop[b] + rng.normal(0, sds[2]) for a, b in SEEDS}
        for n_new, truth in ((0, 0), (1, rng.normal(0, math.hypot(*sds)))):
            mean, error, df = mixed_model.mean_loss(losses, n_new)
            held.append(abs(mean - truth) < scipy.stats.t.ppf(0.975, df) * error)
    assert 0.92 < np.mean(held) < 0.99


def test_noise_by_its_source():
    """Runs count by what their seeds vary; those with equal seeds count once."""
    made = [{"name": "a", "test_loss": loss, "config": {"seed": seed, "init_seed": init}}
            for seed, init, loss in ((1, 1, 3.0), (2, 2, 3.1), (2, 2, 3.2), (2, 1, 3.3),
                                     (1, 3, 3.5), (1, 4, 3.6))]
    sources = mixed_model.sources_of_noise(made)
    assert {source.split(",")[0]: losses for source, losses in sources.items()} == {
        "both": pytest.approx([3.0, 3.15]), "data order and dropout": [3.0, 3.3],
        "initial weights": [3.0, 3.5, 3.6]}
    losses = [2.1, 2.12, 2.11, 2.13, 2.115]
    spread = np.std(losses, ddof=1)
    assert mixed_model.sd_interval(losses) == pytest.approx([
        spread * math.sqrt(4 / scipy.stats.chi2.ppf(p, 4)) for p in (0.975, 0.025)])


def test_losses_by_position_are_those_of_the_run(shared_run, tmp_path, monkeypatch, output_of):
    folder, script = shared_run(), "studies.heads_of_32.by_position"
    T = read_json(folder / "config.json")["block_size"]
    monkeypatch.setattr(by_position, "POSITIONS", {"0": slice(0, 1), "all": slice(T)})
    printed = output_of(script, f"{tmp_path}/a.json", f"{folder}/last.pt")
    [row] = json.loads((tmp_path / "a.json").read_text())
    assert row["all"] == pytest.approx(read_json(folder / "summary.json")["final_val_loss"], 1e-5)
    assert row["0"] > row["all"]  # the first token has no context
    assert f"{row['0']:.3f} | {row['all']:.3f} |" in printed
    assert output_of(script, f"{tmp_path}/a.json") == printed

    def copier(x):  # knows nothing but what stood half a window before
        logits = torch.zeros(*x.shape, 257)
        logits[:, T // 2 - 1:-1].scatter_(2, x[:, :T // 2, None], 50.0)
        return logits
    monkeypatch.setattr(by_position, "load_model", lambda checkpoint: Mock(eval=lambda: copier))
    output_of(script, f"{tmp_path}/b.json", f"{folder}/last.pt")
    [row] = json.loads((tmp_path / "b.json").read_text())
    assert row["half, read once"] == pytest.approx(math.log(257))
    assert row["again"] == pytest.approx(0, abs=1e-5)
