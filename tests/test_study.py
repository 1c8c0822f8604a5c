"""A study says what is an effect and what is noise: through eval.py, on numbers whose answer a textbook gives."""

import json
import math
import shutil

import numpy as np
import pytest
import scipy

import eval as evaluation
from conftest import HERE, call, evaluate
from nanolab import study
from nanolab.common import UserError


def results_file(path, losses, **options):
    """A results file with losses = {name: {seed: test loss}}."""
    path.write_text(json.dumps([{"name": name, "seed": seed, "test_loss": loss, **options}
                                for name, runs in losses.items() for seed, loss in runs.items()]))
    return path


def draws(n, mean, sd, seed):
    """n normal test losses, by seeds 0 ... n - 1."""
    return dict(enumerate(np.random.default_rng(seed).normal(mean, sd, n).tolist()))


def statistics(monkeypatch, capsys, file, *argv):
    """What --json has beside the runs. -> its value, what eval.py printed."""
    json_path = file.with_name("statistics.json")
    printed = evaluate(monkeypatch, capsys, "--ckpt", file, "--json", json_path, *argv)
    content = json.loads(json_path.read_text())
    return next(content[key] for key in ("rows", "noise", "fit") if key in content), printed


@pytest.mark.parametrize("n, n_baseline, shift", [
    (5, 5, 0), (5, 8, 0), (2, 2, 0), (30, 30, 0),  # paired: all seeds of ours are also the baseline's
    (5, 5, 3), (6, 4, 1),  # paired over the two or three that both have
    (5, 7, 100), (2, 9, 100), (40, 3, 100), (5, 5, 4),  # Welch's: no seed in common, or only one
    (1, 7, 100), (1, 7, 0), (7, 1, 0),  # Student's: one run on one side
])
def test_intervals_are_the_textbooks(tmp_path, monkeypatch, capsys, n, n_baseline, shift):
    """Interval and p-value of a row, from the formulas of the t-test that its seeds ask for."""
    ours = {seed + shift: loss for seed, loss in draws(n, 3.65, 0.02, n).items()}
    baseline = draws(n_baseline, 3.67, 0.01, 99)
    in_another_order = dict(sorted(baseline.items(), key=lambda item: -(item[0] ** 2 % 7)))
    file = results_file(tmp_path / "results.json", {"baseline": in_another_order, "better": ours})
    rows, printed = statistics(monkeypatch, capsys, file)
    row = next(row for row in rows if row["experiment"] == "better")

    a, b = list(ours.values()), list(baseline.values())
    common = [seed for seed in ours if seed in baseline]
    if len(common) > 1:
        gaps = [ours[seed] - baseline[seed] for seed in common]
        compared, mean, df = f"paired, {len(gaps)}", sum(gaps) / len(gaps), len(gaps) - 1
        error = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / df / len(gaps))
    elif min(n, n_baseline) > 1:
        compared, mean = "unpaired", np.mean(a) - np.mean(b)
        parts = [np.var(values, ddof=1) / len(values) for values in (a, b)]
        df = sum(parts) ** 2 / (parts[0] ** 2 / (n - 1) + parts[1] ** 2 / (n_baseline - 1))
        error = math.sqrt(sum(parts))
    else:
        compared, mean = "unpaired, one run", np.mean(a) - np.mean(b)
        several = a if n > 1 else b
        df = len(several) - 1
        error = np.std(several, ddof=1) * math.sqrt(1 + 1 / len(several))
    low, high = scipy.stats.t.interval(0.95, df, mean, error)
    p = 2 * scipy.stats.t.sf(abs(mean) / error, df)

    assert (row["compared"], row["n"]) == (compared, n)
    assert row["sd"] == (None if n == 1 else pytest.approx(np.std(a, ddof=1)))
    assert row["test_loss"] == pytest.approx(np.mean(a))
    found = [row[key] for key in ("difference", "low", "high", "p", "p_holm")]
    assert found == pytest.approx([mean, low, high, p, p], rel=1e-6, abs=1e-9)
    line = next(line for line in printed.splitlines() if line.startswith("better"))
    assert f"{mean:+.4f}  {low:+.4f} to {high:+.4f}  {compared}  " in line
    assert line.endswith("  within noise" if p >= 0.05 else "  better" if mean < 0 else "  worse")


