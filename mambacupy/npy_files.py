"""Arrays in `.npy` and `.npz` files: read without loading them, write so that only complete files ever appear."""

import contextlib
import math
import os
import secrets
import signal
import stat
import threading
import warnings
import zipfile
from pathlib import Path

import numpy as np

from mambacupy.arrays import BFLOAT16

_HOW_NUMPY_STORES_BFLOAT16 = np.dtype("V2")
_NO_FILES = {
    stat.S_IFDIR: "folder",
    stat.S_IFIFO: "pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
MOST_BYTES = 2**62
"""Beyond, neither NumPy nor operating systems count. An array without elements has the size that its other axes give it."""
_TARGET = "the name of a file to write"


class FileError(Exception):
    """A file that cannot be used. The message is one line and names the file."""

    def __init__(self, message):
        super().__init__(" ".join(message.splitlines()))


def open_array(path):
    """Memory-map a `.npy` file.

    Raises
    ------
    FileError
        It does not exist, is no `.npy` file, is cut short, or holds pickled objects.
    """
    path = Path(path)
    with _opened(path, "a .npy file") as file:
        return _map(path, file, 0, os.fstat(file.fileno()).st_size)


def open_npz(path, wanted=None):
    """The arrays of an `.npz` file by name: memory-mapped where they are stored uncompressed, loaded otherwise.

    Where `wanted` names some, the others are not read, and None stands in their place.
    """
    path = Path(path)
    with _opened(path, "an .npz file") as file, zipfile.ZipFile(file) as archive:
        found = {}
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if member.filename == name:
                continue
            label = f"{path}:{member.filename}"
            if name in found:
                raise FileError(f"{label}: is there twice, wanted one array of that name")
            with _errors_of(label, "a .npy file"):
                if wanted is not None and name not in wanted:
                    found[name] = None
                elif member.compress_type == zipfile.ZIP_STORED:
                    start = _data_offset(file, member)
                    found[name] = _map(label, file, start, start + member.file_size)
                else:
                    with archive.open(member) as stream:
                        found[name] = _load(label, stream)
        return found


@contextlib.contextmanager
def _opened(path, kind):
    """An open file that can be mapped: a pipe would be waited for, and a device has no end."""
    with _errors_of(path, kind):
        refuse_no_file(path, kind)
        with open(path, "rb") as file:
            yield file


def refuse_no_file(path, wanted):
    """Raise a FileError if something is at `path` that is no regular file."""
    with contextlib.suppress(FileNotFoundError):
        kind = _NO_FILES.get(stat.S_IFMT(os.stat(path).st_mode))
        if kind:
            raise FileError(f"{path}: is a {kind}, wanted {wanted}")


@contextlib.contextmanager
def _errors_of(label, kind):
    """Give as a FileError what the parsers of NumPy and zipfile raise on bytes that are not theirs: nearly anything."""
    try:
        yield
    except (FileError, MemoryError):
        raise
    except OSError as error:
        raise FileError(f"{label}: {error.strerror or error}") from None
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise FileError(f"{label}: not {kind} ({reason})") from None


def _data_offset(file, member):
    """Where a member's bytes begin: after its local header, whose two variable fields have lengths of their own."""
    file.seek(member.header_offset + 26)
    lengths = file.read(4)
    return member.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")


def _header(label, stream):
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of headers that Python 2 wrote
            shape, fortran_order, dtype = read(stream)
    except MemoryError:  # which Python's parser raises
        raise ValueError("its header is nested too deeply") from None
    if not all(type(size) is int and size >= 0 for size in shape) or dtype.itemsize == 0:
        raise ValueError(f"its header says {shape} {dtype}")
    if dtype.hasobject:
        raise FileError(f"{label}: holds pickled Python objects, which are never loaded; wanted numbers")
    return shape, "F" if fortran_order else "C", dtype


def _map(label, file, start, end):
    """The array whose `.npy` bytes lie at [start, end) of an open file, as a read-only view of the file."""
    file.seek(start)
    shape, order, dtype = _header(label, file)
    offset, wanted = file.tell(), math.prod(shape) * dtype.itemsize
    if end - offset < wanted:
        raise FileError(f"{label}: cut short: {end - offset} bytes of data, wanted {wanted} for {shape} {dtype}")
    if wanted == 0:
        return _known(np.empty(shape, dtype, order))
    return _known(np.memmap(file, dtype, "r", offset, shape, order))


def _load(label, stream):
    shape, order, dtype = _header(label, stream)
    wanted = math.prod(shape) * dtype.itemsize
    content = stream.read(wanted)
    if len(content) < wanted:
        raise FileError(f"{label}: cut short: {len(content)} bytes of data, wanted {wanted} for {shape} {dtype}")
    return _known(np.frombuffer(content, dtype).reshape(shape, order=order))


def _known(x):
    return x.view(BFLOAT16) if x.dtype == _HOW_NUMPY_STORES_BFLOAT16 else x


def refuse_overwriting(targets, inputs, what):
    """Raise a FileError if one of the files to be written is among those that are read, or is named twice.

    Parameters
    ----------
    targets, inputs : iterables of path
    what : str
        Of what they are inputs, as the message says it.
    """
    used, seen = {os.path.realpath(path) for path in inputs}, set()
    for target in targets:
        real = os.path.realpath(target)
        if real in used:
            raise FileError(f"{target}: is an input of this {what}; write elsewhere")
        if real in seen:
            raise FileError(f"{target}: named for two outputs; each needs a file of its own")
        seen.add(real)


class Outputs:
    """Files that appear together and complete, or not at all.

    A context manager: files are written under temporary names beside their targets and renamed when the block ends well.
    However else it ends (an error, Ctrl-C), they are removed and the targets are as they were.
    """

    def __init__(self, force=False):
        self.force = force
        self._files = []  # (array, temporary path, target path or None)
        self._folders = []

    def __enter__(self):
        return self

    def folder(self, path):
        """Make a folder unless there is one. It is removed again where no outputs come to lie in it.

        Raises
        ------
        FileError
            It cannot be made, or something else has its name.
        """
        path = Path(path)
        with _nothing_written(path):
            if path.is_dir():
                return
            if os.path.lexists(path):
                raise FileError(f"{path}: is a file, wanted the name of a folder")
            self._folders.append(path)
            path.mkdir()

    def create(self, path, shape, dtype):
        """A writable array of the given shape and dtype that becomes the `.npy` file `path`.

        Raises
        ------
        FileError
            The target exists and `force` is not set, its folder does not, or the disk has no room for it.
        """
        named, path = os.fspath(path), Path(path)
        with _nothing_written(path):
            refuse_no_file(path, _TARGET)
            if os.path.basename(named) in ("", os.curdir, os.pardir):  # which Path drops
                raise FileError(f"{named}: names a folder, wanted {_TARGET}")
            if os.path.lexists(path) and not self.force:
                raise FileError(f"{path}: exists; --force replaces it")
            return self._allocate(path, path, shape, dtype)

    def rehearse(self, path):
        """Raise what `create` would raise, before the work is done and the shape is known. Nothing is left of it."""
        try:
            self.create(path, (), np.uint8)
        finally:
            self._discard()

    def scratch(self, path, shape, dtype):
        """A writable array in a file that is gone when the block ends, named after `path`.

        Raises
        ------
        FileError
            Its folder does not exist, or the disk has no room for it.
        """
        path = Path(path)
        with _nothing_written(path):
            return self._allocate(path, None, shape, dtype)

    def _allocate(self, path, target, shape, dtype):
        stored = _HOW_NUMPY_STORES_BFLOAT16 if dtype == BFLOAT16 else np.dtype(dtype)
        if math.prod(max(n, 1) for n in shape) * stored.itemsize > MOST_BYTES:
            raise FileError(f"{path}: {tuple(shape)} {dtype} is more than any file holds; nothing was written")
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        self._files.append([None, temporary, target])
        with open(temporary, "xb+") as file:  # never through a link that waits under this name
            header = {
                "descr": np.lib.format.dtype_to_descr(stored),
                "fortran_order": False,
                "shape": tuple(shape),
            }
            np.lib.format.write_array_header_2_0(file, header)
            offset, size = file.tell(), math.prod(shape) * stored.itemsize
            file.flush()
            if size == 0:
                return np.empty(shape, dtype)
            _reserve(file.fileno(), offset + size)
            array = np.memmap(file, stored, "r+", offset, tuple(shape))
        self._files[-1][0] = array
        return array.view(BFLOAT16) if dtype == BFLOAT16 else array

    def __exit__(self, kind, error, traceback):
        try:
            if kind is None:
                self._publish([entry for entry in self._files if entry[2] is not None])
        except OSError as failure:
            raise FileError(f"{failure.filename or self._files[0][2]}: {failure.strerror or failure}") from None
        finally:
            self._discard()

    def _publish(self, files):
        for array, temporary, _ in files:
            if array is not None:
                array.flush()
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        begun = []
        with _undisturbed():
            try:
                for _, temporary, path in files:
                    begun.append((temporary, path))
                    _rename(temporary, path, self.force)
            except BaseException:  # another output could not follow, or was not to
                for temporary, path in reversed(begun):
                    _take_back(temporary, path)
                raise
            for temporary, _ in begun:
                _remove(_replaced(temporary))

    def _discard(self):
        with _undisturbed():
            for _, temporary, _ in self._files:
                _remove(temporary)
            for folder in reversed(self._folders):
                with contextlib.suppress(OSError):  # outputs lie in it
                    folder.rmdir()
            self._files, self._folders = [], []


@contextlib.contextmanager
def _undisturbed():
    """For what takes a moment and must not be left half done: Ctrl-C and its like come too late, or once more than needed."""
    before = {}
    if threading.current_thread() is threading.main_thread():  # no other may say what signals do
        for number in _SIGNALS:
            before[number] = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # Python can put back
                signal.signal(number, handler)


@contextlib.contextmanager
def _nothing_written(path):
    """Give errors of the operating system as a FileError."""
    try:
        yield
    except OSError as error:
        raise FileError(f"{path}: {error.strerror or error}; nothing was written") from None


def _reserve(descriptor, size):
    """Claim the file's space now: a write through a memory map to a full disk would kill the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        zeros = bytes(1 << 20)
        os.lseek(descriptor, 0, os.SEEK_END)
        while (left := size - os.lseek(descriptor, 0, os.SEEK_CUR)) > 0:
            os.write(descriptor, zeros[:left])


def _rename(temporary, path, force):
    """Give a complete file its name; without `force` a file that has appeared there meanwhile is kept."""
    if force:
        refuse_no_file(path, _TARGET)
        if os.path.lexists(path):
            try:
                os.link(path, _replaced(temporary), follow_symlinks=False)
            except (OSError, NotImplementedError):  # a file system without hard links
                os.rename(path, _replaced(temporary))
        os.replace(temporary, path)
        return
    appeared = FileError(f"{path}: appeared while it was computed; --force replaces it")
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise appeared from None
    except OSError:  # a file system without hard links
        if os.path.lexists(path):
            raise appeared from None
        os.replace(temporary, path)


def _take_back(temporary, path):
    """Undo `_rename`, as far as it came."""
    replaced = _replaced(temporary)
    with contextlib.suppress(OSError):
        if os.path.lexists(replaced):
            os.replace(replaced, path)
            _remove(replaced)  # where both are names of one file, replacing does nothing
        elif not temporary.exists() or path.samefile(temporary):
            path.unlink()


def _replaced(temporary):
    """Where the file that an output replaces is kept until all outputs have their names."""
    return temporary.with_suffix(".old")


def _remove(path):
    with contextlib.suppress(OSError):
        path.unlink()
