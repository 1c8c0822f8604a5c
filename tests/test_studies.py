"""The runs in config/results/ are those of the commands in config/studies/."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import config
import eval as evaluation
from config.studies import flags, ladder
from conftest import HERE
from nanolab.study import find_runs
from nanolab.tokenizer import get_tokenizer

STUDIES = sorted(path.stem for path in (HERE / "config/studies").glob("*.sh"))
RESULTS = {"lab": ["lab"], "lab_noise": ["lab_noise"], "lab_batch_size": ["lab_batch_size"],
           "modern": ["modern"], "modern_core": ["modern_core"],
           "lab_wide": ["lab_wide"],
           "flags": ["flags_2x32", "flags_2x48", "flags_stack", "flags_stack_rates",
                     "flags_stack_tuning"],
           "ladder": ["ladder", "ladder_2x64", "ladder_prediction"],
           "modern_sizes": ["modern_small_1x", "modern_small_2x", "modern_wide_1x",
                            "modern_wide_half"]}
TRIALS = ["ladder_tuning", "lab_wide_trials"]  # compared by validation loss, never tested

# Instead of Python: writes its command line down. A module is run.
FAKE_PYTHON = f"""#!/bin/sh
[ "$1" = -m ] && exec {sys.executable} "$@"
echo "$*" >> "$COMMAND_LINES"
"""


def command_lines(study, folder):
    """What a study's script runs. -> (command lines of train.py, command lines of eval.py)."""
    fake = folder / "bin/python"
    fake.parent.mkdir()
    fake.write_text(FAKE_PYTHON)
    fake.chmod(0o755)
    env = {**os.environ, "PATH": f"{fake.parent}:{os.environ['PATH']}",
           "COMMAND_LINES": str(folder / "commands")}
    subprocess.run(["bash", f"config/studies/{study}.sh"], cwd=HERE, env=env, check=True,
                   stdout=subprocess.DEVNULL, timeout=60)
    lines = [line.split() for line in (folder / "commands").read_text().splitlines()]
    scripts = {line[0] for line in lines}
    assert scripts == {"train.py", "eval.py"}
    return ([line[1:] for line in lines if line[0] == "train.py"],
            [line[1:] for line in lines if line[0] == "eval.py"])


def experiment(options):
    """What tells one run of a study from another, to compare and to sort by."""
    compared = set(config.OPTIONS) - config.RESUME_MAY_CHANGE | {"name", "seed"}
    options = {key: options[key] for key in compared}
    options["vocab_size"] = options["vocab_size"] or get_tokenizer("bytes").n_vocab
    return json.dumps(options, sort_keys=True)


def recorded_experiment(run):
    defaults = {key: option.default for key, option in config.OPTIONS.items()}
    return experiment({**defaults, **run["config"], "name": run["name"]})


def test_each_result_has_its_study():
    assert sorted(RESULTS) == STUDIES
    files = [path.stem for path in (HERE / "config/results").glob("*.json")]
    assert sorted(files) == sorted(sum(RESULTS.values(), TRIALS))


@pytest.mark.skipif(not shutil.which("bash"), reason="the studies are scripts for bash")
@pytest.mark.parametrize("study", STUDIES)
def test_study_makes_its_results(study, tmp_path, monkeypatch):
    """A study trains the runs of its results, with equal options, and its tables gather them
    all."""
    train_commands, eval_commands = command_lines(study, tmp_path)
    runs = {}
    monkeypatch.chdir(HERE)  # where the config files are
    for argv in train_commands:
        options = config.load(argv)
        assert options.resume and options.out_dir not in runs
        runs[options.out_dir] = experiment(vars(options))

    monkeypatch.chdir(tmp_path)
    for folder in runs:  # as finished runs leave them
        Path(folder).mkdir(parents=True)
        for name in ("config.json", "best.pt", "summary.json"):
            Path(folder, name).touch()
    gathered = {}
    for argv in eval_commands:
        monkeypatch.setattr(sys, "argv", ["eval.py", *argv])
        args = evaluation.parse_arguments()
        checkpoints, results_files, unfinished = find_runs(args.ckpt)
        assert not results_files and not unfinished
        gathered[Path(args.json).stem] = [runs[os.path.dirname(path)] for path in checkpoints]
    assert sorted(gathered) == sorted(RESULTS[study])
    for name, found in gathered.items():
        recorded = json.loads((HERE / f"config/results/{name}.json").read_text())["runs"]
        assert sorted(found) == sorted(map(recorded_experiment, recorded)), name


def test_the_stack_is_what_helped(monkeypatch):
    """By the rule, from the validation losses of then; docs/log.md has the table of now."""
    monkeypatch.chdir(HERE)
    helped = [name for name in flags.FLAGS
              if flags.helped(*flags.compare(name, flags.SEEDS_OF_CHOICE))]
    assert sorted(helped) == sorted(flags.STACK)
    assert "\n".join(flags.choose()) in (HERE / "docs/log.md").read_text()


def test_the_ladders_rates_are_those_of_its_trials(monkeypatch):
    """The table of docs/ladder.md: each recipe's values, the best rates, the law's at the largest
    size."""
    monkeypatch.setattr(ladder, "COLLECTED", HERE / "config/results/ladder_tuning.json")
    text = (HERE / "docs/ladder.md").read_text()
    for recipe in ladder.RECIPES:
        best = ladder.best_trial(recipe)
        rates = [ladder.best_rate(recipe, size) for size in ladder.LADDER]
        rates.append(ladder.rate_law(recipe)(ladder.parameters(ladder.LARGEST)))
        cells = [f"`{recipe}`", f"{best['weight_decay']:.3g}", f"{best['beta2']:g}",
                 f"{best['warmup_fraction']:g}", *(f"{rate:.4f}" for rate in rates)]
        assert f"| {' | '.join(cells)} |" in text
