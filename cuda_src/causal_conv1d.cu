// causal_conv1d.cu: the causal depthwise convolution, forward, for filters that fit into registers.
//
//   p_t = bias + Σ_j w_j·e_{t+j},   y_t = silu(p_t) or p_t                        (e: the initial state, then x; conv.cuh)
//
// Idea: memory is the only limit, so there is no shared memory and no exchange between threads. A thread moves VECTOR
// neighbouring elements by one instruction, and keeps the steps that its filter looks back on in registers:
//   channels contiguous   a thread owns VECTOR channels and walks `steps` steps, a window of WIDTH steps sliding along. Loads
//                         run a round ahead.
//   time contiguous       LANES neighbouring lanes own `steps` steps of a channel and take VECTOR of them each in turn. What
//                         lies before them is read again: neighbours have just read it, so it comes from the L1 cache. Loads run
//                         a round ahead here, too.
// Time is cut into `splits` parts where channels alone would leave the GPU idle.
//
// VECTOR divides the contiguous axis, the strides and the addresses of x and y.
//
// Compile-time, besides conv.cuh's: WIDTH, THREADS, TIME_CONTIGUOUS, VECTOR, LANES (1 where channels are contiguous), and
// WEIGHT_VECTOR: how many entries of a C-contiguous weight are read at once; it divides VECTOR·WIDTH. 1: any strides.
#include "conv.cuh"

constexpr int BEFORE = WIDTH - 1;
// Blocks that a multiprocessor is to hold: as many as registers allow where the common filters do not spill.
#if __CUDA_ARCH__ >= 900
constexpr int BLOCKS = TIME_CONTIGUOUS || WIDTH > 4 || sizeof(real) > 4 ? 1 : 640 / THREADS;
#else
constexpr int BLOCKS = 1;
#endif

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

constexpr int CHUNK = LANES * VECTOR;
constexpr int BACK = BEFORE < VECTOR ? power_of_two(BEFORE) : VECTOR;  // elements in a pack of those that lie before
constexpr int HALO = (BEFORE + BACK - 1) / BACK;                       // such packs
constexpr int ROUND = 2;                                               // chunks whose loads are under way at a time
DEVICE constexpr int place(int j, int count) { return REVERSE ? count - 1 - j : j; }          // in memory, of walked element j

struct Loaded {
    Pack<element, BACK> before[HALO > 0 ? HALO : 1];
    Elements x;
};

