"""What the measuring scripts share."""

import json
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from nanolab.common import UserError
from nanolab.devices import machine
from nanolab.logfile import read_log

STEPS_NOT_TIMED = 3  # they allocate and compile


def run_python(*command, cwd=ROOT):
    """Runs one of the scripts. -> what it prints. Raises UserError if it fails."""
    result = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True)
    if result.returncode:
        last_line = (result.stderr.strip().splitlines() or ["no message; out of memory?"])[-1]
        raise UserError(f"python {' '.join(map(str, command[:2]))} ... failed "
                        f"(exit code {result.returncode}): {last_line}")
    return result.stdout


def log_mean(out_dir, key):
    """The harmonic mean of a figure per second, such as tokens_per_second, over a run's timed
    steps."""
    steps = read_log(Path(out_dir, "log.jsonl"))[0][STEPS_NOT_TIMED:]
    return statistics.harmonic_mean([step[key] for step in steps])


def spread(figures):
    """The median, and the lowest and highest, as text."""
    return f"{statistics.median(figures):,.0f} ({min(figures):,.0f} to {max(figures):,.0f})"


def parse_timing_arguments(parser, steps, dataset):
    """Adds what the scripts that time short runs have in common. -> the arguments."""
    parser.add_argument("--repeats", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=steps, help="of a run (default: %(default)s)")
    parser.add_argument("--data_dir", type=Path, default=ROOT / "data",
                        help=f"where the data set {dataset} is (default: data)")
    parser.add_argument("--json", metavar="FILE", help="write every run's speed")
    args = parser.parse_args()
    args.data_dir = args.data_dir.resolve()
    if args.repeats < 1 or args.steps <= STEPS_NOT_TIMED:
        parser.error(f"--repeats must be at least 1, --steps more than {STEPS_NOT_TIMED}")
    return args


def write_json(path, **figures):
    """The raw figures, and what a reader needs to judge or to repeat them."""
    conditions = {"machine": machine(torch.device("cpu")), "date": str(date.today()),
                  "commit": commit(), "command": " ".join(sys.argv)}
    Path(path).write_text(json.dumps({**conditions, **figures}, indent=1) + "\n")


def commit():
    result = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT,
                            capture_output=True, text=True)
    return result.stdout.strip() or "unknown"
