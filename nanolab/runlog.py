"""What a run reports: log.jsonl, the progress bar, samples, Weights & Biases, loss.png and
report.html, summary.json; and the clock behind it."""

import json
import math
import os
import shlex
import sys
import textwrap
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from tqdm import tqdm

from nanolab.charts import save_picture
from nanolab.checkpoint import checkpoint_file
from nanolab.common import (ROOT, UserError, code_diff, code_state, describe, utc_now, versions,
                            write_atomically)
from nanolab.distributed import machine, n_threads
from nanolab.log import read_entries
from nanolab.memory import peak_memory
from nanolab.report import run_curves, run_page
from nanolab.tokenizer import encode_prompt, get_tokenizer, text_of

SAMPLE_TOKENS = 128  # at most; a sample also ends at an end-of-text token


class TrainingClock:
    """The time of a run, and that of its steps alone."""

    def __init__(self, seconds_before):
        self.lap_start, self.n_laps, self.in_laps = time.perf_counter(), 0, 0.0
        self.start = self.lap_start - seconds_before

    def total(self):
        """Seconds since the run began, validations and saves included."""
        return time.perf_counter() - self.start

    def lap(self):
        """Seconds since the last call, without those inside stopped()."""
        now = time.perf_counter()
        elapsed, self.lap_start = now - self.lap_start, now
        self.n_laps += 1
        self.in_laps += elapsed
        return elapsed

    @contextmanager
    def stopped(self):
        stop = time.perf_counter()
        yield
        self.lap_start += time.perf_counter() - stop