def test_differences_without_a_spread(tmp_path, monkeypatch, capsys):
    """Runs that repeat the baseline's losses differ by 0 for certain; single runs cannot be compared."""
    two, other = {1: 3.5, 2: 3.75}, {3: 3.5, 4: 3.5}
    losses = {"baseline": two, "same": two, "shifted": {1: 3.0, 2: 3.25}, "constant": other}
    rows, _ = statistics(monkeypatch, capsys, results_file(tmp_path / "a.json", losses))
    rows = {row["experiment"]: row for row in rows}
    same, shifted = ([rows[name][key] for key in ("difference", "low", "high", "p", "verdict")]
                     for name in ("same", "shifted"))
    assert same == [0, 0, 0, 1, "within noise"] and shifted == [-0.5, -0.5, -0.5, 0, "better"]
    assert rows["constant"]["compared"] == "unpaired" and 0.3 < rows["constant"]["p"] < 1

    constants = {"baseline": {1: 3.0, 2: 3.0}, "higher": other, "as_high": {5: 3.0, 6: 3.0}}
    rows, _ = statistics(monkeypatch, capsys, results_file(tmp_path / "b.json", constants))
    assert [(row["experiment"], row.get("p")) for row in rows] == [("higher", 0), ("baseline", None), ("as_high", 1)]

    single = {"baseline": {1: 3.0}, "other": {1: 2.0}}
    rows, printed = statistics(monkeypatch, capsys, results_file(tmp_path / "c.json", single))
    row = rows[1]
    assert (row["difference"], row["p"], row["compared"]) == (-1, None, "one run each")
    assert "low" not in row and row["verdict"] == "cannot be told" and "cannot be told" in printed
    assert capsys.readouterr().err == ""


def test_holms_correction():
    rows = [{"difference": d, "p": p} for d, p in ((-1, 0.01), (-1, 0.04), (1, 0.03), (1, 0.001))]
    study.add_verdicts(rows)
    assert [row["p_holm"] for row in rows] == pytest.approx([0.03, 0.06, 0.06, 0.004])
    assert [row["verdict"] for row in rows] == ["better", "within noise", "within noise", "worse"]


