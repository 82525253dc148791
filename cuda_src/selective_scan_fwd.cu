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
//   elements      finish tile i-1 (sum the parts of Σ_n C·h in fixed order, add D·u, gate, store); make (Δ, Δ·u), B and C of
//                 tile i+1 in shared memory; start the loads of tile i+2.
//   recurrence    advance the states through tile i, and leave parts of Σ_n C·h in shared memory.
//
// Few channels and long sequences: time is cut into parts, and a first launch with CARRIES_ONLY runs the recurrence alone
// (tile.cuh).
//
// Compile-time, besides tile.cuh's: CARRIES_ONLY ZOH SHARED_BYTES BLOCKS_PER_SM. All are set by mambacupy/ops/, with the reasons.
#define COEFFICIENT_PADDING 16
#include "tile.cuh"

struct alignas(2 * sizeof(real)) Step { real dt, dtu; };               // Δ and Δ·u of one element
constexpr int PARTS = LANES < 4 ? LANES : 4;                           // parts of Σ_n C·h left to `finish`
struct alignas(PARTS * sizeof(real) < 16 ? PARTS * sizeof(real) : 16) Parts { real at[PARTS]; };
constexpr int B_LOADS = coefficient_loads<B_VECTOR>(), C_LOADS = coefficient_loads<C_VECTOR>(), C_TURN = THREADS / 2;
constexpr bool COEFFICIENTS_AHEAD = B_LOADS <= 8 && C_LOADS <= 8;      // few enough to wait in registers
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
    long long dim, length, state, state_total, span, blocks_per_span, blocks_per_batch, groups_of_B, groups_of_C, splits;
    long long u_batch, u_row, delta_batch, delta_row, z_batch, z_row, y_batch, y_row;         // row: stride of the slow axis
    long long A_dim, A_state, D_dim, bias_dim, init_batch, init_dim, init_state;
    long long B_batch, B_group, B_state, B_time, B_imag, C_batch, C_group, C_state, C_time, C_imag;
    long long delta_softplus, first_block;
};

struct Shared {                                                        // double-buffered but for the last
    Step steps[2][TILE][BLOCK_CHANNELS];
    Parts parts[CARRIES_ONLY ? 1 : 2][CARRIES_ONLY ? 1 : TILE][BLOCK_CHANNELS];
    alignas(16) state_t B[2][B_VARIES ? TILE * COEFFICIENT_PITCH : 1];
    alignas(16) state_t C[2][C_STAGED ? TILE * COEFFICIENT_PITCH : 1];
    real skip[BLOCK_CHANNELS], bias[BLOCK_CHANNELS];                   // D and delta_bias
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "SHARED_BYTES is computed in ops/mapping.py");

// State i of a lane. Neighbouring lanes hold neighbouring 16 bytes, so that they read B and C without conflicts.
DEVICE int state_of(int lane, int i) {
    constexpr int SIDE_BY_SIDE = 16 / sizeof(state_t) < SLOTS ? 16 / sizeof(state_t) : SLOTS;
    return i / SIDE_BY_SIDE * (LANES * SIDE_BY_SIDE) + lane * SIDE_BY_SIDE + i % SIDE_BY_SIDE;
}

struct Inputs {                                                        // of one step: what a lane reads from shared memory
    Step step[CHANNELS];
    state_t B[SLOTS], C[SLOTS];

    DEVICE Inputs(const Shared& shared, int buffer, int t_round, int j, int lane, int group) {
        const int t = t_round + j;
#pragma unroll
        for (int k = 0; k < CHANNELS; ++k)
            step[k] = shared.steps[buffer][t][column<sizeof(Step)>(k * GROUPS + group, t_round + row_of_column(j))];
#pragma unroll
        for (int i = 0; i < SLOTS; ++i) {
            if (B_VARIES) B[i] = shared.B[buffer][t * COEFFICIENT_PITCH + state_of(lane, i)];
            if (C_STAGED) C[i] = shared.C[buffer][t * COEFFICIENT_PITCH + state_of(lane, i)];
        }
    }
};

