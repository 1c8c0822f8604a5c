"""The page of a run or a study: one HTML file that needs no network, with charts and tables.

Vega-Lite draws the charts. Its JavaScript is part of the package vl-convert-python.
"""

import functools
import html
import json
import math
import os
import re
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from nanolab.common import UserError, code_name
from nanolab.plots import having, millions_of_tokens, series

# Okabe and Ito's colours ("Color universal design", 2008), that the colour-blind can tell apart,
# a little lighter or darker where white or black behind them asks for it. The first is the text's.
# A seventh idea has the first one's colour again.
COLORS = ["currentColor", *["#3a8fc7", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#8c6bb1"] * 20]
GREY = "#808080"  # as far from white as from black
N_POINTS = 20_000  # of all curves of a page together, about 25 bytes each
SMOOTHING = {"none": 0, "2 %": 2, "10 %": 12}  # points on either side, of about 250

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"  # a name: nothing is loaded
TICKS = {"expr": "width / 90"}

STYLE = f"""
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 1rem auto; padding: 0 1rem }}
p {{ margin: .5rem 0 }}
h1 {{ font-size: 1.5rem; margin: 0; overflow-wrap: anywhere }}
h2 {{ font-size: 1.15rem; margin: 2rem 0 .5rem }}
table {{ border-collapse: collapse; font-size: .9rem }}
th, td {{ text-align: left; padding: .1rem 1.2rem .1rem 0; vertical-align: top }}
td {{ white-space: nowrap }}
td.number {{ text-align: right; font-variant-numeric: tabular-nums }}
.wide {{ overflow-x: auto }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; border-left: 3px solid {GREY};
      padding-left: .7rem }}
.chart {{ width: 100% }}
.vega-bindings {{ display: flex; flex-wrap: wrap; gap: .4rem 1.4rem; font-size: .9rem }}
.vega-bind-name::after {{ content: " " }}
.vega-bind label {{ cursor: pointer }}
.vega-bind-radio label {{ margin-right: .8rem }}
{"".join(f'[name="on{e}"] {{ accent-color: {color} }} ' for e, color in enumerate(COLORS))}
:focus-visible {{ outline: 3px solid #3a8fc7; outline-offset: 2px }}
"""

LOOK = {  # of Vega-Lite's charts: as the text around them, in light and in dark
    "background": None, "view": {"stroke": None}, "font": "system-ui, sans-serif",
    "axis": {"labelColor": "currentColor", "titleColor": "currentColor", "titleFontWeight": "normal",
             "gridColor": "#80808040", "domainColor": GREY, "tickColor": GREY,
             "labelFontSize": 13, "titleFontSize": 13},
    "title": {"color": "currentColor", "fontWeight": "normal", "anchor": "start", "fontSize": 13},
    "text": {"color": "currentColor", "fontSize": 13}}


LOSS_TITLE = "loss in nats per token: lines training, circles validation"


def chart(name):
    """The place of the chart `name`."""
    return f'<div id="{name}" class="chart"></div>'


CURVES = chart("curves") + (
    "<p>Drag to move. Shift and the wheel zoom. A double-click goes back.</p>")


@functools.cache
def vega():
    """The JavaScript of Vega-Lite, 0.9 MB. Bundling takes seconds and 150 MB, so another process
    does it, once on a machine. Raises UserError if the package is missing."""
    try:
        name = f"vega-{version('vl-convert-python')}.js"
    except PackageNotFoundError:
        raise UserError("pip install -r requirements.txt: vl-convert-python is missing") from None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "nanolab", name)
    if cache.exists():
        return cache.read_text()
    code = "import vl_convert; print(vl_convert.javascript_bundle())"
    script = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
                            check=True).stdout
    with suppress(OSError):  # a folder that cannot be written to
        cache.parent.mkdir(parents=True, exist_ok=True)
        mine = cache.with_suffix(f".{os.getpid()}")  # several runs may end at once
        mine.write_text(script)
        os.replace(mine, cache)
    return script


def format_page(title, status, sections, charts, is_running):
    """The page. sections: {heading: HTML}; charts: {id of an element: Vega-Lite's specification};
    is_running: a browser then loads the page again every 30 seconds."""
    refresh = '<meta http-equiv="refresh" content="30">' if is_running else ""
    specs = json.dumps(charts).replace("</", "<\\/")
    body = "\n".join(f"<h2>{html.escape(heading)}</h2>\n{content}"
                     for heading, content in sections.items() if content)
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width">{refresh}
<title>{html.escape(f"{title}: {status}")}</title><style>{STYLE}</style></head>
<body>
<h1>{html.escape(title)}</h1>
<p>{html.escape(status)}</p>
{body}
<script>{vega() if charts else ""}</script>
<script>for (const [id, spec] of Object.entries({specs}))
  vegaEmbed("#" + id, spec, {{renderer: "svg", actions: false}});</script>
