"""loss.png and report.html: what they show, and when they are written."""

import re
import types

import nanolab.runlog
import train
from conftest import losses
from nanolab import plots
from nanolab.checkpoint import read_checkpoint
from nanolab.logfile import having, read_entries


def test_chart(monkeypatch):
    """The band has the extremes of every bin; the best validation and each skipped update are
    marked."""
    figures = []
    monkeypatch.setattr(plots, "save_figure",
                        lambda figure, *args, **options: figures.append(figure))
    train_log = [{"step": i, "tokens": i + 1, "loss": 3.0 + i % 7 / 100, "lr": 1e-3,
                  "grad_norm": 1.0, "skipped": False}
                 for i in range(10_000)]
    train_log[4321]["loss"], train_log[4322]["loss"] = 3.5, 2.5
    train_log[77].update(loss=None, grad_norm=None, skipped=True)
    val = [{"step": s, "tokens": s, "val_loss": loss} for s, loss in ((2000, 3.2), (4000, 3.1),
                                                                      (6000, None), (8000, 3.15))]
    plots.plot_run(train_log, val, types.SimpleNamespace(name="run", grad_clip=0.0))
    top = figures[0].axes[0]
    labels = [text.get_text() for text in top.get_legend().get_texts()]
    assert labels[0] == "training, smallest to largest of 13 steps" and labels[
        1] == "training, mean of the 200 steps around"
    assert labels[-2:] == ["best.pt: 3.1000 after 4,000 steps", "skipped updates: 1"]
    ends = top.collections[0].get_paths()[0].vertices[:, 1]
    assert (ends.min(), ends.max()) == (2.5, 3.5)
    mean, _, best, skipped = top.lines
    assert abs(mean.get_ydata() - 3.03).max() < 0.02, "a skipped update leaves no hole"
    assert (best.get_xdata(), best.get_ydata()) == (4000 / 1e6, 3.1)
    assert list(skipped.get_xdata()) == [78 / 1e6]


def test_drawn_as_it_runs(small_run, monkeypatch):
    """At most every 10 s, less often if drawing takes long, and at the end. The clock stands still
    meanwhile."""
    now, drawn_at, pages = [0.0], [], []

    def plot_run(train_log, val, config):
        drawn_at.append(len(train_log))
        now[0] += 0.25
        return b"png"

    def learning_rate_at(*args):
        now[0] += 1
        return 1e-3

    real = nanolab.runlog.format_report
    monkeypatch.setattr(nanolab.runlog, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(nanolab.runlog, "plot_run", plot_run)
    monkeypatch.setattr(nanolab.runlog, "format_report",
                        lambda *args: pages.append(real(*args)) or pages[-1])
    monkeypatch.setattr(train, "learning_rate_at", learning_rate_at)
    run = small_run("run", "--max_steps=40")
    assert drawn_at == [11, 37, 40]
    assert ["refresh" in page for page in pages
            ] == [True, True, False] and "run of nanolab: step 11 of 40" in pages[0]
    assert read_checkpoint(run / "last.pt")["timed_seconds"] == 39
    assert (run / "loss.png").read_bytes() == b"png"


def test_a_damaged_log_is_not_drawn(small_run, monkeypatch, capsys):
    """The run goes on, and says why there is no chart."""
    monkeypatch.setattr(nanolab.runlog, "plot_run", plots.plot_run)
    monkeypatch.setattr(nanolab.runlog, "read_entries", lambda path: [{"loss": 1.0}])
    run = small_run("run", "--max_steps=2")
    assert "could not draw" in capsys.readouterr().err and not (run / "loss.png").exists()
    assert read_checkpoint(run / "last.pt")["step"] == 2


def test_report(small_run, capsys):
    """One file with chart, samples, losses, speed, machine and options; it loads nothing and
    escapes what it quotes."""
    run = small_run("run", "--name=<b>mine</b>", "--sample_every=5", "--sample_prompt=a<b",
                    "--eval_every=4")
    page, entries = (run / "report.html").read_text(), read_entries(run / "log.jsonl")
    assert "http" not in page and re.findall('(?:src|href)="([^,"]*)',
                                             page) == ["data:image/png;base64"]
    assert "<h1>&lt;b&gt;mine&lt;/b&gt;</h1>" in page and "<b>" not in page and "a<b" not in page
    assert page.count("<pre>a&lt;b") == 2
    for entry in having("val_loss", entries):
        assert f"<tr><th>{entry['step']}</th><td>{entry['val_loss']:.4f}" in page
    assert "<tr><th>n_embd</th><td>32</td></tr>" in page and "10 of 8 x 32 tokens; 0 skipped" in page
    megabytes = re.search(r"peak memory</th><td>([\d,]+) MB", page).group(1)
    assert f"peak memory {megabytes} MB" in capsys.readouterr().out
    assert len(losses(run)) == 10
