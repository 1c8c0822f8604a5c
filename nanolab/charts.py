"""The charts of a page, live or as a picture, drawn by Vega-Lite.

Its JavaScript is part of the package vl-convert-python, so nothing needs the network.
"""

import functools
import json
import os
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import numpy as np

from nanolab.common import write_atomically

VIEWS = {"loss": "loss in nats per token: lines training, circles validation", "difference": "",
         "learning_rate": "learning rate", "gradient_norm": "gradient norm"}

# Okabe and Ito's colours ("Color universal design", 2008), that the colour-blind can tell apart,
# a little lighter or darker where white or black behind them asks for it. The first is the text's.
# A seventh idea has the first one's colour again.
COLORS = ["currentColor", *["#3a8fc7", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#8c6bb1"] * 20]
GREY = "#808080"  # as far from white as from black
N_POINTS = 20_000  # of all curves of a page together, about 25 bytes each
SMOOTHING = {"none": 0, "2 %": 2, "10 %": 12}  # points on either side, of about 250

CHART = {  # as the text around it, in light and in dark; the schema is a name: nothing is loaded
    "$schema": "https://vega.github.io/schema/vega-lite/v6.json", "width": "container", "config": {
        "background": None, "view": {"stroke": None}, "font": "system-ui, sans-serif",
        "axis": {"labelColor": "currentColor", "titleColor": "currentColor", "labelFontSize": 13,
                 "titleFontSize": 13, "titleFontWeight": "normal", "gridColor": "#80808040",
                 "domainColor": GREY, "tickColor": GREY},
        "title": {"color": "currentColor", "fontWeight": "normal", "anchor": "start",
                  "fontSize": 13},
        "text": {"color": "currentColor", "fontSize": 13}}}
WIDTH = 760  # of a picture, without its axis
TICKS = {"tickCount": {"expr": "width / 90"}}
TOKENS = {"field": "t", "type": "quantitative", "title": "training tokens, millions",
          "axis": TICKS, "scale": {"zero": False, "nice": False}}
IS_TRAINING, IS_VALIDATION = {"filter": "datum.kind == 'train'"}, {"filter": "datum.kind == 'val'"}


@functools.cache
def vega():
    """The JavaScript of Vega-Lite, 0.9 MB. Bundling takes seconds, so it is kept for the next
    run."""
    cache = Path(os.path.expanduser("~/.cache/nanolab"), f"vega-{version('vl-convert-python')}.js")
    with suppress(OSError):
        return cache.read_text(encoding="utf-8")
    script = vl_convert("vl_convert.javascript_bundle().encode()")
    with suppress(OSError):  # a folder that cannot be written to
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cache, script)
    return script.decode()


def save_picture(chart, path):
    """A chart as a PNG file on white, 830 pixels wide on a page."""
    picture = json.dumps({**chart, "width": WIDTH, "background": "white", "padding": 10})
    write_atomically(path, vl_convert("vl_convert.vegalite_to_png(sys.stdin.read(), scale=2)",
                                      picture.replace("currentColor", "black")))


def vl_convert(expression, text=""):
    """The bytes of an expression with the package of that name. Another process finds them: they
    take 150 MB, and threads that no training process should have."""
    code = f"import sys, vl_convert; sys.stdout.buffer.write({expression})"
    return subprocess.run([sys.executable, "-c", code], input=text.encode(), check=True,
                          stdout=subprocess.PIPE).stdout


def thin(columns, n_points):
    """(n, N) -> (n, at most n_points): means of equally many neighbours, without those that are
    NaN."""
    starts = np.arange(0, columns.shape[1], max(-(-columns.shape[1] // n_points), 1))
    is_number = np.isfinite(columns)
    sums, counts = (np.add.reduceat(values, starts, axis=1)
                    for values in (np.where(is_number, columns, 0), is_number.astype(int)))
    return np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)


def curve_data(curves):
    """The data of a chart: a line of CSV for each point, with a value for each of VIEWS.

    curves: [(index of the experiment, name of the run, columns of the training, of the
    validations)], columns as log.curve returns them.
    """
    n_points = max(50, min(250 if len(curves) > 1 else 1000, N_POINTS // max(len(curves), 1)))
    numbers = ["e", "r", "t", *VIEWS]
    lines = ["kind," + ",".join(numbers)]
    for r, (e, _, train, val) in reversed(list(enumerate(curves))):  # the first on top
        for kind, columns in (("train", thin(train, n_points)), ("val", val)):
            lines += [f"{kind},{e},{r}," + ",".join(
                "" if np.isnan(x) else f"{x:.5g}" for x in point) for point in columns.T]
    return {"values": "\n".join(lines),
            "format": {"type": "csv", "parse": dict.fromkeys(numbers, "number")}}


def curves_chart(labels, curves, baseline=None, n_shown=5):
    """Curves over the training tokens, with switches for what is drawn.

    labels: of the experiments, the first in the colour of the text; curves: as curve_data takes
    them; n_shown: experiments that are drawn before a reader ticks others.
    """
    views = {**VIEWS, "difference":
             f"difference in loss to the run of {baseline} with the same seeds"}
    if not baseline:
        del views["difference"]

    def switch(name, value, kind, label, **more):
        return {"name": name, "value": value, "bind": {"input": kind, "name": label, **more}}

    params = [
        {"name": "labels", "value": labels},
        {"name": "runs", "value": [name for _, name, *_ in curves]},
        {"name": "titles", "value": views},
        switch("view", "loss", "radio", "show", options=list(views),
               labels=[view.replace("_", " ") for view in views]),
        switch("smoothing", 2, "select", "mean over", options=list(SMOOTHING.values()),
               labels=list(SMOOTHING)),
        switch("start", 10, "range", "from % of the run", min=0, max=90, step=5),
        *(switch(f"on{e}", e < n_shown, "checkbox", label) for e, label in enumerate(labels))]
    shown = f"[{', '.join(f'on{e}' for e in range(len(labels)))}][datum.e]"
    means = [{"window": [{"op": "mean", "field": "y0", "as": f"mean{n}"}], "frame": [-n, n],
              "groupby": ["r", "kind"], "sort": [{"field": "t"}]} for n in SMOOTHING.values() if n]
    y = " : ".join(f"smoothing == {n} ? datum.mean{n}" for n in SMOOTHING.values() if n)
    encoding = {
        "x": TOKENS, "y": {"field": "y", "type": "quantitative", "title": None,
                           "scale": {"zero": False}},
        "detail": {"field": "r"},
        "color": {"field": "e", "type": "nominal", "legend": None, "scale": {
            "domain": list(range(len(labels))), "range": COLORS[:len(labels)]}},
        "tooltip": [{"field": "experiment", "type": "nominal"}, {"field": "run", "type": "nominal"},
                    {"field": "t", "type": "quantitative", "title": "million tokens"},
                    {"field": "y", "type": "quantitative", "title": "value", "format": ".5"}]}
    zoom = {"name": "zoom", "select": {  # a finger scrolls the page
        "type": "interval", "zoom": "wheel![event.shiftKey]",
        "translate": "[mousedown, window:mouseup] > window:mousemove!"}, "bind": "scales"}
    # the names, right of the curves' ends and in their order
    last = {"joinaggregate": [{"op": "argmax", "field": "t", "as": "last"}], "groupby": ["r"]}
    ends = [IS_TRAINING, last, {"filter": "datum.t == datum.last.t"},
            {"aggregate": [{"op": "mean", "field": "y", "as": "y"}],
             "groupby": ["e", "experiment", "end"]},
            {"window": [{"op": "row_number", "as": "rank"}],
             "sort": [{"field": "y", "order": "descending"}]},
            {"joinaggregate": [{"op": op, "field": "y", "as": op} for op in ("mean", "count")]},
            {"calculate": "datum.end * (1 + 0.0017 * (100 - start))", "as": "room"}]
    label = {"field": "experiment", "type": "nominal"}
    return {
        **CHART, "height": 380, "title": {"text": {"expr": "titles[view]"}},
        "data": curve_data(curves), "params": params, "transform": [
            {"filter": shown}, {"calculate": "datum[view]", "as": "y0"}, *means,
            {"calculate": f"datum.kind == 'val' ? datum.y0 : {y} : datum.y0", "as": "y"},
            {"calculate": "labels[datum.e]", "as": "experiment"},
            {"calculate": "runs[datum.r]", "as": "run"},
            {"joinaggregate": [{"op": "max", "field": "t", "as": "end"}]},
            {"filter": "datum.t >= start / 100 * datum.end && isValid(datum.y)"}],
        "layer": [
            {"transform": [IS_TRAINING], "params": [zoom], "encoding": encoding,
             "mark": {"type": "line", "clip": True, "strokeWidth": 1.3}},
            {"transform": [IS_VALIDATION], "encoding": encoding,
             "mark": {"type": "point", "clip": True, "size": 35}},
            {"transform": ends, "encoding": {"color": encoding["color"], "text": label,
                                             "x": {**TOKENS, "field": "room"}},
             "mark": {"type": "text", "align": "right", "clip": True,
                      "y": {"expr": "scale('y', datum.mean)"
                                    " + 17 * (datum.rank - (datum.count + 1) / 2)"}}}]}


def differences_chart(rows, baseline):
    """The differences of tables.compare's rows, with the intervals that their verdicts use."""
    looks = {"better": (COLORS[1], COLORS[1]), "worse": (COLORS[2], "transparent")}
    values = []
    for row in rows:
        if "difference" in row:
            middle, (edge, fill) = row["difference"], looks.get(row["verdict"],
                                                                (GREY, "transparent"))
            values.append({"edge": edge, "fill": fill, "difference": middle, "gaps": row["gaps"],
                           "low": row.get("low", middle), "high": row.get("high", middle),
                           "label": f"{row['experiment']}  {middle:+.4f} {row['verdict']}"})

    def layer(mark, x, **channels):
        x = {"type": "quantitative", "axis": TICKS, **x,
             "title": f"difference in loss to {baseline}, nats per token"}
        return {"mark": mark, "encoding": {"x": x, **channels}}

    edge = {"field": "edge", "type": "nominal", "scale": None}
    return {
        **CHART, "height": 44 * len(values),
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
