// sum_parts.cu: the last step of sums over blocks, in a fixed order and therefore with equal bits on every run.
//
//   out[o][n][t] = Σ_j parts[o][j][t][n]          varying B and C: over channels, and turned into their layout
//   out[n] = Σ_j parts[j][n]                      dA, dD, ddelta_bias, constant B and C: the same with one o and one t
//
// Here n counts real numbers; `reals` of them, the 2 of a complex value, stay side by side in `out`.
//
// Idea: one launch for up to five sums, each with blocks of its own. A block sums a tile of OUTPUTS / shares outputs: `shares`
// threads an output, each with every shares-th part, and then their sums in halves; Kahan's summation, so that rounding does not
// grow with the number of parts. A thread has PER_THREAD outputs, and reads AHEAD parts of them before it adds the first. The
// tile passes through shared memory, because its input is contiguous along n and its output along t.
//
// Compile-time: REAL accumulator type, OVERLAP (common.cuh).
#include "common.cuh"

constexpr int THREADS = 256, PER_THREAD = 4, OUTPUTS = THREADS * PER_THREAD;
constexpr int AHEAD = 6, WIDEST = 16 / sizeof(REAL);

struct Params {
    const REAL* parts[5];
    void* out[5];
    long long blocks[5];                                               // of each sum, which follow one another in the grid
    long long count[5], stride[5], rows[5], columns[5];                // parts; numbers from one to the next; sizes of t and n
    long long shares[5], wide[5], vector[5];                           // wide: columns of a tile; vector: WIDEST, or 1
    long long type[5];                                                 // of out: 0 REAL, 1 float16, 2 bfloat16
    long long reals, first_block;
};

struct Tile {
    const REAL* parts;                                                 // at its first row and column
    long long stride, row_stride;
    int rows, columns, wide, count, shares;                            // rows and columns: how many exist
};

// Where output i of a tile's first share, and those of the others behind it, lie in shared memory: threads that write neighbours
// along t, `wide` outputs apart, read from different banks.
DEVICE constexpr int place(int i) { return i + i / 32; }

// Every thread's share of its outputs, VECTOR at a time, which lie beside those of the next lane of its share.
template <int VECTOR> DEVICE void sum_shares(const Tile& tile, REAL* sums) {
    const int lanes = THREADS / tile.shares, share = threadIdx.x / lanes, lane = threadIdx.x % lanes;
    const long long step = tile.shares * tile.stride;                  // from one part of a share to its next
#pragma unroll 1
    for (int output = lane * VECTOR; output < lanes * PER_THREAD; output += lanes * VECTOR) {
        const int row = output / tile.wide, column = output % tile.wide;
        const bool exists = row < tile.rows && column < tile.columns;
        const REAL* from = tile.parts + share * tile.stride + row * tile.row_stride + column;
        REAL sum[VECTOR] = {}, lost[VECTOR] = {};
        for (int left = exists ? (tile.count - share + tile.shares - 1) / tile.shares : 0; left > 0; left -= AHEAD) {
            Pack<REAL, VECTOR> read[AHEAD];
#pragma unroll
            for (int a = 0; a < AHEAD; ++a) {
                if (a < left) read[a] = load_pack<REAL, VECTOR>(from, VECTOR);
                from += step;
            }
#pragma unroll
            for (int a = 0; a < AHEAD; ++a) {
                if (a >= left) break;
#pragma unroll
                for (int i = 0; i < VECTOR; ++i) add_exactly(sum[i], lost[i], read[a].get(i));
            }
        }
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) sums[place(share * lanes * PER_THREAD + output + i)] = sum[i];
    }
}

template <typename T> DEVICE void store(void* out, long long at, REAL x) {
    T rounded;
    from_real(x, rounded);
    static_cast<T*>(out)[at] = rounded;
}

extern "C" __global__ void __launch_bounds__(THREADS, 3) sum_parts(const Params p) {
    __shared__ REAL sums[place(OUTPUTS)];
    long long index = p.first_block + blockIdx.x;
    int k = 0;
    while (index >= p.blocks[k]) index -= p.blocks[k++];

    const long long rows = p.rows[k], columns = p.columns[k];
    const int shares = (int)p.shares[k], wide = (int)p.wide[k], outputs = OUTPUTS / shares, tall = outputs / wide;
    const long long row_tiles = (rows + tall - 1) / tall, column_tiles = (columns + wide - 1) / wide;
    const long long outer = index / (row_tiles * column_tiles);
    const long long row0 = index % row_tiles * tall, column0 = index / row_tiles % column_tiles * wide;
    const REAL* parts = p.parts[k] + outer * p.count[k] * p.stride[k] + row0 * columns + column0;
    const Tile tile = {parts, p.stride[k], columns, (int)min((long long)tall, rows - row0),
                       (int)min((long long)wide, columns - column0), wide, (int)p.count[k], shares};
    const long long first = outer * rows * columns + column0 * rows + row0 * p.reals;         // of the tile in `out`
    wait_for_previous();
    if (p.vector[k] == WIDEST) sum_shares<WIDEST>(tile, sums); else sum_shares<1>(tile, sums);
    for (int half = shares / 2; half > 0; half /= 2) {
        __syncthreads();
#pragma unroll 1
        for (int i = threadIdx.x; i < half * outputs; i += THREADS) sums[place(i)] += sums[place(i + half * outputs)];
    }
    __syncthreads();

    const int reals = (int)p.reals;
#pragma unroll 1
    for (int i = threadIdx.x; i < outputs; i += THREADS) {             // in the order of `out`
        const int row = i / reals % tall, value = i / reals / tall, column = value * reals + i % reals;
        if (row >= tile.rows || column >= tile.columns) continue;
        const long long at = first + value * p.rows[k] * reals + row * reals + i % reals;
        const REAL sum = sums[place(row * wide + column)];
        if (sizeof(REAL) == 8 || p.type[k] == 0) store<REAL>(p.out[k], at, sum);
        else if (p.type[k] == 1) store<float16>(p.out[k], at, sum);
        else store<bfloat16>(p.out[k], at, sum);
    }
}
