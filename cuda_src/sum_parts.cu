// sum_parts.cu: the last step of sums over blocks, in a fixed order and therefore with equal bits on every run.
//
//   sum_parts   out[i] = Σ_j parts[j][i]                                         dA, dD, ddelta_bias, constant B and C
//   sum_turned  out[o][n][t] = Σ_j parts[o·parts_of_one + j][t][n]               varying B and C: turned into their layout
//
// Idea: SHARES threads an output, each with every SHARES-th part; Kahan's summation, so that rounding does not grow with their
// number. sum_turned passes through shared memory, because its input is contiguous along n and its output along t.
//
// Compile-time: REAL accumulator type, OUT_T element type of the output, REALS 2 for complex values and 1 else; SHARES, a power
// of two (sum_turned: 1).
#include "common.cuh"

struct Params {
    const REAL* parts;
    OUT_T* out;
    long long count, size, rows, columns;                              // parts to add; outputs; steps and values of one
    long long out_outer, out_column, out_row, out_real, out_groups, out_group, first_block;
};

DEVICE REAL sum_of(const REAL* from, long long count, long long stride) {
    REAL sum = 0, lost = 0;
#pragma unroll 4
    for (long long j = 0; j < count; ++j) add_exactly(sum, lost, from[j * stride]);
    return sum;
}

extern "C" __global__ void __launch_bounds__(256) sum_parts(const Params p) {
    __shared__ REAL shares[256];
    constexpr int OUTPUTS = 256 / SHARES;                              // of a block
    const int output = threadIdx.x % OUTPUTS, share = threadIdx.x / OUTPUTS;
    const long long i = (p.first_block + blockIdx.x) * OUTPUTS + output;
    if (i < p.size) shares[threadIdx.x] = sum_of(p.parts + share * p.size + i, (p.count - share + SHARES - 1) / SHARES, SHARES * p.size);
    for (int half = SHARES / 2; half > 0; half /= 2) {
        __syncthreads();
        if (i < p.size && share < half) shares[threadIdx.x] += shares[threadIdx.x + half * OUTPUTS];
    }
    if (i >= p.size || share > 0) return;
    OUT_T rounded;
    from_real(shares[threadIdx.x], rounded);
    p.out[i] = rounded;
}

// A block sums 32 steps x 32 reals of one output; `columns` counts reals.
extern "C" __global__ void __launch_bounds__(256) sum_turned(const Params p) {
    __shared__ REAL tile[32][33];
    const long long row_blocks = (p.rows + 31) / 32, column_blocks = (p.columns + 31) / 32;
    const long long index = p.first_block + blockIdx.x, outer = index / (row_blocks * column_blocks);
    const long long row0 = index % row_blocks * 32, column0 = index / row_blocks % column_blocks * 32;
    const int x = threadIdx.x % 32, y = threadIdx.x / 32;
    for (int r = y; r < 32; r += 8) {
        if (row0 + r >= p.rows || column0 + x >= p.columns) continue;
        const REAL* from = p.parts + (outer * p.count * p.rows + row0 + r) * p.columns + column0 + x;
        tile[r][x] = sum_of(from, p.count, p.rows * p.columns);
    }
    __syncthreads();
    OUT_T* out = p.out + outer / p.out_groups * p.out_outer + outer % p.out_groups * p.out_group;
    for (int c = y; c < 32; c += 8) {
        long long row = row0 + x, column = column0 + c;
        if (row >= p.rows || column >= p.columns) continue;
        OUT_T rounded;
        from_real(tile[x][c], rounded);
        out[column / REALS * p.out_column + column % REALS * p.out_real + row * p.out_row] = rounded;
    }
}
