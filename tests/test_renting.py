"""A rented box: --on_save, runs/cloud.sh after a lost connection and a kill, runs/slurm.sh."""

import contextlib
import os
import pathlib
import pty
import signal
import stat
import subprocess
import sys
import threading

import pytest

from conftest import HERE, SMALL, losses, read_json, run_quickly, wait_for
from nanolab.checkpoint import read_checkpoint

ENV = {**os.environ, "VIRTUAL_ENV": sys.prefix,
       "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"}


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="runs/cloud.sh is for Linux")


def bash(script, *flags, **env):
    return subprocess.run(["bash", f"runs/{script}", *flags], cwd=HERE, env={**ENV, **env},
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=400)


def test_on_save(small_run, tmp_path):
    """While the first command runs, all other files are saved. It is let go after the last one,
    and then one more runs, which has seen them all."""
    out, copy = tmp_path / "run", tmp_path / "copy"
    command = (f"cd {tmp_path}; mkdir lock || echo two at once >>wrong; cp -r {out}/. {copy}; "
               "while [ ! -e go ]; do sleep 0.1; done; echo done >>done; rmdir lock")
    copy.mkdir()

    def let_go():  # summary.json is written before the last file
        made = [out / "summary.json", out / "last.pt"]
        wait_for(lambda: made[0].exists() and made[0].stat().st_mtime < made[1].stat().st_mtime)
        (tmp_path / "go").touch()

    threading.Thread(target=let_go, daemon=True).start()
    small_run("run", f"--on_save={command}", "--save_every=2", "--eval_every=4")
    assert not (tmp_path / "wrong").exists() and not (tmp_path / "lock").exists()
    assert (tmp_path / "done").read_text().split() == ["done"] * 2
    assert read_checkpoint(copy / "last.pt")["step"] == 10
    assert read_json(copy / "summary.json")["steps"] == 10


def test_on_save_that_fails(small_run, capsys):
    small_run("run", "--on_save=echo first >&2; echo no route >&2; exit 3")
    printed = capsys.readouterr().err
    assert "--on_save failed (no route): echo first" in printed and "\nfirst" not in printed


def ranks_of(out):
    """The process ids of the ranks that train in a folder."""
    found = []
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes()
            if b"\0-u\0train.py\0" in words and str(out).encode() in words:
                found.append(int(process.name))
    return found


@on_linux
def test_cloud(data_dir, tmp_path):
    """A terminal that is closed ends nothing; a rank that is killed is started again; the same
    command shows the run to its end, with a test result and an exported model."""
    out, n = tmp_path / "out", 200
    env = {"PROCESSES": "2", "CONFIG": "config/modern.py", "DATASET": "stdlib", "OUT_DIR": str(out),
           "DATA_DIR": str(data_dir), "DOLLARS_PER_HOUR": "12",
           "ON_SAVE": f"cp {out}/last.pt {tmp_path}/copy.pt"}
    flags = [*SMALL, "--batch_size=4", "--save_every=10", f"--max_steps={n}"]

    def steps_done():
        log = out / "log.jsonl"
        return log.read_bytes().count(b'"loss"') if log.exists() else 0

    terminal, screen = pty.fork()
    if not terminal:
        os.execvpe("bash", ["bash", str(HERE / "runs/cloud.sh"), *flags], {**ENV, **env})
    shown = b""
    while b"[y/N]" not in shown:
        shown += os.read(screen, 4096)
    assert b"steps take about" in shown and b"dollars" in shown and not steps_done()
    os.write(screen, b"y\n")
    wait_for(lambda: steps_done() > 20)
    os.close(screen)  # the kernel sends SIGHUP to whatever the terminal had
    os.waitpid(terminal, 0)
    now = steps_done()
    wait_for(lambda: steps_done() > now + 20)
    assert steps_done() < n, "too fast for this test"
    os.kill(ranks_of(out)[0], signal.SIGKILL)
    done = bash("cloud.sh", *flags, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "is under way" in done.stdout
    assert "test loss" in done.stdout and "all done" in done.stdout and not ranks_of(out)
    assert len(losses(out)) == n and (out / "export" / "model.safetensors").exists()
    assert read_checkpoint(tmp_path / "copy.pt")["step"] == n


@on_linux
def test_cloud_that_is_stopped(data_dir, tmp_path):
    """A training that was asked to stop is saved, and neither tested nor exported."""
    out = tmp_path / "out"

    def stop_ranks():
        wait_for((out / "last.pt").exists)
        for rank in ranks_of(out):
            os.kill(rank, signal.SIGTERM)
    threading.Thread(target=stop_ranks, daemon=True).start()
    done = bash("cloud.sh", "--yes", *SMALL, "--save_every=10", "--max_steps=100000",
                PROCESSES="1", DATASET="stdlib", OUT_DIR=str(out), DATA_DIR=str(data_dir))
    assert done.returncode == 1 and "the training was stopped" in done.stdout, done.stdout
    assert not {"export", "best.test.json"} & {file.name for file in out.iterdir()}


def test_cloud_asks_first(data_dir, tmp_path):
    """Without a yes nothing is started. The price needs no data: the default is not here."""
    done = bash("cloud.sh", *SMALL, PROCESSES="1", OUT_DIR=str(tmp_path / "out"),
                DATA_DIR=str(data_dir))
    assert done.returncode == 1 and "steps take about" in done.stdout, done.stderr
    assert "nothing was started" in done.stdout
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["cloud.lock"]


def test_slurm(small_flags, tmp_path):
    """Two nodes of one process each, by stand-ins for SLURM's two commands: the losses of one."""
    for name, text in (("scontrol", "echo localhost; echo elsewhere"),
                       ("srun", '"$@" & first=$!; "$@" || exit 1; wait $first')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(stat.S_IRWXU)
    done = bash("slurm.sh", *small_flags("nodes", "--batch_size=4"), SLURM_JOB_NODELIST="x",
                PATH=f"{tmp_path}:{ENV['PATH']}", SLURM_NNODES="2", SLURM_GPUS_ON_NODE="1",
                SLURM_JOB_ID="7")
    assert done.returncode == 0, done.stderr
    run_quickly([str(HERE / "config/cloud_hour.py"), *small_flags("one")])
    assert losses(tmp_path / "nodes") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
