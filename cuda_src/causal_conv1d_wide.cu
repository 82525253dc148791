// causal_conv1d_wide.cu: the causal depthwise convolution for filters of any width, forward and backward.
//
//   causal_conv1d_wide   y                                                                      a thread a step
//   wide_dp              dp_t = dy_t·silu'(p_t)                                                 a thread a step
//   wide_de              de_i = Σ_j w_j·dp_{i-j}, plus dfinal_state                             a thread an entry of e
//   wide_dw              parts of dw_j = Σ_t dp_t·e_{t+j} and of dbias = Σ_t dp_t               a thread a tap and part of time
//
// Idea: plain loops over memory, for the rare filter that does not fit into registers. Neighbouring threads take neighbours along
// the axis that is contiguous, so that caches serve the taps. Any strides.
//
// Compile-time, besides conv.cuh's: DY_T, and TIME_FAST: whether that axis is time.
#include "conv.cuh"

constexpr int THREADS = 128;

struct Params {
    const element* x;
    const DY_T* dy;
    const W_T *weight, *bias;
    const element *initial_state, *dfinal_state;
    element *y, *dx, *dinitial_state;
    real *dp, *parts;                                                  // parts: (batch, splits, width then bias, dim)
    long long batch, dim, length, width, steps, splits;
    long long x_batch, x_dim, x_time, dy_batch, dy_dim, dy_time, y_batch, y_dim, y_time;      // y's are dx's and dp's too
    long long weight_dim, weight_tap, bias_dim, init_batch, init_dim, init_tap, dfinal_batch, dfinal_dim, dfinal_tap, first_block;
};

// Which (batch entry, channel, index along an axis of `size`) a thread has.
struct Item {
    long long b, c, i;
    DEVICE Item(const Params& p, long long size) {
        const long long thread = (p.first_block + blockIdx.x) * THREADS + threadIdx.x;
        const long long fast = TIME_FAST ? size : p.dim, slow = TIME_FAST ? p.dim : size;
        const long long f = thread % fast, s = thread / fast % slow;
        b = thread / fast / slow;
        c = TIME_FAST ? s : f;
        i = TIME_FAST ? f : s;
    }
};

DEVICE long long in_memory(const Params& p, long long s) { return REVERSE ? p.length - 1 - s : s; }

DEVICE real entry(const Params& p, long long b, long long c, long long i) {                   // e_i
    const long long s = i - (p.width - 1);
    if (s >= 0) return to_real(p.x[b * p.x_batch + c * p.x_dim + in_memory(p, s) * p.x_time]);
    return p.initial_state ? to_real(p.initial_state[b * p.init_batch + c * p.init_dim + i * p.init_tap]) : real(0);
}

DEVICE real tap(const Params& p, long long c, long long j) { return to_real(p.weight[c * p.weight_dim + j * p.weight_tap]); }

DEVICE real filtered(const Params& p, long long b, long long c, long long s) {                // p_s
    real sum = p.bias ? to_real(p.bias[c * p.bias_dim]) : real(0);
    for (long long j = 0; j < p.width; ++j) sum += tap(p, c, j) * entry(p, b, c, s + j);
    return sum;
}

DEVICE long long output(const Params& p, long long b, long long c, long long s) {             // place in y, dx or dp
    return b * p.y_batch + c * p.y_dim + in_memory(p, s) * p.y_time;
}

extern "C" __global__ void __launch_bounds__(THREADS) causal_conv1d_wide(const Params p) {
    const Item at(p, p.length);
    if (at.b < p.batch) p.y[output(p, at.b, at.c, at.i)] = rounded(activated(filtered(p, at.b, at.c, at.i)));
}

extern "C" __global__ void __launch_bounds__(THREADS) wide_dp(const Params p) {
    const Item at(p, p.length);
    if (at.b >= p.batch) return;
    real dy = to_real(p.dy[at.b * p.dy_batch + at.c * p.dy_dim + in_memory(p, at.i) * p.dy_time]);
    p.dp[output(p, at.b, at.c, at.i)] = SILU ? before_activation(dy, filtered(p, at.b, at.c, at.i)) : dy;
}

extern "C" __global__ void __launch_bounds__(THREADS) wide_de(const Params p) {
    const Item at(p, p.length + p.width - 1);
    if (at.b >= p.batch) return;
    const long long s = at.i - (p.width - 1);
    if (s < 0 && !p.dinitial_state) return;
    real sum = 0;
    for (long long j = 0; j < p.width && j <= at.i; ++j)
        if (at.i - j < p.length) sum += tap(p, at.c, j) * p.dp[output(p, at.b, at.c, at.i - j)];
    if (p.dfinal_state && at.i >= p.length)
        sum += to_real(p.dfinal_state[at.b * p.dfinal_batch + at.c * p.dfinal_dim + (at.i - p.length) * p.dfinal_tap]);
    if (s >= 0) p.dx[output(p, at.b, at.c, s)] = rounded(sum);
    else p.dinitial_state[(at.b * p.dim + at.c) * (p.width - 1) + at.i] = rounded(sum);
}

extern "C" __global__ void __launch_bounds__(THREADS) wide_dw(const Params p) {
    const long long count = p.width + (p.bias != nullptr);
    const Item at(p, count * p.splits);
    if (at.b >= p.batch) return;
    const long long j = at.i % count, split = at.i / count, begin = split * p.steps;
    const long long end = begin + p.steps < p.length ? begin + p.steps : p.length;
    real sum = 0;
    for (long long s = begin; s < end; ++s)
        sum += p.dp[output(p, at.b, at.c, s)] * (j < p.width ? entry(p, at.b, at.c, s + j) : real(1));
    p.parts[((at.b * p.splits + split) * count + j) * p.dim + at.c] = sum;
}
