"""The commands in the documents, and in the comments of presets, are ones that there are: words, options and names."""

import re
import shlex
import textwrap
from pathlib import Path

import pytest
import typer
from sidetask_bench import load_experiment, papers
from sidetask_bench.assemble import check_options
from sidetask_bench.cli import app
from sidetask_bench.config import Plugin
from sidetask_bench.document import override
from sidetask_core import plugins

ROOT = Path(__file__).parents[2]
PATTERNS = ("*.md", "docs/**/*.md", "packages/*/*.md", "benchmarks/*.md", "packages/bench/src/*/presets/*.yaml")
DOCUMENTS = sorted(path for pattern in PATTERNS for path in ROOT.glob(pattern))
COMMAND = re.compile(r"(?:\bsidetask|-m sidetask_bench) +([a-z]+(?: .*)?)")
CLI = typer.main.get_command(app)


def passages(path):
    """Where a document has commands, with what there is besides on a line taken off: code, or a preset's comments."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":
        yield re.sub(r"^# *", "", "\n".join(re.findall("^#.*$", text, re.MULTILINE)), flags=re.MULTILINE)
        return
    fence = r"^( *)```(\w*)\n(.*?)^\1```"
    yield from (body for _, language, body in re.findall(fence, text, re.DOTALL | re.MULTILINE) if language != "python")
    # A span of code may go on in the next line.
    for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", re.sub(fence, "", text, flags=re.DOTALL | re.MULTILINE)):
        if re.match(r"(sidetask|torchrun|python) ", span):
            yield span.replace("\n", " ")


def commands(path):
    found = [line for passage in passages(path) for line in passage.replace("\\\n", " ").splitlines()]
    return [match[1] for line in found for match in COMMAND.finditer(line)]


COMMANDS = [(path, command) for path in DOCUMENTS for command in dict.fromkeys(commands(path))]


def test_there_are_commands():
    assert len(COMMANDS) > 60
    assert {path.suffix for path, _ in COMMANDS} == {".md", ".yaml"}


@pytest.mark.parametrize(("path", "command"), COMMANDS, ids=lambda value: str(value).removeprefix(f"{ROOT}/"))
def test_the_command_is_one_that_there_is(path, command, tmp_path):
    name, *words = (word for word in shlex.split(command, comments=True) if word not in ("...", "…"))
    assert name in CLI.commands
    if not words:  # the command is spoken of
        return
    # N is a number that a reader puts in.
    given = CLI.commands[name].make_context(name, ["2" if word == "N" else word for word in words]).params
    if not given.get("dataset", "NAME").isupper():
        options = [option for option in given["options"] or () if option != "KEY=VALUE"]
        check_options(plugins.find("datasets", given["dataset"]), Plugin("", override({}, options)), "dataset", given=0)
    rows = given.get("row") or []
    rows = rows if isinstance(rows, list) else [rows]
    if name == "control":
        rows.append(given["of"])
    source = given.get("of") if name == "label" else given.get("experiment")
    experiment = source and loaded(path, source, given["assignments"] or (), tmp_path)
    if experiment:
        for row in rows:
            assert row in experiment.rows
    if name == "table" and experiment:
        papers.sizes(source, given["assignments"] or (), small=given["small"])


def loaded(path, source, assignments, folder):
    """A preset, or a file that the document shows; None for what is the reader's own."""
    if source.isupper():
        return None
    if source.endswith(".yaml"):
        blocks = re.findall(r"^( *)```yaml\n(.*?)^\1```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
        shown = [block for _, block in blocks if f"name: {Path(source).stem}\n" in block]
        if not shown:
            return None
        source = folder / source
        source.write_text(textwrap.dedent(shown[0]), encoding="utf-8")
    return load_experiment(source, assignments)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("compair scenes", "compair"),
        ("compare scenes --job 2", "No such option"),
        ("compare --jobs 2", "Missing"),
        ("compare scene", "scene"),
        ("compare scenes --set training.epoch=2", "epoch"),
        ("train scenes --row equalizer", "equalizer"),
        ("prepare nyuv3 /data", "nyuv3"),
        ("prepare nyuv2 /data sise=[36,48]", "sise"),
        ("table scenes", "paper"),
    ],
)
def test_a_command_that_there_is_not_is_found(command, message, tmp_path):
    with pytest.raises(Exception, match=message):
        test_the_command_is_one_that_there_is(Path("README.md"), command, tmp_path)


@pytest.mark.parametrize(
    "path", [p for p in DOCUMENTS if p.suffix == ".md"], ids=lambda path: str(path.relative_to(ROOT))
)
def test_what_is_not_on_an_index_is_installed_from_the_checkout(path):
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"pip install ([^`\n]+)", text):
        for word in shlex.split(line.replace("\n", " "), comments=True):
            # With brackets it brings what an installed package can do besides.
            assert not re.fullmatch(r"sidetask-\w+(\[methods\])?", word), line
            if word.startswith("./"):
                assert (ROOT / word / "pyproject.toml").exists(), line
