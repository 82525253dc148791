// common.cuh: what every kernel of mambacupy shares. Element types, vector access, exact-enough elementary functions.
//
// Policy
//   - No header is included, neither ours nor NVIDIA's: a kernel is one text, compiled by NVRTC alone in well under a second.
//   - Inline PTX stands in this file, and in decode.cuh what generation alone needs, each with a plain C++ twin for emulators.
//   - Arithmetic is float (double when the tensors are double). 16-bit types are storage only.
//
// Glossary, the same in Python, CUDA and documentation
//   u, delta, z, y   (batch, dim, length)   input, step size before bias and softplus, gate, output
//   A                (dim, state)           diagonal of the state matrix of each channel
//   B, C             (dim, state) constant, or (batch, groups, state, length) varying with time
//   D, delta_bias    (dim,)                 skip weight, bias of delta
//   h                                       the state: `state` numbers for each (batch, dim)
//   channel          one (batch, dim) row: an independent recurrence
//   slot             one of the states that a lane keeps in registers
#pragma once

#define DEVICE __device__ __forceinline__

// ---------------------------------------------------------------------------------------------- element types
struct float16 { unsigned short bits; };   // IEEE binary16
struct bfloat16 { unsigned short bits; };  // upper half of a binary32

DEVICE float to_real(float x) { return x; }
DEVICE double to_real(double x) { return x; }
DEVICE float to_real(bfloat16 x) { return __uint_as_float((unsigned)x.bits << 16); }

