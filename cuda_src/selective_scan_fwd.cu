// selective_scan_fwd.cu: the selective scan, forward.
//
//   h_t = exp(Δ_t·A)·h_{t-1} + Δ_t·B_t·u_t        (zero-order hold: Δ_t·phi(Δ_t·A)·B_t·u_t)
//   y_t = (Σ_n C_t·h_t + D·u_t)·silu(z_t)         Δ = softplus(delta + delta_bias) or delta + delta_bias
//
// Idea: time is walked in order, and the states live in registers. A channel belongs to LANES neighbouring lanes with SLOTS
// states each, so a state costs one exponential and four multiply-adds a step and no scan across threads. The channels of a
// block share every B and C they read.
//
// A block walks all of time in tiles of TILE steps (layout: tile.cuh). One half of its warps does what is done element by
// element, the other half the recurrence, a tile apart, so that each hides the latencies of the other:
//   elements      prepare: make (Δ, Δ·u), B and C of a tile in shared memory, and start the loads of the next;
//   recurrence    advance the states through the tile, and leave parts of Σ_n C·h where (Δ, Δ·u) stood;
//   elements      finish: sum the parts in fixed order, add D·u, gate, store.
//
// Few channels and long sequences: time is cut into parts, and a first launch with CARRIES_ONLY runs the recurrence alone
// (tile.cuh). Where parts are few, each then finds by itself what enters it, from what all before it hand on (CHAINS); where they
// are many, combine_carries.cu has found it. Where all of a part fits into shared memory, one launch does it (RELAY): a block
// prepares its part once, leaves for later parts what it hands on, and waits for what earlier ones do.
//
// Compile-time, besides tile.cuh's: CARRIES_ONLY CHAINS RELAY BUFFERS (tiles in shared memory) ZOH SOFTPLUS GATED (is there a z?)
// SLICED (the states are, over launches) SHARED_BYTES BLOCKS_PER_SM. All are set by mambacupy/ops/, with the reasons.
#define COEFFICIENT_PADDING 16
#define OVERLAP 1
#include "tile.cuh"

struct alignas(2 * sizeof(real)) Pair { real at[2]; };                 // of one element: Δ and Δ·u, later parts of Σ_n C·h
constexpr int PARTS = LANES < 4 ? LANES : 4, PAIRS = CARRIES_ONLY ? 1 : (PARTS + 1) / 2;      // left to `finish`
constexpr int B_LOADS = coefficient_loads<B_VECTOR>(), C_LOADS = coefficient_loads<C_VECTOR>(), C_TURN = THREADS / 2;
constexpr bool COEFFICIENTS_AHEAD = B_LOADS <= 8 && C_LOADS <= 8;      // few enough to wait in registers
constexpr bool ENOUGH_REGISTERS = 2 * THREADS * BLOCKS_PER_SM <= 512;  // 128 for a thread
constexpr bool C_STAGED = C_VARIES && !CARRIES_ONLY;
constexpr int UNROLL = TILE < 8 ? TILE : 8;

struct Params {
    const element *u, *delta, *z;
    element* y;
    const state_t* A;
    const B_T* B;
    const C_T* C;
    const real *D, *delta_bias;
    const state_t* initial_state;
    state_t *last_state, *states;
    const real* parts_in;                                              // Σ_n C·h over earlier slices of the states
    real* parts_out;                                                   // not null: more slices follow
    state_t* carries;                                                  // (batch, splits, dim, state): what enters each split,
    real* totals;                                                      // (batch, splits, dim): Σ Δ; both written by CARRIES_ONLY
    Handed* handed;                                                    // (batch, splits, blocks_per_batch): RELAY's,
    unsigned* published;                                               // and its flags, 0 at first
    long long dim, length, state, state_total, span, blocks_per_span, blocks_per_batch, groups_of_B, groups_of_C, splits;
    long long u_batch, u_row, delta_batch, delta_row, z_batch, z_row, y_batch, y_row;         // row: stride of the slow axis
    long long A_dim, A_state, D_dim, bias_dim, init_batch, init_dim, init_state;
    long long B_batch, B_group, B_state, B_time, B_imag, C_batch, C_group, C_state, C_time, C_imag;
    long long first_block;
};

struct Buffer {                                                        // of one tile
    Pair pairs[PAIRS][TILE * BLOCK_CHANNELS];
    alignas(16) state_t B[B_VARIES ? TILE * COEFFICIENT_PITCH : 1];
    alignas(16) state_t C[C_STAGED ? TILE * COEFFICIENT_PITCH : 1];
};
struct Shared {
    Buffer buffers[BUFFERS];
    alignas(16) real skip[BLOCK_CHANNELS];                             // D
    alignas(16) real bias[BLOCK_CHANNELS];                             // delta_bias
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "SHARED_BYTES is computed in ops/mapping.py");

// Lanes of a channel lie NEIGHBOURS apart. Shared memory takes two passes for a read of 16 bytes where each lane has a neighbour,
// one or two lanes away, that reads the same, and four else. Lanes that hold the same states of other channels read the same of B
// and C: with four lanes a channel or more, they are the neighbours. (Δ, Δ·u) takes one pass instead of two for the same reason.
constexpr int NEIGHBOURS = LANES >= 4 && LANES <= 16 && GROUPS > 1 ? 2 : 1;

