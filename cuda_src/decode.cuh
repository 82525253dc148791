// decode.cuh: what the kernels of a decoding step share: products of small tiles, loads ahead of time.
//
// A step is some hundred short kernels in a row, each bound by memory or by latency. So what a kernel reads that does not depend
// on the one before it (weights, above all) is asked for before that one has ended.
//
// Compile-time: ELEMENT, the type of weights and activations; OVERLAP (common.cuh).
#pragma once
#include "common.cuh"

typedef ELEMENT element;

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int LINE = 128;                                              // bytes that L2 fetches at a time

// Block number `block` of `blocks` asks for its share of so many bytes: weights of a later kernel, while this one is too small to
// keep the memory busy.
DEVICE void fetch_ahead(const void* from, long long bytes, long long block, long long blocks) {
    for (long long at = (block * THREADS + threadIdx.x) * LINE; at < bytes; at += blocks * THREADS * LINE)
        prefetch((const char*)from + at);
}

// COUNT elements, loaded AT_A_TIME, zeros from the `valid`-th on; AT_A_TIME divides `valid`, so no load is a part of one.
template <int COUNT, int AT_A_TIME>
DEVICE Pack<element, COUNT> load_elements(const element* from, long long valid) {
    if (AT_A_TIME == COUNT) return load_pack<element, COUNT>(from, valid > 0 ? COUNT : 0);
    Pack<element, COUNT> pack = {};
#pragma unroll
    for (int j = 0; j < COUNT; j += AT_A_TIME) {
        const auto part = load_pack<element, AT_A_TIME>(from + j, valid > j ? AT_A_TIME : 0);
#pragma unroll
        for (int i = 0; i < AT_A_TIME; ++i) pack.set(j + i, part.get(i));
    }
    return pack;
}

DEVICE element rounded(float x) {
    element y;
    from_real(x, y);
    return y;
}

// c += a·b for a (16, 16), b (16, 8), c (16, 8) spread over a warp. Lane 4·g + t has, each word two neighbours along k:
//   a   rows g and g + 8 at k = 2t (words 0, 1) and at k = 2t + 8 (words 2, 3)
//   b   column g at k = 2t and at k = 2t + 8
//   c   columns 2t and 2t + 1 of row g, then of row g + 8
// As k is summed over, any order of it will do that is the same for a and b.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
DEVICE void multiply_tiles(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, float16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE void multiply_tiles(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, bfloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#else
DEVICE unsigned of_lane(unsigned x, int lane) { return __shfl_xor_sync(~0u, x, (threadIdx.x % 32) ^ lane); }
template <typename T> DEVICE void multiply_tiles(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, T) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    unsigned rows[4][4], columns[4][4];                                // word of a or b, and the lane in g that has it
#pragma unroll
    for (int from = 0; from < 4; ++from) {
#pragma unroll
        for (int word = 0; word < 4; ++word) {
            rows[word][from] = of_lane(a[word], 4 * g + from);
            columns[word][from] = of_lane(word / 2 ? b1 : b0, 4 * (2 * t + word % 2) + from);
        }
    }
#pragma unroll
    for (int entry = 0; entry < 4; ++entry) {
#pragma unroll
        for (int k = 0; k < 16; ++k) {
            const unsigned left = rows[entry / 2 + k / 8 * 2][k % 8 / 2], right = columns[entry % 2 + k / 8 * 2][k % 8 / 2];
            const T x = {(unsigned short)(left >> k % 2 * 16)}, y = {(unsigned short)(right >> k % 2 * 16)};
            c[entry] += to_real(x) * to_real(y);
        }
    }
}
#endif