class RunLog:
    """Records steps, validations and samples. Only rank 0's is enabled; the others write nothing.

    As a context manager it closes the bar and the files, however the run ends.
    """

    def __init__(self, config, meta, state, max_steps, model, clock, world):
        self.config, self.meta, self.state, self.max_steps = config, meta, state, max_steps
        self.clock, self.world = clock, world
        self.draw_sample = make_sampler(config, meta["tokenizer"], world)
        self.enabled = world.rank == 0
        self.out_dir = Path(config.out_dir)
        self.flops_per_token = model.flops_per_token()
        self.peak_flops = world.reduce(dist.ReduceOp.SUM, matmul_peak(world))
        if world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(world.device)  # from here on, the training's own
        self.tracker = self.file = self.lock = None
        if self.enabled:
            self.open_files()
        self.bar = tqdm(total=max_steps, initial=state.step, unit="step", disable=not self.enabled,
                        mininterval=0.5 if sys.stderr.isatty() else 10.0)
        self.last_line = state.tokens, 0.0  # how many tokens, and seconds in steps, were logged
        self.next_report = time.perf_counter() + 30
        self.disk_is_full = False

    def open_files(self):
        self.out_dir.mkdir(parents=True, exist_ok=True)
        self.lock = lock(self.out_dir / "run.lock")
        for unfinished in self.out_dir.glob("*.unfinished"):  # of a killed run
            unfinished.unlink()
        if self.config.wandb:
            self.tracker = start_wandb(self.config, self.out_dir / "wandb_id", self.state.step > 0)
        if self.config.save_weights:  # study.py recognises a run by its config.json
            options = {**vars(self.config), "code": self.state.code}
            write_atomically(self.out_dir / "config.json", json.dumps(options, indent=1) + "\n")
            if code_state()["changed"] and self.state.code[-1]["step"] == self.state.step:
                of_step = f"_{self.state.step}" if self.state.step else ""
                write_atomically(self.out_dir / f"code{of_step}.diff", code_diff())
        self.file = open_log(self.out_dir / "log.jsonl", self.state.step)
        (self.out_dir / "summary.json").unlink(missing_ok=True)  # of the run before it is extended

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        self.bar.close()
        if self.file:
            try:
                self.file.close()
            except OSError as error:
                print(f"the last lines of {self.file.name} could not be written "
                      f"({describe(error)})", file=sys.stderr)
        if self.lock:
            Path(self.lock.lock_file).unlink(missing_ok=True)
            self.lock.release()

    def step(self, loss, lr, grad_norm, skipped, writes_line):
        """After every step."""
        clipped = not skipped and 0 < self.config.grad_clip < grad_norm
        if writes_line:
            tokens, seconds = self.last_line
            self.last_line = self.state.tokens, self.clock.in_laps
            rate = (self.state.tokens - tokens) / (self.clock.in_laps - seconds)
            # this step's number, from 0; validations and samples have the number of steps done
            self.write({"step": self.state.step - 1, "tokens": self.state.tokens, "loss": loss,
                        "lr": lr, "grad_norm": grad_norm, "clipped": clipped, "skipped": skipped,
                        "tokens_per_second": rate,
                        "mfu": rate * self.flops_per_token / self.peak_flops,
                        "seconds": self.state.seconds})
            self.bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s", refresh=False)
        self.bar.update()

    def validation(self, val_loss, is_best=False):
        if self.enabled:
            best = ", the best so far" if is_best else ""
            tqdm.write(f"step {self.state.step:,}: validation loss {val_loss:.4f}{best}")
        self.write({"step": self.state.step, "tokens": self.state.tokens, "val_loss": val_loss})

    def sample(self, model):
        if not (self.enabled and self.draw_sample):
            return
        text = self.draw_sample(model)
        self.write({"step": self.state.step, "tokens": self.state.tokens, "sample": text})
        shown = "".join(c if c.isprintable() or c == "\n" else " " for c in text)
        tqdm.write(f"step {self.state.step:,}, a sample:\n{textwrap.indent(shown, '  | ')}")

    def write(self, entry):
        if not self.enabled:
            return
        line = json.dumps({key: finite_or_none(value) for key, value in entry.items()}) + "\n"
        was_full, self.disk_is_full = self.disk_is_full, False
        try:
            self.file.write(line)
            self.file.flush()
        except OSError as error:
            self.disk_is_full = True
            if not was_full:
                tqdm.write(f"could not write {self.file.name} ({describe(error)}); its lines are "
                           "kept until there is room", file=sys.stderr)
        if self.tracker:
            values = {key: value for key, value in entry.items() if key != "step"}
            self.tracker.log(values, step=entry["step"])

    def summary(self, best_val_loss):
        state, hours = self.state, self.state.seconds / 3600
        return {"name": self.config.name, "steps": state.step, "tokens": state.tokens,
                "final_val_loss": finite_or_none(state.val_loss),
                "best_val_loss": finite_or_none(best_val_loss),
                "skipped_steps": state.skipped, "seconds": round(state.seconds, 3),
                "tokens_per_second": round(state.tokens_per_second(), 1),
                "peak_memory_mb": round(peak_memory(self.world.device) / 2**20),
                "cost": round(hours * self.config.dollars_per_hour, 2),
                "started": state.started, "ended": utc_now(), "machine": machine(self.world),
                "versions": versions(), "code": state.code}

    def report(self, best_val_loss, stopped=False):
        """Writes report.html, but for a timing run: every 30 seconds, less often if drawing takes
        more than 1 % of the time; when the run ends loss.png too, and summary.json."""
        start, state = time.perf_counter(), self.state
        is_last = state.step == self.max_steps
        is_running = not (is_last or stopped)
        if not self.enabled or is_running and start <= self.next_report:
            return
        summary = self.summary(best_val_loss)
        if is_last:
            write_atomically(self.out_dir / "summary.json", json.dumps(summary, indent=1) + "\n")
        if not self.config.save_weights:
            return
        status = "finished" if is_last else f"step {state.step:,} of {self.max_steps:,}"
        try:
            entries = read_entries(self.file.name)
            write_atomically(self.out_dir / "report.html", run_page(
                vars(self.config), summary, entries, status, is_running))
            if not is_running:  # it takes seconds
                save_picture(run_curves(self.config.name, entries), self.out_dir / "loss.png")
        except Exception as error:  # a picture ends no run
            tqdm.write(f"could not draw the run in {self.out_dir} ({describe(error)})",
                       file=sys.stderr)
        now = time.perf_counter()
        self.next_report = now + max(30, 100 * (now - start))

    def finish(self, best_val_loss):
        """Prints how fast the run was and what to do next, and hands the summary to W&B."""
        if not self.enabled:
            return
        self.bar.close()
        state = self.state
        if state.step < self.max_steps:
            saved = " and saved; the same command with --resume continues from here"
            print(f"stopped after {state.step:,} steps{saved * self.config.save_weights}")
            self.report(best_val_loss, stopped=True)
        if self.tracker:
            if (file := self.out_dir / "summary.json").exists():
                self.tracker.summary.update(json.loads(file.read_text()))
            self.tracker.finish()
        if state.step < self.max_steps:
            return
        rate = state.tokens_per_second()
        flops = rate * self.flops_per_token
        share = f"({flops / self.peak_flops:.1%})"
        if flops > self.peak_flops:
            share = "when the run started, on a busy machine"
        print(f"speed:  {rate:,.0f} tokens/s, {flops / 1e9:,.1f} GFLOP/s of the "
              f"{self.peak_flops / 1e9:,.1f} of matrix products here {share}; peak memory "
              f"{peak_memory(self.world.device) / 2**20:,.0f} MB")
        if self.config.save_weights:
            cost = self.summary(best_val_loss)["cost"]
            cost = f", {cost:,.2f} dollars" if cost else ""
            print(f"done:   {state.tokens:,} tokens in {state.seconds:,.0f} s{cost}; validation "
                  f"loss {state.val_loss:.4f}, best {best_val_loss:.4f}")
            for i, command in enumerate(self.next_commands()):
                print(f"{'' if i else 'next:':8}{shlex.join(command)}")

    def next_commands(self):
        """Commands that work on what a finished run left, from the current folder."""
        config, path = self.config, str(checkpoint_file(self.out_dir))
        measure = ["python", os.path.relpath(ROOT / "eval.py"), "--ckpt", path]
        if config.init_from:  # before and after, on the same documents
            measure[3:3] = [config.init_from]
            measure += [f"--{key}={getattr(config, key)}"
                        for key in ("dataset", "data_dir", "block_size")]
        if self.meta["splits"].get("test", {"tokens": 0})["tokens"] <= config.block_size:
            measure.append("--split=val")
        sample = ["python", os.path.relpath(ROOT / "sample.py"), "--ckpt", path]
        return [measure, sample] if self.draw_sample else [measure]


