// largest.cu: the place of the largest number of each row, the first of equals.
//
//   places_b = argmax_v x_bv          v < size
//
// Idea: a block a row; each thread keeps the best of its packs, then warps and the block compare theirs. On equal numbers the
// smaller place wins, so the order of comparing does not matter.
//
// Compile-time, besides decode.cuh's: VECTOR, which divides x_row.
#include "decode.cuh"

struct Params {
    const element* x;                                                  // (batch, x_row), of which `size` columns count
    long long* places;                                                 // (batch,)
    long long size, x_row, first_block;
};

struct Best { float value; int place; };

DEVICE Best better(Best a, Best b) { return b.value > a.value || (b.value == a.value && b.place < a.place) ? b : a; }

extern "C" __global__ void __launch_bounds__(THREADS) largest(const Params p) {
    const long long row = p.first_block + blockIdx.x;
    __shared__ Best of_warps[WARPS];
    Best best = {-__uint_as_float(0x7f800000u), 0x7fffffff};
    let_next_begin();
    wait_for_previous();
#pragma unroll 4
    for (long long first = threadIdx.x * VECTOR; first < p.size; first += THREADS * VECTOR) {
        const auto x = load_pack<element, VECTOR>(p.x + row * p.x_row + first, VECTOR);
#pragma unroll
        for (int j = 0; j < VECTOR; ++j)
            if (first + j < p.size) best = better(best, {to_real(x.get(j)), (int)first + j});
    }
#pragma unroll
    for (int other = 16; other > 0; other /= 2)
        best = better(best, {__shfl_xor_sync(~0u, best.value, other), __shfl_xor_sync(~0u, best.place, other)});
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = best;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int w = 1; w < WARPS; ++w) best = better(best, of_warps[w]);
    p.places[row] = best.place < p.size ? best.place : 0;              // nothing but NaN
}
