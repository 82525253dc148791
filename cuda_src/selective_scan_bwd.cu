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
// Few channels and long sequences: time is cut into parts, and a first launch with CARRIES_ONLY runs [1] alone (tile.cuh).
//
// Sums over time are kept in two levels, a chunk's and the total, so that rounding does not grow with the length.
// No atomics: dB and dC are summed over a warp by exchange, over warps in shared memory, and over blocks by sum_parts.cu; dA,
// dD and ddelta_bias over time by their threads, and over the batch by sum_parts.cu. Every order is fixed.
//
// Compile-time, besides tile.cuh's: CARRIES_ONLY DY_T ZOH SHARED_BYTES BLOCKS_PER_SM.
#include "tile.cuh"

constexpr int SEGMENT = 8, SEGMENTS = CHUNK / SEGMENT;                 // steps whose Ā and h a lane holds at once
constexpr int WARPS = THREADS / 32;
constexpr bool SUMS_OVER_CHANNELS = B_VARIES || C_VARIES;
constexpr int EXCHANGED = SEGMENT * SLOTS * 2;                         // dB and dC of a segment in one lane
constexpr int SHARERS = THREADS / BLOCK_CHANNELS;                      // threads that sum one channel over time
static_assert(TILE == CHUNK, "a tile is a chunk");
static_assert(TILE % (4 * SHARERS) == 0, "threads of a channel share its steps evenly");
static_assert(BLOCK_CHANNELS <= THREADS, "a thread sums at most one channel over time");
static_assert(CHANNELS == 1 || LANES > 1, "two channels are told apart by neighbouring lanes");

struct alignas(2 * sizeof(real)) Step { real dt, x; };                 // Δ, and Δ·u (zero-order hold: u)

struct Shared {
    Step steps[TILE][BLOCK_CHANNELS];                                  // after the backward step: Σ_n λ·B and Σ_n λ·A·Ā·h
    real gates[TILE][BLOCK_CHANNELS];                                  // gy; after the backward step: Σ_n C·h
    state_t starts[SEGMENTS][CHANNELS][SLOTS][THREADS];                // h before each segment; every thread reads its own
    state_t B[B_VARIES ? TILE * COEFFICIENT_PITCH : 1], C[C_VARIES ? TILE * COEFFICIENT_PITCH : 1];
    state_t warp_sums[2][WARPS][SUMS_OVER_CHANNELS ? SEGMENT : 1][2][STATES];                 // double-buffered
    state_t totals[1 + !B_VARIES + !C_VARIES][CHANNELS][SLOTS][THREADS];                      // dA, constant dB and dC so far
    real skip[BLOCK_CHANNELS], bias[BLOCK_CHANNELS];
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
    element *du, *ddelta, *dz;
    state_t *dinitial_state, *dA_parts, *dB_parts, *dC_parts;
    real *dD_parts, *dbias_parts;
    const real* sums_in;                                               // (3, like du): sums over earlier slices of the states
    real* sums_out;                                                    // not null: more slices follow
    long long dim, length, state, state_total, span, blocks_per_span, blocks_per_batch, groups_of_B, groups_of_C, splits;
    long long u_batch, u_row, delta_batch, delta_row, z_batch, z_row, dy_batch, dy_row, du_batch, du_row, plane;
    long long A_dim, A_state, D_dim, bias_dim, dlast_batch, dlast_dim, dlast_state_stride;
    long long B_batch, B_group, B_state, B_time, B_imag, C_batch, C_group, C_state, C_time, C_imag;
    long long delta_softplus, first_block;
};

// A from its rate, to be summed over n: a real one is left in its unit, and the sum is brought back by A_UNIT.
DEVICE float A_for_sum(float rate) { return rate; }
DEVICE double A_for_sum(double rate) { return rate; }
template <typename R> DEVICE Complex<R> A_for_sum(Complex<R> rate) { return {rate.re * R(1 / LOG2_E), rate.im}; }
constexpr real A_UNIT = ZOH || COMPLEX ? 1 : 1 / LOG2_E;

