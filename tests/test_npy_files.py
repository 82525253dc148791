"""Files are read without loading them, and whatever they hold is an array or a FileError of one line; outputs are whole."""

import contextlib
import errno
import io
import os
import random
import re
import secrets
import signal
import threading
import warnings
import zipfile

import ml_dtypes
import numpy as np
import pytest

from mambacupy import npy_files
from mambacupy.npy_files import FileError, Outputs, open_array, open_npz

NUMBERS = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


def npy(x):
    """The bytes that numpy.save writes."""
    stream = io.BytesIO()
    np.save(stream, x)
    return stream.getvalue()


def npy_with_header(shape, descr="<f4", data=bytes(64)):
    header = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode().ljust(245) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


def open_as(container, folder, content):
    """Open bytes as a .npy file, or as u.npy in a stored or compressed .npz file."""
    if container == "npy":
        path = folder / "u.npy"
        path.write_bytes(content)
        return open_array(path)
    path = folder / "x.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED if container == "stored" else zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("u.npy", content)
    return open_npz(path)["u"]


CONTAINERS = ("npy", "stored", "compressed")


# ---------------------------------------------------------------------------------------------------- reading
@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize(
    "x",
    [
        NUMBERS,
        np.asfortranarray(NUMBERS),
        NUMBERS.astype(ml_dtypes.bfloat16),
        np.asfortranarray(NUMBERS.astype(ml_dtypes.bfloat16)),
        NUMBERS + 1j,
        NUMBERS[:, :0],
        NUMBERS[0, 0, 0],
        NUMBERS.astype(">f4"),
    ],
    ids=["float32", "fortran", "bfloat16", "fortran-bfloat16", "complex64", "no-elements", "no-axes", "big-endian"],
)
def test_arrays_come_back(tmp_path, container, x):
    got = open_as(container, tmp_path, npy(x))
    assert (got.shape, got.dtype, got.tobytes()) == (x.shape, x.dtype, x.tobytes())
    assert not got.size or not got.flags.writeable


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_the_format_is_read(tmp_path, version):
    with open(tmp_path / "u.npy", "wb") as file:
        np.lib.format.write_array(file, NUMBERS, version)
    assert np.array_equal(open_array(tmp_path / "u.npy"), NUMBERS)


