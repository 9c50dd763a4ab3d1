import re
from pathlib import Path


def test_the_loop_in_the_readme_runs(capsys):
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    found = capsys.readouterr().out
    assert "'mIoU': 0." in found
    assert "'rmse': " in found
