// causal_conv1d_bwd.cu: the causal depthwise convolution, backward, for filters that fit into registers.
//
//   dp_t = dy_t·silu'(p_t), with p_t computed again      de_i = Σ_j w_j·dp_{i-j}      dw_j = Σ_t dp_t·e_{t+j}     dbias = Σ dp_t
//
// e is the initial state and then x (conv.cuh), and so de is the gradient of the one and then of the other; dfinal_state comes on
// top of its last WIDTH - 1 entries.
//
// Idea: as forward, with no shared memory. The gradient of a step depends on dp up to WIDTH - 1 steps later, so a thread computes
// those too:
//   channels contiguous   VECTOR channels a thread, windows of e and of dp sliding along; dx follows WIDTH - 1 steps behind, and
//                         a part of time is walked so much further than its end.
//   time contiguous       LANES lanes a part of a channel, VECTOR steps each in turn, with the packs before and after.
// What a part adds to dw and dbias is summed in registers (over lanes in a fixed order) and left in `parts`, (batch, splits,
// WIDTH then bias, dim); sum_parts.cu adds them up.
//
// VECTOR divides the contiguous axis, the strides and the addresses of x, dy and dx.
//
// Compile-time: as causal_conv1d.cu, and DY_T.
#include "conv.cuh"

constexpr int THREADS = 128;
constexpr int BEFORE = WIDTH - 1;

struct Params {
    const element* x;
    const DY_T* dy;
    const W_T *weight, *bias;
    const element *initial_state, *dfinal_state;
    element *dx, *dinitial_state;                                      // dinitial_state may be null
    real* parts;
    long long batch, dim, length, steps, splits;
    long long x_batch, x_row, dy_batch, dy_row, dx_batch, dx_row;      // row: stride of the slow axis
    long long weight_dim, weight_tap, bias_dim, init_batch, init_dim, init_tap, dfinal_batch, dfinal_dim, dfinal_tap, first_block;
};

#if TIME_CONTIGUOUS

constexpr int HALO = (BEFORE + VECTOR - 1) / VECTOR;                   // packs that hold what lies before one, or after it
DEVICE constexpr int place(int j) { return REVERSE ? VECTOR - 1 - j : j; }                    // in memory, of walked element j

