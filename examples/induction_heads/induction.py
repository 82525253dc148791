"""Induction heads: train a Mamba on short sequences to recall what once followed a special token, and test it on long ones.

The task of section 4.1.2 and appendix E.1 of "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (Gu & Dao,
2023): random tokens, somewhere among them the special token and after it one to remember; at the end the special token again.
What comes next? The answer can be anywhere before, so the model has to select what it keeps, and to keep it.
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

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Task:
    """What is trained, how, and what it is tested on."""

    vocabulary: int  # the last token is the special one
    length: int  # of training sequences
    d_model: int
    batch: int
    steps: int
    rate: float
    longest: int  # tests are 2^6, 2^7, … so many tokens long
    tests: int = 64  # sequences per length
    chunk: int = 1 << 12  # tokens of a test sequence that are on the device at a time
    layers: int = 2


TASKS = {
    "small": Task(vocabulary=8, length=64, d_model=32, batch=32, steps=1000, rate=6e-3, longest=1 << 12),
    "paper": Task(vocabulary=16, length=256, d_model=64, batch=64, steps=8000, rate=2e-3, longest=1 << 20),
}


def sequences(rng, task, count, length):
    """Tokens (count, length), and the answers (count,)."""
    special = task.vocabulary - 1
    tokens = rng.integers(0, special, (count, length), np.int32)
    place, row = rng.integers(0, length - 2, count), np.arange(count)
    tokens[row, place] = tokens[:, -1] = special
    return tokens, tokens[row, place + 1].astype(np.int64)


def train(task, xp, dtype=None, seed=0, report=None):
    """A model, what it has learnt, and the loss of every step: (model, params, losses)."""
    rng = np.random.default_rng(seed)
    model = MambaLM(MambaConfig(task.d_model, task.layers, task.vocabulary), dtype)
    params = map_params(xp.asarray, model.init(rng))
    adam = optim.AdamW(optim.warmup_cosine(task.rate, task.steps // 20, task.steps), decay=0.0)
    state, losses, begin = adam.init(params), [], time.perf_counter()
    for step in range(1, task.steps + 1):
        tokens, answers = sequences(rng, task, task.batch, task.length)
        targets = np.full(tokens.shape, -1)  # -1 does not count: only the last token has a target
        targets[:, -1] = answers
        logits, backprop = model(params, xp.asarray(tokens))
        loss, saved = softmax_cross_entropy_fwd(logits, xp.asarray(targets))
        grads = backprop(softmax_cross_entropy_bwd(1.0, saved).logits)
        grads, _ = optim.clip_by_norm(grads, 1.0)
        params, state = adam.update(params, grads, state)
        losses.append(loss)
        if report and (step % 50 == 0 or step == task.steps):  # to look at a loss is to wait for the GPU
            recent, seconds = float(sum(losses[-50:]) / len(losses[-50:])), time.perf_counter() - begin
            report(f"step {step}/{task.steps}  loss {recent:.4f}  {1e3 * seconds / step:.1f} ms a step")
    return model, params, [float(loss) for loss in losses]


def accuracy(model, params, task, xp, length, seed=1):
    """The part of test sequences of a length that is answered rightly. Between chunks the model's state is carried on."""
    tokens, answers = sequences(np.random.default_rng((seed, length)), task, task.tests, length)
    state = model.init_state(params, task.tests)
    for first in range(0, length, task.chunk):
        logits = model.advance(params, xp.asarray(tokens[:, first : first + task.chunk]), state, last_only=True)
    return float((logits[:, 0].argmax(-1) == xp.asarray(answers)).mean())


def draw(losses, results, task, picture):
    try:
        import matplotlib
    except ImportError:
        print('no picture: it takes matplotlib, which `pip install "mambacupy[plot]"` brings')
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    left.plot(range(1, len(losses) + 1), losses, color="C0", linewidth=0.8)
    left.axhline(np.log(task.vocabulary - 1), color="0.55", linestyle=":", label="guessing")
    left.set(xlabel="step", ylabel="loss (nats)", yscale="log")
    left.legend(frameon=False)
    left.set_title(f"Training, {task.length} tokens a sequence", fontsize="medium")
    right.plot(list(results), [100 * x for x in results.values()], "o-", color="C1", clip_on=False)
    right.axvline(task.length, color="0.55", linestyle="--", label="trained at")
    right.axhline(100 / (task.vocabulary - 1), color="0.55", linestyle=":", label="guessing")
    right.set(xlabel="length (tokens)", ylabel="accuracy (%)", ylim=(0, 105))
    right.set_xscale("log", base=2)
    right.legend(frameon=False, loc="center right")
    right.set_title(f"Test, {task.tests} sequences a length", fontsize="medium")
    figure.savefig(picture, dpi=110)


def show(line):
    """A progress line: on a terminal it overwrites itself."""
    print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True) if sys.stderr.isatty() else print(line, flush=True)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="NumPy, or CuPy on the current GPU")
    parser.add_argument("--task", choices=TASKS, help="small on the CPU, the paper's on a GPU")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32", help="what the model computes in")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "induction_heads", help="folder of the results")
    for name, kind in (("steps", int), ("rate", float), ("batch", int), ("length", int), ("longest", int)):
        parser.add_argument(f"--{name}", type=kind, help="in place of the task's")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    if given.device == "cuda":
        import cupy as xp
    else:
        xp = np
    task = asdict(TASKS[given.task or ("small" if given.device == "cpu" else "paper")])
    task = Task(**task | {name: x for name, x in vars(given).items() if name in task and x is not None})

    begin = time.perf_counter()
    model, params, losses = train(task, xp, given.dtype, given.seed, show)
    seconds, results = time.perf_counter() - begin, {}
    print(f"\ntrained {task.steps} steps in {seconds:.0f} s")
    for length in (1 << n for n in range(6, task.longest.bit_length())):
        results[length] = accuracy(model, params, task, xp, length)
        print(f"length {length:8d}  accuracy {100 * results[length]:5.1f} %", flush=True)
    given.out.mkdir(parents=True, exist_ok=True)
    facts = {"task": asdict(task), "dtype": given.dtype, "device": given.device, "seconds": round(seconds, 1)}
    text = json.dumps(facts | {"accuracy": results, "loss": losses})
    (given.out / "result.json").write_text(text, encoding="utf-8")
    draw(losses, results, task, given.out / "induction_heads.png")
    print(f"wrote {given.out}, {time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
