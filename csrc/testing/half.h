// __half and __nv_bfloat16 with the conversions of cuda_fp16.h and cuda_bf16.h that the kernels
// use, rounded to nearest even. The kernels' scalar code computes in float, here as on the device.
#pragma once

#include <cstdint>
#include <cstring>

#include "testing/types.h"

namespace mcibi_host {

template <typename To, typename From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// Rounds a float to a binary format with `kExponent` exponent bits and `kMantissa` mantissa bits.
template <int kExponent, int kMantissa>
inline uint16_t narrow(float value) {
  constexpr int kBias = (1 << (kExponent - 1)) - 1;
  constexpr uint32_t kInfinity = ((1u << kExponent) - 1) << kMantissa;
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 31) << (kExponent + kMantissa);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return uint16_t(0x7fffu);  // the NaN that the device returns
  if (magnitude == 0x7f800000u) return uint16_t(sign | kInfinity);
  const int exponent = int(magnitude >> 23) - 127 + kBias;
  // The 24-bit significand loses 23 - kMantissa bits, and more if the result is subnormal.
  const bool normal_float = magnitude >= 0x00800000u;
  uint64_t significand = (magnitude & 0x007fffffu) | (normal_float ? 0x00800000u : 0u);
  int shift = 23 - kMantissa;
  uint32_t base = 0;
  if (exponent >= 1) {
    base = uint32_t(exponent - 1) << kMantissa;  // the implicit bit adds the last 1
  } else if (normal_float) {
    shift += 1 - exponent;
  }
  if (shift > 40) return uint16_t(sign);
  const uint64_t half = uint64_t(1) << (shift - 1);
  const uint64_t rest = significand & ((uint64_t(1) << shift) - 1);
  uint64_t kept = significand >> shift;
  if (rest > half || (rest == half && (kept & 1))) ++kept;
  const uint32_t result = base + uint32_t(kept);
  return uint16_t(sign | (result > kInfinity ? kInfinity : result));
}

template <int kExponent, int kMantissa>
inline float widen(uint16_t bits) {
  constexpr int kBias = (1 << (kExponent - 1)) - 1;
  constexpr uint32_t kMask = (1u << kMantissa) - 1;
  const uint32_t sign = uint32_t(bits >> (kExponent + kMantissa)) << 31;
  const uint32_t exponent = (bits >> kMantissa) & ((1u << kExponent) - 1);
  const uint32_t mantissa = bits & kMask;
  if (exponent == (1u << kExponent) - 1)
    return bit_cast<float>(sign | 0x7f800000u | (mantissa << (23 - kMantissa)));
  if (exponent == 0) {
    const float magnitude = __builtin_ldexpf(float(mantissa), 1 - kBias - kMantissa);
    return sign ? -magnitude : magnitude;
  }
  return bit_cast<float>(sign | ((exponent - kBias + 127) << 23) | (mantissa << (23 - kMantissa)));
}

}  // namespace mcibi_host

struct __half {
  uint16_t bits;
  __half() = default;
  explicit __half(float value) : bits(mcibi_host::narrow<5, 10>(value)) {}
  operator float() const { return mcibi_host::widen<5, 10>(bits); }
};
struct alignas(4) __half2 {
  __half x, y;
};
struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float value) : bits(mcibi_host::narrow<8, 7>(value)) {}
  operator float() const { return mcibi_host::widen<8, 7>(bits); }
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
using half = __half;
using half2 = __half2;
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

inline float __half2float(__half value) { return value; }
inline __half __float2half(float value) { return __half(value); }
inline __half __float2half_rn(float value) { return __half(value); }
inline __half __ushort_as_half(unsigned short bits) { return mcibi_host::bit_cast<__half>(bits); }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline __half2 __float22half2_rn(float2 v) { return {__half(v.x), __half(v.y)}; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
inline __half __low2half(__half2 v) { return v.x; }
inline __half __high2half(__half2 v) { return v.y; }

inline float __bfloat162float(__nv_bfloat16 value) { return value; }
inline __nv_bfloat16 __float2bfloat16(float value) { return __nv_bfloat16(value); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return __nv_bfloat16(value); }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
  return mcibi_host::bit_cast<__nv_bfloat16>(bits);
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__nv_bfloat16(x), __nv_bfloat16(y)};
}
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return __floats2bfloat162_rn(v.x, v.y); }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {v.x, v.y}; }
inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 v) { return v.x; }
inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 v) { return v.y; }
