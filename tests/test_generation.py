"""Generation against a loop that runs the whole text through the model again for every token."""

import numpy as np
import pytest
from test_mamba import make

from mambacupy import sampling
from mambacupy.generation import Generated, generate, pad_prompts
from mambacupy.layers import map_params
from mambacupy.models import MambaConfig, MambaLM
from mambacupy.sampling import Sampling

MODEL, PARAMS = make(d_model=16, dt_rank=4)
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5]]
TOKENS, MASK = pad_prompts(PROMPTS)


def naive(model, params, prompt, count, choose):
    """New tokens of one row; choose(logits (1, vocab_size), step, text)."""
    text = list(prompt)
    for step in range(count):
        logits = model(params, np.array([text]))[0][:, -1, : model.config.vocab_size]
        text.append(int(choose(logits, step, text)))
    return text[len(prompt) :]


def greedy(model, params, prompt, count):
    return naive(model, params, prompt, count, lambda logits, *_: logits.argmax())


def without_end(model, params, prompts, count):
    """What each row makes when nothing stops it."""
    return [greedy(model, params, prompt, count) for prompt in prompts]


@pytest.mark.parametrize("row", ["base", "untied", "bc-dt-norm", "conv-2"])
def test_greedy_is_the_whole_text_again(row):
    changes = {"untied": {"tie_embeddings": False}, "bc-dt-norm": {"bc_dt_norm": True}, "conv-2": {"d_conv": 2}}
    model, params = make(d_model=16, dt_rank=4, **changes.get(row, {}))
    made = generate(model, params, TOKENS, 12, mask=MASK)
    assert isinstance(made, Generated) and made.tokens.dtype == made.lengths.dtype == np.int64
    assert made.tokens.tolist() == without_end(model, params, PROMPTS, 12)
    assert made.lengths.tolist() == [12, 12, 12]


def test_padding_may_stand_anywhere():
    wanted = generate(MODEL, PARAMS, TOKENS, 8, mask=MASK).tokens
    right, holes = np.full((3, 7), -5), np.full((3, 7), 10**6)
    right_mask, holes_mask = np.zeros((3, 7), bool), np.zeros((3, 7), bool)
    for i, prompt in enumerate(PROMPTS):
        right[i, : len(prompt)], right_mask[i, : len(prompt)] = prompt, True
        places = np.sort(np.random.default_rng(i).permutation(7)[: len(prompt)])
        holes[i, places], holes_mask[i, places] = prompt, True
    for tokens, mask in ((right, right_mask), (holes, holes_mask)):
        assert np.array_equal(generate(MODEL, PARAMS, tokens, 8, mask=mask).tokens, wanted)
    alone = [generate(MODEL, PARAMS, np.array([prompt]), 8).tokens[0].tolist() for prompt in PROMPTS]
    assert wanted.tolist() == alone


EVERY = {
    "temperature": {"temperature": 1.5},
    "top-k": {"temperature": 1.5, "top_k": 4},
    "top-p": {"temperature": 1.5, "top_p": 0.7},
    "min-p": {"temperature": 1.5, "min_p": 0.1},
    "penalty": {"repetition_penalty": 3.0},
    "all": {"temperature": 1.5, "top_k": 8, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.5},
}


@pytest.mark.parametrize("row", EVERY)
def test_sampling_of_a_batch(row):
    """Each row's tokens are those that its own logits, its own text and its own random numbers give."""
    uniforms = np.random.default_rng(11).random((10, 3))
    made = generate(MODEL, PARAMS, TOKENS, 10, mask=MASK, seed=11, **EVERY[row])
    for i, prompt in enumerate(PROMPTS):

        def choose(logits, step, text, i=i):
            seen = np.isin(np.arange(11), text)[None]
            return sampling.choose(logits, Sampling(**EVERY[row]), uniforms[step, i : i + 1], seen)[0]

        assert made.tokens[i].tolist() == naive(MODEL, PARAMS, prompt, 10, choose), i


