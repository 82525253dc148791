"""The example poses the task it says it poses, learns it, and tests long sequences in chunks as if they were whole."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parent.parent / "examples" / "induction_heads"
sys.path.insert(0, str(FOLDER))

import induction as example  # noqa: E402

TINY = example.Task(vocabulary=8, length=8, d_model=32, batch=32, steps=150, rate=6e-3, longest=64)


@pytest.fixture(scope="module")
def trained():
    return example.train(TINY, np)


def test_the_answer_is_what_followed_the_special_token():
    task, count, length = example.TASKS["paper"], 2000, 12
    tokens, answers = example.sequences(np.random.default_rng(0), task, count, length)
    special = task.vocabulary - 1
    assert tokens.shape == (count, length) and tokens.min() >= 0 and (tokens[:, -1] == special).all()
    assert ((tokens == special).sum(1) == 2).all()
    place = (tokens == special).argmax(1)
    assert set(place) == set(range(length - 2))  # anywhere, and the answer comes before the end
    assert (tokens[np.arange(count), place + 1] == answers).all() and set(answers) == set(range(special))


def test_it_learns(trained):
    _, _, losses = trained
    guessing = np.log(TINY.vocabulary - 1)
    assert losses[0] > 0.9 * guessing and np.mean(losses[-20:]) < 0.05 * guessing


def test_it_remembers_for_longer_than_it_was_trained_to(trained):
    model, params, _ = trained
    assert example.accuracy(model, params, TINY, np, 2 * TINY.length) > 0.9


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_give_what_the_whole_sequence_gives(trained, chunk):
    model, params, _ = trained
    guesses = []
    for task in (replace(TINY, chunk=chunk), TINY):  # the second takes all 64 tokens at once
        tokens, answers = example.sequences(np.random.default_rng((1, 64)), task, task.tests, 64)
        guesses.append(example.accuracy(model, params, task, np, 64))
    assert guesses[0] == guesses[1]
    assert guesses[1] == (model.advance(params, tokens)[:, -1].argmax(-1) == answers).mean()


def test_results_are_written(tmp_path):
    pytest.importorskip("matplotlib")
    example.main(["--steps", "4", "--batch", "4", "--length", "16", "--longest", "128", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["task"]["steps"] == len(result["loss"]) == 4 and list(result["accuracy"]) == ["64", "128"]
    assert (tmp_path / "induction_heads.png").stat().st_size > 20_000


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_learns_on_a_gpu(dtype):
    import cupy

    model, params, losses = example.train(TINY, cupy, dtype)
    assert np.mean(losses[-20:]) < 0.1 * np.log(TINY.vocabulary - 1)
    assert example.accuracy(model, params, TINY, cupy, 2 * TINY.length) > 0.9
