"""What a run reports: log.jsonl, the progress bar, Weights & Biases, loss.png, report.html,
summary.json; and the clock behind it."""

import fcntl
import html
import json
import math
import os
import socket
import sys
import textwrap
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from nanolab.checkpoint import versions
from nanolab.common import UserError, describe, parse_json, write_atomically
from nanolab.devices import all_reduce_scalar, machine
from nanolab.logfile import having, read_entries
from nanolab.measure import matmul_peak
from nanolab.memory import peak_memory
from nanolab.plots import import_matplotlib, plot_run
from nanolab.report import describe_run, format_report


class RunLog:
    """Records steps and validations, and keeps the run's clock. Only rank 0's is enabled; the
    others write nothing.

    As a context manager it closes the bar and the files, however the run ends.
    """

    def __init__(self, config, state, max_steps, model, device, dtype, rank):
        self.config, self.state, self.max_steps, self.device = config, state, max_steps, device
        self.enabled = rank == 0
        self.out_dir = Path(config.out_dir)
        self.tokens_per_step = config.global_batch_size * config.block_size
        self.n_parameters, self.flops_per_token = model.num_params(), model.flops_per_token()
        self.peak_flops = all_reduce_scalar(dist.ReduceOp.SUM, matmul_peak(device, dtype), device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # from here on, the training's own
        self.tracker = self.file = self.lock = None
        self.unwritten = b""  # lines that wait for room on the disk
        if self.enabled:
            self.open_files()
        self.bar = tqdm(total=max_steps, initial=state.step, unit="step", disable=not self.enabled,
                        mininterval=0.5 if sys.stderr.isatty() else 10.0)
        self.first_step = state.step
        self.seconds_before, self.started = state.seconds, time.perf_counter()
        self.clock = self.started  # when the last step ended
        self.next_drawing = self.started + 10
        self.final = None  # what summary.json says, at the end
        self.tokens_since_line, self.seconds_since_line, self.overhead = 0, 0.0, 0.0

    def open_files(self):
        self.out_dir.mkdir(parents=True, exist_ok=True)
        self.lock = lock(self.out_dir / "run.lock")
        for name in ("last.pt", "best.pt", "config.json", "log.jsonl", "summary.json", "wandb_id"):
            (self.out_dir / f"{name}.unfinished").unlink(missing_ok=True)  # of a killed run
        if self.config.wandb:
            id_file, resumed = self.out_dir / "wandb_id", self.state.step > 0
            self.tracker = start_wandb(self.config, id_file, resumed)
        if self.config.save_weights:  # eval.py recognises a run by its config.json
            text = json.dumps(vars(self.config), indent=1) + "\n"
            write_atomically(self.out_dir / "config.json", text)
        (self.out_dir / "summary.json").unlink(missing_ok=True)  # of the run before it is extended
        self.file = open_log(self.out_dir / "log.jsonl", self.state.step, self.config.log_every)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()
        if self.file:
            with suppress(OSError):
                self.flush()
            if lines := self.unwritten.splitlines():
                print(f"{self.out_dir / 'log.jsonl'} lacks the last {len(lines)} lines: they could "
                      "not be written", file=sys.stderr)
            self.file.close()
        if self.lock:
            with suppress(OSError):  # the folder was deleted, and may be another run's now
                if os.path.samestat(os.stat(self.lock.name), os.fstat(self.lock.fileno())):
                    os.unlink(self.lock.name)
            self.lock.close()

    def timed(self, batches):
        """The same batches. Their reading counts as time outside forward, backward and
        optimizer."""
        while True:
            start = time.perf_counter()
            batch = next(batches)
            self.overhead += time.perf_counter() - start
            yield batch

    def step(self, loss, lr, grad_norm, clipped, skipped):
        """After every step: advances the clock, and writes a line every log_every steps."""
        now, state = time.perf_counter(), self.state
        elapsed, self.clock = now - self.clock, now
        state.tokens += self.tokens_per_step
        state.seconds = self.seconds_before + now - self.started
        self.tokens_since_line += self.tokens_per_step
        self.seconds_since_line += elapsed
        if state.step > self.first_step + 1:  # a first step compiles, allocates, warms up
            state.timed_tokens += self.tokens_per_step
            state.timed_seconds += elapsed
            state.timed_outside += self.overhead

        if (state.step - 1) % self.config.log_every == 0 or state.step == self.max_steps:
            rate = self.tokens_since_line / self.seconds_since_line
            self.tokens_since_line, self.seconds_since_line = 0, 0.0
            self.write({"step": state.step - 1, "tokens": state.tokens, "loss": loss, "lr": lr,
                        "grad_norm": grad_norm, "clipped": clipped, "skipped": skipped,
                        "tokens_per_second": rate,
                        "mfu": rate * self.flops_per_token / self.peak_flops,
                        "seconds": state.seconds})
            self.bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s", refresh=False)
        self.bar.update()
        self.overhead = time.perf_counter() - now

    def validation(self, val_loss, is_best):
        self.state.seconds = self.seconds_before + time.perf_counter() - self.started
        if self.enabled:
            best = ", the best so far" if is_best else ""
            tqdm.write(f"step {self.state.step:,}: validation loss {val_loss:.4f}{best}")
        self.write({"step": self.state.step, "tokens": self.state.tokens, "val_loss": val_loss})

    def sample_if_due(self, sample):
        """Draws a text, see nanolab/samples.py, prints and logs it."""
        every = self.config.sample_every
        if not (self.enabled and every and self.state.step % every == 0):
            return
        text = sample()
        self.write({"step": self.state.step, "tokens": self.state.tokens, "sample": text})
        shown = "".join(c if c.isprintable() or c == "\n" else " " for c in text)
        encoding = sys.stdout.encoding or "ascii"
        shown = shown.encode(encoding, "replace").decode(encoding)
        tqdm.write(f"step {self.state.step:,}, a sample:\n{textwrap.indent(shown, '  | ')}")

    @contextmanager
    def clock_stopped(self):
        """Time inside belongs to no step."""
        start = time.perf_counter()
        yield
        self.clock += time.perf_counter() - start

    def write(self, entry):
        if not self.enabled:
            return
        line = json.dumps({key: finite_or_none(value) for key, value in entry.items()}) + "\n"
        is_waiting = bool(self.unwritten)
        self.unwritten += line.encode()
        try:
            self.flush()
        except OSError as error:
            if not is_waiting:
                tqdm.write(f"could not write {self.out_dir / 'log.jsonl'} ({describe(error)}); its "
                           "lines are kept until there is room", file=sys.stderr)
        if self.tracker:
            values = {key: value for key, value in entry.items() if key != "step"}
            if "sample" in entry:
                from wandb import Html
                values["sample"] = Html(f"<pre>{html.escape(entry['sample'])}</pre>")
            self.tracker.log(values, step=entry["step"])

    def flush(self):
        """Writes the lines that wait. A full disk may take a part of them before the OSError."""
        while self.unwritten:
            self.unwritten = self.unwritten[self.file.write(self.unwritten):]

    def write_summary(self):
        if self.enabled:
            self.flush()
            self.final = self.summary()
            write_atomically(self.out_dir / "summary.json", json.dumps(self.final, indent=1) + "\n")

    def summary(self):
        state = self.state
        return {"name": self.config.name, "steps": state.step, "tokens": state.tokens,
                "final_val_loss": finite_or_none(state.val_loss),
                "best_val_loss": finite_or_none(state.best_val_loss),
                "skipped_steps": state.skipped, "seconds": round(state.seconds, 3),
                "tokens_per_second": round(state.tokens_per_second(), 1),
                "peak_memory_mb": round(peak_memory(self.device) / 2**20),
                "cost": round(state.seconds / 3600 * self.config.dollars_per_hour, 2),
                "machine": machine(self.device), "versions": versions()}

    def draw_if_due(self, stopping):
        """Draws at the end, and else every ten seconds; less often if drawing takes long, and not
        before the save of a run that was asked to stop."""
        is_last = self.state.step == self.max_steps
        if is_last or not stopping and time.perf_counter() > self.next_drawing:
            self.draw("finished" if is_last else f"step {self.state.step:,} of {self.max_steps:,}",
                      is_running=not is_last)

    def draw(self, status, is_running=False):
        """Writes loss.png and report.html. A timing run has none."""
        if not (self.enabled and self.config.save_weights):
            return
        import_matplotlib()
        start = time.perf_counter()
        try:
            entries = read_entries(self.out_dir / "log.jsonl")
            train, val, samples = (having(key, entries) for key in ("loss", "val_loss", "sample"))
            png = plot_run(train, val, self.config)
            facts = describe_run(self.config, self.final or self.summary(), self.n_parameters,
                                 self.flops_per_token, self.peak_flops)
            page = format_report(self.config, facts, val, samples, png, status, is_running)
            write_atomically(self.out_dir / "loss.png", png)
            write_atomically(self.out_dir / "report.html", page)
        except (OSError, ValueError, KeyError, TypeError) as error:  # a full disk, a damaged log
            tqdm.write(f"could not draw {self.out_dir / 'loss.png'} ({describe(error)})",
                       file=sys.stderr)
        now = time.perf_counter()
        self.next_drawing = now + max(10, 100 * (now - start))

    def finish(self):
        """Prints how fast the run was and what to do next, and hands plot and summary to W&B."""
        if not self.enabled:
            return
        self.bar.close()
        state, out_dir = self.state, self.out_dir
        if state.step < self.max_steps:
            saved = " and saved; the same command with --resume continues from here"
            print(f"stopped after {state.step:,} steps{saved * self.config.save_weights}")
            self.draw(f"stopped after {state.step:,} of {self.max_steps:,} steps")
            if self.tracker:
                self.tracker.finish()
            return
        if self.tracker:
            finish_wandb(self.tracker, out_dir)
        rate = state.tokens_per_second()
        flops = rate * self.flops_per_token
        overhead = state.timed_outside / (state.timed_seconds or state.seconds)
        print(f"speed:  {rate:,.0f} tokens/s, {flops / 1e9:,.1f} GFLOP/s of the "
              f"{self.peak_flops / 1e9:,.1f} of matrix products here "
              f"({flops / self.peak_flops:.1%}); peak memory "
              f"{self.final['peak_memory_mb']:,} MB; {overhead:.2%} of the time outside "
              "forward, backward and optimiser (data, log)")
        if self.config.save_weights:
            ckpt = "" if str(out_dir) == "out" else f" --ckpt {out_dir / 'best.pt'}"
            print(f"done:   {state.tokens:,} tokens in {state.seconds:,.0f} s; validation loss "
                  f"{state.val_loss:.4f}, best {state.best_val_loss:.4f}\n"
                  f"next:   python eval.py --ckpt {out_dir / 'best.pt'}\n"
                  f"        python sample.py{ckpt}")


def lock(path):
    """A file that only one process can have; the system frees it when that process ends, however it
    ends. -> the open file. Raises UserError, with the owner's process id and machine."""
    while True:
        file = open(path, "a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(f"another run is writing to {path.parent} ({file.read().strip()}); "
                            "choose another --out_dir, or stop that run first") from None
        except OSError as error:  # some network disks have no locks
            print(f"note:   {path.parent} cannot be locked ({describe(error)}): make sure that no "
                  "other run writes to it", flush=True)
        if os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(file.fileno())):
            break  # or else its former owner has just deleted it
    file.truncate(0)
    print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
    return file


