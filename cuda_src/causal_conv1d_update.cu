// causal_conv1d_update.cu: one step of the causal depthwise convolution, in place.
//
//   e = (state, x),   y = silu(bias + Σ_j w_j·e_j) or the sum,   state = the last WIDTH - 1 of e
//
// Idea: a thread a channel of a batch entry; short filters are loaded whole before anything is used. Any strides.
//
// Compile-time, besides conv.cuh's (REVERSE 0): WIDTH, and OVERLAP (common.cuh).
#include "conv.cuh"

constexpr int THREADS = 128;
constexpr int BEFORE = WIDTH - 1;

struct Params {
    element* state;
    const element* x;
    const W_T *weight, *bias;
    element* y;                                                        // (batch, dim), C-contiguous
    long long batch, dim, state_batch, state_dim, state_tap, x_batch, x_dim, weight_dim, weight_tap, bias_dim, first_block;
};

extern "C" __global__ void __launch_bounds__(THREADS) causal_conv1d_update(const Params p) {
    const long long thread = (p.first_block + blockIdx.x) * THREADS + threadIdx.x, c = thread % p.dim, b = thread / p.dim;
    const bool exists = b < p.batch;
    let_next_begin();
    element* state = p.state + b * p.state_batch + c * p.state_dim;
    const W_T* weight = p.weight + c * p.weight_dim;
    const element* x = p.x + b * p.x_batch + c * p.x_dim;
    real sum = exists && p.bias ? to_real(p.bias[c * p.bias_dim]) : real(0);
    if (WIDTH <= 16) {
        constexpr int FEW = WIDTH <= 16 ? WIDTH : 1;
        element e[FEW];
        real w[FEW];
#pragma unroll
        for (int k = 0; k < FEW; ++k) {
            if (exists && k < FEW - 1) e[k] = state[k * p.state_tap];
            if (exists) w[k] = to_real(weight[k * p.weight_tap]);
        }
        wait_for_previous();                                           // which may have made x
        if (!exists) return;
        e[FEW - 1] = *x;
#pragma unroll
        for (int k = 0; k < FEW; ++k) {
            sum += w[k] * to_real(e[k]);
            if (k > 0) state[(k - 1) * p.state_tap] = e[k];
        }
    } else {
        wait_for_previous();
        if (!exists) return;
#pragma unroll 1
        for (int k = 0; k < WIDTH; ++k) {
            const element e = k < BEFORE ? state[k * p.state_tap] : *x;
            sum += to_real(weight[k * p.weight_tap]) * to_real(e);
            if (k > 0) state[(k - 1) * p.state_tap] = e;
        }
    }
    p.y[thread] = rounded(activated(sum));
}
