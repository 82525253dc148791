// selective_state_update.cu: one step of the selective scan, in place.
//
//   h = exp(Δ·A)·h + Δ·B·x,   y = (Σ_n C·h + D·x)·silu(z)          Δ = softplus(dt + dt_bias) or dt + dt_bias
//
// Idea: the states are read and written once and nothing else weighs, so they are moved 16 bytes at a time, and all is asked for
// before anything is used. LANES neighbouring lanes share a channel of ENTRIES batch entries, with VECTOR neighbouring states each
// in turn, and add up Σ_n C·h among them in a fixed order; the entries share A, D and dt_bias. Step size, x and gate of an entry
// are found by one lane, the step size and x for all. The arithmetic is that of selective_scan_fwd.cu.
//
// Compile-time: element types U_T (x, dt, z, y), B_T, C_T (their reals), COMPLEX, LANES; ENTRIES, LANES at most; and VECTOR, which
// divides dstate. Where VECTOR is above 1, the states of state, A, B and C lie side by side, and VECTOR divides their other strides
// and fits their addresses.
#include "common.cuh"

typedef U_T element;
typedef decltype(to_real(element())) real;
constexpr int THREADS = 128;
constexpr int REALS = COMPLEX ? 2 : 1;
constexpr bool EARLY = sizeof(real) == 4;                              // states are asked for before step sizes, which call functions
#if COMPLEX
typedef Complex<real> state_t;
#else
typedef real state_t;
#endif

struct Params {
    real* state;
    const element *x, *dt, *z;
    element* y;                                                        // (batch, dim), C-contiguous
    const real *A, *D, *dt_bias;
    const B_T* B;
    const C_T* C;
    long long batch, dim, dstate, span_of_B, span_of_C, dt_softplus;   // span: channels of a group
    long long state_batch, state_dim, state_n, x_batch, x_dim, dt_batch, dt_dim, z_batch, z_dim;   // strides in elements; those
    long long A_dim, A_n, D_dim, bias_dim, B_batch, B_group, B_n, C_batch, C_group, C_n;            // of complex ones in reals
    long long first_block;
};

template <typename P> DEVICE real state_of(const P& pack, int j, real) { return to_real(pack.get(j)); }
template <typename P> DEVICE Complex<real> state_of(const P& pack, int j, Complex<real>) {
    return {to_real(pack.get(2 * j)), to_real(pack.get(2 * j + 1))};
}
template <typename P> DEVICE void set_state(P& pack, int j, real h) { pack.set(j, h); }
template <typename P> DEVICE void set_state(P& pack, int j, Complex<real> h) {
    pack.set(2 * j, h.re);
    pack.set(2 * j + 1, h.im);
}

extern "C" __global__ void __launch_bounds__(THREADS) selective_state_update(const Params p) {
    const long long channel = ((p.first_block + blockIdx.x) * THREADS + threadIdx.x) / LANES;
    const long long c = channel % p.dim, first_b = channel / p.dim * ENTRIES;
    const int lane = threadIdx.x % LANES, mine = lane % ENTRIES;       // mine: the entry whose step size this lane finds
    auto exists = [&](int e) { return first_b + e < p.batch; };        // the others stay for the exchanges between lanes

    auto from_n = [&](long long n, long long stride) { return n * (VECTOR > 1 ? REALS : stride); };
    real* state = p.state + first_b * p.state_batch + c * p.state_dim;
    const real* A = p.A + c * p.A_dim;
    const B_T* B = p.B + first_b * p.B_batch + c / p.span_of_B * p.B_group;
    const C_T* C = p.C + first_b * p.C_batch + c / p.span_of_C * p.C_group;
    Pack<real, VECTOR * REALS> A_now, h[ENTRIES];
    Pack<B_T, VECTOR * REALS> B_now[ENTRIES];
    Pack<C_T, VECTOR * REALS> C_now[ENTRIES];
    auto load = [&](long long n) {
        A_now = load_whole<real, VECTOR * REALS>(A + from_n(n, p.A_n), n < p.dstate && exists(0));
#pragma unroll
        for (int e = 0; e < ENTRIES; ++e) {
            const bool there = n < p.dstate && exists(e);
            h[e] = load_whole<real, VECTOR * REALS>(state + e * p.state_batch + from_n(n, p.state_n), there);
            B_now[e] = load_whole<B_T, VECTOR * REALS>(B + e * p.B_batch + from_n(n, p.B_n), there);
            C_now[e] = load_whole<C_T, VECTOR * REALS>(C + e * p.C_batch + from_n(n, p.C_n), there);
        }
    };
    if (EARLY) load(lane * VECTOR);
    const long long b = first_b + mine;
    real x = 0, step[1] = {0}, gate = 0, D = 0;
    if (exists(mine)) {
        x = to_real(p.x[b * p.x_batch + c * p.x_dim]);
        step[0] = to_real(p.dt[b * p.dt_batch + c * p.dt_dim]);
        if (p.z) gate = to_real(p.z[b * p.z_batch + c * p.z_dim]);
        if (p.dt_bias) step[0] += p.dt_bias[c * p.bias_dim];
        if (p.D) D = p.D[c * p.D_dim];
    }
    if (p.dt_softplus) softplus_each(step);
    if (!EARLY) load(lane * VECTOR);

    real sums[ENTRIES] = {};
    for (long long n = lane * VECTOR, turn = 0; turn * LANES * VECTOR < p.dstate; n += LANES * VECTOR, ++turn) {
        if (turn > 0) load(n);
#pragma unroll
        for (int e = 0; e < ENTRIES; ++e) {
            const real its_step = __shfl_sync(~0u, step[0], e, LANES), its_x = __shfl_sync(~0u, x, e, LANES);
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                const state_t a = decay(its_step, rate_of(state_of(A_now, j, state_t())));
                const state_t input = its_step * its_x * state_of(B_now[e], j, state_t());
                const state_t next = multiply_add(a, state_of(h[e], j, state_t()), input);
                sums[e] = real_product(next, state_of(C_now[e], j, state_t()), sums[e]);
                set_state(h[e], j, next);
            }
            store_whole<real, VECTOR * REALS>(state + e * p.state_batch + from_n(n, p.state_n), h[e], n < p.dstate && exists(e));
        }
    }
    real sum = 0;
#pragma unroll
    for (int e = 0; e < ENTRIES; ++e) {
#pragma unroll
        for (int other = LANES / 2; other > 0; other /= 2) sums[e] += __shfl_xor_sync(~0u, sums[e], other);
        if (e == mine) sum = sums[e];
    }
    if (lane >= ENTRIES || !exists(mine)) return;
    if (COMPLEX) sum *= real(2);
    if (p.D) sum += D * x;
    if (p.z) sum *= gate * sigmoid(gate);
    element rounded;
    from_real(sum, rounded);
    p.y[b * p.dim + c] = rounded;
}
