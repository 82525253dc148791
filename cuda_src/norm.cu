// norm.cu: RMSNorm and LayerNorm of a sum, r = x + residual, over rows of `dim` numbers.
//
//   RMSNorm     x̂ = r·rstd            rstd = 1/sqrt(mean(r²) + eps)               y = x̂·w
//   LayerNorm   x̂ = (r - mean)·rstd   rstd = 1/sqrt(mean((r - mean)²) + eps)      y = x̂·w + bias
//   backward    g = w·dy,  dr = (g - x̂·mean(x̂·g) [- mean(g)])·rstd + dresidual_out,  dw = Σ_rows dy·x̂,  dbias = Σ_rows dy
//
// Idea: memory-bound, so each row is read once. A row belongs to a team of TEAM neighbouring threads (a few lanes to 16 warps),
// which keep it in registers, ITEMS packs of VECTOR neighbours each, between its sums and its results. Sums over a team: first
// within a thread, then by lane exchange, then over warps in order. Teams beside each other in a block have a row each.
//
// Backward, a block walks `rows_of_part` rows and keeps its parts of dw and dbias in registers; sum_parts.cu adds the parts up.
//
// Rows too long for registers (not KEPT) are read again instead, and norm_bwd_weight makes the parts of dw, by columns.
//
// Compile-time: BACKWARD LAYER (norm) KEPT THREADS TEAM VECTOR ITEMS BLOCKS_PER_SM (backward); HAS_RESIDUAL (forward: there is
// one to add; backward: its gradient has a dtype of its own); the types X_T (x, y, dx), W_T, RESIDUAL_T, TOTAL_T (of
// residual_out), REAL (of arithmetic), and DY_T, DTOTAL_T of the gradients that come in.
#include "common.cuh"

typedef REAL real;
constexpr int TEAMS = THREADS / TEAM, WARPS = TEAM > 32 ? TEAM / 32 : 1;                      // of a block; of a team

struct Params {
    const X_T* x;
    const RESIDUAL_T* residual;
    const W_T *weight, *bias;                                          // bias may be null
    X_T* y;
    TOTAL_T* residual_out;                                             // backward reads it; forward, null: it is x itself
    real *mean, *rstd;                                                 // (rows,); mean: LayerNorm's
    const DY_T* dy;
    const DTOTAL_T* dresidual_out;                                     // may be null
    X_T* dx;
    RESIDUAL_T* dresidual;
    real *dweight_parts, *dbias_parts;                                 // (parts, dim)
    long long rows, dim, x_row, residual_row, total_row, dy_row, dtotal_row;   // …_row: from one row to the next, in elements
    long long rows_of_part, eps, first_block;                          // eps: the bits of a double
};

// Sums of COUNT numbers over a team, in a fixed order; every thread of it gets them. All threads of a block come here together.
// Two buffers take turns, so one barrier a call is enough: who writes a buffer again has seen everyone leave its last reading.
template <int COUNT>
DEVICE void sum_over_team(real (&sums)[COUNT], int& turn) {
    __shared__ real of_warps[2][COUNT][THREADS > 32 ? THREADS / 32 : 1];
#pragma unroll
    for (int offset = 1; offset < TEAM && offset < 32; offset *= 2) {
#pragma unroll
        for (int k = 0; k < COUNT; ++k) sums[k] += __shfl_xor_sync(~0u, sums[k], offset);
    }
    if (WARPS == 1) return;
    const int first = threadIdx.x / TEAM * WARPS;
#pragma unroll
    for (int k = 0; k < COUNT; ++k)
        if (threadIdx.x % 32 == 0) of_warps[turn][k][threadIdx.x / 32] = sums[k];
    __syncthreads();
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
        sums[k] = of_warps[turn][k][first];
#pragma unroll
        for (int w = 1; w < WARPS; ++w) sums[k] += of_warps[turn][k][first + w];
    }
    turn ^= 1;
}

// The packs of a row that are this thread's: number i begins at column (i·TEAM + lane)·VECTOR.
struct Places {
    long long packs;                                                   // of a row
    int lane;
    bool present;                                                      // whether there is a row at all

    DEVICE long long column(long long i) const { return (i * TEAM + lane) * VECTOR; }
    DEVICE int valid(long long i) const { return present && i * TEAM + lane < packs ? VECTOR : 0; }
    DEVICE long long items() const { return KEPT ? ITEMS : (packs + TEAM - 1) / TEAM; }
};

