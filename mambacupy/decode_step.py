"""One token of each sequence through a Mamba language model, as a list of launches over memory of its own.

A block of the model is four launches: norm, in_proj and convolution; x_proj; dt_proj, states and gate; out_proj. Where many
sequences go together the norm is one more. cuda_src/matrix_vector.cu, selective_step.cu and largest.cu say what each does.
Where still more do, large maps are products of matrices, which the library multiplies: norm, in_proj, convolution, x_proj,
dt_proj with states and gate, and out_proj are a launch each.
"""

import functools
import math
import struct

import numpy as np

from mambacupy import arrays, kernels
from mambacupy.layers import State
from mambacupy.ops import conv_kernels, products
from mambacupy.ops.mapping import power_of_two

THREADS, WARPS = 256, 8
"""Of a block, as cuda_src/decode.cuh has them."""

MOST_FUSED = 8
"""Sequences up to which each block normalises all of them for itself."""

LEAST_MULTIPLIED = 17, 3 * 2**26
"""Sequences, and bytes of in_proj times sequences, from which on large maps are products of matrices by the library. Below, its
launches, which wait for each other, take longer than what it saves."""

LEAST_TOGETHER = 17, 32
"""Sequences from which a thread has the states of four: where that leaves two blocks for each multiprocessor, and anywhere."""

PARTS = 4
"""Of out_proj's columns, where it is a product: multiplied by themselves, because so few sequences make few tiles of it."""

STAGED_BYTES = 40 * 1024
"""Shared memory that their normalised vectors may take."""

LOADS, LOADS_IN_ROUNDS = 16, 12
"""Loads of weights that a thread has under way, of few sequences, as far as registers allow; and where it has more to load, for
to go round takes registers too."""

NORM_REGISTERS = 88
"""Of the 128 that a thread has then, for a norm and the weights that are on their way meanwhile."""

AHEAD_BYTES = 2**20
"""Weights that a small kernel fetches into L2 for those after it, at most: more delays what it is waited for."""


