"""What the documents quote is there, and what they show runs."""

import re
from pathlib import Path

import pytest

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