extern "C" __global__ void __launch_bounds__(2 * THREADS, BLOCKS_PER_SM) selective_scan_fwd(const Params p) {
    extern __shared__ __align__(16) char shared_bytes[];
    Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);

    const Block block(p.first_block + blockIdx.x, p.splits, p.span, p.blocks_per_span, p.blocks_per_batch);
    const Split time(block.split, p.splits, p.length);
    const long long b = block.b, c0 = block.c0;
    const int channels = block.channels;
    Coefficient<B_T> B = {p.B, p.B_state, p.B_time, p.B_imag};
    Coefficient<C_T> C = {p.C, p.C_state, p.C_time, p.C_imag};
    if (B_VARIES) B.base += b * p.B_batch + c0 / (p.dim / p.groups_of_B) * p.B_group;
    if (C_VARIES) C.base += b * p.C_batch + c0 / (p.dim / p.groups_of_C) * p.C_group;

    const bool does_elements = threadIdx.x >= THREADS;                 // the other half does the recurrence

    // ------------------------------------------------------------------------------------------ what a lane keeps
    const int lane = worker() % LANES, group = worker() / LANES;
    state_t h[CHANNELS][SLOTS], rate[CHANNELS][SLOTS], B_kept[CHANNELS][SLOTS], C_kept[CHANNELS][SLOTS];
    Memory<CHANNELS> memory;
#if ZOH
    state_t A_kept[CHANNELS][SLOTS];
