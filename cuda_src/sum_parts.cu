// sum_parts.cu: the last step of sums over blocks, in a fixed order and therefore with equal bits on every run.
//
//   sum_parts   out[i] = Σ_j parts[j][i]                                         dA, dD, ddelta_bias, constant B and C
//   sum_turned  out[o][n][t] = Σ_j parts[o·parts_of_one + j][t][n]               varying B and C: turned into their layout
//
// Idea: one thread an output, parts in the order of their index. sum_turned passes through shared memory, because its input is
// contiguous along n and its output along t.
//
// Compile-time: REAL accumulator type, OUT_T element type of the output, REALS 2 for complex values and 1 else.
#include "common.cuh"

struct Params {
    const REAL* parts;
    OUT_T* out;
    long long count, size, rows, columns;                              // parts to add; outputs; steps and values of one
    long long out_outer, out_column, out_row, out_real, out_groups, out_group, first_block;
};

extern "C" __global__ void __launch_bounds__(256) sum_parts(const Params p) {
    long long i = (p.first_block + blockIdx.x) * 256 + threadIdx.x;
    if (i >= p.size) return;
    REAL sum = 0;
    for (long long j = 0; j < p.count; ++j) sum += p.parts[j * p.size + i];
    OUT_T rounded;
    from_real(sum, rounded);
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
        REAL sum = 0;
        if (row0 + r < p.rows && column0 + x < p.columns) {
            const REAL* from = p.parts + (outer * p.count * p.rows + row0 + r) * p.columns + column0 + x;
            for (long long j = 0; j < p.count; ++j) sum += from[j * p.rows * p.columns];
        }
        tile[r][x] = sum;
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