def test_noise_is_measured_by_its_source(tmp_path, monkeypatch, capsys):
    """Runs are sorted by what their seeds vary; intervals and tests follow from the textbook."""
    rng = np.random.default_rng(1)
    both, loop, weights = (rng.normal(3.7, sd, n) for sd, n in ((0.01, 5), (0.02, 7), (0.005, 8)))
    loop[0] = weights[0] = both[0]  # one run that all three have: the seeds (1, 1, 1)
    runs = [{"seed": i + 1, "test_loss": loss} for i, loss in enumerate(both)]
    runs += [{"seed": i + 1, "init_seed": 1, "test_loss": loss} for i, loss in enumerate(loop) if i]
    runs += [{"seed": 1, "init_seed": i + 1, "test_loss": loss} for i, loss in enumerate(weights) if i]
    runs[1]["test_loss"] -= 0.001  # with the same seeds once more: only their mean counts
    runs.append({"seed": 2, "test_loss": both[1] + 0.001})
    runs.append({"seed": 77, "dropout_seed": 78, "test_loss": 3.6})  # of no source
    file = tmp_path / "runs.json"
    file.write_text(json.dumps([{"name": "mine", **run} for run in runs]))
    noise, printed = statistics(monkeypatch, capsys, file, "--noise", "--plot", tmp_path / "noise.png")

    groups = {"both, by one seed": both, "the loop (data order, dropout), initial weights fixed": loop,
              "initial weights, the loop fixed": weights,
              "all runs": np.concatenate((both, loop[1:], weights[1:], [3.6]))}
    assert [row["source"] for row in noise["sources"]] == list(groups)
    for row, losses in zip(noise["sources"], groups.values()):
        n, sd = len(losses), np.std(losses, ddof=1)
        assert sorted(row["losses"]) == pytest.approx(sorted(losses), rel=1e-12)
        assert (row["n"], row["mean"], row["sd"], row["population_sd"], row["lowest"], row["highest"]) == pytest.approx(
            (n, np.mean(losses), sd, np.std(losses), min(losses), max(losses)))
        assert row["sd_interval"] == pytest.approx([sd * math.sqrt((n - 1) / scipy.stats.chi2.ppf(p, n - 1))
                                                    for p in (0.975, 0.025)])
        assert f"{sd:.6f}  {row['sd_interval'][0]:.4f} to {row['sd_interval'][1]:.4f}" in printed

    # Brown and Forsythe's test is a one-way ANOVA of the distances from the medians.
    anova = scipy.stats.f_oneway(*(np.abs(losses - np.median(losses)) for losses in (both, loop, weights)))
    levene = noise["levene"]
    assert (levene["f"], levene["p"]) == pytest.approx(tuple(anova)) and levene["df"] == [2, 17]
    f = np.var(weights, ddof=1) / np.var(loop, ddof=1)
    test = noise["f_test"]
    assert test["df"] == [7, 6] and test["f"] == pytest.approx(f)
    assert test["p"] == pytest.approx(2 * min(scipy.stats.f.cdf(f, 7, 6), 1 - scipy.stats.f.cdf(f, 7, 6)))
    answer = "Yes" if anova.pvalue < 0.05 else "Not that these runs could show"
    assert f"spread? {answer}: F(2, 17) = {anova.statistic:.3f}, p = {anova.pvalue:.3f}." in printed
    assert f"F(7, 6) = {f:.3f}, two-sided p = {test['p']:.3f}." in printed
    assert (tmp_path / "noise.png").stat().st_size > 10_000


def test_noise_wants_one_experiment(tmp_path, monkeypatch, capsys):
    """Two experiments, neither called baseline: there is no spread to measure until --baseline names one."""
    file = results_file(tmp_path / "runs.json", {"one": draws(3, 3.6, 0.01, 1), "other": draws(3, 3.5, 0.01, 2)})
    with pytest.raises(UserError, match="at least two runs of the baseline"):
        evaluate(monkeypatch, capsys, "--ckpt", file, "--noise")
    noise, _ = statistics(monkeypatch, capsys, file, "--noise", "--baseline=other")
    assert noise["sources"][0]["mean"] == pytest.approx(np.mean(list(draws(3, 3.5, 0.01, 2).values())))


def test_noise_of_the_published_baselines(monkeypatch, capsys):
    """Population standard deviations of the seven published losses, by hand from the post's data; mean of all seven."""
    rows = {line.split("  ")[0]: line for line in
            evaluate(monkeypatch, capsys, "--ckpt", HERE / "config/published.json", "--noise").splitlines()}
    for source, sd in (("both, by one seed", "0.015492"), ("the loop (data order, dropout), initial weights fixed", "0.005007"),
                       ("initial weights, the loop fixed", "0.006964"), ("all runs", "3.674103")):
        assert sd in rows[source]


def points_file(path, points):
    """A results file with points = {global batch size: test loss}."""
    path.write_text(json.dumps([{"name": "mine", "global_batch_size": size, "test_loss": loss}
                                for size, loss in points.items()]))
    return path


