"""A long run of a tiny model: do memory, files and threads grow?

    python bench/soak.py [--steps=20000] [--out=out/soak]

Trains with a validation every 50 steps and a save every 100, and watches the process from outside
(Linux). Prints a line every 1,000 steps. Exits with 1 if the end holds more than the first line
after the first chart: from there on matplotlib is in memory, with its fonts open.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent.parent
FLAGS = ["--dataset=stdlib", "--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32",
         "--batch_size=8", "--global_batch_size=8", "--dropout=0", "--device=cpu",
         "--eval_every=50", "--eval_tokens=2048", "--save_every=100"]
ALLOWED_MB = 8  # of growth; what drawing a longer log takes for a moment is some of it


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--out", default="out/soak")
    args = parser.parse_args()
    command = [sys.executable, "train.py", *FLAGS, f"--max_steps={args.steps}",
               f"--out_dir={args.out}"]
    process = subprocess.Popen(command, cwd=HERE, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    print("  step  memory MB  files  threads")
    seen, n_before = [], 0  # what each line says; how many are from before the first chart
    while process.poll() is None:
        step = last_step(HERE / args.out / "log.jsonl")
        if step >= 1000 * (len(seen) + 1):
            try:
                seen.append(held_by(process.pid))
            except OSError:  # it has just ended
                break
            n_before += not (HERE / args.out / "loss.png").exists()
            print("{:6,}  {:9.1f}  {:5}  {:7}".format(step, *seen[-1]), flush=True)
        time.sleep(0.02)
    if process.wait() or len(seen) < n_before + 2:
        raise SystemExit(f"the run failed ({process.returncode}), or was too short")
    grown = [end - start for start, end in zip(seen[n_before], seen[-1])]
    print("growth since the first chart: memory {:+.1f} MB, files {:+}, threads {:+}".format(*grown))
    sys.exit(grown[0] > ALLOWED_MB or grown[1] > 2 or grown[2] > 0)  # a save has 2 files open


def last_step(log):
    """The step of the last whole line, 0 before there is one."""
    try:
        with open(log, "rb") as file:
            file.seek(max(log.stat().st_size - 1000, 0))
            return json.loads(file.read().splitlines()[-2])["step"]
    except (OSError, ValueError, IndexError):
        return 0


def held_by(pid):
    """-> MB of memory, open files, threads of a process"""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return int(status["VmRSS"].split()[0]) / 1024, files, int(status["Threads"])


if __name__ == "__main__":
    main()
