// selective_state_update.cu: one step of the selective scan, in place.
//
//   h = exp(Δ·A)·h + Δ·B·x,   y = (Σ_n C·h + D·x)·silu(z)          Δ = softplus(dt + dt_bias) or dt + dt_bias
//
// Idea: the states are read and written once and nothing else weighs, so they are moved 16 bytes at a time. LANES neighbouring
// lanes share a channel of a batch entry, with VECTOR neighbouring states each in turn, and add up Σ_n C·h among them in a fixed
// order. The arithmetic is that of selective_scan_fwd.cu.
//
// Compile-time: element types U_T (x, dt, z, y), B_T, C_T (their reals), COMPLEX, LANES, and VECTOR. Where VECTOR is above 1, the
// states of state, A, B and C lie side by side, and VECTOR divides their other strides and fits their addresses.
#include "common.cuh"

typedef U_T element;
typedef decltype(to_real(element())) real;
constexpr int THREADS = 128;
constexpr int REALS = COMPLEX ? 2 : 1;
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
    const long long c = channel % p.dim, b = channel / p.dim;
    const int lane = threadIdx.x % LANES;
    const bool exists = b < p.batch;                                   // the others stay for the sum across lanes

    real sum = 0, x = 0;
    if (exists) {
        x = to_real(p.x[b * p.x_batch + c * p.x_dim]);
        real dt = to_real(p.dt[b * p.dt_batch + c * p.dt_dim]);
        if (p.dt_bias) dt += p.dt_bias[c * p.bias_dim];
        if (p.dt_softplus) dt = softplus(dt);
        const real dtx = dt * x;
        real* state = p.state + b * p.state_batch + c * p.state_dim;
        const real* A = p.A + c * p.A_dim;
        const B_T* B = p.B + b * p.B_batch + c / p.span_of_B * p.B_group;
        const C_T* C = p.C + b * p.C_batch + c / p.span_of_C * p.C_group;
        for (long long n = lane * VECTOR; n < p.dstate; n += LANES * VECTOR) {
            const int valid = REALS * (p.dstate - n < VECTOR ? (int)(p.dstate - n) : VECTOR);
            auto h_pack = load_pack<real, VECTOR * REALS>(state + n * p.state_n, valid);
            const auto A_pack = load_pack<real, VECTOR * REALS>(A + n * p.A_n, valid);
            const auto B_pack = load_pack<B_T, VECTOR * REALS>(B + n * p.B_n, valid);
            const auto C_pack = load_pack<C_T, VECTOR * REALS>(C + n * p.C_n, valid);
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                const state_t a = decay(dt, rate_of(state_of(A_pack, j, state_t())));
                const state_t input = dtx * state_of(B_pack, j, state_t());
                const state_t h = multiply_add(a, state_of(h_pack, j, state_t()), input);
                sum = real_product(h, state_of(C_pack, j, state_t()), sum);
                set_state(h_pack, j, h);
            }
            store_pack<real, VECTOR * REALS>(state + n * p.state_n, h_pack, valid);
        }
    }
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (!exists || lane > 0) return;
    if (COMPLEX) sum *= real(2);
    if (p.D) sum += p.D[c * p.D_dim] * x;
    if (p.z) {
        const real gate = to_real(p.z[b * p.z_batch + c * p.z_dim]);
        sum *= gate * sigmoid(gate);
    }
    element rounded;
    from_real(sum, rounded);
    p.y[channel] = rounded;
}