</body>
</html>
"""


def html_table(rows, header=()):
    """rows: lists of cells, texts or numbers. A text in <a ...> is a link. Under a header, numbers
    are aligned to the right."""
    def cell(value, tag):
        text = str(value)
        is_number = tag == "td" and header and re.fullmatch(r"[-+<]?[\d.,]+( to [-+\d.]+)?", text)
        return (f"<{tag}{' class=number' if is_number else ''}>"
                f"{text if text.startswith('<a ') else html.escape(text)}</{tag}>")

    lines = ["".join(cell(each, tag) for each in cells)
             for tag, part in (("th", [header]), ("td", rows)) for cells in part if cells]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide" tabindex="0"><table>\n{body}\n</table></div>'


def details(summary, content):
    return f"<details><summary>{html.escape(summary)}</summary>\n{content}</details>"


def format_samples(samples):
    """samples: [(where a text is from, the text)]"""
    return "\n".join(details(where, f"<pre>{html.escape(text)}</pre>") for where, text in samples)


def run_page(options, summary, entries, status, is_running):
    """report.html: how a run went. options, summary: {name: value}; entries: of its log."""
    train, val = having("loss", entries), having("val_loss", entries)
    none = [math.nan] * len(val)
    columns = np.stack([millions_of_tokens(train),
                        *(series(train, key) for key in ("loss", "lr", "grad_norm"))])
    val_columns = np.stack([millions_of_tokens(val), series(val, "val_loss"), none, none])
    views = {"loss": LOSS_TITLE, "learning rate": "learning rate", "gradient norm": "gradient norm"}
    name = options["name"]
    samples = [(f"After step {entry['step']:,}", entry["sample"])
               for entry in reversed(having("sample", entries))]
    sections = {
        "Curves": CURVES,
        "Summary": html_table({
            **summary, "code": "; then ".join(map(code_name, summary["code"])), "versions": ", ".join(
                map(" ".join, summary["versions"].items()))}.items()),
        "Validation loss, nats per token": html_table(
            (f"step {entry['step']:,}", f"{entry['val_loss'] or math.nan:.4f}") for entry in val),
        "Samples": format_samples(samples),
        "Options": details(f"all {len(options)}", html_table(options.items()))}
    charts = {"curves": curves_chart([name], [(0, name, columns, val_columns)], views)}
    return format_page(name, f"A training run of nanolab: {status}.", sections, charts, is_running)


def thin(columns, n_points):
    """(n, N) -> (n, at most n_points): means of equally many neighbours, without those that are
    NaN."""
    starts = np.arange(0, columns.shape[1], max(-(-columns.shape[1] // n_points), 1))
    is_number = np.isfinite(columns)
    sums, counts = (np.add.reduceat(values, starts, axis=1)
                    for values in (np.where(is_number, columns, 0), is_number.astype(int)))
    return np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)


def curves_chart(labels, curves, views, n_shown=5):
    """Curves over the training tokens, with switches for what is drawn.

    labels: of the experiments, the first in the colour of the text; curves: [(index of the
    experiment, name of the run, columns of the training, of the validations)]; columns: millions of
    tokens and a value for each view, (1 + n views, n); views: {name: what the chart says above};
    n_shown: experiments that are drawn before a reader ticks others.
    """
    n_points = max(50, min(250 if len(curves) > 1 else 1000, N_POINTS // max(len(curves), 1)))
    keys, rows = [f"v{i}" for i in range(len(views))], []
    for r, (e, _, train, val) in reversed(list(enumerate(curves))):  # the first on top
        for kind, columns in (("train", thin(train, n_points)), ("val", val)):
            rows += [f"{e},{r},{kind}," + ",".join("" if np.isnan(x) else f"{x:.5g}" for x in point)
                     for point in columns.T]

    def switch(name, value, kind, label, **more):
        return {"name": name, "value": value, "bind": {"input": kind, "name": label, **more}}

    params = [
        {"name": "labels", "value": labels},
        {"name": "runs", "value": [name for _, name, *_ in curves]},
        {"name": "titles", "value": dict(zip(keys, views.values()))},
        switch("view", "v0", "radio", "show", options=keys, labels=list(views)),
        switch("smoothing", 2, "select", "mean over", options=list(SMOOTHING.values()),
               labels=list(SMOOTHING)),
        switch("start", 10, "range", "from % of the run", min=0, max=90, step=5),
        *(switch(f"on{e}", e < n_shown, "checkbox", label) for e, label in enumerate(labels))]
    shown = f"[{', '.join(f'on{e}' for e in range(len(labels)))}][datum.e]"
    means = [{"window": [{"op": "mean", "field": "y0", "as": f"mean{n}"}], "frame": [-n, n],
              "groupby": ["r", "kind"], "sort": [{"field": "t"}]} for n in SMOOTHING.values() if n]
    y = " : ".join(f"smoothing == {n} ? datum.mean{n}" for n in SMOOTHING.values() if n)
    encoding = {
        "x": {"field": "t", "type": "quantitative", "title": "training tokens, millions",
              "axis": {"tickCount": TICKS},
              "scale": {"zero": False, "nice": False}},
        "y": {"field": "y", "type": "quantitative", "title": None, "scale": {"zero": False}},
        "detail": {"field": "r"},
        "color": {"field": "e", "type": "nominal", "legend": None, "scale": {
            "domain": list(range(len(labels))), "range": COLORS[:len(labels)]}},
        "tooltip": [{"field": "experiment", "type": "nominal"}, {"field": "run", "type": "nominal"},
                    {"field": "t", "type": "quantitative", "title": "million tokens"},
                    {"field": "y", "type": "quantitative", "title": "value", "format": ".5"}]}
    zoom = {"name": "zoom", "select": {  # a finger scrolls the page
        "type": "interval", "zoom": "wheel![event.shiftKey]",
        "translate": "[mousedown, window:mouseup] > window:mousemove!"}, "bind": "scales"}
    return {
        "$schema": SCHEMA, "config": LOOK,
        "width": "container", "height": 380, "title": {"text": {"expr": "titles[view]"}},
        "data": {"values": "\n".join([f"e,r,kind,t,{','.join(keys)}", *rows]), "format": {
            "type": "csv", "parse": dict.fromkeys(["e", "r", "t", *keys], "number")}},
        "params": params, "transform": [
            {"filter": shown}, {"calculate": "datum[view]", "as": "y0"}, *means,
            {"calculate": f"datum.kind == 'val' ? datum.y0 : {y} : datum.y0", "as": "y"},
            {"calculate": "labels[datum.e]", "as": "experiment"},
            {"calculate": "runs[datum.r]", "as": "run"},
            {"joinaggregate": [{"op": "max", "field": "t", "as": "end"}]},
            {"filter": "datum.t >= start / 100 * datum.end && isValid(datum.y)"}],
        "layer": [
            {"transform": [{"filter": "datum.kind == 'train'"}], "params": [zoom],
             "mark": {"type": "line", "clip": True, "strokeWidth": 1.3}, "encoding": encoding},
            {"transform": [{"filter": "datum.kind == 'val'"}],
             "mark": {"type": "point", "clip": True, "size": 35}, "encoding": encoding}]}


def differences_chart(rows, baseline):
    """The differences of tables.compare's rows, with the intervals that their verdicts use."""
    look = {"better": (COLORS[1], COLORS[1]), "worse": (COLORS[2], "transparent")}
    values = []
    for row in rows:
        if "difference" in row:
            edge, fill = look.get(row["verdict"], (GREY, "transparent"))
            label = f"{row['experiment']}  {row['difference']:+.4f} {row['verdict']}"
            values.append({"edge": edge, "fill": fill, "label": label, "gaps": row["gaps"], **{
                key: row[key] for key in ("difference", "low", "high") if key in row}})

    def layer(mark, x, **channels):
        x = {"type": "quantitative", "axis": {"tickCount": TICKS}, **x,
             "title": f"difference in loss to {baseline}, nats per token"}
        return {"mark": mark, "encoding": {"x": x, **channels}}

    edge = {"field": "edge", "type": "nominal", "scale": None}
    return {
        "$schema": SCHEMA, "config": LOOK, "width": "container", "height": 44 * len(values),
        "data": {"values": values},
        "encoding": {"y": {"field": "label", "type": "nominal", "sort": None, "axis": None}},
        "layer": [
            layer({"type": "rule", "color": GREY}, {"datum": 0}, y=None),
            {**layer({"type": "tick", "color": GREY, "size": 9, "thickness": 1}, {"field": "gaps"}),
             "transform": [{"flatten": ["gaps"]}]},
            layer({"type": "rule", "size": 2.5}, {"field": "low"}, x2={"field": "high"},
                  color=edge),
            layer({"type": "point", "size": 90, "opacity": 1}, {"field": "difference"},
                  stroke=edge, fill={**edge, "field": "fill"}),
            layer({"type": "text", "align": "left", "dy": -15}, {"value": 0},
                  text={"field": "label"})]}
