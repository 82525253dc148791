"""What the documents quote is there, and what they show runs."""

import re
import shlex
from pathlib import Path

import command
import numpy as np
import pytest
import small_models

run = command.run

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/README.md")]


def test_the_gradients_equations_stand_where_the_table_says():
    kernels = "".join((ROOT / "cuda_src" / name).read_text() for name in ("selective_scan_bwd.cu", "combine_carries.cu"))
    reference = (ROOT / "mambacupy" / "reference" / "scan.py").read_text()
    rows = re.findall(r"^\|[^|]*\|[^|]*\| (.*?) \| (.*?) ?\|$", (ROOT / "docs" / "gradient.md").read_text(), re.MULTILINE)
    fragments = [(text, source) for row in rows for cell, source in zip(row, (kernels, reference), strict=True)
                 for text in re.findall(r"`([^`]+)`", cell) if not text.endswith(".cu")]  # fmt: skip
    assert len(fragments) > 30
    assert [text for text, source in fragments if text not in source] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    targets = re.findall(r"\]\(([^)#:]+)\)", document.read_text())
    assert [target for target in targets if not (document.parent / target).exists()] == []


def test_the_gradients_example_runs(capsys):
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "gradient.md").read_text(), re.DOTALL)[-1]
    exec(code, {})
    errors = [float(x) for x in re.findall(r": ([0-9.e-]+)", capsys.readouterr().out)]
    assert len(errors) == 8 and max(errors) < 1e-12


@pytest.fixture
def readme(tmp_path, monkeypatch):
    """README.md's text, in a folder that has what it speaks of."""
    model, params = small_models.make({"d_model": 8, "n_layer": 1, "vocab_size": 50280}, 0.1, np.float32)
    model.save_pretrained(params, tmp_path / "mamba-130m-hf")
    monkeypatch.chdir(tmp_path)
    return (ROOT / "README.md").read_text()


def test_the_readmes_python_runs(readme):
    names = {}
    for code in re.findall(r"```python\n(.*?)```", readme, re.DOTALL):
        exec(code, names)
    assert names["grads"].keys() == names["params"].keys()


def test_the_readmes_commands_run(readme, run):
    small_models.save_tokenizer("mamba-130m-hf/tokenizer.json")
    arguments = {name: np.ones((2, 3, 70)) for name in ("u", "delta", "B", "C", "dy")} | {"A": -np.ones((3, 3))}
    command.save(Path("FOLDER"), arguments)
    Path("FOLDER", "dy.npy").rename("dy.npy")
    lines = [shlex.split(line, comments=True)[1:] for line in re.findall(r"^    (mambacupy .*)$", readme, re.MULTILINE)]
    assert [line[0] for line in lines] == ["scan", "grad", "generate"]
    for line in lines:
        done = run(*line)
        assert done.code == 0, done.err