// State i of a lane. Neighbouring lanes hold neighbouring 16 bytes, so that they read B and C without conflicts.
constexpr int SIDE_BY_SIDE = 16 / sizeof(state_t) < SLOTS ? 16 / sizeof(state_t) : SLOTS;
constexpr int PITCH = COEFFICIENT_PITCH / SIDE_BY_SIDE;                // of B and C, in entries of a Side
struct alignas(SIDE_BY_SIDE * sizeof(state_t)) Side { state_t at[SIDE_BY_SIDE]; };
DEVICE int state_of(int lane, int i) { return (i / SIDE_BY_SIDE * LANES + lane) * SIDE_BY_SIDE + i % SIDE_BY_SIDE; }

// Where eight channels lie side by side, pairs are moved two at a time, and 16 bytes of D and delta_bias likewise: the items of
// neighbouring threads lie so far apart that shared memory would take as long for half of it. (With four, registers would spill.)
constexpr int TOGETHER = !TIME_CONTIGUOUS && VECTOR == 8 ? 2 : 1;
struct alignas(TOGETHER * sizeof(Pair)) Pairs { Pair at[TOGETHER]; };
DEVICE unsigned column_of_pair(unsigned c, unsigned t) { return column<sizeof(Pair), sizeof(Pairs)>(c, t); }
// Where the pairs of an item lie.
DEVICE int first_pair(const Item& item) { return item.row(0) * BLOCK_CHANNELS + (int)column_of_pair(item.c, item.first_row()); }
DEVICE int next_pair(int first, int j) { return TIME_CONTIGUOUS ? first + (REVERSE ? -j : j) * BLOCK_CHANNELS : first ^ j; }
DEVICE Pairs& pairs_at(const Pair* pairs, int at) { return *const_cast<Pairs*>(reinterpret_cast<const Pairs*>(pairs + at)); }
DEVICE void of_channels(const real* constants, const Item& item, real (&each)[VECTOR]) {
    constexpr int N = TOGETHER == 1 ? 1 : 16 / sizeof(real);
    struct alignas(N * sizeof(real)) Reals { real at[N]; };
    Reals some = reinterpret_cast<const Reals*>(constants + item.c % BLOCK_CHANNELS)[0];
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) {
        if (!TIME_CONTIGUOUS && j > 0 && j % N == 0) some = reinterpret_cast<const Reals*>(constants + item.c % BLOCK_CHANNELS)[j / N];
        each[j] = some.at[j % N];
    }
}
static_assert(ITEM_ROWS > 0, "items of a thread lie below each other");
// Rows that do not begin at a multiple of 16 bytes are read and written by aligned packs all the same, each of which holds the end
// of one item and the beginning of the next. Of 16 bits alone: float32 has four accesses where these have eight, and no registers.
// Nor has a team of five warps: it gets as many as one of six.
constexpr bool STRADDLES = TIME_CONTIGUOUS && 4 * ACCESS <= VECTOR && sizeof(element) == 2 && ROW_ITEMS <= 32 && THREADS != 160 &&
                           ITEM_ROWS % VECTOR == 0 && (ALL_ITEMS % THREADS == 0 || ALL_ITEMS % 32 == 0);
constexpr bool STORES_STRADDLE = STRADDLES && OUT_ACCESS < VECTOR;
// Whether what is needed first is read first: without too many registers, and where the recurrence does not take by far the longest.
constexpr bool FINISHED_FIRST = ITEMS <= 2 && CHANNELS == 1 && !STRADDLES;
// Many items of several accesses, or channels of several lanes: a branch between items keeps the compiler from finishing all at once,
// and registers from spilling.
constexpr bool ASKS_FOR_PARTS = SLICED || (!TIME_CONTIGUOUS && LANES > 2 && THREADS <= 256) ||
                                (ITEMS > 2 && ACCESS < VECTOR && (!TIME_CONTIGUOUS || SLOTS == 1));
constexpr bool PART_OF_A_LINE = TIME_CONTIGUOUS && TILE * sizeof(element) < 128;              // is a row of a tile in memory

// The accesses of a thread to B or C: found once where there are few, or the first says where all are, so that the compiler does
// not find them anew in every tile.
template <bool TIME_FAST, int V, int LOADS>
struct Kept {
    typedef CoefficientItem<TIME_FAST, V> Access;
    static constexpr int FOUND = !ENOUGH_REGISTERS ? 0 : Access::ONE_STATE ? 1 : LOADS <= 2 && ITEMS <= 2 ? LOADS : 0;
    int turn;
    Access items[FOUND ? FOUND : 1];
    long long offsets[FOUND ? FOUND : 1];

    template <typename T> DEVICE Kept(int turn, const Coefficient<T>& x) : turn(turn) {
#pragma unroll
        for (int k = 0; k < FOUND; ++k) {
            items[k] = Access(k, turn);
            offsets[k] = recomputed(items[k].n * x.state_stride + items[k].t * x.time_stride);
            items[k].t = recomputed(items[k].t);
            items[k].n = recomputed(items[k].n);
        }
    }
    DEVICE Access item(int k) const {
        if (!FOUND) return Access(k, turn);
        Access found = items[k < FOUND ? k : 0];
        found.t += k * Access::BETWEEN;
        return found;
    }
    template <typename T> DEVICE long long offset(int k, const Coefficient<T>& x) const {
        if (!FOUND) return item(k).n * x.state_stride + item(k).t * x.time_stride;
        return offsets[k < FOUND ? k : 0] + k * Access::BETWEEN * x.time_stride;
    }
};

