// scan_constants.cu: a mixer's parameters as the scan takes them, all by one launch.
//
//   A = -exp(A_log),   and D and dt_bias in the type of arithmetic
//
// Idea: a thread an entry of A; those of the first `dim` have one of D and of dt_bias besides.
//
// Compile-time: A_T, D_T, BIAS_T (types of the parameters), REAL.
#include "common.cuh"

typedef REAL real;
constexpr int THREADS = 256;

struct Params {
    const A_T* A_log;
    const D_T* D;
    const BIAS_T* dt_bias;
    real *A, *real_D, *real_dt_bias;                                   // the last two may be null
    long long count, dim, first_block;                                 // count: of A
};

extern "C" __global__ void __launch_bounds__(THREADS) scan_constants(const Params p) {
    const long long i = (p.first_block + blockIdx.x) * THREADS + threadIdx.x;
    if (i < p.count) p.A[i] = -exp(real(to_real(p.A_log[i])));
    if (i < p.dim && p.real_D) p.real_D[i] = real(to_real(p.D[i]));
    if (i < p.dim && p.real_dt_bias) p.real_dt_bias[i] = real(to_real(p.dt_bias[i]));
}
