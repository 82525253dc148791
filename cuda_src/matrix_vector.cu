// matrix_vector.cu: the linear maps of a decoding step, one token of each of a few sequences, with what stands around them.
//
//   s_b = W·v_b + bias          W (rows, COLUMNS), for each sequence b
//
//   before   NORM 0   v = x
//            NORM 1   v = RMSNorm or LayerNorm of total = x + residual; total is kept too. x may be rows of a table, by tokens,
//                     or come in PARTS to be added up
//   after    WIDTH 0  y = s
//            else     the first `dim` rows are the newest inputs of a causal convolution: y = silu(conv_bias + Σ_j w_j·e_j) for
//                     e = (state, s), and state = the last WIDTH - 1 of e;  the other rows are z
//
// Idea: W is read once, at the rate of memory; nothing else is large. A block has TILES tiles of 8 rows at a time, and further
// ones in turn where there are more, and its warps take turns along the columns. In a warp, lane 4·g + t loads 16 bytes of row g
// of each tile, and so do its 7 neighbours in g: that is the very layout in which tensor cores take their operands (TENSOR: 16-bit
// types), whose (16, 16)·(16, 8) products then have 8 rows of W on one side and 16 sequences on the other. Without them a lane
// multiplies its row with each sequence. The first DEPTH loads of W, and all else that no kernel in front makes, are on their way
// before the norm is begun; from then on each load takes the place of the one just used. The warps' sums are added up in the order
// of the warps, so that bits are equal on every run.
//
// decode_norm is what stands before alone, for more sequences than every block can have to itself. Blocks beyond `blocks` fetch
// ahead what a later kernel reads.
//
// Compile-time, besides decode.cuh's: COLUMNS; VECTOR, which divides it; TENSOR; BATCH, the sequences of a block (8, 16, 32 or 64
// with TENSOR, else 1, 2, 4 or 8); TILES DEPTH WIDTH NORM LAYER HAS_RESIDUAL NORM_VECTOR PARTS; MORE, whether a block has rows in
// turn; TEAMS, the rows that a block normalises (1, 2, 4 or 8; with NORM all there are); the type TOTAL_T.
#include "decode.cuh"

constexpr int PACK = 16 / sizeof(element), STEP = 4 * PACK;            // elements of a load; columns of a warp's
constexpr int STEPS = (COLUMNS + STEP * WARPS - 1) / (STEP * WARPS);   // of a warp
constexpr int ROUNDED_STEPS = (STEPS + DEPTH - 1) / DEPTH * DEPTH;
constexpr int ROWS = 8 * TILES;
constexpr int GROUP = BATCH < 16 ? BATCH : 16, GROUPS = BATCH / GROUP; // sequences summed up over warps together
constexpr int VECTORS = !TENSOR ? BATCH : BATCH > 8 ? BATCH / 8 : 1;   // loads of the sequences' numbers for a step
constexpr int STAGED_ROW = (COLUMNS + STEP - 1) / STEP * STEP + 64 / sizeof(element);         // 64 bytes: no bank conflicts
constexpr int STAGED_BYTES = NORM ? BATCH * STAGED_ROW * (int)sizeof(element) : 0;
constexpr int RESULTS = GROUP * ROWS;                                  // of a tile and a group of sequences
constexpr bool ONE_EACH = GROUPS == 1 && RESULTS <= THREADS;           // results a thread, at most

struct Params {
    const element *weight, *bias, *x;                                  // bias may be null
    const float* parts;                                                // (PARTS, batch, COLUMNS), whose sum x is
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

// How the rows that are normalised, TEAMS of them side by side, are laid over threads: NORM_VECTOR neighbours a thread, in turn.
constexpr int SHARE = THREADS / TEAMS, PACKS = COLUMNS / NORM_VECTOR, ITEMS = (PACKS + SHARE - 1) / SHARE;
constexpr bool EARLY = ITEMS <= 4;                                     // whether weights fit into registers

struct NormWeights {
    Pack<float, NORM_VECTOR> weight[ITEMS], bias[ITEMS];

    DEVICE void load(const Params& p, int i) {
        const int column = (i * SHARE + threadIdx.x % SHARE) * NORM_VECTOR, valid = column < COLUMNS ? NORM_VECTOR : 0;
        weight[i] = load_pack<float, NORM_VECTOR>(p.norm_weight + column, valid);
        if (LAYER) bias[i] = load_pack<float, NORM_VECTOR>(p.norm_bias + column, valid);
    }
    // What is there before the kernel in front has ended.
    DEVICE void load_early(const Params& p) {
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) if (EARLY) load(p, i);
    }
};

