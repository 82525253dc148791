"""`mambacupy grad`: any block length gives the gradients of the scan in one piece; files are treated as `scan` treats them."""

import errno
import json
import os
import shlex

import cases
import command
import numpy as np
import pytest
from command import (
    OPTIONS,
    SIGNALS,
    change,
    check_interruption,
    command_options,
    files_in,
    forbid,
    refused,
    same,
    save,
    shown_on_terminal,
    start,
    write,
)

from mambacupy import grad_files, npy_files, selective_scan_bwd, selective_scan_fwd
from mambacupy.npy_files import open_array

run = command.run

PER_STEP = ("u", "delta", "z", "initial_state")
"""Gradients that are no sums over time: the same to the last bit. So are those of varying B and C."""


def make(dy_dtype=None, dlast_state=True, **changes):
    """A case's arguments with the gradients that enter its backward pass, and its options."""
    arguments, options = cases.make(**changes)
    rng = np.random.default_rng(1)
    u, A = arguments["u"], arguments["A"]
    arguments["dy"] = rng.standard_normal(u.shape).astype(dy_dtype or u.dtype)
    if dlast_state:
        shape = (*u.shape[:2], A.shape[1])
        values = rng.standard_normal(shape) + 1j * rng.standard_normal(shape)
        arguments["dlast_state"] = (values if A.dtype.kind == "c" else values.real).astype(A.dtype)
    return arguments, options


def in_one_piece(arguments, options):
    """Gradients by the name of the argument, from the calls on arrays."""
    scanned = {name: x for name, x in arguments.items() if name not in ("dy", "dlast_state")}
    _, _, saved = selective_scan_fwd(**scanned, **options)
    found = selective_scan_bwd(arguments["dy"], saved, arguments.get("dlast_state"))
    return {name: x for name, x in found._asdict().items() if x is not None}


def written(folder):
    """What lies in a folder of gradients, by the name of the argument."""
    return {path.stem.removeprefix("d"): open_array(path) for path in folder.iterdir()}


@pytest.fixture
def base(tmp_path):
    """The base case's arguments with dy and dlast_state, and a folder that holds them."""
    arguments, _ = make()
    return arguments, save(tmp_path / "in", arguments)


# ---------------------------------------------------------------------------------------------------- results
TABLE = {
    "base": {},
    "reverse": {"reverse": True},
    "zoh": {"discretization": "zoh"},
    "zoh-complex-reverse": {"discretization": "zoh", "complex": True, "reverse": True},
    "complex": {"complex": True},
    "complex-interleaved": {"complex": True, "B": "interleaved", "C": "interleaved"},
    "complex-interleaved-reverse": {"complex": True, "B": "interleaved", "C": "interleaved", "reverse": True},
    "complex-constant": {"complex": True, "B": "constant", "C": "constant"},
    "groups": {"B": 3, "C": 3},
    "groups-differ": {"B": 4, "C": 6},
    "constant-B": {"B": "constant"},
    "constant-C": {"C": "constant", "reverse": True},
    "constant-BC": {"B": "constant", "C": "constant"},
    "no-initial-state": {"initial_state": False},
    "no-dlast-state": {"dlast_state": False},
    "only-required": {"D": False, "z": False, "delta_bias": False, "initial_state": False, "dlast_state": False},
    "no-softplus": {"delta_softplus": False},
    "channel-order": {"order": "channel"},
    "length-1": {"length": 1},
    "length-64": {"length": 64, "reverse": True},
    "length-256": {"length": 256},
}


def check_against_one_piece(folder, wanted, arguments, tolerance):
    found = written(folder)
    assert set(found) == set(wanted)
    for name, x in found.items():
        assert (x.shape, x.dtype) == (arguments[name].shape, arguments[name].dtype), name
        if name in PER_STEP or x.ndim > 2:
            assert same(x, wanted[name]), name
        else:
            assert cases.relative_error(x, wanted[name]) <= tolerance, name


