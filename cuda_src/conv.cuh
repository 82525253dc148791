// conv.cuh: what the kernels of the causal depthwise convolution agree on.
//
//   e        the initial state (WIDTH - 1 entries, zeros without one) followed by x, in the order in which time is walked
//   p_t      = bias + Σ_j w_j·e_{t+j}              y_t = silu(p_t) or p_t
//   walked   `reverse` turns time here and nowhere else: step s of the walk is step `length - 1 - s` of memory
//
// Every sum over j begins with bias and goes from j = 0 up, in all kernels.
//
// Compile-time: element types X_T (tensors, states) and W_T (weight, bias), SILU, REVERSE.
#pragma once
#include "common.cuh"

typedef X_T element;
typedef decltype(to_real(element())) real;

DEVICE real activated(real p) { return SILU ? p * sigmoid(p) : p; }

// dL/dp from dL/dy.
DEVICE real before_activation(real dy, real p) {
    if (!SILU) return dy;
    real s = sigmoid(p);
    return dy * (s * (real(1) + p * (real(1) - s)));
}

DEVICE element rounded(real x) {
    element y;
    from_real(x, y);
    return y;
}

DEVICE constexpr int power_of_two(int n) { return n <= 1 ? 1 : 2 * power_of_two((n + 1) / 2); }

// Where a tensor's step 0 of the walk lies relative to its step 0 in memory, and how far one step of the walk goes.
DEVICE long long walk_origin(long long length, long long stride) { return REVERSE ? (length - 1) * stride : 0; }
DEVICE long long walk_stride(long long stride) { return REVERSE ? -stride : stride; }