def open_log(path, step, log_every):
    """log.jsonl, open for more lines, without those that a killed run wrote after its last
    checkpoint, at `step`. Lines that are damaged are reported, and kept in another file; lines
    that are missing are reported."""
    lines, steps = [], [-1]
    if step and path.exists():
        text = path.read_text(errors="replace")
        n_damaged = 0
        for line in text.splitlines():
            entry = parse_entry(line)
            if entry is None:
                n_damaged += 1
            elif entry["step"] < step + ("loss" not in entry):  # the others count steps done
                lines.append(line + "\n")
                steps += [entry["step"]] if "loss" in entry else []
        if n_damaged > (not text.endswith("\n")):  # the last may be one that was being written
            path.with_name("log.damaged.jsonl").write_bytes(path.read_bytes())
            print(f"note:   {path} has {n_damaged} damaged lines, which are left out; the file as "
                  "it was is log.damaged.jsonl", flush=True)
    if step - steps[-1] > max(log_every, steps[-1] - steps[-2] if len(steps) > 2 else 1):
        print(f"note:   {path} lacks the steps {steps[-1] + 1:,} to {step - 1:,}", flush=True)
    write_atomically(path, "".join(lines))
    return open(path, "ab", buffering=0)


def parse_entry(line):
    """A line of log.jsonl as a dict, or None if it is damaged."""
    try:
        entry = parse_json(line)
        is_entry = type(entry["step"]) is int and {"loss", "val_loss", "sample"} & entry.keys()
    except (ValueError, TypeError, KeyError):
        return None
    return entry if is_entry else None


