// clear.cu: zeros, before the blocks of a launch tell each other by flags what they have left (RELAY in tile.cuh).
//
// Idea: the launch behind it may begin at once, and waits for it only before it looks at the first flag.
#define OVERLAP 1
#include "common.cuh"

constexpr int THREADS = 256;

struct Params {
    unsigned* published;
    long long count, first_block;
};

extern "C" __global__ void __launch_bounds__(THREADS) clear(const Params p) {
    let_next_begin();
    const long long i = (p.first_block + blockIdx.x) * THREADS + threadIdx.x;
    if (i < p.count) p.published[i] = 0;
}