// UNROLL steps of a tile, as the recurrence finds them. The compiler would make an address of its own for every step; of what it
// cannot see through, it makes one, and puts the rest into the instructions that read.
constexpr int SHARED_COLUMN = !TIME_CONTIGUOUS || VECTOR > UNROLL ? UNROLL : VECTOR;          // steps with the same columns
struct Round {
    int sides, pairs[CHANNELS][UNROLL / SHARED_COLUMN];

    DEVICE Round(int t, int lane, int group) : sides(recomputed(t * PITCH + lane)) {
#pragma unroll
        for (int k = 0; k < CHANNELS; ++k) {
#pragma unroll
            for (int j = 0; j < UNROLL; j += SHARED_COLUMN) {
                const unsigned c = column_of_pair(k * GROUPS + group, t + row_of_column(j));
                pairs[k][j / SHARED_COLUMN] = recomputed(t * BLOCK_CHANNELS + (int)c);
            }
        }
    }
    DEVICE int pair(int j, int k) const { return pairs[k][j / SHARED_COLUMN] + j * BLOCK_CHANNELS; }
};

struct Inputs {                                                        // of one step: what a lane reads from shared memory
    Pair step[CHANNELS];
    Side B[SLOTS / SIDE_BY_SIDE], C[SLOTS / SIDE_BY_SIDE];

    DEVICE Inputs(const Buffer& buffer, const Round& round, int j) {
#pragma unroll
        for (int k = 0; k < CHANNELS; ++k) step[k] = buffer.pairs[0][round.pair(j, k)];
#pragma unroll
        for (int i = 0; i < SLOTS / SIDE_BY_SIDE; ++i) {
            if (B_VARIES) B[i] = reinterpret_cast<const Side*>(buffer.B)[round.sides + j * PITCH + i * LANES];
            if (C_STAGED) C[i] = reinterpret_cast<const Side*>(buffer.C)[round.sides + j * PITCH + i * LANES];
        }
    }
    DEVICE state_t B_of(int i) const { return B[i / SIDE_BY_SIDE].at[i % SIDE_BY_SIDE]; }
    DEVICE state_t C_of(int i) const { return C[i / SIDE_BY_SIDE].at[i % SIDE_BY_SIDE]; }
};

extern "C" __global__ void __launch_bounds__(2 * THREADS, BLOCKS_PER_SM) selective_scan_fwd(const Params p) {
    extern __shared__ __align__(16) char shared_bytes[];
    Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);

    const Block block(p.first_block + blockIdx.x, p.splits, p.span, p.blocks_per_span, p.blocks_per_batch);
    const Split time(block.split, p.splits, p.length);
    if (CARRIES_ONLY && CHAINS && block.split == p.splits - 1) return; // nobody asks what the last part hands on
    const long long b = block.b, c0 = block.c0;
    const int channels = block.channels;
    Coefficient<B_T> B = {p.B, p.B_state, time_stride<B_DENSE, B_VECTOR>(p.B_time), p.B_imag};
    Coefficient<C_T> C = {p.C, p.C_state, time_stride<C_DENSE, C_VECTOR>(p.C_time), p.C_imag};
    if (B_VARIES) B.base += b * p.B_batch + c0 / (p.dim / p.groups_of_B) * p.B_group;
    if (C_VARIES) C.base += b * p.C_batch + c0 / (p.dim / p.groups_of_C) * p.C_group;

    const bool does_elements = threadIdx.x >= THREADS;                 // the other half does the recurrence

    // ------------------------------------------------------------------------------------------ what a lane keeps
    const int lane = worker() / NEIGHBOURS % LANES, group = worker() / (NEIGHBOURS * LANES) * NEIGHBOURS + worker() % NEIGHBOURS;
    decltype(kept_rate(state_t())) rate[CHANNELS][SLOTS];
    state_t h[CHANNELS][SLOTS], B_kept[CHANNELS][SLOTS], C_kept[CHANNELS][SLOTS];
    Memory<CHANNELS> memory;
#if ZOH
    state_t A_kept[CHANNELS][SLOTS];
