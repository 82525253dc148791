"""Another library's logits and gradients on the same weights: tests/golden/README.md."""

from pathlib import Path

import numpy as np
import pytest
from cases import relative_error

from mambacupy.models import MambaLM

FOLDERS = [path.parent for path in sorted((Path(__file__).parent / "golden").glob("*/golden.npz"))]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_logits_and_gradients_of_another_library(folder):
    golden = np.load(folder / "golden.npz")
    model, params = MambaLM.from_pretrained(folder)
    logits, backprop = model(params, golden["tokens"])
    assert relative_error(logits, golden["logits"]) < 1e-5
    grads = backprop(golden["dlogits"])
    first, second = (layer["mixer"] for layer in grads["layers"])
    got = {
        "A_log": second["A_log"],
        "norm": grads["layers"][1]["norm"]["weight"],
        "conv1d": first["conv1d"]["weight"],
        "x_proj": first["x_proj"]["weight"],
        "embedding": grads["embedding"]["weight"],
    }
    assert {name: relative_error(x, golden[name]) for name, x in got.items() if relative_error(x, golden[name]) > 1e-5} == {}