#if !BACKWARD
extern "C" __global__ void __launch_bounds__(THREADS) norm_fwd(const Params p) {
    const long long row = (p.first_block + blockIdx.x) * TEAMS + threadIdx.x / TEAM;
    const Places at = {p.dim / VECTOR, (int)threadIdx.x % TEAM, row < p.rows};
    const X_T* x = p.x + row * p.x_row;
    const RESIDUAL_T* residual = p.residual + (HAS_RESIDUAL ? row * p.residual_row : 0);
    int turn = 0;

    typedef Pack<X_T, VECTOR> XPack;
    typedef Pack<RESIDUAL_T, VECTOR> ResidualPack;
    auto load = [&](long long i, XPack& a, ResidualPack& b) {
        a = load_pack<X_T, VECTOR>(x + at.column(i), at.valid(i));
        if (HAS_RESIDUAL) b = load_pack<RESIDUAL_T, VECTOR>(residual + at.column(i), at.valid(i));
    };
    auto add = [&](const XPack& a, const ResidualPack& b, real (&r)[VECTOR]) {
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) {
            r[j] = to_real(a.get(j));
            if (HAS_RESIDUAL) r[j] += real(to_real(b.get(j)));
        }
    };

    real kept[KEPT ? ITEMS : 1][VECTOR];
    if (KEPT) {
        XPack a[ITEMS];
        ResidualPack b[ITEMS];
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) load(i, a[i], b[i]);           // all on their way before the first is used
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) add(a[i], b[i], kept[KEPT ? i : 0]);
    }
    auto each = [&](auto what) {                                       // what(i, r) for every pack
        if (KEPT) {
#pragma unroll
            for (int i = 0; i < ITEMS; ++i) what((long long)i, kept[KEPT ? i : 0]);
        } else {
            for (long long i = 0; i < at.items(); ++i) {
                XPack a;
                ResidualPack b;
                real r[VECTOR];
                load(i, a, b);
                add(a, b, r);
                what(i, r);
            }
        }
    };

    real mean = 0, sum[1] = {0};
    if (LAYER) {
        each([&](long long, const real (&r)[VECTOR]) {
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) sum[0] += r[j];
        });
        sum_over_team(sum, turn);
        mean = sum[0] / real(p.dim);
        sum[0] = 0;
    }
    each([&](long long i, const real (&r)[VECTOR]) {
        if (at.valid(i)) {                                             // beyond the row is 0, which is not the mean
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) sum[0] += (r[j] - mean) * (r[j] - mean);
        }
    });
    sum_over_team(sum, turn);
    const real rstd = real(1) / sqrt(sum[0] / real(p.dim) + real(__longlong_as_double(p.eps)));

    each([&](long long i, const real (&r)[VECTOR]) {
        if (!at.valid(i)) return;
        const long long column = at.column(i);
        Pack<W_T, VECTOR> w = load_pack<W_T, VECTOR>(p.weight + column, VECTOR), bias = {};
        if (LAYER && p.bias) bias = load_pack<W_T, VECTOR>(p.bias + column, VECTOR);
        Pack<X_T, VECTOR> y = {};
        Pack<TOTAL_T, VECTOR> total = {};
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) {
            X_T rounded;
            TOTAL_T rounded_total;
            from_real((r[j] - mean) * rstd * real(to_real(w.get(j))) + real(to_real(bias.get(j))), rounded);
            from_real(r[j], rounded_total);
            y.set(j, rounded);
            total.set(j, rounded_total);
        }
        store_pack<X_T, VECTOR>(p.y + row * p.dim + column, y, VECTOR);
        if (p.residual_out) store_pack<TOTAL_T, VECTOR>(p.residual_out + row * p.total_row + column, total, VECTOR);
    });
    if (at.present && at.lane == 0) {
        p.rstd[row] = rstd;
        if (LAYER) p.mean[row] = mean;
    }
}
#else

// What a thread reads of one pack of one row, and what follows from it.
struct Item {
    Pack<TOTAL_T, VECTOR> total;
    Pack<DY_T, VECTOR> dy;
    Pack<DTOTAL_T, VECTOR> dtotal;