#endif
#pragma unroll
    for (int k = 0; k < CHANNELS; ++k) {
#pragma unroll
        for (int i = 0; i < SLOTS; ++i) {
            const int n = state_of(lane, i);
            const long long c = c0 + k * GROUPS + group;
            state_t a = {}, start = {}, b_const = {}, c_const = {};
            if (!does_elements && k * GROUPS + group < channels && n < p.state) {
                a = bounded(p.A[c * p.A_dim + n * p.A_state]);
                memory.add_state(k, real_part(rate_of(a)));
                if (CARRIES_ONLY) start = {};
                else if (p.splits > 1 && !CHAINS) start = p.carries[((b * p.splits + block.split) * p.dim + c) * p.state_total + n];
                else if (p.initial_state) start = p.initial_state[b * p.init_batch + c * p.init_dim + n * p.init_state];
                if (!B_VARIES) b_const = reinterpret_cast<const state_t*>(p.B)[c * p.B_group + n * p.B_state];
                if (!C_VARIES && !CARRIES_ONLY) c_const = reinterpret_cast<const state_t*>(p.C)[c * p.C_group + n * p.C_state];
            }
            h[k][i] = start;
            rate[k][i] = kept_rate(a);
            B_kept[k][i] = b_const;
            C_kept[k][i] = c_const;
#if ZOH
            A_kept[k][i] = a;
#endif
        }
    }
    // Few parts of time: what enters this one is chained here, from what those before it hand on.
    auto chain_parts = [&] {
        constexpr int AHEAD = CHANNELS * SLOTS * REALS <= 4 ? 8 : 4;         // parts that are read at once
        for (long long first = 0; first < block.split; first += AHEAD) {
            state_t local[AHEAD][CHANNELS][SLOTS] = {};
            real total[AHEAD][CHANNELS] = {};
#pragma unroll
            for (int j = 0; j < AHEAD; ++j) {
#pragma unroll
                for (int k = 0; k < CHANNELS; ++k) {
                    if (first + j >= block.split || k * GROUPS + group >= channels) continue;
                    const long long at = (b * p.splits + first + j) * p.dim + c0 + k * GROUPS + group;
                    total[j][k] = p.totals[at];
#pragma unroll
                    for (int i = 0; i < SLOTS; ++i)
                        if (state_of(lane, i) < p.state) local[j][k][i] = p.carries[at * p.state_total + state_of(lane, i)];
                }
            }
#pragma unroll
            for (int j = 0; j < AHEAD; ++j) {
                if (first + j >= block.split) break;
#pragma unroll
                for (int k = 0; k < CHANNELS; ++k) {
#pragma unroll
                    for (int i = 0; i < SLOTS; ++i)
                        h[k][i] = handed_on(h[k][i], decay(total[j][k] * real(0.5), rate[k][i]), local[j][k][i]);
                }
            }
        }
    };
    if (CHAINS && !CARRIES_ONLY && !RELAY && !does_elements) chain_parts();
    // A copy of the states for the backward pass or the caller: `at` points to (batch, dim, state) of this block's entry.
    auto write_states = [&](state_t* at) {
#pragma unroll
        for (int k = 0; k < CHANNELS; ++k) {
#pragma unroll
            for (int i = 0; i < SLOTS; ++i) {
                int n = state_of(lane, i);
                if (k * GROUPS + group < channels && n < p.state) at[(c0 + k * GROUPS + group) * p.state_total + n] = h[k][i];
            }
        }
    };

    // ------------------------------------------------------------------------------------------ the way
    const bool gathers = CARRIES_ONLY && __syncthreads_and(SOFTPLUS && !memory.grows());
    const bool from_end = REVERSE != gathers;
    const int ahead = from_end ? -TILE : TILE;
    const int tiles = (int)((time.end - time.begin + TILE - 1) / TILE);
    const long long t_first = from_end ? (time.end - 1) / TILE * TILE : time.begin;
    // Of all tiles only the last in memory may have fewer steps.
    const int short_tile = from_end ? 0 : tiles - 1, short_steps = (int)(time.end - time.begin - (tiles - 1LL) * TILE);
    auto steps_of = [&](int tile) { return tile == short_tile ? short_steps : TILE; };

    // ------------------------------------------------------------------------------------------ elements
    // The items of this thread, and where they lie in shared memory: found once where registers allow it (tried: a few more of
    // them kept, and some kernels spill), for the compiler would find them anew in every tile.
    constexpr bool FOUND_ONCE = ITEMS <= 4 && ENOUGH_REGISTERS && !STRADDLES && (TIME_CONTIGUOUS || ACCESS == VECTOR);
    constexpr bool FEW_ITEMS = FOUND_ONCE && ITEMS <= 2 && VECTOR > 1;
    Item first_item(0, channels, TILE);
    if (FOUND_ONCE) first_item.c = recomputed(first_item.c), first_item.t = recomputed(first_item.t);
    auto item_of = [&](int k, int tile_steps) {
        if (ITEMS > 4) return Item(k, channels, tile_steps);
        Item item = first_item;
        (TIME_CONTIGUOUS ? item.c : item.t) += k * ITEM_STEP;
        item.limit(channels, tile_steps);
        return item;
    };
    int kept_pairs[FEW_ITEMS ? ITEMS : 1];
