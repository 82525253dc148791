// selective_scan_bwd.cu: the gradient of the selective scan.
//
// With λ_t = ∂L/∂h_t and gy = dy·silu(z), walked against time (docs/gradient.md derives it, [n] marks its equations here):
//   λ_t = gy_t·C_t + Ā_{t+1}·λ_{t+1}         [1]    dB_t = Σ_channels λ_t·Δ_t·u_t                 [3]
//   dC_t = Σ_channels gy_t·h_t               [2]    dA = Σ_t λ_t·Δ_t·(Ā_t·h_{t-1})                [4]
//   dΔ_t = Σ_n λ_t·(A·Ā_t·h_{t-1} + B_t·u_t) [5]    du_t = D·gy_t + Δ_t·Σ_n λ_t·B_t               [6]
//   dz_t = dy_t·y_t·σ(z_t)·(1 + z_t·(1 - σ(z_t)))                                                  [7]
// Complex A conjugates every factor of λ, counts gy·C twice, and takes real parts where a real number receives.
//
// Idea: h is recomputed, never stored step by step. The forward pass kept it every CHUNK steps. A chunk is walked forwards
// once, leaving h every SEGMENT steps in shared memory; then its segments are taken last to first, each recomputed with all
// its Ā and h in registers, and walked backwards. Lanes, channels and tiles are those of the forward kernel (tile.cuh), with
// TILE = CHUNK. An element's entry in shared memory holds (Δ, Δ·u, gy) before its backward step and its sums over n after it.
//
// Few channels and long sequences: time is cut into parts, and a first launch with CARRIES_ONLY runs [1] alone (tile.cuh). Where a
// part is a chunk, one launch does it all (RELAY): what a chunk hands on is found while it is walked forwards, with the Ā of that
// walk.
//
// Sums over time are kept in two levels, that of a few chunks and the total, so that rounding does not grow with the length.
// No atomics: dB and dC are summed over a warp and then over warps through shared memory, and over blocks by sum_parts.cu; dA
// over time by its lanes, dD and ddelta_bias by lanes and then threads, and all three over the batch by sum_parts.cu. Every order
// is fixed.
//
// Compile-time, besides tile.cuh's: CARRIES_ONLY RELAY DY_T ZOH GATED SOFTPLUS SLICED SHARED_BYTES BLOCKS_PER_SM.
#define COEFFICIENT_PADDING 8
#define OVERLAP 1
#include "tile.cuh"

// The compiler runs out of registers sooner on 10.0 and later.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool ENOUGH_REGISTERS = false;
#else
constexpr bool ENOUGH_REGISTERS = true;
#endif
constexpr int SEGMENT = 8, SEGMENTS = CHUNK / SEGMENT;                 // steps whose Ā and h a lane holds at once
constexpr int CHUNKS_OF_A_SUM = 4;                                     // over time, before it is added to a total
constexpr int WARPS = THREADS / 32;
constexpr int KINDS = B_VARIES + C_VARIES;                             // which of dB and dC are summed over channels
constexpr int WARP_GROUPS = 32 / LANES;                                // lane groups of a warp
constexpr int WIDE = 16 / sizeof(real) < STATES * REALS ? 16 / sizeof(real) : STATES * REALS;              // numbers in an access
constexpr int COLUMNS = KINDS > 0 ? KINDS * STATES * REALS : WIDE;     // numbers of a step that are summed over channels
constexpr int COLUMN_STEPS = SEGMENT / 2;                              // steps between two such sums over a warp
constexpr int SUM_BUFFERS = COLUMNS <= 64 ? 2 : 1;                     // with one, all threads wait for each other twice as often
constexpr int B_LOADS = coefficient_loads<B_VECTOR>(), C_LOADS = coefficient_loads<C_VECTOR>();
constexpr bool COEFFICIENTS_AHEAD = B_LOADS <= 8 && C_LOADS <= 8;      // few enough to wait in registers
// Reads of the walk against time, a step ahead of their use: double fills the registers as it is.
constexpr bool READ_AHEAD = sizeof(real) == 4 && (ENOUGH_REGISTERS || !RELAY || TIME_CONTIGUOUS);
constexpr int TIME_PARTS = TIME_CONTIGUOUS ? (ROW_ITEMS + 31) / 32 : THREADS / (ROW_ITEMS < 32 ? 32 : ROW_ITEMS);
static_assert(TILE == CHUNK, "a tile is a chunk");
static_assert(BLOCK_CHANNELS <= THREADS, "a thread sums at most one channel over time");
static_assert(CHANNELS == 1 || LANES > 1, "two channels are told apart by neighbouring lanes");

// Rows that do not begin at a multiple of an item are read and written by aligned packs all the same, each of which holds the end
// of one item and the beginning of the next. Of 16 bits alone: float32 has four accesses where these have eight.
constexpr int EDGES_OF_WARP = 3 * (32 / ROW_ITEMS) * VECTOR;           // elements that AlignedStore keeps, in place of a warp's columns
constexpr bool HAS_ROOM = COLUMN_STEPS * WARP_GROUPS * COLUMNS * sizeof(real) >= EDGES_OF_WARP * sizeof(element);
constexpr bool STRADDLES = ENOUGH_REGISTERS && TIME_CONTIGUOUS && 4 * ACCESS <= VECTOR && sizeof(element) == 2 && HAS_ROOM &&
                           sizeof(DY_T) == 2 && ROW_ITEMS <= 32 && ITEM_ROWS % VECTOR == 0 && ALL_ITEMS % THREADS == 0;

// Items that are being loaded at any time: two where there are registers for them.
constexpr bool FEW_REGISTERS = STRADDLES || (!TIME_CONTIGUOUS && BLOCKS_PER_SM * THREADS > 256) || (!ENOUGH_REGISTERS && ACCESS < VECTOR);
constexpr int IN_FLIGHT = FEW_REGISTERS || ITEMS == 1 ? 1 : 2;
static_assert(ITEMS % IN_FLIGHT == 0, "an item takes the place of one before it");

template <typename T>
struct Loaded {                                                        // an item that is on its way
    Pack<T, VECTOR> first, last;                                       // the packs it lies in; all of it in `last` where it lies in one

    DEVICE void load(const T* at, int valid) { last = load_by<ACCESS, T, VECTOR>(at, valid); }
    // By aligned packs, of which `first` holds `count` of its elements, if only none.
    DEVICE void load_both(const T* at, int count) {
        first = load_whole<T, VECTOR>(at + count - VECTOR, true);
        last = load_whole<T, VECTOR>(at + count, true);
    }
    DEVICE Pack<T, VECTOR> whole(int count) const {
        if constexpr (STRADDLES) return joined(first, last, count);
        else return last;
    }
};

// How items go to memory by aligned packs, in a tile beyond whose ends its rows go on: each pack holds the last `early` elements of an
// item and then the first of the next. All lanes of a warp take part.
struct AlignedStore {
    static constexpr int ROWS = 32 / (ROW_ITEMS < 32 ? ROW_ITEMS : 32), EDGES = VECTOR > ROW_ITEMS ? VECTOR / ROW_ITEMS : 1;
    element* edges;                                                    // a warp's own: a pack for each row that its items are of,
    int early;                                                         // ROWS for each of three tensors in turn

