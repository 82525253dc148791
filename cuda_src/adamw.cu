// adamw.cu: a step of AdamW, for all parameters at once.
//
//   m = β1·m + (1 - β1)·g        v = β2·v + (1 - β2)·g²
//   p = p - rate·(m/(1 - β1^t)/(√(v/(1 - β2^t)) + eps) + decay·p)
//
// Idea: memory is the only limit. A thread moves VECTOR neighbouring elements of each of the seven arrays by one instruction;
// many.cuh says which. What comes out lies in fresh memory.
//
// Compile-time: element types P_T and G_T of parameters and gradients, REAL of their means and of arithmetic; VECTOR.
#define FACTS 9
#define ROW 10
#include "many.cuh"

struct Params {
    const long long *owner, *table;                                    // many.cuh; a row: decays, then p, g, m, v and new p, m, v
    long long first_block;
};

extern "C" __global__ void __launch_bounds__(THREADS) adamw(const Params p) {
    const Part part(p.owner, p.table, p.first_block + blockIdx.x);
    auto fact = [&](int i) { return (REAL)__longlong_as_double(p.table[i]); };
    const REAL beta1 = fact(0), rest1 = fact(1), beta2 = fact(2), rest2 = fact(3), correction1 = fact(4), correction2 = fact(5);
    const REAL eps = fact(6), rate = fact(7), decay = part.row[0] ? fact(8) : REAL(0);
    const P_T* from = part.array<P_T>(1);
    const G_T* grads = part.array<G_T>(2);
    const REAL *means = part.array<REAL>(3), *squares = part.array<REAL>(4);
    P_T* to = part.array<P_T>(5);
    REAL *new_means = part.array<REAL>(6), *new_squares = part.array<REAL>(7);
#pragma unroll 1
    for (int item = 0; item < ITEMS; ++item) {
        const long long at = part.at(item);
        const int valid = part.valid(item);
        if (valid <= 0) return;
        Pack<P_T, VECTOR> x = load_pack<P_T, VECTOR>(from + at, valid);
        const Pack<G_T, VECTOR> g = load_pack<G_T, VECTOR>(grads + at, valid);
        Pack<REAL, VECTOR> m = load_pack<REAL, VECTOR>(means + at, valid), v = load_pack<REAL, VECTOR>(squares + at, valid);
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) {
            const REAL gradient = to_real(g.get(j)), wide = to_real(x.get(j));
            const REAL mean = beta1 * m.get(j) + rest1 * gradient, square = beta2 * v.get(j) + rest2 * (gradient * gradient);
            const REAL change = mean / correction1 / (sqrt(square / correction2) + eps);
            P_T rounded;
            from_real(wide - rate * (change + decay * wide), rounded);
            x.set(j, rounded);
            m.set(j, mean);
            v.set(j, square);
        }
        store_pack<P_T, VECTOR>(to + at, x, valid);
        store_pack<REAL, VECTOR>(new_means + at, m, valid);
        store_pack<REAL, VECTOR>(new_squares + at, v, valid);
    }
}
