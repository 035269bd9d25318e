// Arithmetic that the host and the device share.
#pragma once

#include <cstring>
#include <type_traits>

#include "common/host_device.h"

namespace mcibi_fast {

// The type in which elements are computed: float64 stays float64, all others become float32.
template <typename Element>
using Compute = std::conditional_t<std::is_same_v<Element, double>, double, float>;

template <typename T>
inline constexpr T kLog2E = T(1.44269504088896340736);
template <typename T>
inline constexpr T kLn2 = T(0.69314718055994530942);

// a / b rounded up, for a >= 0 and b > 0.
template <typename A, typename B>
MCIBI_HOST_DEVICE constexpr auto ceil_div(A a, B b) {
  return (a + b - 1) / b;
}

// Whether a is larger than b, where NaN is larger than any number, as in torch.argmax.
template <typename T>
MCIBI_HOST_DEVICE bool exceeds(T a, T b) {
  return !(a <= b) && b == b;
}

// The same bits as another type of the same size.
template <typename To, typename From>
MCIBI_HOST_DEVICE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast between different sizes");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

}  // namespace mcibi_fast
