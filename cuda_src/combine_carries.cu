// combine_carries.cu: chain the splits of a sequence.
//
//   enters_s = local_{s+1} + conj(exp(A·Σ_{s+1} Δ))·enters_{s+1},   the last split being entered by dlast_state (or 0)
//
// Idea: one thread a state, splits from the last to the first; the decay of a whole split is one exponential of its summed
// steps. In place: `carries` holds what each split leaves when nothing enters it, and receives what enters it.
//
// Compile-time: STATE_T and REAL types.
#include "common.cuh"

struct Params {
    STATE_T* carries;
    const REAL* totals;
    const STATE_T *A, *dlast_state;
    long long batch, splits, dim, state, state_total;
    long long A_dim, A_state, dlast_batch, dlast_dim, dlast_state_stride, first_block;
};

extern "C" __global__ void __launch_bounds__(256) combine_carries(const Params p) {
    long long index = (p.first_block + blockIdx.x) * 256 + threadIdx.x;
    if (index >= p.batch * p.dim * p.state) return;
    const long long n = index % p.state, c = index / p.state % p.dim, b = index / p.state / p.dim;
    const STATE_T rate = rate_of(p.A[c * p.A_dim + n * p.A_state]);
    STATE_T enters = {};
    if (p.dlast_state) enters = p.dlast_state[b * p.dlast_batch + c * p.dlast_dim + n * p.dlast_state_stride];
    for (long long s = p.splits - 1; s >= 0; --s) {
        STATE_T& here = p.carries[((b * p.splits + s) * p.dim + c) * p.state_total + n];
        STATE_T local = here;
        here = enters;
        enters = multiply_add(conj(decay(p.totals[(b * p.splits + s) * p.dim + c], rate)), enters, local);
    }
}
