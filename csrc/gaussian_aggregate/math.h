// Philox4x32-10 noise for the class representations (Eq. 11, Algorithm 1), for the host and the
// device.
//
// One call of gaussian_noise4 gives four neighbouring channels of one class. It has no branches and
// only 32-bit arithmetic, so that compilers can vectorise a loop over it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/host_device.h"

namespace mcibi_fast {

struct Philox4 {
  uint32_t x0, x1, x2, x3;
};

// The (seed, step) pair of ops.Philox as the generator reads it: key = seed, counter word 2 = step.
struct PhiloxState {
  uint32_t seed_low, seed_high, step;
};

MCIBI_HOST_DEVICE PhiloxState philox_state(int64_t seed, int64_t step) {
  const uint64_t bits = static_cast<uint64_t>(seed);
  return {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32),
          static_cast<uint32_t>(static_cast<uint64_t>(step))};
}

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11).
MCIBI_HOST_DEVICE Philox4 philox4x32_10(Philox4 c, uint32_t key0, uint32_t key1) {
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(0xD2511F53u) * c.x0;
    const uint64_t product1 = static_cast<uint64_t>(0xCD9E8D57u) * c.x2;
    c = {static_cast<uint32_t>(product1 >> 32) ^ c.x1 ^ key0, static_cast<uint32_t>(product1),
         static_cast<uint32_t>(product0 >> 32) ^ c.x3 ^ key1, static_cast<uint32_t>(product0)};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return c;
}

// float(x), rounded once, from conversions of signed integers, the only ones vector units have.
MCIBI_HOST_DEVICE float float_from_uint(uint32_t x) {
  return static_cast<float>(static_cast<int32_t>(x >> 16)) * 65536.0f +
         static_cast<float>(static_cast<int32_t>(x & 0xFFFFu));
}

// -ln(u) for u = (x + 0.5) / 2^32, to a few ulp over the whole range.
//
// Near u = 1 the distance 1 - u = (~x + 0.5) / 2^32 is computed from the integer, because it is
// lost once u is rounded to float.
MCIBI_HOST_DEVICE float minus_log_uniform(uint32_t x) {
  const float scaled = float_from_uint(x) + 0.5f;  // u * 2^32
  uint32_t bits;
  memcpy(&bits, &scaled, sizeof(bits));
  // scaled = m * 2^e with m in [sqrt(1/2), sqrt(2))
  const int32_t e = static_cast<int32_t>(bits - 0x3F3504F3u) >> 23;
  bits -= static_cast<uint32_t>(e) << 23;
  float m;
  memcpy(&m, &bits, sizeof(m));
  const bool near_one = x >= 0xB504F334u;  // u > sqrt(1/2)
  const float distance = (float_from_uint(~x) + 0.5f) * 0x1p-32f;
  const float f = near_one ? -distance : m - 1.0f;
  const float exponent = near_one ? 0.0f : static_cast<float>(e - 32);
  // ln(1 + f) = f - f^2/2 + f^3 P(f), P by a least-maximum fit (6e-9 relative)
  float p = -7.859545946e-02f;
  p = p * f + 1.288162172e-01f;
  p = p * f - 1.312876791e-01f;
  p = p * f + 1.418119669e-01f;
  p = p * f - 1.662455350e-01f;
  p = p * f + 2.000228614e-01f;
  p = p * f - 2.500081062e-01f;
  p = p * f + 3.333331645e-01f;
  const float square = f * f;
  const float log1p = f + (square * f * p - 0.5f * square);
  return -(exponent * 0.693147182f + log1p);
}

// sin and cos of 2 pi u for u = (x + 0.5) / 2^32. The integer is reduced by quarter turns, exactly.
MCIBI_HOST_DEVICE void sincos_uniform(uint32_t x, float& sine, float& cosine) {
  const uint32_t quarter = (x + 0x20000000u) >> 30;
  const int32_t rest = static_cast<int32_t>(x - (quarter << 30));   // [-2^29, 2^29)
  const float turn = (static_cast<float>(rest) + 0.5f) * 0x1p-32f;  // [-1/8, 1/8]
  const float square = turn * turn;
  float s = -7.540206909e+01f;
  s = s * square + 8.159255219e+01f;
  s = s * square - 4.134166336e+01f;
  s = (s * square + 6.283185482e+00f) * turn;
  float c = 5.924596024e+01f;
  c = c * square - 8.544374084e+01f;
  c = c * square + 6.493932343e+01f;
  c = c * square - 1.973920822e+01f;
  c = c * square + 1.0f;
  const bool swap = (quarter & 1u) != 0;
  const float sine_abs = swap ? c : s;
  const float cosine_abs = swap ? s : c;
  sine = (quarter & 2u) != 0 ? -sine_abs : sine_abs;
  cosine = ((quarter + 1u) & 2u) != 0 ? -cosine_abs : cosine_abs;
}

// Two standard normal draws (Box-Muller): r cos(2 pi u1), r sin(2 pi u1), r = sqrt(-2 ln u0).
MCIBI_HOST_DEVICE void box_muller(uint32_t x0, uint32_t x1, float& first, float& second) {
  const float r = sqrtf(2.0f * minus_log_uniform(x0));
  float sine, cosine;
  sincos_uniform(x1, sine, cosine);
  first = r * cosine;
  second = r * sine;
}

// eps[k, 4 * z4 + i] for i = 0..3, within 2e-6 of the same formula in float64.
MCIBI_HOST_DEVICE void gaussian_noise4(uint32_t z4, uint32_t k, PhiloxState state, float eps[4]) {
  const Philox4 x = philox4x32_10({z4, k, state.step, 0u}, state.seed_low, state.seed_high);
  box_muller(x.x0, x.x1, eps[0], eps[1]);
  box_muller(x.x2, x.x3, eps[2], eps[3]);
}

}  // namespace mcibi_fast
