// matrix_vector.cu: the linear maps of a decoding step, one token of each of a few sequences, with what stands around them.
//
//   s_b = W·v_b + bias          W (rows, COLUMNS), for each sequence b
//
//   before   NORM 0   v = x
//            NORM 1   v = RMSNorm or LayerNorm of total = x + residual; total is kept too. x may be rows of a table, by tokens
//   after    WIDTH 0  y = s
//            else     the first `dim` rows are the newest inputs of a causal convolution: y = silu(conv_bias + Σ_j w_j·e_j) for
//                     e = (state, s), and state = the last WIDTH - 1 of e;  the other rows are z
//
// Idea: W is read once, at the rate of memory; nothing else is large. A block has TILES tiles of 8 rows, and its warps take turns
// along the columns. In a warp, lane 4·g + t loads 16 bytes of row g of each tile, and so do its 7 neighbours in g: that is the
// very layout in which tensor cores take their operands (TENSOR: 16-bit types), whose (16, 16)·(16, 8) products then have 8 rows of
// W on one side and 16 sequences on the other. Without them a lane multiplies its row with each sequence. The first DEPTH loads of
// W are on their way before the norm is begun; from then on each takes the place of the one just used. The warps' sums are added
// up in the order of the warps, so that bits are equal on every run.
//
// decode_norm is what stands before alone, for more sequences than every block can have to itself. Blocks beyond `blocks` fetch
// ahead what a later kernel reads.
//
// Compile-time, besides decode.cuh's: COLUMNS; VECTOR, which divides it; TENSOR; BATCH, the sequences of a block (8, 16, 32 or 64
// with TENSOR, else 1, 2, 4 or 8); TILES DEPTH WIDTH NORM LAYER HAS_RESIDUAL NORM_VECTOR; TEAMS, the rows that a block normalises
// (1, 2, 4 or 8; with NORM all there are); the type TOTAL_T.
#include "decode.cuh"

constexpr int PACK = 16 / sizeof(element), STEP = 4 * PACK;            // elements of a load; columns of a warp's
constexpr int STEPS = (COLUMNS + STEP * WARPS - 1) / (STEP * WARPS);   // of a warp
constexpr int ROWS = 8 * TILES;
constexpr int GROUP = BATCH < 16 ? BATCH : 16, GROUPS = BATCH / GROUP; // sequences summed up over warps together
constexpr int VECTORS = !TENSOR ? BATCH : BATCH > 8 ? BATCH / 8 : 1;   // loads of the sequences' numbers for a step
constexpr int STAGED_ROW = (COLUMNS + STEP - 1) / STEP * STEP + 64 / sizeof(element);         // 64 bytes: no bank conflicts
constexpr int STAGED_BYTES = NORM ? BATCH * STAGED_ROW * (int)sizeof(element) : 0;
constexpr int PARTS_BYTES = WARPS * GROUP * ROWS * 4;

struct Params {
    const element *weight, *bias, *x;                                  // bias may be null
    const long long* tokens;                                           // null: x has a row for each sequence
    const TOTAL_T* residual;
    TOTAL_T* total;                                                    // (batch, COLUMNS); may be null
    const float *norm_weight, *norm_bias;
    element *y, *z;
    element* state;                                                    // (batch, dim, WIDTH - 1)
    const float *conv_weight, *conv_bias;                              // (dim, WIDTH), (dim,); conv_bias may be null
    const void* ahead;
    long long rows, batch, dim, x_row, y_row, vocabulary, eps, blocks, ahead_blocks, ahead_bytes, first_block;
};

