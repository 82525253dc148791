"""The command line: any block length gives the one-shot result; bad input is one line; outputs are complete or absent."""

import errno
import fcntl
import json
import os
import pty
import shlex
import signal
import socket
import subprocess
import sys
import termios
import types

import cases
import command
import numpy as np
import pytest
from command import (
    BAD_STREAMS,
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
    shell,
    shown_on_terminal,
    start,
    wait_for,
    write,
)

from mambacupy import environment, scan_files, selective_scan
from mambacupy.npy_files import open_array

run = command.run


@pytest.fixture
def base(tmp_path):
    """The base case's arguments, and a folder that holds them."""
    arguments, _ = cases.make()
    save(tmp_path / "in", arguments)
    return arguments, tmp_path / "in"


# ---------------------------------------------------------------------------------------------------- results
BLOCKWISE = (
    "base", "reverse", "bfloat16", "float64", "complex-interleaved-B", "complex-bfloat16", "complex-groups", "constant-B",
    "constant-BC", "groups-differ", "channel-order", "zoh-reverse", "reverse-complex", "no-initial-state", "no-z", "length-2",
)  # fmt: skip


@pytest.mark.parametrize("row", BLOCKWISE)
def test_any_block_length_gives_the_one_shot_result(tmp_path, run, row):
    arguments, options = cases.make(**cases.ROWS[row])
    folder = save(tmp_path / "in", arguments)
    y, last_state = selective_scan(**arguments, **options, return_last_state=True)
    for block_length in (1, 9, 64, 69, 1000, None):
        blocks = ["--block-length", block_length] if block_length else []
        targets = ["-o", tmp_path / "y.npy", "--last-state", tmp_path / "h.npy", "--force"]
        done = run("scan", folder, *targets, *blocks, *command_options(options))
        assert done.code == 0, done.err
        assert same(open_array(tmp_path / "y.npy"), y), block_length
        assert same(open_array(tmp_path / "h.npy"), last_state), block_length


def test_blocks_are_as_long_as_asked(base, tmp_path, run, monkeypatch):
    lengths = []
    monkeypatch.setattr(scan_files, "selective_scan", lambda u, **rest: lengths.append(u.shape[2]) or selective_scan(u, **rest))
    run("scan", base[1], "-o", tmp_path / "y.npy", "--block-length", 32)
    assert lengths == [32, 32, 6]


def test_blocks_are_not_listed_beforehand():
    """There may be as many as steps."""
    blocks = scan_files.blocks_of_time(10**15, 1, False)
    assert (next(blocks), next(blocks)) == (slice(0, 1), slice(1, 2))


@pytest.mark.parametrize("changes", [{}, {"complex": True}, {"dtype": "bfloat16", "B": 3}], ids=["real", "complex", "bfloat16"])
def test_every_source_of_the_same_arrays_gives_the_same(tmp_path, run, changes):
    arguments, options = cases.make(**changes)
    y = selective_scan(**arguments, **options)
    folder = save(tmp_path / "folder", arguments)
    singles = [word for name in arguments for word in (f"--{name}", folder / f"{name}.npy")]
    fortran = {name: np.asfortranarray(x) for name, x in arguments.items()}
    sources = {
        "folder": [folder],
        "stored": [save(tmp_path / "stored", arguments, np.savez)],
        "compressed": [save(tmp_path / "compressed", arguments, np.savez_compressed)],
        "fortran": [save(tmp_path / "fortran", fortran)],
        "fortran compressed": [save(tmp_path / "fortran_compressed", fortran, np.savez_compressed)],
        "single files": singles,
    }
    for source, words in sources.items():
        done = run("scan", *words, "-o", tmp_path / "y.npy", "--force", "--block-length", 33, *OPTIONS)
        assert done.code == 0, done.err
        assert same(open_array(tmp_path / "y.npy"), y), source


