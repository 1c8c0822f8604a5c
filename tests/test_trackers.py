"""Weights & Biases."""

import html
import json
import pathlib
import sys
import types

import train
from conftest import run_main
from test_resume import stop_at


def test_wandb(small_run, monkeypatch, capsys):
    """Config, every number and sample of the log, the plot, the summary and the test loss; a
    resumed run goes on in the run that it began."""
    runs = []

    class Run:
        def __init__(self, **options):
            self.options, self.id, self.logged, self.summary, self.finished = options, options[
                "id"] or f"id{len(runs)}", [], {}, False
            runs.append(self)

        def log(self, values, step=None):
            self.logged.append((step, values))

        def finish(self):
            self.finished = True

    monkeypatch.setitem(
        sys.modules, "wandb",
        types.SimpleNamespace(
            init=Run, Image=pathlib.Path,
            Html=lambda text: html.unescape(text.removeprefix("<pre>").removesuffix("</pre>"))))
    monkeypatch.setattr(train, "learning_rate_at", stop_at(4))
    flags = ["--wandb=project", "--eval_every=3", "--sample_every=5"]
    folder = small_run("run", *flags)
    monkeypatch.setattr(train, "learning_rate_at", stop_at(99))
    small_run("run", *flags, "--resume")
    first, second = runs
    assert first.options["project"] == "project" and first.options["config"][
        "n_embd"] == 32 and first.finished and not first.summary
    assert (second.options["id"], second.options["resume"]) == ("id0", "allow")
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    logged = [{"step": step, **values} for step, values in first.logged + second.logged
              if "plot" not in values]
    assert logged == entries and {"loss", "lr", "grad_norm", "tokens_per_second"
                                  } <= logged[0].keys()
    assert [step for step, values in first.logged + second.logged if "sample" in values] == [5, 10]
    assert second.logged[-1][1]["plot"] == folder / "loss.png" and second.finished
    assert second.summary == json.loads((folder / "summary.json").read_text())
    small_run("other", "--wandb=project", "--max_steps=1")
    assert runs[2].options["id"] is None
    for _ in range(2):  # the second time it is known, and not told again
        run_main(monkeypatch, "eval", "--ckpt", folder / "best.pt", "--device=cpu", "--json",
                 folder / "result.json")
    loss = json.loads((folder / "result.json").read_text())["runs"][0]["test_loss"]
    assert len(runs) == 4 and (runs[3].options["id"], runs[3].summary,
                               runs[3].finished) == ("id0", {"best_test_loss": loss}, True)
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed
    run_main(monkeypatch, "eval", "--ckpt", folder / "last.pt", "--device=cpu")
    assert "test loss could not be added to Weights & Biases" in capsys.readouterr().err
