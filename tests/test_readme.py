"""The README's Python runs as it stands, on a small backbone and data set."""

import re
from pathlib import Path

README = (Path(__file__).resolve().parents[1] / "README.md").read_text("utf-8")


def test_the_python_of_the_readme_runs(
    tiny_backbone_folder, toy_csv, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len(blocks) == 2
    for block in blocks:
        code = block.replace('"smollm2-135m"', repr(str(tiny_backbone_folder)))
        code = code.replace('"bbc-news"', repr(str(toy_csv)))
        exec(compile(code, "README.md", "exec"), {})  # noqa: S102 - our own file
    assert "shallowest layer within 1 point" in capsys.readouterr().out
    assert Path("news-bundle", "chip.json").is_file()


def test_every_command_of_the_readme_exists():
    from chipviz.__main__ import app

    known = {c.name or c.callback.__name__ for c in app.registered_commands}
    used = set(re.findall(r"python -m chipviz (\w+)", README))
    assert used
    assert used <= known