// Sum over the lane groups of a warp. Of its `count` values a lane keeps 1 of every (32 / LANES), at the front; which ones
// is told by `first`, the index of v[0] in the lane's share.
template <int COUNT>
DEVICE int exchange(real (&v)[COUNT]) {
    int first = 0, count = COUNT;
#pragma unroll
    for (int offset = 16; offset >= LANES; offset /= 2) {
        const bool upper = threadIdx.x & offset;
        if (count == 1) { v[0] += __shfl_xor_sync(~0u, v[0], offset); continue; }
        count /= 2;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            if (i >= count) continue;
            real keep = upper ? v[i + count] : v[i], give = upper ? v[i] : v[i + count];
            v[i] = keep + __shfl_xor_sync(~0u, give, offset);
        }
        if (upper) first += count;
    }
    return first;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) selective_scan_bwd(const Params p) {
    extern __shared__ __align__(16) char shared_bytes[];
    Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);

    const Block block(p.first_block + blockIdx.x, p.splits, p.span, p.blocks_per_span, p.blocks_per_batch);
    const Split time(block.split, p.splits, p.length);
    const long long b = block.b, c0 = block.c0, batch_split = b * p.splits + block.split;
    const int channels = block.channels;
    Coefficient<B_T> B = {p.B, p.B_state, p.B_time, p.B_imag};
    Coefficient<C_T> C = {p.C, p.C_state, p.C_time, p.C_imag};
    if (B_VARIES) B.base += b * p.B_batch + c0 / (p.dim / p.groups_of_B) * p.B_group;
    if (C_VARIES) C.base += b * p.C_batch + c0 / (p.dim / p.groups_of_C) * p.C_group;

    const long long chunks = (p.length + CHUNK - 1) / CHUNK;

    // ------------------------------------------------------------------------------------------ what a lane keeps
    const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
    // A lane's channel k. Odd lanes take their two the other way round: what one gives away in the first exchange of a sum
    // over n is then what its neighbour keeps.
    auto channel = [&](int k) { return CHANNELS == 2 ? group * 2 + (k ^ (lane & 1)) : group; };
    state_t rate[CHANNELS][SLOTS], A_kept[CHANNELS][SLOTS], B_kept[CHANNELS][SLOTS], C_kept[CHANNELS][SLOTS];
    state_t carry[CHANNELS][SLOTS], dA[CHANNELS][SLOTS], dB_kept[CHANNELS][SLOTS], dC_kept[CHANNELS][SLOTS];   // of a chunk
    constexpr int OF_B = 1, OF_C = 1 + !B_VARIES;                      // in shared.totals
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
#pragma unroll
    for (int k = 0; k < CHANNELS; ++k) {
#pragma unroll
        for (int i = 0; i < SLOTS; ++i) carry[k][i] = A_kept[k][i] = B_kept[k][i] = C_kept[k][i] = {};
    }
    for_states([&](int k, int i, long long c, int n) {
        A_kept[k][i] = p.A[c * p.A_dim + n * p.A_state];
        if (!B_VARIES) B_kept[k][i] = reinterpret_cast<const state_t*>(p.B)[c * p.B_group + n * p.B_state];
        if (!C_VARIES) C_kept[k][i] = reinterpret_cast<const state_t*>(p.C)[c * p.C_group + n * p.C_state];
        if (CARRIES_ONLY) return;
        if (p.splits > 1) carry[k][i] = p.carries[(batch_split * p.dim + c) * p.state_total + n];
        else if (p.dlast_state) carry[k][i] = p.dlast_state[b * p.dlast_batch + c * p.dlast_dim + n * p.dlast_state_stride];
    });