#pragma unroll
    for (int k = 0; k < (FEW_ITEMS ? ITEMS : 0); ++k) {
        kept_pairs[k] = first_pair(item_of(k, TILE));
        if (TIME_CONTIGUOUS) kept_pairs[k] = recomputed(kept_pairs[k]);
    }
    auto pairs_of = [&](int k) { return FEW_ITEMS ? kept_pairs[FEW_ITEMS ? k : 0] : first_pair(item_of(k, TILE)); };
    auto is_whole = [&](int tile_steps) { return ALL_ITEMS % THREADS == 0 && channels == BLOCK_CHANNELS && tile_steps == TILE; };

    // Where the first item lies in a tensor of u's shape, in the tile that is loaded or finished next.
    auto first_at = [&](auto* x, long long batch, long long row) {
        return x + (b * batch + offset_of(0, c0, row) + first_item.offset(row, t_first));
    };
    auto advanced = [&](auto*& x, long long row) { x += TIME_CONTIGUOUS ? ahead : ahead * row; };
    const element *u_to_load = first_at(p.u, p.u_batch, p.u_row), *delta_to_load = first_at(p.delta, p.delta_batch, p.delta_row);
    const element* z_to_finish = first_at(p.z, p.z_batch, p.z_row);
    element* y_to_finish = first_at(p.y, p.y_batch, p.y_row);
    // Items that straddle are found by aligned packs: what is read by that at the boundary in an item, before which lie as many
    // elements in all items of a thread, and what is written by that before it. The four counts share a register.
    enum { U = 0, DELTA = 4, Z = 8, Y = 12 };
    auto at_boundary = [&](auto*& x, int place) {
        const int count = before_boundary<VECTOR>(x);
        x += count;
        return count << place;
    };
    int counts = 0;
    if (STRADDLES) {
        counts = at_boundary(u_to_load, U) | at_boundary(delta_to_load, DELTA) | at_boundary(z_to_finish, Z);
        const int y_count = OUT_ACCESS == VECTOR ? 0 : (int)((size_t)y_to_finish / sizeof(element) % VECTOR);
        y_to_finish -= y_count;
        counts = recomputed(counts | y_count << Y);
    }
    auto count_of = [&](int tensor) { return OUT_ACCESS == VECTOR && tensor == Y ? 0 : counts >> tensor & 15; };
    const element* u_to_finish = u_to_load;
    B.base += t_first * B.time_stride;
    C.base += t_first * C.time_stride;

    auto keep_constants = [&] {
        for (int c = worker(); c < BLOCK_CHANNELS; c += THREADS) {
            shared.skip[c] = p.D && c < channels ? p.D[(c0 + c) * p.D_dim] : real(0);
            shared.bias[c] = p.delta_bias && c < channels ? p.delta_bias[(c0 + c) * p.bias_dim] : real(0);
        }
    };

    // Items that are on their way: of the tile to be prepared next, and of the one to be finished next. u is read for both,
    // because two tiles of it would fill too many registers meanwhile.
    Pack<element, VECTOR> u_next[ITEMS], delta_next[ITEMS], u_done[ITEMS] = {}, z_done[ITEMS];          // u_done: 0 without D
    Pack<B_T, B_VECTOR * REALS> B_next[COEFFICIENTS_AHEAD ? B_LOADS : 1];
    Pack<C_T, C_VECTOR * REALS> C_next[COEFFICIENTS_AHEAD ? C_LOADS : 1];
    const Kept<B_TIME_FAST, B_VECTOR, B_LOADS> B_items(0, B);
    const Kept<C_TIME_FAST, C_VECTOR, C_LOADS> C_items(C_TURN, C);
    auto load_B = [&](int k, int tile_steps) {
        return load_coefficient(B_items.item(k), B.base + B_items.offset(k, B), B.imag, tile_steps, (int)p.state);
    };
    auto load_C = [&](int k, int tile_steps) {
        return load_coefficient(C_items.item(k), C.base + C_items.offset(k, C), C.imag, tile_steps, (int)p.state);
    };

    // Whether the tiles on both sides exist in this part of time, and so much of them that aligned packs may reach into them; and all
    // channels of the block.
    const int scant = short_steps < VECTOR, first_inner = 1 + (from_end ? scant : 0);
    const int end_inner = channels < BLOCK_CHANNELS || !first_item.in_tile(0) ? 0 : tiles - 1 - (from_end ? 0 : scant);
    auto is_inner = [&](int tile) { return first_inner <= tile && tile < end_inner; };

    // Items of a tensor in a tile; all of them exist in most tiles. Of those that lie across two packs the later is on its way a
    // tile ahead. The earlier was read for the item before: `complete` reads it again when it is needed.
    auto load_items = [&](Pack<element, VECTOR> (&items)[ITEMS], const element* from, int count, long long row, int tile) {
        const int tile_steps = steps_of(tile);
        if (STRADDLES ? is_inner(tile) : is_whole(tile_steps)) {
#pragma unroll
            for (int k = 0; k < ITEMS; ++k) {
                const element* const at = from + k * ITEM_STEP * row;
                if (PART_OF_A_LINE && (STRADDLES || ACCESS == VECTOR)) items[k] = load_with_line<element, VECTOR>(at);
                else items[k] = load_by<STRADDLES ? VECTOR : ACCESS, element, VECTOR>(at, VECTOR);
            }
        } else {
#pragma unroll
            for (int k = 0; k < ITEMS; ++k)
                items[k] = load_by<ACCESS, element, VECTOR>(from - count + k * ITEM_STEP * row, item_of(k, tile_steps).valid);
        }
    };

    auto complete = [&](Pack<element, VECTOR> (&items)[ITEMS], const element* next, int count, long long row, int tile) {
        if (!STRADDLES || !is_inner(tile)) return;
        Pack<element, VECTOR> earlier[ITEMS];
#pragma unroll
        for (int k = 0; k < ITEMS; ++k)
            earlier[k] = load_whole<element, VECTOR>(next - ahead - VECTOR + k * ITEM_STEP * row, true);
#pragma unroll
        for (int k = 0; k < ITEMS; ++k) items[k] = joined(earlier[k], items[k], count);
    };

    auto load = [&](int tile) {
        const int tile_steps = steps_of(tile);
        load_items(u_next, u_to_load, count_of(U), p.u_row, tile);
        load_items(delta_next, delta_to_load, count_of(DELTA), p.delta_row, tile);
        advanced(u_to_load, p.u_row);
        advanced(delta_to_load, p.delta_row);
#pragma unroll
        for (int k = 0; k < (COEFFICIENTS_AHEAD && B_VARIES ? B_LOADS : 0); ++k) B_next[k] = load_B(k, tile_steps);
#pragma unroll
        for (int k = 0; k < (COEFFICIENTS_AHEAD && C_STAGED ? C_LOADS : 0); ++k) C_next[k] = load_C(k, tile_steps);
        if (COEFFICIENTS_AHEAD) {
            B.base += ahead * B.time_stride;
            C.base += ahead * C.time_stride;
        }
    };

    auto load_to_finish = [&](int tile) {
        if (p.D) load_items(u_done, u_to_finish, count_of(U), p.u_row, tile);
        if (GATED) load_items(z_done, z_to_finish, count_of(Z), p.z_row, tile);
        advanced(u_to_finish, p.u_row);
        advanced(z_to_finish, p.z_row);
    };

    auto prepare = [&](int tile, Buffer& buffer) {
        const int tile_steps = steps_of(tile);
        complete(u_next, u_to_load, count_of(U), p.u_row, tile);
        complete(delta_next, delta_to_load, count_of(DELTA), p.delta_row, tile);
#pragma unroll(COEFFICIENTS_AHEAD ? B_LOADS : 2)
        for (int k = 0; k < (B_VARIES ? B_LOADS : 0); ++k) {
            if (!COEFFICIENTS_AHEAD) B_next[0] = load_B(k, tile_steps);
            stage_coefficient<B_TIME_FAST, B_VECTOR, B_T>(B_items.item(k), buffer.B, B_next[COEFFICIENTS_AHEAD ? k : 0]);
        }
#pragma unroll(COEFFICIENTS_AHEAD ? C_LOADS : 2)
        for (int k = 0; k < (C_STAGED ? C_LOADS : 0); ++k) {
            if (!COEFFICIENTS_AHEAD) C_next[0] = load_C(k, tile_steps);
            stage_coefficient<C_TIME_FAST, C_VECTOR, C_T>(C_items.item(k), buffer.C, C_next[COEFFICIENTS_AHEAD ? k : 0]);
        }
        if (!COEFFICIENTS_AHEAD) {
            B.base += ahead * B.time_stride;
            C.base += ahead * C.time_stride;
        }
#pragma unroll
        for (int k = 0; k < ITEMS; ++k) {
            const Item item = item_of(k, tile_steps);
            real dt[VECTOR];
            of_channels(shared.bias, item, dt);
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) dt[j] += to_real(delta_next[k].get(j));
            if (SOFTPLUS) softplus_each<step_t>(dt);
            if (!is_whole(tile_steps) && item.valid < VECTOR) {        // after softplus: a step of 0 leaves h as it is
#pragma unroll
                for (int j = 0; j < VECTOR; ++j) if (j >= item.valid) dt[j] = 0;
            }
#pragma unroll
            for (int j = 0; j < VECTOR; j += TOGETHER) {
                Pairs steps;
#pragma unroll
                for (int i = 0; i < TOGETHER; ++i) steps.at[i] = {dt[j + i], dt[j + i] * to_real(u_next[k].get(j + i))};
                if (item.in_tile(k)) pairs_at(buffer.pairs[0], next_pair(pairs_of(k), j)) = steps;
            }
        }
    };

    // Each pack is written by the lane that has, of the two items it holds parts of, the one that was walked later. `y` points to it, or
    // against time to the one before.
    Pack<element, VECTOR> latest[STORES_STRADDLE ? ITEMS : 1] = {};     // of a lane, in the tile before
    auto store_straddling = [&](int k, element* y, const Pack<element, VECTOR>& out, int valid, int tile) {
        constexpr int FIRST = REVERSE ? ROW_ITEMS - 1 : 0, LAST = ROW_ITEMS - 1 - FIRST;      // as they are walked
        const int place = worker() % ROW_ITEMS, count = count_of(Y);
        Pack<element, VECTOR> before;                                  // the item walked before this lane's
#pragma unroll
        for (int j = 0; j < (int)(sizeof(out) / 4); ++j) {
            const unsigned word = place == LAST ? latest[k].bits.word[j] : out.bits.word[j];
            before.bits.word[j] = __shfl_sync(~0u, word, (place + (REVERSE ? 1 : ROW_ITEMS - 1)) % ROW_ITEMS, ROW_ITEMS);
        }
        latest[k] = out;
        if (is_inner(tile)) {
            store_at_once(y + (REVERSE ? VECTOR : 0), REVERSE ? joined(out, before, count) : joined(before, out, count));
            return;
        }
        y += count;
        store_by<ACCESS, element, VECTOR>(y, out, valid);
        if (tile > 0 && is_inner(tile - 1) && place == FIRST && valid > 0) {                 // of the tile before: what is left
#pragma unroll
            for (int j = 0; j < VECTOR; ++j)
                if (REVERSE == (j < VECTOR - count)) y[(REVERSE ? VECTOR : -VECTOR) + j] = before.get(j);
        }
    };

    auto finish = [&](int tile, const Buffer& buffer) {
        const int tile_steps = steps_of(tile);
        if (p.D) complete(u_done, u_to_finish, count_of(U), p.u_row, tile);
        if (GATED) complete(z_done, z_to_finish, count_of(Z), p.z_row, tile);
#pragma unroll
        for (int k = 0; k < ITEMS; ++k) {
            const Item item = item_of(k, tile_steps);
            if (!item.in_tile(k)) continue;
            element* const y = y_to_finish + k * ITEM_STEP * p.y_row;
            real sum[VECTOR], skip[VECTOR];
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
#pragma unroll
                for (int i = 0; i < PARTS; i += 2) {
                    const Pair parts = pairs_at(buffer.pairs[i / 2], next_pair(pairs_of(k), j / TOGETHER * TOGETHER)).at[j % TOGETHER];
                    sum[j] = i == 0 ? parts.at[0] : sum[j] + parts.at[0];
                    if (i + 1 < PARTS) sum[j] += parts.at[1];
                }
                if (COMPLEX) sum[j] *= real(2);
            }
            if (ASKS_FOR_PARTS && p.parts_in) {                                // parts lie as y does
#pragma unroll
                for (int j = 0; j < VECTOR; ++j) if (j < item.valid) sum[j] += p.parts_in[y + count_of(Y) - p.y + j];
            }
            if (ASKS_FOR_PARTS && p.parts_out) {
#pragma unroll
                for (int j = 0; j < VECTOR; ++j) if (j < item.valid) p.parts_out[y + count_of(Y) - p.y + j] = sum[j];
                continue;
            }
            of_channels(shared.skip, item, skip);
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) sum[j] += skip[j] * to_real(u_done[k].get(j));
            if (GATED) {
#pragma unroll
                for (int j = 0; j < VECTOR; ++j) {
                    real gate = to_real(z_done[k].get(j));
                    sum[j] *= gate * sigmoid(gate);
                }
            }
            Pack<element, VECTOR> out;
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                element rounded;
                from_real(sum[j], rounded);
                out.set(j, rounded);
            }
            if (STORES_STRADDLE) store_straddling(k, y, out, item.valid, tile);
            else store_by<OUT_ACCESS, element, VECTOR>(y + count_of(Y), out, is_whole(tile_steps) ? VECTOR : item.valid);
        }
        advanced(y_to_finish, p.y_row);
    };

    // ------------------------------------------------------------------------------------------ recurrence
    const long long chunks = (p.length + CHUNK - 1) / CHUNK;
    auto advance = [&](long long t0, int tile_steps, Buffer& buffer) {
        bool chunk_begins = REVERSE ? (t0 + TILE) % CHUNK == 0 || t0 + TILE >= p.length : t0 % CHUNK == 0;
        if (p.states && chunk_begins) write_states(p.states + (b * chunks + t0 / CHUNK) * p.dim * p.state_total);
        // Rows past the end have dt = 0: whole rounds of them are left out, a rest of a round does no harm.
        const int first_row = REVERSE ? (TILE - tile_steps) / UNROLL * UNROLL : 0;
        const int end_row = REVERSE ? TILE : tile_steps;
        // Reads run a step ahead, and parts are written once a round, because a write to shared memory holds back all reads
        // that follow it.
        Round round(first_row, lane, group);
        Inputs next(buffer, round, 0);
#pragma unroll 1
        for (int t_round = first_row; t_round < end_row; t_round += UNROLL) {
            // At the end any that no lane writes to before all have read.
            const Round round_ahead(t_round + UNROLL < TILE ? t_round + UNROLL : t_round, lane, group);
            real part[UNROLL][CHANNELS];
#pragma unroll
            for (int j = 0; j < UNROLL; ++j) {
                const Inputs now = next;
                next = j + 1 < UNROLL ? Inputs(buffer, round, j + 1) : Inputs(buffer, round_ahead, 0);
#pragma unroll
                for (int k = 0; k < CHANNELS; ++k) {
                    const real dt = now.step[k].at[0], dtu = now.step[k].at[1];
                    part[j][k] = 0;
#pragma unroll
                    for (int i = 0; i < SLOTS; ++i) {
                        state_t a = decay(dt, rate[k][i]);
                        state_t input = dtu * (B_VARIES ? now.B_of(i) : B_kept[k][i]);
#if ZOH
                        input = input * phi(dt * A_kept[k][i], a);
#endif
                        h[k][i] = multiply_add(a, h[k][i], input);
                        part[j][k] = real_product(h[k][i], C_VARIES ? now.C_of(i) : C_kept[k][i], part[j][k]);
                    }
                }
            }
            __syncwarp();                                              // all lanes of a channel have read what is overwritten
#pragma unroll
            for (int j = 0; j < UNROLL; ++j) {
#pragma unroll
                for (int k = 0; k < CHANNELS; ++k) {
#pragma unroll
                    for (int step = LANES / 2; step >= 4; step /= 2)
                        part[j][k] += __shfl_xor_sync(~0u, part[j][k], step * NEIGHBOURS);
                    if (LANES <= 4 || lane < PARTS)
                        buffer.pairs[lane % PARTS / 2][round.pair(j, k)].at[lane % 2] = part[j][k];
                }
            }
            round = round_ahead;
        }
    };

    // What a part of time hands on, in one of two ways (tile.cuh): against time, gathered as Σ_t exp(A·S_t)·input_t, where S_t is
    // Σ Δ of the steps after t; or in order, by the recurrence.
    auto carry_tile = [&](const Buffer& buffer, bool gathers) {
#pragma unroll 1
        for (int t_round = 0; t_round < TILE; t_round += UNROLL) {
            const Round round(gathers ? TILE - UNROLL - t_round : t_round, lane, group);
#pragma unroll
            for (int step = 0; step < UNROLL; ++step) {
                const Inputs now(buffer, round, gathers ? UNROLL - 1 - step : step);
#pragma unroll
                for (int k = 0; k < CHANNELS; ++k) {
                    const real dt = now.step[k].at[0], dtu = now.step[k].at[1];
#pragma unroll
                    for (int i = 0; i < SLOTS; ++i) {
                        const state_t a = decay(gathers ? memory.total[k] : dt, rate[k][i]);
                        state_t input = dtu * (B_VARIES ? now.B_of(i) : B_kept[k][i]);
#if ZOH
                        input = input * phi(dt * A_kept[k][i], gathers ? decay(dt, rate[k][i]) : a);
#endif
                        h[k][i] = gathers ? multiply_add(a, input, h[k][i]) : multiply_add(a, h[k][i], input);
                    }
                    memory.pass(k, dt);
                }
            }
        }
    };

    auto hand_on = [&] {
        const long long batch_split = b * p.splits + block.split;
        write_states(p.carries + batch_split * p.dim * p.state_total);
#pragma unroll
        for (int k = 0; k < CHANNELS; ++k)
            if (lane == 0 && k * GROUPS + group < channels)
                p.totals[batch_split * p.dim + c0 + k * GROUPS + group] = memory.total[k];
    };

    // ------------------------------------------------------------------------------------------ the walk
