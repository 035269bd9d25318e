// Element types of tensors and CUDA streams, where torch's and CUDA's own headers are out of reach.
#pragma once

struct CUstream_st;  // declared in a namespace first, it would be another type than CUDA's

namespace mcibi_fast {

enum class FloatKind { kFloat32, kFloat64, kBFloat16, kFloat16 };
enum class LabelKind { kUInt8, kInt8, kInt16, kInt32, kInt64 };
using CudaStream = ::CUstream_st*;

}  // namespace mcibi_fast