extern "C" __global__ void __launch_bounds__(THREADS) causal_conv1d(const Params p) {
    const long long group = ((p.first_block + blockIdx.x) * THREADS + threadIdx.x) / LANES;
    const long long split = group % p.splits, row = group / p.splits, c = row % p.dim, b = row / p.dim;
    const int lane = threadIdx.x % LANES;
    if (b >= p.batch) return;
    const long long begin = split * p.steps, end = begin + p.steps < p.length ? begin + p.steps : p.length;
    const element* x = p.x + b * p.x_batch + c * p.x_row;
    element* y = p.y + b * p.y_batch + c * p.y_row;
    const element* initial = p.initial_state ? p.initial_state + b * p.init_batch + c * p.init_dim : nullptr;

    real w[WIDTH], bias = p.bias ? to_real(p.bias[c * p.bias_dim]) : real(0);
#pragma unroll
    for (int k = 0; k < WIDTH; ++k) w[k] = to_real(p.weight[c * p.weight_dim + k * p.weight_tap]);

    const long long first = begin + lane * VECTOR;                     // step of this lane's first pack
    constexpr int STEP = REVERSE ? -CHUNK : CHUNK;                     // in memory, from a pack to the lane's next
    const element* x_next = x + (REVERSE ? p.length - VECTOR - first : first);
    element* y_next = y + (REVERSE ? p.length - VECTOR - first : first);
    auto load = [&](long long s) {                                     // packs in turn
        Loaded loaded = {};
        if (s < end) {
#pragma unroll
            for (int q = 0; q < HALO; ++q) {
                const int back = (HALO - q) * BACK, there = REVERSE ? VECTOR - BACK + back : -back;
                if (s >= back) loaded.before[q] = load_pack<element, BACK>(x_next + there, BACK);
            }
            loaded.x = load_pack<element, VECTOR>(x_next, VECTOR);
        }
        x_next += STEP;
        return loaded;
    };
    auto work = [&](long long s0, const Loaded& now) {
        real e[HALO * BACK + VECTOR];                                  // from HALO·BACK steps before s0 on
#pragma unroll
        for (int i = 0; i < HALO * BACK; ++i) e[i] = to_real(now.before[i / BACK].get(place(i % BACK, BACK)));
#pragma unroll
        for (int v = 0; v < VECTOR; ++v) e[HALO * BACK + v] = to_real(now.x.get(place(v, VECTOR)));
        if (initial && s0 < BEFORE) {
#pragma unroll
            for (int i = 0; i < HALO * BACK; ++i) {
                const long long s = s0 - HALO * BACK + i;
                if (s < 0 && s >= -BEFORE) e[i] = to_real(initial[(BEFORE + s) * p.init_tap]);
            }
        }
        Elements out = {};
#pragma unroll
        for (int v = 0; v < VECTOR; ++v) {
            real sum = bias;
#pragma unroll
            for (int k = 0; k < WIDTH; ++k) sum += w[k] * e[HALO * BACK - BEFORE + v + k];
            out.set(place(v, VECTOR), rounded(activated(sum)));
        }
        store_pack<element, VECTOR>(y_next, out, VECTOR);
    };
    Loaded ahead[ROUND];
#pragma unroll
    for (int r = 0; r < ROUND; ++r) ahead[r] = load(first + r * CHUNK);
    for (long long s_round = first; s_round < end; s_round += ROUND * CHUNK) {
#pragma unroll
        for (int r = 0; r < ROUND; ++r) {
            const long long s0 = s_round + r * CHUNK;
            const Loaded now = ahead[r];
            ahead[r] = load(s0 + ROUND * CHUNK);                       // takes its place
            if (s0 < end) work(s0, now);
            y_next += STEP;
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
    const long long x_step = walk_stride(p.x_row), y_step = walk_stride(p.y_row);
    const element* x = p.x + b * p.x_batch + walk_origin(p.length, p.x_row) + c + begin * x_step;
    element* y = p.y + b * p.y_batch + walk_origin(p.length, p.y_row) + c + begin * y_step;

    const int own = (int)(end - begin), rounds_end = own / ROUND * ROUND;                     // steps count from `begin`
    const element* x_next = x;
    Elements before[WIDTH], ahead[ROUND];                              // before: what the first step looks back on
    auto load = [&](int j, int t) {
        if (t >= rounds_end) return;
        ahead[j] = load_pack<element, VECTOR>(x_next, VECTOR);
        x_next += x_step;
    };
    // A part is short: all that it begins with is on its way before any of it is used.
#pragma unroll
    for (int k = 1; k < WIDTH; ++k) before[k] = load_whole<element, VECTOR>(x + (k - WIDTH) * x_step, begin >= WIDTH - k);
#pragma unroll
    for (int j = 0; j < ROUND; ++j) load(j, j);

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
    for (int k = 1; k < WIDTH; ++k) {
        const long long s = begin - WIDTH + k;
#pragma unroll
        for (int v = 0; v < VECTOR; ++v) {
            e[k][v] = to_real(before[k].get(v));
            if (s < 0 && p.initial_state)
                e[k][v] = to_real(p.initial_state[b * p.init_batch + (c + v) * p.init_dim + (BEFORE + s) * p.init_tap]);
        }
    }

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
        store_pack<element, VECTOR>(y, out, VECTOR);
        y += y_step;
    };
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
