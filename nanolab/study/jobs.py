"""Makes the runs of a study: what is missing is trained, what was stopped goes on, what is trained
is tested. Each is a process of train.py, then one of eval.py."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from config import OPTIONS, Config
from nanolab.common import StopSignal, UserError
from nanolab.options import load, read_config_file, split_command_line
from nanolab.plots import last_entry
from nanolab.study.runs import read_json, read_run, relevant_options
from nanolab.study.tables import budget

BAR = "{percentage:3.0f} %|{bar}| {n:.1f} of {total} runs, {elapsed} so far, {remaining} left"


@dataclass
class Job:
    """A run of a study. words: its command line after train.py; loss: which one is wanted."""
    folder: str
    words: list
    loss: str = "test_loss"

    def result(self):
        """The wanted loss; None until it is known."""
        if not Path(self.folder, "summary.json").exists():
            return None
        run = read_run(f"{self.folder}/best.pt", validation=self.loss == "val_loss")
        return run and run[self.loss]

    def next_command(self):
        if not Path(self.folder, "summary.json").exists():
            return ["train.py", *self.words]
        return None if self.result() else ["eval.py", "--ckpt", f"{self.folder}/best.pt"]

    def fraction(self):
        """How much of it is done, 0 to 1."""
        if Path(self.folder, "summary.json").exists():
            return 1.0
        entry = last_entry(Path(self.folder, "log.jsonl"))
        if not entry:
            return 0.0
        config = read_json(Path(self.folder, "config.json"))
        return entry["tokens"] / budget([{"config": config}])


def plan(args):
    """The jobs of a study, seed by seed, so that a study that is stopped has whole pairs.

    args: study.py's. Raises UserError, before anything runs, for what does not fit.
    """
    experiments = [(args.baseline, []), *map(parse_arm, args.arms)]
    names = [name for name, _ in experiments]
    for name, words in experiments:
        if names.count(name) > 1 or not name or "/" in name:
            raise UserError(f"'{name}' cannot be the name of an arm: each needs its own, without "
                            "/; --arms NAME='...' gives it one", exit_code=2)
        check_flags(args.words, words)
    jobs = []
    for seed in range(1, args.seeds + 1):
        for name, words in experiments:
            folder = f"{args.out}/{name}/{seed}"
            words = [*args.words, *words, f"--name={name}", f"--seed={seed}", f"--out_dir={folder}"]
            check_earlier(folder, load(Config, words))
            jobs.append(Job(folder, [*words, "--resume"], args.loss))
    return jobs


def parse_arm(arm):
    """An arm: a name in config/interventions/, a config file, or NAME=WORDS. -> name, words"""
    name, equals, words = arm.partition("=")
    if equals:
        return name, shlex.split(words)
    if arm.endswith(".py"):
        return Path(arm).stem, [arm]
    return arm, [f"config/interventions/{arm}.py"]


def check_flags(base, words):
    """Raises UserError where a flag of all runs would win over a file of one arm."""
    (_, shared), (files, own) = (split_command_line(each, OPTIONS) for each in (base, words))
    for file in files:
        for key in dict(read_config_file(file)).keys() & dict(shared).keys() - dict(own).keys():
            raise UserError(f"--{key} would win over {file}, which sets it too; write it into a "
                            "config file instead, or give this arm its own", exit_code=2)


def check_earlier(folder, config):
    """Raises UserError if the folder has a run with other options."""
    path = Path(folder, "config.json")
    if not path.exists():
        return
    then, now = relevant_options({"config": read_json(path)}), relevant_options(
        {"config": vars(config)})
    resolved = {"vocab_size", "max_steps", "epochs"} if config.epochs else {"vocab_size"}
    for key in now.keys() & then.keys() - resolved:
        if now[key] != then[key] and now[key] is not None:  # None: init_from decides
            raise UserError(f"{folder} was made with {key}={then[key]!r}, not {now[key]!r}; choose "
                            "another --out, or delete that folder", exit_code=2)


def make_runs(jobs, args, report):
    """Does what is not done yet, args.jobs at a time. Ctrl-C, SIGTERM and SIGHUP let the runs save
    and stop.

    report: is called all the time with a sentence about how far the study is.
    -> the last of these, {folder: why its run failed}, and whether the study was stopped.
    """
    def progress():
        return sum(1.0 if job.folder in failures else job.fraction() for job in jobs)

    def status():
        n_done = sum(not job.next_command() for job in jobs)
        numbers = ((len(running), "running"), (len(failures), "failed"))
        return f"{n_done} of {len(jobs)} runs are done" + "".join(
            f", {n} {word}" for n, word in numbers if n)

    stop, failures, running = StopSignal(), {}, {}
    waiting = [job for job in jobs if job.next_command()]
    slots = environments(args.jobs, args.threads)
    bar = tqdm(total=len(jobs), initial=progress(), smoothing=0, miniters=0, bar_format=BAR,
               mininterval=1 if sys.stderr.isatty() else 60)
    while running or waiting and not stop.requested:
        for slot in [slot for slot in range(args.jobs) if slot not in running]:
            if waiting and not stop.requested:
                running[slot] = waiting[0], start(waiting.pop(0), slots[slot])
        bar.update(progress() - bar.n)
        report(status())
        time.sleep(0.5)
        for slot, (job, process) in list(running.items()):
            if stop.requested and process.poll() is None:
                process.terminate()  # train.py saves; a second request changes nothing
            if process.poll() is None:
                continue
            command = job.next_command()
            if command and command != process.args[1:] and not stop.requested:
                running[slot] = job, start(job, slots[slot])  # trained: now the test
                continue
            del running[slot]
            if not command:
                tqdm.write(f"{job.folder}: {job.loss.replace('_', ' ')} {job.result():.4f}")
            elif not stop.requested:
                failures[job.folder] = last_words(job) or f"it ended with {process.returncode}"
                tqdm.write(f"{job.folder} failed: {failures[job.folder]}")
    bar.close()
    return status(), failures, stop.requested


def environments(n_jobs, threads):
    """What each of n_jobs finds in its environment: so many CPU threads, and its own GPU if there
    are some; jobs share GPUs where there are more of them."""
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if not any(gpus) and "CUDA_VISIBLE_DEVICES" not in os.environ and shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
        gpus = re.findall(r"UUID: (GPU-[\w-]+)", listed.stdout)
    gpus = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus if gpu] or [{}]
    return [{**os.environ, "OMP_NUM_THREADS": str(threads), **gpus[slot % len(gpus)]}
            for slot in range(n_jobs)]


def start(job, environment):
    """Starts what comes next for a job, in a session of its own, which Ctrl-C does not reach. What
    it prints goes to output.txt."""
    script, *words = job.next_command()
    path = output_of(job)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as output:
        return subprocess.Popen([sys.executable, script, *words], env=environment, stdout=output,
                                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                start_new_session=True)


def output_of(job):
    return Path(job.folder, "output.txt")


def last_words(job):
    """The last line that a job's process printed: of an error, its reason."""
    lines = re.split(r"[\r\n]+", output_of(job).read_text(errors="replace"))
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
