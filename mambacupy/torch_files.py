"""`pytorch_model.bin` files: a zip of one pickle, `data.pkl`, and the tensors' storages as raw bytes, `data/0`, `data/1`, ….

A pickle is a program, and Python's unpickler runs whatever it names. Ours runs a pickle on a machine that knows nothing but
text, numbers, tuples, lists, dicts and four names, and that can call two of them: "make an ordered dict" and "here is a
tensor". Nothing is imported and no object is called, whatever the file says. (A restricted `pickle.Unpickler` would leave
doors: it can set attributes of what it lets through, and a single opcode makes it ask for gigabytes of memory.)

The opcodes are those of the standard library's `pickletools`; the layout of the zip and the arguments of
`_rebuild_tensor_v2` are those that torch.save has written since version 1.6.
"""

import math
import pickletools
import zipfile
import zlib
from dataclasses import dataclass
from typing import Any

from mambacupy.arrays import FLOAT_DTYPES
from mambacupy.stored_tensors import MAX_TEXT_BYTES, StoredTensor, is_shape, is_size, map_file, one_line, shown

STORAGES = dict(zip(("HalfStorage", "BFloat16Storage", "FloatStorage", "DoubleStorage"), FLOAT_DTYPES.values(), strict=True))
"""Dtypes by the names of torch's storage classes, of those that weights have."""


@dataclass(frozen=True)
class _Name:
    """A class or function that the pickle names. It stands for it and is never it."""

    text: str


@dataclass(frozen=True)
class _Storage:
    dtype: Any
    key: str
    count: int


_TENSOR = _Name("torch._utils _rebuild_tensor_v2")
_ORDERED_DICT = _Name("collections OrderedDict")


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
        It is no such file, is cut short, asks for anything but tensors, or holds a dtype that is not in `STORAGES`.
    """
    content = map_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except MemoryError:
        raise
    except Exception as error:  # zipfile raises nearly anything on bytes that are no zip
        old = "; torch before 1.6 wrote no zips: save the weights anew" if content[:1] == b"\x80" else ""
        raise ValueError(f"{path}: cut short, or no zip that torch.save wrote ({one_line(error)}){old}") from None
    pickled, storages = _members(path, content, members)

    def tensor(arguments):
        return _tensor(content, storages, arguments)

    try:
        found = _run(pickled, tensor)
        if not isinstance(found, dict) or not all(isinstance(x, StoredTensor) for x in found.values()):
            raise ValueError("it is no dict of names to tensors, as model.state_dict() is")
    except ValueError as error:
        raise ValueError(f"{path}: data.pkl: {one_line(error)}") from None
    return found


# ---------------------------------------------------------------------------------------------------- the zip
def _members(path, content, infolist):
    """The pickle's bytes, and (offset, size) of the storages by their keys."""
    members = {member.filename: member for member in infolist}
    if len(members) < len(infolist):
        raise ValueError(f"{path}: a zip with two members of one name")
    for name, member in members.items():
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1 or member.compress_size != member.file_size:
            raise ValueError(f"{path}: {shown(name)} is compressed or encrypted, which torch.save never does")
    pickles = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"{path}: a zip with {len(pickles)} members data.pkl, wanted one, as torch.save writes it")
    folder = pickles[0].removesuffix("data.pkl")
    byteorder = members.get(f"{folder}byteorder")
    if byteorder is not None and _bytes(path, content, byteorder) != b"little":
        raise ValueError(f"{path}: its numbers are big-endian, wanted little-endian ones")
    prefix = f"{folder}data/"
    storages = {
        name.removeprefix(prefix): (_data_offset(path, content, member), member.file_size)
        for name, member in members.items()
        if name.startswith(prefix)
    }
    return _bytes(path, content, members[pickles[0]]), storages


def _bytes(path, content, member):
    """A member that is no storage, as a whole."""
    if member.file_size > MAX_TEXT_BYTES:
        raise ValueError(f"{path}: {shown(member.filename)} has {member.file_size} bytes, wanted at most {MAX_TEXT_BYTES}")
    start = _data_offset(path, content, member)
    found = content[start : start + member.file_size]
    if zlib.crc32(found) != member.CRC:
        raise ValueError(f"{path}: {shown(member.filename)} is damaged: its checksum differs")
    return found


def _data_offset(path, content, member):
    """Where a member's bytes begin: after its local header, whose two variable fields have lengths of their own."""
    start = member.header_offset
    header = content[start : start + 30] if start >= 0 else b""
    end = start + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    if header[:4] != b"PK\x03\x04" or end + member.file_size > len(content):
        raise ValueError(f"{path}: cut short at {shown(member.filename)}")
    return end


# ---------------------------------------------------------------------------------------------------- the pickle
def _tensor(content, storages, arguments):
    """torch's `_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)`, offset and stride in elements."""
    if not isinstance(arguments, tuple) or len(arguments) < 4 or not isinstance(arguments[0], _Storage):
        raise ValueError("a tensor without storage, offset, size and stride")
    source, offset, shape, strides = arguments[:4]
    dtype, key, count = source.dtype, source.key, source.count
    if not is_size(offset) or not is_shape(shape) or not is_shape(strides) or len(shape) != len(strides):
        raise ValueError("a tensor whose offset, size or stride is none")
    if key not in storages:
        raise ValueError(f"its storage {shown(key)} is not in the file")
    begin, size = storages[key]
    if count * dtype.itemsize > size:
        raise ValueError(f"cut short: storage {shown(key)} has {size} bytes, wanted {shown(count * dtype.itemsize)}")
    if math.prod(shape) > count:
        raise ValueError(f"a tensor of size {shown(shape)} on storage {shown(key)}, which has {count} elements")
    if math.prod(shape):
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if last >= count:
            raise ValueError(f"a tensor reaches element {shown(last)} of storage {shown(key)}, which has {count}")
    in_bytes = tuple(stride * dtype.itemsize for stride in strides)
    return StoredTensor(content, begin + offset * dtype.itemsize, dtype, shape, in_bytes)