@pytest.mark.parametrize("row", TABLE)
def test_any_block_length_gives_the_gradients_of_one_piece(tmp_path, run, row):
    arguments, options = make(**{"dtype": "float64", "dim": 12, "state": 4, "length": 200} | TABLE[row])
    folder = save(tmp_path / "in", arguments)
    wanted = in_one_piece(arguments, options)
    for block_length in (1, 64, 100, 128, 1000, None):
        blocks = ["--block-length", block_length] if block_length else []
        done = run("grad", folder, "-o", tmp_path / "out", "--force", *blocks, *command_options(options))
        assert done.code == 0, done.err
        check_against_one_piece(tmp_path / "out", wanted, arguments, 1e-12)


@pytest.mark.parametrize(
    "changes, tolerance",
    [
        ({"dtype": "float32"}, 1e-6),
        ({"dtype": "float32", "complex": True, "B": "constant"}, 1e-6),
        ({"dtype": "float16"}, 1e-6),
        ({"dtype": "bfloat16"}, 1e-6),
        ({"dtype": "bfloat16", "dy_dtype": np.float32}, 1e-6),
        ({"dtype": "bfloat16", "complex": True, "B": "interleaved", "C": "interleaved"}, 1e-6),
        ({"dtype": "bfloat16", "B": 3, "C": "constant", "reverse": True}, 1e-6),
    ],
    ids=lambda x: "-".join(str(getattr(v, "__name__", v)) for v in x.values()) if isinstance(x, dict) else "",
)
def test_every_dtype(tmp_path, run, changes, tolerance):
    arguments, options = make(length=200, **changes)
    folder = save(tmp_path / "in", arguments)
    done = run("grad", folder, "-o", tmp_path / "out", "--block-length", 64, *command_options(options))
    assert (done.code, done.err) == (0, "")
    check_against_one_piece(tmp_path / "out", in_one_piece(arguments, options), arguments, tolerance)


def test_sums_over_many_blocks_lose_nothing(tmp_path, run):
    """The sum of one big block and many small ones, each below half a unit in the last place of the big one."""
    blocks = 64
    arguments = {name: np.ones((1, 1, 64 * blocks), np.float32) for name in ("u", "delta", "dy")}
    arguments |= {name: np.zeros((1, 1), np.float32) for name in ("A", "B", "C")} | {"D": np.zeros(1, np.float32)}
    arguments["dy"][..., :-64] = 2.0**-24
    arguments["dy"][..., -64:] = 16  # whose sum is 2¹⁰: a unit in the last place is 2⁻¹³, a small block 2⁻¹⁸
    run("grad", save(tmp_path / "in", arguments), "-o", tmp_path / "out", "--block-length", 64)
    assert np.load(tmp_path / "out" / "dD.npy")[0] == np.float32(2**10 + (blocks - 1) * 2.0**-18)
    assert np.load(tmp_path / "out" / "dD.npy")[0] > 2**10


def test_what_overflows_is_infinite_without_a_word(tmp_path, run):
    arguments, _ = make(dtype="float32", length=130)
    arguments["dy"][...] = 1e38
    done = run("grad", save(tmp_path / "in", arguments), "-o", tmp_path / "out", "--block-length", 64, "--quiet")
    assert (done.code, done.out, done.err) == (0, "", "")
    assert not np.all(np.isfinite(np.load(tmp_path / "out" / "dD.npy")))


def test_blocks_are_whole_chunks_and_walked_both_ways(base, tmp_path, run, monkeypatch):
    walked = []

    def record(name):
        function = getattr(grad_files, name)
        monkeypatch.setattr(grad_files, name, lambda u, **rest: walked.append((name[15:], u.shape[2])) or function(u, **rest))

    arguments, _ = make(length=200)
    folder = save(tmp_path / "long", arguments)
    record("selective_scan")
    record("selective_scan_fwd")
    for options in ([], ["--reverse"]):
        walked.clear()
        run("grad", folder, "-o", tmp_path / "out", "--block-length", 65, "--force", *options)
        first, second = (72, 128) if options else (128, 72)
        assert walked == [("", first), ("fwd", second), ("fwd", first)]


