// The vector types of the ISA that this translation unit is compiled for, and what all ISAs share.
#pragma once

#define MLF_QUOTE_(text) #text
#define MLF_QUOTE(text) MLF_QUOTE_(text)
#define MLF_JOIN_(a, b) a##b
#define MLF_JOIN(a, b) MLF_JOIN_(a, b)

// Loops over accumulators must be unrolled, or compilers keep them in memory.
#if defined(__clang__)
#define MLF_UNROLL _Pragma("unroll")
#else
#define MLF_UNROLL _Pragma("GCC unroll 16")
#endif

// The opposite, where it would only make the code longer.
#if defined(__clang__)
#define MLF_ROLL _Pragma("clang loop unroll(disable)")
#else
#define MLF_ROLL _Pragma("GCC unroll 1")
#endif

// A number that templates can take as an argument.
template <int N>
struct Constant {
  static constexpr int value = N;
};

// vec_<isa>.h
#include MLF_QUOTE(MLF_JOIN(vec_, MLF_ISA).h)

// e^x, relative error below 2 ulp for x in [-87.3, 88.3]; clamped outside, so never 0, NaN or
// infinite. x = n ln 2 + r, e^r by a polynomial on |r| <= ln 2 / 2 (Cephes' coefficients).
inline VecF exp(VecF x) {
  x = min(max(x, splat(-87.3f)), splat(88.3f));
  const VecF n = nearest(mul(x, splat(1.44269504088896341f)));
  VecF r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  VecF p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = add(fma(p, mul(r, r), r), splat(1.0f));
  return times_exp2(p, n);
}

// 2^x for x <= 0, relative error below 3 * 2^-24; at least 2^-126, exact for 0, NaN for NaN.
// x = n + r, and a polynomial of degree 5 for 2^r on |r| <= 1/2 that minimises the relative error.
inline VecF exp2_negative(VecF x) {
  x = max(splat(-126.0f), x);  // max() returns its second argument if either is NaN
  const VecF n = nearest(x);
  const VecF r = sub(x, n);
  VecF p = splat(1.3264714333e-3f);
  p = fma(p, r, splat(9.6715126353e-3f));
  p = fma(p, r, splat(5.5507337738e-2f));
  p = fma(p, r, splat(2.4022242086e-1f));
  p = fma(p, r, splat(6.9314697759e-1f));
  p = fma(p, r, splat(1.0f));
  return times_exp2(p, n);
}

// x / (1 + e^-x)
inline VecF silu(VecF x) { return div(x, add(splat(1.0f), exp(sub(splat(0.0f), x)))); }

// Visit 0..n-1 in vectors of 16: body(i, 16) for whole ones, body(i, n - i) for the rest.
template <class Body>
inline void for_each_vec(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) body(i, 16);
  if (i < n) body(i, static_cast<int>(n - i));
}
inline VecF load_upto(const float* p, int n) { return n == 16 ? load(p) : load_first(p, n); }
inline void store_upto(float* p, VecF v, int n) {
  if (n == 16) store(p, v);
  else store_first(p, v, n);
}
inline float half_value(uint16_t half) {
  const uint16_t halves[16] = {half};
  float lanes[16];
  store(lanes, load_half(halves));
  return lanes[0];
}

// Visit 0..n-1 in blocks of Max, then of Max / 2, Max / 4 ...: body(Constant<block>(), first).
template <int Max, class Body>
inline void for_each_block(int64_t n, Body body, int64_t first = 0) {
  for (; first + Max <= n; first += Max) body(Constant<Max>(), first);
  if constexpr (Max > 1) for_each_block<Max / 2>(n, body, first);
}