#ifdef __CUDA_ARCH__
DEVICE float to_real(float16 x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits)); return y; }
#else
DEVICE float to_real(float16 x) {
    unsigned sign = (x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
    float y = __uint_as_float(magnitude << 13) * 0x1p+112f;            // also right for subnormal numbers
    if (magnitude >= 0x7c00u) y = __uint_as_float(0x7f800000u | (magnitude << 13));
    return __uint_as_float(__float_as_uint(y) | sign);
}
#endif

DEVICE void from_real(float x, float& out) { out = x; }
DEVICE void from_real(double x, double& out) { out = x; }
DEVICE void from_real(float x, bfloat16& out) {                        // round to nearest, ties to even; NaN stays NaN
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
#else
    unsigned b = __float_as_uint(x);
    out.bits = x != x ? 0x7fff : (unsigned short)((b + 0x7fffu + ((b >> 16) & 1u)) >> 16);
#endif
}
DEVICE void from_real(float x, float16& out) {
#ifdef __CUDA_ARCH__
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
#else
    unsigned b = __float_as_uint(x), sign = (b >> 16) & 0x8000u, m = b & 0x7fffffffu;
    if (m > 0x7f800000u) { out.bits = 0x7fff; return; }
    if (m >= 0x477ff000u) { out.bits = (unsigned short)(sign | 0x7c00u); return; }
    if (m < 0x38800000u) {                                             // subnormal: let the float adder round
        out.bits = (unsigned short)(sign | (__float_as_uint(__uint_as_float(m) + 0.5f) - 0x3f000000u)); return;
    }
    out.bits = (unsigned short)(sign | ((m - 0x38000000u + 0xfffu + ((m >> 13) & 1u)) >> 13));
#endif
}

// COUNT elements that lie side by side in memory, moved by one instruction of up to 16 bytes. They stay packed in whole
// registers until they are used: taking one apart would wait for its load.
template <int BYTES> struct Words { unsigned word[BYTES / 4]; };
template <> struct Words<2> { unsigned short word[1]; };

template <typename T, int COUNT>
struct alignas(sizeof(T) * COUNT) Pack {
    Words<sizeof(T) * COUNT> bits;
    DEVICE T get(int j) const;
    DEVICE void set(int j, T value);
};

template <typename T> struct Place {                                    // an element's place; 16-bit: two to a word
    static DEVICE T get(const unsigned* w, int j) { return {(unsigned short)(j & 1 ? w[j / 2] >> 16 : w[j / 2])}; }
    static DEVICE T get(const unsigned short* w, int) { return {w[0]}; }
    static DEVICE void set(unsigned* w, int j, T x) {
        w[j / 2] = j & 1 ? (w[j / 2] & 0xffffu) | ((unsigned)x.bits << 16) : (w[j / 2] & 0xffff0000u) | x.bits;
    }
    static DEVICE void set(unsigned short* w, int, T x) { w[0] = x.bits; }
};
template <> struct Place<float> {
    static DEVICE float get(const unsigned* w, int j) { return __uint_as_float(w[j]); }
    static DEVICE void set(unsigned* w, int j, float x) { w[j] = __float_as_uint(x); }
};
template <> struct Place<double> {
    static DEVICE double get(const unsigned* w, int j) { return __hiloint2double(w[2 * j + 1], w[2 * j]); }
    static DEVICE void set(unsigned* w, int j, double x) { w[2 * j] = __double2loint(x); w[2 * j + 1] = __double2hiint(x); }
};
template <typename T, int COUNT> DEVICE T Pack<T, COUNT>::get(int j) const { return Place<T>::get(bits.word, j); }
template <typename T, int COUNT> DEVICE void Pack<T, COUNT>::set(int j, T x) { Place<T>::set(bits.word, j, x); }

// The first `valid` elements at `from`; zeros after them.
template <typename T, int COUNT>
DEVICE Pack<T, COUNT> load_pack(const T* __restrict__ from, int valid) {
    Pack<T, COUNT> pack = {};
    if (valid >= COUNT) {
        pack = *reinterpret_cast<const Pack<T, COUNT>*>(from);
    } else if (valid > 0) {
#pragma unroll
        for (int j = 0; j < COUNT - 1; ++j) if (j < valid) pack.set(j, from[j]);
    }
    return pack;
}

// COUNT elements, and into L2 what lies around them, 256 bytes in all: for rows that are read a piece at a time. Memory is slow
// where it is asked for less than whole lines.
template <typename T, int COUNT>
DEVICE Pack<T, COUNT> load_with_line(const T* from) {
#ifdef __CUDA_ARCH__
#if __CUDA_ARCH__ >= 800
#define LOAD_WITH_LINE "ld.global.L2::256B"
#else
#define LOAD_WITH_LINE "ld.global.L2::128B"
#endif
    Pack<T, COUNT> pack;
    auto* w = pack.bits.word;
    if constexpr (sizeof(pack) == 16)
        asm volatile(LOAD_WITH_LINE ".v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "l"(from));
    else if constexpr (sizeof(pack) == 8)
        asm volatile(LOAD_WITH_LINE ".v2.u32 {%0, %1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "l"(from));
    else if constexpr (sizeof(pack) == 4)
        asm volatile(LOAD_WITH_LINE ".u32 %0, [%1];" : "=r"(w[0]) : "l"(from));
    else
        asm volatile(LOAD_WITH_LINE ".u16 %0, [%1];" : "=h"(w[0]) : "l"(from));
    return pack;
#else
    return load_pack<T, COUNT>(from, COUNT);
#endif
}

// One instruction, to global memory alone. Left to itself, the compiler stores a pack word by word.
template <typename T, int COUNT>
DEVICE void store_at_once(T* to, const Pack<T, COUNT>& pack) {
#ifdef __CUDA_ARCH__
    const auto* w = pack.bits.word;
    if constexpr (sizeof(pack) == 16)
        asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" : : "l"(to), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]));
    else if constexpr (sizeof(pack) == 8)
        asm volatile("st.global.v2.u32 [%0], {%1, %2};" : : "l"(to), "r"(w[0]), "r"(w[1]));
    else
        *reinterpret_cast<Pack<T, COUNT>*>(to) = pack;
#else
    *reinterpret_cast<Pack<T, COUNT>*>(to) = pack;
#endif
}

// As the compiler likes it: where an instruction for all of it would make registers spill.
template <typename T, int COUNT>
DEVICE void store_in_words(T* __restrict__ to, const Pack<T, COUNT>& pack) {
    *reinterpret_cast<Pack<T, COUNT>*>(to) = pack;
}

template <typename T, int COUNT>
DEVICE void store_pack(T* __restrict__ to, const Pack<T, COUNT>& pack, int valid) {
    if (valid >= COUNT) {
        store_at_once(to, pack);
    } else {
#pragma unroll
        for (int j = 0; j < COUNT - 1; ++j) if (j < valid) to[j] = pack.get(j);
    }
}

// The same where a pack exists as a whole or not at all, as whoever chose COUNT made sure: less than half the code.
template <typename T, int COUNT>
DEVICE Pack<T, COUNT> load_whole(const T* __restrict__ from, bool exists) {
    Pack<T, COUNT> pack = {};
    if (exists) pack = *reinterpret_cast<const Pack<T, COUNT>*>(from);
    return pack;
}
template <typename T, int COUNT>
DEVICE void store_whole(T* __restrict__ to, const Pack<T, COUNT>& pack, bool exists) {
    if (exists) store_at_once(to, pack);
}

// COUNT elements by accesses to AT_ONCE of them, where those before `valid` exist; AT_ONCE divides that.
template <int AT_ONCE, typename T, int COUNT>
DEVICE Pack<T, COUNT> load_by(const T* __restrict__ from, int valid) {
    if (AT_ONCE == COUNT) return load_whole<T, COUNT>(from, valid > 0);
    Pack<T, COUNT> pack = {};
#pragma unroll
    for (int j = 0; j < COUNT; j += AT_ONCE) {
        const auto part = load_whole<T, AT_ONCE>(from + j, j < valid);
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) pack.set(j + i, part.get(i));
    }
    return pack;
}
template <int AT_ONCE, typename T, int COUNT>
DEVICE void store_by(T* __restrict__ to, const Pack<T, COUNT>& pack, int valid) {
    if (AT_ONCE == COUNT) return store_whole<T, COUNT>(to, pack, valid > 0);
#pragma unroll
    for (int j = 0; j < COUNT; j += AT_ONCE) {
        Pack<T, AT_ONCE> part = {};
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) part.set(i, pack.get(j + i));
        store_whole<T, AT_ONCE>(to + j, part, j < valid);
    }
}

// Two neighbours in memory, `low` before `high`: the last `count` elements of low, and the first of high up to a whole pack. So
// whoever reads and writes aligned packs alone gets at what lies across two of them.
template <typename T, int COUNT>
DEVICE Pack<T, COUNT> joined(const Pack<T, COUNT>& low, const Pack<T, COUNT>& high, int count) {
    constexpr int WORDS = sizeof(low) / 4;
    const unsigned bytes = count * sizeof(T);
    unsigned w[2 * WORDS];
#pragma unroll
    for (int j = 0; j < WORDS; ++j) w[j] = low.bits.word[j], w[WORDS + j] = high.bits.word[j];
#pragma unroll
    for (int step = WORDS / 2; step > 0; step /= 2) {                  // later words first: each takes the place of one after it
#pragma unroll
        for (int j = 2 * WORDS - 1; j > WORDS - step - (sizeof(T) == 2); --j) w[j] = bytes & 4 * step ? w[j - step] : w[j];
    }
    Pack<T, COUNT> pack;
#pragma unroll
    for (int j = 0; j < WORDS; ++j) {
        pack.bits.word[j] = sizeof(T) == 2 ? __funnelshift_l(w[WORDS + j - 1], w[WORDS + j], 8 * (bytes & 2)) : w[WORDS + j];
    }
    return pack;
}

// How many of the COUNT elements at x lie before the multiple of a pack's size among them, or at their end.
template <int COUNT, typename T> DEVICE int before_boundary(const T* x) { return (int)(0 - (size_t)x / sizeof(T)) & (COUNT - 1); }

// x itself, of which the compiler knows nothing: what follows from it is computed where it is used, not kept in registers.
DEVICE long long recomputed(long long x) {
#ifdef __CUDA_ARCH__
    asm volatile("" : "+l"(x));
#endif
    return x;
}
DEVICE int recomputed(int x) {
#ifdef __CUDA_ARCH__
    asm volatile("" : "+r"(x));
#endif
    return x;
}

// __syncthreads() for warps that wait at different places of the program, but all of the block's as often.
#ifdef __CUDA_ARCH__
DEVICE void all_meet() { asm volatile("bar.sync 0;" : : : "memory"); }
#else
DEVICE void all_meet() { __syncthreads(); }
#endif

// Order between kernels. With OVERLAP a kernel may begin before the one in front of it has ended (compute capability 9.0; a launch
// attribute has to say so too).
#ifndef OVERLAP
#define OVERLAP 0
#endif
// Before this call nothing may be read that the kernels of this step write, and nothing may be written at all.
DEVICE void wait_for_previous() {
#if OVERLAP && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" : : : "memory");
#endif
}
DEVICE void let_next_begin() {
#if OVERLAP && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// What a block leaves for others of its launch. It says so, by one thread and after a __syncthreads(), and whoever has seen that it
// did, and a __syncthreads() after it, sees all of it. GPUs begin blocks in the order of their numbers, which CUDA does not promise but
// scans everywhere rely on: only blocks with smaller ones may be waited for.
#ifdef __CUDA_ARCH__
DEVICE void publish(unsigned* flag) { asm volatile("st.release.gpu.global.u32 [%0], 1;" : : "l"(flag) : "memory"); }
DEVICE void wait_until_published(const unsigned* flag) {
    unsigned x;
    do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(flag) : "memory"); while (x != 1);
}
#else
DEVICE void publish(unsigned* flag) { *flag = 1; }
DEVICE void wait_until_published(const unsigned* flag) { while (*flag != 1) {} }
#endif

// Ask for a line of memory that will be read soon.
DEVICE void prefetch(const void* at) {
#ifdef __CUDA_ARCH__
    asm volatile("prefetch.global.L2 [%0];" : : "l"(at));
#endif
}

// ---------------------------------------------------------------------------------------------- functions of reals
// 2^x in one instruction. Relative error at most 2^-22; exactly 1 for |x| < 2^-23.
DEVICE float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
    float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y;
#else
    return exp2f(x);
#endif
}
DEVICE double exp2_fast(double x) { return exp2(x); }