def lock(path):
    """A lock that only one process can have; the system frees it however that process ends.
    Raises UserError."""
    file_lock = FileLock(path, blocking=False, fallback_to_soft=False)
    try:
        file_lock.acquire()
    except Timeout:
        raise UserError(f"another run is writing to {path.parent}; choose another --out_dir, or "
                        "stop that run first") from None
    except (OSError, NotImplementedError) as error:  # some network disks have no locks
        print(f"note:   {path.parent} cannot be locked ({describe(error)})", flush=True)
    return file_lock


def open_log(path, step):
    """log.jsonl, open for more lines, without damaged ones and those that a killed run wrote after
    its last checkpoint, at `step`."""
    entries = read_entries(path) if step and path.exists() else []
    write_atomically(path, "".join(  # training lines count from 0, the others the steps done
        json.dumps(entry) + "\n" for entry in entries
        if entry["step"] < step + ("loss" not in entry)))
    return open(path, "a", buffering=2**24)  # keeps that many bytes while the disk is full


def finite_or_none(value):
    """A value as JSON can hold it: null where a number is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def matmul_peak(world):
    """Floating-point operations per second of square matrix products, measured on this device now.
    MFU is relative to it, so it needs no table of GPUs. Best of 0.5 s, after a warm-up."""
    on_gpu = world.device.type == "cuda"
    size = 8192 if on_gpu else 1024
    # a CPU without 16-bit units would take seconds for each product
    a = torch.randn(size, size, device=world.device, dtype=world.dtype if on_gpu else None)
    of_operators = torch.get_num_threads()
    torch.set_num_threads(n_threads())  # those that share batches, too
    seconds = shortest(lambda: a @ a, world)
    torch.set_num_threads(of_operators)
    return 2 * size**3 / seconds


def shortest(work, world):
    """Seconds: the shortest of half a second's, after a warm-up."""
    times, end = [], time.perf_counter() + 0.5
    while len(times) < 4 or time.perf_counter() < end:
        world.synchronize()
        start = time.perf_counter()
        work()
        world.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def make_sampler(config, tokenizer_name, world):
    """A function that draws a sample after config.sample_prompt from a model; None for a timing
    run, or if the tokenizer is not there.

    It always draws the same random numbers, from a generator of its own, so samples differ by what
    the model has learnt, and the training is as without them. Raises UserError if sample_every
    needs the tokenizer.
    """
    if not (config.sample_every or config.save_weights):
        return None
    try:
        tokenizer = get_tokenizer(tokenizer_name)
        prompt = encode_prompt(tokenizer, config.sample_prompt, config.vocab_size)
    except UserError as error:
        if config.sample_every:
            raise UserError(f"{error}; or train without --sample_every") from None
        return None  # none at the end, then

    def draw(model):
        model.eval()
        generator = torch.Generator(world.device).manual_seed(config.seed)
        tokens = torch.tensor([prompt], device=world.device)
        text = config.sample_prompt.encode()
        try:
            with world.autocast():
                steps = model.stream(tokens, SAMPLE_TOKENS, generator=generator)
                text += b"".join(text_of(map(int, steps), tokenizer))
        except FloatingPointError as error:  # logits that are not finite end no run
            text += f" (no sample: {error})".encode()
        model.train()
        return text.decode(errors="replace")

    return draw


def start_wandb(config, id_file, resumed):
    """The Weights & Biases run to log to. A resumed run continues its own, whose id is in id_file.
    Raises UserError."""
    try:
        from wandb import init  # `import wandb` would find wandb's own output folder
        tracker = init(project=config.wandb, name=config.name, config=vars(config), resume="allow",
                       id=id_file.read_text() if resumed and id_file.exists() else None,
                       allow_val_change=True)
    except Exception as error:  # network or account problems, in many classes
        raise UserError(f"Weights & Biases did not start ({describe(error)}); pip install wandb "
                        "and run `wandb login`, set WANDB_MODE=offline, or leave out "
                        "--wandb") from None
    write_atomically(id_file, tracker.id)
    return tracker