#if CARRIES_ONLY
    // The teams walk side by side, because the recurrence decides how far.
    if (does_elements) {
        if (tiles > 0) load(0);
        keep_constants();
    }
    for (int tile = -1; tile < tiles; ++tile) {
        if (__syncthreads_and(does_elements || (gathers && memory.is_exhausted()))) break;
        if (does_elements) {
            if (tile + 1 < tiles) prepare(tile + 1, shared.buffers[(tile + 1) & 1]);
            if (tile + 2 < tiles) load(tile + 2);
        } else if (tile >= 0) {
            if (gathers) carry_tile(shared.buffers[tile & 1], true);
            else carry_tile(shared.buffers[tile & 1], false);
        }
    }
    if (!does_elements) hand_on();
#elif RELAY
    // What this part hands on is found while it is prepared. All of it then lies in shared memory, and so it is prepared once.
    // All of a block meet twice behind that: when what it hands on is left, and when what others hand on is there.
    if (does_elements) {
        if (tiles > 0) load(0);
        keep_constants();
        all_meet();
        for (int tile = 0; tile < tiles; ++tile) {
            prepare(tile, shared.buffers[tile]);
            if (tile + 1 < tiles) load(tile + 1);
            all_meet();
        }
        if (tiles > 0) load_to_finish(0);
        all_meet();
        all_meet();
        for (int tile = 0; tile < tiles; ++tile) {
            all_meet();
            finish(tile, shared.buffers[tile]);
            if (tile + 1 < tiles) load_to_finish(tile + 1);
        }
        return;
    }
    state_t first[CHANNELS][SLOTS];                                    // what enters the first part
