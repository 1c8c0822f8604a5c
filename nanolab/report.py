"""A run's report.html: one file, without network, that shows what a run was and how it went."""

import base64
import html

from config import OPTIONS, SEEDS
from nanolab.common import format_duration

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff }
h1 { margin-bottom: 0 } h2 { margin-top: 2rem; font-size: 1.2rem }
img { max-width: 100% }
table { border-collapse: collapse }
th, td { text-align: left; padding: .15rem 1.5rem .15rem 0; vertical-align: top;
         border-bottom: 1px solid #ddd; font-weight: normal }
th { color: #666 } td { font-variant-numeric: tabular-nums }
pre { background: #f5f5f5; padding: .7rem; white-space: pre-wrap; overflow-wrap: anywhere }
.scroll { max-height: 22rem; overflow: auto }
"""


def format_report(config, facts, val, samples, png, status, is_running):
    """The page. facts: {label: text}; val, samples: entries of the log; png: the chart, bytes;
    is_running: a browser then loads the page again every ten seconds."""
    changed = {key: value for key, value in vars(config).items()
               if value != OPTIONS[key].default and key not in (*SEEDS, "resume", "extend")}
    best = min((entry["val_loss"] for entry in val if entry["val_loss"] is not None), default=None)
    losses = {f"{entry['step']:,}": format_loss(entry["val_loss"], best) for entry in val}
    texts = "\n".join(f"<p>After step {entry['step']:,}:</p>\n<pre>{html.escape(entry['sample'])}"
                      "</pre>" for entry in reversed(samples))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{'<meta http-equiv="refresh" content="10">' if is_running else ""}
<title>{html.escape(config.name)}: {status}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{html.escape(config.name)}</h1>
<p>A training run of nanolab: {status}.</p>
{format_table(facts)}
<h2>Loss</h2>
<p><img alt="Loss, learning rate and gradient norm over the training tokens"
src="data:image/png;base64,{base64.b64encode(png).decode()}"></p>
<h2>Validation loss</h2>
<div class="scroll">{format_table(losses, "after step", "nats per token")}</div>
<h2>Samples</h2>
<div class="scroll">{texts or "<p>None were drawn (--sample_every).</p>"}</div>
<h2>Options</h2>
<p>Those that differ from the defaults, which are the published baseline's:</p>
{format_table(changed)}
<details><summary>All options</summary>
{format_table(vars(config))}
</details>
</body>
</html>
"""


def describe_run(config, summary, n_parameters, flops_per_token, peak_flops):
    """The facts of format_report, from what summary.json has."""
    flops = summary["tokens_per_second"] * flops_per_token
    facts = {
        "best validation loss": format_loss(summary["best_val_loss"]),
        "last validation loss": format_loss(summary["final_val_loss"]),
        "model": f"{n_parameters:,} parameters",
        "data": f"{config.dataset}, {summary['tokens']:,} training tokens",
        "steps": f"{summary['steps']:,} of {config.global_batch_size:,} x {config.block_size:,} "
                 f"tokens; {summary['skipped_steps']:,} skipped",
        "time": format_duration(summary["seconds"]),
        "speed": f"{summary['tokens_per_second']:,.0f} tokens/s, {flops / 1e9:,.1f} GFLOP/s of "
                 f"{peak_flops / 1e9:,.1f} ({flops / peak_flops:.1%})",
        "peak memory": f"{summary['peak_memory_mb']:,} MB",
        "machine": summary["machine"],
        "software": ", ".join(f"{name} {version}" for name, version in summary["versions"].items())}
    if config.dollars_per_hour:
        facts["cost"] = f"{summary['cost']:,.2f} dollars"
    return facts


def format_loss(loss, best=None):
    if loss is None:
        return "none"
    return f"{loss:.4f}{', the best' if loss == best else ''}"


def format_table(rows, *header):
    """{left: right} as an HTML table."""
    lines = [f"<tr>{''.join(f'<th>{word}</th>' for word in header)}</tr>"] if header else []
    lines += [f"<tr><th>{html.escape(str(left))}</th><td>{html.escape(str(right))}</td></tr>"
              for left, right in rows.items()]
    return "\n".join(["<table>", *lines, "</table>"])