DEVICE Pack<element, NORM_VECTOR> load_x(const Params& p, long long row, int column, int valid) {
    if (PARTS == 0) return load_pack<element, NORM_VECTOR>(p.x + row * p.x_row + column, valid);
    Pack<float, NORM_VECTOR> parts[PARTS > 0 ? PARTS : 1];
#pragma unroll
    for (int k = 0; k < PARTS; ++k)
        parts[k] = load_pack<float, NORM_VECTOR>(p.parts + (k * p.batch + row) * COLUMNS + column, valid);
    Pack<element, NORM_VECTOR> x = {};
#pragma unroll
    for (int j = 0; j < NORM_VECTOR; ++j) {
        float sum = parts[0].get(j);
#pragma unroll
        for (int k = 1; k < PARTS; ++k) sum += parts[k].get(j);
        x.set(j, rounded(sum));
    }
    return x;
}

// The norm of the rows from `first` on: put(row, column, y) for NORM_VECTOR neighbours.
template <typename Put>
DEVICE void normalise(const Params& p, long long first, bool keeps_total, NormWeights& weights, Put put) {
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
        const auto x = load_x(p, from, column, known ? valid : 0);
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
        if (!EARLY) weights.load(p, i);
        if (!exists || column >= COLUMNS) continue;
        Pack<element, NORM_VECTOR> y = {};
        Pack<TOTAL_T, NORM_VECTOR> total = {};
#pragma unroll
        for (int j = 0; j < NORM_VECTOR; ++j) {
            TOTAL_T sum;
            from_real(r[i][j], sum);
            total.set(j, sum);
            y.set(j, rounded((r[i][j] - mean) * rstd * weights.weight[i].get(j) + (LAYER ? weights.bias[i].get(j) : 0)));
        }
        put(team, column, y);
        if (p.total && keeps_total) store_pack<TOTAL_T, NORM_VECTOR>(p.total + b * COLUMNS + column, total, NORM_VECTOR);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) decode_norm(const Params p) {
    const long long first = (p.first_block + blockIdx.x) * TEAMS;
    NormWeights weights;
    let_next_begin();
    weights.load_early(p);
    wait_for_previous();
    normalise(p, first, true, weights, [&](int team, int column, const Pack<element, NORM_VECTOR>& y) {
        store_pack<element, NORM_VECTOR>(p.y + (first + team) * p.y_row + column, y, NORM_VECTOR);
    });
}

// What becomes of row `row` of s for sequence b, and what that needs besides: all there before the kernel in front has ended.
struct Finish {
    long long b, row;
    bool exists;
    float bias, conv_bias, conv_weight[WIDTH > 0 ? WIDTH : 1];
    element before[WIDTH > 1 ? WIDTH - 1 : 1];

