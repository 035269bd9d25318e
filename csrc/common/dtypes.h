// Element types of tensors, and CUDA streams, for headers that include neither torch nor CUDA.
#pragma once

struct CUstream_st;  // declared here, because inside a namespace it would not be CUDA's type

namespace mcibi_fast {

enum class FloatKind { kFloat32, kFloat64, kBFloat16, kFloat16 };
enum class LabelKind { kUInt8, kInt8, kInt16, kInt32, kInt64 };
using CudaStream = ::CUstream_st*;

}  // namespace mcibi_fast
