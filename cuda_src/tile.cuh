// tile.cuh: how a block of the scan kernels lays out its work. Both directions of the scan agree on this file.
//
// A block owns BLOCK_CHANNELS channels of one batch entry and holds TILE steps of them at a time, in shared memory, as rows of
// BLOCK_CHANNELS columns. Rows are in the order in which time is walked (`reverse` turns them here and nowhere else).
// Two kinds of work meet in such a tile:
//   element by element   in the memory order of u: an item is VECTOR neighbouring elements, of which an instruction moves ACCESS:
//                        all, or fewer where they do not lie aligned, if not by aligned packs that STRADDLE two items;
//   step by step         LANES neighbouring lanes hold the states of CHANNELS channels, SLOTS states of each in every lane.
//
// Compile-time: COMPLEX REVERSE TIME_CONTIGUOUS VECTOR ACCESS LANES SLOTS CHANNELS TILE THREADS, the element types U_T B_T C_T, and for
// B and C: VARIES, TIME_FAST, DENSE (neighbours in time lie side by side), and VECTOR, the neighbours moved at once. OUT_ACCESS is ACCESS
// for tensors that the call allocates. A kernel defines COEFFICIENT_PADDING.
#pragma once
#include "common.cuh"

typedef U_T element;
typedef decltype(to_real(element())) real;
// Of what type softplus takes a step to be. States that turn make too much of an error of it for less than it can do.
#if COMPLEX
typedef Complex<real> state_t;
typedef real step_t;
#else
typedef real state_t;
typedef element step_t;
#endif

constexpr int CHUNK = 64;                                              // steps between the states kept for backward
constexpr int GROUPS = THREADS / LANES;                                // lane groups in a block
constexpr int BLOCK_CHANNELS = GROUPS * CHANNELS;
constexpr int STATES = LANES * SLOTS;                                  // padded: states past `state` have A = B = C = 0
constexpr int ALL_ITEMS = BLOCK_CHANNELS * TILE / VECTOR;
static_assert((TIME_CONTIGUOUS ? TILE : BLOCK_CHANNELS) % VECTOR == 0, "an item lies in one row of the tile");
constexpr int ITEMS = (ALL_ITEMS + THREADS - 1) / THREADS;             // per thread
constexpr int ROW_ITEMS = (TIME_CONTIGUOUS ? TILE : BLOCK_CHANNELS) / VECTOR;                 // that lie side by side in memory
constexpr int ITEM_ROWS = THREADS / ROW_ITEMS;                         // between two items of a thread
// Where channels lie side by side, the items of neighbouring threads are of rows of a tile that lie 8 apart, for the sake of `column`.
constexpr int EIGHTS = !TIME_CONTIGUOUS && TILE % 8 == 0 && ITEM_ROWS % (TILE / 8) == 0 ? TILE / 8 : 1;
constexpr int ITEM_STEP = TIME_CONTIGUOUS ? ITEM_ROWS : ITEM_ROWS / EIGHTS * (REVERSE ? -1 : 1);           // in channels or steps

// Number of a thread among those that share its work: a kernel may have several teams of THREADS.
DEVICE int worker() { return threadIdx.x % THREADS; }

// ---------------------------------------------------------------------------------------------- items
struct Item {
    int c, t;                                                          // channel and step of its first element in the tile
    int valid;                                                         // how many of its elements exist

    // Item k of this thread, in a tile of which `channels` channels and `steps` steps exist.
    DEVICE Item(int k, int channels, int steps) {
        int index = worker() + k * THREADS;
#if TIME_CONTIGUOUS
        c = index / (TILE / VECTOR);
        t = index % (TILE / VECTOR) * VECTOR;
#else
        const int number = index / (BLOCK_CHANNELS / VECTOR);
        const int row = EIGHTS == 1 ? number : number / TILE * TILE + number % EIGHTS * 8 + number / EIGHTS % 8;
        t = REVERSE ? TILE - 1 - row : row;
        c = index % (BLOCK_CHANNELS / VECTOR) * VECTOR;
#endif
        limit(channels, steps);
        if (ALL_ITEMS % THREADS != 0 && index >= ALL_ITEMS) valid = 0;
    }
    DEVICE void limit(int channels, int steps) {
        valid = TIME_CONTIGUOUS ? (c < channels ? steps - t : 0) : ((unsigned)t < (unsigned)steps ? channels - c : 0);
    }
    DEVICE bool in_tile(int k) const { return ALL_ITEMS % THREADS == 0 || worker() + k * THREADS < ALL_ITEMS; }