def test_the_seed_decides():
    def run(seed, count=40):
        return generate(MODEL, PARAMS, TOKENS, count, mask=MASK, temperature=2.0, seed=seed).tokens

    assert np.array_equal(run(5), run(5))
    assert np.array_equal(run(5)[:, :7], run(5, 7))
    assert not np.array_equal(run(5), run(6))
    assert not np.array_equal(run(None), run(None))


def test_rounding_up_the_vocabulary_adds_no_tokens():
    """The last 5 of 16 columns are no tokens, whatever the model thinks of them."""
    model, params = make(tie_embeddings=False)
    params["lm_head"]["weight"][:] = 0
    params["lm_head"]["weight"][11:] = 50 * np.sign(params["norm_f"]["weight"])
    prompt = np.array([[1], [2]])
    logits = model.advance(params, prompt)
    assert abs(logits[:, 0, 11:]).max() > 5
    for weights in (params, params | {"lm_head": {"weight": -params["lm_head"]["weight"]}}):
        for options in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 11}, {"temperature": 5.0, "min_p": 0.0}):
            assert generate(model, weights, prompt, 60, seed=0, **options).tokens.max() < 11


def test_rows_stop_by_themselves():
    free = without_end(MODEL, PARAMS, PROMPTS, 30)
    stops = [free[0][4], free[1][9]]
    wanted = []
    for row in free:
        end = next((i + 1 for i, token in enumerate(row) if token in stops), 30)
        wanted.append(row[:end])
    longest = max(map(len, wanted))
    assert len({len(row) for row in wanted}) > 1, "the rows are to end at different steps"
    made = generate(MODEL, PARAMS, TOKENS, 30, mask=MASK, stop=stops, pad=-1)
    assert made.lengths.tolist() == [len(row) for row in wanted]
    assert made.tokens.tolist() == [row + [-1] * (longest - len(row)) for row in wanted]
    assert made.tokens.shape[1] == longest
    by_default = generate(MODEL, PARAMS, TOKENS, 30, mask=MASK, stop=stops).tokens
    assert np.array_equal(by_default, np.where(made.tokens == -1, stops[0], made.tokens))


def test_it_ends_when_all_rows_have():
    free, steps = without_end(MODEL, PARAMS, PROMPTS[:1], 30)[0], []
    made = generate(MODEL, PARAMS, TOKENS[:1], 30, stop=free[0], on_step=steps.append)
    assert made.tokens.tolist() == [[free[0]]] and len(steps) == 1


def test_steps_are_told_as_they_come():
    steps = []
    made = generate(MODEL, PARAMS, TOKENS, 9, mask=MASK, on_step=steps.append, stop=3, pad=7)
    assert np.array_equal(np.stack(steps, axis=1), made.tokens)
    ended = generate(MODEL, PARAMS, TOKENS, 9, mask=MASK, on_step=lambda tokens: tokens is not None)
    assert ended.tokens.shape == (3, 1)

    def interrupt(tokens):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(MODEL, PARAMS, TOKENS, 9, mask=MASK, on_step=interrupt)


def test_no_step_is_made_for_nothing(monkeypatch):
    """One call for the prompt, and one for each token but the last."""
    calls, advance = [], MambaLM.advance
    monkeypatch.setattr(MambaLM, "advance", lambda *args, **kw: calls.append(args[2].shape) or advance(*args, **kw))
    generate(MODEL, PARAMS, TOKENS, 4, mask=MASK)
    assert calls == [(3, 5)] + [(3, 1)] * 3


def test_nothing_to_do():
    for tokens, count, shape in ((TOKENS, 0, (3, 0)), (TOKENS[:0], 5, (0, 0))):
        made = generate(MODEL, PARAMS, tokens, count)
        assert made.tokens.shape == shape and made.lengths.tolist() == [0] * shape[0]


def test_pad_prompts():
    assert TOKENS.tolist() == [[3, 1, 4, 1, 5], [0, 0, 0, 9, 2], [0, 6, 5, 3, 5]]
    assert MASK.tolist() == [[True] * 5, [False] * 3 + [True] * 2, [False] + [True] * 4]
    assert [x.shape for x in pad_prompts([])] == [(0, 0), (0, 0)]
    with pytest.raises(TypeError, match=r"pad_prompts: prompts\[1\] is float64 \(1,\), wanted integers \(length,\)"):
        pad_prompts([[1], [1.5]])


