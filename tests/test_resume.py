"""Stopped, killed, restarted: a resumed run is the run that would have been; another run is
refused."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

import config
import train
from conftest import HERE, SMALL, assert_same_run, call, equal_weights, losses, write_script
from nanolab.checkpoint import CheckpointSaver, read_checkpoint
from nanolab.common import UserError
from nanolab.logfile import read_log


def stop_at(step, number=signal.SIGINT):
    """A learning-rate schedule that is interrupted in its step `step`, as by Ctrl-C."""
    real = train.learning_rate_at

    def learning_rate_at(now, steps, options):
        if now == step:
            os.kill(os.getpid(), number)
        return real(now, steps, options)
    return learning_rate_at


@pytest.mark.parametrize("amp, optimizer, schedule", [("off", "adamw", "cosine"),
                                                      ("float16", "adamw", "cosine"),
                                                      ("float16", "normuon", "wsd")])
def test_resume_is_exact(small_run, tiny_data, monkeypatch, amp, optimizer, schedule):
    """Stopped after any step and resumed, with dropout and a shuffled order, over epoch borders:
    bit for bit the run that would have been, and a log without gaps or repeats."""
    flags = [*tiny_data, f"--schedule={schedule}", "--eval_every=4", "--max_steps=12",
             f"--amp={amp}", f"--optimizer={optimizer}"]
    if schedule == "wsd":  # with all that came later; steps 8 to 12 are the tail
        flags += ["--cautious_decay", "--weight_decay=5", "--tail_average=0.42", "--x0_lambdas",
                  "--value_embeddings", "--head_lr=2"]
    whole = small_run("whole", *flags)
    assert read_checkpoint(whole / "last.pt")["step"] == 12 and int(losses(whole)[0]) == 5
    for step in (0, 4, 7, 10):
        monkeypatch.setattr(train, "learning_rate_at", stop_at(step))
        parts = small_run(f"stopped{step}", *flags)
        monkeypatch.undo()
        assert read_checkpoint(parts / "last.pt")["step"] == step + 1
        with open(parts / "log.jsonl", "a") as file:  # a killed run logs more than it saves
            file.write(
                f'{{"step": {step + 1}, "tokens": 1, "loss": 0}}\n{{"step": {step + 2}, "tok')
        small_run(f"stopped{step}", *flags, "--resume")
        assert_same_run(whole, parts)


def test_resume_on_two_processes(small_run, tiny_data, tmp_path):
    """Two processes resume exactly; and a run may go from one process to two and back on the same
    curve."""
    def two(name, steps, *flags):
        result = call("train.py", *SMALL, *tiny_data, "--batch_size=4",
                      f"--out_dir={tmp_path / name}", f"--max_steps={steps}", *flags, processes=2)
        assert result.returncode == 0, result.stderr
    two("whole", 12)
    two("parts", 5)
    two("parts", 12, "--resume")
    assert equal_weights(tmp_path / "whole/last.pt", tmp_path / "parts/last.pt")
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    small_run("moved", *tiny_data, "--batch_size=4", "--max_steps=4")
    two("moved", 8, "--resume")
    small_run("moved", *tiny_data, "--batch_size=4", "--max_steps=12", "--resume")
    assert losses(tmp_path / "moved") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


KILL_AT_RANDOM = """
import random, time
import matplotlib.pyplot, torch._dynamo  # once, and not in each child
from pathlib import Path
import nanolab.runlog
from nanolab.checkpoint import read_checkpoint
nanolab.runlog.matmul_peak = lambda *args: 1.0  # it takes longer than a step
random.seed(1)
flags, out_dir = sys.argv[2:], Path(sys.argv[1])
last = out_dir / "last.pt"

def start():
    child = os.fork()
    if child == 0:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1), os.dup2(devnull, 2)
        try:
            train.train(config.load(flags))
        finally:
            os._exit(1 if sys.exc_info()[0] else 0)
    return child