    DEVICE static int place() { return threadIdx.x % ROW_ITEMS; }
    DEVICE AlignedStore(void* own, int early)
        : edges(static_cast<element*>(own) + threadIdx.x % 32 / ROW_ITEMS * VECTOR), early(early) {}

    // `to`: the pack before whose element `early` the item begins.
    DEVICE void store(element* to, Pack<element, VECTOR> x, int tensor) const {
        Pack<element, VECTOR> before;                                  // the lane before this has it; before the first, the last
#pragma unroll
        for (int j = 0; j < (int)(sizeof(x) / 4); ++j)
            before.bits.word[j] = __shfl_sync(~0u, x.bits.word[j], (place() + ROW_ITEMS - 1) % ROW_ITEMS, ROW_ITEMS);
        x = joined(before, x, early);
        store_whole(to, x, place() > 0 || early == 0);
        // The first lane of a row has what lies in packs with items of other tiles: all lanes store it element by element.
        element* const edge = edges + tensor * ROWS * VECTOR;
        if (place() == 0) *reinterpret_cast<Pack<element, VECTOR>*>(edge) = x;
        __syncwarp();
#pragma unroll
        for (int i = 0; i < EDGES; ++i) {
            const int j = place() + i * ROW_ITEMS;
            if (early > 0 && j < VECTOR) to[(j < early ? TILE : 0) + j - place() * VECTOR] = edge[j];
        }
    }
};

struct alignas(2 * sizeof(real)) Step { real dt, x; };                 // Δ, and Δ·u (zero-order hold: u)

// Where eight channels lie side by side, an item's entries are moved 16 bytes at a time.
constexpr int STEPS_AT_ONCE = !TIME_CONTIGUOUS && VECTOR == 8 ? 16 / sizeof(Step) : 1;
constexpr int GATES_AT_ONCE = !TIME_CONTIGUOUS && VECTOR == 8 ? 16 / sizeof(real) : 1;
template <typename T, int COUNT> struct alignas(COUNT * sizeof(T)) Side { T at[COUNT]; };
template <int COUNT, typename T> DEVICE Side<T, COUNT>& at_once(T& first) { return reinterpret_cast<Side<T, COUNT>&>(first); }
DEVICE unsigned column_of_step(unsigned c, unsigned t) { return column<sizeof(Step), STEPS_AT_ONCE * sizeof(Step)>(c, t); }
DEVICE unsigned column_of_gate(unsigned c, unsigned t) { return column<sizeof(real), GATES_AT_ONCE * sizeof(real)>(c, t); }

struct Shared {
    Step steps[TILE][BLOCK_CHANNELS];                                  // after the backward step: Σ_n λ·B and Σ_n λ·A·Ā·h
    real gates[TILE][BLOCK_CHANNELS];                                  // gy; after the backward step: Σ_n C·h
    state_t starts[SEGMENTS - 1][CHANNELS][SLOTS][THREADS];            // h before each segment; every thread reads its own
    state_t B[B_VARIES ? TILE * COEFFICIENT_PITCH : 1], C[C_VARIES ? TILE * COEFFICIENT_PITCH : 1];
    alignas(16) real columns[WARPS][COLUMN_STEPS][WARP_GROUPS][COLUMNS];                      // dB and dC of each lane group,
    alignas(16) real warp_sums[SUM_BUFFERS][WARPS][SEGMENT][COLUMNS];                         // and of each warp
    struct Terms { real dD, dbias; } terms[TIME_PARTS][BLOCK_CHANNELS];                       // a chunk's, by those that added them up,
    struct TimeSums { real dD, dD_lost, dbias, dbias_lost; } sums[BLOCK_CHANNELS];            // and all
    real skip[BLOCK_CHANNELS], bias[BLOCK_CHANNELS];
    real* parts[2];                                                    // dB and dC of this block, at the first step of the chunk
    const B_T* B_base;                                                 // of this block, like all below: here, as registers are scarce
    const C_T* C_base;
    const element *u, *delta, *z;                                      // at its first channel
    const DY_T* dy;
    unsigned short counts[STRADDLES ? VECTOR : 1];                     // by channel: elements of an item of each tensor before the
                                                                       // multiple of a pack's size among them, in four bits
    long long out;                                                     // the same in du, ddelta and dz
    Block block;
    Split time;
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "SHARED_BYTES is computed in ops/mapping.py");

struct Params {
    const element *u, *delta, *z;
    const DY_T* dy;
    const state_t* A;
    const B_T* B;
    const C_T* C;
    const real *D, *delta_bias;
    const state_t *states, *dlast_state;
    state_t* carries;                                                  // (batch, splits, dim, state): what enters each split,
    real* totals;                                                      // (batch, splits, dim): Σ Δ; both written by CARRIES_ONLY
    Handed* handed;                                                    // (batch, splits, blocks_per_batch): RELAY's,
    unsigned* published;                                               // and its flags, 0 at first
    element *du, *ddelta, *dz;
    state_t *dinitial_state, *dA_parts, *dB_parts, *dC_parts;
    real *dD_parts, *dbias_parts;
    const real* sums_in;                                               // (3, like du): sums over earlier slices of the states
    real* sums_out;                                                    // not null: more slices follow
    long long dim, length, state, state_total, span, blocks_per_span, blocks_per_batch, groups_of_B, groups_of_C, splits;
    long long u_batch, u_row, delta_batch, delta_row, z_batch, z_row, dy_batch, dy_row, du_batch, du_row, plane;
    long long A_dim, A_state, D_dim, bias_dim, dlast_batch, dlast_dim, dlast_state_stride;
    long long B_batch, B_group, B_state, B_time, B_imag, C_batch, C_group, C_state, C_time, C_imag;
    long long first_block;
};

// A from its rate, to be summed over n: a real one is left in its unit, and the sum is brought back by A_UNIT.
DEVICE float A_for_sum(float rate) { return rate; }
DEVICE double A_for_sum(double rate) { return rate; }
template <typename R> DEVICE Complex<R> A_for_sum(Complex<R> rate) { return {rate.re * R(1 / LOG2_E), rate.im}; }
constexpr real A_UNIT = ZOH || COMPLEX ? 1 : 1 / LOG2_E;

template <int COUNT> struct alignas(COUNT * sizeof(real)) Wide { real at[COUNT]; };
template <int COUNT> DEVICE Wide<COUNT> operator+(Wide<COUNT> a, Wide<COUNT> b) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) a.at[i] += b.at[i];
    return a;
}

struct Sums { real by_B, by_A, out; };                                 // over n: Σ λ·B, Σ λ·A·Ā·h, Σ C·h
DEVICE Sums operator+(Sums a, Sums b) { return {a.by_B + b.by_B, a.by_A + b.by_A, a.out + b.out}; }
DEVICE Sums choose(bool first, Sums a, Sums b) {
    return {first ? a.by_B : b.by_B, first ? a.by_A : b.by_A, first ? a.out : b.out};
}
DEVICE Sums from_lane(Sums x, int offset) {
    return {__shfl_xor_sync(~0u, x.by_B, offset), __shfl_xor_sync(~0u, x.by_A, offset), __shfl_xor_sync(~0u, x.out, offset)};
}

