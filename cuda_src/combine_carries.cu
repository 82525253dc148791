// combine_carries.cu: chain the parts of time that the scan kernels ran apart (tile.cuh).
//
//   forward    enters_{s+1} = local_s + exp(A·Σ_s Δ)·enters_s,               enters_first = initial_state or 0
//   backward   enters_{s-1} = local_s + conj(exp(A·Σ_s Δ))·enters_s,         enters_last = dlast_state or 0
//
// Idea: one thread a state, part by part; the decay over a whole part is one exponential of its summed steps. Only the chain has
// to wait for the part before it: what it chains is read and computed AHEAD parts at a time. In place: `carries` holds what each
// part hands on when nothing enters it, and receives what enters it.
//
// Compile-time: BACKWARD, and the types STATE_T and REAL.
#include "common.cuh"

struct Params {
    STATE_T* carries;                                                  // (batch, splits, dim, state)
    const REAL* totals;                                                // (batch, splits, dim)
    const STATE_T *A, *enters;                                         // enters: (batch, dim, state), or null
    long long batch, splits, dim, state, state_total;
    long long A_dim, A_state, enters_batch, enters_dim, enters_state, first_block;
};

constexpr int AHEAD = 8;

extern "C" __global__ void __launch_bounds__(256) combine_carries(const Params p) {
    long long index = (p.first_block + blockIdx.x) * 256 + threadIdx.x;
    if (index >= p.batch * p.dim * p.state) return;
    const long long n = index % p.state, c = index / p.state % p.dim, b = index / p.state / p.dim;
    const STATE_T rate = rate_of(bounded(p.A[c * p.A_dim + n * p.A_state]));
    STATE_T enters = {};
    if (p.enters) enters = p.enters[b * p.enters_batch + c * p.enters_dim + n * p.enters_state];
    for (long long first = 0; first < p.splits; first += AHEAD) {
        STATE_T local[AHEAD] = {}, half[AHEAD];
        REAL total[AHEAD] = {};
        auto split = [&](int i) { return b * p.splits + (BACKWARD ? p.splits - 1 - (first + i) : first + i); };
        auto carry = [&](int i) -> STATE_T& { return p.carries[(split(i) * p.dim + c) * p.state_total + n]; };
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            if (first + i >= p.splits) continue;
            local[i] = carry(i);
            total[i] = p.totals[split(i) * p.dim + c];
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            half[i] = decay(total[i] * REAL(0.5), rate);
            if (BACKWARD) half[i] = conj(half[i]);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            if (first + i >= p.splits) break;
            carry(i) = enters;
            enters = handed_on(enters, half[i], local[i]);
        }
    }
}
