// selective_step.cu: what a Mamba block does between its projections for one token: step sizes, states, skip and gate.
//
//   Δ = softplus(W·low + dt_bias),   h = exp(Δ·A)·h + Δ·B·u,   y = (Σ_n C·h + D·u)·silu(z)          W (dim, RANK)
//
// Idea: the states are read and written once, 16 bytes at a time; everything is asked for before anything is used. LANES lanes
// share a channel of ENTRIES sequences, which share A and W: each has VECTOR neighbouring states in turn, and every LANES-th pack
// of W's row; both sums are added up among them in a fixed order. Those are just the packs that tensor cores take of 8 channels:
// with TENSOR they multiply W, and lane 4·g + t reads the `low` of sequence g alone. Step size, u and gate of a sequence are found
// by one lane, the step size and u for all. The arithmetic is that of selective_state_update.cu, and step sizes are rounded as there.
//
// Blocks beyond `blocks` fetch ahead what a later kernel reads.
//
// Compile-time, besides decode.cuh's: RANK and RANK_VECTOR, which divides it; DSTATE and VECTOR, likewise; LANES; ENTRIES, LANES
// at most; TENSOR, with LANES 4, packs of 16 bytes, and `dim` a multiple of 8, so that a warp's channels share their sequences.
#include "decode.cuh"

constexpr int ITEMS = (DSTATE + LANES * VECTOR - 1) / (LANES * VECTOR), PACKS = RANK / RANK_VECTOR;
constexpr int TURNS = (PACKS + LANES - 1) / LANES;                     // of the lanes along a row of W
constexpr bool EARLY = TURNS <= 4;                                     // whether a lane's packs fit into registers

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
    const int lane = threadIdx.x % LANES, mine = lane % ENTRIES;       // mine: the sequence whose step size this lane finds
    let_next_begin();
    if (block >= p.blocks) {
        fetch_ahead(p.ahead, p.ahead_bytes, block - p.blocks, p.ahead_blocks);
        wait_for_previous();
        return;
    }
    auto exists = [&](int e) { return first_b + e < p.batch; };
    auto states = [&](int i) { return (i * LANES + lane) * VECTOR < DSTATE ? VECTOR : 0; };                  // of a pack
    const int first_n = lane * VECTOR;
    constexpr int NEXT = LANES * VECTOR;                               // from a pack to the lane's next
    float* state = p.state + (first_b * p.dim + c) * DSTATE + first_n;
    const long long state_row = p.dim * DSTATE;
    auto load_weight = [&](int turn) {
        const int i = turn * LANES + lane;
        return load_pack<element, RANK_VECTOR>(p.dt_weight + c * RANK + i * RANK_VECTOR, exists(0) && i < PACKS ? RANK_VECTOR : 0);
    };
    Pack<float, VECTOR> h[ENTRIES][ITEMS], A[ITEMS];
    const float D = exists(0) ? p.D[c] : 0, dt_bias = exists(0) ? p.dt_bias[c] : 0;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        A[i] = load_pack<float, VECTOR>(p.A + c * DSTATE + first_n + i * NEXT, exists(0) ? states(i) : 0);
#pragma unroll
        for (int e = 0; e < ENTRIES; ++e)
            h[e][i] = load_pack<float, VECTOR>(state + e * state_row + i * NEXT, exists(e) ? states(i) : 0);
    }
    Pack<element, RANK_VECTOR> w[EARLY ? TURNS : 1];
#pragma unroll
    for (int turn = 0; turn < (EARLY ? TURNS : 0); ++turn) w[turn] = load_weight(turn);
    wait_for_previous();

    Pack<element, VECTOR> B[ENTRIES][ITEMS], C[ENTRIES][ITEMS];
    const long long b = first_b + mine;
    float u = 0, gate = 0;
    if (exists(mine)) {
        u = to_real(p.u[b * p.dim + c]);
        gate = to_real(p.z[b * p.z_row + c]);
    }