@pytest.mark.parametrize("how", [None, np.savez, np.savez_compressed])
def test_single_files_override(base, tmp_path, run, how):
    """Also where what they stand in for could not be used."""
    arguments, _ = base
    source = save(tmp_path / "source", arguments | {"u": np.array([{}]), "D": None}, how)
    np.save(tmp_path / "other.npy", arguments["u"] + 1)
    np.save(tmp_path / "skip.npy", np.ones(24, np.float32))
    overrides = ["--u", tmp_path / "other.npy", "--D", tmp_path / "skip.npy"]
    done = run("scan", source, *overrides, "-o", tmp_path / "y.npy", *OPTIONS)
    assert done.code == 0, done.err
    wanted = arguments | {"u": arguments["u"] + 1, "D": np.ones(24, np.float32)}
    assert same(open_array(tmp_path / "y.npy"), selective_scan(**wanted, delta_softplus=True))


def test_bfloat16_outputs_are_inputs_again(tmp_path, run):
    arguments, options = cases.make(dtype="bfloat16")
    folder = save(tmp_path / "in", arguments)
    y, h = selective_scan(**arguments, **options, return_last_state=True)
    run("scan", folder, "-o", tmp_path / "y.npy", "--last-state", tmp_path / "h.npy", *OPTIONS)
    assert np.load(tmp_path / "y.npy").dtype == np.load(folder / "u.npy").dtype
    again = ["--u", tmp_path / "y.npy", "--initial_state", tmp_path / "h.npy"]
    done = run("scan", folder, *again, "-o", tmp_path / "again.npy", *OPTIONS)
    assert done.code == 0, done.err
    assert same(open_array(tmp_path / "again.npy"), selective_scan(**arguments | {"u": y, "initial_state": h}, **options))


@pytest.mark.parametrize("how", [None, np.savez_compressed])
@pytest.mark.parametrize(
    "changes", [{"length": 0}, {"batch": 0}, {"dim": 0}, {"length": 0, "complex": True, "B": "interleaved"}]
)
def test_arrays_without_elements(tmp_path, run, changes, how):
    arguments, _ = cases.make(**changes)
    source = save(tmp_path / "in", arguments, how)
    done = run("scan", source, "-o", tmp_path / "y.npy", "--last-state", tmp_path / "h.npy")
    assert done.code == 0, done.err
    assert same(open_array(tmp_path / "y.npy"), arguments["u"])
    assert same(open_array(tmp_path / "h.npy"), arguments["initial_state"])


# ---------------------------------------------------------------------------------------------------- bad input
def folder_instead(folder):
    (folder / "u.npy").unlink()
    (folder / "u.npy").mkdir()


def pipe_instead(name):
    """Damage: a pipe to which nobody writes, at which a reader would wait."""

    def damage(folder):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return damage


def socket_instead(folder):
    (folder / "u.npy").unlink()
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(folder / "u.npy"))  # the names of sockets are short


def zipped(content):
    """Damage: an .npz file of the good arrays, replaced by what content(bytes) gives."""

    def damage(folder):
        path = folder.parent / "x.npz"
        np.savez_compressed(path, **{file.stem: np.load(file) for file in folder.glob("*.npy")})
        path.write_bytes(content(path.read_bytes()))
        return path

    return damage


GROUPS_OF_5 = np.ones((2, 5, 16, 70), np.float32)
HEADER = b"\x93NUMPY\x01\x00\x76\x00" + b"{'descr': '<f4', 'fortran_order': False, 'shape': (%s)}".ljust(98)

