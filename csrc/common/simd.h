// Vectors of the instruction set for which the including file is compiled, built on GNU vector
// extensions.
//
// The CPU kernels are compiled once per instruction set, each time with another MCIBI_CPU_ARCH, and
// everything here is in the namespace of that name. If the copies shared a function, the linker
// would keep one of them, possibly the one with instructions that the machine lacks.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "common/dtypes.h"
#include "common/numbers.h"

#if defined(__AVX512F__)
#define MCIBI_VECTOR_BYTES 64
#elif defined(__AVX__)
#define MCIBI_VECTOR_BYTES 32
#else
#define MCIBI_VECTOR_BYTES 16
#endif
#define MCIBI_SIMD static inline __attribute__((always_inline))

namespace mcibi_fast {
namespace MCIBI_CPU_ARCH {

// Storage types: a 16-bit float as its bits in memory.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename T>
constexpr int64_t kLanes = MCIBI_VECTOR_BYTES / sizeof(T);
template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(MCIBI_VECTOR_BYTES)));
};
template <typename T>
using Vector = typename VectorOf<T>::type;

using VectorF = Vector<float>;
using VectorD = Vector<double>;
using VectorU32 = Vector<uint32_t>;
typedef uint16_t HalfVectorU16 __attribute__((vector_size(MCIBI_VECTOR_BYTES / 2)));

// Calls f(S()) with S the storage type of that kind.
template <typename F>
void with_storage_type(FloatKind kind, const F& f) {
  switch (kind) {
    case FloatKind::kFloat32:
      return f(float());
    case FloatKind::kFloat64:
      return f(double());
    case FloatKind::kBFloat16:
      return f(BFloat16());
    case FloatKind::kFloat16:
      return f(Float16());
  }
}

template <typename V, typename P>
MCIBI_SIMD V load_unaligned(const P* source) {
  V v;
  memcpy(&v, source, sizeof(V));
  return v;
}

template <typename V>
MCIBI_SIMD V maximum(V a, V b) {
  return a > b ? a : b;
}

// weight0 * a + weight1 * b with the roundings in the same places wherever it is written: compilers
// fuse one of the two products with the sum, and not always the same one. A backward that repeats
// its forward's interpolation must find the same large numbers.
template <typename V, typename T>
MCIBI_SIMD V interpolated(T weight0, V a, T weight1, V b) {
  V product = weight1 * b;
#if defined(__AVX512F__)
  asm("" : "+v"(product));
#elif defined(__x86_64__)
  asm("" : "+x"(product));
#elif defined(__aarch64__)
  asm("" : "+w"(product));
#endif
  return weight0 * a + product;
}

// ---- 16-bit floats ------------------------------------------------------------------------------

MCIBI_SIMD VectorF widen_bfloat16(HalfVectorU16 bits) {
  return bit_cast<VectorF>(__builtin_convertvector(bits, VectorU32) << 16);
}

// Round to nearest even; NaN stays NaN.
MCIBI_SIMD HalfVectorU16 narrow_bfloat16(VectorF v) {
  const VectorU32 bits = bit_cast<VectorU32>(v);
  const VectorU32 rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const VectorU32 quiet = (bits >> 16) | 0x40u;
  return __builtin_convertvector(v == v ? rounded : quiet, HalfVectorU16);
}

