"""eval.py --scaling on losses of a known law, and losses by groups of documents."""

import json

import numpy as np
import pytest

from conftest import evaluate
from nanolab import scaling, stats
from nanolab.common import UserError
from nanolab.data import TokenDataset
from nanolab.token_files import read_meta

SIZES = {16: 40_000, 24: 90_000, 32: 200_000, 48: 400_000, 64: 800_000}  # width: parameters
SHARE = 0.3  # of the baseline's tokens with which `better` has its loss


@pytest.fixture(autouse=True)
def few_samples(monkeypatch):
    monkeypatch.setattr(scaling, "N_SAMPLES", 200)  # quick


def true_loss(parameters, share):
    return 0.9 + 1.1 * (parameters * share / 40_000) ** -0.35


def ladder(path, noise=0.003, widths=SIZES):
    """A results file: `baseline` with 20 tokens a parameter, `better` also with fewer."""
    rng = np.random.default_rng(0)
    runs = []
    for width in widths:
        for name, shares in (("baseline", (1,)), ("better", (1, 1/2, 1/4))):
            for share in shares:
                for seed in (1, 2, 3):
                    tokens = round(20 * SIZES[width] * share)
                    loss = true_loss(SIZES[width], share / (SHARE if name == "better" else 1))
                    runs.append({"name": name, "test_loss": loss + noise * rng.standard_normal(),
                                 "parameters": SIZES[width] - 4 * (name == "better"),
                                 "trained_tokens": tokens,
                                 "config": {"seed": seed, "n_embd": width, "max_tokens": tokens}})
    path.write_text(json.dumps(runs))
    return path


def test_the_law_is_found_and_predicts(tmp_path, monkeypatch, capsys):
    file = ladder(tmp_path / "ladder.json")
    printed = evaluate(monkeypatch, capsys, "--ckpt", file, "--scaling", "--json",
                       tmp_path / "fit.json", "--plot", tmp_path / "fit.png")
    fit = json.loads((tmp_path / "fit.json").read_text())["scaling"]
    assert fit["target"] == 800_000 and fit["fitted"] == [40_000, 90_000, 200_000, 400_000]
    for recipe, scale in zip(fit["recipes"], (1, 1 / SHARE)):
        assert recipe["law"]["exponent"] == pytest.approx(0.35, abs=0.05)
        low, high = recipe["predicted_interval"]
        assert low < recipe["measured"] < high < low + 0.05
        assert recipe["predicted"] == pytest.approx(true_loss(800_000, scale), abs=0.01)
        assert f"{recipe['predicted']:.4f}" in printed
    for row in fit["shares"]:
        low, high = row["interval"]
        assert low < row["share"] < high and row["share"] == pytest.approx(SHARE, abs=0.015)
    low, high = fit["trends"]["better"]["interval"]
    assert low < 0 < high
    assert (tmp_path / "fit.png").stat().st_size > 10_000


def test_crossing():
    """On the line between the two budgets around the loss; beyond them, on the nearest line."""
    for target, found in ((2.5, -1.5), (1.75, -0.5), (3.5, -2.5), (1.25, 0.5)):
        assert scaling.crossing([-2, -1, 0], [3, 2, 1.5], target) == pytest.approx(found)
    assert np.isnan(scaling.crossing([-1, 0], [2, 2], 3))


def test_shares_depend_on_the_text(tmp_path, monkeypatch, capsys):
    """Where the recipes differ by document, other documents would give another share."""
    file = ladder(tmp_path / "ladder.json")
    runs = json.loads(file.read_text())
    uneven = {"baseline": np.zeros(50), "better": np.random.default_rng(0).normal(0, 0.2, 50)}
    grouped = [{**run, "group_windows": [3] * 50,
                "group_losses": (run["test_loss"] + uneven[run["name"]]).tolist()} for run in runs]
    widths = []
    for each in (runs, grouped):
        file.write_text(json.dumps(each))
        evaluate(monkeypatch, capsys, "--ckpt", file, "--scaling", "--json", tmp_path / "fit.json")
        fit = json.loads((tmp_path / "fit.json").read_text())["scaling"]
        widths.append([high - low for low, high in (row["interval"] for row in fit["shares"])])
    assert min(widths[1]) > 3 * max(widths[0])


def test_a_prediction_needs_no_run_of_its_size(tmp_path, monkeypatch, capsys):
    file = ladder(tmp_path / "ladder.json", widths=[16, 24, 32, 48])
    evaluate(monkeypatch, capsys, "--ckpt", file, "--scaling=800_000", "--json",
             tmp_path / "fit.json")
    for recipe in json.loads((tmp_path / "fit.json").read_text())["scaling"]["recipes"]:
        assert "measured" not in recipe and len(recipe["losses"]) == 4
        low, high = recipe["predicted_interval"]
        assert low < recipe["predicted"] < high