BAD = TOKENS.copy()
BAD[1, 3] = 11
REFUSED = {
    "model": ({"model": PARAMS}, TypeError, "generate: model is of type dict, wanted a MambaLM"),
    "params": ({"params": {}}, ValueError, "MambaLM: params has no"),
    "tokens-list": ({"tokens": TOKENS.tolist()}, TypeError, "generate: tokens is of type list, wanted a NumPy or CuPy array"),
    "tokens-float": ({"tokens": TOKENS * 1.0}, TypeError, "generate: tokens is float64, wanted integers"),
    "tokens-axes": ({"tokens": TOKENS[0], "mask": None}, ValueError, r"has shape \(5,\), wanted \(batch, length\); a single"),
    "tokens-range": ({"tokens": BAD}, ValueError, r"generate: tokens\[1, 3\] is 11, wanted 0 to 10"),
    "tokens-none": ({"tokens": TOKENS[:, :0], "mask": None}, ValueError, "generate: row 0 of tokens has no token, wanted at"),
    "mask-row": ({"mask": MASK & [[True], [False], [True]]}, ValueError, "generate: row 1 of mask has no token, wanted at"),
    "mask-dtype": ({"mask": TOKENS}, TypeError, r"generate: mask is int64, wanted bool; write mask.astype\(bool\)"),
    "mask-shape": ({"mask": MASK[:2]}, ValueError, r"generate: mask has shape \(2, 5\), wanted \(3, 5\), the shape of tokens"),
    "count": ({"max_new_tokens": -1}, ValueError, "generate: max_new_tokens is -1, wanted 0 or more"),
    "count-float": ({"max_new_tokens": 2.0}, TypeError, "generate: max_new_tokens is 2.0, wanted an integer"),
    "seed": ({"seed": "1"}, TypeError, "generate: seed is '1', wanted an integer"),
    "stop": ({"stop": [3, 11]}, ValueError, "generate: stop is 11, wanted tokens from 0 to 10"),
    "stop-text": ({"stop": "a"}, TypeError, "generate: stop is 'a', wanted an integer"),
    "stop-float": ({"stop": 1.0}, TypeError, "generate: stop is 1.0, wanted a token or a sequence of tokens"),
    "pad": ({"pad": None, "on_step": 3}, TypeError, "generate: on_step is of type int, wanted a function"),
    "filter": ({"min_p": 0.1}, ValueError, "Sampling: min_p is 0.1, but temperature 0 takes the largest logit"),
}


@pytest.mark.parametrize("row", REFUSED)
def test_refuses(row):
    changes, error, message = REFUSED[row]
    given = {"model": MODEL, "params": PARAMS, "tokens": TOKENS, "max_new_tokens": 2, "mask": MASK} | changes
    with pytest.raises(error, match=message):
        generate(**given)


@pytest.mark.gpu
@pytest.mark.parametrize("row", ["greedy", *EVERY])
def test_gpu_makes_the_hosts_tokens(row):
    import cupy

    model = MambaLM(MambaConfig(d_model=64, n_layer=2, vocab_size=300))
    params = model.init(np.random.default_rng(0))
    params["embedding"]["weight"] *= 20  # logits far enough apart that rounding decides nothing
    tokens, mask = pad_prompts([[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5]])
    options = EVERY.get(row, {}) | {"seed": 3, "stop": 7}
    wanted = generate(model, params, tokens, 40, mask=mask, **options)
    on_gpu = map_params(cupy.asarray, params)
    steps = []
    got = generate(
        model, on_gpu, cupy.asarray(tokens), 40, mask=cupy.asarray(mask), on_step=lambda x: steps.append(x), **options
    )
    assert np.array_equal(got.tokens.get(), wanted.tokens) and np.array_equal(got.lengths.get(), wanted.lengths)
    assert np.array_equal(np.stack(steps, axis=1), wanted.tokens)
