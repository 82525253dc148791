// causal_conv1d_bwd.cu: the causal depthwise convolution, backward, for filters that fit into registers.
//
//   dp_t = dy_t·silu'(p_t), with p_t computed again      de_i = Σ_j w_j·dp_{i-j}      dw_j = Σ_t dp_t·e_{t+j}     dbias = Σ dp_t
//
// e is the initial state and then x (conv.cuh), and so de is the gradient of the one and then of the other; dfinal_state comes on
// top of its last WIDTH - 1 entries.
//
// Idea: as forward, with no shared memory. The gradient of a step depends on dp up to WIDTH - 1 steps later:
//   channels contiguous   VECTOR channels a thread, windows of e and of dp sliding along; dx follows WIDTH - 1 steps behind, and
//                         a part of time is walked so much further than its end. Loads run a round ahead.
//   time contiguous       LANES lanes a part of a channel, VECTOR steps each in turn, a chunk. Chunks are walked from the last
//                         to the first: a lane gets later dp from its neighbours, and the last lanes from the chunk that was
//                         walked before, whose dp are still in registers. Loads run a chunk ahead; lines are asked into L2
//                         EARLY chunks before that. What follows the part is a chunk of which only dp counts.
// What a part adds to dw and dbias is summed in registers (over lanes in a fixed order) and left in `parts`, (batch, splits,
// WIDTH then bias, dim); sum_parts.cu adds them up.
//
// VECTOR divides the contiguous axis, the strides and the addresses of x, dy and dx.
//
// Compile-time: as causal_conv1d.cu, DY_T, and EARLY: how many chunks before their loads lines are asked into L2 (0: not at all).
#include "conv.cuh"

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

// Blocks that a multiprocessor is to hold: as many as registers allow where the common filters do not spill.
#if __CUDA_ARCH__ == 900 || __CUDA_ARCH__ >= 1200
constexpr int BLOCKS_OF_CHANNELS = WIDTH == 4 && sizeof(DY_T) == 2 && !REVERSE ? 4 : 3;
#else
constexpr int BLOCKS_OF_CHANNELS = 3;
#endif
constexpr int BLOCKS = WIDTH > 4 || sizeof(real) > 4 ? 1 : TIME_CONTIGUOUS ? (EARLY ? 8 : 12) : BLOCKS_OF_CHANNELS;

template <bool ANSWER> struct Known { static constexpr bool yes = ANSWER; };

#if TIME_CONTIGUOUS

constexpr int CHUNK = LANES * VECTOR;
constexpr int BACK = BEFORE < VECTOR ? power_of_two(BEFORE) : VECTOR;  // elements in a pack of those that lie before
constexpr int HALO = (BEFORE + BACK - 1) / BACK;                       // such packs
constexpr int AFTER = (BEFORE + VECTOR - 1) / VECTOR;                  // lanes that hold the dp of BEFORE steps
constexpr int LINE = 128 / (int)sizeof(element);                       // elements in a line of memory
constexpr int GIVEN = BEFORE < VECTOR ? BEFORE : VECTOR;               // dp of a lane that others need: the first ones
DEVICE constexpr int place(int j, int count) { return REVERSE ? count - 1 - j : j; }          // in memory, of walked element j