// The norm of the rows from `first` on, TEAMS of them side by side: put(row, column, y) for NORM_VECTOR neighbours.
template <typename Put>
DEVICE void normalise(const Params& p, long long first, bool keeps_total, Put put) {
    constexpr int SHARE = THREADS / TEAMS, PACKS = COLUMNS / NORM_VECTOR, ITEMS = (PACKS + SHARE - 1) / SHARE;
    __shared__ float of_warps[2][WARPS];
    const int team = threadIdx.x / SHARE, lane = threadIdx.x % SHARE;
    const long long b = first + team;
    const bool exists = b < p.batch;
    long long from = b;
    bool known = true;
    if (p.tokens) {
        from = exists ? p.tokens[b] : 0;
        known = from >= 0 && from < p.vocabulary;
    }
    float r[ITEMS][NORM_VECTOR];
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        const int column = (i * SHARE + lane) * NORM_VECTOR, valid = exists && column < COLUMNS ? NORM_VECTOR : 0;
        const auto x = load_pack<element, NORM_VECTOR>(p.x + from * p.x_row + column, known ? valid : 0);
        Pack<TOTAL_T, NORM_VECTOR> before = {};
        if (HAS_RESIDUAL) before = load_pack<TOTAL_T, NORM_VECTOR>(p.residual + b * COLUMNS + column, valid);
#pragma unroll
        for (int j = 0; j < NORM_VECTOR; ++j) {
            r[i][j] = known ? to_real(x.get(j)) : __uint_as_float(0x7fffffffu);
            if (HAS_RESIDUAL) r[i][j] += to_real(before.get(j));
        }
    }
    auto sum_over_team = [&](float sum, int turn) {
#pragma unroll
        for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
        if (threadIdx.x % 32 == 0) of_warps[turn][threadIdx.x / 32] = sum;
        __syncthreads();
        sum = of_warps[turn][team * (SHARE / 32)];
#pragma unroll
        for (int w = 1; w < SHARE / 32; ++w) sum += of_warps[turn][team * (SHARE / 32) + w];
        return sum;
    };
    float mean = 0, sum = 0;
    if (LAYER) {
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
#pragma unroll
            for (int j = 0; j < NORM_VECTOR; ++j) sum += (i * SHARE + lane) * NORM_VECTOR < COLUMNS ? r[i][j] : 0;
        }
        mean = sum_over_team(sum, 0) / COLUMNS;
        sum = 0;
    }
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
#pragma unroll
        for (int j = 0; j < NORM_VECTOR; ++j)
            sum += (i * SHARE + lane) * NORM_VECTOR < COLUMNS ? (r[i][j] - mean) * (r[i][j] - mean) : 0;
    }
    const float rstd = 1.0f / sqrtf(sum_over_team(sum, 1) / COLUMNS + (float)__longlong_as_double(p.eps));
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        const int column = (i * SHARE + lane) * NORM_VECTOR;
        if (!exists || column >= COLUMNS) continue;
        Pack<element, NORM_VECTOR> y = {};
        Pack<TOTAL_T, NORM_VECTOR> total = {};
#pragma unroll
        for (int j = 0; j < NORM_VECTOR; ++j) {
            TOTAL_T sum;
            from_real(r[i][j], sum);
            total.set(j, sum);
            y.set(j, rounded((r[i][j] - mean) * rstd * p.norm_weight[column + j] + (LAYER ? p.norm_bias[column + j] : 0)));
        }
        put(team, column, y);
        if (p.total && keeps_total) store_pack<TOTAL_T, NORM_VECTOR>(p.total + b * COLUMNS + column, total, NORM_VECTOR);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) decode_norm(const Params p) {
    const long long first = (p.first_block + blockIdx.x) * TEAMS;
    let_next_begin();
    wait_for_previous();
    normalise(p, first, true, [&](int team, int column, const Pack<element, NORM_VECTOR>& y) {
        store_pack<element, NORM_VECTOR>(p.y + (first + team) * p.y_row + column, y, NORM_VECTOR);
    });
}

// What becomes of row `row` of s for sequence b.
DEVICE void finish(const Params& p, long long b, long long row, float s) {
    if (p.bias) s += to_real(p.bias[row]);
    const element e = rounded(s);
    if (WIDTH == 0) {
        p.y[b * p.y_row + row] = e;
    } else if (row >= p.dim) {
        p.z[b * p.dim + row - p.dim] = e;
    } else {
        element* state = p.state + (b * p.dim + row) * (WIDTH - 1);
        float sum = p.conv_bias ? p.conv_bias[row] : 0.0f;
#pragma unroll
        for (int k = 0; k < WIDTH; ++k) {
            const element input = k < WIDTH - 1 ? state[k] : e;
            sum += p.conv_weight[row * WIDTH + k] * to_real(input);
            if (k > 0) state[k - 1] = input;
        }
        p.y[b * p.dim + row] = rounded(sum * sigmoid(sum));
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) matrix_vector(const Params p) {
    __shared__ Pack<float, 4> room[(STAGED_BYTES > PARTS_BYTES ? STAGED_BYTES : PARTS_BYTES) / 16];
    element* staged = reinterpret_cast<element*>(room);
    float* parts = reinterpret_cast<float*>(room);                     // [warp][sequence of a group][row]

    const long long block = p.first_block + blockIdx.x;
    const long long batch_tiles = (p.batch + BATCH - 1) / BATCH;
    const long long first_row = block / batch_tiles * ROWS, first_b = block % batch_tiles * BATCH;
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    let_next_begin();
    if (block >= p.blocks) {
        fetch_ahead(p.ahead, p.ahead_bytes, block - p.blocks, p.ahead_blocks);
        wait_for_previous();
        return;
    }

    typedef Pack<element, PACK> Load;
    Load w[DEPTH][TILES];
    auto column = [&](int step) { return (step * WARPS + warp) * STEP + t * PACK; };
    auto load = [&](int step, Load (&to)[TILES]) {
#pragma unroll
        for (int r = 0; r < TILES; ++r) {
            const long long row = first_row + 8 * r + g;
            const int k = column(step);
            to[r] = load_elements<PACK, VECTOR>(p.weight + row * COLUMNS + k, row < p.rows ? COLUMNS - k : 0);
        }
    };
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) load(d, w[d]);
    if (WIDTH > 0 && threadIdx.x < ROWS && first_row + threadIdx.x < p.dim) {                 // for `finish`
        prefetch(p.conv_weight + (first_row + threadIdx.x) * WIDTH);
        for (long long b = first_b; WIDTH > 1 && b < first_b + BATCH && b < p.batch; ++b)
            prefetch(p.state + (b * p.dim + first_row + threadIdx.x) * (WIDTH - 1));
    }
    wait_for_previous();

    if (NORM) {
        constexpr int TAIL = STAGED_ROW - COLUMNS;                     // zeros: a product with them must not be NaN
        for (int i = threadIdx.x; i < BATCH * TAIL; i += THREADS) staged[i / TAIL * STAGED_ROW + COLUMNS + i % TAIL] = rounded(0);
        for (int i = (int)p.batch * STAGED_ROW + threadIdx.x; i < BATCH * STAGED_ROW; i += THREADS) staged[i] = rounded(0);
        normalise(p, 0, first_row == 0, [&](int team, int column, const Pack<element, NORM_VECTOR>& y) {
            store_pack<element, NORM_VECTOR>(staged + team * STAGED_ROW + column, y, NORM_VECTOR);
        });
        __syncthreads();
    }
    auto take = [&](int step, Load (&v)[VECTORS]) {                    // what the columns of a step are multiplied with
        const int k = column(step);
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) {
            const int b = TENSOR ? 8 * i + g : i;
            const long long sequence = first_b + b;
            if (NORM) v[i] = load_pack<element, PACK>(staged + b * STAGED_ROW + k, k < COLUMNS ? PACK : 0);
            else v[i] = load_elements<PACK, VECTOR>(p.x + sequence * p.x_row + k, sequence < p.batch ? COLUMNS - k : 0);
        }
    };

