// embedding.cu: rows of a table, and the gradient of the table.
//
//   y_i = weight[token_i]                    dweight[v] += Σ_{i: token_i = v} dy_i
//
// Idea of the gradient: no atomics. Tokens come sorted, so that equal ones stand side by side in the order in which they
// came. A thread has VECTOR columns of CHUNK sorted tokens and sums runs of equal ones. A run inside a chunk is a finished row
// of dweight. One that crosses borders leaves a part in each chunk it touches: in `tails` of the chunk in which it begins,
// in `heads` of those into which it goes on; embedding_join adds these up from first to last.
//
// A token that is no row of the table reads NaN, and its gradient is dropped: it is sorted as `vocabulary`, behind all others.
//
// Compile-time: BACKWARD VECTOR CHUNK; the types TOKEN_T, W_T (of weight, y, dweight), DY_T, REAL (of sums).
#include "common.cuh"

typedef REAL real;
constexpr int AHEAD = 4;                                               // rows that are on their way at a time

struct Params {
    const TOKEN_T* tokens;                                             // (count,); backward: sorted
    const W_T* weight;
    W_T* y;                                                            // (count, dim)
    const DY_T* dy;
    const long long* order;                                            // (count,): where the sorted tokens stood
    W_T* dweight;                                                      // (vocabulary, dim)
    real *heads, *tails;                                               // (chunks, dim)
    long long count, dim, vocabulary, weight_row, dy_row, first_block;
};

DEVICE void add_row(const Params& p, long long token, long long column, const real (&sum)[VECTOR]) {
    if (token >= p.vocabulary) return;
    W_T* to = p.dweight + token * p.dim + column;
    Pack<W_T, VECTOR> row = load_pack<W_T, VECTOR>(to, VECTOR);
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) {
        W_T rounded;
        from_real(real(to_real(row.get(j))) + sum[j], rounded);
        row.set(j, rounded);
    }
    store_pack<W_T, VECTOR>(to, row, VECTOR);
}

#if !BACKWARD
extern "C" __global__ void __launch_bounds__(256) embedding_fwd(const Params p) {
    const long long index = (p.first_block + blockIdx.x) * 256 + threadIdx.x, packs = p.dim / VECTOR;
    if (index >= p.count * packs) return;
    const long long i = index / packs, column = index % packs * VECTOR, token = p.tokens[i];
    Pack<W_T, VECTOR> row = {};
    if (token >= 0 && token < p.vocabulary) {
        row = load_pack<W_T, VECTOR>(p.weight + token * p.weight_row + column, VECTOR);
    } else {
        W_T nan;
        from_real((real)__longlong_as_double(0x7ff8000000000000ll), nan);
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) row.set(j, nan);
    }
    store_pack<W_T, VECTOR>(p.y + i * p.dim + column, row, VECTOR);
}
#else

extern "C" __global__ void __launch_bounds__(256) embedding_bwd(const Params p) {
    const long long index = (p.first_block + blockIdx.x) * 256 + threadIdx.x, packs = p.dim / VECTOR;
    const long long chunk = index / packs, column = index % packs * VECTOR, begin = chunk * CHUNK;
    if (begin >= p.count) return;
    const long long end = begin + CHUNK < p.count ? begin + CHUNK : p.count;
    bool goes_on = begin > 0 && p.tokens[begin - 1] == p.tokens[begin];                       // the run began before this chunk
    real sum[VECTOR] = {};
    for (long long first = begin; first < end; first += AHEAD) {
        Pack<DY_T, VECTOR> rows[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; ++k)
            if (first + k < end) rows[k] = load_pack<DY_T, VECTOR>(p.dy + p.order[first + k] * p.dy_row + column, VECTOR);
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) {
            const long long i = first + k;
            if (i >= end) continue;
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) sum[j] += real(to_real(rows[k].get(j)));
            const long long token = p.tokens[i];
            const bool run_ends = i + 1 == p.count || p.tokens[i + 1] != token;
            if (!run_ends && i + 1 < end) continue;
            if (run_ends && !goes_on) {
                add_row(p, token, column, sum);
            } else {
                real* to = (goes_on ? p.heads : p.tails) + chunk * p.dim + column;
#pragma unroll
                for (int j = 0; j < VECTOR; ++j) to[j] = sum[j];
            }
            goes_on = false;
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) sum[j] = real(0);
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) embedding_join(const Params p) {
    const long long index = (p.first_block + blockIdx.x) * 256 + threadIdx.x, packs = p.dim / VECTOR;
    const long long chunk = index / packs, column = index % packs * VECTOR, begin = chunk * CHUNK, end = begin + CHUNK;
    if (end >= p.count) return;                                        // no run leaves the last chunk
    const long long token = p.tokens[end];
    if (p.tokens[end - 1] != token) return;                            // nor this one
    if (begin > 0 && p.tokens[begin - 1] == token) return;             // it began before: it is another chunk's to write
    real sum[VECTOR], lost[VECTOR] = {};
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) sum[j] = p.tails[chunk * p.dim + column + j];
    for (long long next = chunk + 1; next * CHUNK < p.count && p.tokens[next * CHUNK] == token; ++next) {
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) add_exactly(sum[j], lost[j], p.heads[next * p.dim + column + j]);
    }
    add_row(p, token, column, sum);
}
#endif