@pytest.mark.parametrize("container", CONTAINERS)
def test_headers_of_python_2_are_read_without_a_word(tmp_path, container):
    content = npy_with_header((2, 8)).replace(b"(2, 8)}  ", b"(2L, 8L)}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_as(container, tmp_path, content).shape == (2, 8)


def test_messages_have_an_end(tmp_path):
    with pytest.raises(FileError) as caught:
        open_as("npy", tmp_path, b"\x93NUMPY\x02\x00\xff\x0f\x00\x00" + bytes(5000))
    assert len(str(caught.value)) < len(str(tmp_path)) + 300


def test_files_are_mapped_and_not_loaded(tmp_path):
    """64 GiB of zeros in a sparse file."""
    path = tmp_path / "u.npy"
    path.write_bytes(npy_with_header((1, 1, 2**34), data=b""))
    try:
        os.truncate(path, path.stat().st_size + 2**36)
    except OSError as error:
        pytest.skip(f"no sparse files here ({error})")
    x = open_array(path)
    assert x.shape == (1, 1, 2**34)
    assert x[0, 0, -1] == 0


def test_stored_arrays_of_an_npz_file_are_mapped(tmp_path):
    np.savez(tmp_path / "x.npz", u=NUMBERS, A=NUMBERS[0])
    with open(tmp_path / "x.npz", "rb+") as file:
        found = open_npz(tmp_path / "x.npz")
        content = file.read()
        place = content.index(NUMBERS.tobytes())
        file.seek(place)
        file.write(np.float32(99).tobytes())
        file.flush()
        assert found["u"][0, 0, 0] == 99


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "not a .npy file"),
        (b"0.1 0.2 0.3\n", "not a .npy file"),
        (npy(NUMBERS)[:70], "not a .npy file"),
        (npy(NUMBERS)[:-1], "cut short: 95 bytes of data, wanted 96"),
        (npy(np.array([{}])), "pickled"),
        (npy_with_header((2**62,)), "cut short"),
        (npy_with_header((2**32, 2**32, 2)), "cut short"),
        (npy_with_header((2**70,)), "cut short"),
        (npy_with_header((0, 2**70)), "not a .npy file"),
        (npy_with_header((-1,)), "not a .npy file"),
        (npy_with_header((-2, -3)), "not a .npy file"),
        (npy_with_header((1,) * 99), "not a .npy file"),
        (npy_with_header((True,)), "not a .npy file"),
        (npy_with_header("(2,)"), "not a .npy file"),
        (npy_with_header((2,), "<q9"), "not a .npy file"),
        (npy_with_header((2**40,), "|S0"), "not a .npy file"),
        (npy(NUMBERS).replace(b"(2, 3, 4), }", b"((, 3, 4), }"), "not a .npy file"),
        (npy_with_header((2,)).replace(b"{", b"(" * 200), "not a .npy file"),
    ],
    ids=[
        "empty", "text", "cut-header", "cut-data", "pickled", "huge", "product-overflows", "size-overflows",
        "empty-and-overflows", "negative", "negative-twice", "too-many-axes", "boolean", "text-shape", "no-such-dtype",
        "no-bytes", "unbalanced", "nested",
    ],
)  # fmt: skip
def test_what_is_no_array_is_told_in_one_line(tmp_path, container, content, words):
    with pytest.raises(FileError) as caught:
        open_as(container, tmp_path, content)
    message = str(caught.value)
    assert "\n" not in message
    assert "u.npy: " in message
    assert words in message


