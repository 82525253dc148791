// cross_entropy.cu: softmax cross-entropy over rows of `vocab` logits, and its gradient.
//
//   loss = mean over rows that are not ignored of  log Σ_j exp(l_j) - l_target
//   dl_j = dloss/count·(exp(l_j - m)/s - [j = target]),      m = max_j l_j,  s = Σ_j exp(l_j - m)
//
// Idea: memory-bound, so logits are read once forward and once backward, and nothing of their size is kept. A row belongs to a
// team of TEAM threads; each walks its packs with a running maximum and a sum relative to it, which are combined in a fixed
// order. A row keeps m and s apart: float32 has few digits left for exp(l - lse) where |lse| is large.
//
// A target that is neither a class nor ignore_index makes the loss, and its row of the gradient, NaN.
//
// Compile-time: MEAN (only the kernel that takes the mean) THREADS TEAM (32, or THREADS) VECTOR; the types X_T (of logits),
// TARGET_T, REAL (of arithmetic).
#include "common.cuh"

typedef REAL real;
constexpr int TEAMS = THREADS / TEAM, AHEAD = sizeof(real) == 8 ? 2 : 4;  // AHEAD: packs that are on their way at a time

struct Params {
    const X_T* logits;
    const TARGET_T* targets;                                           // (rows,)
    real *maximum, *total, *losses;                                    // (rows,)
    real *loss, *count;                                                // one number each
    const real* dloss;
    X_T* dlogits;                                                      // (rows, vocab)
    long long rows, inner, vocab, logits_outer, logits_row;            // row r lies at r / inner·outer + r % inner·row
    long long ignore_index, first_block;
};

DEVICE float larger(float a, float b) { return fmaxf(a, b); }          // passes over NaN: the sum finds it
DEVICE double larger(double a, double b) { return fmax(a, b); }
DEVICE float log_of(float x) { return logf(x); }
DEVICE double log_of(double x) { return log(x); }
DEVICE real minus_infinity() { return (real)__longlong_as_double((long long)0xfff0000000000000ull); }

// Σ exp(l - maximum) over some of the logits. Where all of them are -inf so far, the sum is 0.
struct Sum {
    real maximum, total;

    DEVICE void rescale(real to) {
        const real base = to == minus_infinity() ? real(0) : to;
        total *= exp2_fast((maximum - base) * real(LOG2_E));
        maximum = to;
    }
    DEVICE void add(Sum other) {
        const real both = larger(maximum, other.maximum);
        rescale(both);
        other.rescale(both);
        total += other.total;
    }
};

#if MEAN
// One block: the mean of the rows' losses, and how many there are.
extern "C" __global__ void __launch_bounds__(THREADS) cross_entropy_mean(const Params p) {
    __shared__ real sums[THREADS];
    __shared__ long long counts[THREADS];
    real sum = 0, lost = 0;
    long long count = 0;
#pragma unroll 4
    for (long long row = threadIdx.x; row < p.rows; row += THREADS) {
        count += p.targets[row] != p.ignore_index;
        add_exactly(sum, lost, p.losses[row]);                         // 0 where ignored
    }
    sums[threadIdx.x] = sum;
    counts[threadIdx.x] = count;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x >= half) continue;
        sums[threadIdx.x] += sums[threadIdx.x + half];
        counts[threadIdx.x] += counts[threadIdx.x + half];
    }
    if (threadIdx.x > 0) return;
    *p.count = real(counts[0]);
    *p.loss = counts[0] ? sums[0] / real(counts[0]) : real(0);
}
#else

struct Row {
    long long index;
    bool present;
    int lane;
    const X_T* logits;
    long long packs;

    DEVICE Row(const Params& p) {
        index = (p.first_block + blockIdx.x) * TEAMS + threadIdx.x / TEAM;
        present = index < p.rows;
        lane = threadIdx.x % TEAM;
        logits = p.logits + index / p.inner * p.logits_outer + index % p.inner * p.logits_row;
        packs = p.vocab / VECTOR;
    }
    DEVICE int valid(long long pack) const { return present && pack < packs ? VECTOR : 0; }
};

extern "C" __global__ void __launch_bounds__(THREADS) cross_entropy_fwd(const Params p) {
    __shared__ Sum of_warps[THREADS / 32];
    const Row row(p);
    Sum sum = {minus_infinity(), real(0)};
    for (long long first = row.lane; row.present && first < row.packs; first += TEAM * AHEAD) {
        Pack<X_T, VECTOR> packs[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) {
            const long long pack = first + k * TEAM;
            packs[k] = load_pack<X_T, VECTOR>(row.logits + pack * VECTOR, row.valid(pack));
        }
        real maximum = sum.maximum;
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) {
#pragma unroll
            for (int j = 0; j < VECTOR; ++j)
                if (row.valid(first + k * TEAM)) maximum = larger(maximum, to_real(packs[k].get(j)));
        }
        sum.rescale(maximum);
        const real base = maximum == minus_infinity() ? real(0) : maximum;
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) {
            if (!row.valid(first + k * TEAM)) continue;
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) sum.total += exp2_fast((to_real(packs[k].get(j)) - base) * real(LOG2_E));
        }
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        Sum other = {__shfl_down_sync(~0u, sum.maximum, offset), __shfl_down_sync(~0u, sum.total, offset)};
        sum.add(other);                                                // right in lane 0, which is all that is used
    }
    if (TEAM > 32) {
        if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = sum;
        __syncthreads();
        if (threadIdx.x == 0)
            for (int w = 1; w < THREADS / 32; ++w) sum.add(of_warps[w]);
    }
    if (!row.present || row.lane != 0) return;
    p.maximum[row.index] = sum.maximum;
    p.total[row.index] = sum.total;
    const long long target = p.targets[row.index];
    real loss = real(0);
    if (target >= 0 && target < p.vocab && target != p.ignore_index)
        loss = log_of(sum.total) - (to_real(row.logits[target]) - sum.maximum);
    else if (target != p.ignore_index)
        loss = (real)__longlong_as_double(0x7ff8000000000000ll);       // NaN
    p.losses[row.index] = loss;
}

extern "C" __global__ void __launch_bounds__(THREADS) cross_entropy_bwd(const Params p) {
    const Row row(p);
    if (!row.present) return;
    const long long target = p.targets[row.index];
    const bool ignored = target == p.ignore_index, outside = target < 0 || target >= p.vocab;
    const real maximum = p.maximum[row.index], inverse = real(1) / p.total[row.index];
    real scale = ignored ? real(0) : *p.dloss / *p.count;
    if (outside && !ignored) scale = (real)__longlong_as_double(0x7ff8000000000000ll);        // NaN
    X_T* dlogits = p.dlogits + row.index * p.vocab;
    for (long long first = row.lane; first < row.packs; first += TEAM * AHEAD) {
        Pack<X_T, VECTOR> packs[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) {
            const long long pack = first + k * TEAM;
            packs[k] = load_pack<X_T, VECTOR>(row.logits + pack * VECTOR, row.valid(pack));
        }
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) {
            const long long pack = first + k * TEAM;
            if (!row.valid(pack)) continue;
            Pack<X_T, VECTOR> out = {};
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                real share = exp2_fast((to_real(packs[k].get(j)) - maximum) * real(LOG2_E)) * inverse;
                if (pack * VECTOR + j == target) share -= real(1);
                X_T rounded;
                from_real(ignored ? real(0) : share * scale, rounded);  // also where logits are not finite
                out.set(j, rounded);
            }
            store_pack<X_T, VECTOR>(dlogits + pack * VECTOR, out, VECTOR);
        }
    }
}
#endif