extern "C" __global__ void __launch_bounds__(THREADS) causal_conv1d_bwd(const Params p) {
    const long long group = ((p.first_block + blockIdx.x) * THREADS + threadIdx.x) / LANES;
    const long long split = group % p.splits, row = group / p.splits, c = row % p.dim, b = row / p.dim;
    const int lane = threadIdx.x % LANES;
    const bool exists = b < p.batch;                                   // the others stay for the sums across lanes
    const long long begin = split * p.steps, end = !exists ? 0 : begin + p.steps < p.length ? begin + p.steps : p.length;
    const element* x = p.x + b * p.x_batch + c * p.x_row;
    const DY_T* dy = p.dy + b * p.dy_batch + c * p.dy_row;
    element* dx = p.dx + b * p.dx_batch + c * p.dx_row;
    const element* initial = p.initial_state ? p.initial_state + b * p.init_batch + c * p.init_dim : nullptr;
    const element* dfinal = p.dfinal_state ? p.dfinal_state + b * p.dfinal_batch + c * p.dfinal_dim : nullptr;
    auto in_memory = [&](long long s) { return REVERSE ? p.length - VECTOR - s : s; };        // of the pack walked from s on

    real w[WIDTH] = {}, bias = exists && p.bias ? to_real(p.bias[c * p.bias_dim]) : real(0);
    real sums[WIDTH + 1] = {};                                         // dw, dbias
#pragma unroll
    for (int k = 0; k < WIDTH; ++k) if (exists) w[k] = to_real(p.weight[c * p.weight_dim + k * p.weight_tap]);

    for (long long s0 = begin + lane * VECTOR; s0 < end; s0 += LANES * VECTOR) {
        Pack<element, VECTOR> x_packs[2 * HALO + 1];
        Pack<DY_T, VECTOR> dy_packs[HALO + 1];
#pragma unroll
        for (int q = 0; q <= 2 * HALO; ++q) {
            const long long s = s0 + (q - HALO) * VECTOR;
            x_packs[q] = {};
            if (s >= 0 && s < p.length) x_packs[q] = load_pack<element, VECTOR>(x + in_memory(s), VECTOR);
        }
#pragma unroll
        for (int q = 0; q <= HALO; ++q) {
            const long long s = s0 + q * VECTOR;
            dy_packs[q] = {};
            if (s < p.length) dy_packs[q] = load_pack<DY_T, VECTOR>(dy + in_memory(s), VECTOR);
        }
        real e[(2 * HALO + 1) * VECTOR];                               // from HALO·VECTOR steps before s0 on
#pragma unroll
        for (int i = 0; i < (2 * HALO + 1) * VECTOR; ++i) e[i] = to_real(x_packs[i / VECTOR].get(place(i % VECTOR)));
        if (initial && s0 < HALO * VECTOR) {
#pragma unroll
            for (int i = 0; i < HALO * VECTOR; ++i) {
                const long long s = s0 - HALO * VECTOR + i;
                if (s < 0 && s >= -BEFORE) e[i] = to_real(initial[(BEFORE + s) * p.init_tap]);
            }
        }
        real dp[VECTOR + BEFORE];                                      // from s0 on
#pragma unroll
        for (int v = 0; v < VECTOR + BEFORE; ++v) {
            real sum = bias;
#pragma unroll
            for (int k = 0; k < WIDTH; ++k) sum += w[k] * e[HALO * VECTOR - BEFORE + v + k];
            real gradient = before_activation(to_real(dy_packs[v / VECTOR].get(place(v % VECTOR))), sum);
            dp[v] = s0 + v < p.length ? gradient : real(0);
        }
        Pack<element, VECTOR> out = {};
#pragma unroll
        for (int v = 0; v < VECTOR; ++v) {
#pragma unroll
            for (int k = 0; k < WIDTH; ++k) sums[k] += dp[v] * e[HALO * VECTOR - BEFORE + v + k];
            sums[WIDTH] += dp[v];
            real sum = 0;
#pragma unroll
            for (int k = 0; k < WIDTH; ++k) sum += w[k] * dp[v + BEFORE - k];
            const long long after = s0 + v + BEFORE - p.length;        // not negative: an entry of the final state
            if (dfinal && after >= 0) sum += to_real(dfinal[after * p.dfinal_tap]);
            out.set(place(v), rounded(sum));
        }
        store_pack<element, VECTOR>(dx + in_memory(s0), out, VECTOR);
        if (p.dinitial_state && s0 == 0) {
#pragma unroll
            for (int i = 0; i < BEFORE; ++i) {
                real sum = 0;
#pragma unroll
                for (int k = 0; k <= i; ++k) sum += w[k] * dp[i - k];
                if (dfinal && i >= p.length) sum += to_real(dfinal[(i - p.length) * p.dfinal_tap]);
                p.dinitial_state[(b * p.dim + c) * BEFORE + i] = rounded(sum);
            }
        }
    }

    const int count = WIDTH + (p.bias != nullptr);
#pragma unroll
    for (int k = 0; k <= WIDTH; ++k) {
#pragma unroll
        for (int step = LANES / 2; step > 0; step /= 2) sums[k] += __shfl_xor_sync(~0u, sums[k], step);
        if (exists && lane == 0 && k < count) p.parts[((b * p.splits + split) * count + k) * p.dim + c] = sums[k];
    }
}

#else

constexpr int ROUND = VECTOR * sizeof(element) < 16 ? 4 : 2;           // steps whose loads are under way at a time
constexpr int REALS = VECTOR < 16 / (int)sizeof(real) ? VECTOR : 16 / (int)sizeof(real);      // written by one instruction

