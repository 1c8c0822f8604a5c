"""The command line of train.py: config files and flags into a checked dataclass.

It knows no option by name. The dataclass says which there are (config/__init__.py).
"""

import ast
import difflib
import math
import os
import runpy
import sys
import textwrap
import traceback
import types
import typing
from dataclasses import fields
from pathlib import Path

from nanolab.common import ROOT, UserError


def load(config_class, argv):
    """The config that a command line asks for: [FILE.py ...] [--key=value ...].

    Files apply in order, later ones win; flags win over files. `--key value` and, for a switch,
    `--key` are accepted too. `--help` prints every option and exits.
    Raises UserError with exit code 2.
    """
    options = {f.name: f for f in fields(config_class)}
    files, flags = split_command_line(argv, options)
    settings = [(key, value, file) for file in files for key, value in read_config_file(file)]
    settings += [(key, text, f"--{key}") for key, text in flags]
    refuse_unknown(files, settings, options)
    given, origin = {}, {}
    for key, value, source in settings:
        if source == f"--{key}" and options[key].type is not str:
            value = parse_literal(value)
        given[key], origin[key] = check(options[key], value, source), source
    config = config_class.from_given(given)

    def shown(key):
        return f"{key}={getattr(config, key)!r} (from {origin.get(key, 'the default')})"

    if problem := config.conflict(given, shown):
        raise config_error(problem)
    return config


def config_error(message):
    return UserError(message, exit_code=2)


def split_command_line(argv, options):
    """-> (config files, [(key, text)])"""
    files, flags, words = [], [], list(argv)
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            print(format_help(options))
            sys.exit(0)
        if not word.startswith("--"):
            files.append(word)
            continue
        key, equals, text = word.removeprefix("--").partition("=")
        is_switch = key not in options or bool in types_of(options[key])
        if not equals and words and not words[0].startswith("--") and not (
                is_switch and words[0].endswith(".py")):
            text = words.pop(0)
        elif not equals and is_switch:
            text = "True"
        elif not equals:
            raise config_error(f"--{key} wants a value: --{key}=...")
        flags.append((key, text))
    return files, flags


def read_config_file(file):
    """What a config file assigns: [(key, value)]; nothing if it is not there. It runs as plain
    Python in a namespace of its own."""
    if not file.endswith(".py"):
        raise config_error(f"'{file}' is neither a config file (NAME.py) nor a flag (--key=value)")
    if not Path(file).is_file():
        return []  # refuse_unknown says so
    try:
        namespace = runpy.run_path(file)
    except SyntaxError as error:
        place = f"{error.filename or file}, line {error.lineno or 1}"
        raise config_error(f"{place}: {error.msg}") from None
    except (Exception, SystemExit) as error:
        frames = reversed(traceback.extract_tb(error.__traceback__))
        line = next((frame.lineno for frame in frames if frame.filename == file), 1)
        raise config_error(f"{file}, line {line}: {type(error).__name__}: {error}") from None
    return [(key, value) for key, value in namespace.items() if not key.startswith("_")
            and not isinstance(value, types.ModuleType) and not callable(value)]


def parse_literal(text):
    """The Python value that a flag's text stands for; the text itself if it is a word."""
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text.lower(), text))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def check(option, value, origin):
    """`value` as the option holds it. UserError if its type or size is not allowed."""
    allowed, limits = types_of(option), option.metadata
    if int in allowed and isinstance(value, float) and value.is_integer():
        value = int(value)  # max_tokens=1e9
    if float in allowed and type(value) is int and abs(value) < 1e300:
        value = float(value)
    wrong = f"{option.name}={value!r} (from {origin})"
    if type(value) not in allowed:
        names = " or ".join("None" if kind is types.NoneType else kind.__name__ for kind in allowed)
        raise config_error(f"{wrong}: wants {names}, not {type(value).__name__}"
                           f"{allowed_values(option)}")
    if isinstance(value, str) and value.startswith("~/"):  # as a shell does it
        value = os.path.expanduser(value)
    if value == "" and option.default != "":
        raise config_error(f"{wrong}: must not be empty")
    if isinstance(value, str) and limits["choices"] and value not in limits["choices"]:
        raise config_error(f"{wrong}: not allowed{allowed_values(option)}"
                           f"{nearest(value, limits['choices'])}")
    if isinstance(value, (int, float)) and limits["within"] and not lies_within(
            value, limits["within"]):
        raise config_error(f"{wrong}: not allowed{allowed_values(option)}")
    return value


