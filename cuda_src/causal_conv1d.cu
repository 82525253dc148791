// causal_conv1d.cu: the causal depthwise convolution, forward, for filters that fit into registers.
//
//   p_t = bias + Σ_j w_j·e_{t+j},   y_t = silu(p_t) or p_t                        (e: the initial state, then x; conv.cuh)
//
// Idea: memory is the only limit, so there is no shared memory and no exchange between threads. A thread moves VECTOR
// neighbouring elements by one instruction, and keeps the steps that its filter looks back on in registers:
//   channels contiguous   a thread owns VECTOR channels and walks `steps` steps, a window of WIDTH steps sliding along. Loads
//                         run a round ahead.
//   time contiguous       LANES neighbouring lanes own `steps` steps of a channel and take VECTOR of them each in turn. What
//                         lies before them is read again: neighbours have just read it, so it comes from the L1 cache.
// Time is cut into `splits` parts where channels alone would leave the GPU idle.
//
// VECTOR divides the contiguous axis, the strides and the addresses of x and y.
//
// Compile-time, besides conv.cuh's: WIDTH, TIME_CONTIGUOUS, VECTOR, LANES (1 where channels are contiguous), and WEIGHT_VECTOR:
// how many entries of a C-contiguous weight are read at once; it divides VECTOR·WIDTH. 1: any strides.
#include "conv.cuh"

constexpr int THREADS = 128;
constexpr int BEFORE = WIDTH - 1;
constexpr int BLOCKS = TIME_CONTIGUOUS || WIDTH > 4 || sizeof(real) > 4 ? 1 : 4;              // that a multiprocessor is to hold

struct Params {
    const element* x;
    const W_T *weight, *bias;
    const element* initial_state;
    element *y, *final_state;                                          // final_state may be null
    long long batch, dim, length, steps, splits;
    long long x_batch, x_row, y_batch, y_row;                          // row: stride of the slow axis
    long long weight_dim, weight_tap, bias_dim, init_batch, init_dim, init_tap, first_block;
};

typedef Pack<element, VECTOR> Elements;

#if TIME_CONTIGUOUS

constexpr int HALO = (BEFORE + VECTOR - 1) / VECTOR;                   // packs that hold what lies before one
constexpr int ROUND = 2;                                               // packs that a thread computes at a time
DEVICE constexpr int place(int j) { return REVERSE ? VECTOR - 1 - j : j; }                    // in memory, of walked element j

extern "C" __global__ void __launch_bounds__(THREADS) causal_conv1d(const Params p) {
    const long long group = ((p.first_block + blockIdx.x) * THREADS + threadIdx.x) / LANES;
    const long long split = group % p.splits, row = group / p.splits, c = row % p.dim, b = row / p.dim;
    const int lane = threadIdx.x % LANES;
    if (b >= p.batch) return;
    const long long begin = split * p.steps, end = begin + p.steps < p.length ? begin + p.steps : p.length;
    const element* x = p.x + b * p.x_batch + c * p.x_row;
    element* y = p.y + b * p.y_batch + c * p.y_row;
    const element* initial = p.initial_state ? p.initial_state + b * p.init_batch + c * p.init_dim : nullptr;
    auto in_memory = [&](long long s) { return REVERSE ? p.length - VECTOR - s : s; };        // of the pack walked from s on

    real w[WIDTH], bias = p.bias ? to_real(p.bias[c * p.bias_dim]) : real(0);
#pragma unroll
    for (int k = 0; k < WIDTH; ++k) w[k] = to_real(p.weight[c * p.weight_dim + k * p.weight_tap]);

    for (long long s_round = begin + lane * VECTOR; s_round < end; s_round += ROUND * LANES * VECTOR) {
        Elements packs[ROUND][HALO + 1];
#pragma unroll
        for (int r = 0; r < ROUND; ++r) {
            const long long s0 = s_round + r * LANES * VECTOR;
#pragma unroll
            for (int q = 0; q <= HALO; ++q) {
                const long long s = s0 + (q - HALO) * VECTOR;
                packs[r][q] = {};
                if (s0 < end && s >= 0) packs[r][q] = load_pack<element, VECTOR>(x + in_memory(s), VECTOR);
            }
        }
#pragma unroll
        for (int r = 0; r < ROUND; ++r) {
            const long long s0 = s_round + r * LANES * VECTOR;
            if (s0 >= end) break;
            real e[(HALO + 1) * VECTOR];
#pragma unroll
            for (int i = 0; i < (HALO + 1) * VECTOR; ++i) e[i] = to_real(packs[r][i / VECTOR].get(place(i % VECTOR)));
            if (initial && s0 < HALO * VECTOR) {
#pragma unroll
                for (int i = 0; i < HALO * VECTOR; ++i) {
                    const long long s = s0 - HALO * VECTOR + i;
                    if (s < 0 && s >= -BEFORE) e[i] = to_real(initial[(BEFORE + s) * p.init_tap]);
                }
            }
            Elements out = {};
#pragma unroll
            for (int v = 0; v < VECTOR; ++v) {
                real sum = bias;
#pragma unroll
                for (int k = 0; k < WIDTH; ++k) sum += w[k] * e[HALO * VECTOR - BEFORE + v + k];
                out.set(place(v), rounded(activated(sum)));
            }
            store_pack<element, VECTOR>(y + in_memory(s0), out, VECTOR);
        }
    }
    if (p.final_state && end == p.length) {
        for (int i = lane; i < BEFORE; i += LANES) {
            const long long s = p.length - BEFORE + i;
            element value = rounded(real(0));
            if (s >= 0) value = x[REVERSE ? p.length - 1 - s : s];
            else if (initial) value = initial[(BEFORE + s) * p.init_tap];
            p.final_state[(b * p.dim + c) * BEFORE + i] = value;
        }
    }
}