    DEVICE void load(const Params& p, long long row, long long column, int valid) {
        total = load_pack<TOTAL_T, VECTOR>(p.residual_out + row * p.total_row + column, valid);
        dy = load_pack<DY_T, VECTOR>(p.dy + row * p.dy_row + column, valid);
        dtotal = {};
        if (p.dresidual_out) dtotal = load_pack<DTOTAL_T, VECTOR>(p.dresidual_out + row * p.dtotal_row + column, valid);
    }
    DEVICE real normal(int j, real mean, real rstd) const { return (real(to_real(total.get(j))) - mean) * rstd; }       // x̂
    DEVICE real gradient(int j) const { return real(to_real(dy.get(j))); }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) norm_bwd(const Params p) {
    const long long part = p.first_block + blockIdx.x;
    const long long begin = part * p.rows_of_part, end = begin + p.rows_of_part < p.rows ? begin + p.rows_of_part : p.rows;
    const int lane = threadIdx.x % TEAM, team = threadIdx.x / TEAM;
    real dweight[KEPT ? ITEMS : 1][VECTOR] = {}, dbias[KEPT && LAYER ? ITEMS : 1][VECTOR] = {};
    int turn = 0;

    for (long long first = begin; first < end; first += TEAMS) {       // the same number of times for all teams of the block
        const long long row = first + team;
        const Places at = {p.dim / VECTOR, lane, row < end};
        const real rstd = at.present ? p.rstd[row] : real(0), mean = LAYER && at.present ? p.mean[row] : real(0);
        Item kept[KEPT ? ITEMS : 1];
        if (KEPT) {
#pragma unroll
            for (int i = 0; i < ITEMS; ++i) kept[KEPT ? i : 0].load(p, row, at.column(i), at.valid(i));
        }
        auto each = [&](auto what) {                                   // what(i, item, weights) for every pack
            if (KEPT) {
#pragma unroll
                for (int i = 0; i < ITEMS; ++i)
                    what(i, kept[KEPT ? i : 0], load_pack<W_T, VECTOR>(p.weight + at.column(i), at.valid(i)));
            } else {
                for (long long i = 0; i < at.items(); ++i) {
                    Item item;
                    item.load(p, row, at.column(i), at.valid(i));
                    what(i, item, load_pack<W_T, VECTOR>(p.weight + at.column(i), at.valid(i)));
                }
            }
        };

        real sums[2] = {0, 0};                                         // Σ x̂·g, Σ g
        each([&](auto i, const Item& item, const Pack<W_T, VECTOR>& w) {
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                real dy = item.gradient(j), normal = item.normal(j, mean, rstd), g = dy * real(to_real(w.get(j)));
                sums[0] += normal * g;
                if (LAYER) sums[1] += g;
                if (KEPT) {
                    dweight[KEPT ? i : 0][j] += dy * normal;
                    if (LAYER) dbias[KEPT ? i : 0][j] += dy;
                }
            }
        });
        sum_over_team(sums, turn);
        const real along = sums[0] / real(p.dim), shift = sums[1] / real(p.dim);

        each([&](auto i, const Item& item, const Pack<W_T, VECTOR>& w) {
            if (!at.valid(i)) return;
            Pack<X_T, VECTOR> dx = {};
            Pack<RESIDUAL_T, VECTOR> dresidual = {};
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                real g = item.gradient(j) * real(to_real(w.get(j)));
                real dr = (g - item.normal(j, mean, rstd) * along - shift) * rstd + real(to_real(item.dtotal.get(j)));
                X_T rounded;
                RESIDUAL_T rounded_residual;
                from_real(dr, rounded);
                from_real(dr, rounded_residual);
                dx.set(j, rounded);
                dresidual.set(j, rounded_residual);
            }
            const long long to = row * p.dim + at.column(i);
            store_in_words<X_T, VECTOR>(p.dx + to, dx);
            if (HAS_RESIDUAL) store_in_words<RESIDUAL_T, VECTOR>(p.dresidual + to, dresidual);
        });
    }
    if (!KEPT) return;

    // The teams' parts of dw and dbias become the block's, in the order of the teams.
    __shared__ real parts[TEAMS > 1 ? TEAMS : 1][TEAM * VECTOR];
    const Places at = {p.dim / VECTOR, lane, true};
    auto write = [&](real* to, int i, const real (&mine)[VECTOR]) {
        __syncthreads();                                               // those of the pack before have been read
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) parts[team][lane * VECTOR + j] = mine[j];
        __syncthreads();
        if (team > 0 || !at.valid(i)) return;
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) {
            real sum = parts[0][lane * VECTOR + j];
#pragma unroll 4
            for (int t = 1; t < TEAMS; ++t) sum += parts[t][lane * VECTOR + j];
            to[part * p.dim + at.column(i) + j] = sum;
        }
    };
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        write(p.dweight_parts, i, dweight[KEPT ? i : 0]);
        if (LAYER && p.dbias_parts) write(p.dbias_parts, i, dbias[KEPT && LAYER ? i : 0]);
    }
}

// Rows too long for registers: a thread owns VECTOR columns and walks down the rows of a part.
extern "C" __global__ void __launch_bounds__(THREADS) norm_bwd_weight(const Params p) {
    const long long packs = p.dim / VECTOR, block = p.first_block + blockIdx.x;
    const long long blocks_of_part = (packs + THREADS - 1) / THREADS;
    const long long part = block / blocks_of_part, pack = block % blocks_of_part * THREADS + threadIdx.x;
    const long long column = pack * VECTOR;
    const long long begin = part * p.rows_of_part, end = begin + p.rows_of_part < p.rows ? begin + p.rows_of_part : p.rows;
    if (pack >= packs) return;
    real dweight[VECTOR] = {}, dbias[VECTOR] = {};
#pragma unroll 4
    for (long long row = begin; row < end; ++row) {
        Pack<TOTAL_T, VECTOR> total = load_pack<TOTAL_T, VECTOR>(p.residual_out + row * p.total_row + column, VECTOR);
        Pack<DY_T, VECTOR> dys = load_pack<DY_T, VECTOR>(p.dy + row * p.dy_row + column, VECTOR);
        const real rstd = p.rstd[row], mean = LAYER ? p.mean[row] : real(0);
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) {
            real dy = to_real(dys.get(j));
            dweight[j] += dy * ((real(to_real(total.get(j))) - mean) * rstd);
            if (LAYER) dbias[j] += dy;
        }
    }
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) {
        p.dweight_parts[part * p.dim + column + j] = dweight[j];
        if (LAYER && p.dbias_parts) p.dbias_parts[part * p.dim + column + j] = dbias[j];
    }
}
#endif