def types_of(option):
    """The types that an option takes, e.g. (int, str) for batch_size."""
    return typing.get_args(option.type) or (option.type,)


def allowed_values(option):
    limits = option.metadata
    parts = [limits["within"]] if limits["within"] else []
    parts += ["True", "False"] if limits["choices"] and bool in types_of(option) else []
    parts += map(repr, limits["choices"])
    return f"; allowed: {', '.join(parts)}" if parts else ""


def lies_within(value, interval):
    """Whether a number lies in an interval such as "[0, 1)". NaN lies in none, nor does an int
    that 64 bits do not hold."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below and abs(value) < (2**63 if isinstance(value, int) else math.inf)


def foreign_names():
    """The last table of docs/from_nanogpt.md: {an option, "option=value" or file of another
    trainer: what it is here}."""
    names, page = {}, ROOT / "docs/from_nanogpt.md"
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    for line in text.rpartition("\n## ")[2].splitlines():
        if line.startswith("| `"):
            theirs, ours, meaning = (cell.strip(" `") for cell in line.strip("|").split("|"))
            answer = f"here {ours} ({meaning})" if ours else meaning
            names |= dict.fromkeys(theirs.split("`, `"), answer)
    return names


def refuse_unknown(files, settings, options):
    """Raises UserError for all unknown files and options in [(key, value, source)] at once. Another
    trainer's are answered with what they are here."""
    foreign = foreign_names()
    names = {file: (f"there is no config file {file}", map(str, Path("config").rglob("*.py")))
             for file in files if not Path(file).is_file()}
    for key, value, source in settings:
        if key not in options:
            names[key] = f"unknown option '{key}' (from {source})", options
        elif f"{key}={value}" in foreign:
            names[f"{key}={value}"] = f"{key}={value} (from {source}) is no value of ours", ()
    lines, advice = [], "--help lists all options"
    for name, (problem, known) in names.items():
        word = name.replace("-", "_")
        if word in foreign:
            advice = "docs/from_nanogpt.md has other trainers' names, --help all of nanolab's"
            lines.append(f"{problem}; {foreign[word]}")
        else:
            helper = f"; a helper may be called _{name}" if problem.endswith(".py)") else ""
            lines.append(f"{problem}{nearest(word, known) or helper}")
    if len(lines) == 1:
        raise config_error(f"{lines[0]}; {advice}")
    if lines:
        raise UserError(f"{len(lines)} names are unknown; {advice}", 2, details=lines)


def nearest(word, known):
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else ""


def format_help(options):
    lines = ["usage: python train.py [FILE.py ...] [--key=value ...]",
             "Files apply in order, flags win over files. "
             "The experiments are in config/ and config/interventions/.", ""]
    for key, option in options.items():
        flag = f"  --{key}={option.default!r}".ljust(32)
        meaning = f"{option.metadata['meaning']}{allowed_values(option)}"
        lines.append(textwrap.fill(f"{flag} {meaning}", 100, subsequent_indent=" " * 33,
                                   break_on_hyphens=False))
    return "\n".join(lines)


def format_config(config):
    """All options as key=value on a few lines, for the top of a run's output."""
    words = "  ".join(f"{f.name}={getattr(config, f.name)!r}" for f in fields(config))
    return textwrap.fill(words, 98, initial_indent="config: ", subsequent_indent="        ",
                         break_long_words=False, break_on_hyphens=False)