// Where a lane group of a warp leaves its share of kind 0 or 1. Groups take turns in which kind comes first: two that write at once would
// else meet in the same banks.
DEVICE constexpr int column_of(int kind, int group) { return (kind ^ (group & (KINDS - 1))) * STATES * REALS; }

// COLUMN_STEPS steps of the columns of this warp, summed over its lane groups.
DEVICE void sum_columns(const real (&columns)[COLUMN_STEPS][WARP_GROUPS][COLUMNS], real (*sums)[COLUMNS]) {
    constexpr int ROW = COLUMNS / WIDE, ALL = COLUMN_STEPS * ROW;      // accesses to a step, and to all
    constexpr int SHARERS = ALL < 32 ? 32 / ALL : 1, OWN = WARP_GROUPS / SHARERS;             // lanes that share a sum
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < (ALL + 31) / 32; ++k) {
        const int index = lane % ALL + k * 32, step = index / ROW, first = index % ROW * WIDE, share = lane / ALL * OWN;
        const int kind = first / (STATES * REALS), within = first % (STATES * REALS);
        Wide<WIDE> sum = *reinterpret_cast<const Wide<WIDE>*>(&columns[step][share][column_of(kind, share) + within]);
#pragma unroll
        for (int i = 1; i < OWN; ++i)
            sum = sum + *reinterpret_cast<const Wide<WIDE>*>(&columns[step][share + i][column_of(kind, share + i) + within]);
#pragma unroll
        for (int offset = ALL; offset < 32; offset *= 2) {
#pragma unroll
            for (int i = 0; i < WIDE; ++i) sum.at[i] += __shfl_xor_sync(~0u, sum.at[i], offset);
        }
        if (ALL >= 32 || lane < ALL) *reinterpret_cast<Wide<WIDE>*>(&sums[step][first]) = sum;
    }
}

DEVICE Shared::Terms operator+(Shared::Terms a, Shared::Terms b) { return {a.dD + b.dD, a.dbias + b.dbias}; }

