// round.cu: copies of float32 arrays in 16 bits, for all parameters at once.
//
// Idea: memory is the only limit. A thread moves VECTOR neighbouring elements by one instruction; many.cuh says which.
//
// Compile-time: element type Y_T of the copies; VECTOR.
#define FACTS 0
#define ROW 4
#include "many.cuh"

struct Params {
    const long long *owner, *table;                                    // many.cuh; a row: array, copy
    long long first_block;
};

extern "C" __global__ void __launch_bounds__(THREADS) round_all(const Params p) {
    const Part part(p.owner, p.table, p.first_block + blockIdx.x);
    const float* x = part.array<float>(0);
    Y_T* y = part.array<Y_T>(1);
    Pack<float, VECTOR> packs[ITEMS];
#pragma unroll
    for (int item = 0; item < ITEMS; ++item) packs[item] = load_pack<float, VECTOR>(x + part.at(item), part.valid(item));
#pragma unroll
    for (int item = 0; item < ITEMS; ++item) {
        Pack<Y_T, VECTOR> rounded;
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) {
            Y_T value;
            from_real(packs[item].get(j), value);
            rounded.set(j, value);
        }
        store_pack<Y_T, VECTOR>(y + part.at(item), rounded, part.valid(item));
    }
}
