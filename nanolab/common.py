"""What every script shares: UserError, running a script, reading and writing files safely."""

import argparse
import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import time
import warnings
import zipfile
from datetime import UTC, datetime
from pathlib import Path

if sys.platform == "win32":  # has no SIGHUP
    sys.exit("nanolab runs on Linux and macOS; on Windows, use it inside WSL")

ROOT = Path(__file__).parent.parent
OUT_OF_MEMORY = "out of memory: a smaller batch, number of samples or model needs less"


class UserError(Exception):
    """Something that the user can fix, explained in one line. It ends a script without a
    traceback.

    exit_code: 2 for a mistake on the command line or in a config file, 1 for anything else.
    each_rank: every rank prints its own; by default only the first rank of a machine does.
    details: more lines, one for each of several mistakes.
    """

    def __init__(self, message, exit_code=1, each_rank=False, details=()):
        super().__init__(message)
        self.exit_code = exit_code
        self.each_rank = each_rank
        self.details = list(details)


def run_script(main, if_interrupted="stopped", if_failed=""):
    """Calls main(). Any error that is not a bug ends the process with one line and a non-zero exit
    code.

    if_interrupted: the line after Ctrl-C; if_failed: what to add when the operating system fails (a
    full disk, no permission).
    """
    for i, word in enumerate(sys.argv):  # the shell leaves the ~ of --out_dir=~/x as it is
        if re.match(r"--\w+=~(/|$)", word):
            sys.argv[i] = word.replace("~", os.path.expanduser("~"), 1)
    for stream in (sys.stdout, sys.stderr):  # a terminal that has only ASCII shows the rest as \xe9
        if hasattr(stream, "reconfigure"):  # a notebook's has not
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        stop(error.exit_code, error, error.each_rank, error.details)
    except MemoryError:
        stop(1, OUT_OF_MEMORY, each_rank=True)
    except FloatingPointError as error:
        stop(1, error, each_rank=True)
    except BrokenPipeError:  # the reader, such as head, has seen enough; avoid an error at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        stop(1, describe(error) + if_failed, each_rank=True)
    except RuntimeError as error:
        if is_out_of_memory(error):
            stop(1, OUT_OF_MEMORY, each_rank=True)
        if "gloo" not in str(error) and not type(error).__name__.startswith("Dist"):
            raise
        stop(1, "another process of this run has ended", each_rank=True)
    except KeyboardInterrupt:
        stop(130, if_interrupted, each_rank=True)


def stop(exit_code, message, each_rank, details=()):
    lines = [" ".join(str(each).splitlines()) for each in (message, *details)]
    # of a long line, the end says what is allowed
    lines = [f"{line[:500]} ... {line[-300:]}" if len(line) > 1000 else line for line in lines]
    line = f"{Path(sys.argv[0]).name}: {lines[0]}"
    if each_rank or os.environ.get("LOCAL_RANK", "0") == "0":
        print(line, *lines[1:], sep="\n  ", file=sys.stderr)
    elif "TORCHELASTIC_ERROR_FILE" in os.environ:
        time.sleep(3)  # torchrun ends all ranks when one ends: the first prints its line before
    if error_file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        # torchrun adds about 40 lines of its own; its summary, their end, then has this one.
        with contextlib.suppress(OSError):
            facts = {"message": line, "timestamp": int(time.time())}
            write_atomically(error_file, json.dumps(facts))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)  # at once: gloo's threads could abort an orderly exit
    sys.exit(exit_code)


def is_out_of_memory(error):
    """Whether torch ran out of the GPU's memory, or of the machine's."""
    return any(words in str(error) for words in (
        "out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED",
        "Storage size calculation overflowed"))


class OutputThatMayFail:
    """Stands for sys.stdout or sys.stderr in a long run: after the first write error, as on a full
    disk or a terminal that is gone, output is discarded and training continues."""

    def __init__(self, stream):
        self.stream = stream

    def attempt(self, function, *args):
        try:
            function(*args)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name):
        value = getattr(self.stream, name)
        return functools.partial(self.attempt, value) if name in ("write", "flush") else value