#pragma unroll
    for (int k = 0; k < CHANNELS; ++k) {
#pragma unroll
        for (int i = 0; i < SLOTS; ++i) first[k][i] = h[k][i], h[k][i] = {};
    }
    all_meet();
    for (int tile = 0; tile < tiles; ++tile) {
        all_meet();
        if (block.split < p.splits - 1) carry_tile(shared.buffers[tile], false);
    }
    auto block_of = [&](long long split) { return (b * p.splits + split) * p.blocks_per_batch + block.within; };
    constexpr int OF_BLOCK = CHANNELS * SLOTS * THREADS;
    wait_for_previous();                                               // which made flags 0
    leave(p.handed + block_of(block.split) * OF_BLOCK, h, memory.total, rate);
    all_meet();
    if (worker() == 0) publish(p.published + block_of(block.split));
    for (long long split = worker(); split < block.split; split += THREADS) wait_until_published(p.published + block_of(split));
    all_meet();
#pragma unroll
    for (int k = 0; k < CHANNELS; ++k) {
#pragma unroll
        for (int i = 0; i < SLOTS; ++i) h[k][i] = first[k][i];
    }
    chain<false>(h, p.handed + block_of(0) * OF_BLOCK, p.blocks_per_batch * OF_BLOCK, (int)block.split);
    for (int tile = 0; tile < tiles; ++tile) {
        advance(t_first + (long long)tile * ahead, steps_of(tile), shared.buffers[tile]);
        all_meet();
    }
    if (block.split == p.splits - 1) write_states(p.last_state + b * p.dim * p.state_total);