steps = []
while len(steps) < 50:
    before = last.exists() and last.stat().st_mtime_ns
    child = start()
    if len(steps) % 2:  # first wait until it has saved
        deadline = time.monotonic() + 5
        while not last.exists() or last.stat().st_mtime_ns == before:
            if time.monotonic() > deadline:
                break  # it ended without a save
            time.sleep(0.001)
        time.sleep(random.uniform(0.0, 0.1))
    else:
        time.sleep(random.uniform(0.0, 0.3))
    os.kill(child, signal.SIGKILL)
    if os.waitpid(child, 0)[1] == 0:
        break  # it ended before it was killed
    if (out_dir / "best.pt").exists():
        read_checkpoint(out_dir / "best.pt")
    steps.append(read_checkpoint(last)["step"] if last.exists() else 0)
print("KILLED", len(steps), "AT", steps)
assert len(steps) == 50 and len(set(steps)) > 15
status = os.waitpid(start(), 0)[1]
print("FINISHED", status)
"""


def test_killed_at_any_moment(small_run, tiny_data, tmp_path):
    """SIGKILL at 50 random moments, half of them after a save, of a run that saves at every step:
    always a whole checkpoint or none, and in the end the run that would have been."""
    flags = [*tiny_data, "--max_steps=1000", "--eval_every=10", "--eval_tokens=16",
             "--save_every=1", "--tail_average=0.5"]
    script = write_script(tmp_path / "kill.py", KILL_AT_RANDOM)
    killed = call(script, tmp_path / "killed", *SMALL, *flags, f"--out_dir={tmp_path / 'killed'}",
                  "--resume")
    assert "FINISHED 0" in killed.stdout, killed.stdout + killed.stderr
    print(killed.stdout)
    whole = small_run("whole", *flags, "--save_every=0")
    assert_same_run(whole, tmp_path / "killed")


SIGNAL_ONE_RANK = """
real_loss = train.mean_loss

def mean_loss(*args, **kwargs):
    if where == "validation":
        ask()
    return real_loss(*args, **kwargs)

def save_checkpoint(path, checkpoint):
    if where == "saving":
        ask()
    return real_save(path, checkpoint)

def ask():
    if os.environ["RANK"] == os.environ.pop("WHO", ""):
        os.kill(os.getpid(), getattr(signal, os.environ["SIGNAL"]))

where, real_save = os.environ["WHERE"], nanolab.checkpoint.save_checkpoint
train.mean_loss, nanolab.checkpoint.save_checkpoint = mean_loss, save_checkpoint
train.main()
"""


@pytest.mark.parametrize("where, who, number",
                         [("validation", 1, "SIGTERM"), ("saving", 0, "SIGINT")])
def test_asked_to_stop_in_one_rank(tmp_path, data_dir, where, who, number):
    """A signal to one rank, in a validation or a save, stops all after the same step, saved, with
    exit code 0."""
    script = write_script(tmp_path / "ask.py", SIGNAL_ONE_RANK)
    flags = [*SMALL, "--dataset=stdlib", f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'out'}",
             "--batch_size=4", "--max_steps=500", "--eval_every=5", "--save_every=5"]
    result = call(script, *flags, processes=2, WHERE=where, WHO=str(who), SIGNAL=number)
    assert result.returncode == 0, result.stderr
    step = read_checkpoint(tmp_path
                           / "out/last.pt")["step"]  # a save goes on beside the steps after it
    assert "--resume" in result.stdout and step == len(losses(
        tmp_path / "out")) and 6 <= step <= (6 if where == "validation" else 20)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_asked_to_stop_by_the_command_line(tmp_path, data_dir, number):
    """As Ctrl-C, kill or a closed terminal would: it saves, says how to go on, exits with 0."""
    process = start_long_run(tmp_path, data_dir)
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and "--resume" in out
    assert read_checkpoint(tmp_path / "out" / "last.pt")["step"] == len(losses(tmp_path / "out"))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_torchrun_is_stopped(tmp_path, data_dir, number):
    """Killed or interrupted, torchrun leaves no process behind; its processes save, and give no
    traceback of ours."""
    torchrun = subprocess.Popen([
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        "train.py", *SMALL, "--dataset=stdlib", f"--data_dir={data_dir}", "--batch_size=4",
        "--max_steps=100000", f"--out_dir={tmp_path / 'out'}"
    ], cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "out" / "log.jsonl"
    while not (log.exists() and log.read_text()):
        time.sleep(0.05)
        assert torchrun.poll() is None
    torchrun.send_signal(number)
    stderr = torchrun.communicate(timeout=60)[1]  # ends when no process has the pipe any more
    assert read_checkpoint(tmp_path / "out" / "last.pt")["step"] == len(losses(tmp_path / "out"))
    assert "train.py" not in stderr and not (tmp_path / "out" / "run.lock").exists()


@pytest.mark.parametrize("script", ["train.py", "eval.py", "sample.py", "model.py", "prepare.py"])
def test_ctrl_c_while_it_imports(script):
    """One line, no traceback."""
    argv = ["export", "a", "b"
            ] if script == "model.py" else ["stdlib"] if script == "prepare.py" else []
    code = f"""if True:
        import os, runpy, signal, sys
        class Interrupt:
            def find_spec(self, name, *args):
                if name == "numpy":
                    os.kill(os.getpid(), signal.SIGINT)
        sys.meta_path.insert(0, Interrupt())
        sys.path.insert(0, {str(HERE)!r})
        sys.argv = {[script, *argv]!r}
        runpy.run_path({str(HERE / script)!r}, run_name="__main__")"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE)
    assert result.returncode == 130 and result.stderr == f"{script}: stopped before it began\n"
    assert not result.stdout


