// selective_step.cu: what a Mamba block does between its projections for one token: step sizes, states, skip and gate.
//
//   Δ = softplus(W·low + dt_bias),   h = exp(Δ·A)·h + Δ·B·u,   y = (Σ_n C·h + D·u)·silu(z)          W (dim, RANK)
//
// Idea: the states are read and written once, 16 bytes at a time; everything is asked for before anything is used. LANES lanes
// share a channel: each has VECTOR neighbouring states in turn, and every LANES-th pack of W's row; both sums are added up among
// them in a fixed order. A lane has the same channel of ENTRIES sequences, which share A and W. The arithmetic is that of
// selective_state_update.cu, and step sizes are rounded as there. RANK 0: `low` holds W·low, a number for each channel.
//
// Blocks beyond `blocks` fetch ahead what a later kernel reads.
//
// Compile-time, besides decode.cuh's: RANK and RANK_VECTOR, which divides it; DSTATE and VECTOR, likewise; LANES ENTRIES.
#include "decode.cuh"

constexpr int ITEMS = (DSTATE + LANES * VECTOR - 1) / (LANES * VECTOR), PACKS = RANK / RANK_VECTOR;

struct Params {
    float* state;                                                      // (batch, dim, DSTATE)
    const float *A, *D, *dt_bias;                                      // (dim, DSTATE), (dim,), (dim,)
    const element* dt_weight;                                          // (dim, RANK)
    const element *low, *B, *C;                                        // (batch, RANK), (batch, DSTATE), (batch, DSTATE)
    const element *u, *z;                                              // (batch, dim); rows of z may lie apart
    element* y;
    const void* ahead;
    long long batch, dim, low_row, B_row, C_row, z_row, blocks, ahead_blocks, ahead_bytes, first_block;
};

extern "C" __global__ void __launch_bounds__(THREADS) selective_step(const Params p) {
    const long long block = p.first_block + blockIdx.x, channel = (block * THREADS + threadIdx.x) / LANES;
    const long long c = channel % p.dim, first_b = channel / p.dim * ENTRIES;
    const int lane = threadIdx.x % LANES;
    let_next_begin();
    if (block >= p.blocks) {
        fetch_ahead(p.ahead, p.ahead_bytes, block - p.blocks, p.ahead_blocks);
        wait_for_previous();
        return;
    }
    Pack<float, VECTOR> h[ENTRIES][ITEMS], A[ITEMS];
    float D = 0, dt_bias = 0;
    auto exists = [&](int e) { return first_b + e < p.batch; };
    auto states = [&](int i) { return (i * LANES + lane) * VECTOR < DSTATE ? VECTOR : 0; };                  // of a pack
    if (exists(0)) {
        D = p.D[c];
        dt_bias = p.dt_bias[c];
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            const int n = (i * LANES + lane) * VECTOR;
            A[i] = load_pack<float, VECTOR>(p.A + c * DSTATE + n, states(i));
#pragma unroll
            for (int e = 0; e < ENTRIES; ++e)
                h[e][i] = load_pack<float, VECTOR>(p.state + ((first_b + e) * p.dim + c) * DSTATE + n, exists(e) ? states(i) : 0);
        }
    }
    wait_for_previous();

    float u[ENTRIES] = {}, gate[ENTRIES] = {}, step[ENTRIES] = {}, sum[ENTRIES] = {};
    Pack<element, VECTOR> B[ENTRIES][ITEMS], C[ENTRIES][ITEMS];
#pragma unroll
    for (int e = 0; e < ENTRIES; ++e) {
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            const int n = (i * LANES + lane) * VECTOR;
            B[e][i] = load_pack<element, VECTOR>(p.B + (first_b + e) * p.B_row + n, exists(e) ? states(i) : 0);
            C[e][i] = load_pack<element, VECTOR>(p.C + (first_b + e) * p.C_row + n, exists(e) ? states(i) : 0);
        }
        if (!exists(e)) continue;
        u[e] = to_real(p.u[(first_b + e) * p.dim + c]);
        gate[e] = to_real(p.z[(first_b + e) * p.z_row + c]);
        if (RANK == 0 && lane == 0) step[e] = to_real(p.low[(first_b + e) * p.low_row + c]);
    }
    for (int i = lane; i < PACKS; i += LANES) {
        Pack<element, RANK_VECTOR> w = {};
        if (exists(0)) w = load_pack<element, RANK_VECTOR>(p.dt_weight + c * RANK + i * RANK_VECTOR, RANK_VECTOR);
#pragma unroll
        for (int e = 0; e < ENTRIES; ++e) {
            if (!exists(e)) continue;
            const auto low = load_pack<element, RANK_VECTOR>(p.low + (first_b + e) * p.low_row + i * RANK_VECTOR, RANK_VECTOR);
#pragma unroll
            for (int j = 0; j < RANK_VECTOR; ++j) step[e] += to_real(w.get(j)) * to_real(low.get(j));
        }
    }
#pragma unroll
    for (int e = 0; e < ENTRIES; ++e) {
#pragma unroll
        for (int other = LANES / 2; other > 0; other /= 2) step[e] += __shfl_xor_sync(~0u, step[e], other);
        step[e] = softplus(to_real(rounded(step[e])) + dt_bias);
        if (exists(e)) {
#pragma unroll
            for (int i = 0; i < ITEMS; ++i) {
                const int n = (i * LANES + lane) * VECTOR;
#pragma unroll
                for (int j = 0; j < VECTOR; ++j) {
                    const float input = step[e] * u[e] * to_real(B[e][i].get(j));
                    const float next = decay(step[e], rate_of(A[i].get(j))) * h[e][i].get(j) + input;
                    sum[e] = next * to_real(C[e][i].get(j)) + sum[e];
                    h[e][i].set(j, next);
                }
                store_pack<float, VECTOR>(p.state + ((first_b + e) * p.dim + c) * DSTATE + n, h[e][i], states(i));
            }
        }
#pragma unroll
        for (int other = LANES / 2; other > 0; other /= 2) sum[e] += __shfl_xor_sync(~0u, sum[e], other);
        if (exists(e) && lane == 0)
            p.y[(first_b + e) * p.dim + c] = rounded((sum[e] + D * u[e]) * gate[e] * sigmoid(gate[e]));
    }
}