def spoilt(rng, content):
    """Bytes with a few of them changed, removed or inserted."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        i = rng.randrange(len(content))
        kind = rng.random()
        if kind < 0.7:
            content[i] = rng.choice((0, 255, rng.randrange(256), *b"(){}[],:-9'\n"))
        elif kind < 0.85:
            del content[i : i + rng.randint(1, min(40, len(content) - 1))]
        else:
            content[i:i] = rng.randbytes(rng.randint(1, 8))
    return bytes(content)


@pytest.mark.parametrize("container", CONTAINERS)
def test_spoilt_files_raise_nothing_but_file_errors(tmp_path, container):
    rng = random.Random(0)
    if container == "npy":
        good, path, read = npy(NUMBERS)[:140], tmp_path / "u.npy", open_array
    else:
        save = np.savez if container == "stored" else np.savez_compressed
        stream = io.BytesIO()
        save(stream, u=np.arange(8.0), A=np.ones((3, 2)))
        good, path, read = stream.getvalue(), tmp_path / "x.npz", open_npz
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of NumPy, about headers that Python 2 might have written
        for _ in range(1000):
            content = spoilt(rng, good)
            path.write_bytes(content)
            try:
                read(path)
            except FileError as error:
                refused += 1
                assert str(error).startswith(str(path)) and len(str(error).splitlines()) == 1
            except Exception as error:
                pytest.fail(f"{type(error).__name__}: {error} from {content!r}")
    assert refused > 500


def test_only_arrays_of_an_npz_file_count(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.mkdir("deep.npy/") if hasattr(archive, "mkdir") else archive.writestr("deep.npy/", b"")
        archive.writestr("deep.npy/u.npy", npy(NUMBERS + 1))
        archive.writestr("readme.txt", b"about u")
        archive.writestr("u.npy", npy(NUMBERS))
    found = open_npz(tmp_path / "x.npz")
    assert set(found) == {"u", "deep.npy/u"}
    assert np.array_equal(found["u"], NUMBERS)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_npz_file_with_two_arrays_of_one_name_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        for x in (NUMBERS, NUMBERS + 1):
            archive.writestr("u.npy", npy(x))
    with pytest.raises(FileError, match=r"x\.npz:u\.npy: is there twice, wanted one array of that name"):
        open_npz(tmp_path / "x.npz")


def test_an_encrypted_npz_file_is_refused(tmp_path):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, u=NUMBERS)
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\1\2") + 8] |= 1  # the flag in the central directory and the one in the local header
    content[6] |= 1
    path.write_bytes(content)
    with pytest.raises(FileError, match=r"x\.npz.*encrypted"):
        open_npz(path)


# ---------------------------------------------------------------------------------------------------- writing
@pytest.mark.parametrize("x", [NUMBERS, NUMBERS.astype(ml_dtypes.bfloat16), NUMBERS * 1j, NUMBERS[:0]])
def test_what_is_written_is_what_numpy_reads(tmp_path, x):
    path = tmp_path / "y.npy"
    with Outputs() as outputs:
        outputs.create(path, x.shape, x.dtype)[...] = x
        assert not path.exists()
    numpy_reads = np.load(path)
    assert (numpy_reads.shape, numpy_reads.tobytes()) == (x.shape, x.tobytes())
    assert numpy_reads.dtype == np.load(io.BytesIO(npy(x))).dtype
    assert open_array(path).dtype == x.dtype
    assert os.listdir(tmp_path) == ["y.npy"]
    assert path.stat().st_size % 64 == x.nbytes % 64  # data start aligned, and nothing follows them


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("force", [False, True])
def test_failure_leaves_everything_as_it_was(tmp_path, failure, force):
    before = {}
    if force:
        (tmp_path / "y.npy").write_bytes(b"mine")
        before = {"y.npy": b"mine"}
    with pytest.raises(failure), Outputs(force) as outputs:
        outputs.create(tmp_path / "y.npy", (3,), np.float32)[...] = 1
        outputs.create(tmp_path / "h.npy", (3,), np.float32)
        raise failure
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_met_before_the_first_byte(tmp_path, monkeypatch, number):
    def full(descriptor, offset, size):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(FileError, match=rf"y\.npy: {os.strerror(number)}; nothing was written"), Outputs() as outputs:
        outputs.create(tmp_path / "y.npy", (3,), np.float32)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("shape", [(2**40, 2**20, 4), (0, 2**40, 2**20, 4)])
def test_what_no_file_holds_is_refused(tmp_path, shape):
    with pytest.raises(FileError, match=r"y\.npy: \(.*\) float32 is more than any file holds; nothing"), Outputs() as outputs:
        outputs.create(tmp_path / "y.npy", shape, np.dtype(np.float32))
    assert os.listdir(tmp_path) == []


def test_space_is_claimed_where_the_system_cannot(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    x = np.arange(500_000.0)
    with Outputs() as outputs:
        y = outputs.create(tmp_path / "y.npy", x.shape, x.dtype)
        (part,) = tmp_path.iterdir()
        assert part.stat().st_blocks * 512 >= x.nbytes
        y[...] = x
    assert np.array_equal(np.load(tmp_path / "y.npy"), x)


@pytest.mark.parametrize("function", ["_remove", "_take_back", "_rename"])
@pytest.mark.parametrize("ends", ["well", "badly", "interrupted"])
def test_another_ctrl_c_leaves_nothing_half_done(tmp_path, monkeypatch, function, ends):
    """While outputs get their names, or are taken back, or removed."""
    real, hits = getattr(npy_files, function), []

    class Disturbed(Exception):
        pass

    def disturb(*_):
        raise Disturbed

    def disturbed(*arguments):
        hits.append(function)
        signal.raise_signal(signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(npy_files, function, disturbed)
    (tmp_path / "1.npy").write_bytes(b"mine")
    before, handler = files_below(tmp_path), signal.signal(signal.SIGINT, disturb)
    caught = {
        "well": contextlib.nullcontext(),
        "badly": pytest.raises(FileError),
        "interrupted": pytest.raises(KeyboardInterrupt),
    }
    with caught[ends], Outputs(force=True) as outputs:
        outputs.create(tmp_path / "1.npy", (3,), np.float32)
        outputs.create(tmp_path / "2.npy", (3,), np.float32)
        if ends == "badly":
            (tmp_path / "2.npy").mkdir()
        if ends == "interrupted":
            raise KeyboardInterrupt
    assert signal.signal(signal.SIGINT, handler) is disturb
    assert hits or (function, ends) in {("_take_back", "well"), ("_take_back", "interrupted"), ("_rename", "interrupted")}
    if ends == "well":
        assert [np.load(path).shape for path in sorted(tmp_path.iterdir())] == [(3,), (3,)]
    else:
        assert files_below(tmp_path) == before


def test_signals_are_left_alone_in_other_threads(tmp_path):
    def write():
        with Outputs() as outputs:
            outputs.create(tmp_path / "y.npy", (3,), np.float32)[...] = 1

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    assert np.all(np.load(tmp_path / "y.npy") == 1)


def no_links(*arguments, **options):
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


@pytest.mark.parametrize("hard_links", [True, False])
def test_what_appeared_meanwhile_is_kept(tmp_path, monkeypatch, hard_links):
    """…and then none of the outputs appears."""
    if not hard_links:
        monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(FileError, match=r"h\.npy: appeared"), Outputs() as outputs:
        outputs.create(tmp_path / "y.npy", (3,), np.float32)
        outputs.create(tmp_path / "h.npy", (3,), np.float32)
        (tmp_path / "h.npy").write_bytes(b"theirs")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"h.npy": b"theirs"}


def test_nothing_is_written_through_a_link_with_a_temporary_name(tmp_path, monkeypatch):
    monkeypatch.setattr(secrets, "token_hex", lambda _: "guessed")
    (tmp_path / "theirs").write_bytes(b"theirs")
    (tmp_path / ".y.npy.guessed.part").symlink_to("theirs")
    with pytest.raises(FileError, match=r"y\.npy: File exists; nothing was written"), Outputs() as outputs:
        outputs.create(tmp_path / "y.npy", (3,), np.float32)
    assert files_below(tmp_path)["theirs"] == b"theirs"


def test_two_runs_at_once_keep_apart(tmp_path):
    """Even if both are process 1, each of a container of its own."""
    with Outputs(force=True) as one, Outputs(force=True) as two:
        for value, outputs in enumerate((one, two)):
            outputs.create(tmp_path / "y.npy", (3,), np.float32)[...] = value
        assert len(os.listdir(tmp_path)) == 2
    assert np.all(np.load(tmp_path / "y.npy") == 0)
    assert os.listdir(tmp_path) == ["y.npy"]


@pytest.mark.parametrize("special", ["fifo", "dangling"])
def test_only_regular_files_are_replaced(tmp_path, special):
    """With --force and the right to do so, /dev/null would become a file; a dangling link is something that exists."""
    target = tmp_path / "y.npy"
    os.mkfifo(target) if special == "fifo" else target.symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileError, match=r"y\.npy: "), Outputs(force=special == "fifo") as outputs:
        outputs.create(target, (3,), np.float32)
        pytest.fail("known only when the work is done")
    assert os.listdir(tmp_path) == ["y.npy"]
    assert not target.is_file()


def test_a_folder_is_made_and_outputs_lie_in_it(tmp_path):
    with Outputs() as outputs:
        outputs.folder(tmp_path / "out")
        outputs.folder(tmp_path / "out")
        outputs.create(tmp_path / "out" / "y.npy", (3,), np.float32)[...] = 1
    assert os.listdir(tmp_path / "out") == ["y.npy"]


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_only_a_folder_that_was_made_is_removed(tmp_path, exists, failure):
    if exists:
        (tmp_path / "out").mkdir()
    with pytest.raises(failure), Outputs() as outputs:
        outputs.folder(tmp_path / "out")
        outputs.create(tmp_path / "out" / "y.npy", (3,), np.float32)
        outputs.scratch(tmp_path / "out" / "states", (3,), np.float32)
        assert len(os.listdir(tmp_path / "out")) == 2
        raise failure
    assert (tmp_path / "out").exists() == exists
    assert files_below(tmp_path) == {}


def test_what_others_put_into_the_folder_is_kept(tmp_path):
    with pytest.raises(ValueError), Outputs() as outputs:
        outputs.folder(tmp_path / "out")
        outputs.create(tmp_path / "out" / "y.npy", (3,), np.float32)
        (tmp_path / "out" / "theirs").write_bytes(b"theirs")
        raise ValueError
    assert files_below(tmp_path) == {"out/theirs": b"theirs"}


@pytest.mark.parametrize("there", ["file", "dangling", "no-parent"])
def test_what_is_no_folder_is_told(tmp_path, there):
    path = tmp_path / "out"
    if there == "file":
        path.write_bytes(b"mine")
    elif there == "dangling":
        path.symlink_to(tmp_path / "nowhere")
    else:
        path = path / "deep"
    words = (
        "No such file or directory; nothing was written" if there == "no-parent" else "is a file, wanted the name of a folder"
    )
    before = os.listdir(tmp_path)
    with pytest.raises(FileError, match=re.escape(f"{path}: {words}")), Outputs() as outputs:
        outputs.folder(path)
    assert os.listdir(tmp_path) == before


def test_scratch_is_writable_and_gone_when_outputs_appear(tmp_path):
    with Outputs() as outputs:
        scratch = outputs.scratch(tmp_path / "states", (3, 2), np.complex64)
        scratch[...] = 1j
        outputs.create(tmp_path / "y.npy", (3, 2), np.complex64)[...] = scratch
    assert os.listdir(tmp_path) == ["y.npy"]
    assert np.all(np.load(tmp_path / "y.npy") == 1j)


@pytest.mark.parametrize("hard_links", [True, False])
@pytest.mark.parametrize("failure", ["no-room", "folder", "interrupt", None])
def test_outputs_that_are_replaced_are_replaced_together(tmp_path, monkeypatch, failure, hard_links):
    """Where the third of four cannot follow, those before it are what they were, and the new one is not there."""

    def replace(source, target, real=os.replace):
        if failure and str(target).endswith("3.npy") and str(source).endswith(".part"):
            raise {"no-room": OSError(errno.ENOSPC, "No room", str(target)), "interrupt": KeyboardInterrupt()}[failure]
        return real(source, target)

    if not hard_links:
        monkeypatch.setattr(os, "link", no_links)
    (tmp_path / "theirs").write_bytes(b"theirs")
    (tmp_path / "1.npy").symlink_to("theirs")
    for name in ("3.npy", "4.npy"):
        (tmp_path / name).write_bytes(name.encode())
    before = files_below(tmp_path)
    caught = contextlib.nullcontext()
    if failure == "interrupt":
        caught = pytest.raises(KeyboardInterrupt)
    elif failure:
        caught = pytest.raises(FileError, match=r"3\.npy: ")
    with caught, Outputs(force=True) as outputs:
        for i in range(1, 5):
            outputs.create(tmp_path / f"{i}.npy", (i,), np.float32)
        if failure == "folder":
            (tmp_path / "3.npy").unlink()
            (tmp_path / "3.npy").mkdir()
            del before["3.npy"]
        else:
            monkeypatch.setattr(os, "replace", replace)
    if failure:
        assert files_below(tmp_path) == before
        assert (tmp_path / "1.npy").is_symlink()
    else:
        assert sorted(files_below(tmp_path)) == ["1.npy", "2.npy", "3.npy", "4.npy", "theirs"]
        assert [len(np.load(tmp_path / f"{i}.npy")) for i in range(1, 5)] == [1, 2, 3, 4]
    assert (tmp_path / "theirs").read_bytes() == b"theirs"


def files_below(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