@pytest.mark.parametrize("changes", [{}, {"complex": True}, {"dtype": "bfloat16", "B": 3}], ids=["real", "complex", "bfloat16"])
def test_every_source_of_the_same_arrays_gives_the_same(tmp_path, run, changes):
    arguments, options = make(**changes)
    folder = save(tmp_path / "folder", arguments)
    fortran = {name: np.asfortranarray(x) for name, x in arguments.items()}
    sources = {
        "folder": [folder],
        "stored": [save(tmp_path / "stored", arguments, np.savez)],
        "compressed": [save(tmp_path / "compressed", arguments, np.savez_compressed)],
        "fortran": [save(tmp_path / "fortran", fortran)],
        "single files": [word for name in arguments for word in (f"--{name}", folder / f"{name}.npy")],
        "hyphens": [word for name in arguments for word in (f"--{name.replace('_', '-')}", folder / f"{name}.npy")],
    }
    wanted = in_one_piece(arguments, options)
    for source, words in sources.items():
        done = run("grad", *words, "-o", tmp_path / f"out of {source}", "--block-length", 64, *OPTIONS)
        assert done.code == 0, done.err
        check_against_one_piece(tmp_path / f"out of {source}", wanted, arguments, 1e-6)


def test_gradients_may_lie_elsewhere_than_inputs(base, tmp_path, run):
    """…and those named by options come before those in INPUTS."""
    arguments, folder = base
    other = {"dy": arguments["dy"] + 1, "dlast_state": arguments["dlast_state"] - 1}
    for name, x in other.items():
        np.save(tmp_path / f"{name}.npy", x)
    (folder / "dy.npy").unlink()
    options = ["--dy", tmp_path / "dy.npy", "--dlast-state", tmp_path / "dlast_state.npy"]
    assert run("grad", folder, *options, "-o", tmp_path / "out", *OPTIONS).code == 0
    wanted = in_one_piece(arguments | other, {"delta_softplus": True})
    check_against_one_piece(tmp_path / "out", wanted, arguments, 1e-6)


@pytest.mark.parametrize(
    "changes", [{"length": 0}, {"batch": 0}, {"dim": 0}, {"length": 0, "complex": True, "B": "interleaved", "C": "constant"}]
)
def test_arrays_without_elements(tmp_path, run, changes):
    arguments, options = make(**changes)
    done = run("grad", save(tmp_path / "in", arguments), "-o", tmp_path / "out", *OPTIONS)
    assert (done.code, done.err) == (0, "")
    check_against_one_piece(tmp_path / "out", in_one_piece(arguments, options), arguments, 0)
    assert same(open_array(tmp_path / "out" / "dinitial_state.npy"), arguments["dlast_state"])


@pytest.mark.gpu
@pytest.mark.parametrize(
    "row", ["base", "zoh-complex-reverse", "complex-interleaved", "constant-BC", "only-required", "groups"]
)
@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-12), ("float32", 1e-4), ("bfloat16", 1e-2)])
def test_gpu(tmp_path, run, row, dtype, tolerance):
    arguments, options = make(**{"dtype": dtype, "length": 200} | TABLE[row])
    folder = save(tmp_path / "in", arguments)
    wanted = in_one_piece(arguments, options)
    for block_length in (64, 128, 1000):
        words = ["--device", "cuda", "--block-length", block_length, "--force", *command_options(options)]
        done = run("grad", folder, "-o", tmp_path / "out", *words)
        assert done.code == 0, done.err
        found = written(tmp_path / "out")
        assert set(found) == set(wanted)
        for name, x in found.items():
            double = np.complex128 if x.dtype.kind == "c" else np.float64
            assert cases.relative_error(x, wanted[name].astype(double)) <= tolerance, name