#else
    // While the recurrence is at a tile, the other team finishes the one before and prepares the one after it, in the other buffer.
    // Each team has a loop of its own, so that registers hold what it needs and no more.
    if (does_elements) {
        if (tiles > 0) load(0);
        keep_constants();
        all_meet();
        if (tiles > 0) prepare(0, shared.buffers[0]);
        if (tiles > 1) load(1);
        for (int tile = 0; tile < tiles; ++tile) {
            Buffer& other = shared.buffers[(tile + 1) & 1];
            all_meet();
            if (tile > 0) finish(tile - 1, other);
            if (FINISHED_FIRST) load_to_finish(tile);
            if (tile + 1 < tiles) prepare(tile + 1, other);
            if (tile + 2 < tiles) load(tile + 2);
            if (!FINISHED_FIRST) load_to_finish(tile);
        }
        all_meet();
        if (tiles > 0) finish(tiles - 1, shared.buffers[(tiles - 1) & 1]);
        return;
    }
    all_meet();
    for (int tile = 0; tile < tiles; ++tile) {
        all_meet();
        advance(t_first + (long long)tile * ahead, steps_of(tile), shared.buffers[tile & 1]);
    }
    all_meet();
    if (block.split == p.splits - 1) write_states(p.last_state + b * p.dim * p.state_total);
#endif
}
