"""What README.md and docs/ claim is what the program does."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import scipy

import config
from config import GPTConfig
from conftest import HERE, evaluate
from model import GPT
from nanolab import study
from nanolab.data import TokenDataset

DOCS = [HERE / "README.md", *sorted((HERE / "docs").glob("*.md"))]
EVAL_COMMAND = re.compile(r"    python eval\.py (--ckpt config/\S+\.json[^#]*)")


def eval_command(line):
    """The arguments of an eval.py command on the published data, without pictures; [] if it is
    none."""
    match = EVAL_COMMAND.match(line)
    words = match.group(1).split() if match else []
    return [
        word for word in words if not word.endswith(".png") and word not in ("--plot", "--curves")
    ]


def test_tables_come_from_the_data(monkeypatch, capsys):
    """After each eval.py command stands, line for line, what it prints; and no other such table is
    there."""
    monkeypatch.chdir(HERE)
    n_commands = 0
    for doc in DOCS:
        lines = [line.rstrip() for line in doc.read_text().splitlines()]
        commands = [(i, argv) for i, line in enumerate(lines) if (argv := eval_command(line))]
        made = set()
        for i, argv in commands:
            printed = evaluate(monkeypatch, capsys, *argv).splitlines()
            indent = "" if "--markdown" in argv else "    "
            expected = ["", *((indent + line).rstrip() for line in printed)]
            assert lines[i + 1:i + 1 + len(expected)] == expected, f"{doc.name}, line {i + 1}"
            made.update(range(i + 1, i + 1 + len(expected)))
        for i, line in enumerate(lines):
            is_result = re.search(r"p \(corrected\) \||\| (un|partly )?paired|^ +varies  ", line)
            assert i in made or not is_result, f"{doc.name}, line {i + 1} comes from no command: {line}"
        n_commands += len(commands)
    assert n_commands >= 12


def test_each_result_is_in_the_docs():
    text = "".join(doc.read_text() for doc in DOCS)
    for path in (HERE / "config/results").iterdir():
        assert f"config/results/{path.name}" in text


def test_readmes_effects_are_those_of_the_tables(monkeypatch, capsys, tmp_path):
    """The columns `published` and `lab` of the README's tables: difference and verdict, as in the
    study's own table."""
    monkeypatch.chdir(HERE)
    effects = {"published": {}, "lab": {}}
    for column, path, *flags in (("published",
                                  "config/published.json"), ("lab", "config/results/lab.json"),
                                 ("lab", "config/results/modern.json", "--baseline",
                                  "tuned_stack")):
        evaluate(monkeypatch, capsys, "--ckpt", path, *flags, "--json", tmp_path / "table.json")
        for row in json.loads((tmp_path / "table.json").read_text())["rows"]:
            if "verdict" in row:  # the published changes' own study comes first
                effects[column].setdefault(row["experiment"],
                                           f"{row['difference']:+.4f} {row['verdict']}")
    n_checked, header = 0, []
    for line in (HERE / "README.md").read_text().splitlines():
        cells = [cell.strip(" `") for cell in line.strip("|").split("|")]
        header = (header or cells) if line.startswith("|") else []
        for name, effect in zip(header[1:], cells[1:]):
            if name in effects and cells != header and not effect.startswith("-" * 3):
                assert effect == effects[name].get(cells[0], ""), line
                n_checked += 1
    assert n_checked >= 20