def test_batch_size_fit_is_the_published_one(tmp_path, monkeypatch, capsys):
    points = {6: 3.944, 104: 3.674, 216: 3.725, 224: 3.73, 512: 3.771}
    file = points_file(tmp_path / "points.json", points)
    fit, printed = statistics(monkeypatch, capsys, file, "--fit_batch_size", "--plot", tmp_path / "fit.png")
    assert "a 0.0323126, b -0.2957154, c 4.3687459" in printed and "optimum 97.1" in printed and "loss there 3.692" in printed
    assert (tmp_path / "fit.png").stat().st_size > 10_000

    # The interval of the curve at the optimum, by scipy's t and the textbook formula.
    x, losses = np.log(list(points)), np.array(list(points.values()))
    residuals = losses - np.polyval([fit["a"], fit["b"], fit["c"]], x)
    at = np.vander([math.log(fit["optimum"])], 3)[0]
    covariance = residuals @ residuals / 2 * np.linalg.inv(np.vander(x, 3).T @ np.vander(x, 3))
    error = math.sqrt(at @ covariance @ at)
    assert fit["covariance"] == [pytest.approx(row) for row in covariance]
    assert fit["predicted_interval"] == pytest.approx(scipy.stats.t.interval(0.95, 2, fit["predicted"], error))

    # The optimum and its interval, of a fit with the optimum as a coefficient.
    (_, optimum, loss), covariance = scipy.optimize.curve_fit(lambda x, a, optimum, loss: a * (x - optimum) ** 2 + loss,
                                                              x, losses, (0.03, 4.5, 3.7))
    interval = np.exp(scipy.stats.t.interval(0.95, 2, optimum, math.sqrt(covariance[1, 1])))
    assert [fit["optimum"], *fit["optimum_interval"], fit["predicted"]] == pytest.approx([math.exp(optimum), *interval, loss], rel=1e-4)
    assert f"optimum {math.exp(optimum):.1f} (95 % interval {interval[0]:.1f} to {interval[1]:.1f})\n" in printed


@pytest.mark.parametrize("points, sentence", [
    ({2: 3.1, 4: 3.0, 8: 3.2}, "(no interval: three runs fit three coefficients exactly)\n"),
    ({2: 3.1, 4: 3.3, 8: 3.2, 16: 3.0}, "the curve has no lowest point: a is not positive\n"),
    ({2: 3.1, 4: 3.3, 8: 3.52, 16: 3.75}, "; beyond the sizes measured, so do not trust it\n"),
])
def test_batch_size_fit_says_what_it_cannot(tmp_path, monkeypatch, capsys, points, sentence):
    file = points_file(tmp_path / "points.json", points)
    fit, printed = statistics(monkeypatch, capsys, file, "--fit_batch_size", "--plot", tmp_path / "fit.png")
    assert sentence in printed and (fit["optimum_interval"] is None) == ("beyond" not in sentence)
    assert (tmp_path / "fit.png").stat().st_size > 10_000


def test_what_counts_as_one_experiment():
    """Seeds and what cannot change the result do not tell runs apart; a repeat of the same seeds counts once."""
    runs = [{"name": "a", "test_loss": 3.0, "seed": 1}, {"name": "a", "test_loss": 3.2, "seed": 1, "device": "cuda"},
            {"name": "a", "test_loss": 3.3, "seed": 2, "batch_size": 1, "compile": True},
            {"name": "a", "test_loss": 2.0, "seed": 1, "dropout": 0.0}]
    experiments = study.group_by_experiment(runs)
    assert experiments.keys() == {"a, dropout=0.1", "a, dropout=0.0"}
    assert list(study.by_seed(experiments["a, dropout=0.1"]).values()) == pytest.approx([3.1, 3.3])