DEVICE float reciprocal(float x) {
#ifdef __CUDA_ARCH__
    float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y;
#else
    return 1.0f / x;
#endif
}
DEVICE double reciprocal(double x) { return 1.0 / x; }

constexpr double LOG2_E = 1.4426950408889634;

// Several numbers at once, step by step: written one number after the other, each would wait for itself.
#define EACH _Pragma("unroll") for (int j = 0; j < N; ++j)

// y = c[0]·x^(K-1) + c[1]·x^(K-2) + … + c[K-1]
template <int N, int K> DEVICE void polynomial(const float (&c)[K], const float (&x)[N], float (&y)[N]) {
    EACH y[j] = c[0];
#pragma unroll
    for (int k = 1; k < K; ++k) EACH y[j] = fmaf(y[j], x[j], c[k]);
}

// e^-x for x in [0, 88] to float32's own rounding: 2^n times a minimax polynomial of what is left of x, relative error 3e-9, no bias.
template <int N> DEVICE void exp_of_negative(const float (&x)[N], float (&e)[N]) {
    constexpr float NEAREST = 12582912.0f;                             // 1.5·2^23: adding it rounds to an integer
    constexpr float C[] = {1.38206338e-3f, 8.36867373e-3f, 4.16682661e-2f, 1.66665211e-1f, 4.9999994e-1f, 1.0f, 1.0f};
    float shifted[N], r[N];
    EACH shifted[j] = fmaf(x[j], (float)-LOG2_E, NEAREST);
    EACH r[j] = fmaf(shifted[j] - NEAREST, -0.693147182f, -x[j]);      // -x - n·log(2)
    EACH r[j] = fmaf(shifted[j] - NEAREST, 1.90465432e-9f, r[j]);
    polynomial(C, r, e);
    EACH e[j] = __uint_as_float(__float_as_uint(e[j]) + (__float_as_uint(shifted[j]) << 23));
}