// Sums over lanes that are `first`, 2·first, … up to `end` apart.
DEVICE void add_over_lanes(Shared::Terms& sum, int first, int end) {
#pragma unroll
    for (int offset = first; offset < (end < 32 ? end : 32); offset *= 2) {
        sum.dD += __shfl_xor_sync(~0u, sum.dD, offset);
        sum.dbias += __shfl_xor_sync(~0u, sum.dbias, offset);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) selective_scan_bwd(const Params p) {
    extern __shared__ __align__(16) char shared_bytes[];
    Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);

    let_next_begin();
    if (threadIdx.x == 0) {
        shared.block = Block(p.first_block + blockIdx.x, p.splits, p.span, p.blocks_per_span, p.blocks_per_batch);
        if (RELAY) shared.block.split = p.splits - 1 - shared.block.split;                    // who is waited for begins first
        shared.time = Split(shared.block.split, p.splits, p.length);
        const long long c0 = shared.block.c0, b = shared.block.b;
        if (B_VARIES) shared.B_base = p.B + b * p.B_batch + c0 / (p.dim / p.groups_of_B) * p.B_group;
        if (C_VARIES) shared.C_base = p.C + b * p.C_batch + c0 / (p.dim / p.groups_of_C) * p.C_group;
        auto first_channel = [&](long long batch, long long row) { return b * batch + offset_of(0, c0, row); };
        shared.u = p.u + first_channel(p.u_batch, p.u_row);
        shared.delta = p.delta + first_channel(p.delta_batch, p.delta_row);
        shared.z = p.z + first_channel(p.z_batch, p.z_row);
        shared.dy = p.dy + first_channel(p.dy_batch, p.dy_row);
        shared.out = first_channel(p.du_batch, p.du_row);
        for (int c = 0; c < (STRADDLES ? VECTOR : 0); ++c) {
            auto count = [&](auto* x, long long row) { return before_boundary<VECTOR>(x + c * row); };
            shared.counts[c] = (unsigned short)(count(shared.u, p.u_row) | count(shared.delta, p.delta_row) << 4 |
                                                count(shared.dy, p.dy_row) << 8 | (GATED ? count(shared.z, p.z_row) << 12 : 0));
        }
    }
    __syncthreads();
    const Block& block = shared.block;
    const Split& time = shared.time;
    const long long &b = block.b, &c0 = block.c0;
    const int& channels = block.channels;
    auto part_of_time = [&] { return b * p.splits + block.split; };                     // over all batch entries

    auto prefetch_tile = [&](long long t0) {                           // all of the tile that begins at t0
        constexpr int LINE = 128 / sizeof(element), ROW = TIME_CONTIGUOUS ? TILE : BLOCK_CHANNELS;
        constexpr int LINES = (ROW + LINE - 1) / LINE + STRADDLES, ROWS = TIME_CONTIGUOUS ? BLOCK_CHANNELS : TILE;
        for (int i = threadIdx.x; i < ROWS * LINES; i += THREADS) {
            const int row = i / LINES, at = min(i % LINES * LINE, ROW - 1), c = TIME_CONTIGUOUS ? row : at, t = TIME_CONTIGUOUS ? at : row;
            if (c >= channels || t0 + t >= p.length) continue;
            prefetch(shared.u + offset_of(t0 + t, c, p.u_row));
            prefetch(shared.delta + offset_of(t0 + t, c, p.delta_row));
            prefetch(shared.dy + offset_of(t0 + t, c, p.dy_row));
            if (GATED) prefetch(shared.z + offset_of(t0 + t, c, p.z_row));
        }
        const Coefficient<B_T> B = {shared.B_base, p.B_state, time_stride<B_DENSE, B_VECTOR>(p.B_time), p.B_imag};
        const Coefficient<C_T> C = {shared.C_base, p.C_state, time_stride<C_DENSE, C_VECTOR>(p.C_time), p.C_imag};
        if (B_VARIES) prefetch_coefficients<B_TIME_FAST, B_VECTOR>(B, t0, p.length, (int)p.state);
        if (C_VARIES) prefetch_coefficients<C_TIME_FAST, C_VECTOR>(C, t0, p.length, (int)p.state);
    };
    if (RELAY) prefetch_tile(time.begin);                              // while constants are waited for

    // ------------------------------------------------------------------------------------------ what a lane keeps
    const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
    // A lane's channel k. Odd lanes take their two the other way round: what one gives away in the first exchange of a sum
    // over n is then what its neighbour keeps.
    auto channel = [&](int k) { return CHANNELS == 2 ? group * 2 + (k ^ (lane & 1)) : group; };
    state_t rate[CHANNELS][SLOTS], A_kept[CHANNELS][SLOTS], B_kept[CHANNELS][SLOTS], C_kept[CHANNELS][SLOTS];
    state_t carry[CHANNELS][SLOTS], dA[CHANNELS][SLOTS], dB_kept[CHANNELS][SLOTS], dC_kept[CHANNELS][SLOTS];
    auto for_states = [&](auto&& body) {                               // body(k, i, channel, state) for those that exist
#pragma unroll
        for (int k = 0; k < CHANNELS; ++k) {
#pragma unroll
            for (int i = 0; i < SLOTS; ++i) {
                int n = lane * SLOTS + i;
                if (channel(k) < channels && n < p.state) body(k, i, c0 + channel(k), n);
            }
        }
    };
    // The same for entry `row` of x (rows, dim, state_total): body(k, i, x[row, channel, state]).
    auto for_states_of = [&](auto* x, long long row, auto&& body) {
#pragma unroll
        for (int k = 0; k < CHANNELS; ++k) {
            auto* of_channel = x + (row * p.dim + c0 + channel(k)) * p.state_total + lane * SLOTS;
#pragma unroll
            for (int i = 0; i < SLOTS; ++i)
                if (channel(k) < channels && lane * SLOTS + i < (int)p.state) body(k, i, of_channel[i]);
        }
    };
#pragma unroll
    for (int k = 0; k < CHANNELS; ++k) {
#pragma unroll
        for (int i = 0; i < SLOTS; ++i) carry[k][i] = dA[k][i] = dB_kept[k][i] = dC_kept[k][i] = A_kept[k][i] = B_kept[k][i] = C_kept[k][i] = {};
    }
    for_states([&](int k, int i, long long c, int n) {
        A_kept[k][i] = bounded(p.A[c * p.A_dim + n * p.A_state]);
        if (!B_VARIES) B_kept[k][i] = reinterpret_cast<const state_t*>(p.B)[c * p.B_group + n * p.B_state];
        if (!C_VARIES) C_kept[k][i] = reinterpret_cast<const state_t*>(p.C)[c * p.C_group + n * p.C_state];
        if (!CARRIES_ONLY && (p.splits == 1 || RELAY) && p.dlast_state)
            carry[k][i] = p.dlast_state[b * p.dlast_batch + c * p.dlast_dim + n * p.dlast_state_stride];
    });
    if (!CARRIES_ONLY && p.splits > 1 && !RELAY)
        for_states_of(p.carries, part_of_time(), [&](int k, int i, const state_t& enters) { carry[k][i] = enters; });
#pragma unroll
    for (int k = 0; k < CHANNELS; ++k) {
#pragma unroll
        for (int i = 0; i < SLOTS; ++i) rate[k][i] = rate_of(A_kept[k][i]);
    }
    for (int c = threadIdx.x; c < BLOCK_CHANNELS; c += THREADS) {
        shared.skip[c] = p.D && c < channels ? p.D[(c0 + c) * p.D_dim] : real(0);
        shared.bias[c] = p.delta_bias && c < channels ? p.delta_bias[(c0 + c) * p.bias_dim] : real(0);
    }
    __syncthreads();

    auto steps_from = [&](long long t0) { return p.length - t0 < TILE ? (int)(p.length - t0) : TILE; };
    struct Tensors {
        Loaded<element> u, delta, z;
        Loaded<DY_T> dy;
        int counts;                                                    // of all four: registers are scarce
        DEVICE int count(int tensor) const { return counts >> 4 * tensor & 15; }
    };
    // By aligned packs: where all rows of a tile exist and go on beyond it, both ways.
    auto is_inner = [&](long long t0, int steps) {
        return STRADDLES && steps == TILE && t0 > 0 && t0 + TILE + VECTOR <= p.length && channels == BLOCK_CHANNELS;
    };
    auto load = [&](int k, long long t0, int steps) {                  // item k of the tile that begins at t0
        const Item item(k, channels, steps);
        Tensors x;
        if (k < ITEMS && is_inner(t0, steps)) {
            x.counts = shared.counts[STRADDLES ? item.c % VECTOR : 0];
            x.u.load_both(shared.u + item.offset(p.u_row, t0), x.count(0));
            x.delta.load_both(shared.delta + item.offset(p.delta_row, t0), x.count(1));
            x.dy.load_both(shared.dy + item.offset(p.dy_row, t0), x.count(2));
            if (GATED) x.z.load_both(shared.z + item.offset(p.z_row, t0), x.count(3));
        } else {
            x.counts = 0;
            x.u.load(shared.u + item.offset(p.u_row, t0), item.valid);
            x.delta.load(shared.delta + item.offset(p.delta_row, t0), item.valid);
            x.dy.load(shared.dy + item.offset(p.dy_row, t0), item.valid);
            if (GATED) x.z.load(shared.z + item.offset(p.z_row, t0), item.valid);
        }
        return x;
    };
    // All items of a tile in turn, while those that follow are on their way: body(k, item k), which leaves in its place the one that comes
    // IN_FLIGHT later.
    Tensors next[IN_FLIGHT];
    auto load_first = [&](long long t0, int steps) {
#pragma unroll
        for (int k = 0; k < IN_FLIGHT; ++k) next[k] = load(k, t0, steps);
    };
    auto for_items = [&](auto&& body) {
#pragma unroll 1
        for (int k = 0; k < ITEMS; k += IN_FLIGHT) {
#pragma unroll
            for (int i = 0; i < IN_FLIGHT; ++i) body(k + i, next[i]);
        }
    };

    // dB and dC of a block are stored by wide accesses where the caller's number of states allows.
    auto parts_are_wide = [&] { return p.state == STATES && p.state_total * REALS % WIDE == 0 &&
        ((size_t)p.dB_parts | (size_t)p.dC_parts) % sizeof(Wide<WIDE>) == 0; };
    // Sums over some chunks are added to totals in memory, because registers are scarce, and so that rounding does not grow with time.
    // A relay's part is one chunk, and its sums are the totals.
    auto for_totals = [&](auto&& body) {
        body(p.dA_parts, dA);
        if (!B_VARIES) body(p.dB_parts, dB_kept);
        if (!C_VARIES) body(p.dC_parts, dC_kept);
    };
    auto add_to_totals = [&] {
        for_totals([&](state_t* totals, state_t (&sums)[CHANNELS][SLOTS]) {
            for_states_of(totals, part_of_time(), [&](int k, int i, state_t& total) {
                total = RELAY ? sums[k][i] : total + sums[k][i];
                sums[k][i] = {};
            });
        });
    };
    if (!CARRIES_ONLY && !RELAY) for_totals([&](state_t* totals, state_t (&sums)[CHANNELS][SLOTS]) {
        for_states_of(totals, part_of_time(), [&](int k, int i, state_t& total) { total = sums[k][i]; });
    });
    Memory<CHANNELS> memory;
    if (CARRIES_ONLY || RELAY) for_states([&](int k, int i, long long, int) { memory.add_state(k, real_part(rate[k][i])); });
    if (threadIdx.x < BLOCK_CHANNELS) shared.sums[threadIdx.x] = {};    // in shared memory, as registers are scarce
    // Entries of step j of the segment that begins at t. All rows of an item lie in the order of its first, which is known sooner.
    auto step_at = [&](unsigned t, int j, int k) -> Step& {
        return (&shared.steps[t][column_of_step(channel(k), t + row_of_column(j))])[j * BLOCK_CHANNELS];
    };
    auto gate_at = [&](unsigned t, int j, int k) -> real& {
        return (&shared.gates[t][column_of_gate(channel(k), t + row_of_column(j))])[j * BLOCK_CHANNELS];
    };
    // One step forwards: Ā of every state, and h advanced.
    auto advance = [&](int t, int j, state_t (&h)[CHANNELS][SLOTS], state_t (&a)[CHANNELS][SLOTS]) {
        state_t Bt[SLOTS];
#pragma unroll
        for (int i = 0; i < SLOTS; ++i) if (B_VARIES) Bt[i] = shared.B[(t + j) * COEFFICIENT_PITCH + lane * SLOTS + i];
#pragma unroll
        for (int k = 0; k < CHANNELS; ++k) {
            const Step s = step_at(t, j, k);
#pragma unroll
            for (int i = 0; i < SLOTS; ++i) {
                a[k][i] = decay(s.dt, rate[k][i]);
                state_t input = s.x * (B_VARIES ? Bt[i] : B_kept[k][i]);
#if ZOH
                input = s.dt * (input * phi(s.dt * A_kept[k][i], a[k][i]));
#endif
                h[k][i] = multiply_add(a[k][i], h[k][i], input);
            }
        }
    };

    // What a part hands on, of a chunk in shared memory: as a sum along time or in order (tile.cuh). The sum is
    // Σ_t conj(exp(A·S_t))·gy_t·conj(C_t), with S_t = Σ Δ up to t.
    auto carry_tile = [&](bool gathers, state_t (&carry)[CHANNELS][SLOTS]) {
#pragma unroll 4
        for (int step = 0; step < TILE; ++step) {
            const int t = gathers ? step : TILE - 1 - step;
#pragma unroll
            for (int k = 0; k < CHANNELS; ++k) {
                const real dt = shared.steps[t][column_of_step(channel(k), t)].dt;
                const real gy = shared.gates[t][column_of_gate(channel(k), t)] * real(COMPLEX ? 2 : 1);
                memory.pass(k, dt);
#pragma unroll
                for (int i = 0; i < SLOTS; ++i) {
                    const state_t Cn = C_VARIES ? shared.C[t * COEFFICIENT_PITCH + lane * SLOTS + i] : C_kept[k][i];
                    const state_t a = conj(decay(gathers ? memory.total[k] : dt, rate[k][i])), input = gy * conj(Cn);
                    carry[k][i] = gathers ? multiply_add(a, input, carry[k][i]) : a * (input + carry[k][i]);
                }
            }
        }
    };

    const bool gathers = (CARRIES_ONLY || RELAY) && __syncthreads_and(SOFTPLUS && !memory.grows());
    const bool from_end = REVERSE == (CARRIES_ONLY && gathers);
    const int back = from_end ? -CHUNK : CHUNK;
    long long t0 = from_end ? (time.end - 1) / CHUNK * CHUNK : time.begin;
    auto steps_walked_from = [&](long long t0) { return t0 >= time.begin && t0 < time.end ? steps_from(t0) : 0; };
    load_first(t0, steps_walked_from(t0));
    for (; t0 >= time.begin && t0 < time.end; t0 += back) {            // a part may be empty
        const int steps = steps_from(t0);

        // -------------------------------------------------------------------------------------- Δ, Δ·u, gy, B and C
        // Loads first, so that items hide the time they take.
        const Coefficient<B_T> B = {shared.B_base, p.B_state, time_stride<B_DENSE, B_VECTOR>(p.B_time), p.B_imag};
        const Coefficient<C_T> C = {shared.C_base, p.C_state, time_stride<C_DENSE, C_VECTOR>(p.C_time), p.C_imag};
        auto load_B = [&](int k) { return load_coefficient<B_TIME_FAST, B_VECTOR>(k, 0, B, t0, steps, (int)p.state); };
        auto load_C = [&](int k) { return load_coefficient<C_TIME_FAST, C_VECTOR>(k, 0, C, t0, steps, (int)p.state); };
        Pack<B_T, B_VECTOR * REALS> B_next[COEFFICIENTS_AHEAD ? B_LOADS : 1];
        Pack<C_T, C_VECTOR * REALS> C_next[COEFFICIENTS_AHEAD ? C_LOADS : 1];
#pragma unroll
        for (int k = 0; k < (COEFFICIENTS_AHEAD && B_VARIES ? B_LOADS : 0); ++k) B_next[k] = load_B(k);
#pragma unroll
        for (int k = 0; k < (COEFFICIENTS_AHEAD && C_VARIES ? C_LOADS : 0); ++k) C_next[k] = load_C(k);
        if (KINDS > 0 && threadIdx.x < KINDS) {                        // kind 0 is B where it varies
            const bool is_B = threadIdx.x == 0 && B_VARIES;
            real* parts = reinterpret_cast<real*>(is_B ? p.dB_parts : p.dC_parts);
            shared.parts[threadIdx.x] = parts + ((b * p.blocks_per_batch + block.within) * p.length + t0) * p.state_total * REALS;
        }
        state_t h[CHANNELS][SLOTS] = {}, a[CHANNELS][SLOTS];
        if (!CARRIES_ONLY) {
            const long long chunk = b * ((p.length + CHUNK - 1) / CHUNK) + t0 / CHUNK;
            for_states_of(p.states, chunk, [&](int k, int i, const state_t& kept) { h[k][i] = kept; });
        }
        for_items([&](int k, Tensors& at_hand) {
            const Item item(k, channels, steps);
            const auto u = at_hand.u.whole(at_hand.count(0)), delta = at_hand.delta.whole(at_hand.count(1));
            const auto z = at_hand.z.whole(at_hand.count(3));
            const auto dy = at_hand.dy.whole(at_hand.count(2));
            real dt[VECTOR], gy[VECTOR];                               // loop by loop, so that elements hide each other's latencies
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) dt[j] = to_real(delta.get(j)) + shared.bias[item.channel(j)];
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) gy[j] = to_real(dy.get(j));
            if (SOFTPLUS) softplus_each<step_t>(dt);
            if (GATED) {
#pragma unroll
                for (int j = 0; j < VECTOR; ++j) {
                    const real gate = to_real(z.get(j));
                    gy[j] *= gate * sigmoid(gate);
                }
            }
            real x[VECTOR];
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                dt[j] = item.has(j) ? dt[j] : real(0);
                x[j] = ZOH ? to_real(u.get(j)) : dt[j] * to_real(u.get(j));
            }
            if (CARRIES_ONLY && k + IN_FLIGHT >= ITEMS) at_hand = load(k + IN_FLIGHT - ITEMS, t0 + back, steps_walked_from(t0 + back));
            else at_hand = load(k + IN_FLIGHT, t0, steps);              // nothing, where the tile has no such item
            if (!item.in_tile(k)) return;
            const unsigned in_steps = column_of_step(item.c, item.first_row()), in_gates = column_of_gate(item.c, item.first_row());
#pragma unroll
            for (int j = 0; j < VECTOR; j += STEPS_AT_ONCE) {
                Side<Step, STEPS_AT_ONCE> some;
#pragma unroll
                for (int i = 0; i < STEPS_AT_ONCE; ++i) some.at[i] = {dt[j + i], x[j + i]};
                at_once<STEPS_AT_ONCE>(shared.steps[item.row(j)][next_column(in_steps, j)]) = some;
            }
#pragma unroll
            for (int j = 0; j < VECTOR; j += GATES_AT_ONCE) {
                Side<real, GATES_AT_ONCE> some;
#pragma unroll
                for (int i = 0; i < GATES_AT_ONCE; ++i) some.at[i] = gy[j + i];
                at_once<GATES_AT_ONCE>(shared.gates[item.row(j)][next_column(in_gates, j)]) = some;
            }
        });