struct Loaded {
    Pack<element, BACK> before[HALO > 0 ? HALO : 1];
    Pack<element, VECTOR> x;
    Pack<DY_T, VECTOR> dy;
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) causal_conv1d_bwd(const Params p) {
    const long long group = ((p.first_block + blockIdx.x) * THREADS + threadIdx.x) / LANES;
    const long long split = group % p.splits, row = group / p.splits, c = row % p.dim, b = row / p.dim;
    const int lane = threadIdx.x % LANES;
    const bool exists = b < p.batch;                                   // the others stay for the exchanges between lanes
    const long long begin = split * p.steps, end = !exists ? 0 : begin + p.steps < p.length ? begin + p.steps : p.length;
    const element* x = p.x + b * p.x_batch + c * p.x_row;
    const DY_T* dy = p.dy + b * p.dy_batch + c * p.dy_row;
    element* dx = p.dx + b * p.dx_batch + c * p.dx_row;
    const element* initial = p.initial_state ? p.initial_state + b * p.init_batch + c * p.init_dim : nullptr;
    const element* dfinal = p.dfinal_state ? p.dfinal_state + b * p.dfinal_batch + c * p.dfinal_dim : nullptr;
    auto in_memory = [&](long long s, int count) { return REVERSE ? p.length - count - s : s; };  // of a pack walked from s on

    real w[WIDTH] = {}, bias = exists && p.bias ? to_real(p.bias[c * p.bias_dim]) : real(0);
    real sums[WIDTH + 1] = {};                                         // dw, dbias
#pragma unroll
    for (int k = 0; k < WIDTH; ++k) if (exists) w[k] = to_real(p.weight[c * p.weight_dim + k * p.weight_tap]);

    // Of this part: chunks, the same number for all lanes of a warp, and how many of them are whole.
    const int chunks = (int)(p.steps / CHUNK), whole = (int)((end > begin ? end - begin : 0) / CHUNK);
    auto first_step = [&](int chunk) { return begin + (long long)chunk * CHUNK + lane * VECTOR; };
    auto is_there = [&](int chunk) {
        const long long s0 = first_step(chunk);
        return s0 < end || (chunk == chunks && lane < AFTER && exists && s0 < p.length);
    };
    constexpr int STEP = REVERSE ? CHUNK : -CHUNK;                     // in memory, from a chunk to the one walked after it
    const int last = chunks - (p.splits == 1);                         // a single part has nothing after it
    const long long start = in_memory(first_step(last), VECTOR);
    const element* x_next = x + start;
    const DY_T* dy_next = dy + start;
    element* dx_next = dx + start;
    auto load = [&](int chunk) {                                       // chunks in turn
        Loaded loaded = {};
        if (chunk >= 0 && (chunk < whole || is_there(chunk))) {
#pragma unroll
            for (int q = 0; q < HALO; ++q) {
                const int back = (HALO - q) * BACK;
                if (chunk > 0 || begin > 0 || lane * VECTOR >= back)
                    loaded.before[q] = load_pack<element, BACK>(x_next + (REVERSE ? VECTOR - BACK + back : -back), BACK);
            }
            loaded.x = load_pack<element, VECTOR>(x_next, VECTOR);
            loaded.dy = load_pack<DY_T, VECTOR>(dy_next, VECTOR);
            if (EARLY && chunk >= EARLY && lane * VECTOR % LINE == 0) {
                prefetch(x_next + EARLY * STEP);
                prefetch(dy_next + EARLY * STEP);
            }
        }
        x_next += STEP;
        dy_next += STEP;
        return loaded;
    };

    real later[GIVEN > 0 ? GIVEN : 1] = {};                            // dp of this lane in the chunk after
    // Inside: all there, and so is the chunk after, and neither state is near.
    auto work = [&](int chunk, const Loaded& now, auto inside) {
        const long long s0 = first_step(chunk);
        real e[HALO * BACK + VECTOR];                                  // from HALO·BACK steps before s0 on
#pragma unroll
        for (int i = 0; i < HALO * BACK; ++i) e[i] = to_real(now.before[i / BACK].get(place(i % BACK, BACK)));
#pragma unroll
        for (int v = 0; v < VECTOR; ++v) e[HALO * BACK + v] = to_real(now.x.get(place(v, VECTOR)));
        if (!inside.yes && initial && s0 < BEFORE && s0 < end) {
#pragma unroll
            for (int i = 0; i < HALO * BACK; ++i) {
                const long long s = s0 - HALO * BACK + i;
                if (s < 0 && s >= -BEFORE) e[i] = to_real(initial[(BEFORE + s) * p.init_tap]);
            }
        }
        real dp[VECTOR + BEFORE];                                      // from s0 on
        const bool counts = inside.yes || is_there(chunk);
#pragma unroll
        for (int v = 0; v < VECTOR; ++v) {
            real sum = bias;
#pragma unroll
            for (int k = 0; k < WIDTH; ++k) sum += w[k] * e[HALO * BACK - BEFORE + v + k];
            real gradient = before_activation(to_real(now.dy.get(place(v, VECTOR))), sum);
            dp[v] = counts ? gradient : real(0);
        }
#pragma unroll
        for (int k = 0; k < BEFORE; ++k) {                             // lanes at the end wrap around to the chunk after
            const int from = 1 + k / VECTOR, j = k % VECTOR;
            dp[VECTOR + k] = __shfl_sync(~0u, lane < from ? later[j] : dp[j], (lane + from) % LANES, LANES);
        }
#pragma unroll
        for (int j = 0; j < GIVEN; ++j) later[j] = dp[j];
        if (!inside.yes && s0 >= end) return;

        Pack<element, VECTOR> out = {};
#pragma unroll
        for (int v = 0; v < VECTOR; ++v) {
#pragma unroll
            for (int k = 0; k < WIDTH; ++k) sums[k] += dp[v] * e[HALO * BACK - BEFORE + v + k];
            sums[WIDTH] += dp[v];
            real sum = 0;
#pragma unroll
            for (int k = 0; k < WIDTH; ++k) sum += w[k] * dp[v + BEFORE - k];
            if (!inside.yes && dfinal && s0 + v + BEFORE >= p.length)
                sum += to_real(dfinal[(s0 + v + BEFORE - p.length) * p.dfinal_tap]);
            out.set(place(v, VECTOR), rounded(sum));
        }
        store_pack<element, VECTOR>(dx_next, out, VECTOR);
        if (!inside.yes && p.dinitial_state && s0 == 0) {
#pragma unroll
            for (int i = 0; i < BEFORE; ++i) {
                real sum = 0;
#pragma unroll
                for (int k = 0; k <= i; ++k) sum += w[k] * dp[i - k];
                if (dfinal && i >= p.length) sum += to_real(dfinal[(i - p.length) * p.dfinal_tap]);
                p.dinitial_state[(b * p.dim + c) * BEFORE + i] = rounded(sum);
            }
        }
    };
    Loaded ahead = load(last);
    for (int chunk = last; chunk >= 0; --chunk) {
        const Loaded now = ahead;
        ahead = load(chunk - 1);
        if (LANES == 32 && chunk > 0 && chunk + 1 < whole) work(chunk, now, Known<true>());
        else work(chunk, now, Known<false>());
        dx_next += STEP;
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

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) causal_conv1d_bwd(const Params p) {
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

    // From here on steps count from `begin`.
    const int own = (int)(end - begin), walked = own + BEFORE;         // walked so much further, so that dx follows to the end
    const int present = (int)(begin + walked < p.length ? walked : p.length - begin);         // what comes after is beyond x
    x += begin * x_step;
    dy += begin * dy_step;
    dx += begin * dx_step;
    typedef Pack<element, VECTOR> X;
    typedef Pack<DY_T, VECTOR> DY;
    // Step t. Inside: the part does not end before it.
    auto step = [&](int t, const X& x_now, const DY& dy_now, auto inside) {
        X out = {};                                                    // of entry t of de, which is step t - BEFORE of x
#pragma unroll
        for (int v = 0; v < VECTOR; ++v) {
#pragma unroll
            for (int k = 0; k < BEFORE; ++k) {
                e[k][v] = e[k + 1][v];
                dp[k][v] = dp[k + 1][v];
            }
            e[BEFORE][v] = to_real(x_now.get(v));
            real sum = bias[v], de = 0;
#pragma unroll
            for (int k = 0; k < WIDTH; ++k) sum += w[k][v] * e[k][v];
            dp[BEFORE][v] = before_activation(to_real(dy_now.get(v)), sum);
            if (!inside.yes && t >= present) {
                dp[BEFORE][v] = 0;
                if (p.dfinal_state)
                    de = to_real(p.dfinal_state[b * p.dfinal_batch + (c + v) * p.dfinal_dim + (t - present) * p.dfinal_tap]);
            }
            if (inside.yes || t < own) {                               // later steps belong to the next part
#pragma unroll
                for (int k = 0; k < WIDTH; ++k) dw[k][v] += dp[BEFORE][v] * e[k][v];
                dbias[v] += dp[BEFORE][v];
            }
#pragma unroll
            for (int k = 0; k < WIDTH; ++k) de += w[k][v] * dp[BEFORE - k][v];
            out.set(v, rounded(de));
        }
        if (t >= BEFORE) {
            store_in_words<element, VECTOR>(dx, out);
            dx += dx_step;
        } else if (p.dinitial_state && begin == 0) {
#pragma unroll
            for (int v = 0; v < VECTOR; ++v) p.dinitial_state[(b * p.dim + c + v) * BEFORE + t] = out.get(v);
        }
    };
    X x_ahead[ROUND];
    DY dy_ahead[ROUND];
    const int rounds_end = own / ROUND * ROUND;
    const element* x_next = x;
    const DY_T* dy_next = dy;
    auto load = [&](int j, int t) {
        if (t >= rounds_end) return;
        x_ahead[j] = load_pack<element, VECTOR>(x_next, VECTOR);
        dy_ahead[j] = load_pack<DY_T, VECTOR>(dy_next, VECTOR);
        x_next += x_step;
        dy_next += dy_step;
    };
#pragma unroll
    for (int j = 0; j < ROUND; ++j) load(j, j);
    for (int first = 0; first < rounds_end; first += ROUND) {
#pragma unroll
        for (int j = 0; j < ROUND; ++j) {
            const X x_now = x_ahead[j];
            const DY dy_now = dy_ahead[j];
            load(j, first + j + ROUND);
            step(first + j, x_now, dy_now, Known<true>());
        }
    }
#pragma unroll 1
    for (int t = rounds_end; t < walked; ++t) {
        const int valid = t < present ? VECTOR : 0;
        step(t, load_pack<element, VECTOR>(x_next, valid), load_pack<DY_T, VECTOR>(dy_next, valid), Known<false>());
        x_next += x_step;
        dy_next += dy_step;
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
            store_in_words<real, REALS>(parts + k * p.dim + v, out);
        }
    }
}

#endif