extern "C" __global__ void __launch_bounds__(THREADS) causal_conv1d_bwd(const Params p) {
    const long long thread = (p.first_block + blockIdx.x) * THREADS + threadIdx.x, packs = p.dim / VECTOR;
    const long long c = thread % packs * VECTOR, split = thread / packs % p.splits, b = thread / packs / p.splits;
    if (b >= p.batch) return;
    const long long begin = split * p.steps, end = begin + p.steps < p.length ? begin + p.steps : p.length;
    const element* x = p.x + b * p.x_batch + walk_origin(p.length, p.x_row) + c;
    const DY_T* dy = p.dy + b * p.dy_batch + walk_origin(p.length, p.dy_row) + c;
    element* dx = p.dx + b * p.dx_batch + walk_origin(p.length, p.dx_row) + c;
    const long long x_step = walk_stride(p.x_row), dy_step = walk_stride(p.dy_row), dx_step = walk_stride(p.dx_row);

    real w[WIDTH][VECTOR], bias[VECTOR], dw[WIDTH][VECTOR] = {}, dbias[VECTOR] = {};
    real e[WIDTH][VECTOR], dp[WIDTH][VECTOR] = {};                     // the last WIDTH steps walked, the latest last
#pragma unroll
    for (int i = 0; i < VECTOR * WIDTH; i += WEIGHT_VECTOR) {
        Pack<W_T, WEIGHT_VECTOR> some = load_pack<W_T, WEIGHT_VECTOR>(
            WEIGHT_VECTOR > 1 ? p.weight + c * WIDTH + i : p.weight + (c + i / WIDTH) * p.weight_dim + i % WIDTH * p.weight_tap,
            WEIGHT_VECTOR);
#pragma unroll
        for (int j = 0; j < WEIGHT_VECTOR; ++j) w[(i + j) % WIDTH][(i + j) / WIDTH] = to_real(some.get(j));
    }
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) bias[v] = p.bias ? to_real(p.bias[(c + v) * p.bias_dim]) : real(0);
#pragma unroll
    for (int k = 1; k < WIDTH; ++k) {                                  // what the first step of this part looks back on
        const long long s = begin - WIDTH + k;
        Pack<element, VECTOR> pack = {};
        if (s >= 0) pack = load_pack<element, VECTOR>(x + s * x_step, VECTOR);
#pragma unroll
        for (int v = 0; v < VECTOR; ++v) {
            e[k][v] = to_real(pack.get(v));
            if (s < 0 && p.initial_state)
                e[k][v] = to_real(p.initial_state[b * p.init_batch + (c + v) * p.init_dim + (BEFORE + s) * p.init_tap]);
        }
    }

    Pack<element, VECTOR> x_ahead[ROUND];
    Pack<DY_T, VECTOR> dy_ahead[ROUND];
    const long long behind = end + BEFORE;                             // where the walk ends, so that dx has followed to `end`
    auto load = [&](long long s) {
#pragma unroll
        for (int j = 0; j < ROUND; ++j) {
            x_ahead[j] = {};
            dy_ahead[j] = {};
            if (s + j >= behind || s + j >= p.length) continue;
            x_ahead[j] = load_pack<element, VECTOR>(x + (s + j) * x_step, VECTOR);
            dy_ahead[j] = load_pack<DY_T, VECTOR>(dy + (s + j) * dy_step, VECTOR);
        }
    };
    load(begin);
    for (long long s_round = begin; s_round < behind; s_round += ROUND) {
        Pack<element, VECTOR> x_now[ROUND];
        Pack<DY_T, VECTOR> dy_now[ROUND];
#pragma unroll
        for (int j = 0; j < ROUND; ++j) {
            x_now[j] = x_ahead[j];
            dy_now[j] = dy_ahead[j];
        }
        load(s_round + ROUND);
#pragma unroll
        for (int j = 0; j < ROUND; ++j) {
            const long long s = s_round + j;
            if (s >= behind) break;
            real de[VECTOR];                                           // of entry s, which is step s - BEFORE of x
#pragma unroll
            for (int v = 0; v < VECTOR; ++v) {
#pragma unroll
                for (int k = 0; k < BEFORE; ++k) {
                    e[k][v] = e[k + 1][v];
                    dp[k][v] = dp[k + 1][v];
                }
                e[BEFORE][v] = to_real(x_now[j].get(v));
                real sum = bias[v];
#pragma unroll
                for (int k = 0; k < WIDTH; ++k) sum += w[k][v] * e[k][v];
                real gradient = before_activation(to_real(dy_now[j].get(v)), sum);
                dp[BEFORE][v] = s < p.length ? gradient : real(0);
                if (s < end) {                                         // later steps belong to the next part
#pragma unroll
                    for (int k = 0; k < WIDTH; ++k) dw[k][v] += dp[BEFORE][v] * e[k][v];
                    dbias[v] += dp[BEFORE][v];
                }
                de[v] = 0;
#pragma unroll
                for (int k = 0; k < WIDTH; ++k) de[v] += w[k][v] * dp[BEFORE - k][v];
                if (p.dfinal_state && s >= p.length)
                    de[v] += to_real(p.dfinal_state[b * p.dfinal_batch + (c + v) * p.dfinal_dim + (s - p.length) * p.dfinal_tap]);
            }
            if (s >= begin + BEFORE) {
                Pack<element, VECTOR> out = {};
#pragma unroll
                for (int v = 0; v < VECTOR; ++v) out.set(v, rounded(de[v]));
                store_pack<element, VECTOR>(dx + (s - BEFORE) * dx_step, out, VECTOR);
            } else if (p.dinitial_state && begin == 0) {
#pragma unroll
                for (int v = 0; v < VECTOR; ++v) p.dinitial_state[(b * p.dim + c + v) * BEFORE + s] = rounded(de[v]);
            }
        }
    }

    const int count = WIDTH + (p.bias != nullptr);
    real* parts = p.parts + (b * p.splits + split) * count * p.dim + c;
#pragma unroll
    for (int k = 0; k <= WIDTH; ++k) {
        if (k == count) break;
#pragma unroll
        for (int v = 0; v < VECTOR; v += REALS) {
            Pack<real, REALS> out = {};
#pragma unroll
            for (int j = 0; j < REALS; ++j) out.set(j, k < WIDTH ? dw[k < WIDTH ? k : 0][v + j] : dbias[v + j]);
            store_pack<real, REALS>(parts + k * p.dim + v, out, REALS);
        }
    }
}

#endif
