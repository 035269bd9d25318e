// What the bindings of CUDA launchers share: the device and stream they run on, allocation, errors.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <vector>

#include "common/dtypes.h"

// The dispatch key of the ops. Under the host executor (csrc/testing) they take CPU tensors, so
// that a test can call the bindings without a GPU.
#ifdef MCIBI_HOST_EXECUTOR
#define MCIBI_CUDA_KEY CPU
#else
#define MCIBI_CUDA_KEY CUDA
#endif

namespace mcibi_fast {

// Makes the tensor's device current for its lifetime; work goes to that device's current stream.
class OnDeviceOf {
 public:
#ifdef MCIBI_HOST_EXECUTOR
  explicit OnDeviceOf(const torch::stable::Tensor& tensor) : device_(tensor.device()) {}
#else
  explicit OnDeviceOf(const torch::stable::Tensor& tensor)
      : device_(tensor.device()), guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<struct CUstream_st*>(stream);
  }
#endif

  struct CUstream_st* stream() const { return stream_; }

  torch::stable::Tensor empty(const std::vector<int64_t>& sizes,
                              torch::headeronly::ScalarType type) const {
    return torch::stable::empty(sizes, type, std::nullopt, device_);
  }

 private:
  torch::stable::Device device_;
#ifndef MCIBI_HOST_EXECUTOR
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  struct CUstream_st* stream_ = nullptr;
};

// Launchers return null or what the CUDA runtime said.
inline void check_launch(const char* op, const char* error) {
  STD_TORCH_CHECK(error == nullptr, op, ": CUDA launch failed: ", error);
}

}  // namespace mcibi_fast