    DEVICE bool has(int j) const { return ACCESS == VECTOR ? valid > 0 : j < valid; }         // its element j exists
    DEVICE int channel(int j) const { return TIME_CONTIGUOUS ? c : c + j; }                   // of its element j
    DEVICE int row(int j) const { int s = TIME_CONTIGUOUS ? t + j : t; return REVERSE ? TILE - 1 - s : s; }
    DEVICE int first_row() const { return TIME_CONTIGUOUS && REVERSE ? TILE - VECTOR - t : row(0); }

    // Where it lies relative to the block's first channel, in the tile that begins at t0; `stride` steps the slow axis.
    DEVICE long long offset(long long stride, long long t0) const;
};

// Where a channel's step lies; `stride` steps the slow axis.
DEVICE long long offset_of(long long t, long long c, long long stride) { return TIME_CONTIGUOUS ? c * stride + t : t * stride + c; }
DEVICE long long Item::offset(long long stride, long long t0) const { return offset_of(t0 + t, (unsigned)c, stride); }

// Column of channel c in row t of a shared tile with entries of BYTES bytes, of which an item's are moved AT_ONCE bytes at a time. The
// items of neighbouring threads differ in t or c so that all would be in the same few banks; the XOR spreads them over all. It
// permutes a row, so readers and writers only have to agree. All rows of one item share its permutation, and all of an eighth.
template <int BYTES, int AT_ONCE = BYTES>
DEVICE unsigned column(unsigned c, unsigned t) {
    constexpr int SIZE = BYTES < 16 ? BYTES : 16, PER_LINE = 128 / SIZE;                      // entries in all 32 banks
#if TIME_CONTIGUOUS
    constexpr int ROWS = TILE / VECTOR;                                // items that share a channel
    constexpr int SPREAD = ROWS < PER_LINE ? PER_LINE / ROWS : 1;
    return c ^ (((t / VECTOR) % PER_LINE * SPREAD) & (BLOCK_CHANNELS - 1));
#else
    constexpr int ACCESSES = VECTOR * BYTES / AT_ONCE;                 // of an item: it is one of them that lines differ by
    constexpr int LINES = BLOCK_CHANNELS % PER_LINE == 0 ? BLOCK_CHANNELS / PER_LINE : 0;      // of a row
    const unsigned line = LINES > 0 ? c / PER_LINE + t / 8 * LINES : (c + t / 8 * BLOCK_CHANNELS) / PER_LINE;
    return c ^ (line % ACCESSES * (VECTOR / ACCESSES));
#endif
}

// The row by which `column` finds an entry of row j, counted from a multiple of 8 or VECTOR: the first of those that share their
// columns, known sooner than j.
DEVICE constexpr int row_of_column(int j) { return TIME_CONTIGUOUS ? j / VECTOR * VECTOR : j / 8 * 8; }

// Column of element j of an item whose first is in column `first`.
DEVICE unsigned next_column(unsigned first, int j) { return TIME_CONTIGUOUS ? first : first ^ j; }

// ---------------------------------------------------------------------------------------------- B and C
// A tile of B or C as states: rows of COEFFICIENT_PITCH, of which COEFFICIENT_PADDING bytes, chosen by the kernel, are padding
// against bank conflicts. 16 of them let a lane read 16 bytes at once; with 8 it reads 8, which takes less time where several lanes
// read the same: one cycle or two instead of four. It is loaded by
// `coefficient_loads<V>()` accesses of each thread to V neighbours in memory: steps where TIME_FAST, states else.
constexpr int REALS = sizeof(state_t) / sizeof(real);
constexpr int COEFFICIENT_PITCH = STATES + (int)(sizeof(state_t) * STATES >= 16 ? COEFFICIENT_PADDING / sizeof(state_t) : 0);

template <int V> DEVICE constexpr int coefficient_items() { return TILE * STATES / V; }
template <int V> DEVICE constexpr int coefficient_loads() { return (coefficient_items<V>() + THREADS - 1) / THREADS; }

// The stride of time, which the compiler had better know where accesses are many. (Tried: where not, it lets registers spill for it.)
template <bool DENSE, int V> DEVICE long long time_stride(long long given) {
    return DENSE && (V == 1 || !TIME_CONTIGUOUS) ? REALS : given;
}

template <typename T>
struct Coefficient {                                                   // B or C, for one batch entry and group
    const T* base;
    long long state_stride, time_stride, imag;                         // imag: distance from real to imaginary part
};

template <bool TIME_FAST, int V>
struct CoefficientItem {                                               // access k of a thread
    int t, n;                                                          // step and state of its first entry
    bool in_tile;

    // Whether all accesses of a thread are to the same state, BETWEEN steps apart.
    static constexpr bool ONE_STATE = TIME_FAST && V == 1 && THREADS % ((TILE < 8 ? TILE : 8) * STATES) == 0;
    static constexpr int BETWEEN = ONE_STATE ? THREADS / STATES : 0;

