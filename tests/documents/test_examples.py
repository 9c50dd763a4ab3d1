"""The Python examples in the documents run as they stand, block after block in one namespace per document.

The YAML examples are experiments, or parts of one.
"""

import re
import textwrap
from pathlib import Path

import pytest
import yaml
from sidetask_bench import load_experiment
from sidetask_bench.assemble import check_options
from sidetask_core import Task, plugins

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(path for pattern in ("*.md", "docs/**/*.md", "packages/*/*.md") for path in ROOT.glob(pattern))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_examples_run(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "example"}
    for block in re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        exec(compile(block, str(path), "exec"), namespace)


YAML = [
    (path, block)
    for path in DOCUMENTS
    for _, block in re.findall(r"^( *)```yaml\n(.*?)^\1```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
]
# What an example that shows a part leaves out.
REST = {"name": "rest", "dataset": "digits", "network": "small", "method": "equal"}


@pytest.mark.parametrize(
    ("path", "block"), YAML, ids=lambda value: str(value.relative_to(ROOT)) if value in DOCUMENTS else ""
)
def test_the_experiments_load_and_their_methods_can_be_made(path, block, tmp_path):
    experiment = tmp_path / "experiment.yaml"
    experiment.write_text(yaml.safe_dump(REST | yaml.safe_load(textwrap.dedent(block))), encoding="utf-8")
    loaded = load_experiment(experiment)
    check_options(plugins.find("datasets", loaded.dataset.name), loaded.dataset, "dataset", given=0)
    tasks = [Task(name, loss=lambda p, y: (p - y).abs()) for name in ("segmentation", "depth", "parts")]
    for row in [None, *loaded.rows]:
        run = loaded.run(row, 0)
        check_options(plugins.find("networks", run.network.name), run.network, "network", given=1)
        plugins.make_method(run.method, tasks)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    prose = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose):
        if "://" not in target:
            assert (path.parent / target).exists(), target