def _persistent(reference):
    """A storage, which the pickle refers to as ('storage', class, key, device, number of elements)."""
    if not isinstance(reference, tuple) or len(reference) < 5 or not isinstance(reference[0], str) or reference[0] != "storage":
        raise ValueError("a reference to something that is no storage")
    kind, key, count = reference[1], reference[2], reference[4]
    if not isinstance(kind, _Name) or not isinstance(key, str) or not is_size(count):
        raise ValueError("a storage without class, name and number of elements")
    name = kind.text.removeprefix("torch ")
    if name not in STORAGES:
        raise ValueError(f"dtype of {shown(name)}, wanted {', '.join(STORAGES)}")
    return _Storage(STORAGES[name], key, count)


def _named(text):
    """The stand-in for a class or function, if it is one that state dicts of weights need."""
    name = _Name(text)
    module, _, attribute = text.partition(" ")
    if name in (_TENSOR, _ORDERED_DICT) or (module == "torch" and attribute.endswith("Storage") and attribute.isalnum()):
        return name
    raise ValueError(f"it asks for {shown(text)}, which no tensor needs: refused, nothing of it was run")


def _call(function, arguments, tensor):
    """What a call of one of the two things that can be called gives."""
    if function == _TENSOR:
        return tensor(arguments)
    if function == _ORDERED_DICT and isinstance(arguments, tuple):
        if not arguments:
            return {}
        if len(arguments) == 1 and isinstance(arguments[0], list):  # as protocol 0 and 1 had it: a list of pairs
            return _with_items({}, [x for pair in arguments[0] for x in _pair(pair)])
    raise ValueError("it calls something that is neither a tensor nor an ordered dict: refused, nothing of it was run")


def _pair(x):
    if not isinstance(x, (tuple, list)) or len(x) != 2:
        raise ValueError("an ordered dict of something that is no pair")
    return x


def _with_items(target, items):
    if type(target) is not dict or len(items) % 2:
        raise ValueError("items for something that is no dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str):
            raise ValueError("a key that is no text")
        target[key] = value
    return target


def _extended(target, items):
    if type(target) is not list:
        raise ValueError("elements for something that is no list")
    target.extend(items)
    return target


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}


def _run(pickled, tensor):
    """What a pickle builds.

    Parameters
    ----------
    pickled : bytes
    tensor : callable
        Gives the tensor for the arguments of `_rebuild_tensor_v2`.

    Raises
    ------
    ValueError
        An opcode or a name that a state dict does not need, or bytes that are no pickle.
    """
    stack, marks, memo = [], [], {}

    def since_mark():
        at = marks.pop()
        items = stack[at:]
        del stack[at:]
        return items

    try:
        for opcode, argument, _ in pickletools.genops(pickled):
            name = opcode.name
            if name in _LITERALS:
                stack.append(argument)
            elif name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            elif name in _EMPTY:
                stack.append(_EMPTY[name]())
            elif name in _TUPLES:
                items = [stack.pop() for _ in range(_TUPLES[name])]
                stack.append(tuple(reversed(items)))
            elif name == "MARK":
                marks.append(len(stack))
            elif name == "TUPLE":
                stack.append(tuple(since_mark()))
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name == "GLOBAL":
                stack.append(_named(argument))
            elif name == "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                is_named = isinstance(module, str) and isinstance(attribute, str) and len(module) + len(attribute) < 100
                stack.append(_named(f"{module} {attribute}" if is_named else "?"))  # never a copy of a long text
            elif name == "BINPERSID":
                stack.append(_persistent(stack.pop()))
            elif name == "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_call(function, arguments, tensor))
            elif name == "SETITEMS":
                items = since_mark()
                _with_items(stack[-1], items)
            elif name == "SETITEM":
                items = [stack.pop(), stack.pop()][::-1]
                _with_items(stack[-1], items)
            elif name == "APPENDS":
                items = since_mark()
                _extended(stack[-1], items)
            elif name == "APPEND":
                items = [stack.pop()]
                _extended(stack[-1], items)
            elif name == "BUILD":
                stack.pop()  # attributes; a state dict has one, its modules' version numbers
                if type(stack[-1]) is not dict:
                    raise ValueError("attributes for something that is no dict: refused, nothing of it was run")
            elif name == "STOP":
                (result,) = stack
                return result
            elif name not in ("PROTO", "FRAME"):
                raise ValueError(f"opcode {name}, which no state dict needs: refused, nothing of it was run")
    except (IndexError, KeyError, Warning) as error:  # Warning: pickletools, where warnings are errors
        raise ValueError(f"no pickle: it takes what it has not put ({one_line(error)})") from None
    raise ValueError("no pickle: it does not end")