#endif
#pragma unroll
    for (int k = 0; k < CHANNELS; ++k) {
#pragma unroll
        for (int i = 0; i < SLOTS; ++i) {
            int n = state_of(lane, i);
            long long c = c0 + k * GROUPS + group;
            state_t a = {}, start = {}, b_const = {}, c_const = {};
            if (!does_elements && k * GROUPS + group < channels && n < p.state) {
                a = bounded(p.A[c * p.A_dim + n * p.A_state]);
                memory.add_state(k, real_part(rate_of(a)));
                if (CARRIES_ONLY) start = {};
                else if (p.splits > 1) start = p.carries[((b * p.splits + block.split) * p.dim + c) * p.state_total + n];
                else if (p.initial_state) start = p.initial_state[b * p.init_batch + c * p.init_dim + n * p.init_state];
                if (!B_VARIES) b_const = reinterpret_cast<const state_t*>(p.B)[c * p.B_group + n * p.B_state];
                if (!C_VARIES && !CARRIES_ONLY) c_const = reinterpret_cast<const state_t*>(p.C)[c * p.C_group + n * p.C_state];
            }
            h[k][i] = start;
            rate[k][i] = rate_of(a);
            B_kept[k][i] = b_const;
            C_kept[k][i] = c_const;
#if ZOH
            A_kept[k][i] = a;
#endif
        }
    }
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

    // ------------------------------------------------------------------------------------------ elements
    // Items that are on their way: of the tile to be prepared next, and of the one to be finished next. u is read for both,
    // because two tiles of it would fill too many registers meanwhile.
    Pack<element, VECTOR> u_next[ITEMS], delta_next[ITEMS], u_done[ITEMS], z_done[ITEMS];
    Pack<B_T, B_VECTOR * REALS> B_next[COEFFICIENTS_AHEAD ? B_LOADS : 1];
    Pack<C_T, C_VECTOR * REALS> C_next[COEFFICIENTS_AHEAD ? C_LOADS : 1];
    auto load_B = [&](int k, long long t0, int tile_steps) {
        return load_coefficient<B_TIME_FAST, B_VECTOR>(k, 0, B, t0, tile_steps, (int)p.state);
    };
    auto load_C = [&](int k, long long t0, int tile_steps) {
        return load_coefficient<C_TIME_FAST, C_VECTOR>(k, C_TURN, C, t0, tile_steps, (int)p.state);
    };
    auto steps_in = [&](long long t0) { return p.length - t0 < TILE ? (int)(p.length - t0) : TILE; };

    auto load = [&](long long t0) {
        const element* u = p.u + b * p.u_batch + tile_offset(t0, c0, p.u_row);
        const element* delta = p.delta + b * p.delta_batch + tile_offset(t0, c0, p.delta_row);
        const int tile_steps = steps_in(t0);
#pragma unroll
        for (int k = 0; k < ITEMS; ++k) {
            Item item(k, channels, tile_steps);
            u_next[k] = load_pack<element, VECTOR>(u + item.offset(p.u_row), item.valid);
            delta_next[k] = load_pack<element, VECTOR>(delta + item.offset(p.delta_row), item.valid);
        }
#pragma unroll
        for (int k = 0; k < (COEFFICIENTS_AHEAD && B_VARIES ? B_LOADS : 0); ++k) B_next[k] = load_B(k, t0, tile_steps);
#pragma unroll
        for (int k = 0; k < (COEFFICIENTS_AHEAD && C_STAGED ? C_LOADS : 0); ++k) C_next[k] = load_C(k, t0, tile_steps);
    };

    auto load_to_finish = [&](long long t0) {
        const element* u = p.u + b * p.u_batch + tile_offset(t0, c0, p.u_row);
        const element* z = p.z + b * p.z_batch + tile_offset(t0, c0, p.z_row);
#pragma unroll
        for (int k = 0; k < (CARRIES_ONLY ? 0 : ITEMS); ++k) {
            Item item(k, channels, steps_in(t0));
            if (p.D) u_done[k] = load_pack<element, VECTOR>(u + item.offset(p.u_row), item.valid);
            if (p.z) z_done[k] = load_pack<element, VECTOR>(z + item.offset(p.z_row), item.valid);
        }
    };

    auto prepare = [&](long long t0, int buffer) {
        const int tile_steps = steps_in(t0);
#pragma unroll(COEFFICIENTS_AHEAD ? B_LOADS : 2)
        for (int k = 0; k < (B_VARIES ? B_LOADS : 0); ++k) {
            if (!COEFFICIENTS_AHEAD) B_next[0] = load_B(k, t0, tile_steps);
            stage_coefficient<B_TIME_FAST, B_VECTOR, B_T>(k, 0, shared.B[buffer], B_next[COEFFICIENTS_AHEAD ? k : 0]);
        }
#pragma unroll(COEFFICIENTS_AHEAD ? C_LOADS : 2)
        for (int k = 0; k < (C_STAGED ? C_LOADS : 0); ++k) {
            if (!COEFFICIENTS_AHEAD) C_next[0] = load_C(k, t0, tile_steps);
            stage_coefficient<C_TIME_FAST, C_VECTOR, C_T>(k, C_TURN, shared.C[buffer], C_next[COEFFICIENTS_AHEAD ? k : 0]);
        }
#pragma unroll
        for (int k = 0; k < ITEMS; ++k) {
            Item item(k, channels, tile_steps);
            real dt[VECTOR];
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) dt[j] = to_real(delta_next[k].get(j)) + shared.bias[item.channel(j) % BLOCK_CHANNELS];
            if (p.delta_softplus) softplus_each(dt);
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                if (j >= item.valid) dt[j] = 0;                        // after softplus: a step of 0 leaves h as it is
                Step step = {dt[j], dt[j] * to_real(u_next[k].get(j))};
                const int at = column<sizeof(Step)>(item.channel(j), item.first_row());
                if (item.in_tile(k)) shared.steps[buffer][item.row(j)][at] = step;
            }
        }
    };

    auto finish = [&](long long t0, int buffer) {
#pragma unroll
        for (int k = 0; k < (CARRIES_ONLY ? 0 : ITEMS); ++k) {
            Item item(k, channels, steps_in(t0));
            if (!item.in_tile(k)) continue;
            long long at = b * p.y_batch + tile_offset(t0, c0, p.y_row) + item.offset(p.y_row);
            real sum[VECTOR];
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                Parts part = shared.parts[buffer][item.row(j)][column<sizeof(Parts)>(item.channel(j), item.first_row())];
                sum[j] = part.at[0];
#pragma unroll
                for (int i = 1; i < PARTS; ++i) sum[j] += part.at[i];
                if (COMPLEX) sum[j] *= real(2);
            }
            if (p.parts_in) {
#pragma unroll
                for (int j = 0; j < VECTOR; ++j) if (j < item.valid) sum[j] += p.parts_in[at + j];
            }
            if (p.parts_out) {
#pragma unroll
                for (int j = 0; j < VECTOR; ++j) if (j < item.valid) p.parts_out[at + j] = sum[j];
                continue;
            }
            if (p.D) {
#pragma unroll
                for (int j = 0; j < VECTOR; ++j) sum[j] += shared.skip[item.channel(j)] * to_real(u_done[k].get(j));
            }
            if (p.z) {
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
            store_pack<element, VECTOR>(p.y + at, out, item.valid);
        }
    };

    // ------------------------------------------------------------------------------------------ recurrence
    const long long chunks = (p.length + CHUNK - 1) / CHUNK;
    auto advance = [&](long long t0, int buffer) {
        const int tile_steps = steps_in(t0);
        bool chunk_begins = REVERSE ? (t0 + TILE) % CHUNK == 0 || t0 + TILE >= p.length : t0 % CHUNK == 0;
        if (p.states && chunk_begins) write_states(p.states + (b * chunks + t0 / CHUNK) * p.dim * p.state_total);
        // Rows past the end have dt = 0: whole rounds of them are left out, a rest of a round does no harm.
        const int first_row = REVERSE ? (TILE - tile_steps) / UNROLL * UNROLL : 0;
        const int end_row = REVERSE ? TILE : tile_steps;
        // Reads run a step ahead, and parts are written once a round, because a write to shared memory holds back all reads
        // that follow it.
        Inputs next(shared, buffer, first_row, 0, lane, group);
#pragma unroll 1
        for (int t_round = first_row; t_round < end_row; t_round += UNROLL) {
            real part[UNROLL][CHANNELS];
#pragma unroll
            for (int j = 0; j < UNROLL; ++j) {
                const Inputs now = next;
                next = j + 1 < UNROLL ? Inputs(shared, buffer, t_round, j + 1, lane, group)
                                      : Inputs(shared, buffer, (t_round + UNROLL) % TILE, 0, lane, group);   // at the end, any
#pragma unroll
                for (int k = 0; k < CHANNELS; ++k) {
                    const Step s = now.step[k];
                    part[j][k] = 0;
#pragma unroll
                    for (int i = 0; i < SLOTS; ++i) {
                        state_t a = decay(s.dt, rate[k][i]);
                        state_t input = s.dtu * (B_VARIES ? now.B[i] : B_kept[k][i]);
#if ZOH
                        input = input * phi(s.dt * A_kept[k][i], a);
#endif
                        h[k][i] = multiply_add(a, h[k][i], input);
                        part[j][k] = real_product(h[k][i], C_VARIES ? now.C[i] : C_kept[k][i], part[j][k]);
                    }
                }
            }
#pragma unroll
            for (int j = 0; j < UNROLL; ++j) {
#pragma unroll
                for (int k = 0; k < CHANNELS; ++k) {
#pragma unroll
                    for (int step = LANES / 2; step >= 4; step /= 2) part[j][k] += __shfl_xor_sync(~0u, part[j][k], step);
                    const int at = column<sizeof(Parts)>(k * GROUPS + group, t_round + row_of_column(j));
                    if (LANES <= 4 || lane < PARTS) shared.parts[buffer][t_round + j][at].at[lane % PARTS] = part[j][k];
                }
            }
        }
    };

    // What a part of time hands on, in one of two ways (tile.cuh): against time, gathered as Σ_t exp(A·S_t)·input_t, where S_t is
    // Σ Δ of the steps after t; or in order, by the recurrence.
    auto carry_tile = [&](int buffer, bool gathers) {
#pragma unroll 8
        for (int step = 0; step < TILE; ++step) {
            const int t = gathers ? TILE - 1 - step : step;
            const Inputs now(shared, buffer, t / VECTOR * VECTOR, t % VECTOR, lane, group);
#pragma unroll
            for (int k = 0; k < CHANNELS; ++k) {
#pragma unroll
                for (int i = 0; i < SLOTS; ++i) {
                    const state_t a = decay(gathers ? memory.total[k] : now.step[k].dt, rate[k][i]);
                    state_t input = now.step[k].dtu * (B_VARIES ? now.B[i] : B_kept[k][i]);
#if ZOH
                    input = input * phi(now.step[k].dt * A_kept[k][i], gathers ? decay(now.step[k].dt, rate[k][i]) : a);
#endif
                    h[k][i] = gathers ? multiply_add(a, input, h[k][i]) : multiply_add(a, h[k][i], input);
                }
                memory.pass(k, now.step[k].dt);
            }
        }
    };

    // ------------------------------------------------------------------------------------------ the walk
    for (int c = threadIdx.x; c < BLOCK_CHANNELS; c += 2 * THREADS) {
        shared.skip[c] = p.D && c < channels ? p.D[(c0 + c) * p.D_dim] : real(0);
        shared.bias[c] = p.delta_bias && c < channels ? p.delta_bias[(c0 + c) * p.bias_dim] : real(0);
    }
    __syncthreads();

    const bool gathers = CARRIES_ONLY && __syncthreads_and(p.delta_softplus && !memory.grows());
    const bool from_end = REVERSE != gathers;
    const int ahead = from_end ? -TILE : TILE;
    const long long tiles = (time.end - time.begin + TILE - 1) / TILE;
    long long t0 = from_end ? (time.end - 1) / TILE * TILE : time.begin;
    if (does_elements && tiles > 0) {
        load(t0);
        prepare(t0, 0);
        if (tiles > 1) load(t0 + ahead);
    }
    for (long long tile = 0; tile < tiles; ++tile, t0 += ahead) {
        const int buffer = tile & 1;
        if (!CARRIES_ONLY) __syncthreads();
        else if (__syncthreads_and(does_elements || (gathers && memory.is_exhausted()))) break;
        if (does_elements) {
            if (tile > 0) finish(t0 - ahead, buffer ^ 1);
            if (tile + 1 < tiles) prepare(t0 + ahead, buffer ^ 1);
            if (tile + 2 < tiles) load(t0 + 2 * ahead);
            load_to_finish(t0);
        } else if (!CARRIES_ONLY) {
            advance(t0, buffer);
        } else if (gathers) {
            carry_tile(buffer, true);
        } else {
            carry_tile(buffer, false);
        }
    }
    __syncthreads();
    if (does_elements) {
        if (tiles > 0) finish(t0 - ahead, (tiles - 1) & 1);
        return;
    }
    if (CARRIES_ONLY) {
        const long long batch_split = b * p.splits + block.split;
        write_states(p.carries + batch_split * p.dim * p.state_total);
#pragma unroll
        for (int k = 0; k < CHANNELS; ++k)
            if (lane == 0 && k * GROUPS + group < channels)
                p.totals[batch_split * p.dim + c0 + k * GROUPS + group] = memory.total[k];
    } else if (block.split == p.splits - 1) {
        write_states(p.last_state + b * p.dim * p.state_total);
    }
}
