// mma.sync and ldmatrix for the host executor, element by element, with the fragment layouts of the
// PTX ISA (sections "Matrix Fragments for mma.m16n8k16 / m16n8k8" and "ldmatrix"). Products are
// exact and summed in double, then rounded once to float; the hardware rounds its sums differently.
#pragma once

#include <cstdint>
#include <cstring>

#include "testing/half.h"
#include "testing/threads.h"

namespace mcibi_host {

// The row and column of element i in the registers of a lane (low half first for 16-bit elements).
struct Element {
  int row, column;
};

template <typename T>
struct Half16 {  // m16n8k16, 16-bit elements
  static constexpr int kDepth = 16, kA = 8, kB = 4;
  static Element a(int lane, int i) {
    return {lane / 4 + (i / 2 % 2) * 8, lane % 4 * 2 + i % 2 + (i / 4) * 8};
  }
  static Element b(int lane, int i) { return {lane % 4 * 2 + i % 2 + (i / 2) * 8, lane / 4}; }
  static float value(const uint32_t* registers, int i) {
    T element;
    std::memcpy(&element, reinterpret_cast<const char*>(registers) + 2 * i, 2);
    return float(element);
  }
};
struct Tf32 {  // m16n8k8
  static constexpr int kDepth = 8, kA = 4, kB = 2;
  static Element a(int lane, int i) { return {lane / 4 + (i % 2) * 8, lane % 4 + (i / 2) * 4}; }
  static Element b(int lane, int i) { return {lane % 4 + i * 4, lane / 4}; }
  static float value(const uint32_t* registers, int i) {
    return bit_cast<float>(registers[i] & 0xffffe000u);
  }
};

struct MmaOperand {
  float* acc;
  const uint32_t* a;
  const uint32_t* b;
};

template <typename Layout>
void complete_mma(unsigned, void* const* operands) {
  float a[16][Layout::kDepth], b[Layout::kDepth][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* operand = static_cast<const MmaOperand*>(operands[lane]);
    for (int i = 0; i < Layout::kA; ++i) {
      const Element e = Layout::a(lane, i);
      a[e.row][e.column] = Layout::value(operand->a, i);
    }
    for (int i = 0; i < Layout::kB; ++i) {
      const Element e = Layout::b(lane, i);
      b[e.row][e.column] = Layout::value(operand->b, i);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* acc = static_cast<MmaOperand*>(operands[lane])->acc;
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + (i / 2) * 8, column = lane % 4 * 2 + i % 2;
      double sum = acc[i];
      for (int k = 0; k < Layout::kDepth; ++k) sum += double(a[row][k]) * double(b[k][column]);
      acc[i] = float(sum);
    }
  }
}

template <typename T>
inline void mma_m16n8k16(float* acc, const uint32_t* a, const uint32_t* b) {
  MmaOperand operand{acc, a, b};
  collective(MCIBI_SITE(kCollective), 0xffffffffu, &complete_mma<Half16<T>>, &operand);
}
inline void mma_m16n8k8_tf32(float* acc, const uint32_t* a, const uint32_t* b) {
  MmaOperand operand{acc, a, b};
  collective(MCIBI_SITE(kCollective), 0xffffffffu, &complete_mma<Tf32>, &operand);
}

struct LdmatrixOperand {
  uint32_t* out;
  const void* row;
};

template <int kCount, bool kTranspose>
void complete_ldmatrix(unsigned, void* const* operands) {
  for (int matrix = 0; matrix < kCount; ++matrix) {
    uint16_t elements[8][8];
    for (int row = 0; row < 8; ++row) {
      const void* address = static_cast<LdmatrixOperand*>(operands[8 * matrix + row])->row;
      read_shared_row(elements[row], address, 8 * matrix + row);
    }
    for (int lane = 0; lane < 32; ++lane) {
      uint16_t pair[2];
      for (int i = 0; i < 2; ++i) {
        const int row = lane / 4, column = lane % 4 * 2 + i;
        pair[i] = kTranspose ? elements[column][row] : elements[row][column];
      }
      std::memcpy(&static_cast<LdmatrixOperand*>(operands[lane])->out[matrix], pair, 4);
    }
  }
}

template <int kCount, bool kTranspose>
inline void ldmatrix(uint32_t* out, const void* row) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4, "ldmatrix loads 1, 2 or 4 matrices");
  LdmatrixOperand operand{out, row};
  collective(MCIBI_SITE(kCollective), 0xffffffffu, &complete_ldmatrix<kCount, kTranspose>,
             &operand);
}

}  // namespace mcibi_host