// log(1 + x) for x in [0, 1]: x + x²·q(x) with a minimax polynomial q, relative error 3e-8, no bias.
template <int N> DEVICE void log1p_unit(const float (&x)[N], float (&y)[N]) {
    constexpr float Q[] = {5.36542246e-3f, -3.00683007e-2f, 7.92088285e-2f, -1.37541875e-1f,
                           1.91538483e-1f, -2.48572171e-1f, 3.332133e-1f, -4.99996483e-1f};
    polynomial(Q, x, y);
    EACH y[j] = fmaf(x[j] * x[j], y[j], x[j]);
}

// softplus(x) = log(1 + e^x), and x itself above 20, in place; and its derivative, sigmoid(x), which is 1 there. Keeps its relative
// accuracy where x is very negative. NaN stays NaN. Where x comes from a 16-bit T, the exponential unit's e^-|x| is exact enough:
// its relative error is 1e-7·(1 + |x|), with no bias, and x is known to 4e-3·|x|.
template <typename T = float, int N> DEVICE void softplus_each(float (&x)[N], float (*slope)[N] = nullptr) {
    float e[N], y[N];
    if (sizeof(T) == 2) {
        EACH e[j] = exp2_fast(fmaf(fabsf(x[j]), (float)-LOG2_E, 2e-8f));                      // as in `decay`
    } else {
        EACH e[j] = fminf(fabsf(x[j]), 88.0f);
        exp_of_negative(e, e);
    }
    log1p_unit(e, y);
    EACH {
        if (slope) {
            const float r = reciprocal(1.0f + e[j]);
            (*slope)[j] = x[j] >= 0.0f ? r : e[j] * r;
        }
        x[j] = (sizeof(T) == 2 ? fmaxf(x[j], 0.0f) : x[j] < 0.0f ? 0.0f : x[j]) + y[j];       // y is NaN itself in the first case
    }
}
template <typename T = double, int N> DEVICE void softplus_each(double (&x)[N], double (*slope)[N] = nullptr) {
    EACH {
        if (slope) (*slope)[j] = x[j] > 20.0 ? 1.0 : reciprocal(1.0 + exp(-x[j]));
        x[j] = x[j] > 20.0 ? x[j] : log1p(exp(x[j]));
    }
}
template <typename R> DEVICE R softplus(R x) {
    R each[1] = {x};
    softplus_each(each);
    return each[0];
}

