"""Remakes the tables of Markdown pages: what the command in each marker prints.

    python -m studies.update

A table stands between <!-- python study.py studies/lab/results.json --markdown --> and
<!-- end -->. Its command may draw a picture, too.
"""

import importlib
import io
import re
import shlex
import sys
import textwrap
from contextlib import redirect_stdout
from pathlib import Path
from unittest import mock

from nanolab.common import run_script

TABLE = re.compile(r"(<!-- python (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def pages():
    return [Path("README.md"), *sorted(Path("studies").rglob("*.md")),
            *sorted(Path("docs").glob("*.md"))]


def updated(text, draw=True):
    """The text with every table remade. draw: the pictures, too."""
    def table(found):
        command = found[2] if draw else re.sub(r"(--plot )?\S+\.png", "", found[2])
        return f"{found[1]}\n{printed(command)}\n\n{found[3]}"
    return TABLE.sub(table, text)


def printed(command):
    """What a command prints: a script, or -m and a module, with its arguments."""
    argv = shlex.split(command.removeprefix("-m "))
    with mock.patch.object(sys, "argv", argv), redirect_stdout(io.StringIO()) as output:
        importlib.import_module(argv[0].removesuffix(".py")).main()
    return "\n".join(line if line.startswith("|") else textwrap.fill(line, 99)
                     for line in output.getvalue().strip().splitlines())


def main():
    for page in pages():
        text = page.read_text()
        if (new := updated(text)) != text:
            page.write_text(new)
            print(f"wrote {page}")


if __name__ == "__main__":
    run_script(main)