def test_a_study(small_run, data_dir, tmp_path, monkeypatch, capsys):
    """Runs in, table out: measured once, runs without an end listed, the same table from the results file."""
    def head_spread(model, *rest):
        return 3 + model.head.weight.std().item()

    monkeypatch.setattr(evaluation, "mean_loss", head_spread)  # quick, and differs by run
    for seed in (1, 2, 3):
        for name, flag in (("baseline", "--grad_clip=0"), ("qkv_bias", "--qkv_bias")):
            small_run(f"{name}/{seed}", flag, f"--name={name}", f"--seed={seed}", "--max_steps=2")
    (tmp_path / "qkv_bias/3/summary.json").unlink()
    (tmp_path / "baseline/4").mkdir()
    (tmp_path / "baseline/4/config.json").write_text("{}")  # failed before its first checkpoint
    (tmp_path / "other.pt").write_bytes((tmp_path / "baseline/1/best.pt").read_bytes())

    command = ["--ckpt", tmp_path / "*/*/best.pt", "--baseline", "baseline"]
    table = evaluate(monkeypatch, capsys, *command, "--json", tmp_path / "study.json", "--plot", tmp_path / "table.png",
                     "--curves", tmp_path / "curves.png")
    rows = {line.split()[0]: line.split() for line in table.splitlines() if line}
    assert rows["baseline"][1] == "3" and rows["qkv_bias"][1] == "2" and "paired, 2" in table
    assert f"missing: {tmp_path}/qkv_bias/3" in table and f"missing: {tmp_path}/baseline/4" in table
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("table.png", "curves.png"))

    def measures(*rest):
        raise AssertionError("measured again")
    monkeypatch.setattr(evaluation, "mean_loss", measures)
    assert evaluate(monkeypatch, capsys, *command) == table
    assert evaluate(monkeypatch, capsys, "--ckpt", tmp_path / "baseline", tmp_path / "qkv_bias") == table
    assert evaluate(monkeypatch, capsys, "--ckpt", tmp_path / "[bq]*") == table  # the folders that match, with runs in them
    assert table.startswith(evaluate(monkeypatch, capsys, "--ckpt", tmp_path / "study.json").rstrip())
    with pytest.raises(AssertionError, match="again"):  # other weights under the same name
        shutil.copy(tmp_path / "baseline/2/best.pt", tmp_path / "baseline/1/best.pt")
        evaluate(monkeypatch, capsys, *command)


def test_the_loss_does_not_depend_on_the_split(small_run, tmp_path, monkeypatch, capsys):
    """One process or two, any batch size: the same test loss; and from then on it is read from NAME.test.json."""
    folder, file = small_run("out"), tmp_path / "result.json"
    flags = ["--ckpt", folder / "best.pt", "--device=cpu", "--json", file]

    def facts(printed):
        result = json.loads(file.read_text())["runs"][0]
        assert f"test loss      {result['test_loss']:.6f} nats per token\n" in printed
        return result

    one = facts(evaluate(monkeypatch, capsys, *flags, "--batch_size=50"))
    assert one["perplexity"] == pytest.approx(math.exp(one["test_loss"]))
    assert one["bits_per_byte"] == pytest.approx(one["test_loss"] / math.log(2), rel=1e-2)
    assert one["tokens"] == one["windows"] * 32 and one["trained_tokens"] == 10 * 8 * 32
    saved = folder / "best.test.json"
    assert json.loads(saved.read_text())["results"][0]["test_loss"] == one["test_loss"]

    saved.write_text("damaged")  # so it is measured again
    done = call("eval.py", *flags, "--batch_size=16", processes=2)
    assert done.returncode == 0, done.stderr
    assert facts(done.stdout)["test_loss"] == pytest.approx(one["test_loss"], abs=1e-6)

    content = json.loads(saved.read_text())
    content["results"][0]["test_loss"] = 1.25
    saved.write_text(json.dumps(content))
    assert facts(evaluate(monkeypatch, capsys, *flags))["test_loss"] == 1.25
    (folder / "summary.json").unlink()  # a checkpoint named in full is taken as it is
    unfinished = facts(evaluate(monkeypatch, capsys, *flags))
    assert unfinished["test_loss"] == 1.25 and "machine" not in unfinished and unfinished["tokens_per_second"] > 0
