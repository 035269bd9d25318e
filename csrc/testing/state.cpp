// The host executor's shared memory, errors, device attributes and controls for tests.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <utility>

#include "testing/controls.h"
#include "testing/executor.h"
#include "testing/runtime.h"

namespace mcibi_host {

uint64_t seed = 0;
int skipped_site = -1;

namespace {

struct Site {
  Sync kind;
  std::string file;
  int line;
};
struct SharedObject {
  const void* key;
  std::unique_ptr<void, void (*)(void*)> memory;
  unsigned char* data;
  size_t bytes;
};

int status = cudaSuccess;
std::string error;
std::vector<SharedObject> static_objects, dynamic_object;  // the latter holds one or none
std::map<const void*, int> dynamic_consent;

std::vector<Site>& sites() {
  static std::vector<Site> all;
  return all;
}
std::map<int, int>& attributes() {  // a small device of compute capability 8.0
  static std::map<int, int> values = {{cudaDevAttrMultiProcessorCount, 4},
                                      {cudaDevAttrComputeCapabilityMajor, 8},
                                      {cudaDevAttrComputeCapabilityMinor, 0},
                                      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 164 * 1024},
                                      {cudaDevAttrMaxSharedMemoryPerBlockOptin, 163 * 1024}};
  return values;
}
constexpr size_t kConsentFreeBytes = 48 * 1024;
size_t shared_limit() { return size_t(attributes()[cudaDevAttrMaxSharedMemoryPerBlockOptin]); }

// Aligned exactly as requested, so that UBSan reports vector accesses that need a larger alignment.
SharedObject make_shared_object(const void* key, size_t bytes, size_t alignment) {
  const size_t offset = alignment < 128 ? alignment : 0;
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, offset + bytes) != 0) std::abort();
  unsigned char* data = static_cast<unsigned char*>(memory) + offset;
  std::memset(data, 0xff, bytes);
  return {key, {memory, std::free}, data, bytes};
}
bool contains(const std::vector<SharedObject>& objects, const void* address, size_t bytes) {
  const auto* byte = static_cast<const unsigned char*>(address);
  return std::any_of(objects.begin(), objects.end(), [=](const SharedObject& o) {
    return byte >= o.data && byte + bytes <= o.data + o.bytes;
  });
}

}  // namespace

// ---- sites and errors ---------------------------------------------------------------------------

int register_site(Sync kind, const char* file, int line) {
  auto& all = sites();
  const auto found = std::find_if(all.begin(), all.end(), [=](const Site& s) {
    return s.kind == kind && s.line == line && s.file == file;
  });
  if (found != all.end()) return int(found - all.begin());
  all.push_back({kind, file, line});
  return int(all.size()) - 1;
}
std::string site_name(int site) {
  const Site& s = sites()[size_t(site)];
  return s.file.substr(s.file.rfind('/') + 1) + ":" + std::to_string(s.line);
}
void record_error(int code, const std::string& message) {
  if (status != cudaSuccess) return;
  status = code;
  error = message;
}
const char* last_error() { return error.c_str(); }
int peek_status() { return status; }
int take_status() { return std::exchange(status, int(cudaSuccess)); }

// ---- launch limits ------------------------------------------------------------------------------

int device_attribute(int attribute) { return attributes().at(attribute); }
int allow_dynamic_shared(const void* kernel, int bytes) {
  if (size_t(bytes) > shared_limit()) return cudaErrorInvalidValue;
  dynamic_consent[kernel] = bytes;
  return cudaSuccess;
}
bool check_launch(const void* kernel, dim3 grid, dim3 block, size_t dynamic_bytes) {
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  const bool block_fits = threads > 0 && threads <= 1024 && block.z <= 64;
  const bool grid_fits = grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.x <= 0x7fffffffu &&
                         grid.y <= 65535 && grid.z <= 65535;
  const bool consented =
      dynamic_bytes <= kConsentFreeBytes || size_t(dynamic_consent[kernel]) >= dynamic_bytes;
  if (block_fits && grid_fits && consented && dynamic_bytes <= shared_limit()) return true;
  record_error(cudaErrorInvalidConfiguration,
               "launch: grid (" + std::to_string(grid.x) + "," + std::to_string(grid.y) + "," +
                   std::to_string(grid.z) + ") of " + std::to_string(threads) + " threads with " +
                   std::to_string(dynamic_bytes) +
                   " bytes of dynamic shared memory is outside the limits or without consent");
  return false;
}