class StopSignal:
    """Turns Ctrl-C, SIGTERM and SIGHUP (the terminal is gone) into a request to stop after the
    current step, on which the ranks then agree.

    A second Ctrl-C ends the process at once. A repeated SIGTERM is ignored; use SIGKILL. Under
    nohup, SIGHUP stays ignored.
    """

    def __init__(self):
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.request)

    def request(self, number, frame):
        self.requested = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def argument_parser(description):
    """An ArgumentParser that reports a mistake in one line, with exit code 2."""
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}; see --help\n")
    return parser


def describe(error):
    """An error in a few words: an OSError, or what torch.save or W&B make of one."""
    if getattr(error, "strerror", None):
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return next(iter(str(error).splitlines()), type(error).__name__)


def utc_now():
    return datetime.now(UTC).isoformat(timespec="seconds")


def git(*words):
    """What a git command prints in this repository; None without git."""
    try:
        return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True,
                              check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


@functools.cache
def code_state():
    """The code of this process: its commit, whether the tree differs from that (both None without
    git), and the SHA-256 of the .py files that a run uses. The first call is the one that counts.
    """
    files = [ROOT / "config/__init__.py", ROOT / "model.py", *sorted(ROOT.glob("nanolab/*.py")),
             ROOT / "train.py"]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files))
    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--", "*.py")
    return {"commit": commit, "changed": None if changes is None else bool(changes),
            "sha256": digest.hexdigest()}


def code_name(state):
    """A code_state in a few words: its commit, or without git the start of its hash."""
    changes = " with changes" if state.get("changed") else ""
    return f"{(state.get('commit') or state['sha256'])[:7]}{changes}"


def code_diff():
    """The .py files of a changed tree against its commit, new ones included, as text."""
    new = (git("ls-files", "--others", "--exclude-standard", "--", "*.py") or "").splitlines()
    files = (f"--- /dev/null\n+++ b/{name}\n{(ROOT / name).read_text(errors='replace')}"
             for name in new)
    return "\n".join(filter(None, [git("diff", "HEAD", "--", "*.py"), *files])) + "\n"


@functools.cache  # each takes milliseconds, and every checkpoint has them
def versions():
    return {"python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "numpy")}}


def write_atomically(path, content):
    """Writes a file completely or not at all: to a temporary file, then to the disk, then under its
    name. content: text (in UTF-8), bytes, or a function that writes to the file it is given."""
    unfinished = Path(f"{path}.unfinished")
    try:
        with open(unfinished, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:  # a full disk does not say which file
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with contextlib.suppress(OSError):  # on a full disk, its room may serve another file
            unfinished.unlink()


def load_tensors(path, mmap=False):
    """What torch.save wrote to a file, tensors on the CPU. Only tensors and plain values are
    loaded; no code runs.

    mmap: leave the tensors on disk until they are used, without checking them. Raises UserError.
    """
    import torch  # here, because the tokenising processes start faster without it
    try:
        # torch.save writes a zip file, which has a checksum for each tensor and for the rest.
        if not mmap and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                if record := file.testzip():
                    raise UserError(f"{path} is damaged: the checksum of {record} does not match")
        with warnings.catch_warnings(action="ignore"):  # about foreign pickles, refused here
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (UserError, MemoryError):
        raise
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}") from None
    except PermissionError:
        raise UserError(f"no permission to read {path}") from None
    except Exception as error:  # torch.load raises pickle, zip, EOF and runtime errors alike
        if is_out_of_memory(error):
            raise
        if found := re.search(r"Unsupported global: GLOBAL (\S+)", str(error)):
            raise UserError(f"{path} holds a {found[1]}; nanolab loads only tensors and plain "
                            "values, for other objects could run code") from None
        raise UserError(f"{path} is damaged or no checkpoint of nanolab "
                        f"({type(error).__name__})") from None


def reachable(host, seconds=1.2):
    """Whether a TCP connection to `host` opens in time. Behind a proxy it is assumed."""
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return True
    with contextlib.suppress(OSError):
        socket.create_connection((host, 443), timeout=seconds).close()
        return True
    return False
