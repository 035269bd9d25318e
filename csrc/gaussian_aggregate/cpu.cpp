// CPU kernels of gaussian_aggregate, one copy per instruction set (see common/cpu_dispatch.h).
//
// Pixels are taken 64 at a time. The softmax of a tile of pixels, [K][64], is computed once, in the
// first-level cache. A register-blocked product with the table then writes the output, so that the
// softmax never reaches memory. One operand of the product is broadcast; the other one is read as
// vectors along what is contiguous in the output: pixels, or channels for channels_last.
#include <type_traits>

#include "common/block_product.h"
#include "common/parallel.h"
#include "common/pixel_tiles.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "gaussian_aggregate/api.h"
#include "gaussian_aggregate/cpu_few.h"
#include "gaussian_aggregate/cpu_few_classes.h"
#include "gaussian_aggregate/math.h"

namespace mcibi_fast {
namespace MCIBI_CPU_ARCH {
namespace {

// Pixels of a tile when they are the broadcast operand (channels_last).
constexpr int64_t kTileOfRows = kTile / kWideRows * kWideRows;

// ---- table --------------------------------------------------------------------------------------

// Two functions that are never inlined, so that the product is rounded before the sum and not fused
// with it: these are the bits of the released table.
template <typename T>
__attribute__((noinline)) void scale_row(T* row, T factor, int64_t count) {
  for (int64_t z = 0; z < count; ++z) row[z] *= factor;
}
template <typename T>
__attribute__((noinline)) void shift_row(T* row, T offset, int64_t count) {
  for (int64_t z = 0; z < count; ++z) row[z] += offset;
}

void philox_row(uint32_t k, PhiloxState state, float* row, int64_t count) {
  constexpr int64_t kChunk = 256;
  float eps[kChunk];
  for (int64_t z = 0; z < count; z += kChunk) {
    const int64_t left = count - z < kChunk ? count - z : kChunk;
    const int blocks = static_cast<int>(ceil_div(left, 4));
    const uint32_t z4 = static_cast<uint32_t>(z / 4);
    for (int i = 0; i < blocks; ++i) {
      gaussian_noise4(z4 + static_cast<uint32_t>(i), k, state, eps + 4 * i);
    }
    memcpy(row + z, eps, static_cast<size_t>(left) * sizeof(float));
  }
}

template <typename T>
void noise_row(const GaussianTableInput& in, int64_t k, T* row) {
  const T* eps = static_cast<const T*>(in.eps) + k * in.eps_class_stride;
  for (int64_t z = 0; z < in.channels; ++z) row[z] = eps[z * in.eps_channel_stride];
}

// The table (K, Z) contiguous (Eq. 11).
template <typename T>
void make_table(const GaussianTableInput& in, T* table) {
  parallel_for(in.classes, 16, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      T* row = table + k * in.channels;
      if (in.eps != nullptr) {
        noise_row<T>(in, k, row);
      } else {
        philox_row(static_cast<uint32_t>(k), philox_state(in.seed, in.step),
                   reinterpret_cast<float*>(row), in.channels);
      }
      scale_row(row, static_cast<T>(in.memory[2 * k + 1]), in.channels);
      shift_row(row, static_cast<T>(in.memory[2 * k]), in.channels);
    }
  });
}

// Packs a matrix (outer, depth) as [outer / width][depth][width], with zeros after the last outer
// element. Element (o, d) is read from source[o * outer_stride + d * depth_stride].
template <typename T, typename C>
void pack_panels(const T* source, int64_t outer, int64_t outer_stride, int64_t depth,
                 int64_t depth_stride, int64_t width, C* panels) {
  constexpr int64_t kRows = 16;  // at a time, so that cache lines that panels share are read once
  parallel_for(ceil_div(outer, width), 8, [&](int64_t begin, int64_t end) {
    for (int64_t first = 0; first < depth; first += kRows) {
      const int64_t last = depth - first < kRows ? depth : first + kRows;
      for (int64_t panel = begin; panel < end; ++panel) {
        const T* from = source + panel * width * outer_stride;
        const int64_t valid = outer - panel * width < width ? outer - panel * width : width;
        C* to = panels + (panel * depth + first) * width;
        for (int64_t d = first; d < last; ++d, to += width) {
          for (int64_t i = 0; i < valid; ++i) {
            to[i] = static_cast<C>(from[i * outer_stride + d * depth_stride]);
          }
          for (int64_t i = valid; i < width; ++i) to[i] = C(0);
        }
      }
    }
  });
}

// The table packed in panels of `width` channels (kByChannel) or classes (kByClass).
enum class Panels { kByChannel, kByClass };

template <typename T, typename C>
void pack_table(const GaussianTableInput& in, Panels by, int64_t width, C* panels) {
  if constexpr (std::is_same_v<T, C>) {
    if (by == Panels::kByChannel && width == in.channels) return make_table(in, panels);
  }
  Scratch scratch(in.classes * in.channels * static_cast<int64_t>(sizeof(T)));
  T* table = scratch.as<T>();
  make_table(in, table);
  if (by == Panels::kByChannel) {
    pack_panels(table, in.channels, 1, in.classes, in.channels, width, panels);
  } else {
    pack_panels(table, in.classes, in.channels, in.channels, 1, width, panels);
  }
}

template <typename C>
void pack_table(const GaussianTableInput& in, Panels by, int64_t width, C* panels) {
  if (in.kind == FloatKind::kFloat64) {
    pack_table<double, C>(in, by, width, panels);
  } else {
    pack_table<float, C>(in, by, width, panels);
  }
}

// ---- tiles of the three ops ---------------------------------------------------------------------

// Calls f(begin, end) on ranges of tiles that are each large enough for a thread.
template <typename F>
void for_tiles(const GaussianAggregateInput& in, int64_t size, const F& f) {
  const int64_t tiles = in.batch * ceil_div(in.height * in.width, size);
  const int64_t work = in.table.classes * in.table.channels * size + 1;
  parallel_for(tiles, 1 + (1 << 20) / work, f);
}

// Tiles whose softmax is formed before their products: several where there are few classes, so that
// each channel is written in long runs, which the processor fetches ahead.
template <typename C>
int64_t tiles_at_once(int64_t classes) {
  const int64_t most = 8, fit = (24 << 10) / (classes * kTile * static_cast<int64_t>(sizeof(C)));
  return fit < 1 ? 1 : fit < most ? fit : most;
}

// out[z][n] = sum_k table[k][z] * softmax[n / kTile][k][n % kTile]
template <typename S>
void product_contiguous(const Compute<S>* softmax, const Compute<S>* panels, int64_t classes,
                        int64_t channels, int64_t pixels, int64_t count, S* out) {
  using C = Compute<S>;
  for (int64_t z = 0; z < channels; z += kWideRows) {
    for (int64_t n = 0; n < count; n += kWideColumns<C>) {
      const C* columns = softmax + n / kTile * classes * kTile + n % kTile;
      const auto block = multiply_wide(classes, panels + z * classes, kWideRows, columns, kTile);
      store_block(block, channels - z, count - n, pixels, out + z * pixels + n);
    }
  }
}

// out[n][z] = sum_k softmax[k][n] * table[k][z]
template <typename S>
void product_channels_last(const Compute<S>* softmax, const Compute<S>* panels, int64_t classes,
                           int64_t channels, int64_t count, S* out) {
  using C = Compute<S>;
  for (int64_t n = 0; n < count; n += kWideRows) {
    for (int64_t z = 0; z < channels; z += kWideColumns<C>) {
      const auto block =
          multiply_wide(classes, softmax + n, kTile, panels + z * classes, kWideColumns<C>);
      store_block(block, count - n, channels - z, channels, out + n * channels + z);
    }
  }
}

// dot[k][n] = sum_z table[k][z] * grad[z][n]. Long sums are sums of shorter ones, which keeps the
// rounding errors of float32 small.
template <typename C>
void product_of_channels(const C* panels, const C* grad, int64_t classes, int64_t channels,
                         int64_t count, C* dot) {
  constexpr int64_t kDepth = 64;
  for (int64_t n = 0; n < count; n += kBlockColumns<C>) {
    for (int64_t k = 0; k < classes; k += kBlockRows) {
      C* to = dot + k * kTile + n;
      Block<C> sum = {};
      store_block(sum, kBlockRows, kBlockColumns<C>, kTile, to);
      for (int64_t z = 0; z < channels; z += kDepth) {
        const int64_t depth = channels - z < kDepth ? channels - z : kDepth;
        sum = multiply(depth, panels + k * channels + z * kBlockRows, kBlockRows,
                       grad + z * kTile + n, kTile);
        add_block(sum, to);
      }
    }
  }
}

// The last step of the backward for a tile whose product with the gradient is known.
template <typename S>
void write_gradient(const GaussianAggregateInput& in, const Tile& tile, const Compute<S>* lse,
                    const Compute<S>* dot, Compute<S>* softmax, S* grad_logits) {
  const int64_t K = in.table.classes, pixels = in.height * in.width;
  const S* image = static_cast<const S*>(in.logits) + tile.image * in.logits_strides.batch;
  load_tile(image, in.logits_strides, in.width, K, tile.first, tile.count, softmax);
  Compute<S> statistic[kTile];
  load_row(lse + tile.image * pixels + tile.first, tile.count, statistic);
  softmax_adjoint_tile(softmax, dot, K, tile.count, statistic);
  store_tile(softmax, K, tile.first, tile.count, pixels, in.channels_last,
             grad_logits + tile.image * K * pixels);
}

// ---- few pixels ---------------------------------------------------------------------------------

template <typename S>
void aggregate_few(const GaussianAggregateInput& in, S* out, Compute<S>* lse) {
  using C = Compute<S>;
  const int64_t K = in.table.classes, Z = in.table.channels, pixels = in.height * in.width;
  Scratch scratch((K * Z + K * kTile + Z * kTile + pixels * Z) * static_cast<int64_t>(sizeof(C)));
  C *table = scratch.as<C>(), *softmax = table + K * Z, *maps = softmax + K * kTile;
  C* rows = maps + Z * kTile;
  C statistic[kTile];
  pack_table(in.table, Panels::kByChannel, Z, table);
  for (int64_t b = 0; b < in.batch; ++b, out += Z * pixels, lse += pixels) {
    const S* image = static_cast<const S*>(in.logits) + b * in.logits_strides.batch;
    load_tile(image, in.logits_strides, in.width, K, 0, pixels, softmax);
    softmax_tile(softmax, K, pixels, statistic);
    memcpy(lse, statistic, static_cast<size_t>(pixels) * sizeof(C));
    product_of_few(softmax, table, K, Z, pixels, rows);
    if (in.channels_last || pixels == 1) {
      store_row(rows, pixels * Z, out);
      continue;
    }
    for (int64_t z = 0; z < Z; ++z) {
      for (int64_t n = 0; n < pixels; ++n) maps[z * kTile + n] = rows[n * Z + z];
    }
    store_tile(maps, Z, 0, pixels, pixels, false, out);
  }
}

template <typename S>
void backward_of_few(const GaussianAggregateInput& in, const Compute<S>* lse, const S* grad,
                     const MapStrides& grad_strides, S* grad_logits) {
  using C = Compute<S>;
  const int64_t K = in.table.classes, Z = in.table.channels, pixels = in.height * in.width;
  Scratch scratch((K * Z + 2 * K * kTile + Z * kTile + pixels * Z) *
                  static_cast<int64_t>(sizeof(C)));
  C *table = scratch.as<C>(), *softmax = table + K * Z, *dot = softmax + K * kTile;
  C *maps = dot + K * kTile, *rows = maps + Z * kTile;
  pack_table(in.table, Panels::kByChannel, Z, table);
  for (int64_t b = 0; b < in.batch; ++b) {
    load_tile(grad + b * grad_strides.batch, grad_strides, in.width, Z, 0, pixels, maps);
    for (int64_t n = 0; n < pixels; ++n) {
      for (int64_t z = 0; z < Z; ++z) rows[n * Z + z] = maps[z * kTile + n];
    }
    product_of_few_channels(table, rows, K, Z, pixels, dot);
    write_gradient(in, {b, 0, pixels}, lse, dot, softmax, grad_logits);
  }
}

// ---- few classes --------------------------------------------------------------------------------

// Runs of tiles of one image, whose channels are read together where pixels are neighbours.
template <typename S>
void backward_of_few_classes(const GaussianAggregateInput& in, const Compute<S>* lse, const S* grad,
                             const MapStrides& strides, S* grad_logits) {
  using C = Compute<S>;
  const int64_t K = in.table.classes, Z = in.table.channels, pixels = in.height * in.width;
  Scratch packed(K * Z * static_cast<int64_t>(sizeof(C)));
  C* table = packed.as<C>();
  pack_table(in.table, Panels::kByChannel, Z, table);
  const bool rows = strides.channel == 1;
  const int64_t size = rows ? kTile : kTilesInRun * kTile;
  for_tiles(in, size, [&](int64_t begin, int64_t end) {
    Scratch scratch((kTilesInRun + 1) * K * kTile * static_cast<int64_t>(sizeof(C)));
    C *softmax = scratch.as<C>(), *dot = softmax + K * kTile;
    for (int64_t index = begin; index < end; ++index) {
      const Tile run = tile_at(index, pixels, size);
      const S* image = grad + run.image * strides.batch;
      if (rows) {
        int64_t offsets[kTile];
        pixel_offsets(strides, in.width, run.first, run.count, offsets);
        product_of_rows(table, K, Z, image, offsets, run.count, dot);
      } else {
        product_of_planes(table, K, Z, image + run.first, strides.channel, run.count, dot);
      }
      for (int64_t n = 0; n < run.count; n += kTile) {
        const Tile tile = {run.image, run.first + n, std::min(run.count - n, kTile)};
        write_gradient(in, tile, lse, dot + n * K, softmax, grad_logits);
      }
    }
  });
}

// ---- the three ops ------------------------------------------------------------------------------

template <typename S>
void aggregate_soft(const GaussianAggregateInput& in, S* out, Compute<S>* lse) {
  using C = Compute<S>;
  const int64_t K = in.table.classes, Z = in.table.channels, pixels = in.height * in.width;
  if (in.batch * pixels <= kFew) return aggregate_few(in, out, lse);
  const int64_t panel = in.channels_last ? kWideColumns<C> : kWideRows;
  const int64_t size = in.channels_last ? kTileOfRows : kTile;
  Scratch packed(ceil_div(Z, panel) * panel * K * static_cast<int64_t>(sizeof(C)));
  C* panels = packed.as<C>();
  pack_table(in.table, Panels::kByChannel, panel, panels);
  const int64_t most = in.channels_last ? 1 : tiles_at_once<C>(K);
  for_tiles(in, size, [&](int64_t begin, int64_t end) {
    Scratch scratch(most * K * kTile * static_cast<int64_t>(sizeof(C)));
    C* softmax = scratch.as<C>();
    C statistic[kTile];
    for (int64_t index = begin; index < end;) {
      const Tile first = tile_at(index, pixels, size);
      int64_t count = 0;  // pixels of neighbouring tiles of one image
      for (int64_t i = 0; i < most && index < end; ++i, ++index) {
        const Tile tile = tile_at(index, pixels, size);
        if (tile.image != first.image) break;
        C* to = softmax + i * K * kTile;
        const S* image = static_cast<const S*>(in.logits) + tile.image * in.logits_strides.batch;
        load_tile(image, in.logits_strides, in.width, K, tile.first, tile.count, to);
        softmax_tile(to, K, tile.count, statistic);
        memcpy(lse + tile.image * pixels + tile.first, statistic,
               static_cast<size_t>(tile.count) * sizeof(C));
        count += tile.count;
      }
      S* to = out + first.image * Z * pixels;
      if (in.channels_last) {
        product_channels_last(softmax, panels, K, Z, count, to + first.first * Z);
      } else {
        product_contiguous(softmax, panels, K, Z, pixels, count, to + first.first);
      }
    }
  });
}

template <typename S>
void aggregate_hard(const GaussianAggregateInput& in, S* out, Compute<S>* lse) {
  using C = Compute<S>;
  const int64_t K = in.table.classes, Z = in.table.channels, pixels = in.height * in.width;
  Scratch packed(Z * K * static_cast<int64_t>(sizeof(C)));
  C* table = packed.as<C>();  // (K, Z) for channels_last, else (Z, K)
  pack_table(in.table, Panels::kByChannel, in.channels_last ? Z : 1, table);
  for_tiles(in, kTile, [&](int64_t begin, int64_t end) {
    Scratch scratch(K * kTile * static_cast<int64_t>(sizeof(C)));
    C* logits = scratch.as<C>();
    int64_t best[kTile];
    C row[kTile];
    for (int64_t index = begin; index < end; ++index) {
      const Tile tile = tile_at(index, pixels, kTile);
      const S* image = static_cast<const S*>(in.logits) + tile.image * in.logits_strides.batch;
      load_tile(image, in.logits_strides, in.width, K, tile.first, tile.count, logits);
      argmax_tile(logits, K, best, row);
      memcpy(lse + tile.image * pixels + tile.first, row,
             static_cast<size_t>(tile.count) * sizeof(C));
      S* to = out + tile.image * Z * pixels;
      if (in.channels_last) {
        for (int64_t t = 0; t < tile.count; ++t) {
          store_row(table + best[t] * Z, Z, to + (tile.first + t) * Z);
        }
        continue;
      }
      for (int64_t z = 0; z < Z; ++z) {
        for (int64_t t = 0; t < kTile; ++t) row[t] = table[z * K + best[t]];
        store_row(row, tile.count, to + z * pixels + tile.first);
      }
    }
  });
}

template <typename S>
void aggregate_backward(const GaussianAggregateInput& in, const Compute<S>* lse, const S* grad,
                        const MapStrides& grad_strides, S* grad_logits) {
  using C = Compute<S>;
  const int64_t K = in.table.classes, Z = in.table.channels, pixels = in.height * in.width;
  if (in.batch * pixels <= kFew) return backward_of_few(in, lse, grad, grad_strides, grad_logits);
  const bool in_place = grad_strides.channel == 1 || has_planes(grad_strides, in.width);
  if (K <= kFewClasses && in_place) {
    return backward_of_few_classes(in, lse, grad, grad_strides, grad_logits);
  }
  const int64_t padded = ceil_div(K, kBlockRows) * kBlockRows;
  Scratch packed(padded * Z * static_cast<int64_t>(sizeof(C)));
  C* panels = packed.as<C>();
  pack_table(in.table, Panels::kByClass, kBlockRows, panels);
  for_tiles(in, kTile, [&](int64_t begin, int64_t end) {
    Scratch scratch((2 * padded + Z) * kTile * static_cast<int64_t>(sizeof(C)));
    C* dot = scratch.as<C>();
    C* softmax = dot + padded * kTile;
    C* cotangent = softmax + padded * kTile;
    for (int64_t index = begin; index < end; ++index) {
      const Tile tile = tile_at(index, pixels, kTile);
      load_tile(grad + tile.image * grad_strides.batch, grad_strides, in.width, Z, tile.first,
                tile.count, cotangent);
      product_of_channels(panels, cotangent, K, Z, tile.count, dot);
      write_gradient(in, tile, lse, dot, softmax, grad_logits);
    }
  });
}

template <typename S>
void aggregate(const GaussianAggregateInput& in, bool hard, void* out, void* lse) {
  auto* run = hard ? &aggregate_hard<S> : &aggregate_soft<S>;
  run(in, static_cast<S*>(out), static_cast<Compute<S>*>(lse));
}

template <typename S>
void backward(const GaussianAggregateInput& in, const void* lse, const void* grad,
              const MapStrides& strides, void* grad_logits) {
  aggregate_backward(in, static_cast<const Compute<S>*>(lse), static_cast<const S*>(grad), strides,
                     static_cast<S*>(grad_logits));
}

}  // namespace

void gaussian_table_cpu(const GaussianTableInput& input, void* table) {
  if (input.kind == FloatKind::kFloat64) {
    make_table(input, static_cast<double*>(table));
  } else {
    make_table(input, static_cast<float*>(table));
  }
}

void gaussian_aggregate_cpu(const GaussianAggregateInput& input, bool hard, void* out, void* lse) {
  with_storage_type(input.kind, [&](auto s) { aggregate<decltype(s)>(input, hard, out, lse); });
}

void gaussian_aggregate_backward_cpu(const GaussianAggregateInput& input, const void* lse,
                                     const void* grad, const MapStrides& grad_strides,
                                     void* grad_logits) {
  with_storage_type(input.kind, [&](auto s) {
    backward<decltype(s)>(input, lse, grad, grad_strides, grad_logits);
  });
}

}  // namespace MCIBI_CPU_ARCH
}  // namespace mcibi_fast