    CoefficientItem() = default;
    // `turn` lets B and C begin with different threads where there is not enough work for all of them.
    DEVICE CoefficientItem(int k, int turn) {
        const int index = (worker() + turn) % THREADS + k * THREADS;
        in_tile = coefficient_items<V>() % THREADS == 0 || index < coefficient_items<V>();
        if (!TIME_FAST) {
            t = index / (STATES / V);
            n = index % (STATES / V) * V;
        } else if (V > 1) {                                            // a half-warp's stores to a row touch every bank once
            constexpr int N = STATES < 16 ? STATES : 16;
            n = index % N + index / (N * TILE / V) * N;
            t = index / N % (TILE / V) * V;
        } else {                                                       // patches of 8 steps x 4 states, with the pitch likewise
            constexpr int N = STATES < 4 ? STATES : 4, T = TILE < 8 ? TILE : 8;
            t = index % T + index / (T * STATES) * T;
            n = index / T % N + index / (T * N) % (STATES / N) * N;
        }
    }
};

template <bool TIME_FAST, int V, typename T>
DEVICE Pack<T, V * REALS> load_coefficient(
    const CoefficientItem<TIME_FAST, V>& item, const T* from, long long imag, int steps, int states) {
    const bool exists = item.in_tile && item.t < steps && item.n < states;                    // all of it: V divides what there is
    if (V > 1) return load_whole<T, V * REALS>(from, exists);
    Pack<T, V * REALS> raw = {};
    if (exists) {
        raw.set(0, from[0]);
        if (COMPLEX) raw.set(REALS - 1, from[imag]);
    }
    return raw;
}

// All of the tile that begins at t0: a line for each that its rows have, and one more where they need not begin with one.
template <bool TIME_FAST, int V, typename T>
DEVICE void prefetch_coefficients(const Coefficient<T>& x, long long t0, long long length, int states) {
    constexpr int LINE = 128 / (int)(sizeof(T) * REALS), ROW = TIME_FAST ? TILE : STATES, ROWS = TIME_FAST ? STATES : TILE;
    constexpr int LINES = (ROW + LINE - 1) / LINE + (V * REALS * sizeof(T) < 16);
#pragma unroll 1
    for (int i = threadIdx.x; i < ROWS * LINES; i += THREADS) {
        const int row = i / LINES, at = min(i % LINES * LINE, ROW - 1), t = TIME_FAST ? at : row, n = TIME_FAST ? row : at;
        if (t0 + t < length && n < states) prefetch(x.base + n * x.state_stride + (t0 + t) * x.time_stride);
    }
}

template <bool TIME_FAST, int V, typename T>
DEVICE Pack<T, V * REALS> load_coefficient(int k, int turn, const Coefficient<T>& x, long long t0, int steps, int states) {
    const CoefficientItem<TIME_FAST, V> item(k, turn);
    return load_coefficient(item, x.base + item.n * x.state_stride + (t0 + item.t) * x.time_stride, x.imag, steps, states);
}

template <bool TIME_FAST, int V, typename T>
DEVICE void stage_coefficient(const CoefficientItem<TIME_FAST, V>& item, state_t* tile, const Pack<T, V * REALS>& raw) {
    if (!item.in_tile) return;
#pragma unroll
    for (int j = 0; j < V; ++j) {
        const int t = TIME_FAST ? item.t + j : item.t, n = TIME_FAST ? item.n : item.n + j;
#if COMPLEX
        state_t value = {to_real(raw.get(2 * j)), to_real(raw.get(2 * j + 1))};
#else
        state_t value = to_real(raw.get(j));
#endif
        tile[(REVERSE ? TILE - 1 - t : t) * COEFFICIENT_PITCH + n] = value;
    }
}

template <bool TIME_FAST, int V, typename T>
DEVICE void stage_coefficient(int k, int turn, state_t* tile, const Pack<T, V * REALS>& raw) {
    stage_coefficient<TIME_FAST, V, T>(CoefficientItem<TIME_FAST, V>(k, turn), tile, raw);
}

// ---------------------------------------------------------------------------------------------- channels of a block
struct Block {
    long long b, split, within;                                        // batch entry; part of time; number among the entry's blocks
    long long c0;                                                      // first channel
    int channels;                                                      // how many of BLOCK_CHANNELS exist

