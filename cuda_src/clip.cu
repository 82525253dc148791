// clip.cu: gradients scaled so that their norm, over all arrays together, is at most `most`.
//
//   norm = √(Σ g²)        scale = min(1, most/(norm + 1e-6))        g = scale·g
//
// Three launches. sum_of_squares leaves the sum of each block in `parts`, clip_norm adds those up in one block, clip_scale
// multiplies. Every sum has a fixed order: of a thread, of a warp in halves, of a block's warps, of the blocks.
//
// Compile-time: element type X_T of the gradients, REAL of sums and norm; VECTOR.
#define FACTS 0
#define ROW 4
#include "many.cuh"

struct Params {
    const long long *owner, *table;                                    // many.cuh; a row: g, scaled g
    REAL *parts, *result;                                              // sums of squares of blocks; norm, scale
    long long count, first_part, most, first_block;                    // count: of parts;  most: the bits of a double
};

typedef decltype(to_real(X_T())) real;

DEVICE REAL sum_over_block(REAL sum) {
    __shared__ REAL of_warps[THREADS / 32];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = of_warps[0];
#pragma unroll
    for (int w = 1; w < THREADS / 32; ++w) sum += of_warps[w];
    return sum;
}

extern "C" __global__ void __launch_bounds__(THREADS) sum_of_squares(const Params p) {
    const long long block = p.first_block + blockIdx.x;
    const Part part(p.owner, p.table, block);
    const X_T* x = part.array<X_T>(0);
    Pack<X_T, VECTOR> packs[ITEMS];
#pragma unroll
    for (int item = 0; item < ITEMS; ++item) packs[item] = load_pack<X_T, VECTOR>(x + part.at(item), part.valid(item));
    REAL sum = 0;
#pragma unroll
    for (int item = 0; item < ITEMS; ++item) {
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) {
            const REAL g = to_real(packs[item].get(j));
            sum += g * g;
        }
    }
    sum = sum_over_block(sum);
    if (threadIdx.x == 0) p.parts[p.first_part + block] = sum;
}

extern "C" __global__ void __launch_bounds__(THREADS) clip_norm(const Params p) {
    REAL sum = 0;
#pragma unroll 8
    for (long long i = threadIdx.x; i < p.count; i += THREADS) sum += p.parts[i];
    sum = sum_over_block(sum);
    if (threadIdx.x > 0) return;
    const REAL norm = sqrt(sum), scale = (REAL)__longlong_as_double(p.most) / (norm + (REAL)1e-6);
    p.result[0] = norm;
    p.result[1] = scale > 1 ? (REAL)1 : scale;                         // NaN stays NaN
}

extern "C" __global__ void __launch_bounds__(THREADS) clip_scale(const Params p) {
    const Part part(p.owner, p.table, p.first_block + blockIdx.x);
    const X_T* x = part.array<X_T>(0);
    X_T* to = part.array<X_T>(1);
    const real scale = (real)p.result[1];
#pragma unroll
    for (int item = 0; item < ITEMS; ++item) {
        const int valid = part.valid(item);
        Pack<X_T, VECTOR> pack = load_pack<X_T, VECTOR>(x + part.at(item), valid);
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) {
            X_T rounded;
            from_real(to_real(pack.get(j)) * scale, rounded);
            pack.set(j, rounded);
        }
        store_pack<X_T, VECTOR>(to + part.at(item), pack, valid);
    }
}