#pragma unroll
    for (int k = 0; k < CHANNELS; ++k) {
#pragma unroll
        for (int i = 0; i < SLOTS; ++i) {
            rate[k][i] = rate_of(A_kept[k][i]);
#pragma unroll
            for (int j = 0; j < 1 + !B_VARIES + !C_VARIES; ++j) shared.totals[j][k][i][threadIdx.x] = {};
        }
    }
    for (int c = threadIdx.x; c < BLOCK_CHANNELS; c += THREADS) {
        shared.skip[c] = p.D && c < channels ? p.D[(c0 + c) * p.D_dim] : real(0);
        shared.bias[c] = p.delta_bias && c < channels ? p.delta_bias[(c0 + c) * p.bias_dim] : real(0);
    }
    __syncthreads();

    struct Tensors { Pack<element, VECTOR> u, delta, z; Pack<DY_T, VECTOR> dy; };
    auto load = [&](int k, long long t0, int steps) {                  // item k of the tile that begins at t0
        const Item item(k, channels, steps);
        auto from = [&](auto* x, long long batch, long long row) {
            return x + recomputed(b) * batch + tile_offset(t0, c0, row) + item.offset(row);
        };
        Tensors x;
        x.u = load_pack<element, VECTOR>(from(p.u, p.u_batch, p.u_row), item.valid);
        x.delta = load_pack<element, VECTOR>(from(p.delta, p.delta_batch, p.delta_row), item.valid);
        x.dy = load_pack<DY_T, VECTOR>(from(p.dy, p.dy_batch, p.dy_row), item.valid);
        if (p.z) x.z = load_pack<element, VECTOR>(from(p.z, p.z_batch, p.z_row), item.valid);
        return x;
    };
    auto prefetch_tile = [&](long long t0) {                           // u, delta, z and dy of the tile that begins at t0
        constexpr int LINE = 128 / sizeof(element), ROW = TIME_CONTIGUOUS ? TILE : BLOCK_CHANNELS;
        constexpr int LINES = (ROW + LINE - 1) / LINE, ROWS = TIME_CONTIGUOUS ? BLOCK_CHANNELS : TILE;
        for (int i = threadIdx.x; i < ROWS * LINES; i += THREADS) {
            const int row = i / LINES, at = i % LINES * LINE, c = TIME_CONTIGUOUS ? row : at, t = TIME_CONTIGUOUS ? at : row;
            if (c >= channels || t0 + t >= p.length) continue;
            auto from = [&](auto* x, long long batch, long long stride) {
                return x + recomputed(b) * batch + tile_offset(t0 + t, c0 + c, stride);
            };
            prefetch(from(p.u, p.u_batch, p.u_row));
            prefetch(from(p.delta, p.delta_batch, p.delta_row));
            prefetch(from(p.dy, p.dy_batch, p.dy_row));
            if (p.z) prefetch(from(p.z, p.z_batch, p.z_row));
        }
    };

    real total[CHANNELS] = {};                                         // Σ Δ
    real dD = 0, dbias = 0, dD_lost = 0, dbias_lost = 0;               // of channel threadIdx.x % BLOCK_CHANNELS
    // One step forwards: Ā of every state, and h advanced.
    auto advance = [&](int t, state_t (&h)[CHANNELS][SLOTS], state_t (&a)[CHANNELS][SLOTS]) {
        state_t Bt[SLOTS];
#pragma unroll
        for (int i = 0; i < SLOTS; ++i) if (B_VARIES) Bt[i] = shared.B[t * COEFFICIENT_PITCH + lane * SLOTS + i];
#pragma unroll
        for (int k = 0; k < CHANNELS; ++k) {
            Step s = shared.steps[t][column<sizeof(Step)>(channel(k), t)];
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

    constexpr int BACK = REVERSE ? CHUNK : -CHUNK;                     // against the order in which time is walked
    long long t0 = REVERSE ? time.begin : (time.end - 1) / CHUNK * CHUNK;
    for (; REVERSE ? t0 < time.end : t0 >= time.begin; t0 += BACK) {
        const int steps = p.length - t0 < TILE ? (int)(p.length - t0) : TILE;

        // -------------------------------------------------------------------------------------- Δ, Δ·u, gy, B and C
#pragma unroll 2
        for (int k = 0; k < (B_VARIES ? coefficient_loads<B_VECTOR>() : 0); ++k) {
            auto raw = load_coefficient<B_TIME_FAST, B_VECTOR>(k, 0, B, t0, steps, (int)p.state);
            stage_coefficient<B_TIME_FAST, B_VECTOR, B_T>(k, 0, shared.B, raw);
        }
#pragma unroll 2
        for (int k = 0; k < (C_VARIES ? coefficient_loads<C_VECTOR>() : 0); ++k) {
            auto raw = load_coefficient<C_TIME_FAST, C_VECTOR>(k, 0, C, t0, steps, (int)p.state);
            stage_coefficient<C_TIME_FAST, C_VECTOR, C_T>(k, 0, shared.C, raw);
        }
        Tensors next = load(0, t0, steps);
#pragma unroll 1
        for (int k = 0; k < ITEMS; ++k) {
            const Item item(k, channels, steps);
            const Tensors now = next;
            if (k + 1 < ITEMS) next = load(k + 1, t0, steps);
            if (!item.in_tile(k)) continue;
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                real dt = to_real(now.delta.get(j)) + shared.bias[item.channel(j)], x = to_real(now.u.get(j));
                if (p.delta_softplus) dt = softplus(dt);
                if (j >= item.valid) dt = 0;
                real gy = to_real(now.dy.get(j));
                if (p.z) { real gate = to_real(now.z.get(j)); gy *= gate * sigmoid(gate); }
                shared.steps[item.row(j)][column<sizeof(Step)>(item.channel(j), item.first_row())] = {dt, ZOH ? x : dt * x};
                shared.gates[item.row(j)][column<sizeof(real)>(item.channel(j), item.first_row())] = gy;
            }
        }
        __syncthreads();

        if (CARRIES_ONLY) {
#pragma unroll 4
            for (int t = TILE - 1; t >= 0; --t) {
#pragma unroll
                for (int k = 0; k < CHANNELS; ++k) {
                    real dt = shared.steps[t][column<sizeof(Step)>(channel(k), t)].dt;
                    real gy = shared.gates[t][column<sizeof(real)>(channel(k), t)] * real(COMPLEX ? 2 : 1);
                    total[k] += dt;
#pragma unroll
                    for (int i = 0; i < SLOTS; ++i) {
                        state_t Cn = C_VARIES ? shared.C[t * COEFFICIENT_PITCH + lane * SLOTS + i] : C_kept[k][i];
                        carry[k][i] = conj(decay(dt, rate[k][i])) * (gy * conj(Cn) + carry[k][i]);           // [1]
                    }
                }
            }
            __syncthreads();
            continue;
        }

        if (REVERSE ? t0 + BACK < time.end : t0 > time.begin) prefetch_tile(t0 + BACK);

        // -------------------------------------------------------------------------------------- forwards: h of each segment
        state_t h[CHANNELS][SLOTS], a[CHANNELS][SLOTS];
#pragma unroll
        for (int k = 0; k < CHANNELS; ++k) {
#pragma unroll
            for (int i = 0; i < SLOTS; ++i) h[k][i] = dA[k][i] = dB_kept[k][i] = dC_kept[k][i] = {};
        }
        for_states([&](int k, int i, long long c, int n) {
            h[k][i] = p.states[((recomputed(b) * chunks + t0 / CHUNK) * p.dim + c) * p.state_total + n];
        });
#pragma unroll 1
        for (int segment = 0; segment < SEGMENTS; ++segment) {
#pragma unroll
            for (int k = 0; k < CHANNELS; ++k) {
#pragma unroll
                for (int i = 0; i < SLOTS; ++i) shared.starts[segment][k][i][threadIdx.x] = h[k][i];
            }
            if (segment == SEGMENTS - 1) break;
#pragma unroll
            for (int j = 0; j < SEGMENT; ++j) advance(segment * SEGMENT + j, h, a);
        }

        // -------------------------------------------------------------------------------------- backwards, by segments
#pragma unroll 1
        for (int segment = SEGMENTS - 1; segment >= 0; --segment) {
            state_t hs[SEGMENT + 1][CHANNELS][SLOTS], as[SEGMENT][CHANNELS][SLOTS];           // h before each step; its Ā
#pragma unroll
            for (int k = 0; k < CHANNELS; ++k) {
#pragma unroll
                for (int i = 0; i < SLOTS; ++i) hs[0][k][i] = shared.starts[segment][k][i][threadIdx.x];
            }
#pragma unroll
            for (int j = 0; j < SEGMENT; ++j) {
#pragma unroll
                for (int k = 0; k < CHANNELS; ++k) {
#pragma unroll
                    for (int i = 0; i < SLOTS; ++i) hs[j + 1][k][i] = hs[j][k][i];
                }
                advance(segment * SEGMENT + j, hs[j + 1], as[j]);
            }

            real sums[EXCHANGED * REALS];                              // [dB, dC][step][slot][re, im]
#pragma unroll
            for (int j = SEGMENT - 1; j >= 0; --j) {
                const int t = segment * SEGMENT + j;
                state_t Bt[SLOTS], Ct[SLOTS], dB[SLOTS] = {}, dC[SLOTS] = {};
#pragma unroll
                for (int i = 0; i < SLOTS; ++i) {
                    if (B_VARIES) Bt[i] = shared.B[t * COEFFICIENT_PITCH + lane * SLOTS + i];
                    if (C_VARIES) Ct[i] = shared.C[t * COEFFICIENT_PITCH + lane * SLOTS + i];
                }
                real by_B[CHANNELS] = {}, by_A[CHANNELS] = {}, out[CHANNELS] = {};            // Σ_n λ·B, Σ_n λ·A·Ā·h, Σ_n C·h
#pragma unroll
                for (int k = 0; k < CHANNELS; ++k) {
                    Step s = shared.steps[t][column<sizeof(Step)>(channel(k), t)];
                    real gy = shared.gates[t][column<sizeof(real)>(channel(k), t)] * real(COMPLEX ? 2 : 1);
#pragma unroll
                    for (int i = 0; i < SLOTS; ++i) {
                        state_t Bn = B_VARIES ? Bt[i] : B_kept[k][i], Cn = C_VARIES ? Ct[i] : C_kept[k][i];
                        state_t a_n = as[j][k][i], h_n = hs[j + 1][k][i];
                        state_t lambda = gy * conj(Cn) + carry[k][i];                         // [1]
                        out[k] = real_product(Cn, h_n, out[k]);
                        state_t dCn = gy * conj(h_n);                                         // [2]
                        state_t decayed = a_n * hs[j][k][i];                                  // Ā_t·h_{t-1}
#if ZOH
                        state_t angle = s.dt * A_kept[k][i], phi_n = phi(angle, a_n), uB = s.x * Bn;
                        state_t factor = s.dt * phi_n;
                        state_t dBn = s.x * (lambda * conj(factor));                          // [3]
                        state_t slope = s.dt * (s.dt * (phi_derivative(angle, a_n, phi_n) * uB));
                        dA[k][i] = multiply_add(lambda, conj(s.dt * decayed + slope), dA[k][i]);             // [4]
                        by_A[k] = real_product(lambda, conj(A_kept[k][i] * decayed + a_n * uB), by_A[k]);    // [5]
                        by_B[k] = real_product(lambda, conj(factor * Bn), by_B[k]);           // [6]
#else
                        state_t dBn = s.x * lambda;                                           // [3]
                        state_t pulled = lambda * conj(decayed);
                        dA[k][i] = s.dt * pulled + dA[k][i];                                  // [4]
                        by_A[k] = real_product(pulled, conj(A_for_sum(rate[k][i])), by_A[k]);      // [5], its part with A
                        by_B[k] = real_product(lambda, conj(Bn), by_B[k]);                    // [5] and [6]
#endif
                        carry[k][i] = conj(a_n) * lambda;
                        if (B_VARIES) dB[i] = dB[i] + dBn; else dB_kept[k][i] = dB_kept[k][i] + dBn;
                        if (C_VARIES) dC[i] = dC[i] + dCn; else dC_kept[k][i] = dC_kept[k][i] + dCn;
                    }
                }
                if (SUMS_OVER_CHANNELS) {
#pragma unroll
                    for (int i = 0; i < SLOTS; ++i) {
#pragma unroll
                        for (int r = 0; r < REALS; ++r) {
                            sums[(j * SLOTS + i) * REALS + r] = reinterpret_cast<real*>(&dB[i])[r];
                            sums[((SEGMENT + j) * SLOTS + i) * REALS + r] = reinterpret_cast<real*>(&dC[i])[r];
                        }
                    }
                }
                // The sums over n. After the first exchange every lane has the channel that `channel(0)` names.
#pragma unroll
                for (int offset = 1; offset < LANES; offset *= 2) {
                    bool swap = CHANNELS == 2 && offset == 1;
                    by_B[0] += __shfl_xor_sync(~0u, by_B[swap], offset);
                    by_A[0] += __shfl_xor_sync(~0u, by_A[swap], offset);
                    out[0] += __shfl_xor_sync(~0u, out[swap], offset);
                }
                __syncwarp();                                          // all lanes have read the entry
                if (lane < CHANNELS) {
                    shared.steps[t][column<sizeof(Step)>(channel(0), t)] = {by_B[0], by_A[0] * A_UNIT};
                    shared.gates[t][column<sizeof(real)>(channel(0), t)] = out[0];
                }
            }

            // ---------------------------------------------------------------------------------- dB and dC of the segment
            if (SUMS_OVER_CHANNELS) {
                const int first = exchange(sums), warp = threadIdx.x / 32;
                constexpr int KEPT = EXCHANGED * REALS * LANES / 32 > 0 ? EXCHANGED * REALS * LANES / 32 : 1;
                real* warp_sums = reinterpret_cast<real*>(&shared.warp_sums[segment & 1][warp][0][0][0]);
#pragma unroll
                for (int i = 0; i < KEPT; ++i) {
                    int at = first + i, r = at % REALS, slot = at / REALS % SLOTS, row = at / (REALS * SLOTS) % SEGMENT;
                    int which = at / (REALS * SLOTS * SEGMENT);
                    warp_sums[((row * 2 + which) * STATES + lane * SLOTS + slot) * REALS + r] = sums[i];
                }
            }
            __syncthreads();
            if (SUMS_OVER_CHANNELS) {
                for (int entry = threadIdx.x; entry < SEGMENT * 2 * STATES; entry += THREADS) {
                    int n = entry % STATES, which = entry / STATES % 2, row = entry / (2 * STATES);
                    int t = REVERSE ? TILE - 1 - (segment * SEGMENT + row) : segment * SEGMENT + row;
                    state_t* parts = which ? p.dC_parts : p.dB_parts;
                    if (!(which ? C_VARIES : B_VARIES) || t >= steps || n >= p.state) continue;
                    state_t sum = shared.warp_sums[segment & 1][0][row][which][n];
#pragma unroll
                    for (int w = 1; w < WARPS; ++w) sum = sum + shared.warp_sums[segment & 1][w][row][which][n];
                    parts[((recomputed(b) * p.blocks_per_batch + block.within) * p.length + t0 + t) * p.state_total + n] = sum;
                }
            }
        }

#pragma unroll
        for (int k = 0; k < CHANNELS; ++k) {
#pragma unroll
            for (int i = 0; i < SLOTS; ++i) {
                auto add = [&](int j, state_t x) { shared.totals[j][k][i][threadIdx.x] = shared.totals[j][k][i][threadIdx.x] + x; };
                add(0, dA[k][i]);
                if (!B_VARIES) add(OF_B, dB_kept[k][i]);
                if (!C_VARIES) add(OF_C, dC_kept[k][i]);
            }
        }

        // -------------------------------------------------------------------------------------- du, ddelta, dz
        const long long t1 = recomputed(t0);
        next = load(0, t1, steps);
#pragma unroll 1
        for (int k = 0; k < ITEMS; ++k) {
            const Item item(k, channels, steps);
            const Tensors now = next;
            if (k + 1 < ITEMS) next = load(k + 1, t1, steps);
            if (!item.in_tile(k)) continue;
            const long long at = b * p.du_batch + tile_offset(t1, c0, p.du_row) + item.offset(p.du_row);
            real by_B[VECTOR], by_A[VECTOR], out[VECTOR];
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                Step s = shared.steps[item.row(j)][column<sizeof(Step)>(item.channel(j), item.first_row())];
                by_B[j] = s.dt;
                by_A[j] = s.x;
                out[j] = shared.gates[item.row(j)][column<sizeof(real)>(item.channel(j), item.first_row())];
                if (COMPLEX) out[j] *= real(2);
            }
            if (p.sums_in) {
#pragma unroll
                for (int j = 0; j < VECTOR; ++j) {
                    if (j >= item.valid) continue;
                    by_B[j] += p.sums_in[at + j];
                    by_A[j] += p.sums_in[p.plane + at + j];
                    out[j] += p.sums_in[2 * p.plane + at + j];
                }
            }
            if (p.sums_out) {
#pragma unroll
                for (int j = 0; j < VECTOR; ++j) {
                    if (j >= item.valid) continue;
                    p.sums_out[at + j] = by_B[j];
                    p.sums_out[p.plane + at + j] = by_A[j];
                    p.sums_out[2 * p.plane + at + j] = out[j];
                }
                continue;
            }
            Pack<element, VECTOR> du, ddelta, dz;
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                const int c = item.channel(j);
                real x = to_real(now.u.get(j)), gy = to_real(now.dy.get(j));
                element rounded;
                if (p.z) {
                    real gate = to_real(now.z.get(j)), s = sigmoid(gate), skipped = out[j] + shared.skip[c] * x;
                    from_real(gy * skipped * s * (real(1) + gate * (real(1) - s)), rounded);  // [7]
                    dz.set(j, rounded);
                    gy *= gate * s;
                }
                real dt = to_real(now.delta.get(j)) + shared.bias[c], slope = 1;
                if (p.delta_softplus) softplus_and_slope(dt, dt, slope);
                real dstep = (ZOH ? by_A[j] : by_A[j] + x * by_B[j]) * slope;                 // [5]
                real dx = shared.skip[c] * gy + (ZOH ? by_B[j] : dt * by_B[j]);               // [6]
                from_real(dx, rounded);
                du.set(j, rounded);
                from_real(dstep, rounded);
                ddelta.set(j, rounded);
                Step terms = {j < item.valid ? gy * x : real(0), j < item.valid ? dstep : real(0)};
                shared.steps[item.row(j)][column<sizeof(Step)>(c, item.first_row())] = terms;
            }
            store_pack<element, VECTOR>(p.du + at, du, item.valid);
            store_pack<element, VECTOR>(p.ddelta + at, ddelta, item.valid);
            if (p.z) store_pack<element, VECTOR>(p.dz + at, dz, item.valid);
        }
        if (!p.sums_out && (p.D || p.delta_bias)) {
            __syncthreads();
            Step sum[4] = {};
#pragma unroll 1
            for (int t = threadIdx.x / BLOCK_CHANNELS; t < TILE; t += 4 * SHARERS) {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const int row = t + j * SHARERS;
                    Step terms = shared.steps[row][column<sizeof(Step)>(threadIdx.x % BLOCK_CHANNELS, row)];
                    sum[j] = {sum[j].dt + terms.dt, sum[j].x + terms.x};
                }
            }
            add_exactly(dD, dD_lost, (sum[0].dt + sum[1].dt) + (sum[2].dt + sum[3].dt));
            add_exactly(dbias, dbias_lost, (sum[0].x + sum[1].x) + (sum[2].x + sum[3].x));
        }
        __syncthreads();
    }

    if (CARRIES_ONLY) {
        for_states([&](int k, int i, long long c, int n) {
            p.carries[(batch_split * p.dim + c) * p.state_total + n] = carry[k][i];
            if (n == 0) p.totals[batch_split * p.dim + c] = total[k];
        });
        return;
    }

    // ------------------------------------------------------------------------------------------ sums over time
    for_states([&](int k, int i, long long c, int n) {
        if (p.dinitial_state && block.split == 0) p.dinitial_state[(b * p.dim + c) * p.state_total + n] = carry[k][i];
        long long at = (batch_split * p.dim + c) * p.state_total + n;
        p.dA_parts[at] = shared.totals[0][k][i][threadIdx.x];
        if (!B_VARIES) p.dB_parts[at] = shared.totals[OF_B][k][i][threadIdx.x];
        if (!C_VARIES) p.dC_parts[at] = shared.totals[OF_C][k][i][threadIdx.x];
    });
    if (p.sums_out) return;
    Step* shares = &shared.steps[0][0];                                // the threads of a channel add up in their order
    shares[threadIdx.x] = {dD, dbias};
    __syncthreads();
    if (threadIdx.x < channels) {
        for (int i = 1; i < SHARERS; ++i) {
            dD += shares[threadIdx.x + i * BLOCK_CHANNELS].dt;
            dbias += shares[threadIdx.x + i * BLOCK_CHANNELS].x;
        }
        long long at = batch_split * p.dim + c0 + threadIdx.x;
        if (p.D) p.dD_parts[at] = dD;
        if (p.delta_bias) p.dbias_parts[at] = dbias;
    }
}
