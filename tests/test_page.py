"""The page of a study and of a run, in a real browser if there is one."""

import json
import re
import shutil
import subprocess

import pytest
from test_study import make_run

from nanolab import charts, report

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
def page(tmp_path, output_of):
    """The page of two ideas and a baseline, three seeds each, and a run that has not ended."""
    for seed in (1, 2, 3):
        make_run(tmp_path / f"baseline/{seed}", 3 + seed / 10, seed=seed)
        make_run(tmp_path / f"mine/{seed}", 2.5 + seed / 9, "mine", seed, n_layer=2)
        make_run(tmp_path / f"x/{seed}", 3 + seed ** 2 / 20, "</script>", seed, z_loss=1e-4)
    log = tmp_path / "mine/1/log.jsonl"
    log.write_text(log.read_text() + json.dumps(
        {"step": 60, "tokens": 6000, "sample": "a </script> b"}) + "\n")
    make_run(tmp_path / "mine/4", 3.0, "mine", 4, ended=False, measured=False, n_layer=2)
    output_of("study", tmp_path, f"--page={tmp_path}/study.html")
    return tmp_path / "study.html"


def test_what_a_page_has(page):
    """Verdicts, links, options, what is missing, a warning; texts are escaped, nothing is loaded,
    and it is small."""
    text = page.read_text()
    body = text[text.index("<body>"):text.index("<script>")]
    assert len(text) < 2e6 and not re.search(r'(src|href)="(https?:|//)', text)
    for part in ("<td>better</td>", "<td>not shown</td>", 'href="mine/1/report.html"',
                 "n_layer=2", "mine/4 has not ended", "a &lt;/script&gt; b",
                 "&lt;/script&gt; changes the training loss itself (z_loss)", "c0ffee"):
        assert part in body, part
    assert text.split("Object.entries(")[-1].count("</script>") == 1  # its own


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
