"""What README.md and docs/ name exists: files, tests, options. train.py takes their commands."""

import re

import pytest

from config import OPTIONS, Config
from conftest import HERE
from nanolab.options import load

DOCS = [HERE / "README.md", *sorted((HERE / "docs").glob("*.md")),
        *sorted((HERE / "studies").rglob("*.md"))]
FOLDERS = [HERE, *(HERE / name for name in ("config", "config/interventions", "nanolab", "bench")),
           *(path for path in (HERE / "studies").iterdir() if path.is_dir())]
OF_OTHERS = {  # torchrun's, nanoGPT's, lm_eval's; and the one that stands for any
    "--standalone", "--nproc_per_node", "--max-restarts", "--nnodes", "--rdzv_backend", "--rdzv_id",
    "--rdzv_endpoint", "--with", "--timeout", "--start", "--dtype", "--model",
    "--model_args", "--tasks", "--include_path", "--key"}


@pytest.fixture(params=DOCS, ids=lambda doc: doc.name)
def doc(request):
    return request.param


def test_files_exist(doc):
    """Paths, links and their headings, script names; `NAME` and `PATH` stand for any name."""
    text = re.sub(r"(?m)^\| `config/\S+` \|", "", doc.read_text())  # files of nanoGPT
    for path in re.findall(r"(?<![\w/.-])(?:config|docs|bench|tests|nanolab|studies)/[\w/.-]*\w",
                           text):
        assert "NAME" in path or (HERE / path).exists(), path
    for name in re.findall(r"(?<![\w/.-])[a-z]\w*\.py\b", text):
        assert any((folder / name).exists() for folder in FOLDERS), name
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)|src=\"([^\"]+)\"", text):
        file, _, heading = "".join(target).partition("#")
        linked = (doc.parent / file) if file else doc
        assert linked.exists(), file
        assert not heading or heading in map(anchor, linked.read_text().splitlines()), heading


def anchor(line):
    """GitHub's name for a heading: "## The lab study" -> "the-lab-study"; "" for other lines."""
    match = re.match(r"#+ (.*)", line)
    return re.sub(r"[^\w -]", "", match[1].lower()).replace(" ", "-") if match else ""


def test_readme_names_interventions_and_tests():
    text = (HERE / "README.md").read_text()
    for name in re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE):
        assert any((folder / f"{name}.py").exists() for folder in FOLDERS), name
    for file, word in re.findall(r"`(tests/test_\w+\.py) -k (\w+)`", text):
        assert re.search(rf"def test_\w*{word}", (HERE / file).read_text()), f"{file} -k {word}"


def test_options_are_known(doc):
    text = doc.read_text().replace("\\\n", " ")
    sources = "".join(path.read_text() for folder in FOLDERS for path in folder.glob("*.py"))
    known = {f"--{key}" for key in OPTIONS} | set(re.findall(r'"(--[\w-]+)"', sources)) | OF_OTHERS
    assert not (unknown := {*re.findall(r"(?<![\w-])--[a-z][\w-]*\w", text)} - known), unknown
    for command in re.findall(r"(?:python |torchrun [^#\n`]*)train\.py ([^#\n`|&]*)", text):
        if "[FILE" not in command and "--help" not in command:
            load(Config, command.replace("$seed", "1").split())