#else

constexpr int ROUND = VECTOR * sizeof(element) < 16 && sizeof(real) == 4 ? 8 : 4;             // steps whose loads are under way

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) causal_conv1d(const Params p) {
    const long long thread = (p.first_block + blockIdx.x) * THREADS + threadIdx.x, packs = p.dim / VECTOR;
    const long long c = thread % packs * VECTOR, split = thread / packs % p.splits, b = thread / packs / p.splits;
    if (b >= p.batch) return;
    const long long begin = split * p.steps, end = begin + p.steps < p.length ? begin + p.steps : p.length;
    const element* x = p.x + b * p.x_batch + walk_origin(p.length, p.x_row) + c;
    element* y = p.y + b * p.y_batch + walk_origin(p.length, p.y_row) + c;
    const long long x_step = walk_stride(p.x_row), y_step = walk_stride(p.y_row);

    real w[WIDTH][VECTOR], bias[VECTOR], e[WIDTH][VECTOR];             // e: the last WIDTH steps walked, the latest last
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
        Elements pack = {};
        if (s >= 0) pack = load_pack<element, VECTOR>(x + s * x_step, VECTOR);
#pragma unroll
        for (int v = 0; v < VECTOR; ++v) {
            e[k][v] = to_real(pack.get(v));
            if (s < 0 && p.initial_state)
                e[k][v] = to_real(p.initial_state[b * p.init_batch + (c + v) * p.init_dim + (BEFORE + s) * p.init_tap]);
        }
    }

    const int own = (int)(end - begin), rounds_end = own / ROUND * ROUND;                     // steps count from `begin`
    const element* x_next = x + begin * x_step;
    element* y_next = y + begin * y_step;
    Elements ahead[ROUND];
    auto load = [&](int j, int t) {
        if (t >= rounds_end) return;
        ahead[j] = load_pack<element, VECTOR>(x_next, VECTOR);
        x_next += x_step;
    };
    auto step = [&](const Elements& now) {
        Elements out = {};
#pragma unroll
        for (int v = 0; v < VECTOR; ++v) {
#pragma unroll
            for (int k = 0; k < BEFORE; ++k) e[k][v] = e[k + 1][v];
            e[BEFORE][v] = to_real(now.get(v));
            real sum = bias[v];
#pragma unroll
            for (int k = 0; k < WIDTH; ++k) sum += w[k][v] * e[k][v];
            out.set(v, rounded(activated(sum)));
        }
        store_pack<element, VECTOR>(y_next, out, VECTOR);
        y_next += y_step;
    };
#pragma unroll
    for (int j = 0; j < ROUND; ++j) load(j, j);
    for (int first = 0; first < rounds_end; first += ROUND) {
#pragma unroll
        for (int j = 0; j < ROUND; ++j) {
            const Elements now = ahead[j];
            load(j, first + j + ROUND);                                // takes its place
            step(now);
        }
    }
#pragma unroll 1
    for (int t = rounds_end; t < own; ++t, x_next += x_step) step(load_pack<element, VECTOR>(x_next, VECTOR));
    if (p.final_state && end == p.length) {
#pragma unroll
        for (int k = 0; k < BEFORE; ++k) {
#pragma unroll
            for (int v = 0; v < VECTOR; ++v) p.final_state[(b * p.dim + c + v) * BEFORE + k] = rounded(e[k + 1][v]);
        }
    }
}

#endif