#pragma unroll
    for (int e = 0; e < ENTRIES; ++e) {
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            B[e][i] = load_pack<element, VECTOR>(p.B + (first_b + e) * p.B_row + first_n + i * NEXT, exists(e) ? states(i) : 0);
            C[e][i] = load_pack<element, VECTOR>(p.C + (first_b + e) * p.C_row + first_n + i * NEXT, exists(e) ? states(i) : 0);
        }
    }
#if TENSOR
    float products[4] = {};                                            // of sequence g and channels 2t and 2t + 1 of the warp's
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll(EARLY ? TURNS : 1)
    for (int turn = 0; turn < TURNS; ++turn) {
        const auto now = EARLY ? w[EARLY ? turn : 0] : load_weight(turn);
        const int i = turn * LANES + lane, valid = g < ENTRIES && exists(g) && i < PACKS ? RANK_VECTOR : 0;
        const auto low = load_pack<element, RANK_VECTOR>(p.low + (first_b + g) * p.low_row + i * RANK_VECTOR, valid);
#pragma unroll
        for (int half = 0; half < 4; half += 2) {
            const unsigned a[4] = {low.bits.word[half], 0, low.bits.word[half + 1], 0};
            multiply_tiles(products, a, now.bits.word[half], now.bits.word[half + 1], element());
        }
    }
    const float even = __shfl_sync(~0u, products[0], 4 * mine + g / 2), odd = __shfl_sync(~0u, products[1], 4 * mine + g / 2);
    const float product = g % 2 ? odd : even;
#else
    float products[ENTRIES] = {};
#pragma unroll(EARLY ? TURNS : 1)
    for (int turn = 0; turn < TURNS; ++turn) {
        const auto now = EARLY ? w[EARLY ? turn : 0] : load_weight(turn);
        const int i = turn * LANES + lane;
#pragma unroll
        for (int e = 0; e < ENTRIES; ++e) {
            const int valid = exists(e) && i < PACKS ? RANK_VECTOR : 0;
            const auto low = load_pack<element, RANK_VECTOR>(p.low + (first_b + e) * p.low_row + i * RANK_VECTOR, valid);
#pragma unroll
            for (int j = 0; j < RANK_VECTOR; ++j) products[e] += to_real(now.get(j)) * to_real(low.get(j));
        }
    }
#endif
    auto sum_over_lanes = [&](float (&sums)[ENTRIES]) {                // that of `mine`
        float sum_of_mine = 0;
#pragma unroll
        for (int e = 0; e < ENTRIES; ++e) {
#pragma unroll
            for (int other = LANES / 2; other > 0; other /= 2) sums[e] += __shfl_xor_sync(~0u, sums[e], other);
            if (e == mine) sum_of_mine = sums[e];
        }
        return sum_of_mine;
    };
#if !TENSOR
    const float product = sum_over_lanes(products);
#endif
    const float step = softplus(to_real(rounded(product)) + dt_bias);

    float sums[ENTRIES] = {};
#pragma unroll
    for (int e = 0; e < ENTRIES; ++e) {
        const float its_step = __shfl_sync(~0u, step, e, LANES), its_u = __shfl_sync(~0u, u, e, LANES);
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                const float input = its_step * its_u * to_real(B[e][i].get(j));
                const float next = decay(its_step, rate_of(A[i].get(j))) * h[e][i].get(j) + input;
                sums[e] = next * to_real(C[e][i].get(j)) + sums[e];
                h[e][i].set(j, next);
            }
            if (exists(e)) store_pack<float, VECTOR>(state + e * state_row + i * NEXT, h[e][i], states(i));
        }
    }
    const float sum = sum_over_lanes(sums);
    if (lane < ENTRIES && exists(mine)) p.y[b * p.dim + c] = rounded((sum + D * u) * gate * sigmoid(gate));
}
