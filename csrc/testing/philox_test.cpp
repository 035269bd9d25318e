// Known answers of Philox4x32-10 and the accuracy of the normal draws against long double.
// Needs only a compiler: c++ -std=c++17 -O2 -Icsrc csrc/testing/philox_test.cpp. Exit status 1 on
// failure.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <initializer_list>

#include "gaussian_aggregate/math.h"
#include "testing/expect.h"

namespace {

using mcibi_fast::Philox4;

// Random123's kat_vectors, "philox4x32 10".
void known_answers() {
  struct Case {
    Philox4 counter;
    uint32_t key0, key1;
    Philox4 result;
  };
  const Case cases[] = {
      {{0, 0, 0, 0}, 0, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {{~0u, ~0u, ~0u, ~0u}, ~0u, ~0u, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
       0xa4093822,
       0x299f31d0,
       {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  for (const Case& c : cases) {
    const Philox4 x = mcibi_fast::philox4x32_10(c.counter, c.key0, c.key1);
    expect(x.x0 == c.result.x0 && x.x1 == c.result.x1 && x.x2 == c.result.x2 && x.x3 == c.result.x3,
           "known answer of Philox4x32-10");
  }
}

long double minus_log(uint32_t x) {
  const long double scale = 1.0L / 4294967296.0L;
  const long double u = (static_cast<long double>(x) + 0.5L) * scale;
  const long double rest = (static_cast<long double>(~x) + 0.5L) * scale;
  return x >> 31 ? -std::log1p(-rest) : -std::log(u);
}

// Largest error of the two draws made of (x0, x1).
double draw_error(uint32_t x0, uint32_t x1) {
  const long double r = std::sqrt(2.0L * minus_log(x0));
  const long double angle =
      2.0L * 3.14159265358979323846264338L * (static_cast<long double>(x1) + 0.5L) / 4294967296.0L;
  float first, second;
  mcibi_fast::box_muller(x0, x1, first, second);
  return static_cast<double>(
      std::fmax(std::fabs(first - r * std::cos(angle)), std::fabs(second - r * std::sin(angle))));
}

void accuracy() {
  double worst = 0.0, worst_log = 0.0;
  const auto look = [&](uint32_t x0, uint32_t x1) {
    worst = std::fmax(worst, draw_error(x0, x1));
    const double ratio = static_cast<double>(mcibi_fast::minus_log_uniform(x0) / minus_log(x0));
    worst_log = std::fmax(worst_log, std::fabs(ratio - 1.0));
  };
  // Both ends of the range, and where the polynomials and the octants meet.
  for (uint32_t i = 0; i < 20000; ++i) {
    const uint32_t angle = i * 2654435761u;
    for (uint32_t x0 : {i, ~i, 0xB504F334u - 10000 + i, 0x80000000u - 10000 + i}) look(x0, angle);
    for (uint32_t eighth = 0; eighth < 8; ++eighth) look(i & 7, (eighth << 29) - 10000 + i);
  }
  for (uint32_t i = 0; i < 1000000; ++i) {
    const Philox4 x = mcibi_fast::philox4x32_10({i, 0, 0, 0}, 1, 2);
    look(x.x0, x.x1);
    look(x.x2 >> (i % 32), x.x3);
  }
  std::printf("normal draws: largest error %.3g; -ln(u): largest relative error %.3g\n", worst,
              worst_log);
  expect(worst <= 2e-6, "a normal draw is more than 2e-6 away");
  expect(worst_log <= 4e-7, "-ln(u) loses relative accuracy");
}

}  // namespace

int main() {
  known_answers();
  accuracy();
  return report("philox_test");
}
