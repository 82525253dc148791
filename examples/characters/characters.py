"""Characters: train a Mamba to continue a text letter by letter, save it and go on from there, and let it write.

The text is "Alice's Adventures in Wonderland". The model learns from eleven chapters; the twelfth, which it never learns from,
tells how many bits a character it needs.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mambacupy import optim
from mambacupy.layers import map_params
from mambacupy.models import MambaConfig, MambaLM
from mambacupy.ops.loss import softmax_cross_entropy_bwd, softmax_cross_entropy_fwd

HERE = Path(__file__).parent
TEXT = (HERE / "alice.txt").read_text(encoding="ascii")
LETTERS = "".join(sorted(set(TEXT)))
CODES = np.array([LETTERS.index(letter) for letter in TEXT])
TRAINING, VALIDATION = np.split(CODES, [TEXT.rindex("\n" * 4) + 4])  # the twelfth chapter


@dataclass(frozen=True)
class Task:
    """What is trained, and how."""

    d_model: int
    layers: int
    batch: int
    length: int  # characters a sequence
    steps: int
    rate: float
    every: int = 50  # steps from one validation and checkpoint to the next


TASKS = {
    "cpu": Task(d_model=64, layers=2, batch=8, length=96, steps=1000, rate=6e-3),
    "cuda": Task(d_model=256, layers=4, batch=32, length=256, steps=1000, rate=2e-3),
}


def bits_per_character(model, params, xp, codes, chunk=1024):
    """Of one long text. Between chunks the model's state is carried on."""
    state, total = model.init_state(params, 1), 0.0
    codes = xp.asarray(codes[None])  # (1, length)
    for first in range(0, codes.shape[1] - 1, chunk):
        targets = codes[:, first + 1 : first + 1 + chunk]
        logits = model.advance(params, codes[:, first : first + targets.shape[1]], state)
        total += float(softmax_cross_entropy_fwd(logits, targets)[0]) * targets.size
    return total / (codes.size - 1) / np.log(2)


def train(task, model, xp, checkpoint, seed=0, stop=None, resume=False, report=None):
    """The parameters that validated best, and the history. `checkpoint` is written on the way; `resume` goes on from it."""
    rng = np.random.default_rng(seed)
    adam = optim.AdamW(optim.warmup_cosine(task.rate, task.steps // 20, task.steps))
    if resume:
        tree, history = optim.load(checkpoint)
        params, best, mean, square = (map_params(xp.asarray, tree[name]) for name in ("params", "best", "mean", "square"))
        state = optim.AdamWState(len(history["loss"]), mean, square)
        rng.bit_generator.state = history.pop("rng")
    else:
        params = best = map_params(xp.asarray, model.init(rng))
        state, history = adam.init(params), {"loss": [], "validation": []}
    losses, begin, before, last = [], time.perf_counter(), state.step, min(stop or task.steps, task.steps)
    while state.step < last:
        first = rng.integers(0, TRAINING.size - task.length, task.batch)
        tokens = xp.asarray(TRAINING[first[:, None] + np.arange(task.length + 1)])  # (batch, length + 1)
        logits, backprop = model(params, tokens[:, :-1])
        loss, saved = softmax_cross_entropy_fwd(logits, tokens[:, 1:])
        grads, _ = optim.clip_by_norm(backprop(softmax_cross_entropy_bwd(1.0, saved).logits), 1.0)
        params, state = adam.update(params, grads, state)
        losses.append(loss)
        if state.step % task.every and state.step != last:
            continue
        # To look at a loss is to wait for the GPU: only now and then.
        history["loss"] += [float(loss) / np.log(2) for loss in losses]
        seconds, losses = time.perf_counter() - begin, []
        bits = bits_per_character(model, params, xp, VALIDATION)
        if bits < min((bits for _, bits in history["validation"]), default=np.inf):
            best = params  # nothing changes parameters in place
        history["validation"].append((state.step, bits))
        tree = {"params": params, "best": best, "mean": state.mean, "square": state.square}
        optim.save(checkpoint, tree, **history, rng=rng.bit_generator.state)
        if report:
            line = f"training {np.mean(history['loss'][-task.every :]):.3f}  validation {bits:.3f} bits a character"
            report(f"step {state.step}/{task.steps}  {line}  {1e3 * seconds / (state.step - before):.0f} ms a step")
    return best, history


def write(model, params, xp, start, count, temperature=0.7, seed=0):
    """The text that follows `start`, one character at a time from the model's state. Temperature 0 takes the likeliest."""
    rng, state, said = np.random.default_rng(seed), model.init_state(params, 1), start
    tokens = [LETTERS.index(letter) for letter in start]
    for _ in range(count):
        logits = model.advance(params, xp.asarray([tokens]), state, last_only=True)[0, 0, : len(LETTERS)].astype(np.float32)
        logits = logits.get() if hasattr(logits, "get") else logits
        noise = rng.gumbel(size=len(LETTERS))  # argmax(logits/T + noise) is a draw from softmax(logits/T)
        tokens = [int(np.argmax(logits + temperature * noise))]
        said += LETTERS[tokens[0]]
    return said


def draw(history, task, picture):
    try:
        import matplotlib
    except ImportError:
        print('no picture: it takes matplotlib, which `pip install "mambacupy[plot]"` brings')
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    axes.plot(range(1, len(history["loss"]) + 1), history["loss"], color="0.65", linewidth=0.8, label="training, each batch")
    axes.plot(*zip(*history["validation"], strict=True), "o-", color="C1", markersize=4, label="chapter XII, never learnt from")
    axes.set(xlabel="step", ylabel="bits a character", ylim=(0, 6.5))
    axes.legend(frameon=False)
    axes.set_title(f"Alice's Adventures in Wonderland, {task.layers} layers of {task.d_model} channels", fontsize="medium")
    figure.savefig(picture, dpi=110)


def show(line):
    """A progress line: on a terminal it overwrites itself."""
    print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True) if sys.stderr.isatty() else print(line, flush=True)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="NumPy, or CuPy on the current GPU")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="float32 by default, bfloat16 on a GPU")
    parser.add_argument("--out", type=Path, default=HERE.parent.parent / "out" / "characters", help="folder of the results")
    parser.add_argument("--steps", type=int, help="in place of the device's")
    parser.add_argument("--stop", type=int, metavar="STEP", help="stop early; --resume goes on")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in the folder of the results")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    if given.device == "cuda":
        import cupy as xp
    else:
        xp = np
    task = TASKS[given.device] if given.steps is None else Task(**asdict(TASKS[given.device]) | {"steps": given.steps})
    dtype = given.dtype or ("float32" if given.device == "cpu" else "bfloat16")
    model = MambaLM(MambaConfig(task.d_model, task.layers, len(LETTERS)), dtype)

    given.out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    params, history = train(task, model, xp, given.out / "checkpoint.npz", given.seed, given.stop, given.resume, show)
    step, bits = min(history["validation"], key=lambda pair: pair[1])
    print(f"\nchapter XII: {bits:.3f} bits a character at step {step}, the best of {len(history['validation'])}\n")
    said = write(model, params, xp, "Alice thought ", 400)
    print(f"{said}\n")
    facts = {"task": asdict(task), "dtype": dtype, "device": given.device, "seconds": round(time.perf_counter() - begin, 1)}
    text = json.dumps(facts | {"bits": bits, "step": step, "sample": said} | history)
    (given.out / "result.json").write_text(text, encoding="utf-8")
    draw(history, task, given.out / "characters.png")
    print(f"wrote {given.out}, {time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