def test_the_noise_is_students(tmp_path, monkeypatch, capsys):
    """With two seeds at one size only, the interval of the noise is Student's with one degree of
    freedom, 6.5 times as wide as the normal one."""
    monkeypatch.setattr(scaling, "N_SAMPLES", 20_000)
    runs = [{"name": "a", "test_loss": loss, "config": {"seed": seed}}
            for seed, loss in enumerate([1.0, 1.2])]
    cells = {("a", 100, 100): runs, ("a", 200, 200): runs[:1]}
    low, high = scaling.interval(scaling.sample_means(cells, other_text=False)["a", 200, 200])
    expected = 12.706 * 0.2 / 2 ** 0.5
    assert high - 1.0 == pytest.approx(expected, rel=0.1) == 1.0 - low
    assert scaling.interval([1.0, 2.0] * 10 + [np.nan] * 2) is None

    monkeypatch.setattr(scaling, "N_SAMPLES", 100)
    file = ladder(tmp_path / "ladder.json")
    runs = json.loads(file.read_text())
    twice = [{**run, "test_loss": run["test_loss"] - 2 * (i == 1)} for i, run in enumerate(runs)
             if i < 2 or run["config"]["seed"] == 1 or run["name"] == "better"]
    file.write_text(json.dumps(twice))  # draws so wild that no law fits them
    printed = evaluate(monkeypatch, capsys, "--ckpt", file, "--scaling", "--plot",
                       tmp_path / "fit.png")
    assert "without an end" in printed


def test_too_small_a_ladder_is_refused(tmp_path, monkeypatch, capsys):
    file = ladder(tmp_path / "ladder.json", widths=[16, 24, 32, 48])
    with pytest.raises(UserError, match="at least 4 sizes"):
        evaluate(monkeypatch, capsys, "--ckpt", file, "--scaling")
    with pytest.raises(UserError, match="there are baseline, better"):
        evaluate(monkeypatch, capsys, "--ckpt", file, "--scaling", "--baseline=none")


def test_results_that_cannot_be_used(tmp_path, monkeypatch, capsys):
    """One line, no traceback: figures of a wrong type, and losses that do not fall with tokens."""
    file = ladder(tmp_path / "ladder.json")
    runs = json.loads(file.read_text())
    for key, value in (("parameters", "many"), ("group_losses", [3.0]), ("trained_tokens", [1])):
        file.write_text(json.dumps([{**runs[0], key: value}, *runs[1:]]))
        with pytest.raises(UserError, match="no file of results"):
            evaluate(monkeypatch, capsys, "--ckpt", file, "--scaling")
    file.write_text(json.dumps([{**runs[0], "parameters": None}, *runs[1:]]))
    with pytest.raises(UserError, match="baseline lacks them"):
        evaluate(monkeypatch, capsys, "--ckpt", file, "--scaling")
    for seed_2, told in ((1, "nothing shows the noise of baseline"), (2, "differ in their options")):
        one_seed = [{**run, "config": {**run["config"], "seed": 1}} for run in runs]
        other_rate = {**runs[1]["config"], "seed": seed_2, "learning_rate": 1e-3 * seed_2}
        file.write_text(json.dumps([*one_seed[3:], {**runs[1], "config": other_rate},
                                    {**runs[0], "config": {**other_rate, "learning_rate": 1e-3}}]))
        with pytest.raises(UserError, match=told):
            evaluate(monkeypatch, capsys, "--ckpt", file, "--scaling")
    file.write_text(json.dumps([{**run, "test_loss": 0} for run in runs]))
    with pytest.raises(UserError, match="no power law fits"):
        evaluate(monkeypatch, capsys, "--ckpt", file, "--scaling")
    file.write_text(json.dumps([{**run, "test_loss": 2.0} for run in runs]))
    assert "share" not in evaluate(monkeypatch, capsys, "--ckpt", file, "--scaling")


def test_groups_of_documents(data_dir):
    """Every window is in one group; each group but the first starts with a document's beginning."""
    eot_id = read_meta(data_dir, "stdlib")["eot_id"]
    data = TokenDataset(data_dir, "stdlib", "test", 8)
    groups = data.groups_of_documents(eot_id, n_groups=5)
    assert [i for group in groups for i in group] == list(range(len(data)))
    assert 1 < len(groups) <= 5
    tokens = np.fromfile(data.path, data.dtype)
    for group in groups[1:]:
        assert eot_id in tokens[(group[0] - 1) * 8:group[0] * 8]


def test_error_of_the_text():
    """The bootstrap's standard error is that of a mean of independent groups."""
    rng = np.random.default_rng(0)
    values = rng.normal(0, 0.5, 300)
    assert stats.bootstrap_error(values, np.full(300, 7)) == pytest.approx(0.5 / 300 ** 0.5, rel=0.1)


def test_other_text(tmp_path, monkeypatch, capsys):
    """Where a change helps some documents and harms others, the interval for other text is wider
    than that of the seeds; where it helps all alike, it is not."""
    rng = np.random.default_rng(0)
    text, sizes = rng.normal(0, 0.3, 100), [5] * 100
    for spread, wider in ((0.2, True), (0, False)):
        uneven = text + spread * rng.standard_normal(100)
        runs = [{"name": name, "seed": seed, "test_loss": loss + 0.002 * rng.standard_normal(),
                 "group_windows": sizes, "group_losses": (loss + groups).tolist()}
                for name, loss, groups in (("baseline", 3.0, text), ("change", 2.9, uneven))
                for seed in (1, 2, 3)]
        file = tmp_path / "runs.json"
        file.write_text(json.dumps(runs))
        table = evaluate(monkeypatch, capsys, "--ckpt", file, "--json", tmp_path / "out.json")
        [row] = [each for each in json.loads((tmp_path / "out.json").read_text())["rows"]
                 if each["experiment"] == "change"]
        low, high = row["other_text"]
        assert (high - low > 2 * (row["high"] - row["low"])) is wider
        assert low <= row["low"] + 1e-9 and "other text" in table
