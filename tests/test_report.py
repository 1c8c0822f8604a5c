"""What a run reports: loss.png, report.html, summary.json, Weights & Biases."""

import math
import re
import sys
import types
from unittest.mock import Mock

import nanolab.runlog
import nanolab.start
from conftest import logged, read_json, stop_at
from nanolab import charts
from nanolab.checkpoint import read_checkpoint
from nanolab.data import read_meta
from nanolab.log import having, read_entries
from nanolab.report import run_curves


def test_loss_png(tmp_path):
    """Skipped updates leave no hole."""
    entries = [{"step": i, "tokens": i + 1, "loss": 3.0 + i % 7 / 100, "lr": 1e-3,
                "grad_norm": 1.0} for i in range(3000)]
    entries[77].update(loss=None, grad_norm=None)
    entries.append({"step": 3000, "tokens": 3000, "val_loss": 3.1})
    chart = run_curves("run", entries)
    assert len(re.findall(r"(?m)^train,0,0,[^,]+,3\.", chart["data"]["values"])) == 1000
    charts.save_picture(chart, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_drawn_as_it_runs(small_run, monkeypatch):
    """At most every 30 s, less often if drawing takes long, and at the end. The clock stops."""
    now, drawn_at = [0.0], []

    def run_page(options, summary, entries, status, is_running):
        drawn_at.append((len(having("loss", entries)), is_running))
        now[0] += 0.25
        return "page"

    def on_step(step, model):
        now[0] += 1

    monkeypatch.setattr(nanolab.runlog, "run_page", run_page)
    monkeypatch.setattr(nanolab.runlog, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    run = small_run("run", "--max_steps=40", on_step=on_step)
    assert drawn_at == [(31, True), (40, False)]
    assert read_checkpoint(run / "last.pt")["timed_seconds"] == 39


def test_a_chart_that_fails_ends_no_run(small_run, monkeypatch, capsys):
    monkeypatch.setattr(nanolab.runlog, "read_entries", lambda path: [{"step": 1, "loss": 1.0}, 5])
    assert (small_run("run", "--max_steps=2") / "summary.json").exists()
    assert "could not draw" in capsys.readouterr().err


def test_report(small_run):
    """One file with charts, samples, losses and options; it loads nothing and escapes its texts."""
    run = small_run("run", "--name=<b>mine</b>", "--sample_every=5", "--sample_prompt=a<b")
    page = (run / "report.html").read_text()
    head, script = page.split("<script>", 1)
    assert not re.search("src=|href=|http:|refresh", head) and "vegaEmbed(" in script
    assert "<h1>&lt;b&gt;mine&lt;/b&gt;</h1>" in page and "<b>" not in head
    assert page.count("<pre>a&lt;b") == 2 and "<td>n_embd</td><td>32</td>" in page
    assert f"<td>{logged('val_loss', run)[0]:.4f}</td>" in page


def test_summary(small_run, monkeypatch):
    """When the run began and ended and what code it ran on, kept over a resume; what it read."""
    times = iter(f"2026-01-01T00:00:0{i}+00:00" for i in range(9))
    for module in (nanolab.start, nanolab.runlog):
        monkeypatch.setattr(module, "utc_now", lambda: next(times))
    flags = ["--max_steps=6", "--dollars_per_hour=3600"]
    run = small_run("run", *flags, on_step=stop_at(2))
    assert not (run / "summary.json").exists()
    monkeypatch.setattr(nanolab.start, "code_state", lambda: {"sha256": "another"})
    small_run("run", *flags, "--resume")
    summary = read_json(run / "summary.json")
    assert summary["started"] == "2026-01-01T00:00:00+00:00" < summary["ended"]
    assert summary["code"] == read_json(run / "config.json")["code"]
    assert summary["code"][0]["step"] == 0 and summary["code"][1:] == [
        {"sha256": "another", "step": 3}]
    assert (summary["steps"], summary["tokens"]) == (6, 6 * 8 * 32)
    assert abs(summary["cost"] - summary["seconds"]) < 0.01
    assert summary["final_val_loss"] == summary["best_val_loss"] == logged("val_loss", run)[-1]


def test_dry_run(small_run, tmp_path, capsys):
    """Memory, steps and time, for a new run and for one that goes on; no file is changed."""
    small_run("new", "--dry_run", "--global_batch_size=32")
    out = capsys.readouterr().out
    assert re.search(r"memory: [1-9].*\ntime: .* \(4 micro-steps .* 10 steps take about \d", out)
    assert not list(tmp_path.iterdir())
    run = small_run("run", "--max_steps=4")
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in run.iterdir()}
    small_run("run", "--resume", "--dry_run")
    assert "6 steps take about" in capsys.readouterr().out
    assert before == {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in run.iterdir()}


def test_wandb(small_run, tiny_data, monkeypatch):
    """It gets config, log and summary; a resumed run goes on in its own."""
    first, second = runs = [Mock(id="first", summary={}), Mock(id="second", summary={})]
    wandb = Mock()
    wandb.init.side_effect = runs
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    flags = [*tiny_data, "--wandb=project", "--eval_every=3", "--sample_every=5"]
    folder = small_run("run", *flags, on_step=stop_at(4))
    assert first.finish.called and not first.summary
    small_run("run", *flags, "--resume")
    start, again = (call.kwargs for call in wandb.init.call_args_list)
    assert start["project"] == "project" and start["config"]["n_embd"] == 32
    assert (again["id"], again["resume"]) == ("first", "allow")
    logged = [call.kwargs | call.args[0] for run in runs for call in run.log.call_args_list]
    assert second.finish.called and logged == read_entries(folder / "log.jsonl")
    assert second.summary == read_json(folder / "summary.json")


def test_the_ends_of_a_run(small_run, data_dir, capsys):
    """A budget in epochs becomes steps; the initial weights are validated; at the end there is a
    sample, and what the run cost."""
    flags = ["--epochs=1e-4", "--max_steps=0", "--eval_every=3", "--dollars_per_hour=3600"]
    run = small_run("run", *flags)
    config = read_json(run / "config.json")
    n_windows = (read_meta(data_dir, "stdlib")["splits"]["train"]["tokens"] - 1) // 32
    assert (config["max_steps"], config["epochs"]) == (math.ceil(1e-4 * n_windows / 8), 0)
    log = read_entries(run / "log.jsonl")
    steps = [entry["step"] for entry in having("val_loss", log)]
    assert steps == [0, 3, config["max_steps"]] and 5.3 < log[0]["val_loss"] < 6  # ln 257 = 5.55
    assert [entry["step"] for entry in having("sample", log)] == [config["max_steps"]]
    assert re.search(r"done:   .* s, [\d.]+ dollars; validation", capsys.readouterr().out)
    small_run("run", *flags, "--resume")
    assert "is finished" in capsys.readouterr().out


def test_what_a_run_reads_is_said(small_run, tiny_data, capsys):
    """In tokens and epochs."""
    small_run("run", *tiny_data, "--dry_run")
    n_tokens, epochs = re.search(r"data: .* ([\d,]+) training tokens; the run reads 1,280, (.*) "
                                 "epochs", capsys.readouterr().out).groups()
    n_windows = (int(n_tokens.replace(",", "")) - 1) // 16
    assert epochs == f"{10 * 8 / n_windows:.2f}"
