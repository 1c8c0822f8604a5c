"""An option of the model is defined once, in config/__init__.py. All else follows from it."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import HERE, SMALL

from nanolab.common import load_tensors

NEW_OPTION = '    rotary: bool = option(False, "a throw-away flag")\n'
ITS_NEIGHBOUR = "    qkv_bias: bool"  # in GPTConfig

RUN_SCRIPTS = """
import contextlib, io, json, runpy, sys
results = {}
for name, command in json.load(sys.stdin).items():
    sys.argv, output, code = command, io.StringIO(), 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as exit_:
            code = exit_.code
    results[name] = code, output.getvalue()
print(json.dumps(results))
"""


@pytest.fixture
def copy(tmp_path):
    """A copy of the program, where GPTConfig has one line more."""
    folder = tmp_path / "copy"
    for part in ("config", "nanolab"):
        shutil.copytree(HERE / part, folder / part)
    for script in HERE.glob("*.py"):
        shutil.copy(script, folder)
    path = folder / "config" / "__init__.py"
    text = path.read_text()
    assert text.count(ITS_NEIGHBOUR) == 1
    path.write_text(text.replace(ITS_NEIGHBOUR, NEW_OPTION + ITS_NEIGHBOUR))
    return folder


def run_scripts(folder, **commands):
    """Runs scripts one after the other, in one process: Python takes longer to start than they do.

    commands: {a name: command line}. -> {the name: (exit code, output)}
    """
    result = subprocess.run([sys.executable, "-c", RUN_SCRIPTS], cwd=folder, text=True, timeout=120,
                            input=json.dumps(commands), stdout=subprocess.PIPE, check=True)
    return json.loads(result.stdout)


def test_an_option_is_defined_once(copy, data_dir, small_run):
    """--help lists the new flag, --init_from takes its value from the checkpoint, and --resume,
    --init_from and the export name it when they refuse."""
    train = ["train.py", *SMALL, "--max_steps=1", "--dataset=stdlib", f"--data_dir={data_dir}"]
    before = small_run("before", "--max_steps=1") / "last.pt"  # it does not have the option
    results = run_scripts(
        copy,
        help=["train.py", "--help"],
        source=[*train, "--out_dir=source", "--rotary=True"],
        resume=[*train, "--out_dir=source", "--resume"],
        init_from=[*train, "--out_dir=tuned", "--init_from=source/last.pt"],
        init_from_other=[*train, "--out_dir=no", "--init_from=source/last.pt", "--rotary=False"],
        init_from_asked=[*train, "--out_dir=no", f"--init_from={before}", "--rotary=True"],
        init_from_before=[*train, "--out_dir=old", f"--init_from={before}"],
        export=["model.py", "export", "source/last.pt", "exported"],
        export_before=["model.py", "export", str(before), "exported_before"])

    def rotary(run):
        return load_tensors(copy / run / "last.pt")["config"]["rotary"]

    def assert_refused(name, exit_code, message):
        code, output = results[name]
        assert code == exit_code and message in output.splitlines()[-1], output

    assert "--rotary=False" in results["help"][1] and "a throw-away flag" in results["help"][1]
    assert results["source"][0] == 0 and rotary("source") is True
    assert_refused("resume", 2, "rotary was True, is False")

    assert results["init_from"][0] == 0 and rotary("tuned") is True
    assert results["init_from_before"][0] == 0 and rotary("old") is False
    assert_refused("init_from_other", 2, "rotary=False was asked for, but init_from=")

    assert_refused("init_from_asked", 2, "rotary=True was asked for, but init_from=")

    assert_refused("export", 1, "rotary=True, which transformers' GPT-2 cannot express")
    assert not (copy / "exported").exists()
    assert results["export_before"][0] == 0 and (copy / "exported_before/config.json").exists()