    DEVICE bool is_convolved(const Params& p) const { return WIDTH > 0 && row < p.dim; }
    DEVICE element* state(const Params& p) const { return p.state + (b * p.dim + row) * (WIDTH - 1); }
    DEVICE void load(const Params& p, long long sequence, long long row_of_s) {
        b = sequence;
        row = row_of_s;
        exists = b < p.batch && row < p.rows;
        if (!exists) return;
        bias = p.bias ? to_real(p.bias[row]) : 0.0f;
        if (!is_convolved(p)) return;
        conv_bias = p.conv_bias ? p.conv_bias[row] : 0.0f;
#pragma unroll
        for (int k = 0; k < WIDTH; ++k) conv_weight[k] = p.conv_weight[row * WIDTH + k];
#pragma unroll
        for (int k = 0; k < WIDTH - 1; ++k) before[k] = state(p)[k];
    }
    DEVICE void operator()(const Params& p, float s) const {
        if (!exists) return;
        const element e = rounded(s + bias);
        if (WIDTH == 0) {
            p.y[b * p.y_row + row] = e;
        } else if (!is_convolved(p)) {
            p.z[b * p.dim + row - p.dim] = e;
        } else {
            float sum = conv_bias;
#pragma unroll
            for (int k = 0; k < WIDTH; ++k) {
                const element input = k < WIDTH - 1 ? before[k < WIDTH - 1 ? k : 0] : e;
                sum += conv_weight[k] * to_real(input);
                if (k > 0) state(p)[k - 1] = input;
            }
            p.y[b * p.dim + row] = rounded(sum * sigmoid(sum));
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, BATCH <= 8 ? 2 : 0) matrix_vector(const Params p) {
    __shared__ Pack<float, 4> staged_room[STAGED_BYTES > 0 ? STAGED_BYTES / 16 : 1];
    __shared__ float parts[WARPS * RESULTS];                           // [warp][sequence of a group][row]
    element* staged = reinterpret_cast<element*>(staged_room);

    const long long block = p.first_block + blockIdx.x;
    const long long batch_tiles = (p.batch + BATCH - 1) / BATCH;
    const long long first_b = block % batch_tiles * BATCH, stride = p.blocks / batch_tiles * ROWS;
    long long first_row = block / batch_tiles * ROWS;                  // of a tile of rows; the block's next is `stride` further
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
    auto load = [&](int step, Load (&to)[TILES]) {                     // from ROUNDED_STEPS on: of the next tile
        const bool is_next = MORE && step >= ROUNDED_STEPS;
        const int k = column(is_next ? step - ROUNDED_STEPS : step);
#pragma unroll
        for (int r = 0; r < TILES; ++r) {
            const long long row = first_row + (is_next ? stride : 0) + 8 * r + g;
            to[r] = load_elements<PACK, VECTOR>(p.weight + row * COLUMNS + k, row < p.rows ? COLUMNS - k : 0);
        }
    };
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) load(d, w[d]);
    Finish finish;
    if (ONE_EACH && threadIdx.x < RESULTS) finish.load(p, first_b + threadIdx.x / ROWS, first_row + threadIdx.x % ROWS);
    NormWeights weights;
    if (NORM) {
        weights.load_early(p);
        constexpr int TAIL = STAGED_ROW - COLUMNS;                     // zeros: a product with them must not be NaN
        for (int i = threadIdx.x; i < BATCH * TAIL; i += THREADS) staged[i / TAIL * STAGED_ROW + COLUMNS + i % TAIL] = rounded(0);
        for (int i = (int)p.batch * STAGED_ROW + threadIdx.x; i < BATCH * STAGED_ROW; i += THREADS) staged[i] = rounded(0);
    }
    wait_for_previous();

    if (NORM) {
        normalise(p, 0, first_row == 0, weights, [&](int team, int column, const Pack<element, NORM_VECTOR>& y) {
            *reinterpret_cast<Pack<element, NORM_VECTOR>*>(staged + team * STAGED_ROW + column) = y;
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

    do {
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
        float sums[1][TILES][BATCH] = {};
        auto use = [&](const Load (&v)[VECTORS], const Load (&w)[TILES]) {
#pragma unroll
            for (int b = 0; b < BATCH; ++b) {
#pragma unroll
                for (int r = 0; r < TILES; ++r) {
#pragma unroll
                    for (int j = 0; j < PACK; ++j) sums[0][r][b] += to_real(w[r].get(j)) * to_real(v[b].get(j));
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
                use(v[d], w[d]);                                       // beyond the columns both are 0
                load(first + d + DEPTH, w[d]);
            }
        }
#if !TENSOR
#pragma unroll
        for (int r = 0; r < TILES; ++r) {
#pragma unroll
            for (int b = 0; b < BATCH; ++b) {
                sums[0][r][b] += __shfl_xor_sync(~0u, sums[0][r][b], 1);
                sums[0][r][b] += __shfl_xor_sync(~0u, sums[0][r][b], 2);
            }
        }
#endif
#pragma unroll
        for (int m = 0; m < GROUPS; ++m) {
            __syncthreads();                                           // `parts` has been read by all
            float* mine = parts + warp * RESULTS;
#pragma unroll
            for (int r = 0; r < TILES; ++r) {
#if TENSOR
#pragma unroll
                for (int entry = 0; entry < (BATCH > 8 ? 4 : 2); ++entry)
                    mine[(g + entry / 2 * 8) * ROWS + 8 * r + 2 * t + entry % 2] = sums[m][r][entry];
#else
#pragma unroll
                for (int b = 0; b < BATCH; ++b) if (b % 4 == t) mine[b * ROWS + 8 * r + g] = sums[m][r][b];
#endif
            }
            __syncthreads();
            for (int i = threadIdx.x; i < RESULTS; i += THREADS) {
                float sum = parts[i];
#pragma unroll
                for (int other = 1; other < WARPS; ++other) sum += parts[other * RESULTS + i];
                if (!ONE_EACH) finish.load(p, first_b + m * GROUP + i / ROWS, first_row + i % ROWS);
                finish(p, sum);
                if (MORE && ONE_EACH) finish.load(p, finish.b, finish.row + stride);
            }
        }
        first_row += stride;
    } while (MORE && first_row < p.rows);
}