def test_second_ctrl_c_ends_at_once(tmp_path, data_dir):
    process = start_long_run(tmp_path, data_dir, "--eval_every=1",
                             "--eval_tokens=10_000_000")  # it is in a long validation
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    assert process.wait(timeout=2) == -signal.SIGINT


def start_long_run(tmp_path, data_dir, *flags):
    process = subprocess.Popen([sys.executable, "train.py", *SMALL, "--dataset=stdlib",
                                f"--data_dir={data_dir}", "--max_steps=100000",
                                f"--out_dir={tmp_path / 'out'}",
                                *flags], cwd=HERE, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True)
    log = tmp_path / "out" / "log.jsonl"
    while not (log.exists() and log.read_text()):
        time.sleep(0.05)
        assert process.poll() is None
    return process


DIE_ONCE = """
real = train.learning_rate_at

def learning_rate_at(step, steps, options):
    if step == 7 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(step, steps, options)

train.learning_rate_at = learning_rate_at
train.main()
"""


def test_torchrun_restarts_resume(small_run, tmp_path, tiny_data):
    """`torchrun --max-restarts=3`: a rank that dies, and the run goes on from its last checkpoint
    by itself."""
    script = write_script(tmp_path / "die.py", DIE_ONCE)
    flags = [*tiny_data, "--batch_size=4", "--save_every=3"]
    result = subprocess.run([
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        "--max-restarts=3",
        str(script), *SMALL, *flags, f"--out_dir={tmp_path / 'out'}"
    ], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "resume: at step 6" in result.stdout
    assert losses(tmp_path / "out") == pytest.approx(losses(small_run("one", *flags)), rel=1e-5)


def test_another_torchrun_does_not_resume(small_run, monkeypatch):
    """A process that torchrun restarts resumes the run of the same torchrun only."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    small_run("run", "--max_steps=2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(UserError, match="holds a run already"):
        small_run("run", "--max_steps=4")


def test_a_tail_goes_on(small_run, monkeypatch):
    """From a copy of best.pt inside the tail too; and extended, the mean goes on counting, under a
    name of its own, or starts again in the new tail."""
    flags = ["--tail_average=0.5", "--eval_every=8", "--name=tail"]
    whole = small_run("whole", *flags)
    monkeypatch.setattr(train, "learning_rate_at", stop_at(8))
    parts = small_run("parts", *flags)
    monkeypatch.undo()
    best = read_checkpoint(parts / "best.pt")
    assert (best["step"], best["averaged_steps"]) == (8, 3)
    os.replace(parts / "best.pt", parts / "last.pt")
    small_run("parts", *flags, "--resume")
    assert equal_weights(whole / "last.pt", parts / "last.pt")
    for steps, n_averaged in ((12, 7), (40, 20)):
        folder = small_run("whole", *flags, "--resume", "--extend", f"--max_steps={steps}")
        last = read_checkpoint(folder / "last.pt")
        assert (last["step"], last["averaged_steps"]) == (steps, n_averaged)
        assert last["config"]["name"].startswith("tail_extended_10")


@pytest.mark.parametrize("flag", ["--learning_rate=0.5", "--n_layer=3", "--block_size=8",
                                  "--global_batch_size=16", "--seed=1", "--dropout=0.3",
                                  "--tail_average=0.1", "--order=sequential", "--amp=bfloat16",
                                  "--weight_decay=0", "--optimizer=muon", "--compile=True"])
def test_resume_refuses_another_run(finished_run, flag):
    key = flag[2:].split("=")[0]
    with pytest.raises(
            UserError,
            match=f"belongs to another run: .*{'init_seed' if key == 'seed' else key} was .*, is "):
        finished_run("--resume", flag)


@pytest.mark.parametrize("schedule",
                         ["--warmup_fraction=0.5", "--schedule=cosine", "--tail_average=0.5"])
def test_a_schedule_fixes_the_number_of_steps(small_run, schedule):
    """The learning rate of each step depends on it, or where the tail starts, so a run of another
    length is another run."""
    small_run("run", schedule, "--max_steps=2")
    with pytest.raises(UserError, match="max_steps was 2, is 4"):
        small_run("run", schedule, "--max_steps=4", "--resume")


def test_resume_allows_what_changes_nothing(finished_run, small_run):
    folder = finished_run("--resume", "--max_steps=14", "--batch_size=2", "--device=cpu",
                          "--eval_every=3", "--save_every=2", "--log_every=2",
                          "--dollars_per_hour=2", "--name=other")
    assert read_checkpoint(folder / "last.pt")["step"] == 14
    small_run("no_dropout", "--max_steps=2")  # then compiled code draws no other masks
    folder = small_run("no_dropout", "--max_steps=4", "--compile=False", "--resume")
    assert read_checkpoint(folder / "last.pt")["step"] == 4


@pytest.mark.parametrize("schedule", ["constant", "wsd"])
def test_an_extended_run_is_the_longer_run(small_run, tiny_data, monkeypatch, schedule):
    """Stopped at a learning rate that a longer run has there too, it becomes that run, bit for
    bit."""
    flags = [*tiny_data, f"--schedule={schedule}", "--eval_every=4"]
    whole = small_run("whole", *flags, "--max_steps=24")
    if schedule == "wsd":
        monkeypatch.setattr(train, "learning_rate_at", stop_at(11))  # wsd falls in the last 3 of 16
    parts = small_run("parts", *flags, "--max_steps=16" if schedule == "wsd" else "--max_steps=12")
    monkeypatch.undo()
    assert (parts / "summary.json").exists() == (schedule == "constant")
    monkeypatch.setattr(train, "learning_rate_at", stop_at(15))
    resume(parts, "--extend", "--max_steps=24")
    monkeypatch.undo()
    assert not (parts / "summary.json").exists(), "it has not ended"
    resume(parts)
    assert_same_run(whole, parts)
    assert read_checkpoint(parts / "last.pt")["config"]["name"] == "baseline"


def test_an_extended_cosine_has_a_name_of_its_own(small_run, tiny_data, capsys):
    """It gets the tail of the longer run, whose beginning it did not have; the name says so from
    then on."""
    flags = [*tiny_data, "--schedule=cosine", "--warmup_fraction=0.25", "--name=short"]
    whole = small_run("whole", *flags, "--max_steps=12")
    parts = small_run("parts", *flags, "--max_steps=8")
    resume(parts, "--extend", "--max_steps=10")
    assert "this one is now short_extended_8" in capsys.readouterr().out
    resume(parts, "--extend", "--max_steps=12")
    small_run("parts", *flags, "--max_steps=12", "--resume")
    assert f"{parts} is finished: 12 steps" in capsys.readouterr().out
    rates, longer = ([entry["lr"] for entry in read_log(folder / "log.jsonl")[0]]
                     for folder in (parts, whole))
    assert rates[10:] == longer[10:] and rates[2:8] != longer[2:8]
    assert read_checkpoint(parts / "last.pt")["config"]["name"] == "short_extended_8_extended_10"


def test_resume_by_the_folder_alone(small_run, tiny_data, tmp_path):
    """--resume --out_dir=X takes the options from X/config.json. Flags win: a folder that was
    moved, a seed of another run."""
    flags = [*tiny_data, "--n_layer=1", "--seed=7", "--max_tokens=1920", "--max_steps=0"]
    small_run("run", *flags).rename(tmp_path / "moved")
    resume(tmp_path / "moved", "--max_tokens=2560")
    assert len(losses(tmp_path / "moved")) == 20
    with pytest.raises(UserError, match="init_seed was 7, is 8"):
        resume(tmp_path / "moved", "--seed=8")
    (tmp_path / "moved" / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="config.json is damaged"):
        resume(tmp_path / "moved")


def resume(folder, *flags):
    train.train(config.load(["--resume", f"--out_dir={folder}", *flags]))


@pytest.fixture
def finished_run(small_run, tiny_data):
    """A run of 10 steps; called with flags, it runs once more."""
    small_run("run", *tiny_data)
    return lambda *flags: small_run("run", *tiny_data, *flags)


def test_a_finished_run_has_its_summary(small_run, tmp_path, monkeypatch):
    """Killed as soon as last.pt is written, it has summary.json: --resume would not make one."""
    save_last = CheckpointSaver.save_last

    def save_and_die(*args, **kwargs):
        save_last(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointSaver, "save_last", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        small_run("run", "--max_steps=2")
    assert read_checkpoint(tmp_path / "run/last.pt")["step"] == 2
    assert (tmp_path / "run/summary.json").exists()


def test_a_second_run_does_not_overwrite_the_first(finished_run, capsys):
    with pytest.raises(UserError, match="--resume"):
        finished_run()
    finished_run("--resume")
    assert "is finished: 10 steps are done" in capsys.readouterr().out


def test_two_runs_in_one_folder(tmp_path, data_dir):
    """The second is one line with the first one's process, with and without --resume, and changes
    nothing; after a kill of the first the folder is free."""
    first = start_long_run(tmp_path, data_dir, "--save_every=5")
    while not (tmp_path / "out" / "last.pt").exists():
        time.sleep(0.05)
    config_json = (tmp_path / "out" / "config.json").read_text()
    command = ["train.py", *SMALL, "--dataset=stdlib", f"--data_dir={data_dir}",
               f"--out_dir={tmp_path / 'out'}", "--resume"]
    second = call(*command, "--max_steps=100000", "--save_every=5", "--name=second")
    assert second.returncode == 1 and "Traceback" not in second.stderr
    assert second.stderr.splitlines()[-1].startswith(
        f"train.py: another run is writing to {tmp_path / 'out'} (process {first.pid} on ")
    assert first.poll() is None and (tmp_path / "out" / "config.json").read_text() == config_json
    first.kill()
    first.wait()
    step = read_checkpoint(tmp_path / "out" / "last.pt")["step"]
    third = call(*command, f"--max_steps={step + 2}")
    assert third.returncode == 0, third.stderr
    assert not (tmp_path / "out" / "run.lock").exists()


def test_a_disk_without_locks(small_run, tiny_data, monkeypatch, capsys):
    """Some network disks have none: a note, and the run goes on."""
    def no_lock(*args):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr("fcntl.flock", no_lock)
    folder = small_run("run", *tiny_data, "--max_steps=2")
    assert "cannot be locked (No locks available)" in capsys.readouterr().out
    assert (folder / "summary.json").exists() and not (folder / "run.lock").exists()


def test_a_damaged_log_is_reported(small_run, tiny_data, capsys):
    """Garbage in log.jsonl does not stop a resumed run: the good lines stay, the file as it was is
    kept, one line says so."""
    flags = [*tiny_data, "--max_steps=4"]
    folder = small_run("run", *flags)
    log = folder / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    garbage = [b"5\n", b"null\n", b'{"a": 1}\n', b'{"step": "x"}\n', b"\xff\n",
               b"[" * 100_000 + b"\n"]
    damaged = b"".join([lines[0], *garbage, *lines[1:]])
    log.write_bytes(damaged)
    capsys.readouterr()
    small_run("run", *flags, "--resume", "--max_steps=6")
    assert f"{log} has {len(garbage)} damaged lines" in capsys.readouterr().out
    assert (folder / "log.damaged.jsonl").read_bytes() == damaged
    assert [entry["step"] for entry in read_log(log)[0]] == [0, 1, 2, 3, 4, 5]