BAD = {  # damage to the folder of inputs, which may name others; words of the one line
    "no-such-folder": (lambda folder: folder / "no", ["in/no: ", "o such file or"]),
    "name-too-long": (lambda folder: "x" * 5000, ["xxx: ", "name too long"]),
    "array-missing": (lambda folder: (folder / "B.npy").unlink(), ["in: no B.npy", "needs u, delta, A, B and C", "--B"]),
    "file-empty": (write("u.npy", b""), ["in/u.npy: not a .npy file"]),
    "file-cut-short": (write("u.npy", slice(-4)), ["in/u.npy: cut short: 13436 bytes", "wanted 13440 for (2, 24, 70) float32"]),
    "text": (write("u.npy", b"1 2 3\n4 5 6\n"), ["in/u.npy: not a .npy file"]),
    "pickled": (change("u", lambda u: np.array([{}])), ["in/u.npy: holds pickled Python objects", "wanted numbers"]),
    "header-of-impossible-size": (write("u.npy", HEADER % b"4294967296, 4294967296"), ["in/u.npy: cut short: 0 bytes"]),
    "header-negative": (write("u.npy", HEADER % b"-1, 2147483648, 214748"), ["in/u.npy: not a .npy file", "(-1, "]),
    "folder-as-file": (folder_instead, ["in/u.npy: is a folder, wanted a .npy file"]),
    "pipe": (pipe_instead("u.npy"), ["in/u.npy: is a pipe, wanted a .npy file"]),
    "pipe-of-arrays": (lambda folder: pipe_instead("x.npz")(folder) or folder / "x.npz", ["x.npz: is a pipe, wanted an .npz"]),
    "device": (lambda folder: "/dev/zero", ["/dev/zero: is a device, wanted an .npz file"]),
    "socket": (socket_instead, ["in/u.npy: is a socket, wanted a .npy file"]),
    "unreadable": (lambda folder: forbid(folder / "u.npy"), ["in/u.npy: Permission denied"]),
    "wrong-shape": (change("B", lambda B: B[..., :-1]), ["in/B.npy: B has shape (2, 16, 69)", "state=16, length=70)"]),
    "wrong-axes": (change("z", lambda z: z.swapaxes(1, 2)), ["in/z.npy: z has shape (2, 70, 24)", "write z.swapaxes(-1, -2)"]),
    "wrong-rank": (change("u", lambda u: u[0]), ["in/u.npy: u has shape (24, 70)", "wanted (batch, dim, length)", "u[None]"]),
    "no-axes": (change("A", lambda A: A[0, 0]), ["in/A.npy: A has shape ()", "wanted (dim=24, state)"]),
    "integers": (change("u", lambda u: u.astype(int)), ["in/u.npy: u is int64", "wanted float16, bfloat16, float32 or"]),
    "mixed-dtypes": (change("delta", np.float64), ["in/delta.npy: delta is float64", "wanted float32, the dtype of u"]),
    "structured": (change("D", lambda D: D.view([("a", "<f4")])), ["in/D.npy: D is void32", "wanted float32"]),
    "big-endian": (change("A", lambda A: A.astype(">f4")), ["in/A.npy: A is float32 in foreign byte order", "wanted float32"]),
    "groups": (change("C", lambda C: GROUPS_OF_5), ["in/C.npy: C has shape (2, 5, 16, 70)", "24 is not divisible by 5"]),
    "initial-state": (change("initial_state", lambda h: h[:1]), ["in/initial_state.npy: initial_state has shape (1, 24, 16)"]),
    "a-single-array": (lambda folder: folder / "u.npy", ["in/u.npy: not an .npz file"]),
    "npz-text": (zipped(lambda content: b"text"), ["x.npz: not an .npz file"]),
    "npz-cut-short": (zipped(lambda content: content[:-30]), ["x.npz: not an .npz file"]),
    "npz-corrupted": (zipped(lambda content: content[:200] + b"\xff" * 2000 + content[2200:]), ["x.npz"]),
    "npz-without-arrays": (zipped(lambda content: b"PK\5\6" + bytes(18)), ["x.npz: no u.npy, delta.npy, A.npy, B.npy, C.npy"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_in_one_line(base, tmp_path, run, case):
    damage, words = BAD[case]
    folder = base[1]
    source = damage(folder) or folder
    before = set(tmp_path.rglob("*"))
    assert refused(run("scan", source, "-o", tmp_path / "y.npy", "--last-state", tmp_path / "h.npy", *OPTIONS), words)
    assert set(tmp_path.rglob("*")) == before


USES = {  # command line, where {} is the folder of the test; words of the one line
    "no-inputs": ("-o {}/y.npy", ["no u.npy, delta.npy, A.npy, B.npy, C.npy", "--u FILE"]),
    "no-output": ("{}/in", ["--output"]),
    "no-such-option": ("{}/in -o {}/y.npy --fast", ["--fast", "; see "]),
    "one-too-many": ("{}/in {}/in -o {}/y.npy", ["extra argument", "in); see ", " scan --help"]),
    "discretization": ("{}/in -o {}/y.npy --discretization tustin", ["'tustin'", "euler", "zoh"]),
    "block-length": ("{}/in -o {}/y.npy --block-length 0", ["--block-length", "0"]),
    "output-exists": ("{}/in -o {}/there.npy", ["there.npy: exists; --force replaces it"]),
    "last-state-exists": ("{}/in -o {}/y.npy --last-state {}/there.npy", ["there.npy: exists; --force replaces it"]),
    "output-is-a-folder": ("{}/in -o {}/sub --force", ["sub: is a folder"]),
    "output-names-a-folder": ("{}/in -o {}/y/", ["y/: names a folder, wanted the name of a file to write"]),
    "output-names-this-folder": ("{}/in -o {}/y/. --force", ["y/.: names a folder, wanted"]),
    "last-state-names-a-folder": ("{}/in -o {}/y.npy --last-state {}/h/", ["h/: names a folder, wanted"]),
    "output-is-the-root": ("{}/in -o / --force", ["/: is a folder"]),
    "output-is-the-inputs": ("{}/in -o {}/in --force", ["in: is an input"]),
    "no-folder-for-output": ("{}/in -o {}/no/y.npy", ["no/y.npy: No such file or directory; nothing was written"]),
    "file-for-folder": ("{}/in -o {}/there.npy/y.npy", ["there.npy/y.npy: Not a directory"]),
    "output-name-too-long": ("{}/in -o {}/" + "y" * 300, ["yyy: ", "name too long"]),
    "output-is-input": ("{}/in -o {}/in/u.npy --force", ["in/u.npy: is an input"]),
    "last-state-is-input": ("{}/in -o {}/y.npy --last-state {}/sub/../in/initial_state.npy --force", ["is an input"]),
    "output-is-a-link-to-input": ("{}/in -o {}/link.npy --force", ["link.npy: is an input"]),
    "output-is-npz": ("{}/x.npz -o {}/x.npz --force", ["x.npz: is an input"]),
    "one-file-for-both": ("{}/in -o {}/y.npy --last-state {}/sub/../y.npy", ["y.npy: named for two outputs"]),
    "device": ("{}/in -o {}/y.npy --device gpu", ["--device gpu: wanted auto, cpu, cuda or cuda:N"]),
    "device-number": ("{}/in -o {}/y.npy --device cuda:-1", ["--device cuda:-1: wanted"]),
    "device-text": ("{}/in -o {}/y.npy --device cuda:0x", ["--device cuda:0x: wanted"]),
    "empty-inputs": ("'' -o {}/y.npy", ["INPUTS", "is empty (a shell variable that is not set?), wanted the name"]),
    "empty-single-file": ("{}/in -o {}/y.npy --u ''", ["'--u'", "is empty"]),
    "empty-output": ("{}/in -o ''", ["'--output'", "is empty"]),
    "empty-last-state": ("{}/in -o {}/y.npy --last-state ''", ["'--last-state'", "is empty"]),
}


@pytest.mark.parametrize("case", USES)
def test_bad_use_is_told_in_one_line(base, tmp_path, run, case):
    line, words = USES[case]
    np.savez(tmp_path / "x.npz", **base[0])
    (tmp_path / "there.npy").write_bytes(b"mine")
    (tmp_path / "link.npy").symlink_to(tmp_path / "in" / "u.npy")
    (tmp_path / "sub").mkdir()
    before = files_in(tmp_path)
    assert refused(run("scan", *shlex.split(line.replace("{}", shlex.quote(str(tmp_path))))), words)
    assert files_in(tmp_path) == before


def test_folder_that_must_not_be_written(base, tmp_path, run):
    (tmp_path / "sub").mkdir()
    forbid(tmp_path / "sub", 0o500)
    assert refused(
        run("scan", base[1], "-o", tmp_path / "sub" / "y.npy"), ["sub/y.npy: Permission denied; nothing was written"]
    )


def test_folder_that_must_not_be_listed(base, tmp_path, run):
    forbid(base[1], 0o100)
    try:
        assert refused(run("scan", base[1], "-o", tmp_path / "y.npy"), ["in: Permission denied"])
    finally:
        base[1].chmod(0o700)


def test_folder_that_must_not_be_entered(base, tmp_path, run):
    forbid(base[1])
    try:
        assert refused(run("scan", base[1] / "x.npz", "-o", tmp_path / "y.npy"), ["x.npz: Permission denied"])
    finally:
        base[1].chmod(0o700)


# ---------------------------------------------------------------------------------------------------- devices
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_cuda_that_is_missing(base, tmp_path, run, monkeypatch, device):
    monkeypatch.setattr(environment, "explain_missing", lambda: "no usable driver: install one")
    done = run("scan", base[1], "-o", tmp_path / "y.npy", "--device", device)
    assert refused(done, [f"--device {device}: no usable driver: install one"])
    assert not (tmp_path / "y.npy").exists()


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_without_cuda_the_cpu_scans(base, tmp_path, run, monkeypatch, device):
    monkeypatch.setattr(environment, "explain_missing", lambda: "no usable driver: install one")
    done = run("scan", base[1], "-o", tmp_path / "y.npy", "--device", device, "--json")
    assert json.loads(done.out)["device"] == "cpu"


def test_device_that_is_not_there(base, tmp_path, run, monkeypatch):
    runtime = types.SimpleNamespace(getDeviceCount=lambda: 2)
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=types.SimpleNamespace(runtime=runtime)))
    monkeypatch.setattr(environment, "explain_missing", lambda: None)
    done = run("scan", base[1], "-o", tmp_path / "y.npy", "--device", "cuda:2")
    assert refused(done, ["--device cuda:2: there are 2 devices, cuda:0 to cuda:1"])


# ---------------------------------------------------------------------------------------------------- complete or absent
def test_existing_outputs_are_replaced_with_force_only(base, tmp_path, run):
    arguments, folder = base
    (tmp_path / "y.npy").write_bytes(b"mine")
    assert refused(run("scan", folder, "-o", tmp_path / "y.npy"), ["--force"])
    assert (tmp_path / "y.npy").read_bytes() == b"mine"
    assert run("scan", folder, "-o", tmp_path / "y.npy", "--force", *OPTIONS).code == 0
    assert same(open_array(tmp_path / "y.npy"), selective_scan(**arguments, delta_softplus=True))
    assert sorted(os.listdir(tmp_path)) == ["in", "y.npy"]


FAILURES = command.FAILURES | {
    "disk": (OSError(errno.ENOSPC, "No space left on device"), 2, "y.npy: No space left on device; nothing was written"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_failure_midway_leaves_everything_as_it_was(base, tmp_path, run, monkeypatch, failure):
    error, code, words = FAILURES[failure]
    parts = []

    def fail(*arguments, **options):
        parts.extend(path.name for path in tmp_path.glob(".*.part"))
        if len(parts) < 4 and failure != "disk":
            return selective_scan(*arguments, **options)
        raise error

    module, name = (os, "posix_fallocate") if failure == "disk" else (scan_files, "selective_scan")
    monkeypatch.setattr(module, name, fail)
    (tmp_path / "y.npy").write_bytes(b"mine")
    before = files_in(tmp_path)
    targets = ["-o", tmp_path / "y.npy", "--last-state", tmp_path / "h.npy", "--force"]
    done = run("scan", base[1], *targets, "--block-length", 8)
    assert len(set(parts)) == (1 if failure == "disk" else 2)
    assert (done.code, done.out, len(done.err.splitlines())) == (code, "", 1)
    assert words in done.err
    assert files_in(tmp_path) == before


@pytest.fixture
def slow(tmp_path):
    """Inputs and options of a scan that takes several seconds."""
    arguments, _ = cases.make(batch=1, dim=2, state=1, length=200_000)
    return [save(tmp_path / "in", arguments), "--block-length", 1, "--device", "cpu"]


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("force", [False, True], ids=["new", "force"])
def test_interruption_leaves_everything_as_it_was(slow, tmp_path, name, force):
    if force:
        (tmp_path / "y.npy").write_bytes(b"mine")
    before = files_in(tmp_path)
    check_interruption(start("scan", *slow, "-o", tmp_path / "y.npy", *["--force"] * force), tmp_path, ".*.part", name)
    assert files_in(tmp_path) == before


def test_ctrl_c_where_nothing_is_written(run, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(environment, "report", interrupt)
    done = run("info")
    assert (done.code, done.out, done.err.strip()) == (130, "", "")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_what_nohup_and_scripts_ignore_is_ignored(tmp_path, number):
    arguments, _ = cases.make(batch=1, dim=2, state=1, length=10_000)
    folder = save(tmp_path / "in", arguments)
    process = start("scan", folder, "-o", tmp_path / "y.npy", "--block-length", 1, "--device", "cpu", ignored=[number])
    wait_for(lambda: list(tmp_path.glob(".*.part")) or process.poll() is not None)
    assert process.poll() is None
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert same(open_array(tmp_path / "y.npy"), selective_scan(**arguments))


def test_a_terminal_that_is_closed_leaves_everything_as_it_was(slow, tmp_path):
    """While the progress bar is on it: what is written to it then fails."""
    before = files_in(tmp_path)
    ours, theirs = pty.openpty()

    def take_terminal():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    session = {"start_new_session": True, "preexec_fn": take_terminal}
    process = start("scan", *slow, "-o", tmp_path / "y.npy", stdout=theirs, stderr=theirs, **session)
    os.close(theirs)
    try:
        wait_for(lambda: list(tmp_path.glob(".*.part")) or process.poll() is not None)
        assert process.poll() is None
    finally:
        os.close(ours)
    process.wait(timeout=30)
    assert files_in(tmp_path) == before


# ---------------------------------------------------------------------------------------------------- hostile names and links
@pytest.mark.parametrize("name", ["ünï→ 数据 y.npy", "y", "a\nb.npy", os.fsdecode(b"\xff.npy")], ids=ascii)
def test_outputs_of_any_name(base, tmp_path, run, name):
    target = tmp_path / name
    for json_option in ([], ["--json"]):
        try:
            target.unlink(missing_ok=True)
            target.touch()
            target.unlink()
        except OSError:
            pytest.skip("this file system has no such names")
        done = run("scan", base[1], f"--output={target}", *json_option, *OPTIONS)
        assert (done.code, done.err) == (0, "")
        assert same(open_array(target), selective_scan(**base[0], delta_softplus=True))
    assert json.loads(done.out)["outputs"] == [str(target)]


def test_inputs_of_any_name(base, tmp_path, run):
    folder = base[1].rename(tmp_path / "ünï\n数据")
    assert run("scan", folder, "-o", tmp_path / "y.npy").code == 0
    change("u", lambda u: u[0])(folder)
    assert refused(run("scan", folder, "-o", tmp_path / "z.npy"), ["数据/u.npy: u has shape (24, 70)"])


@pytest.mark.parametrize("link", ["symbolic", "hard"])
def test_a_linked_target_is_replaced_and_its_other_name_kept(base, tmp_path, run, link):
    """A hard link to an input too: its content is still read when the output takes the name."""
    arguments, folder = base
    other = folder / "u.npy" if link == "hard" else tmp_path / "other.npy"
    if link == "hard":
        os.link(other, tmp_path / "y.npy")
    else:
        other.write_bytes(b"theirs")
        (tmp_path / "y.npy").symlink_to(other)
    before = other.read_bytes()
    done = run("scan", folder, "-o", tmp_path / "y.npy", "--force", "--block-length", 8, *OPTIONS)
    assert done.code == 0, done.err
    assert same(open_array(tmp_path / "y.npy"), selective_scan(**arguments, delta_softplus=True))
    assert other.read_bytes() == before


@pytest.mark.parametrize("how", [None, np.savez, np.savez_compressed])
def test_what_is_no_argument_is_named_and_not_read(base, tmp_path, run, how):
    """Not even if it could not be: it holds Python objects."""
    source = save(tmp_path / "source", base[0] | {"labels": np.array([{}]), "sub": np.array([{}])}, how)
    done = run("scan", source, "-o", tmp_path / "y.npy")
    assert done.code == 0, done.err
    assert "ignored, no argument of a scan: labels, sub" in done.out


# ---------------------------------------------------------------------------------------------------- what is printed
def test_summary(base, tmp_path, run):
    done = run("scan", base[1], "-o", tmp_path / "y.npy", "--last-state", tmp_path / "h.npy", "--device", "cpu")
    assert done.err == ""
    first, second = done.out.splitlines()
    assert first.startswith("scanned u (2, 24, 70) float32, 16 states a channel, on cpu in ")
    assert second == f"wrote {tmp_path / 'y.npy'} and {tmp_path / 'h.npy'}"


@pytest.mark.parametrize("quiet", [[], ["--quiet"]], ids=["", "quiet"])
def test_json(base, tmp_path, run, quiet):
    np.save(base[1] / "age.npy", np.zeros(3))
    done = run("scan", base[1], "-o", tmp_path / "y.npy", "--json", "--device", "cpu", *quiet)
    assert done.err == ""
    facts = json.loads(done.out)
    assert facts["shapes"] == {name: list(x.shape) for name, x in base[0].items()}
    assert (facts["dtype"], facts["device"]) == ("float32", "cpu")
    assert facts["outputs"] == [str(tmp_path / "y.npy")]
    assert facts["ignored"] == ["age"]
    assert facts["elements_per_second"] == pytest.approx(2 * 24 * 70 / facts["seconds"], rel=0.01)


def test_quiet(base, tmp_path, run):
    done = run("scan", base[1], "-o", tmp_path / "y.npy", "--quiet")
    assert (done.code, done.out, done.err) == (0, "", "")
    assert (tmp_path / "y.npy").exists()


@pytest.mark.parametrize("case", BAD_STREAMS)
def test_a_bad_standard_output_is_told_and_files_are_whole(base, tmp_path, case):
    redirection, told = BAD_STREAMS[case]
    if "full" in redirection and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    for i, options in enumerate(("--json", "--softplus")):
        target = tmp_path / f"{i}.npy"
        line = f"scan {shlex.quote(str(base[1]))} --softplus {options} -o {shlex.quote(str(target))}"
        assert shell(line, redirection) == (1, told)
        assert same(open_array(target), selective_scan(**base[0], delta_softplus=True))
    for line in ("--help", "--version", "info"):
        assert shell(line, redirection) == (1, told), line


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-"])
def test_a_bad_standard_error_changes_nothing_else(base, tmp_path, redirection):
    if "full" in redirection and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    folder, target = (shlex.quote(str(path)) for path in (base[1], tmp_path / "y.npy"))
    assert shell(f"scan {folder} --softplus --quiet -o {target}", redirection) == (0, "")
    assert same(open_array(tmp_path / "y.npy"), selective_scan(**base[0], delta_softplus=True))
    assert shell(f"scan {folder} -o {target}", redirection) == (2, "")


def test_text_that_standard_output_cannot_spell(base, tmp_path):
    folder, target = (shlex.quote(str(path)) for path in (base[1], tmp_path / "数据.npy"))
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    assert shell(f"scan {folder} -o {target}", "", env=environment, stdout=subprocess.DEVNULL) == (0, "")


@pytest.mark.parametrize("options, shown", [([], True), (["--quiet"], False), (["--json"], False)], ids=["", "quiet", "json"])
def test_progress_is_shown_on_a_terminal_only(base, tmp_path, options, shown):
    """That it is not shown elsewhere, test_summary says."""
    seen = shown_on_terminal("scan", base[1], "-o", tmp_path / "y.npy", "--block-length", 7, "--device", "cpu", *options)
    assert (b"scanning" in seen and b"100%" in seen) if shown else seen == b""