// sigmoid(x) = 1 / (1 + e^-x)
template <typename R>
DEVICE R sigmoid(R x) { return reciprocal(R(1) + exp2_fast(x * R(-LOG2_E))); }
DEVICE double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }

// sum += x, with what rounding drops kept in `lost` and put back the next time (Kahan's summation).
template <typename R> DEVICE void add_exactly(R& sum, R& lost, R x) {
    R y = x - lost, next = sum + y;
    lost = (next - sum) - y;
    sum = next;
}

// ---------------------------------------------------------------------------------------------- complex numbers
template <typename R>
struct alignas(2 * sizeof(R)) Complex { R re, im; };

template <typename R> DEVICE Complex<R> conj(Complex<R> a) { return {a.re, -a.im}; }
template <typename R> DEVICE Complex<R> operator+(Complex<R> a, Complex<R> b) { return {a.re + b.re, a.im + b.im}; }
template <typename R> DEVICE Complex<R> operator*(R s, Complex<R> a) { return {s * a.re, s * a.im}; }
template <typename R> DEVICE Complex<R> operator*(Complex<R> a, Complex<R> b) {
    return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}

// What the kernels ask of a state, real or complex, in the same words.
template <typename R> DEVICE R multiply_add(R a, R b, R c) { return a * b + c; }
template <typename R> DEVICE Complex<R> multiply_add(Complex<R> a, Complex<R> b, Complex<R> c) {
    return {a.re * b.re + (c.re - a.im * b.im), a.re * b.im + (a.im * b.re + c.im)};
}
DEVICE float real_product(float a, float b, float c) { return a * b + c; }                    // Re(a·b) + c
DEVICE double real_product(double a, double b, double c) { return a * b + c; }
template <typename R> DEVICE R real_product(Complex<R> a, Complex<R> b, R c) { return a.re * b.re + (c - a.im * b.im); }