class DecodeStep:
    """Buffers and launches of a step.

    Parameters
    ----------
    xp : module
        cupy, or what stands in for it.
    model : MambaLM
    params : dict
        Weights that have not the dtype that the model computes in are copied.
    batch : int
    tensor_cores : bool
        Whether the device multiplies tiles of 16-bit numbers.
    overlap : bool
        Whether kernels may begin before the one in front has ended.
    library : bool
        Whether there is one for products of matrices, of 16-bit numbers.

    Attributes
    ----------
    state : tuple of State
        As `model.init_state` gives it; zeros.
    tokens : array (batch,) of int64
        What the step reads; then the most probable of what follows.
    logits : array (batch, padded_vocab_size)
    launches : list of callable
    """

    def __init__(self, xp, model, params, batch, tensor_cores, overlap, library=False):
        self.xp, self.config, self.batch = xp, model.config, batch
        self.dtype = model._dtype(params["embedding"]["weight"])
        self.tensor, self.overlap = int(tensor_cores and self.dtype.itemsize == 2), int(overlap)
        self.workspace = None
        if library and self.dtype.itemsize == 2 and self._is_multiplied(batch):
            self.workspace = xp.empty((products.WORKSPACE_BYTES,), np.dtype(np.uint8))
        c, mixer, device = self.config, model.block.mixer, kernels.device()
        self.multiprocessors = device.multiprocessors
        self.state = tuple(
            State(self._zeros(c.d_inner, c.d_conv - 1), self._zeros(c.d_inner, c.d_state, dtype=arrays.FLOAT32))
            for _ in range(c.n_layer)
        )
        self.tokens, self.logits = self._zeros(dtype=np.int64), self._zeros(c.padded_vocab_size)
        self.launches = []

        sizes = {"hidden": c.d_model, "normed": c.d_model, "u": c.d_inner, "z": c.d_inner, "y": c.d_inner}
        sizes |= {"selected": mixer.rank + 2 * c.d_state, "dt": mixer.rank, "B": c.d_state, "C": c.d_state}
        if self.workspace is not None:
            sizes["xz"] = 2 * c.d_inner
        self.buffers = {name: self._zeros(size) for name, size in sizes.items()}
        self.parts = None  # of what out_proj gives, where the norm adds them up
        if self.workspace is not None and not c.bias:
            self.parts = xp.empty((math.gcd(PARTS, c.d_inner), batch, c.d_model), arrays.FLOAT32)
        total = arrays.FLOAT32 if c.residual_in_fp32 else self.dtype
        self.totals = [self._zeros(c.d_model, dtype=total) for _ in range(2)]  # in turn: other blocks still read the last
        embedding = self._own(params["embedding"]["weight"])
        head = embedding if c.tie_embeddings else self._own(params["lm_head"]["weight"])
        blocks = [self._weights(layer) for layer in params["layers"]]
        for i, (norm, weights) in enumerate(blocks):
            after = blocks[i + 1][1]["in_proj"] if i + 1 < c.n_layer else head
            self._block(i, norm, weights, self.state[i], embedding, after)
        self._map(
            "logits", head, None, norm=self._reals(params["norm_f"]), table=None if c.n_layer else embedding, turn=c.n_layer
        )
        numbers = {"size": c.vocab_size, "x_row": c.padded_vocab_size}
        vector = _widest(16 // self.dtype.itemsize, self.logits, c.padded_vocab_size)
        given = {"x": self.logits, "places": self.tokens}
        self._add("largest.cu", "largest", {"VECTOR": vector}, batch, numbers, given, threads=1024)

    def _is_multiplied(self, batch):
        sequences, size = LEAST_MULTIPLIED
        return batch >= sequences and batch * 2 * self.config.d_inner * self.config.d_model * self.dtype.itemsize >= size

    def run(self):
        """Launch all, on the current stream."""
        for launch in self.launches:
            launch()

    def clear(self):
        """Back to before a text begins."""
        for x in (self.tokens, *(x for part in self.state for x in part)):
            x.fill(0)

    # ------------------------------------------------------------------------------------------------ memory
    def _zeros(self, *shape, dtype=None):
        x = self.xp.empty((self.batch, *shape), dtype or self.dtype)
        x.fill(0)
        return x

    def _own(self, x, dtype=None):
        """x as a kernel reads it: contiguous, in one dtype. None stays None."""
        return None if x is None else self.xp.ascontiguousarray(x.astype(dtype or self.dtype, copy=False))

    def _reals(self, params):
        return {name: self._own(x, arrays.FLOAT32) for name, x in params.items()}

    def _weights(self, layer):
        """A block's norm, and its mixer's weights by name."""
        mixer = layer["mixer"]
        own = {name: self._own(mixer[name]["weight"]) for name in ("in_proj", "x_proj", "dt_proj", "out_proj")}
        own |= {f"{name}.bias": self._own(mixer[name].get("bias")) for name in ("in_proj", "out_proj")}
        own |= {"dt_bias": mixer["dt_proj"]["bias"], "D": mixer["D"], "A": -np.exp(mixer["A_log"].astype(np.float32))}
        own |= {"conv_weight": mixer["conv1d"]["weight"], "conv_bias": mixer["conv1d"].get("bias")}
        for name in ("dt_bias", "D", "A", "conv_weight", "conv_bias"):
            own[name] = self._own(own[name], arrays.FLOAT32)
        if self.config.bc_dt_norm:
            for name, key, size in self._inner_norms():
                weight = mixer[key]["weight"] if key in mixer else self.xp.ones(size, np.float32)
                own[name] = {"weight": self._own(weight, arrays.FLOAT32)}
        return self._reals(layer["norm"]), own

    def _inner_norms(self):
        c = self.config
        return ("dt", "dt_layernorm", c.rank), ("B", "b_layernorm", c.d_state), ("C", "c_layernorm", c.d_state)

    # ------------------------------------------------------------------------------------------------ a block of the model
    def _block(self, i, norm, weights, state, embedding, after):
        c, b = self.config, self.buffers
        table = embedding if i == 0 else None
        self._map("in_proj", weights["in_proj"], weights["in_proj.bias"], norm, table, i, weights, state)
        self._map("x_proj", weights["x_proj"], None, ahead=weights["out_proj"])
        row = c.rank + 2 * c.d_state
        starts = {"dt": 0, "B": c.rank, "C": c.rank + c.d_state}
        given = {name: b["selected"].reshape(-1)[start:] for name, start in starts.items()}
        rows = dict.fromkeys(starts, row)
        if c.bc_dt_norm:
            for name, _, size in self._inner_norms():
                self._norm(given[name], row, b[name], size, weights[name], c.bc_dt_norm_eps)
                given[name], rows[name] = b[name], size
        self._states(weights, state, given, rows, after)
        self._map("out_proj", weights["out_proj"], weights["out_proj.bias"])

    def _map(self, part, weight, bias, norm=None, table=None, turn=0, conv=None, state=None, ahead=None):
        """A linear map: `part` names which, and so its vectors. `turn` counts the norms of the stream before it."""
        c, b, batch = self.config, self.buffers, self.batch
        rows, columns = weight.shape
        x, y, z = {"in_proj": ("hidden", "u", "z"), "x_proj": ("u", "selected", None), "out_proj": ("y", "hidden", None),
                   "logits": ("hidden", None, None)}[part]  # fmt: skip
        x, x_row, y, z = b[x], columns, self.logits if y is None else b[y], b.get(z)
        stream = self._stream(table, turn) if norm else {}
        fused = norm is not None and batch <= MOST_FUSED and self._staged(columns) <= STAGED_BYTES
        if norm is not None and not fused:
            self._norm(stream.pop("x"), columns, b["normed"], columns, norm, c.norm_eps, stream)
            x, stream, norm = b["normed"], {}, None
        if self.workspace is not None and bias is None and part != "x_proj":
            if part == "out_proj":
                y = self.parts
            self._multiply(x, weight, b["xz"] if conv else y)
            if conv:
                self._convolve(b["xz"][:, : c.d_inner], conv, state)
            return
        given = {"weight": weight, "bias": bias, "x": x, "y": y, "z": z, "ahead": ahead} | stream
        constants, numbers = self._norm_parts(given["x"], columns, columns, norm, stream, c.norm_eps)
        if fused:
            given |= {"norm_weight": norm["weight"], "norm_bias": norm.get("bias")}
        pack = 16 // self.dtype.itemsize
        vector = _widest(pack, weight, columns, *([] if fused else [given["x"], x_row]))
        row_tiles = -(-rows // 8)
        tile = self._batch_tile(row_tiles)
        tiles, blocks = self._row_tiles(row_tiles, tile)
        steps = -(-columns // (4 * pack * WARPS))
        vectors = tile if not self.tensor else max(1, tile // 8)
        more = tiles * blocks < row_tiles
        loads = 8 if batch > MOST_FUSED or more else LOADS if fused or steps * tiles <= LOADS else LOADS_IN_ROUNDS
        if fused:
            loads = min(loads, self._loads_beside_a_norm(columns))
        depth = min(steps, max(1, loads // tiles), max(1, 16 // vectors))
        constants |= {
            "COLUMNS": columns, "VECTOR": vector, "TENSOR": self.tensor, "BATCH": tile, "TILES": tiles, "DEPTH": depth,
            "WIDTH": c.d_conv if conv else 0, "NORM": int(fused), "MORE": int(more),
        }  # fmt: skip
        if conv:
            given |= {"state": state.conv, "conv_weight": conv["conv_weight"], "conv_bias": conv["conv_bias"]}
        blocks *= -(-batch // tile)
        numbers |= {"rows": rows, "dim": c.d_inner, "y_row": rows}
        self._add("matrix_vector.cu", "matrix_vector", constants, blocks, numbers, given, ahead)

    def _multiply(self, x, weight, y):
        """y = x·weightᵀ, by the library."""
        self.launches.append(functools.partial(products.product, self.xp, x, weight.T, y, workspace=self.workspace))

    def _convolve(self, x, weights, state):
        """One step of the convolution, where in_proj was a product: from its x to u."""
        tensors = {"state": state.conv, "x": x, "weight": weights["conv_weight"], "bias": weights["conv_bias"]}
        launch = conv_kernels.plan_update(*tensors.values(), True, self.config.d_conv, bool(self.overlap))
        self.launches.append(functools.partial(launch, tensors | {"y": self.buffers["u"]}))

    def _stream(self, table, turn):
        """What the norm number `turn` of the stream adds up, and where the sum goes."""
        if table is not None:  # the stream begins
            return {"x": table, "tokens": self.tokens, "total": self.totals[0]}
        residual, total = self.totals[(turn - 1) % 2], self.totals[turn % 2]
        return {"x": self.buffers["hidden"], "parts": self.parts, "residual": residual, "total": total}

    def _batch_tile(self, row_tiles):
        """Sequences that a block has: as many as there are, unless that leaves multiprocessors without a block."""
        if not self.tensor:
            return min(8, power_of_two(self.batch))
        tile = 8 if self.batch <= 8 else min(64, max(16, power_of_two(self.batch)))
        while tile > 16 and row_tiles * -(-self.batch // tile) < self.multiprocessors:
            tile //= 2
        return tile

    def _row_tiles(self, row_tiles, tile):
        """Tiles of 8 rows that a block has at a time, and row by row of such tiles, blocks. Of few sequences all blocks run at
        once, two a multiprocessor, in turn where there are more rows. Of more, no multiprocessor is left without a block."""
        most = 2 * self.multiprocessors
        if self.batch <= MOST_FUSED:
            tiles = next((n for n in (1, 2) if -(-row_tiles // n) <= most), 4)
            return tiles, min(-(-row_tiles // tiles), most)
        wanted = -(-self.multiprocessors // -(-self.batch // tile))
        tiles = next(n for n in (8, 4, 2, 1) if n == 1 or (n * tile <= 256 and -(-row_tiles // n) >= wanted))
        return tiles, -(-row_tiles // tiles)

    def _loads_beside_a_norm(self, columns):
        """Loads of weights, 4 registers each, for which there are some left while a block normalises: a thread has its share of
        all sequences then, and of the norm's weights where those are 16 numbers at most."""
        share = columns * power_of_two(self.batch) // THREADS
        return (NORM_REGISTERS - share * (2 if share <= 16 else 1)) // 4

    def _staged(self, columns):
        """Bytes of the normalised vectors of a block."""
        tile = self._batch_tile(1 << 30)
        return tile * (columns * self.dtype.itemsize + 64 + 64)

    def _norm(self, x, x_row, y, size, norm, eps, stream=None):
        """A norm by itself, of (batch, size)."""
        given = {"x": x, "y": y, "norm_weight": norm["weight"], "norm_bias": norm.get("bias")} | (stream or {})
        constants, numbers = self._norm_parts(x, x_row, size, norm, stream or {}, eps)
        constants |= {"COLUMNS": size, "VECTOR": 1, "TENSOR": 0, "BATCH": 1, "TILES": 1, "DEPTH": 1, "WIDTH": 0, "NORM": 0}
        constants |= {"TEAMS": 1, "MORE": 0}
        self._add("matrix_vector.cu", "decode_norm", constants, self.batch, numbers | {"y_row": size}, given)

    def _norm_parts(self, x, x_row, size, norm, stream, eps):
        """Constants and numbers that a norm is made of, and that a map without one has too."""
        total = stream.get("total")
        constants = {
            "LAYER": int(norm is not None and not self.config.rms_norm and total is not None),
            "HAS_RESIDUAL": int(stream.get("residual") is not None),
            "NORM_VECTOR": 1 if norm is None else _widest(4, x, x_row, size, *(w for w in norm.values() if w is not None)),
            "PARTS": 0 if stream.get("parts") is None else len(stream["parts"]),
            "TEAMS": 1 if norm is None else min(8, power_of_two(self.batch)),
            "TOTAL_T": kernels.C_TYPES[(self.totals[0] if total is None else total).dtype.name],
        }
        return constants, {"x_row": x_row, "vocabulary": self.config.padded_vocab_size, "eps": _bits(eps)}

    def _states(self, weights, state, given, rows, after):
        """dt_proj, the states, and the gate."""
        c, b = self.config, self.buffers
        states = (state.ssm, weights["A"])
        vector = min(_widest(4, x, c.d_state) for x in states)
        vector = min(vector, *(_widest(vector, given[name], rows[name]) for name in "BC"))
        lanes = min(32, power_of_two(-(-c.d_state // vector)))
        entries, blocks = self._entries(lanes)
        widest = _widest(16 // self.dtype.itemsize, weights["dt_proj"], c.rank, given["dt"], rows["dt"])
        # Four lanes that take 16 bytes of a row at a time have what tensor cores take of it, of a warp's 8 channels.
        tensor = self.tensor and entries > 1 and lanes == 4 and widest == 8 and c.d_inner % 8 == 0
        constants = {
            "RANK": c.rank,
            "RANK_VECTOR": widest,
            "DSTATE": c.d_state,
            "VECTOR": vector,
            "LANES": lanes,
            "ENTRIES": entries,
            "TENSOR": int(tensor),
        }
        numbers = {"dim": c.d_inner, "low_row": rows["dt"], "B_row": rows["B"], "C_row": rows["C"], "z_row": c.d_inner}
        tensors = {"state": state.ssm, "A": weights["A"], "D": weights["D"], "dt_bias": weights["dt_bias"]}
        tensors |= {"dt_weight": weights["dt_proj"], "low": given["dt"], "B": given["B"], "C": given["C"]}
        tensors |= {"u": b["u"], "z": b["z"], "y": b["y"], "ahead": after}
        if self.workspace is not None and weights["in_proj.bias"] is None:
            tensors["z"], numbers["z_row"] = b["xz"].reshape(-1)[c.d_inner :], 2 * c.d_inner
        self._add("selective_step.cu", "selective_step", constants, blocks, numbers, tensors, after)

    def _entries(self, lanes):
        """Sequences whose states a thread has, and blocks."""
        few, many = LEAST_TOGETHER
        for entries in (min(4, lanes), 1):
            blocks = -(-(-(-self.batch // entries) * self.config.d_inner * lanes) // THREADS)
            if self.batch >= many or (self.batch >= few and blocks >= 2 * self.multiprocessors):
                break
        return entries, blocks

    # ------------------------------------------------------------------------------------------------ a launch
    def _add(self, file, name, constants, blocks, numbers, given, ahead=None, threads=THREADS):
        """Append a launch; `blocks` do its work, and on a device that they do not fill, others fetch what `ahead` holds."""
        constants = {"ELEMENT": kernels.C_TYPES[self.dtype.name], "OVERLAP": self.overlap} | constants
        idle = self.multiprocessors - blocks if ahead is not None else 0
        fetched = min(ahead.nbytes, AHEAD_BYTES) if idle > 0 else 0
        numbers = {"batch": self.batch, "blocks": blocks, "ahead_blocks": max(idle, 0), "ahead_bytes": fetched} | numbers
        pointers, names = _parameters(file)
        numbers = {number: numbers.get(number, 0) for number in names if number != "first_block"}
        kernel = kernels.get(file, name, constants)
        overlap = {"overlap": True} if self.overlap else {}
        launch = kernel.prepare(blocks + max(idle, 0), threads, numbers, **overlap)
        self.launches.append(functools.partial(launch, {pointer: given.get(pointer) for pointer in pointers}))


@functools.cache
def _parameters(file):
    return kernels.parameter_names(kernels.read_source(file))


def _widest(most, *tensors):
    """Elements moved at once: at most `most`, dividing all row lengths and the places where arrays begin."""
    starts = (x if isinstance(x, int) else kernels.address(x) // x.itemsize for x in tensors)
    return math.gcd(most, *starts)


def _bits(x):
    """A double as the integer of its bits."""
    return struct.unpack("q", struct.pack("d", x))[0]
