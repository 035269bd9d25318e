// What tests ask of the host executor, from C++ and through ctypes (defined in state.cpp).
#pragma once

#include <cstdint>

#define MCIBI_EXPORT extern "C" __attribute__((visibility("default")))

// The order in which threads and blocks run; see pick_ready() in executor.cpp.
MCIBI_EXPORT void host_set_seed(uint64_t seed);
// The barrier, fence or wait with this number does nothing; -1: all work.
MCIBI_EXPORT void host_skip_site(int site);
MCIBI_EXPORT void host_set_device_attribute(int attribute, int value);
MCIBI_EXPORT const char* host_last_error();
// The synchronisation sites of the kernels that have run so far.
MCIBI_EXPORT int host_site_count();
MCIBI_EXPORT int host_site(int site, const char** file, int* line);