DEVICE bool is_zero(float a) { return a == 0; }
DEVICE bool is_zero(double a) { return a == 0; }
template <typename R> DEVICE bool is_zero(Complex<R> a) { return a.re == 0 && a.im == 0; }

DEVICE float real_part(float a) { return a; }
DEVICE double real_part(double a) { return a; }
template <typename R> DEVICE R real_part(Complex<R> a) { return a.re; }

DEVICE float conj(float a) { return a; }
DEVICE double conj(double a) { return a; }

// ---------------------------------------------------------------------------------------------- discretisation
// A rate is what a lane keeps of an entry of A, so that the inner loop multiplies once and exponentiates.
//   real:     A·log2(e)
//   complex:  (Re A·log2(e), Im A)
DEVICE float rate_of(float A) { return A * (float)LOG2_E; }
DEVICE double rate_of(double A) { return A * LOG2_E; }
template <typename R> DEVICE Complex<R> rate_of(Complex<R> A) { return {rate_of(A.re), A.im}; }

// A, with infinite decays made huge: over a step of 0, as padding has, they are none then, and over any other forget all the same.
DEVICE float bounded(float A) { return A < -1e38f ? -1e38f : A; }
DEVICE double bounded(double A) { return A < -1e308 ? -1e308 : A; }
template <typename R> DEVICE Complex<R> bounded(Complex<R> A) { return {bounded(A.re), A.im}; }

// exp(Δ·A). exp2_fast is too small by 5e-9 to 5e-8 on average; a decay is applied at every step, so such a bias adds up over the
// memory of a state. What is added to the exponent takes out most of it, and is too little to move the decay of a step of 0.
DEVICE float decay(float step, float rate) { return exp2_fast(fmaf(step, rate, 2e-8f)); }
DEVICE double decay(double step, double rate) { return exp2_fast(step * rate); }
// magnitude·e^(i·step·A). The angle is the exact product, less q·pi with q a whole number: what is left is at most pi/2, and an odd
// q turns the sign. Minimax polynomials of sine and cosine, error 1e-7 for angles up to 2e4.
// `shifted` is 1.5·2^23, adding which rounds to an integer, plus step·A/pi: q follows from it.
DEVICE Complex<float> turned(float magnitude, float step, float A, float shifted) {
    const float q = shifted - 12582912.0f;
    const float r = fmaf(q, -9.67653585e-4f, fmaf(step, A, q * -3.140625f)), s = r * r;       // q·3.140625 is exact
    const float sine = fmaf(r * s, fmaf(fmaf(fmaf(2.5988586e-6f, s, -1.98060327e-4f), s, 8.33300874e-3f), s, -1.66666567e-1f), r);
    float cosine = fmaf(fmaf(-2.62090168e-7f, s, 2.47701792e-5f), s, -1.38885854e-3f);
    cosine = fmaf(fmaf(fmaf(cosine, s, 4.16666567e-2f), s, -0.5f), s, 1.0f);
    magnitude = __uint_as_float(__float_as_uint(magnitude) + (__float_as_uint(shifted) << 31));
    return {magnitude * cosine, magnitude * sine};
}
DEVICE Complex<float> turned(float magnitude, float step, float A) {
    return turned(magnitude, step, A, fmaf(step * A, 0.318309886f, 12582912.0f));
}
DEVICE Complex<double> turned(double magnitude, double step, double A) {
    double sine, cosine;
    sincos(step * A, &sine, &cosine);
    return {magnitude * cosine, magnitude * sine};
}
template <typename R> DEVICE Complex<R> decay(R step, Complex<R> rate) { return turned(decay(step, rate.re), step, rate.im); }

