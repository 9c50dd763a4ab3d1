import re
from pathlib import Path


def test_what_the_readme_says_runs(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))
    exec(compile(code, "README.md", "exec"), {})
    found = capsys.readouterr().out
    assert "'mIoU': 0." in found
    assert "'rmse': " in found
    assert found.endswith("['segmentation', 'depth', 'guess'] 5\n")