def finite_or_none(value):
    """A value as JSON can hold it: null where a number is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def start_wandb(config, id_file, resumed):
    """The Weights & Biases run to log to. A resumed run continues its own, whose id is in id_file.
    Raises UserError."""
    try:
        from wandb import init  # `import wandb` would find wandb's own output folder
    except ImportError:
        raise UserError(f"wandb={config.wandb!r}: the package is not installed; pip install wandb",
                        exit_code=2) from None
    run_id = id_file.read_text() if resumed and id_file.exists() else None
    try:
        tracker = init(project=config.wandb, name=config.name, config=vars(config), id=run_id,
                       resume="allow", allow_val_change=True)
    except Exception as error:  # network or account problems, in many classes
        reason = describe(error)
        raise UserError(f"Weights & Biases did not start ({reason}); run `wandb login` first, set "
                        "WANDB_MODE=offline, or leave out --wandb") from None
    write_atomically(id_file, tracker.id)
    return tracker


def finish_wandb(tracker, out_dir):
    """Adds loss.png, unless the disk was full, and the figures of summary.json."""
    from wandb import Image
    if (out_dir / "loss.png").exists():
        tracker.log({"plot": Image(str(out_dir / "loss.png"))})
    tracker.summary.update(json.loads((out_dir / "summary.json").read_text()))
    tracker.finish()
