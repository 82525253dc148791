"""A checkpoint's folder: which of its files hold the weights, and how new files appear in it."""

import contextlib
import errno
import os
import shutil

from mambacupy import safetensors_files, torch_files
from mambacupy.stored_tensors import listed, printable, read_json, shown

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_READERS = {WEIGHTS: safetensors_files.read, "pytorch_model.bin": torch_files.read}
"""Files of weights by their names, in the order in which they are looked for, each before its shards."""


# ---------------------------------------------------------------------------------------------------- files in
def tensors(folder):
    """The file that lists a checkpoint's tensors, and the tensors.

    Returns
    -------
    path : Path
        The file, or the index of its shards.
    tensors : dict of str to StoredTensor

    Raises
    ------
    FileNotFoundError, ValueError
        As `mambacupy.weights.load` documents.
    """
    for name, read in _READERS.items():
        if (folder / name).exists():
            return folder / name, read(folder / name)
        index = folder / f"{name}.index.json"
        if index.exists():
            return index, _sharded(folder, index, read)
    raise FileNotFoundError(f"{folder}: has no weights, wanted {' or '.join(_READERS)}, or shards beside an .index.json")


def _sharded(folder, index, read):
    """The tensors of all shards that an index names."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{index}: has no weight_map of keys to files")
    tensors, home = {}, {}
    for name in dict.fromkeys(places.values()):
        if name in ("", ".", "..") or not name.isprintable() or any(character in name for character in "/\\:"):
            raise ValueError(f"{index}: names the file {shown(name)}, wanted one in its own folder")
        for key, x in read(folder / name).items():
            if key in tensors:
                raise ValueError(f"{index}: {printable(key)} is in {home[key]} and in {name}")
            tensors[key], home[key] = x, name
    lost = [f"{printable(key)} in {name}" for key, name in places.items() if home.get(key) != name]
    if lost:
        raise ValueError(f"{index}: {len(lost)} not where it says: {listed(lost)}")
    return tensors


# ---------------------------------------------------------------------------------------------------- files out
def publish(folder, writers, force):
    """Write files under temporary names, then let them appear in a folder together.

    Parameters
    ----------
    folder : Path
    writers : dict of str to callable
        What writes each file to an open one. The first is what makes the folder a checkpoint.
    force : bool
        Whether the folder may have files.

    Raises
    ------
    OSError
        As `mambacupy.weights.save` documents.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise FileExistsError(errno.EEXIST, "is no folder", str(folder))
    occupied = folder.is_dir() and any(folder.iterdir())
    if occupied and not force:
        raise FileExistsError(errno.EEXIST, "has files; force=True replaces the checkpoint in it", str(folder))
    target = folder.resolve()
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder", str(folder.parent))
    # Within or beside what it becomes: names can only be moved within a file system.
    temporary = target / f".save.{os.getpid()}" if occupied else target.with_name(f".{target.name}.{os.getpid()}.part")
    temporary.mkdir()
    try:
        for name, write in writers.items():
            try:
                with open(temporary / name, "xb") as file:
                    write(file)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:  # those of writing do not say where
                raise OSError(error.errno, error.strerror, str(folder / name)) from None
        if occupied:
            _exchange(temporary, folder, list(writers))
        else:
            os.rename(temporary, target)  # onto nothing, or onto an empty folder
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _exchange(temporary, folder, names):
    """Replace files of a folder by those of another, or leave it as it was.

    The first name is taken away before the others are replaced and given back last, so that a process that is killed between
    leaves a folder without weights rather than one with the wrong ones.
    """
    first, *others = names
    old = temporary / "old"
    old.mkdir()
    moves = [(folder / name, old / name) for name in names if os.path.lexists(folder / name)]
    moves += [(temporary / name, folder / name) for name in (*others, first)]
    done = []
    try:
        for source, target in moves:
            done.append((source, target))
            os.rename(source, target)
    except BaseException:
        for source, target in reversed(done):
            with contextlib.suppress(OSError):  # the last one may not have happened
                os.rename(target, source)
        raise
