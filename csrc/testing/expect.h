// The few lines of a test framework that the C++ tests need: they build with a compiler alone, from
// pytest, from CTest and with nvcc on a machine with a GPU.
#pragma once

#include <cstdio>
#include <string>

inline bool g_failed = false;

inline void expect(bool condition, const std::string& what) {
  if (condition) return;
  std::printf("FAILED: %s\n", what.c_str());
  g_failed = true;
}

// Prints how the test ended; returns main()'s exit status.
inline int report(const char* test) {
  std::printf("%s: %s\n", test, g_failed ? "FAILED" : "passed");
  return g_failed;
}
