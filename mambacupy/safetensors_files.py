"""`.safetensors` files: eight bytes of header length (little-endian), a header in JSON, the tensors' bytes.

The header maps names to `{"dtype", "shape", "data_offsets": [begin, end]}`, counted from the end of the header; the ranges
cover the rest of the file without gaps or overlaps (https://github.com/huggingface/safetensors, "Format").

The reader is our own and not the `safetensors` package, because it keeps tensors where they are, in the mapped file, with
bfloat16 as `ml_dtypes.bfloat16`: the package gives NumPy arrays that are copies.
"""

import json
import math

import numpy as np

from mambacupy.arrays import FLOAT_DTYPES
from mambacupy.stored_tensors import MAX_TEXT_BYTES, StoredTensor, is_shape, map_file, parse_json, shown

DTYPES = dict(zip(("F16", "BF16", "F32", "F64"), FLOAT_DTYPES.values(), strict=True))
"""Dtypes by the format's names, of those that weights have."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read(path):
    """The tensors of a file by name, checked but not read.

    Returns
    -------
    dict of str to StoredTensor

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        It is no such file, is cut short, or holds a dtype that is not in `DTYPES`.
    """
    content = map_file(path)
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > len(content) - 8 or length > MAX_TEXT_BYTES:
        raise ValueError(f"{path}: cut short, or no .safetensors file: {len(content)} bytes, of which {length} of header")
    header = parse_json(f"{path}: header", content[8 : 8 + length])
    header.pop("__metadata__", None)  # free text of the writer
    start = 8 + length
    tensors, ranges = {}, []
    for name, entry in header.items():
        dtype, shape, begin, end = _entry(f"{path}: {shown(name)}", entry)
        tensors[name] = StoredTensor(content, start + begin, dtype, shape)
        ranges.append((begin, end, name))
    covered = 0
    for begin, end, name in sorted(ranges):
        if begin != covered:
            fault = "overlap those of another tensor" if begin < covered else f"leave a gap behind byte {covered}"
            raise ValueError(f"{path}: {shown(name)}: data_offsets [{begin}, {end}] {fault}")
        covered = end
    if covered != len(content) - start:
        fault = "cut short" if covered > len(content) - start else "too long"
        raise ValueError(f"{path}: {fault}: {len(content) - start} bytes of data, wanted {covered}")
    return tensors


def _entry(label, entry):
    """dtype, shape, begin and end of one tensor of a header."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{label}: wanted dtype, shape and data_offsets in the header")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{label}: dtype is {shown(dtype)}, wanted {', '.join(DTYPES)}")
    if not is_shape(shape):
        raise ValueError(f"{label}: shape is {shown(shape)}, wanted a list of sizes")
    if not is_shape(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{label}: data_offsets are {shown(offsets)}, wanted [begin, end]")
    size = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != size:
        raise ValueError(
            f"{label}: data_offsets {shown(offsets)} do not hold the {shown(size)} bytes of {shown(shape)} {dtype}"
        )
    return DTYPES[dtype], tuple(shape), *offsets


def write(file, arrays):
    """Write arrays to an open binary file.

    Parameters
    ----------
    file : file object
    arrays : dict of str to array
        NumPy or CuPy arrays of the dtypes in `DTYPES`, in any memory order. One at a time is brought to the host.
    """
    # Wide elements first, as others write it: each tensor lies where its dtype can be addressed.
    names = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    header, end = {"__metadata__": {"format": "pt"}}, 0  # transformers refuses files without a format
    for name in names:
        begin, end = end, end + arrays[name].nbytes
        header[name] = {"dtype": _NAMES[arrays[name].dtype], "shape": list(arrays[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        x = arrays[name]
        host = x if isinstance(x, np.ndarray) else x.get()
        file.write(np.ascontiguousarray(host).reshape(-1).view(np.uint8))  # (any shape) -> (bytes,)