// ---- shared memory ------------------------------------------------------------------------------

void* static_shared(const void* key, size_t bytes, size_t alignment) {
  size_t total = dynamic_object.empty() ? 0 : dynamic_object[0].bytes, fixed = 0;
  for (const SharedObject& object : static_objects) {
    if (object.key == key) return object.data;
    fixed += object.bytes;
  }
  total += fixed + bytes;
  if (fixed + bytes > kConsentFreeBytes || total > shared_limit())
    fail(std::to_string(fixed + bytes) + " bytes of static and " + std::to_string(total) +
         " of all shared memory are above the limits");
  static_objects.push_back(make_shared_object(key, bytes, alignment));
  return static_objects.back().data;
}
unsigned char* dynamic_shared() {
  if (dynamic_object.empty()) fail("has no dynamic shared memory: the launch asked for none");
  return dynamic_object[0].data;
}
void allocate_dynamic_shared(size_t bytes) {
  if (bytes > 0) dynamic_object.push_back(make_shared_object(nullptr, bytes, 128));
}
void poison_shared() {
  for (auto* objects : {&static_objects, &dynamic_object})
    for (SharedObject& object : *objects) {
      std::memset(object.data, 0xff, object.bytes);
      race_forget(object.data, object.bytes);
    }
}
void free_shared() {
  static_objects.clear();
  dynamic_object.clear();
}

void read_shared_row(void* destination, const void* address, int lane) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0)
    fail("ldmatrix: the row address of lane " + std::to_string(lane) + " is not 16-byte aligned");
  if (!contains(static_objects, address, 16) && !contains(dynamic_object, address, 16))
    fail("ldmatrix: the row of lane " + std::to_string(lane) + " is not in shared memory");
  race_access(address, 16, false, false);
  std::memcpy(destination, address, 16);
}

// ---- asynchronous copies ------------------------------------------------------------------------

void async_copy(void* shared, const void* global, size_t bytes, size_t valid_bytes) {
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % bytes != 0)
    fail("cp.async: an address is not aligned to " + std::to_string(bytes) + " bytes");
  if (!contains(static_objects, shared, bytes) && !contains(dynamic_object, shared, bytes))
    fail("cp.async: the destination is not in shared memory");
  race_access(shared, bytes, true, false);
  running->open_group.push_back({shared, global, bytes, valid_bytes});
}
void async_commit() {
  running->groups.push_back(std::move(running->open_group));
  running->open_group.clear();
}
void async_wait(int site, int groups_in_flight) {
  auto& groups = running->groups;
  if (site == skipped_site) return;
  while (groups.size() > size_t(groups_in_flight)) {
    for (const AsyncCopy& copy : groups.front()) {
      race_access(copy.from, copy.valid_bytes, false, false);
      race_access(copy.to, copy.bytes, true, false);
      std::memset(copy.to, 0, copy.bytes);
      std::memcpy(copy.to, copy.from, copy.valid_bytes);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace mcibi_host

// ---- controls.h ---------------------------------------------------------------------------------

void host_set_seed(uint64_t seed) { mcibi_host::seed = seed; }
void host_skip_site(int site) { mcibi_host::skipped_site = site; }
void host_set_device_attribute(int attribute, int value) {
  mcibi_host::attributes()[attribute] = value;
}
const char* host_last_error() { return mcibi_host::last_error(); }
int host_site_count() { return int(mcibi_host::sites().size()); }
int host_site(int site, const char** file, int* line) {
  const auto& s = mcibi_host::sites()[size_t(site)];
  *file = s.file.c_str();
  *line = s.line;
  return int(s.kind);
}