def test_figures_in_the_sentences_come_from_the_data(monkeypatch, capsys, tmp_path):
    """What docs/results.md says in words about the published runs and the lab, computed anew."""
    monkeypatch.chdir(HERE)
    text = " ".join((HERE / "docs/results.md").read_text().split())
    losses = {"published": {}, "lab": {}}
    for study, path in (("published", "config/published.json"), ("lab", "config/results/lab.json")):
        for run in json.loads((HERE / path).read_text())["runs"]:
            losses[study].setdefault(run["name"], []).append(run["test_loss"])
    published, lab = losses["published"], losses["lab"]
    baselines, cloud = published["baseline"][1:], published["cloud"][0]  # the first is there twice
    assert max(baselines) == baselines[0] and len(baselines) == 7
    assert f"batch size gave {published['batch_size'][0] - baselines[0]:.6f} " in text
    assert f"all interventions together gave {baselines[0] - cloud:.6f} " in text
    assert f"is {baselines[0] - np.mean(baselines):.4f} above the mean of the seven" in text

    one, other = published["local_3090"]
    five = [cloud, one, other, *published["cloud_builtin_gelu"]]
    f = np.var(five, ddof=1) / np.var(baselines, ddof=1)
    assert f"SD {np.std(five, ddof=1):.4f}; the baselines have {np.std(baselines, ddof=1):.4f}." in text
    assert f"p = {scipy.stats.f.sf(f, 4, 6):.2f}, one-sided" in text
    assert f"Two 3090s differ by {other - one:.4f} " in text
    assert f"lower than the A100s, by {cloud - one:.3f} and {cloud - other:.3f}" in text

    seeds = {name: np.corrcoef(lab["baseline"], values)[0, 1] for name, values in lab.items()}
    assert (
        f"the two weight decays (correlation over seeds {seeds['weight_decay_gpt2']:.3f}), the QKV bias "
        f"({seeds['qkv_bias']:.2f}) and the stack ({seeds['cloud']:.2f}), less for the schedule "
        f"({seeds['schedule_learning_rate']:.2f}), and hardly for tying ({seeds['weight_tying']:.2f})"
    ) in text
    assert f"{seeds['weight_decay_cerebras']:.3f}" == f"{seeds['weight_decay_gpt2']:.3f}"
    tokens_per_parameter = 614_400 / GPT(
        GPTConfig.from_options(vars(config.load(["config/lab.py"]))
                               | {"vocab_size": 257})).num_params()
    tau = 1.084 * tokens_per_parameter ** -0.527  # of the rule that gave 0.33724
    assert f"would give about {8 * 64 / (4e-4 * 614_400 * tau):.1f} for this budget" in text

    evaluate(monkeypatch, capsys, "--ckpt", "config/published.json", "--json",
             tmp_path / "table.json")
    rows = {
        row["experiment"]: row
        for row in json.loads((tmp_path / "table.json").read_text())["rows"]
    }
    assert f"ends at {rows['cloud']['high']:.4f}." in text
    assert f"A change must be worth {rows['cloud']['detectable']:.2f} " in text
    low, high = rows["baseline"]["one_more_run"]
    independent = scipy.stats.t.ppf(0.975, 6) * np.std(baselines, ddof=1) * np.sqrt(8 / 7)
    assert (f"within {(high - low) / 2:.3f} of the mean; taking the seven for independent gives "
            f"{independent:.3f}") in text


def test_promises_name_tests_that_exist():
    """Each `tests/FILE.py -k WORDS` in the README chooses tests by every one of its words."""
    chosen = re.findall(r"`(tests/test_\w+\.py)(?: -k (\w+|\"[^\"]+\"))?`",
                        (HERE / "README.md").read_text())
    assert len(chosen) >= 8
    for file, words in chosen:
        names = re.findall(r"^def (test_\w+)", (HERE / file).read_text(), re.MULTILINE)
        for word in words.strip('"').split(" or "):
            assert any(word in name for name in names), f"{file} -k {words}"


@pytest.mark.parametrize("doc", DOCS, ids=lambda doc: doc.name)
def test_what_the_docs_name_exists(doc):
    """Every file or folder of this repository, and every link."""
    text = doc.read_text()
    paths = re.findall(r"(?<![\w/.])(?:config|docs|bench|tests|nanolab)/[\w/.*-]*\w", text)
    for path in set(paths):
        assert list(HERE.glob(path)), f"{doc.name} names {path}"
    folders = (HERE, HERE / "config", HERE / "config/interventions", HERE / "nanolab")
    for name in set(re.findall(r"(?<![\w/.*])[a-z]\w*\.(?:py|sh)\b", text)):
        assert any((folder / name).exists() for folder in folders), f"{doc.name} names {name}"
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)|src=\"([^\"]+)\"", text):
        file, _, heading = "".join(target).partition("#")
        linked = (doc.parent / file).resolve() if file else doc
        assert linked.exists(), f"{doc.name} links to {file}"
        if heading:
            assert heading in map(
                anchor,
                linked.read_text().splitlines()), f"{doc.name} links to #{heading}"


