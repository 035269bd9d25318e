// The few lines of a test framework that the C++ tests need.
#pragma once

#include <cstdio>
#include <string>

inline bool g_failed = false;

inline void expect(bool condition, const std::string& what) {
  if (condition) return;
  std::printf("FAILED: %s\n", what.c_str());
  g_failed = true;
}
