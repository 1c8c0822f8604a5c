"""What a study shows and what not: through eval.py, on numbers whose answer a textbook or a
simulation gives."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import scipy

import eval as evaluation
from conftest import HERE, call, evaluate
from nanolab import stats, study
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


@pytest.mark.parametrize(
    "n, n_baseline, shift",
    [
        (5, 5, 0),
        (2, 2, 0),
        (30, 30, 0),  # paired: the same seeds
        (5, 7, 100),
        (40, 3, 100),
        (5, 5, 4),  # Welch's: no seed in common, or only one
        (1, 7, 100),
        (1, 7, 0),
        (7, 1, 0),
        (2, 9, 100),
        (9, 2, 8),  # Student's: one or two runs on one side
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
    mean = np.mean(a) - np.mean(b)
    if not shift and n > 1 and n_baseline > 1:
        gaps = [ours[seed] - baseline[seed] for seed in ours]
        compared, df = f"paired, {len(gaps)}", len(gaps) - 1
        error = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / df / len(gaps))
    elif min(n, n_baseline) > 2:
        compared = "unpaired"
        parts = [np.var(values, ddof=1) / len(values) for values in (a, b)]
        df = sum(parts) ** 2 / (parts[0] ** 2 / (n - 1) + parts[1] ** 2 / (n_baseline - 1))
        error = math.sqrt(sum(parts))
    else:
        compared = "unpaired, one run" if min(n, n_baseline) == 1 else "unpaired, two runs"
        df = n + n_baseline - 2
        squares = sum(sum((value - np.mean(values)) ** 2 for value in values) for values in (a, b))
        error = math.sqrt(squares / df * (1 / n + 1 / n_baseline))
    low, high = scipy.stats.t.interval(0.95, df, mean, error)
    p = 2 * scipy.stats.t.sf(abs(mean) / error, df)

    assert (row["compared"], row["n"]) == (compared, n)
    assert row["sd"] == (None if n == 1 else pytest.approx(np.std(a, ddof=1)))
    assert row["test_loss"] == pytest.approx(np.mean(a))
    found = [row[key] for key in ("difference", "low", "high", "p", "p_corrected")]
    assert found == pytest.approx([mean, low, high, p, p], rel=1e-6, abs=1e-9)
    line = next(line for line in printed.splitlines() if line.startswith("better"))
    assert f"{mean:+.4f}  {low:+.4f} to {high:+.4f}  {compared}  " in line
    last_cells = ["not shown" if p >= 0.05 else "better" if mean < 0 else "worse"]
    common = [seed for seed in ours if seed in baseline]
    if len(common) == 1:
        assert row["same_seed"] == ours[common[0]] - baseline[common[0]]
        last_cells.append(f"{row['same_seed']:+.4f}")
    assert re.split("  +", line)[-len(last_cells):] == last_cells


def test_differences_without_a_spread(tmp_path, monkeypatch, capsys):
    """Equal losses are identical; where nothing shows the noise, there is no p and nothing is
    shown."""
    two, other = {1: 3.5, 2: 3.75}, {3: 3.5, 4: 3.5}
    losses = {"baseline": two, "same": two, "same_in_part": {2: 3.75, 7: 3.0},
              "shifted": {1: 3.0, 2: 3.25}, "constant": other}
    rows, printed = statistics(monkeypatch, capsys, results_file(tmp_path / "a.json", losses))
    rows = {row["experiment"]: row for row in rows}

    def summary(name):
        return [rows[name][key] for key in ("difference", "compared", "p", "verdict")]
    assert summary("same") == [0, "identical, 2", None, "identical"]
    assert summary("same_in_part") == [0, "identical, 1", None, "identical"]
    assert summary("shifted") == [-0.5, "paired, 2, no spread", None, "not shown"]
    assert not any("low" in rows[name] for name in ("same", "same_in_part", "shifted"))
    assert rows["constant"]["compared"] == "unpaired, two runs" and 0.2 < rows["constant"]["p"] < 1
    assert "Interval and p: of the one test, not corrected." in printed  # `constant`

    constants = {"baseline": {1: 3.0, 2: 3.0, 3: 3.0}, "higher": {4: 3.5, 5: 3.5, 6: 3.5},
                 "one": {7: 3.5}}
    rows, _ = statistics(monkeypatch, capsys, results_file(tmp_path / "b.json", constants))
    assert {row["experiment"]: (row.get("compared"), row.get("verdict")) for row in rows} == {
        "baseline": (None, None), "higher": ("unpaired, no spread", "not shown"),
        "one": ("unpaired, one run, no spread", "not shown")}

    single = {"baseline": {1: 3.0}, "other": {1: 2.0}, "equal": {1: 3.0}}
    rows, _ = statistics(monkeypatch, capsys, results_file(tmp_path / "c.json", single))
    found = {row["experiment"]: (row["difference"], row["compared"], row["verdict"]) for row in rows
             if "verdict" in row}
    assert found == {"other": (-1, "one run each", "not shown"),
                     "equal": (0, "identical, 1", "identical")}
    assert capsys.readouterr().err == ""


def test_verdicts_and_intervals_follow_one_rule(tmp_path, monkeypatch, capsys):
    """Bonferroni's: p times the number of tests; shown is what the interval at that level leaves
    out 0 for."""
    baseline = draws(6, 3.6, 0.01, 1)
    losses = {"baseline": baseline, "repeat": baseline,
              **{f"by {shift}": {seed: loss + shift + 0.01 * math.sin(9 * seed + 1e4 * shift)
                                 for seed, loss in baseline.items()}
                 for shift in (-0.03, -0.012, -0.008, 0.001, 0.009, 0.02)}}
    file = results_file(tmp_path / "a.json", losses)
    runs = json.loads(file.read_text())
    runs.append({"name": "elsewhere", "test_loss": 2.0, "seed": 1, "reference": "another program"})
    file.write_text(json.dumps(runs))
    rows, printed = statistics(monkeypatch, capsys, file)
    tested = [row for row in rows if "low" in row]
    assert len(tested) == 6 and "corrected for 6 tests (Bonferroni)" in printed
    for row in tested:
        gaps = np.subtract(row["losses"], list(baseline.values()))
        interval = scipy.stats.ttest_1samp(gaps, 0).confidence_interval(1 - 0.05 / 6)
        assert (row["low"], row["high"]) == pytest.approx(tuple(interval))
        assert row["p_corrected"] == pytest.approx(min(1,
                                                       6 * scipy.stats.ttest_1samp(gaps, 0).pvalue))
        assert (row["verdict"] != "not shown") == (row["p_corrected"]
                                                   < 0.05) == (row["low"] * row["high"] > 0)
    assert len({row["verdict"]
                for row in tested}) == 3  # the cases cover better, worse and not shown
    reference = next(row for row in rows if row["experiment"] == "elsewhere")
    assert reference[
        "compared"] == "reference" and "verdict" not in reference and "p" not in reference


def test_the_smallest_effect_that_a_table_shows(tmp_path, monkeypatch, capsys):
    """80 % power: the audit's two figures, the textbook's power, and a simulation of five pairs."""
    error = 0.012339 * math.sqrt(1 + 1 / 7)  # one run against seven
    assert stats.detectable(error, 6, 0.05) == pytest.approx(0.044, abs=0.0005)
    assert stats.detectable(error, 6, 0.05 / 25) == pytest.approx(0.085, abs=0.0005)

    effect = stats.detectable(1 / math.sqrt(5), 4, 0.01)
    gaps = np.random.default_rng(1).normal(effect, 1, (20_000, 5))
    assert np.mean(scipy.stats.ttest_1samp(gaps, 0, axis=1).pvalue < 0.01) == pytest.approx(
        0.8, abs=0.01)

    file = results_file(tmp_path / "a.json", {"baseline": draws(5, 3.6, 0.01, 1),
                                              "a": draws(5, 3.6, 0.01, 2),
                                              "b": draws(5, 3.6, 0.05, 3)})
    rows, printed = statistics(monkeypatch, capsys, file)
    smallest, largest = sorted(row["detectable"] for row in rows if "detectable" in row)
    assert f"(80 % power at 5 % / 2): paired, 5: {smallest:.4f} to {largest:.4f}.\n" in printed


def test_a_table_says_what_a_comparison_lacks(tmp_path, monkeypatch, capsys):
    """Seeds, where two pairs did not show an effect that more would; and a common budget."""
    losses = {"baseline": {1: 3.00, 2: 3.02}, "mine": {1: 2.90, 2: 2.94}}
    text = evaluate(monkeypatch, capsys, "--ckpt", results_file(tmp_path / "two.json", losses))
    [needed] = re.findall(r"^mine: 2 seeds are too few to show this difference; about (\d+) would",
                          text, re.M)
    error = 0.01  # of the mean of the differences -0.10 and -0.08
    effects = {n: stats.detectable(error * math.sqrt(2 / n), n - 1, 0.05) for n in range(3, 9)}
    assert needed == str(min(n for n, effect in effects.items() if effect <= 0.09))
    assert "Unequal budgets" not in text
    equal = results_file(
        tmp_path / "equal.json",
        {name: {1: 3.0, 2: 3.0 - i, 3: 3.1, 4: 3.2}
         for i, name in enumerate(losses)})
    assert "too few" not in evaluate(monkeypatch, capsys, "--ckpt", equal)

    runs = [{"name": "baseline", "test_loss": 3.0, "max_steps": 100},
            {"name": "mine", "test_loss": 2.9, "max_steps": 200}]
    (tmp_path / "budgets.json").write_text(json.dumps(runs))
    text = evaluate(monkeypatch, capsys, "--ckpt", tmp_path / "budgets.json")
    assert ("Unequal budgets, so a difference is not of the change alone: "
            "baseline 9,830,400 tokens; mine 19,660,800 tokens.") in text


def reml(losses, matrices, sides):
    """The variances of greatest likelihood of the contrasts that no mean can change, by brute
    force."""
    contrasts = scipy.linalg.null_space(np.eye(max(sides) + 1)[sides].T).T
    projected = [contrasts @ matrix @ contrasts.T for matrix in matrices]
    y = contrasts @ np.array(losses)

    def minus_log_likelihood(logs):
        return -scipy.stats.multivariate_normal.logpdf(y,
                                                       cov=np.tensordot(np.exp(logs), projected, 1))
    start = [math.log(np.var(y))] * len(matrices)
    fit = scipy.optimize.minimize(minus_log_likelihood, start, method="Nelder-Mead",
                                  options={"xatol": 1e-6, "fatol": 1e-10, "maxiter": 5000})
    return np.exp(fit.x)


def equal(labels):
    return np.equal.outer(labels, labels).astype(float)


def test_partly_common_seeds_use_every_run(tmp_path, monkeypatch, capsys):
    """Generalised least squares by REML variances, where only some seeds are on both sides."""
    seed_effects = np.random.default_rng(4).normal(0, 0.02, 9)
    rest = np.random.default_rng(5).normal(0, 0.004, (2, 9))
    baseline = {seed: 3.7 + seed_effects[seed] + rest[0, seed] for seed in range(6)}
    ours = {seed: 3.6 + seed_effects[seed] + 3 * rest[1, seed] for seed in range(2, 9)}
    file = results_file(tmp_path / "a.json", {"baseline": baseline, "ours": ours})
    row = next(row for row in statistics(monkeypatch, capsys, file)[0]
               if row["experiment"] == "ours")

    seeds, losses = np.array([*ours, *baseline]), np.array([*ours.values(), *baseline.values()])
    sides = [0] * len(ours) + [1] * len(baseline)
    wider = 0.0 + (np.std(list(baseline.values()), ddof=1) > np.std(list(ours.values()), ddof=1))
    matrices = [np.eye(len(seeds)), equal(seeds), np.diag(np.equal(sides, wider))]
    covariance = np.tensordot(reml(losses, matrices, sides), matrices, 1)
    means = np.eye(2)[sides]
    of_means = np.linalg.inv(means.T @ np.linalg.solve(covariance, means))
    found = of_means @ means.T @ np.linalg.solve(covariance, losses)
    assert row["compared"] == "partly paired, 4"
    assert row["difference"] == pytest.approx(found[0] - found[1], rel=1e-4)
    assert row["error"] == pytest.approx(math.sqrt([1, -1] @ of_means @ [1, -1]), rel=1e-3)
    assert abs(row["difference"] + 0.1) < 0.01 and 2.9 < row["df"] < 9
    swapped = stats.difference(by_tuple(baseline), by_tuple(ours))
    assert (swapped["difference"], swapped["error"]) == pytest.approx(
        (-row["difference"], row["error"]), rel=1e-4)

    # More baselines than runs of ours: as good as the pairs alone. Without anything in common to
    # the runs of one seed: about the difference of the means.
    few = {seed: ours[seed] for seed in (2, 3, 4)}
    row = stats.difference(by_tuple(few), by_tuple(baseline))
    pairs = scipy.stats.ttest_rel(*([side[seed] for seed in few] for side in (few, baseline)))
    interval = pairs.confidence_interval()
    assert row["error"] <= 1.1 * (interval.high - interval.low) / 2 / scipy.stats.t.ppf(0.975, 2)
    shuffled = {seed: loss for seed, loss in zip(ours, np.roll(list(ours.values()), 3))}
    row = stats.difference(by_tuple(shuffled), by_tuple(baseline))
    means = np.mean(list(ours.values())) - np.mean(list(baseline.values()))
    assert row["difference"] == pytest.approx(means, abs=0.5 * row["error"])

    # Two seeds in common, the same gap in both: the other six runs still give a spread.
    row = stats.difference(by_tuple({1: 3.60, 2: 3.64, 3: 3.58, 4: 3.62, 5: 3.61}),
                           by_tuple({1: 3.70, 2: 3.74, 6: 3.66, 7: 3.65, 8: 3.71}))
    assert row["p"] is None or 0 < row["p"] < 0.05


def by_tuple(losses):
    return {(seed, seed, seed): loss for seed, loss in losses.items()}


@pytest.mark.parametrize("shared, scale", [(0, 1), (0.5, 4), (0.95, 1)])
def test_intervals_over_partly_common_seeds_hold(shared, scale):
    """Coverage by simulation: three seeds in common, whatever share of the noise belongs to the
    seed."""
    rng, held = np.random.default_rng(int(100 * shared)), []
    for _ in range(250):
        seed_effects = rng.normal(0, math.sqrt(shared), 8)
        sides = [{(seed,): sd * (seed_effects[seed] + rng.normal(0, math.sqrt(1 - shared)))
                  for seed in seeds} for seeds, sd in ((range(3), scale), (range(8), 1))]
        row = stats.difference(*sides)
        held.append(abs(row["difference"]) < scipy.stats.t.ppf(0.975, row["df"]) * row["error"])
    assert 0.9 < np.mean(held) < 0.99


PUBLISHED_SEEDS = [(42, 42), (22, 22), (67, 67), (42, 23), (42, 67), (23, 23),
                   (67, 23)]  # weights, loop
PUBLISHED_LOSSES = [3.691526, 3.673453, 3.653593, 3.681356, 3.680505, 3.673943, 3.664345]


def test_crossed_seeds_by_a_mixed_model(monkeypatch, capsys, tmp_path):
    """The seven published baselines: REML by brute force, the audit's figures, and the intervals'
    formulas."""
    monkeypatch.chdir(HERE)
    printed = evaluate(monkeypatch, capsys, "--ckpt", "config/published.json", "--noise", "--json",
                       tmp_path / "n.json")
    noise = json.loads((tmp_path / "n.json").read_text())["noise"]
    weights, loop = (equal(labels) for labels in zip(*PUBLISHED_SEEDS))
    variances = reml(PUBLISHED_LOSSES, [np.eye(7), weights, loop], [0] * 7)
    found = [noise["sd_by_effect"][effect] for effect in ("rest", "weights", "loop")]
    assert found == pytest.approx(np.sqrt(variances), rel=1e-3)
    assert "(REML): initial weights 0.0097, loop 0.0050, rest 0.0045." in printed

    covariance = np.tensordot(variances, [np.eye(7), weights, loop], 1)
    errors = {"mean_interval": math.sqrt(covariance.sum() / 49),
              "one_more_run": math.sqrt(covariance.sum() / 49 + sum(variances))}
    for name, error in errors.items():
        low, high = noise[name]
        assert (low + high) / 2 == pytest.approx(3.674103, abs=1e-6)
        df = {"mean_interval": 3.27, "one_more_run": 3.82}[name]
        assert (high - low) / 2 == pytest.approx(scipy.stats.t.ppf(0.975, df) * error, rel=2e-3)
    assert errors["mean_interval"]**2 / np.var(PUBLISHED_LOSSES,
                                               ddof=1) > 1 / 7  # not seven independent runs

    # A second experiment with the same crossed seeds: its gaps are crossed in the same way.
    baseline = dict(zip(PUBLISHED_SEEDS, PUBLISHED_LOSSES))
    row = stats.difference({seeds: 2 * loss for seeds, loss in baseline.items()}, baseline)
    assert row["compared"] == "paired, 7" and row["error"] == pytest.approx(errors["mean_interval"],
                                                                            rel=1e-3)

    # One run each of seven seeds: nothing separates weights, loop and rest, and the textbook holds.
    independent = {(seed,) * 3: loss for seed, loss in enumerate(PUBLISHED_LOSSES)}
    low, high = stats.prediction_interval(independent)
    assert (high - low) / 2 == pytest.approx(
        scipy.stats.t.ppf(0.975, 6) * math.sqrt(8 / 7) * 0.0123393, rel=1e-4)


@pytest.mark.parametrize("sds", [(0.0097, 0.0050, 0.0045), (0.01, 0.002, 0.002),
                                 (0.002, 0.01, 0.002), (0.001, 0.001, 0.01)])
def test_intervals_over_crossed_seeds_hold(sds):
    """Coverage of our own design by simulation, for noise that comes mostly from one source or from
    all."""
    rng, held = np.random.default_rng(7), []
    for _ in range(250):
        weights, loop = ({label: rng.normal(0, sd) for label in (22, 23, 42, 67)} for sd in sds[:2])
        losses = {
            seeds: weights[seeds[0]] + loop[seeds[1]] + rng.normal(0, sds[2])
            for seeds in PUBLISHED_SEEDS
        }
        new = rng.normal(0, math.sqrt(sum(sd ** 2 for sd in sds)))
        held.append([low < value < high for value, (low, high) in
                     ((0, stats.mean_interval(losses)), (new, stats.prediction_interval(losses)))])
    assert 0.92 < np.mean(held, axis=0).min()


def test_noise_is_measured_by_its_source(tmp_path, monkeypatch, capsys):
    """Runs are sorted by what their seeds vary; intervals follow from the textbook."""
    rng = np.random.default_rng(1)
    both, loop, weights = (rng.normal(3.7, sd, n) for sd, n in ((0.01, 5), (0.02, 7), (0.005, 8)))
    loop[0] = weights[0] = both[0]  # one run that all three have: the seeds (1, 1, 1)
    runs = [{"seed": i + 1, "test_loss": loss} for i, loss in enumerate(both)]
    runs += [{"seed": i + 1, "init_seed": 1, "test_loss": loss} for i, loss in enumerate(loop) if i]
    runs += [{"seed": 1, "init_seed": i + 1,
              "test_loss": loss} for i, loss in enumerate(weights) if i]
    runs[1]["test_loss"] -= 0.001  # with the same seeds once more: only their mean counts
    runs.append({"seed": 2, "test_loss": both[1] + 0.001})
    runs.append({"seed": 77, "dropout_seed": 78, "test_loss": 3.6})  # of no source
    file = tmp_path / "runs.json"
    file.write_text(json.dumps([{"name": "mine", **run} for run in runs]))
    noise, printed = statistics(monkeypatch, capsys, file, "--noise", "--plot",
                                tmp_path / "noise.png")

    groups = {"both, by one seed": both,
              "the loop (data order, dropout), initial weights fixed": loop,
              "initial weights, the loop fixed": weights,
              "all runs": np.concatenate((both, loop[1:], weights[1:], [3.6]))}
    assert [row["source"] for row in noise["sources"]] == list(groups)
    for row, losses in zip(noise["sources"], groups.values()):
        n, sd = len(losses), np.std(losses, ddof=1)
        assert sorted(row["losses"]) == pytest.approx(sorted(losses), rel=1e-12)
        assert (row["n"], row["mean"], row["sd"], row["population_sd"], row["lowest"],
                row["highest"]) == pytest.approx(
            (n, np.mean(losses), sd, np.std(losses), min(losses), max(losses)))
        if row["source"] == "all runs":  # they are not independent
            assert "sd_interval" not in row
            continue
        assert row["sd_interval"] == pytest.approx(
            [sd * math.sqrt((n - 1) / scipy.stats.chi2.ppf(p, n - 1)) for p in (0.975, 0.025)])
        assert f"{sd:.6f}  {row['sd_interval'][0]:.4f} to {row['sd_interval'][1]:.4f}" in printed
    low, high = noise["one_more_run"]
    assert f"of one more run: {low:.4f} to {high:.4f}." in printed
    assert (tmp_path / "noise.png").stat().st_size > 10_000


def test_noise_wants_one_experiment(tmp_path, monkeypatch, capsys):
    """Two experiments, neither called baseline: there is no spread to measure until --baseline
    names one."""
    file = results_file(tmp_path / "runs.json",
                        {"one": draws(3, 3.6, 0.01, 1), "other": draws(3, 3.5, 0.01, 2)})
    with pytest.raises(UserError, match="at least two runs of the baseline"):
        evaluate(monkeypatch, capsys, "--ckpt", file, "--noise")
    noise, _ = statistics(monkeypatch, capsys, file, "--noise", "--baseline=other")
    assert noise["sources"][0]["mean"] == pytest.approx(
        np.mean(list(draws(3, 3.5, 0.01, 2).values())))


def test_noise_of_the_published_baselines(monkeypatch, capsys):
    """Population standard deviations of the seven published losses, by hand from the post's data;
    mean of all seven."""
    rows = {line.split("  ")[0]: line for line in
            evaluate(monkeypatch, capsys, "--ckpt", HERE / "config/published.json",
                     "--noise").splitlines()}
    for source, sd in (("both, by one seed", "0.015492"),
                       ("the loop (data order, dropout), initial weights fixed", "0.005007"),
                       ("initial weights, the loop fixed", "0.006964"), ("all runs", "3.674103")):
        assert sd in rows[source]


def test_published_results_are_complete(monkeypatch, capsys, tmp_path):
    """The figures of the posts that an audit missed; the headline; equal configurations on other
    hardware."""
    content = json.loads((HERE / "config/published.json").read_text())
    runs = {}
    for run in content["runs"]:
        runs.setdefault(run["name"], []).append(run)
    loss = {name: members[0]["test_loss"] for name, members in runs.items()}
    assert loss["batch_size"] - loss["baseline"] == pytest.approx(0.252474)  # batch 6 to 96
    assert loss["baseline"] - loss["cloud"] == pytest.approx(0.113765)
    assert (loss["jax_twice_the_tokens"], loss["jax_two_epochs"]) == (3.324953, 3.326482)
    assert [speed["tokens_per_second"]
            for speed in content["speeds"]] == [12599, 15402, 19921, 19997]
    assert [runs[name][0]["cost"] for name in ("baseline", "cloud_builtin_gelu", "no_amp")] == [
        "35 to 42", "43.96 to 45.03", "over 135"]
    diverged = content["without_test_loss"][0]
    assert diverged["config"] == {"learning_rate": 1.4e-3} and "diverged" in diverged["result"]
    assert [entry["correct"]
            for entry in content["corrections"]] == [3.814, 3.73, 0.005007, 0.006964]
    references = {
        name
        for name, members in runs.items() if all("reference" in run for run in members)
    }
    assert references == {
        "gpt2", "gpt2-medium", "jax", "jax_no_dropout", "jax_two_epochs", "jax_twice_the_tokens"
    }
    assert all((run["config"]["amp"], run["config"]["tf32"]) == ("off", False)
               for name in references for run in runs[name] if name.startswith("jax"))

    rows, printed = statistics(monkeypatch, capsys,
                               file_in(tmp_path, HERE / "config/published.json"))
    rows = {row["experiment"]: row for row in rows}
    assert all(rows[name]["compared"] == "reference" and "verdict" not in rows[name]
               for name in references)
    assert "corrected for 21 tests" in printed and f"{'over 135':>14}" in printed
    assert rows["cloud"]["same_seed"] == pytest.approx(
        -0.113765) and rows["cloud"]["difference"] == pytest.approx(-0.096342)

    five = [run["test_loss"] for name in ("cloud", "local_3090",
                                          "cloud_builtin_gelu") for run in runs[name]]
    assert (
        "cloud, local_3090, cloud_builtin_gelu. 5 different runs, 3.538161 to 3.599611, SD 0.0280.\n"
    ) in printed
    f = np.var(five, ddof=1) / np.var(PUBLISHED_LOSSES, ddof=1)
    assert scipy.stats.f.sf(f, 4, 6) == pytest.approx(0.038, abs=0.001)


def file_in(folder, file):
    return shutil.copy(file, folder / file.name)


def points_file(path, points):
    """A results file with points = {global batch size: test loss}."""
    path.write_text(json.dumps([{"name": "mine", "global_batch_size": size, "test_loss": loss}
                                for size, loss in points.items()]))
    return path


def test_batch_size_fit_is_the_published_one(tmp_path, monkeypatch, capsys):
    points = {6: 3.944, 104: 3.674, 216: 3.725, 224: 3.73, 512: 3.771}
    file = points_file(tmp_path / "points.json", points)
    fit, printed = statistics(monkeypatch, capsys, file, "--fit_batch_size", "--plot",
                              tmp_path / "fit.png")
    assert "a 0.0323126, b -0.2957154, c 4.3687459" in printed
    assert "optimum 97.1" in printed and "loss there 3.692" in printed
    assert (tmp_path / "fit.png").stat().st_size > 10_000

    # The interval of the curve at the optimum, by scipy's t and the textbook formula.
    x, losses = np.log(list(points)), np.array(list(points.values()))
    residuals = losses - np.polyval([fit["a"], fit["b"], fit["c"]], x)
    at = np.vander([math.log(fit["optimum"])], 3)[0]
    covariance = residuals @ residuals / 2 * np.linalg.inv(np.vander(x, 3).T @ np.vander(x, 3))
    error = math.sqrt(at @ covariance @ at)
    assert fit["covariance"] == [pytest.approx(row) for row in covariance]
    assert fit["predicted_interval"] == pytest.approx(scipy.stats.t.interval(0.95, 2,
                                                                             fit["predicted"],
                                                                             error))

    # Fieller's interval of the optimum ends where the slope's t statistic is at its 5 % point.
    low, high = fit["optimum_interval"]
    for end in (low, high):
        at = np.array([2 * math.log(end), 1, 0])  # the slope's coefficients of a, b, c
        slope = at @ [fit["a"], fit["b"], fit["c"]]
        assert abs(slope) / math.sqrt(at @ covariance @ at) == pytest.approx(
            scipy.stats.t.ppf(0.975, 2))
    assert fit["optimum"] == pytest.approx(math.exp(
        -fit["b"] / 2 / fit["a"])) and low < fit["optimum"] < high
    assert (round(low), round(high)) == (62, 595)  # as the audit computed
    assert f"optimum 97.1 (95 % interval, Fieller's: {low:.1f} to {high:.1f})\n" in printed


def test_fiellers_interval_holds():
    """Coverage by simulation: a curve with its lowest point at 64. With much noise there are often
    no ends."""
    sizes, rng = np.array([6, 104, 216, 224, 512]), np.random.default_rng(3)

    def intervals(sd, n=1000):
        curve = 0.03 * np.log(sizes / 64) ** 2 + 3.7
        fits = [stats.fit_batch_size(sizes, curve + rng.normal(0, sd, 5)) for _ in range(n)]
        return [fit["optimum_interval"] for fit in fits if fit["optimum_interval"]]
    clear = intervals(0.01)
    assert len(clear) > 990 and 0.93 < np.mean([low < 64 < high for low, high in clear]) < 0.97
    assert len(intervals(0.1)) < 500


@pytest.mark.parametrize("points, sentence", [
    ({2: 3.1, 4: 3.0, 8: 3.2}, "(no interval: three runs fit three coefficients exactly)\n"),
    ({2: 3.1, 4: 3.3, 8: 3.2, 16: 3.0}, "the curve has no lowest point: a is not positive\n"),
    ({2: 3.0240, 4: 3.0961, 8: 3.2162, 16: 3.3844},
     "; beyond the sizes measured, so do not trust it\n"),
    ({2: 3.2, 4: 3.0, 8: 3.15, 16: 3.1}, "(95 % interval, Fieller's: without an end)\n"),
])
def test_batch_size_fit_says_what_it_cannot(tmp_path, monkeypatch, capsys, points, sentence):
    file = points_file(tmp_path / "points.json", points)
    fit, printed = statistics(monkeypatch, capsys, file, "--fit_batch_size", "--plot",
                              tmp_path / "fit.png")
    assert sentence in printed and (fit["optimum_interval"] is None) == ("beyond" not in sentence)
    assert (tmp_path / "fit.png").stat().st_size > 10_000


def test_what_counts_as_one_experiment():
    """Seeds and what cannot change the result do not tell runs apart; a repeat of the same seeds
    counts once."""
    runs = [{"name": "a", "test_loss": 3.0, "seed": 1},
            {"name": "a", "test_loss": 3.2, "seed": 1, "device": "cuda"},
            {"name": "a", "test_loss": 3.3, "seed": 2, "batch_size": 1, "compile": True},
            {"name": "a", "test_loss": 2.0, "seed": 1, "dropout": 0.0}]
    experiments = study.group_by_experiment(runs)
    assert experiments.keys() == {"a, dropout=0.1", "a, dropout=0.0"}
    assert list(study.by_seed(experiments["a, dropout=0.1"]).values()) == pytest.approx([3.1, 3.3])


def test_a_study(small_run, data_dir, tmp_path, monkeypatch, capsys):
    """Runs in, table out: measured once, runs without an end listed, the same table from the
    results file."""
    def head_spread(model, dataset, groups, *rest):
        return [3 + model.head.weight.std().item()] * len(groups)

    monkeypatch.setattr(evaluation, "mean_losses", head_spread)  # quick, and differs by run
    for seed in (1, 2, 3):
        for name, flag in (("baseline", "--grad_clip=0"), ("qkv_bias", "--qkv_bias")):
            small_run(f"{name}/{seed}", flag, f"--name={name}", f"--seed={seed}", "--max_steps=2")
    (tmp_path / "qkv_bias/3/summary.json").unlink()
    (tmp_path / "baseline/4").mkdir()
    (tmp_path / "baseline/4/config.json").write_text("{}")  # failed before its first checkpoint
    (tmp_path / "other.pt").write_bytes((tmp_path / "baseline/1/best.pt").read_bytes())

    command = ["--ckpt", tmp_path / "*/*/best.pt", "--baseline", "baseline"]
    table = evaluate(monkeypatch, capsys, *command, "--json", tmp_path / "study.json", "--plot",
                     tmp_path / "table.png", "--curves", tmp_path / "curves.png")
    rows = {line.split()[0]: line.split() for line in table.splitlines() if line}
    assert rows["baseline"][1] == "3" and rows["qkv_bias"][1] == "2" and "paired, 2" in table
    assert f"missing: {tmp_path}/qkv_bias/3" in table and f"missing: {tmp_path}/baseline/4" in table
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("table.png", "curves.png"))

    def measures(*rest):
        raise AssertionError("measured again")
    monkeypatch.setattr(evaluation, "mean_losses", measures)
    assert evaluate(monkeypatch, capsys, *command) == table
    assert evaluate(monkeypatch, capsys, "--ckpt", tmp_path / "baseline",
                    tmp_path / "qkv_bias") == table
    assert evaluate(monkeypatch, capsys, "--ckpt",
                    tmp_path / "[bq]*") == table  # the folders that match, with runs in them
    assert table.startswith(evaluate(monkeypatch, capsys, "--ckpt",
                                     tmp_path / "study.json").rstrip())
    with pytest.raises(AssertionError, match="again"):  # other weights under the same name
        shutil.copy(tmp_path / "baseline/2/best.pt", tmp_path / "baseline/1/best.pt")
        evaluate(monkeypatch, capsys, *command)


def test_the_loss_does_not_depend_on_the_split(small_run, tmp_path, monkeypatch, capsys):
    """One process or two, any batch size: the same test loss; and from then on it is read from
    NAME.test.json."""
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
    assert unfinished["test_loss"] == 1.25 and "machine" not in unfinished and unfinished[
        "tokens_per_second"] > 0


def test_the_baseline_that_was_asked_for(tmp_path, monkeypatch, capsys):
    """Also by the beginning of its label, beside one called baseline."""
    runs = [{"name": "a", "test_loss": 3.0, "dropout": 0.1, "schedule": "cosine"},
            {"name": "a", "test_loss": 2.0, "dropout": 0.0}, {"name": "baseline", "test_loss": 1.0}]
    file = tmp_path / "runs.json"
    file.write_text(json.dumps(runs))
    printed = evaluate(monkeypatch, capsys, "--ckpt", file, "--baseline=a, dropout=0.0")
    assert "Difference: to a, dropout=0.0" in printed


def test_names_of_one_configuration_with_equal_losses(tmp_path, monkeypatch, capsys):
    runs = [{"name": name, "test_loss": 3.0, "config": {"seed": 1}} for name in ("baseline", "b")]
    file = tmp_path / "runs.json"
    file.write_text(json.dumps(runs))
    assert "baseline, b. All runs have one loss, 3.000000." in evaluate(
        monkeypatch, capsys, "--ckpt", file)


def test_seeds_may_be_words(tmp_path, monkeypatch, capsys):
    file = tmp_path / "runs.json"
    results_file(file, {"baseline": {1: 3.0, 2: 3.1, "not fixed": 3.2}})
    table = evaluate(monkeypatch, capsys, "--ckpt", file, "--noise")
    assert "both, by one seed" in table and "baseline" not in evaluate(
        monkeypatch, capsys, "--ckpt", file).splitlines()[-1]


def test_validation_losses_are_compared_without_the_test_split(small_run, tmp_path, monkeypatch,
                                                                capsys):
    """--validation: the validation losses that runs had, from checkpoints and from results files.
    Nothing is measured."""
    folders = [small_run(f"{name}/1", f"--name={name}", "--eval_every=5", *flags)
               for name, flags in (("baseline", []), ("slow", ["--learning_rate=1e-5"]))]
    losses = [json.loads((folder / "summary.json").read_text())["best_val_loss"]
              for folder in folders]
    table = evaluate(monkeypatch, capsys, "--ckpt", *folders, "--validation")
    assert "validation loss" in table and not list(tmp_path.rglob("*.test.json"))
    for name, loss in zip(("baseline", "slow"), losses):
        assert re.search(rf"^{name} +1 +{loss:.6f} ", table, re.MULTILINE)

    results = tmp_path / "results.json"
    command = ["--ckpt", results, "--validation"]
    evaluate(monkeypatch, capsys, "--ckpt", *folders, "--validation", "--json", results)
    assert evaluate(monkeypatch, capsys, *command) == table
    assert "test_loss" not in results.read_text()
    with pytest.raises(UserError, match="a name and a test_loss"):
        evaluate(monkeypatch, capsys, "--ckpt", results)
    evaluate(monkeypatch, capsys, "--ckpt", *folders, "--json", results)
    assert evaluate(monkeypatch, capsys, *command) == table
    with pytest.raises(UserError, match="a name and a val_loss"):
        results_file(results, {"old": {1: 2.0}})
        evaluate(monkeypatch, capsys, *command)
