"""The page of a run, report.html, and what it shares with that of a study: one HTML file that needs
no network."""

import html
import json
import math
import re

from nanolab.charts import COLORS, GREY, curves_chart, vega
from nanolab.common import code_name
from nanolab.log import curve, having

STYLE = f"""
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui; max-width: 62rem; margin: 1rem auto; padding: 0 1rem }}
h1 {{ margin: 0; overflow-wrap: anywhere }}
table {{ border-collapse: collapse; font-size: .9rem }}
th, td {{ text-align: left; padding: .1rem 1.2rem .1rem 0; vertical-align: top }}
td {{ white-space: nowrap }}
td.number {{ text-align: right; font-variant-numeric: tabular-nums }}
.wide {{ overflow-x: auto }}
#curves {{ min-height: 30rem }}  /* so that a reload finds the place that was read */
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; border-left: 3px solid {GREY};
      padding-left: .7rem }}
.chart {{ width: 100% }}
.vega-bindings {{ display: flex; flex-wrap: wrap; gap: .4rem 1.4rem; font-size: .9rem }}
.vega-bind-name, .vega-bind-radio label {{ margin-right: .6rem }}
{"".join(f'[name="on{e}"] {{ accent-color: {color} }} ' for e, color in enumerate(COLORS))}
:focus-visible {{ outline: 3px solid #3a8fc7; outline-offset: 2px }}
"""

ZOOMING = "Drag to move. Shift and the wheel zoom. A double-click goes back."


def chart(name, words):
    """The place of the chart `name`, and a line below it."""
    return f'<div id="{name}" class="chart"></div>\n<p>{words}</p>'


# not while nobody looks; nor once a reader has chosen what is drawn, which would be lost
RELOAD = """let used = false;
addEventListener("input", () => { used = true });
setInterval(() => used || document.hidden || location.reload(), 30000);"""


def format_page(title, status, sections, charts, is_running):
    """The page. sections: {heading: HTML}; charts: {id of an element: Vega-Lite's specification};
    is_running: a browser then loads the page again every 30 seconds, until a switch is used."""
    specs = json.dumps(charts).replace("</", "<\\/")
    body = "\n".join(f"<h2>{html.escape(heading)}</h2>\n{content}"
                     for heading, content in sections.items() if content)
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(f"{title}: {status}")}</title><style>{STYLE}</style></head>
<body>
<h1>{html.escape(title)}</h1>
<p>{html.escape(status)}</p>
{body}
<script>{vega() if charts else ""}</script>
<script>for (const [id, spec] of Object.entries({specs}))
  vegaEmbed("#" + id, spec, {{renderer: "svg", actions: false}});
{RELOAD if is_running else ""}</script>
</body>
</html>
"""


def html_table(rows, header=()):
    """rows: lists of cells: texts, numbers, or for a link its address and text. Under a header,
    numbers are aligned to the right."""
    def cell(value, tag):
        if isinstance(value, tuple):
            return f'<{tag}><a href="{value[0]}">{html.escape(value[1])}</a></{tag}>'
        text = str(value)
        is_number = tag == "td" and header and re.fullmatch(r"[-+<]?[\d.,]+( to [-+\d.]+)?", text)
        return f"<{tag}{' class=number' if is_number else ''}>{html.escape(text)}</{tag}>"

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
    name, code = options["name"], "; then ".join(map(code_name, summary["code"]))
    versions = ", ".join(map(" ".join, summary["versions"].items()))
    sections = {
        "Curves": chart("curves", ZOOMING),
        "Summary": html_table({**summary, "code": code, "versions": versions}.items()),
        "Validation loss, nats per token": html_table(
            (f"step {entry['step']:,}", f"{entry['val_loss'] or math.nan:.4f}")
            for entry in having("val_loss", entries)),
        "Samples": format_samples((f"After step {entry['step']:,}", entry["sample"])
                                  for entry in reversed(having("sample", entries))),
        "Options": details(f"all {len(options)}", html_table(options.items()))}
    return format_page(name, f"A training run of nanolab: {status}.", sections,
                       {"curves": run_curves(name, entries)}, is_running)


def run_curves(name, entries):
    return curves_chart([name], [(0, name, *curve(entries))])
