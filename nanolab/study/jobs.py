"""Makes the runs of a study: what is missing is trained, what was stopped goes on, what is trained
is tested. Each is a process of train.py, then one of eval.py."""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from config import OPTIONS, Config
from nanolab.common import ROOT, StopSignal, UserError
from nanolab.data import read_meta
from nanolab.options import load, read_config_file, split_command_line
from nanolab.study.runs import read_json, read_run, relevant_options


def plan(args):
    """{folder: its command line after train.py}, seed by seed, so that a study that is stopped has
    whole pairs.

    args: study.py's. Raises UserError, before anything runs, for what does not fit.
    """
    experiments = [(args.baseline, []), *map(parse_arm, args.arms)]
    names = [name for name, _ in experiments]
    for name, words in experiments:
        if names.count(name) > 1 or name in ("", ".", "..") or "/" in name:
            raise UserError(f"'{name}' cannot be the name of an arm: each needs its own, without "
                            "/; --arms NAME='...' gives it one", exit_code=2)
        check_flags(args.words, words)
    jobs = {}
    for seed in args.seeds:
        for name, words in experiments:
            folder = f"{args.out}/{name}/{seed}"
            words = [*args.words, *words, f"--name={name}", f"--seed={seed}", f"--out_dir={folder}"]
            check_earlier(folder, load(Config, words))
            jobs[folder] = [*words, "--resume"]
    return jobs


def parse_arm(arm):
    """An arm: a name in config/interventions/, a config file, or NAME=WORDS. -> name, words"""
    name, equals, words = arm.partition("=")
    if equals:
        try:
            return name, shlex.split(words)
        except ValueError as error:
            raise UserError(f"the arm {arm!r} cannot be read: {error}", exit_code=2) from None
    if arm.endswith(".py"):
        return Path(arm).stem, [arm]
    return arm, [os.path.relpath(ROOT / f"config/interventions/{arm}.py")]


def check_flags(base, words):
    """Raises UserError for a flag that a study sets itself, and where one of all runs would win
    over a file of one arm."""
    (_, shared), (files, own) = (split_command_line(each, OPTIONS) for each in (base, words))
    for key, _ in shared + own:
        if key in ("name", "seed", "out_dir", "resume", "extend", "dry_run", "save_weights"):
            raise UserError(f"--{key} is no flag for a study: how its runs are named, seeded, "
                            "saved and resumed, it decides itself", exit_code=2)
    for file in files:
        for key in dict(read_config_file(file)).keys() & dict(shared).keys() - dict(own).keys():
            raise UserError(f"--{key} would win over {file}, which sets it too; write it into a "
                            "config file instead, or give this arm its own", exit_code=2)


def check_earlier(folder, config):
    """Raises UserError if the folder has a run with other options."""
    path = Path(folder, "config.json")
    if not path.exists():
        return
    earlier = read_json(path)
    if config.epochs:  # config.json has the steps that they come to
        from nanolab.start import with_budget
        size = config.block_size or earlier["block_size"]
        config = with_budget(replace(config, block_size=size), read_meta(
            config.data_dir, config.dataset, earlier["vocab_size"]))
    then, now = (relevant_options({"config": each}) for each in (earlier, vars(config)))
    for key in now.keys() & then.keys() - {"vocab_size"}:
        if now[key] != then[key] and now[key] is not None:  # None: init_from decides
            raise UserError(f"{folder} was made with {key}={then[key]!r}, not {now[key]!r}; choose "
                            "another --out, or delete that folder", exit_code=2)


def make_runs(jobs, args, draw):
    """Does what is not done yet, args.jobs at a time. Ctrl-C, SIGTERM and SIGHUP let the runs save
    and stop.

    draw: is called with a sentence about how far the study is, every 30 seconds and in at most 1 %
    of the time. -> the last sentence, {folder: why its run failed}, and whether it was stopped.
    """
    stop, environments = StopSignal(), each_environment(args.jobs, args.threads)
    thread = threading.local()  # each has an environment of its own

    def take_environment():
        thread.environment = environments.pop()

    done = {folder for folder in jobs if measured_loss(folder, args.loss)}
    failures, next_page = {}, time.perf_counter() + 5

    def make(folder):
        """Trains a run and tests it, as far as that is not done."""
        if not is_trained(folder) and not stop.requested:
            last_words = call([ROOT / "train.py", *jobs[folder]], folder, thread.environment, stop)
        if is_trained(folder) and not measured_loss(folder, args.loss) and not stop.requested:
            last_words = call([ROOT / "eval.py", "--ckpt", f"{folder}/best.pt"], folder,
                              thread.environment, stop)
        if measured_loss(folder, args.loss):
            done.add(folder)
        elif not stop.requested:
            failures[folder] = last_words
            tqdm.write(f"{folder} failed: {last_words}")

    def status():
        failed = f", {len(failures)} failed" if failures else ""
        return f"{len(done)} of {len(jobs)} runs are done{failed}"

    bar = tqdm(total=len(jobs), initial=len(done), unit="run", smoothing=0, miniters=0,
               mininterval=1 if sys.stderr.isatty() else 60)
    with bar, ThreadPoolExecutor(args.jobs, initializer=take_environment) as pool:
        pending = [pool.submit(make, folder) for folder in jobs if folder not in done]
        while not all(each.done() for each in pending):
            time.sleep(0.5)
            bar.update(len(done) + len(failures) - bar.n)
            start = time.perf_counter()
            if start > next_page:
                draw(status())
                next_page = start + max(30, 101 * (time.perf_counter() - start))
        for each in pending:
            each.result()  # raises what it raised
    return status(), failures, stop.requested


def is_trained(folder):
    return Path(folder, "summary.json").exists()


def measured_loss(folder, loss):
    """A run's loss; None or False until it is known."""
    run = is_trained(folder) and read_run(f"{folder}/best.pt", validation=loss == "val_loss")
    return run and run[loss]


def each_environment(n_jobs, threads):
    """What each of n_jobs finds in its environment: so many CPU threads, and its own GPU if there
    are some; jobs share GPUs where there are more of them."""
    import torch
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(
        map(str, range(torch.cuda.device_count())))
    gpus = gpus.split(",")
    return [{**os.environ, "OMP_NUM_THREADS": str(threads),
             "CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} for slot in range(n_jobs)]


def call(command, folder, environment, stop):
    """A script of ours, from its start to its end, in a session of its own, which Ctrl-C does not
    reach. What it prints goes to output.txt. -> the last line: of an error, its reason"""
    output = Path(folder, "output.txt")
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output, "ab") as file:
        process = subprocess.Popen([sys.executable, *command], env=environment, stdout=file,
                                   stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                   start_new_session=True)
    while process.poll() is None:
        if stop.requested:
            process.terminate()  # train.py saves; a second request changes nothing
        time.sleep(0.5)
    if (number := -process.returncode) > 0:
        memory = ", perhaps because memory ran out" if number == signal.SIGKILL else ""
        return f"killed by signal {number}{memory}"
    lines = output.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"it ended with {process.returncode}"