    // A span is a run of channels that share their groups of B and of C; no block crosses its border.
    DEVICE Block(long long index, long long splits, long long span, long long blocks_per_span, long long blocks_per_batch) {
        within = index % blocks_per_batch;
        split = index / blocks_per_batch % splits;
        b = index / blocks_per_batch / splits;
        c0 = within / blocks_per_span * span + within % blocks_per_span * BLOCK_CHANNELS;
        long long left = (within / blocks_per_span + 1) * span - c0;
        channels = left < BLOCK_CHANNELS ? (int)left : BLOCK_CHANNELS;
    }
};

// ---------------------------------------------------------------------------------------------- parts of time
// Where a channel's own work is too little for the GPU, time is cut into `splits` parts of whole chunks, each for a block of
// its own. A first launch (CARRIES_ONLY) finds what each part hands on when nothing enters it; combine_carries.cu chains that,
// or the blocks of the forward kernel do themselves, where parts are few. One launch may do all of it (RELAY).
struct Split {
    long long begin, end;                                              // steps, as they lie in memory

    DEVICE Split(long long split, long long splits, long long length) {
        const long long chunks = (length + CHUNK - 1) / CHUNK, share = (chunks + splits - 1) / splits;
        const long long first = min(split * share, chunks), last = min(first + share, chunks);           // as they are walked
        begin = (REVERSE ? chunks - last : first) * CHUNK;
        end = min((REVERSE ? chunks - first : last) * CHUNK, length);
    }
};

// That launch gathers what a part hands on from the end at which it leaves, and only as far as the states of a block remember:
// where what is left of a step after all that lie between would be below 2^FORGOTTEN of itself, nothing further is looked at. Where
// steps may be negative (no softplus) or a state grows, a decay over many steps may overflow though that of each step does not:
// such parts are walked in order, by the recurrence itself.
constexpr real FORGOTTEN = sizeof(real) == 4 ? -150 : -1100;           // log2 of less than the smallest number

template <int COUNT>
struct Memory {                                                        // of a lane's states, of COUNT channels
    real total[COUNT] = {}, lost[COUNT] = {};                          // Σ Δ of the steps gathered
    real slowest[COUNT];                                               // Re A·log2(e) of the state that forgets least
    bool has_states[COUNT] = {};

    DEVICE void add_state(int k, real rate) {
        slowest[k] = !has_states[k] || rate > slowest[k] ? rate : slowest[k];
        has_states[k] = true;
    }
    DEVICE void pass(int k, real dt) { add_exactly(total[k], lost[k], dt); }
    DEVICE bool grows() const {
        bool any = false;
#pragma unroll
        for (int k = 0; k < COUNT; ++k) any = any || (has_states[k] && slowest[k] > 0);
        return any;
    }
    DEVICE bool is_exhausted() const {                                 // provided that no step is negative
        bool exhausted = true;
#pragma unroll
        for (int k = 0; k < COUNT; ++k) exhausted = exhausted && (!has_states[k] || slowest[k] * total[k] < FORGOTTEN);
        return exhausted;
    }
};

// RELAY: each block leaves what its part hands on when nothing enters it, thread by thread, for the same threads of the blocks of
// the same channels that follow it in the walk. These wait for all before them, and chain it. Blocks are numbered in the order of the
// walk.
struct alignas(2 * sizeof(state_t)) Handed { state_t local, half; };    // half: of the decay over the part (handed_on)

template <int K, int S, typename Rate>
DEVICE void leave(Handed* of_block, const state_t (&local)[K][S], const real (&total)[K], const Rate (&rate)[K][S]) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
#pragma unroll
        for (int i = 0; i < S; ++i) of_block[(k * S + i) * THREADS + worker()] = {local[k][i], decay(total[k] * real(0.5), rate[k][i])};
    }
}

// `from` is the first of `count` blocks that lie `step` apart.
template <bool BACKWARD, int K, int S>
DEVICE void chain(state_t (&enters)[K][S], const Handed* from, long long step, int count) {
    constexpr int ALL = K * S * REALS, AHEAD = ALL < 4 ? 8 : ALL < 32 ? 32 / ALL : 1;         // blocks that are read at once
    from += worker();
    for (; count > 0; count -= AHEAD) {
        Handed read[AHEAD][K][S];
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) {
#pragma unroll
            for (int k = 0; k < K; ++k) {
#pragma unroll
                for (int i = 0; i < S; ++i) {
                    read[j][k][i] = {{}, {1}};                         // which changes nothing
                    if (j < count) read[j][k][i] = from[(k * S + i) * THREADS];
                }
            }
            from += step;
        }
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) {
#pragma unroll
            for (int k = 0; k < K; ++k) {
#pragma unroll
                for (int i = 0; i < S; ++i) {
                    const state_t half = read[j][k][i].half;
                    enters[k][i] = handed_on(enters[k][i], BACKWARD ? conj(half) : half, read[j][k][i].local);
                }
            }
        }
    }
}