def anchor(line):
    """GitHub's name for a heading: "## The lab study" -> "the-lab-study"; "" for other lines."""
    match = re.match(r"#+ (.*)", line)
    return re.sub(r"[^\w -]", "", match.group(1).lower()).replace(" ", "-") if match else ""


def test_training_commands_are_accepted(monkeypatch):
    """Each train.py command in the docs has config files and options that exist."""
    monkeypatch.chdir(HERE)
    n_commands = 0
    for doc in DOCS:
        text = doc.read_text().replace("\\\n", " ")
        commands = re.findall(r"^    [^#\n]*(?:python |torchrun [^#\n]*)train\.py ([^#\n|&]*)",
                              text, re.MULTILINE)
        commands += re.findall(r"`python train\.py ([^`]*)`", text)
        for command in commands:
            if not re.search(r"--help|\[FILE", command):
                config.load(command.replace("$seed", "1").split())
                n_commands += 1
    assert n_commands >= 10


def test_notebook(small_run, data_dir, tmp_path):
    """The lines for a notebook, as they stand in docs/hugging_face.md."""
    run = small_run("out")
    (tmp_path / "data").symlink_to(data_dir)
    code = (HERE / "docs/hugging_face.md").read_text().split("```python\n")[1].split("```")[0]
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path,
                            env={**os.environ, "PYTHONPATH": str(HERE)}, capture_output=True,
                            text=True)
    assert result.returncode == 0, result.stderr
    text, loss = result.stdout.rsplit("\n", 2)[:2]
    inputs, targets = TokenDataset(data_dir, "stdlib", "test", 32).batch([0, 1, 2])
    assert text.startswith("def main():") and len(text) > 20
    assert float(loss) == pytest.approx(
        GPT.from_checkpoint(run / "best.pt")(inputs, targets).item(), abs=1e-4)


def test_readmes_first_run_is_the_one_on_record():
    """The figures that the README promises a newcomer are those of docs/quickstart.json."""
    run = json.loads((HERE / "docs/quickstart.json").read_text())["runs"][0]
    readme = (HERE / "README.md").read_text()
    assert f"test loss      {run['test_loss']:.6f} nats per token" in readme
    assert f"bits per byte  {run['bits_per_byte']:.6f}" in readme
    assert f"other text     standard error {study.text_error([run]):.4f}" in readme
    assert f"done:   {run['trained_tokens']:,} tokens in {run['seconds']:.0f} s" in readme
    assert f"speed:  {run['tokens_per_second']:,.0f} tokens/s" in readme


def test_page_for_nanogpts_users_is_complete():
    """Every option of nanoGPT's train.py has its line; ours exist and have the default that is
    said."""
    text = (HERE / "docs/from_nanogpt.md").read_text()
    lines = text.split("## The other scripts")[0].splitlines()
    theirs = """out_dir eval_interval log_interval eval_iters eval_only always_save_checkpoint init_from
        wandb_log wandb_project wandb_run_name dataset gradient_accumulation_steps batch_size
        block_size n_layer n_head n_embd dropout bias learning_rate max_iters weight_decay beta1
        beta2 grad_clip decay_lr warmup_iters lr_decay_iters min_lr backend device dtype
        compile""".split()
    found = []
    for line in (line for line in lines if line.startswith("| ") and "---" not in line):
        their, _, ours, default = (re.findall(r"`([^`]+)`", cell) for cell in line.split("|")[1:5])
        found += their
        if ours:
            assert [repr(config.OPTIONS[key].default) for key in ours] == default, line
    assert sorted(found) == sorted(theirs)