#if defined(__AVX512F__)  // zero-masked: for the plain forms GCC warns about its own headers
MCIBI_SIMD VectorF widen_float16(HalfVectorU16 bits) {
  return bit_cast<VectorF>(_mm512_maskz_cvtph_ps(0xFFFF, bit_cast<__m256i>(bits)));
}
MCIBI_SIMD HalfVectorU16 narrow_float16(VectorF v) {
  return bit_cast<HalfVectorU16>(
      _mm512_maskz_cvtps_ph(0xFFFF, bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
MCIBI_SIMD VectorF widen_float16(HalfVectorU16 bits) {
  return bit_cast<VectorF>(_mm256_cvtph_ps(bit_cast<__m128i>(bits)));
}
MCIBI_SIMD HalfVectorU16 narrow_float16(VectorF v) {
  return bit_cast<HalfVectorU16>(_mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
}
#else
MCIBI_SIMD VectorF widen_float16(HalfVectorU16 bits) {
  const VectorU32 wide = __builtin_convertvector(bits, VectorU32);
  const VectorU32 shifted = (wide & 0x7FFFu) << 13;
  // One exact multiplication by 2^112 changes the exponent bias from 15 to 127, of subnormals too.
  const VectorU32 finite = bit_cast<VectorU32>(bit_cast<VectorF>(shifted) * 0x1p112f);
  const VectorU32 special = shifted | 0x7F800000u;  // infinities and NaN
  const VectorU32 magnitude = shifted >= 0x0F800000u ? special : finite;
  return bit_cast<VectorF>(magnitude | ((wide & 0x8000u) << 16));
}
MCIBI_SIMD HalfVectorU16 narrow_float16(VectorF v) {
  const VectorU32 bits = bit_cast<VectorU32>(v);
  const VectorU32 sign = bits & 0x80000000u;
  const VectorU32 magnitude = bits ^ sign;
  // Subnormal results: after adding 1/2, float's own rounding happens at the right bit.
  const VectorF shifted = bit_cast<VectorF>(magnitude) + 0.5f;
  const VectorU32 subnormal = bit_cast<VectorU32>(shifted) - 0x3F000000u;
  const VectorU32 normal = (magnitude - 0x37FFF001u + ((magnitude >> 13) & 1u)) >> 13;
  VectorU32 half = magnitude < 0x38800000u ? subnormal : normal;
  const VectorU32 infinity = VectorU32{} + 0x7C00u;
  half = magnitude >= 0x477FF000u ? infinity : half;
  half = magnitude > 0x7F800000u ? (0x7E00u | ((magnitude >> 13) & 0x1FFu)) : half;
  return __builtin_convertvector(half | (sign >> 16), HalfVectorU16);
}
#endif

// ---- load and store with conversion -------------------------------------------------------------

MCIBI_SIMD VectorF load(const float* p) { return load_unaligned<VectorF>(p); }
MCIBI_SIMD VectorD load(const double* p) { return load_unaligned<VectorD>(p); }
MCIBI_SIMD VectorF load(const BFloat16* p) {
  return widen_bfloat16(load_unaligned<HalfVectorU16>(p));
}
MCIBI_SIMD VectorF load(const Float16* p) {
  return widen_float16(load_unaligned<HalfVectorU16>(p));
}

MCIBI_SIMD void store(float* p, VectorF v) { memcpy(p, &v, sizeof(v)); }
MCIBI_SIMD void store(double* p, VectorD v) { memcpy(p, &v, sizeof(v)); }
MCIBI_SIMD void store(BFloat16* p, VectorF v) {
  const HalfVectorU16 bits = narrow_bfloat16(v);
  memcpy(p, &bits, sizeof(bits));
}
MCIBI_SIMD void store(Float16* p, VectorF v) {
  const HalfVectorU16 bits = narrow_float16(v);
  memcpy(p, &bits, sizeof(bits));
}

// Only the first `count` lanes: load_first sets the others to zero, store_first leaves their memory
// alone.
template <typename S>
MCIBI_SIMD Vector<Compute<S>> load_first(const S* p, int64_t count) {
  S lanes[kLanes<Compute<S>>] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
  return load(lanes);
}
template <typename S>
MCIBI_SIMD void store_first(S* p, Vector<Compute<S>> v, int64_t count) {
  S lanes[kLanes<Compute<S>>];
  store(lanes, v);
  for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}

#if defined(__AVX512BW__) && defined(__AVX512VL__)  // the same in one instruction
MCIBI_SIMD __mmask16 first_lanes(int64_t count) {   // none where the count is negative
  const int64_t within = count < 0 ? 0 : count > 16 ? 16 : count;
  return static_cast<__mmask16>((1u << within) - 1u);
}
MCIBI_SIMD VectorF load_first(const float* p, int64_t count) {
  return bit_cast<VectorF>(_mm512_maskz_loadu_ps(first_lanes(count), p));
}
MCIBI_SIMD VectorD load_first(const double* p, int64_t count) {
  return bit_cast<VectorD>(_mm512_maskz_loadu_pd(static_cast<__mmask8>(first_lanes(count)), p));
}
MCIBI_SIMD HalfVectorU16 load_first_bits(const void* p, int64_t count) {
  return bit_cast<HalfVectorU16>(_mm256_maskz_loadu_epi16(first_lanes(count), p));
}
MCIBI_SIMD VectorF load_first(const BFloat16* p, int64_t count) {
  return widen_bfloat16(load_first_bits(p, count));
}
MCIBI_SIMD VectorF load_first(const Float16* p, int64_t count) {
  return widen_float16(load_first_bits(p, count));
}
MCIBI_SIMD void store_first(float* p, VectorF v, int64_t count) {
  _mm512_mask_storeu_ps(p, first_lanes(count), bit_cast<__m512>(v));
}
MCIBI_SIMD void store_first(double* p, VectorD v, int64_t count) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>(first_lanes(count)), bit_cast<__m512d>(v));
}
MCIBI_SIMD void store_first(BFloat16* p, VectorF v, int64_t count) {
  _mm256_mask_storeu_epi16(p, first_lanes(count), bit_cast<__m256i>(narrow_bfloat16(v)));
}
MCIBI_SIMD void store_first(Float16* p, VectorF v, int64_t count) {
  _mm256_mask_storeu_epi16(p, first_lanes(count), bit_cast<__m256i>(narrow_float16(v)));
}
#endif

// The lanes of v, or of v0 and after it v1, that the indices name.
template <typename V, typename I>
MCIBI_SIMD V pick(V v, I indices) {
#if defined(__clang__)
  V result;
  for (unsigned i = 0; i < sizeof(V) / sizeof(v[0]); ++i) result[i] = v[indices[i]];
  return result;
#else
  return __builtin_shuffle(v, indices);
#endif
}
template <typename V, typename I>
MCIBI_SIMD V pick(V v0, V v1, I indices) {
#if defined(__clang__)
  constexpr unsigned kCount = sizeof(V) / sizeof(v0[0]);
  V result;
  for (unsigned i = 0; i < kCount; ++i) {
    result[i] = indices[i] < kCount ? v0[indices[i]] : v1[indices[i] - kCount];
  }
  return result;
#else
  return __builtin_shuffle(v0, v1, indices);
#endif
}

// ---- transposition ------------------------------------------------------------------------------

template <int... kLane>
struct Lanes {};
template <int kCount, int... kLane>
struct LanesUpTo : LanesUpTo<kCount - 1, kCount - 1, kLane...> {};
template <int... kLane>
struct LanesUpTo<0, kLane...> {
  using type = Lanes<kLane...>;
};

// The lanes of a and b alternately: those of their lower halves (kHalf = 0) or upper halves (1).
template <int kHalf, typename V, int... kLane>
MCIBI_SIMD V interleave(V a, V b, Lanes<kLane...>) {
  constexpr int kCount = sizeof...(kLane), kFirst = kCount / 2 * kHalf;
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (kFirst + kLane / 2 + kLane % 2 * kCount)...);
#else
  typedef decltype(a < b) Indices;
  return __builtin_shuffle(a, b, Indices{(kFirst + kLane / 2 + kLane % 2 * kCount)...});
#endif
}

// Lane j of rows[i] becomes lane i of rows[j].
template <typename T>
MCIBI_SIMD void transpose(Vector<T> (&rows)[kLanes<T>]) {
  using All = typename LanesUpTo<kLanes<T>>::type;
  constexpr int kHalf = kLanes<T> / 2;
#pragma GCC unroll 4
  for (int step = 1; step < kLanes<T>; step *= 2) {
    Vector<T> next[kLanes<T>];
#pragma GCC unroll 8
    for (int i = 0; i < kHalf; ++i) {
      next[2 * i] = interleave<0>(rows[i], rows[i + kHalf], All{});
      next[2 * i + 1] = interleave<1>(rows[i], rows[i + kHalf], All{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i) rows[i] = next[i];
  }
}

// Lane r of the result is the reduction of rows[r].
template <typename C, typename F>
MCIBI_SIMD Vector<C> reduce_rows(Vector<C> (&rows)[kLanes<C>], const F& combine) {
  using All = typename LanesUpTo<kLanes<C>>::type;
#pragma GCC unroll 4
  for (int64_t half = kLanes<C> / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < half; ++i) {
      rows[i] = combine(interleave<0>(rows[i], rows[i + half], All{}),
                        interleave<1>(rows[i], rows[i + half], All{}));
    }
  }
  return rows[0];
}

// ---- exp ----------------------------------------------------------------------------------------

// exp(x) for x <= 88 within 2 ulp, 0 where that is below the smallest normal number; NaN gives NaN.
MCIBI_SIMD VectorF exponential(VectorF x) {
  const VectorF magic = VectorF{} + 0x1.8p23f;  // adding it rounds to an integer in the low bits
  const VectorF shifted = x * kLog2E<float> + magic;
  const VectorF n = shifted - magic;
  const VectorF r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // |r| <= ln(2) / 2
  VectorF q = VectorF{} + 1.381459646e-03f;  // (exp(r) - 1 - r) / r^2 by a least-maximum fit
  q = q * r + 8.368717507e-03f;
  q = q * r + 4.166838899e-02f;
  q = q * r + 1.666652113e-01f;
  q = q * r + 4.999999404e-01f;
  const VectorF p = q * (r * r) + r + 1.0f;
  const VectorU32 exponent = (bit_cast<VectorU32>(shifted) << 23) + 0x3F800000u;
  const VectorF result = p * bit_cast<VectorF>(exponent);
  return x < -87.3365402f ? VectorF{} : result;
}

// exp(x) for x <= 709 within 2 ulp, as above.
MCIBI_SIMD VectorD exponential(VectorD x) {
  const VectorD magic = VectorD{} + 0x1.8p52;
  const VectorD shifted = x * kLog2E<double> + magic;
  const VectorD n = shifted - magic;
  const VectorD r = (x - n * 0x1.62e42fefa0000p-1) - n * 0x1.cf79abc9e3b3ap-40;
  VectorD q = VectorD{} + 1.0 / 6227020800.0;  // Taylor to r^13: the rest is below 1e-17
  q = q * r + 1.0 / 479001600.0;
  q = q * r + 1.0 / 39916800.0;
  q = q * r + 1.0 / 3628800.0;
  q = q * r + 1.0 / 362880.0;
  q = q * r + 1.0 / 40320.0;
  q = q * r + 1.0 / 5040.0;
  q = q * r + 1.0 / 720.0;
  q = q * r + 1.0 / 120.0;
  q = q * r + 1.0 / 24.0;
  q = q * r + 1.0 / 6.0;
  q = q * r + 0.5;
  const VectorD p = q * (r * r) + r + 1.0;
  const Vector<uint64_t> exponent =
      (bit_cast<Vector<uint64_t>>(shifted) << 52) + 0x3FF0000000000000ull;
  const VectorD result = p * bit_cast<VectorD>(exponent);
  return x < -708.3964185322641 ? VectorD{} : result;
}

// 2^x for x <= 127 within 1.5 ulp; where that is below the smallest normal number, 0 or a subnormal
// number; NaN gives NaN.
MCIBI_SIMD VectorF exponential2(VectorF x) {
#if defined(__AVX512DQ__)
  const VectorF r = bit_cast<VectorF>(_mm512_maskz_reduce_ps(0xFFFF, bit_cast<__m512>(x), 0));
  const VectorF n = x - r;
#else
  const VectorF magic = VectorF{} + 0x1.8p23f;  // as above
  const VectorF shifted = x + magic;
  const VectorF n = shifted - magic;
  const VectorF r = x - n;
#endif
  VectorF p = VectorF{} + 1.535336341e-04f;  // 2^r, |r| <= 1/2, by a least-maximum fit
  p = p * r + 1.339887502e-03f;
  p = p * r + 9.618436918e-03f;
  p = p * r + 5.550332367e-02f;
  p = p * r + 2.402264774e-01f;
  p = p * r + 6.931471825e-01f;
  p = p * r + 1.0f;
#if defined(__AVX512DQ__)
  return bit_cast<VectorF>(
      _mm512_maskz_scalef_ps(0xFFFF, bit_cast<__m512>(p), bit_cast<__m512>(n)));
#else
  const VectorU32 exponent = (bit_cast<VectorU32>(shifted) << 23) + 0x3F800000u;
  return x < -126.0f ? VectorF{} : p * bit_cast<VectorF>(exponent);
#endif
}

// 2^x for x <= 1023, with a relative error of |x| 2^-53 plus 2 ulp.
MCIBI_SIMD VectorD exponential2(VectorD x) { return exponential(x * kLn2<double>); }

}  // namespace MCIBI_CPU_ARCH
}  // namespace mcibi_fast