#pragma unroll(COEFFICIENTS_AHEAD ? B_LOADS : 2)
        for (int k = 0; k < (B_VARIES ? B_LOADS : 0); ++k) {
            if (!COEFFICIENTS_AHEAD) B_next[0] = load_B(k);
            stage_coefficient<B_TIME_FAST, B_VECTOR, B_T>(k, 0, shared.B, B_next[COEFFICIENTS_AHEAD ? k : 0]);
        }
#pragma unroll(COEFFICIENTS_AHEAD ? C_LOADS : 2)
        for (int k = 0; k < (C_VARIES ? C_LOADS : 0); ++k) {
            if (!COEFFICIENTS_AHEAD) C_next[0] = load_C(k);
            stage_coefficient<C_TIME_FAST, C_VECTOR, C_T>(k, 0, shared.C, C_next[COEFFICIENTS_AHEAD ? k : 0]);
        }
        __syncthreads();

        if (CARRIES_ONLY) {                                            // [1]
            if (gathers) carry_tile(true, carry); else carry_tile(false, carry);
            if (__syncthreads_and(gathers && memory.is_exhausted())) break;
            continue;
        }

        if (!RELAY && (from_end ? t0 > time.begin : t0 + back < time.end)) prefetch_tile(t0 + back);

        // -------------------------------------------------------------------------------------- forwards: h of each segment
        // RELAY: and the sum of `carry_tile`, where its decay over many steps is at hand as a product.
        state_t last_start[CHANNELS][SLOTS], product[CHANNELS][SLOTS], handed[CHANNELS][SLOTS] = {};
