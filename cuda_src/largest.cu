// largest.cu: the place of the largest number of each row, the first of equals.
//
//   places_b = argmax_v x_bv          v < size
//
// Idea: a large block a row, whose threads ask for AHEAD packs before they look at the first; each thread keeps the best of its
// packs, then warps and the block compare theirs. On equal numbers the smaller place wins, so the order of comparing does not
// matter.
//
// Compile-time, besides decode.cuh's: VECTOR, which divides x_row.
#include "decode.cuh"

constexpr int ROW_WARPS = 32, LANES = 32 * ROW_WARPS, AHEAD = 8;

struct Params {
    const element* x;                                                  // (batch, x_row), of which `size` columns count
    long long* places;                                                 // (batch,)
    long long size, x_row, first_block;
};

struct Best { float value; int place; };

DEVICE Best better(Best a, Best b) { return b.value > a.value || (b.value == a.value && b.place < a.place) ? b : a; }

DEVICE Best best_of_warp(Best best) {
#pragma unroll
    for (int other = 16; other > 0; other /= 2)
        best = better(best, {__shfl_xor_sync(~0u, best.value, other), __shfl_xor_sync(~0u, best.place, other)});
    return best;
}

extern "C" __global__ void __launch_bounds__(LANES) largest(const Params p) {
    const long long row = p.first_block + blockIdx.x;
    __shared__ Best of_warps[ROW_WARPS];
    Best best = {-__uint_as_float(0x7f800000u), 0x7fffffff};
    let_next_begin();
    wait_for_previous();
    for (long long first = threadIdx.x * VECTOR; first < p.size; first += AHEAD * LANES * VECTOR) {
        Pack<element, VECTOR> x[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const long long at = first + i * LANES * VECTOR;
            x[i] = load_pack<element, VECTOR>(p.x + row * p.x_row + at, at < p.size ? VECTOR : 0);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                const long long at = first + i * LANES * VECTOR + j;
                const float value = to_real(x[i].get(j));
                if (at < p.size && value > best.value) best = {value, (int)at};              // places come in order
            }
        }
    }
    best = best_of_warp(best);
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = best;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    best = best_of_warp(of_warps[threadIdx.x]);
    if (threadIdx.x == 0) p.places[row] = best.place < p.size ? best.place : 0;               // nothing above -inf
}