# ---------------------------------------------------------------------------------------------------- bad input
BAD = {  # damage to the folder of inputs, which may name others; words of the one line
    "no-such-folder": (lambda folder: folder / "no", ["in/no: ", "o such file or"]),
    "array-missing": (lambda folder: (folder / "B.npy").unlink(), ["in: no B.npy", "gradient needs u, delta, A, B, C and dy"]),
    "dy-missing": (lambda folder: (folder / "dy.npy").unlink(), ["in: no dy.npy", "--dy FILE"]),
    "file-cut-short": (write("dy.npy", slice(-4)), ["in/dy.npy: cut short: 13436 bytes", "wanted 13440"]),
    "text": (write("dy.npy", b"1 2 3\n4 5 6\n"), ["in/dy.npy: not a .npy file"]),
    "pickled": (change("dlast_state", lambda h: np.array([{}])), ["in/dlast_state.npy: holds pickled Python objects"]),
    "unreadable": (lambda folder: forbid(folder / "dy.npy"), ["in/dy.npy: Permission denied"]),
    "wrong-shape": (change("dy", lambda dy: dy[..., 1:]), ["in/dy.npy: dy has shape (2, 24, 69)", "wanted (batch=2, dim=24"]),
    "wrong-axes": (change("dy", lambda dy: dy.swapaxes(1, 2)), ["in/dy.npy: dy has shape (2, 70, 24)", "dy.swapaxes(-1, -2)"]),
    "wrong-dtype": (change("dy", np.float64), ["in/dy.npy: dy is float64", "wanted float32 because u is float32"]),
    "big-endian": (change("dy", lambda dy: dy.astype(">f4")), ["in/dy.npy: dy is float32 in foreign byte order"]),
    "complex": (change("dy", lambda dy: dy + 0j), ["in/dy.npy: dy is complex64", "it must be real"]),
    "last-state": (change("dlast_state", lambda h: h[:1]), ["in/dlast_state.npy: dlast_state has shape (1, 24, 16)"]),
    "last-state-dtype": (change("dlast_state", lambda h: h + 0j), ["in/dlast_state.npy: dlast_state is complex64"]),
    "of-the-scan": (change("z", lambda z: z[:1]), ["in/z.npy: z has shape (1, 24, 70)", "wanted (batch=2"]),
    "a-single-array": (lambda folder: folder / "u.npy", ["in/u.npy: not an .npz file"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_in_one_line(base, tmp_path, run, case):
    damage, words = BAD[case]
    folder = base[1]
    source = damage(folder) or folder
    before = set(tmp_path.rglob("*"))
    assert refused(run("grad", source, "-o", tmp_path / "out", *OPTIONS), words)
    assert set(tmp_path.rglob("*")) == before


USES = {  # command line, where {} is the folder of the test; words of the one line
    "no-inputs": ("-o {}/out", ["no u.npy, delta.npy, A.npy, B.npy, C.npy, dy.npy", "--u FILE"]),
    "no-output": ("{}/in", ["--output"]),
    "no-last-state": ("{}/in -o {}/out --last-state {}/h.npy", ["--last-state"]),
    "discretization": ("{}/in -o {}/out --discretization tustin", ["'tustin'", "euler", "zoh"]),
    "block-length": ("{}/in -o {}/out --block-length 0", ["--block-length", "0"]),
    "output-exists": ("{}/in -o {}/there", ["there/dB.npy: exists; --force replaces it"]),
    "output-is-a-file": ("{}/in -o {}/x.npz --force", ["x.npz: is a file, wanted the name of a folder"]),
    "output-is-in-a-file": ("{}/in -o {}/x.npz/out --force", ["x.npz/out: Not a directory; nothing was written"]),
    "output-is-a-dangling-link": ("{}/in -o {}/link --force", ["link: is a file, wanted the name of a folder"]),
    "no-folder-for-output": ("{}/in -o {}/no/out", ["no/out: No such file or directory; nothing was written"]),
    "output-name-too-long": ("{}/in -o {}/" + "y" * 300, ["yyy: ", "name too long"]),
    "output-is-input": ("{}/in --dy {}/there/dB.npy -o {}/sub/../there --force", ["there/dB.npy: is an input"]),
    "a-folder-in-the-place-of-a-file": ("{}/in -o {}/sub --force", ["sub/du.npy: is a folder, wanted"]),
    "empty-inputs": ("'' -o {}/out", ["INPUTS", "is empty"]),
    "empty-dy": ("{}/in -o {}/out --dy ''", ["'--dy'", "is empty (a shell variable that is not set?)"]),
    "empty-dlast-state": ("{}/in -o {}/out --dlast-state ''", ["'--dlast-state'", "is empty"]),
    "empty-output": ("{}/in -o ''", ["'--output'", "is empty"]),
    "device": ("{}/in -o {}/out --device gpu", ["--device gpu: wanted auto, cpu, cuda or cuda:N"]),
}


@pytest.mark.parametrize("case", USES)
def test_bad_use_is_told_in_one_line(base, tmp_path, run, case):
    line, words = USES[case]
    np.savez(tmp_path / "x.npz", **base[0])
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "sub" / "du.npy").mkdir(parents=True)
    (tmp_path / "there").mkdir()
    np.save(tmp_path / "there" / "dB.npy", base[0]["dy"])
    before, paths = files_in(tmp_path), set(tmp_path.rglob("*"))
    assert refused(run("grad", *shlex.split(line.replace("{}", shlex.quote(str(tmp_path))))), words)
    assert (files_in(tmp_path), set(tmp_path.rglob("*"))) == (before, paths)


# ---------------------------------------------------------------------------------------------------- complete or absent
def test_a_folder_that_exists_keeps_what_is_in_it(base, tmp_path, run):
    arguments, folder = base
    out = tmp_path / "out"
    out.mkdir()
    others = {"notes.txt": b"mine", "y.npy": b"too", "dq.npy": b"as well"}
    for name, content in others.items():
        (out / name).write_bytes(content)
    assert run("grad", folder, "-o", out, *OPTIONS).code == 0
    (out / "dC.npy").write_bytes(b"changed")
    assert refused(run("grad", folder, "-o", out), ["out/du.npy: exists; --force replaces it"])
    assert (out / "dC.npy").read_bytes() == b"changed"
    assert run("grad", folder, "-o", out, "--force", *OPTIONS).code == 0
    assert {name: (out / name).read_bytes() for name in others} == others
    wanted = in_one_piece(arguments, {"delta_softplus": True})
    for name, x in wanted.items():
        assert cases.relative_error(open_array(out / f"d{name}.npy"), x) < 1e-6
    assert sorted(os.listdir(out)) == sorted([*others, *(f"d{name}.npy" for name in wanted)])


def test_gradients_may_lie_beside_the_inputs(base, tmp_path, run):
    before = files_in(base[1])
    for force in ([], ["--force"]):
        assert run("grad", base[1], "-o", base[1], *OPTIONS, *force).code == 0
    after = files_in(base[1])
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 9


FAILURES = command.FAILURES | {
    "disk": (OSError(errno.ENOSPC, "No space left on device"), 2, "out/dA.npy: No space left on device; nothing was written"),
    "disk-states": (OSError(errno.ENOSPC, "No space left on device"), 2, "out/states: No space left on device; nothing"),
    "name": (OSError(errno.EIO, "Input/output error", "dA.npy"), 2, "dA.npy: Input/output error"),
}


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("failure", FAILURES)
def test_failure_midway_leaves_everything_as_it_was(base, tmp_path, run, monkeypatch, failure, exists):
    error, code, words = FAILURES[failure]
    out, calls, parts = tmp_path / "out", [], []
    module, name, good = {
        "disk": (os, "posix_fallocate", 2),
        "disk-states": (os, "posix_fallocate", 9),
        "name": (npy_files, "_rename", 4),
    }.get(failure, (grad_files, "selective_scan_bwd", 1))
    function = getattr(module, name)

    def fail(*arguments):
        calls.append(name)
        parts.append(len(list(out.glob(".*.part"))))
        if len(calls) <= good:
            return function(*arguments)
        raise error

    monkeypatch.setattr(module, name, fail)
    if exists:
        out.mkdir()
        (out / "dA.npy").write_bytes(b"mine")
        (out / "notes").write_bytes(b"mine")
    before, paths = files_in(tmp_path), set(tmp_path.rglob("*"))
    done = run("grad", base[1], "-o", out, "--block-length", 64, *["--force"] * exists)
    assert len(calls) == good + 1
    assert parts[-1] == {"disk": 3, "disk-states": 10, "name": 10 if not exists else 6}.get(failure, 10)
    assert (done.code, done.out, len(done.err.splitlines())) == (code, "", 1)
    assert words in done.err
    assert (files_in(tmp_path), set(tmp_path.rglob("*"))) == (before, paths)


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("exists", [False, True], ids=["new", "force"])
def test_interruption_leaves_everything_as_it_was(tmp_path, name, exists):
    arguments, _ = make(batch=1, dim=2, state=1, length=1_000_000)
    folder, out = save(tmp_path / "in", arguments), tmp_path / "out"
    if exists:
        out.mkdir()
        (out / "du.npy").write_bytes(b"mine")
    before, paths = files_in(tmp_path), set(tmp_path.rglob("*"))
    line = [folder, "-o", out, "--block-length", 64, "--device", "cpu", *["--force"] * exists]
    check_interruption(start("grad", *line), out, ".states.*.part", name)
    assert (files_in(tmp_path), set(tmp_path.rglob("*"))) == (before, paths)


# ---------------------------------------------------------------------------------------------------- what is printed
def test_summary(base, tmp_path, run):
    np.save(base[1] / "age.npy", np.zeros(3))
    done = run("grad", base[1], "-o", tmp_path / "out", "--device", "cpu")
    assert done.err == ""
    first, second, third = done.out.splitlines()
    assert first.startswith("differentiated the scan of u (2, 24, 70) float32, 16 states a channel, on cpu in ")
    names = "du.npy, ddelta.npy, dA.npy, dB.npy, dC.npy, dD.npy, dz.npy, ddelta_bias.npy and dinitial_state.npy"
    assert second == f"wrote {names} to {tmp_path / 'out'}"
    assert third == "ignored, no argument of a gradient: age"


@pytest.mark.parametrize("quiet", [[], ["--quiet"]], ids=["", "quiet"])
def test_json(base, tmp_path, run, quiet):
    (base[1] / "z.npy").unlink()
    done = run("grad", base[1], "-o", tmp_path / "out", "--json", "--device", "cpu", *quiet)
    assert done.err == ""
    facts = json.loads(done.out)
    assert facts["shapes"] == {name: list(x.shape) for name, x in base[0].items() if name != "z"}
    assert (facts["dtype"], facts["device"], facts["ignored"]) == ("float32", "cpu", [])
    assert sorted(facts["outputs"]) == sorted(map(str, (tmp_path / "out").iterdir()))
    assert facts["elements_per_second"] == pytest.approx(2 * 24 * 70 / facts["seconds"], rel=0.01)


def test_quiet(base, tmp_path, run):
    done = run("grad", base[1], "-o", tmp_path / "out", "--quiet")
    assert (done.code, done.out, done.err) == (0, "", "")
    assert len(os.listdir(tmp_path / "out")) == 9


def test_progress_counts_both_passes(tmp_path, monkeypatch):
    arguments, options = make(length=200)
    blocks = grad_files.blocks_of_time(arguments["u"], 64, False)
    grads = {name: np.empty_like(arguments[name]) for name in grad_files.wanted(arguments)}
    states = np.empty((len(blocks), 2, 24, 16), np.float32)
    done = list(grad_files.grad_blocks(arguments, options, blocks, grads, states))
    assert done == pytest.approx([x / 392 for x in (64, 128, 192, 200, 264, 328, 392, 392)])


@pytest.mark.parametrize("options, shown", [([], True), (["--quiet"], False)], ids=["", "quiet"])
def test_progress_is_shown_on_a_terminal(base, tmp_path, options, shown):
    line = [base[1], "-o", tmp_path / "out", "--block-length", 64, "--device", "cpu", *options]
    seen = shown_on_terminal("grad", *line)
    assert (b"differentiating" in seen and b"100%" in seen) if shown else seen == b""
