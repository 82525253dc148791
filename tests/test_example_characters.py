"""The example learns from its text, tests on what it never saw, goes on from a file bit for bit, and writes."""

import json
import re
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mambacupy.models import MambaConfig, MambaLM

FOLDER = Path(__file__).parent.parent / "examples" / "characters"
sys.path.insert(0, str(FOLDER))

import characters as example  # noqa: E402

TINY = example.Task(d_model=16, layers=1, batch=4, length=32, steps=60, rate=2e-2, every=20)


def model_of(task):
    return MambaLM(MambaConfig(task.d_model, task.layers, len(example.LETTERS)), "float32")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return example.train(TINY, model_of(TINY), np, tmp_path_factory.mktemp("characters") / "checkpoint.npz")


def test_the_text_is_whole_and_its_last_chapter_is_held_back():
    chapters = example.TEXT.split("\n" * 4)
    assert len(chapters) == 12 and all(re.match(r"\s*CHAPTER [IVX]+\b", chapter) for chapter in chapters)
    assert len(example.TEXT) == 144_337 and len(re.findall(r"\w+", example.TEXT)) == 27_327
    training, validation = ("".join(example.LETTERS[i] for i in codes) for codes in (example.TRAINING, example.VALIDATION))
    assert training + validation == example.TEXT and validation == chapters[-1]


def bits_of_counts(order):
    """Of the validation text, by counts of what followed each 0, 1, … order characters, interpolated after Witten and Bell."""
    training, text = (codes.tolist() for codes in (example.TRAINING, example.VALIDATION))
    counts = [defaultdict(Counter) for _ in range(order + 1)]
    for n, found in enumerate(counts):
        for i in range(n, len(training)):
            found[tuple(training[i - n : i])][training[i]] += 1
    text, bits = training[-order:] + text if order else text, 0.0
    for i in range(order, len(text)):
        p = 1 / len(example.LETTERS)
        for n, found in enumerate(counts):
            if seen := found.get(tuple(text[i - n : i])):
                p = (seen[text[i]] + len(seen) * p) / (seen.total() + len(seen))
        bits -= np.log2(p)
    return bits / (len(text) - order)


def test_readme_has_what_counting_gives():
    bits = [bits_of_counts(order) for order in range(7)]
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert min(bits) == bits[4]
    assert f"{bits[0]:.2f} bits" in readme and f"{bits[4]:.2f} bits" in readme


def test_it_learns(trained):
    _, history = trained
    assert len(history["loss"]) == TINY.steps and [step for step, _ in history["validation"]] == [20, 40, 60]
    assert history["loss"][0] == pytest.approx(np.log2(72), abs=0.1)  # 72 rows of logits, all alike at first
    assert history["validation"][-1][1] < bits_of_counts(0) - 0.2  # the letters' frequencies


def test_chunks_give_what_the_whole_text_gives(trained):
    params, _ = trained
    codes = example.VALIDATION[:400]
    whole = example.bits_per_character(model_of(TINY), params, np, codes, chunk=400)
    for chunk in (1, 64, 399):
        assert example.bits_per_character(model_of(TINY), params, np, codes, chunk) == pytest.approx(whole, rel=1e-5)


def test_it_goes_on_bit_for_bit(tmp_path):
    task = replace(TINY, steps=6, every=2)
    model, paths = model_of(task), (tmp_path / "whole.npz", tmp_path / "parts.npz")
    whole = example.train(task, model, np, paths[0])
    example.train(task, model, np, paths[1], stop=2)
    assert example.optim.load(paths[1])[0]["params"] is not None
    parts = example.train(task, model, np, paths[1], resume=True)
    assert json.dumps(parts[1]) == json.dumps(whole[1]) and len(whole[1]["loss"]) == 6
    with np.load(paths[0]) as a, np.load(paths[1]) as b:
        assert a.files == b.files and all(a[name].tobytes() == b[name].tobytes() for name in a.files)


def test_it_writes_what_the_model_finds_likeliest(trained):
    params, _ = trained
    model = model_of(TINY)
    said = example.write(model, params, np, "Alice", 20, temperature=0)
    codes = np.array([[example.LETTERS.index(letter) for letter in said]])
    likeliest = model.advance(params, codes)[0, :, : len(example.LETTERS)].argmax(-1)
    assert said.startswith("Alice") and len(said) == 25
    assert (likeliest[4:-1] == codes[0, 5:]).all()
    drawn = [example.write(model, params, np, "O", 40, temperature=1, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_results_are_written(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(example.TASKS, "cpu", replace(TINY, steps=4, every=2))
    example.main(["--stop", "2", "--out", str(tmp_path)])
    example.main(["--resume", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "result.json").read_text())
    assert len(result["loss"]) == 4 and [step for step, _ in result["validation"]] == [2, 4]
    assert result["bits"] == min(bits for _, bits in result["validation"])
    assert result["sample"] in capsys.readouterr().out and (tmp_path / "characters.png").stat().st_size > 10_000


@pytest.mark.gpu
def test_it_learns_on_a_gpu(trained, tmp_path):
    import cupy

    model = MambaLM(MambaConfig(TINY.d_model, TINY.layers, len(example.LETTERS)), "bfloat16")
    params, history = example.train(TINY, model, cupy, tmp_path / "checkpoint.npz")
    assert history["validation"][-1][1] == pytest.approx(trained[1]["validation"][-1][1], abs=0.2)
    assert len(example.write(model, params, cupy, "Alice", 20)) == 25
