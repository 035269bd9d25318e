// CUDA's built-in vector types with CUDA's alignments, so that UBSan reports misaligned accesses.
#pragma once

#include <cstddef>
#include <cstdint>

#define MCIBI_VECTOR_TYPES(name, scalar, align2, align4)                            \
  struct name##1 { scalar x; };                                                     \
  struct alignas(align2) name##2 { scalar x, y; };                                  \
  struct name##3 { scalar x, y, z; };                                               \
  struct alignas(align4) name##4 { scalar x, y, z, w; };                            \
  inline name##2 make_##name##2(scalar x, scalar y) { return {x, y}; }              \
  inline name##3 make_##name##3(scalar x, scalar y, scalar z) { return {x, y, z}; } \
  inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }

MCIBI_VECTOR_TYPES(char, signed char, 2, 4)
MCIBI_VECTOR_TYPES(uchar, unsigned char, 2, 4)
MCIBI_VECTOR_TYPES(short, short, 4, 8)
MCIBI_VECTOR_TYPES(ushort, unsigned short, 4, 8)
MCIBI_VECTOR_TYPES(int, int, 8, 16)
MCIBI_VECTOR_TYPES(uint, unsigned int, 8, 16)
MCIBI_VECTOR_TYPES(longlong, long long, 16, 16)
MCIBI_VECTOR_TYPES(ulonglong, unsigned long long, 16, 16)
MCIBI_VECTOR_TYPES(float, float, 8, 16)
MCIBI_VECTOR_TYPES(double, double, 16, 16)
#undef MCIBI_VECTOR_TYPES

struct dim3 {
  unsigned int x, y, z;
  constexpr dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {}
};