#pragma unroll
        for (int k = 0; k < CHANNELS; ++k) {
#pragma unroll
            for (int i = 0; i < SLOTS; ++i) product[k][i] = {1};
        }
#pragma unroll 1
        for (int segment = 0; segment < SEGMENTS - !RELAY; ++segment) {
#pragma unroll
            for (int k = 0; k < CHANNELS; ++k) {
#pragma unroll
                for (int i = 0; i < SLOTS; ++i) {
                    if (segment < SEGMENTS - 1) shared.starts[segment][k][i][threadIdx.x] = h[k][i];
                    else last_start[k][i] = h[k][i];
                }
            }
            real passed[CHANNELS] = {};                                // Σ Δ
#pragma unroll
            for (int j = 0; j < SEGMENT; ++j) {
                advance(segment * SEGMENT, j, h, a);
#pragma unroll
                for (int k = 0; k < (RELAY && SOFTPLUS ? CHANNELS : 0); ++k) {
                    const real gy = gate_at(segment * SEGMENT, j, k) * real(COMPLEX ? 2 : 1);
                    passed[k] += step_at(segment * SEGMENT, j, k).dt;
#pragma unroll
                    for (int i = 0; i < SLOTS; ++i) {
                        const int at = (segment * SEGMENT + j) * COEFFICIENT_PITCH + lane * SLOTS + i;
                        product[k][i] = product[k][i] * a[k][i];
                        handed[k][i] = multiply_add(conj(product[k][i]), gy * conj(C_VARIES ? shared.C[at] : C_kept[k][i]), handed[k][i]);
                    }
                }
            }
#pragma unroll
            for (int k = 0; k < CHANNELS; ++k) memory.total[k] += passed[k];
        }
        if (RELAY) {
#pragma unroll
            for (int k = 0; k < CHANNELS; ++k) {
#pragma unroll
                for (int i = 0; i < SLOTS; ++i) h[k][i] = last_start[k][i];
            }
            if (!gathers) {
                memory = {};
#pragma unroll
                for (int k = 0; k < CHANNELS; ++k) {
#pragma unroll
                    for (int i = 0; i < SLOTS; ++i) handed[k][i] = {};
                }
                carry_tile(false, handed);
            }
            wait_for_previous();                                       // which made flags 0
            auto block_of = [&](long long split) { return (b * p.splits + split) * p.blocks_per_batch + block.within; };
            constexpr int OF_BLOCK = CHANNELS * SLOTS * THREADS;
            leave(p.handed + block_of(block.split) * OF_BLOCK, handed, memory.total, rate);
            __syncthreads();
            if (threadIdx.x == 0) publish(p.published + block_of(block.split));
            for (long long split = block.split + 1 + threadIdx.x; split < p.splits; split += THREADS)
                wait_until_published(p.published + block_of(split));
            __syncthreads();
            const int count = (int)(p.splits - 1 - block.split);
            chain<true>(carry, p.handed + block_of(p.splits - 1) * OF_BLOCK, -p.blocks_per_batch * OF_BLOCK, count);
        }

        // -------------------------------------------------------------------------------------- backwards, by segments
        // dB and dC of a segment, summed over warps: at once for all threads, a segment later, when no warp needs to be waited for.
        auto store_sums = [&](int segment) {
            constexpr int ALL = SEGMENT * COLUMNS, EVEN = ALL / THREADS, OWN = EVEN < 1 ? 1 : EVEN < WIDE ? EVEN : WIDE;
            const auto& sums = shared.warp_sums[segment % SUM_BUFFERS];
#pragma unroll
            for (int k = 0; k < (ALL + OWN * THREADS - 1) / (OWN * THREADS); ++k) {
                const int index = (threadIdx.x + k * THREADS) * OWN, row = index / COLUMNS, column = index % COLUMNS;
                const int first = column % (STATES * REALS), kind = column / (STATES * REALS);
                const int t = REVERSE ? TILE - 1 - (segment * SEGMENT + row) : segment * SEGMENT + row;
                if (ALL % (OWN * THREADS) != 0 && index >= ALL) continue;
                Wide<OWN> sum = *reinterpret_cast<const Wide<OWN>*>(&sums[0][row][column]);
#pragma unroll
                for (int w = 1; w < WARPS; ++w) sum = sum + *reinterpret_cast<const Wide<OWN>*>(&sums[w][row][column]);
                real* parts = shared.parts[kind] + t * (int)p.state_total * REALS + first;
                if (parts_are_wide()) {
                    if (t < steps_from(t0)) *reinterpret_cast<Wide<OWN>*>(parts) = sum;
                } else {
#pragma unroll
                    for (int i = 0; i < OWN; ++i) if (t < steps_from(t0) && first + i < p.state * REALS) parts[i] = sum.at[i];
                }
            }
        };