// A rate with Im A/pi beside it, where a register is spent on it: one instruction less a step.
struct TurningRate { float re, im, half_turns; };
DEVICE float kept_rate(float A) { return rate_of(A); }
DEVICE double kept_rate(double A) { return rate_of(A); }
DEVICE Complex<double> kept_rate(Complex<double> A) { return rate_of(A); }
DEVICE TurningRate kept_rate(Complex<float> A) { return {rate_of(A.re), A.im, A.im * 0.318309886f}; }
DEVICE Complex<float> decay(float step, TurningRate rate) {
    return turned(decay(step, rate.re), step, rate.im, fmaf(step, rate.half_turns, 12582912.0f));
}

// What a part of time hands on: exp(A·Σ Δ)·enters + local, for what enters it and what it would hand on if nothing did. Half of
// the decay twice, because over a whole part growth may overflow; and nothing stays nothing, however much of it that would make.
template <typename S> DEVICE S handed_on(S enters, S half, S local) {
    return is_zero(enters) ? local : multiply_add(half, half * enters, local);
}

// phi(a) = (e^a - 1)/a, the factor by which exact zero-order hold differs from Euler; e^a comes along as `exp_a`.
// Near 0 the quotient loses its digits, so a series takes over for |a| < 1/2.
DEVICE float phi(float a, float exp_a) {
    float p = fmaf(a, fmaf(a, fmaf(a, fmaf(a, fmaf(a, 1.98411905e-4f, 1.39973247e-3f), 8.33363465e-3f),
                                   4.16653182e-2f), 1.66666629e-1f), 5.00000042e-1f);
    return fabsf(a) < 0.5f ? fmaf(a, p, 1.0f) : (exp_a - 1.0f) / a;
}
DEVICE double phi(double a, double) { return a == 0.0 ? 1.0 : expm1(a) / a; }
template <typename R> DEVICE Complex<R> phi(Complex<R> a, Complex<R> exp_a) {
    constexpr int TERMS = sizeof(R) == 4 ? 8 : 15;
    R square = a.re * a.re + a.im * a.im;
    if (square >= R(0.25)) return (R(1) / square) * (Complex<R>{exp_a.re - R(1), exp_a.im} * conj(a));
    Complex<R> sum = {R(1), R(0)};                                     // 1 + a/2·(1 + a/3·(1 + …))
#pragma unroll
    for (int k = TERMS; k >= 2; --k) sum = Complex<R>{R(1), R(0)} + (R(1) / R(k)) * (a * sum);
    return sum;
}

// phi'(a) = (e^a - phi(a))/a; the quotient loses its digits near 0, so a series takes over for |a| < 1/2.
template <typename R, typename S> DEVICE S phi_series_derivative(S a, S one) {
    constexpr int TERMS = sizeof(R) == 4 ? 8 : 15;
    S sum = R(0) * one;
    R factorial = 1, coefficients[TERMS + 2];
#pragma unroll
    for (int k = 1; k <= TERMS; ++k) {                                 // k/(k+1)!
        factorial *= R(k + 1);
        coefficients[k] = R(k) / factorial;
    }
#pragma unroll
    for (int k = TERMS; k >= 1; --k) sum = multiply_add(sum, a, coefficients[k] * one);
    return sum;
}
DEVICE float phi_derivative(float a, float exp_a, float phi_a) {
    return fabsf(a) < 0.5f ? phi_series_derivative<float>(a, 1.0f) : (exp_a - phi_a) / a;
}
DEVICE double phi_derivative(double a, double exp_a, double phi_a) {
    return fabs(a) < 0.5 ? phi_series_derivative<double>(a, 1.0) : (exp_a - phi_a) / a;
}
template <typename R> DEVICE Complex<R> phi_derivative(Complex<R> a, Complex<R> exp_a, Complex<R> phi_a) {
    R square = a.re * a.re + a.im * a.im;
    if (square < R(0.25)) return phi_series_derivative<R>(a, Complex<R>{R(1), R(0)});
    return (R(1) / square) * (Complex<R>{exp_a.re - phi_a.re, exp_a.im - phi_a.im} * conj(a));
}