#if TENSOR
    float sums[GROUPS][TILES][4] = {};
    auto use = [&](const Load (&v)[VECTORS], const Load (&w)[TILES]) {
#pragma unroll
        for (int m = 0; m < GROUPS; ++m) {
            const Load low = v[2 * m], high = BATCH > 8 ? v[BATCH > 8 ? 2 * m + 1 : 0] : Load();
#pragma unroll
            for (int half = 0; half < 4; half += 2) {
                const unsigned *l = low.bits.word + half, *h = high.bits.word + half, a[4] = {l[0], h[0], l[1], h[1]};
#pragma unroll
                for (int r = 0; r < TILES; ++r)
                    multiply_tiles(sums[m][r], a, w[r].bits.word[half], w[r].bits.word[half + 1], element());
            }
        }
    };
#else
    float sums[TILES][BATCH] = {};
    auto use = [&](const Load (&v)[VECTORS], const Load (&w)[TILES]) {
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
#pragma unroll
            for (int r = 0; r < TILES; ++r) {
#pragma unroll
                for (int j = 0; j < PACK; ++j) sums[r][b] += to_real(w[r].get(j)) * to_real(v[b].get(j));
            }
        }
    };
#endif
#pragma unroll 1
    for (int first = 0; first < STEPS; first += DEPTH) {
        Load v[DEPTH][VECTORS];
#pragma unroll
        for (int d = 0; d < DEPTH; ++d) take(first + d, v[d]);
#pragma unroll
        for (int d = 0; d < DEPTH; ++d) {
            use(v[d], w[d]);                                           // beyond the columns both are 0
            load(first + d + DEPTH, w[d]);
        }
    }

#if !TENSOR
#pragma unroll
    for (int r = 0; r < TILES; ++r) {
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
            sums[r][b] += __shfl_xor_sync(~0u, sums[r][b], 1);
            sums[r][b] += __shfl_xor_sync(~0u, sums[r][b], 2);
        }
    }
#endif
#pragma unroll
    for (int m = 0; m < GROUPS; ++m) {
        __syncthreads();                                               // `room` has been read by all
        float* mine = parts + warp * GROUP * ROWS;
#pragma unroll
        for (int r = 0; r < TILES; ++r) {
#if TENSOR
#pragma unroll
            for (int entry = 0; entry < (BATCH > 8 ? 4 : 2); ++entry)
                mine[(g + entry / 2 * 8) * ROWS + 8 * r + 2 * t + entry % 2] = sums[m][r][entry];
#else
#pragma unroll
            for (int b = 0; b < BATCH; ++b) if (b % 4 == t) mine[b * ROWS + 8 * r + g] = sums[r][b];
#endif
        }
        __syncthreads();
        for (int i = threadIdx.x; i < GROUP * ROWS; i += THREADS) {
            float sum = parts[i];
#pragma unroll
            for (int other = 1; other < WARPS; ++other) sum += parts[other * GROUP * ROWS + i];
            const long long b = first_b + m * GROUP + i / ROWS, row = first_row + i % ROWS;
            if (b < p.batch && row < p.rows) finish(p, b, row, sum);
        }
    }
}