#pragma unroll 1
        for (int segment = SEGMENTS - 1; segment >= 0; --segment) {
            if (KINDS > 0 && SUM_BUFFERS == 2 && segment < SEGMENTS - 1) store_sums(segment + 1);
            state_t hs[SEGMENT + 1][CHANNELS][SLOTS], as[SEGMENT][CHANNELS][SLOTS];           // h before each step; its Ā
#pragma unroll
            for (int k = 0; k < CHANNELS; ++k) {
#pragma unroll
                for (int i = 0; i < SLOTS; ++i) hs[0][k][i] = h[k][i];
            }
#pragma unroll
            for (int j = 0; j < SEGMENT; ++j) {
#pragma unroll
                for (int k = 0; k < CHANNELS; ++k) {
#pragma unroll
                    for (int i = 0; i < SLOTS; ++i) hs[j + 1][k][i] = hs[j][k][i];
                }
                advance(segment * SEGMENT, j, hs[j + 1], as[j]);
            }

            // Reads run a step ahead, and sums over n are written at the end, because a write to shared memory holds back all reads
            // that follow it.
            struct Inputs { Step step[CHANNELS]; real gy[CHANNELS]; state_t B[SLOTS], C[SLOTS]; };
            auto read = [&](int j) {
                Inputs x;
#pragma unroll
                for (int k = 0; k < CHANNELS; ++k) {
                    x.step[k] = step_at(segment * SEGMENT, j, k);
                    x.gy[k] = gate_at(segment * SEGMENT, j, k);
                }
#pragma unroll
                for (int i = 0; i < SLOTS; ++i) {
                    if (B_VARIES) x.B[i] = shared.B[(segment * SEGMENT + j) * COEFFICIENT_PITCH + lane * SLOTS + i];
                    if (C_VARIES) x.C[i] = shared.C[(segment * SEGMENT + j) * COEFFICIENT_PITCH + lane * SLOTS + i];
                }
                return x;
            };
            Sums sums[SEGMENT];
            Inputs next_inputs = read(SEGMENT - 1);
#pragma unroll
            for (int j = SEGMENT - 1; j >= 0; --j) {
                const Inputs now = READ_AHEAD ? next_inputs : read(j);
                if (READ_AHEAD && j > 0) next_inputs = read(j - 1);
                alignas(SLOTS * sizeof(state_t)) state_t dB[SLOTS] = {}, dC[SLOTS] = {};
                Sums part[CHANNELS] = {};
#pragma unroll
                for (int k = 0; k < CHANNELS; ++k) {
                    const Step s = now.step[k];
                    const real gy = now.gy[k] * real(COMPLEX ? 2 : 1);
#pragma unroll
                    for (int i = 0; i < SLOTS; ++i) {
                        state_t Bn = B_VARIES ? now.B[i] : B_kept[k][i], Cn = C_VARIES ? now.C[i] : C_kept[k][i];
                        state_t a_n = as[j][k][i], h_n = hs[j + 1][k][i];
                        state_t lambda = gy * conj(Cn) + carry[k][i];                         // [1]
                        part[k].out = real_product(Cn, h_n, part[k].out);
                        state_t dCn = gy * conj(h_n);                                         // [2]
                        carry[k][i] = conj(a_n) * lambda;
#if ZOH
                        state_t decayed = a_n * hs[j][k][i];                                  // Ā_t·h_{t-1}
                        state_t angle = s.dt * A_kept[k][i], phi_n = phi(angle, a_n), uB = s.x * Bn;
                        state_t factor = s.dt * phi_n;
                        state_t dBn = s.x * (lambda * conj(factor));                          // [3]
                        state_t slope = s.dt * (s.dt * (phi_derivative(angle, a_n, phi_n) * uB));
                        dA[k][i] = multiply_add(lambda, conj(s.dt * decayed + slope), dA[k][i]);             // [4]
                        part[k].by_A = real_product(lambda, conj(A_kept[k][i] * decayed + a_n * uB), part[k].by_A);    // [5]
                        part[k].by_B = real_product(lambda, conj(factor * Bn), part[k].by_B);           // [6]
#else
                        state_t dBn = s.x * lambda;                                           // [3]
                        state_t pulled = carry[k][i] * conj(hs[j][k][i]);                     // λ_t·Ā_t·h_{t-1}
                        dA[k][i] = s.dt * pulled + dA[k][i];                                  // [4]
                        part[k].by_A = real_product(pulled, conj(A_for_sum(rate[k][i])), part[k].by_A);      // [5], its part with A
                        part[k].by_B = real_product(lambda, conj(Bn), part[k].by_B);          // [5] and [6]
#endif
                        if (B_VARIES) dB[i] = dB[i] + dBn; else dB_kept[k][i] = dB_kept[k][i] + dBn;
                        if (C_VARIES) dC[i] = dC[i] + dCn; else dC_kept[k][i] = dC_kept[k][i] + dCn;
                    }
                }
                // Two channels: each of two lanes takes the one that its `channel(0)` names.
                sums[j] = CHANNELS == 2 ? part[0] + from_lane(part[CHANNELS - 1], 1) : part[0];
                if (KINDS > 0) {
                    auto& columns = shared.columns[threadIdx.x / 32];
                    real* mine = &columns[j % COLUMN_STEPS][group % WARP_GROUPS][lane * SLOTS * REALS];
                    typedef Wide<SLOTS * REALS> Share;
                    if (B_VARIES) *reinterpret_cast<Share*>(mine + column_of(0, group % WARP_GROUPS)) = *reinterpret_cast<const Share*>(dB);
                    if (C_VARIES) *reinterpret_cast<Share*>(mine + column_of(KINDS - 1, group % WARP_GROUPS)) = *reinterpret_cast<const Share*>(dC);
                    if (j % COLUMN_STEPS == 0) {
                        __syncwarp();
                        sum_columns(columns, &shared.warp_sums[segment % SUM_BUFFERS][threadIdx.x / 32][j]);
                        __syncwarp();
                    }
                }
            }

            // The sums over the lanes of a channel. Two of them share out their steps, each half for one, until each lane has few.
            int first_step = 0;
#pragma unroll
            for (int stage = 0; CHANNELS << stage < LANES; ++stage) {
                const int offset = CHANNELS << stage, half = (SEGMENT >> stage) / 2;
                const bool second = lane & offset;
                if (half == 0) sums[0] = sums[0] + from_lane(sums[0], offset);
#pragma unroll
                for (int j = 0; j < half; ++j) {
                    const Sums one = sums[j], two = sums[j + half];
                    sums[j] = choose(second, two, one) + from_lane(choose(second, one, two), offset);
                }
                if (second) first_step += half;
            }
            __syncwarp();                                              // all lanes have read the entries
            if (lane < CHANNELS * SEGMENT) {
                constexpr int OWN = LANES / CHANNELS < SEGMENT ? SEGMENT * CHANNELS / LANES : 1;
#pragma unroll
                for (int j = 0; j < OWN; ++j) {
                    step_at(segment * SEGMENT, first_step + j, 0) = {sums[j].by_B, sums[j].by_A * A_UNIT};
                    gate_at(segment * SEGMENT, first_step + j, 0) = sums[j].out;
                }
            }

            if (segment > 0) {
#pragma unroll
                for (int k = 0; k < CHANNELS; ++k) {
#pragma unroll
                    for (int i = 0; i < SLOTS; ++i) h[k][i] = shared.starts[segment - 1][k][i][threadIdx.x];
                }
            }
            __syncthreads();
            if (KINDS > 0 && SUM_BUFFERS == 1) {
                store_sums(segment);
                __syncthreads();
            }
        }
        // -------------------------------------------------------------------------------------- du, ddelta, dz
        const long long t1 = recomputed(t0);
        const int last_steps = steps_from(t1);
        load_first(t1, last_steps);
        auto load_later = [&](int k, Tensors& at_hand) {               // item k, or those of the next chunk after the last
            const bool is_later = k >= ITEMS;
            at_hand = load(is_later ? k - ITEMS : k, is_later ? t1 + back : t1, is_later ? steps_walked_from(t1 + back) : last_steps);
        };
        if (KINDS > 0 && SUM_BUFFERS == 2) store_sums(0);
        if (RELAY || t0 / CHUNK % CHUNKS_OF_A_SUM == 0) add_to_totals();
        Shared::Terms terms[VECTOR] = {};                              // of an item, or of all a thread's items where channels are its columns
        for_items([&](int k, Tensors& at_hand) {
            const Item item(k, channels, last_steps);
            const auto u = at_hand.u.whole(at_hand.count(0)), delta = at_hand.delta.whole(at_hand.count(1));
            const auto z = at_hand.z.whole(at_hand.count(3));
            const auto dy = at_hand.dy.whole(at_hand.count(2));
            const long long at = shared.out + item.offset(p.du_row, t1);
            real by_B[VECTOR], by_A[VECTOR], out[VECTOR], skip[VECTOR];
            const int c = item.c % BLOCK_CHANNELS;
            const unsigned in_steps = column_of_step(c, item.first_row()), in_gates = column_of_gate(c, item.first_row());
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                const int of_steps = j / STEPS_AT_ONCE * STEPS_AT_ONCE, of_gates = j / GATES_AT_ONCE * GATES_AT_ONCE;
                const Step s = at_once<STEPS_AT_ONCE>(shared.steps[item.row(j)][next_column(in_steps, of_steps)]).at[j - of_steps];
                by_B[j] = s.dt;
                by_A[j] = s.x;
                out[j] = at_once<GATES_AT_ONCE>(shared.gates[item.row(j)][next_column(in_gates, of_gates)]).at[j - of_gates] *
                         real(COMPLEX ? 2 : 1);
                skip[j] = shared.skip[TIME_CONTIGUOUS ? c : c + j];
            }
            if (SLICED && p.sums_in) {
#pragma unroll
                for (int j = 0; j < VECTOR; ++j) {
                    if (!item.has(j)) continue;
                    by_B[j] += p.sums_in[at + j];
                    by_A[j] += p.sums_in[p.plane + at + j];
                    out[j] += p.sums_in[2 * p.plane + at + j];
                }
            }
            if (SLICED && p.sums_out) {
#pragma unroll
                for (int j = 0; j < VECTOR; ++j) {
                    if (!item.has(j)) continue;
                    p.sums_out[at + j] = by_B[j];
                    p.sums_out[p.plane + at + j] = by_A[j];
                    p.sums_out[2 * p.plane + at + j] = out[j];
                }
                load_later(k + IN_FLIGHT, at_hand);
                return;
            }
            const int early = (int)(at & (VECTOR - 1));
            const AlignedStore aligned(shared.columns[threadIdx.x / 32], early);
            auto store = [&](int tensor, element* to, const real (&x)[VECTOR]) {
                Pack<element, VECTOR> pack;
#pragma unroll
                for (int j = 0; j < VECTOR; ++j) {
                    element rounded;
                    from_real(x[j], rounded);
                    pack.set(j, rounded);
                }
                if (OUT_ACCESS < VECTOR && is_inner(t1, last_steps)) aligned.store(to + (at - early), pack, tensor);
                else store_by<OUT_ACCESS, element, VECTOR>(to + at, pack, item.valid);
            };
            real gy[VECTOR], dt[VECTOR], slope[VECTOR];
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                gy[j] = to_real(dy.get(j));
                dt[j] = to_real(delta.get(j)) + shared.bias[item.channel(j) % BLOCK_CHANNELS];
                slope[j] = 1;
            }
            if (GATED) {
#pragma unroll
                for (int j = 0; j < VECTOR; ++j) {
                    real gate = to_real(z.get(j)), s = sigmoid(gate);
                    real skipped = out[j] + skip[j] * to_real(u.get(j));
                    out[j] = gy[j] * skipped * s * (real(1) + gate * (real(1) - s));          // [7]
                    gy[j] *= gate * s;
                }
                store(0, p.dz, out);
            }
            if (STRADDLES) {                                           // not sooner, or this item would wait for the next one's
                __syncwarp();
                load_later(k + 1, at_hand);
            }
            if (SOFTPLUS) softplus_each<step_t>(dt, &slope);
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                const real x = to_real(u.get(j));
                by_A[j] = (ZOH ? by_A[j] : by_A[j] + x * by_B[j]) * slope[j];                 // [5]
                by_B[j] = skip[j] * gy[j] + (ZOH ? by_B[j] : dt[j] * by_B[j]);                // [6]
                const Shared::Terms term = {item.has(j) ? gy[j] * x : real(0), item.has(j) ? by_A[j] : real(0)};
                terms[j] = TIME_CONTIGUOUS ? term : terms[j] + term;
            }
            if (!STRADDLES) load_later(k + IN_FLIGHT, at_hand);
            store(1, p.ddelta, by_A);
            store(2, p.du, by_B);
            if (TIME_CONTIGUOUS) {                                     // an item is of one channel, and so are those of its lanes
#pragma unroll
                for (int half = VECTOR / 2; half > 0; half /= 2) {
#pragma unroll
                    for (int j = 0; j < half; ++j) terms[j] = terms[j] + terms[j + half];
                }
                add_over_lanes(terms[0], 1, ROW_ITEMS);
                if (item.in_tile(k) && item.t / VECTOR % 32 == 0) shared.terms[item.t / VECTOR / 32][item.c] = terms[0];
            }
        });
        if (!TIME_CONTIGUOUS) {
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                add_over_lanes(terms[j], ROW_ITEMS, 32);
                const int c = threadIdx.x % ROW_ITEMS * VECTOR + j;
                if (threadIdx.x % 32 < ROW_ITEMS) shared.terms[threadIdx.x / (ROW_ITEMS < 32 ? 32 : ROW_ITEMS)][c] = terms[j];
            }
        }
        __syncthreads();
        if (threadIdx.x < BLOCK_CHANNELS) {
            Shared::Terms sum = shared.terms[0][threadIdx.x];
#pragma unroll
            for (int i = 1; i < TIME_PARTS; ++i) sum = sum + shared.terms[i][threadIdx.x];
            auto& time_sums = shared.sums[threadIdx.x];
            add_exactly(time_sums.dD, time_sums.dD_lost, sum.dD);
            add_exactly(time_sums.dbias, time_sums.dbias_lost, sum.dbias);
        }
    }

    if (CARRIES_ONLY) {
        for_states_of(p.carries, part_of_time(), [&](int k, int i, state_t& handed_on) { handed_on = carry[k][i]; });
        for_states([&](int k, int i, long long c, int n) {
            if (n == 0) p.totals[part_of_time() * p.dim + c] = memory.total[k];
        });
        return;
    }

    // ------------------------------------------------------------------------------------------ sums over time
    if (!RELAY) add_to_totals();
    if (p.dinitial_state && block.split == 0)
        for_states_of(p.dinitial_state, b, [&](int k, int i, state_t& gradient) { gradient = carry[k][i]; });
    if (SLICED && p.sums_out) return;
    __syncthreads();
    if (threadIdx.x < channels) {
        const long long at = part_of_time() * p.dim + c0 + threadIdx.x;
        if (p.D) p.dD_parts[at] = shared.sums[threadIdx.x].dD;
        if (p.delta_bias) p.dbias_parts[at] = shared.sums[threadIdx.x].dbias;
    }
}
