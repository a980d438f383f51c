// What becomes of a tile's sums: stored as they are, or through the activation of the experts' network, or through its
// derivative. Threads of a quad hold two columns of eight each; they exchange words so that each stores sixteen bytes.
#pragma once

#include "sm90_activation.h"
#include "sm90_kernel.h"

namespace omnimoe::cuda::sm90 {

constexpr unsigned kWarp = 0xffffffffu;
constexpr int kQuadColumns = 32;  // columns that a quad goes through at once

template <class T>
using Chunk = Pack<T, kChunk>;
using Words = Pack<uint32_t, 4>;

// Word j of the quad's thread i goes to its thread j as word i.
template <class W>
__device__ inline void exchange(W (&w)[4]) {
  const bool is_high = threadIdx.x & 2, is_odd = threadIdx.x & 1;
  const W low_half = __shfl_xor_sync(kWarp, is_high ? w[0] : w[2], 2);
  const W high_half = __shfl_xor_sync(kWarp, is_high ? w[1] : w[3], 2);
  (is_high ? w[0] : w[2]) = low_half;
  (is_high ? w[1] : w[3]) = high_half;
  const W even = __shfl_xor_sync(kWarp, is_odd ? w[0] : w[1], 1);
  const W odd = __shfl_xor_sync(kWarp, is_odd ? w[2] : w[3], 1);
  (is_odd ? w[0] : w[1]) = even;
  (is_odd ? w[2] : w[3]) = odd;
}

// Eight numbers of a row, two of each 8 columns, become eight side by side.
__device__ inline void exchange(float (&v)[kChunk]) {
  float even[4], odd[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) even[i] = v[2 * i], odd[i] = v[2 * i + 1];
  exchange(even);
  exchange(odd);
#pragma unroll
  for (int i = 0; i < 4; ++i) v[2 * i] = even[i], v[2 * i + 1] = odd[i];
}

template <class T>
__device__ inline Words packed(const float (&v)[kChunk]) {
  Words words;
#pragma unroll
  for (int i = 0; i < 4; ++i) words.at[i] = pack<T>(v[2 * i], v[2 * i + 1]);
  return words;
}

// Stores what a quad holds of 32 columns of a row, eight columns a thread.
template <class T>
__device__ inline void store_quad(const float (&v)[kChunk], T* to, bool is_wanted) {
  Words words = packed<T>(v);
  exchange(words.at);
  if (is_wanted) store(reinterpret_cast<Words*>(to), words);
}

template <class T>
__device__ inline void store_chunk(const float (&v)[kChunk], T* to) {
  store(reinterpret_cast<Words*>(to), packed<T>(v));
}
template <class T>
__device__ inline void load_chunk(const T* from, float (&v)[kChunk]) {
  const Chunk<T> chunk = load(reinterpret_cast<const Chunk<T>*>(from));
#pragma unroll
  for (int i = 0; i < kChunk; ++i) v[i] = widen(chunk.at[i]);
}

// The sums of half h of the warp's rows at 32 columns, as they lie in the accumulators.
template <int kRegisters>
__device__ inline void take(const float (&d)[kRegisters], int columns, int h, float (&v)[kChunk]) {
#pragma unroll
  for (int i = 0; i < kChunk; ++i) v[i] = d[columns / 2 + i / 2 * 4 + 2 * h + i % 2];
}

// What the thread's columns of a quad's 32 have as bias.
template <class T>
__device__ inline void take_bias(const T* bias, int column, int columns, float (&v)[kChunk]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int at = column + 8 * i + int(threadIdx.x) % 4 * 2;
    Pack<T, 2> pair = {};
    if (at < columns) pair = load(reinterpret_cast<const Pack<T, 2>*>(bias + at));
    v[2 * i] = widen(pair.at[0]);
    v[2 * i + 1] = widen(pair.at[1]);
  }
}

__device__ inline void add(float (&v)[kChunk], const float (&more)[kChunk]) {
#pragma unroll
  for (int i = 0; i < kChunk; ++i) v[i] += more[i];
}

// The thread's first row of the warpgroup's 64; the other one is 8 below.
__device__ inline int thread_row() { return int(threadIdx.x) % 128 / 32 * 16 + int(threadIdx.x) % 32 / 4; }
__device__ inline int thread_chunk() { return int(threadIdx.x) % 4 * kChunk; }

// ---- a plain product, or the gradient of a bank ---------------------------------------------------------------------

struct PlainResults {
  const void* bias;
  const float* scale;
  void* out;
};

template <class T, int kTileColumns, bool kIsAcrossA, bool kIsAcrossB>
struct Plain : Operation<T, kTileColumns, kIsAcrossA, kIsAcrossB> {
  using Results = PlainResults;

  template <int kRegisters>
  __device__ static void finish(const Problem& p, const Results& results, const Tile& tile, int row,
                                const float (&d)[kRegisters]) {
    const bool is_group = tile.group < p.groups;
    const T* bias = static_cast<const T*>(results.bias);
    if (bias) bias = is_group ? bias + int64_t{tile.group} * p.columns : nullptr;
    T* out = static_cast<T*>(results.out);
    if (kIsAcrossA) out += int64_t{tile.group} * p.height * p.columns;
    row += thread_row();
    float scale[2] = {1, 1};
    if (results.scale && is_group)
      for (int h = 0; h < 2; ++h)
        if (row + 8 * h < tile.row_end) scale[h] = load(results.scale + row + 8 * h);
#pragma unroll
    for (int at = 0; at < kTileColumns; at += kQuadColumns) {
      const int column = tile.column + at;
      if (column >= p.columns) break;
      float more[kChunk];
      if (bias) take_bias(bias, column, p.columns, more);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float v[kChunk];
        take(d, at, h, v);
        if (bias) add(v, more);
        if (results.scale) {
#pragma unroll
          for (int i = 0; i < kChunk; ++i) v[i] *= scale[h];
        }
        const int r = row + 8 * h, c = column + thread_chunk();
        store_quad(v, out + int64_t{r} * p.columns + c, r < tile.row_end && c < p.columns);
      }
    }
  }
};

// ---- the first product of the experts' network ----------------------------------------------------------------------

// How the columns of z lie.
enum class Layout { plain, halves, pairs };

struct HiddenResults {
  const void* bias;
  void *z, *h;
  int width;
  Activation activation;
};

// Columns are those of z; in halves, of each half.
template <class T, Layout kLayout>
struct FirstProduct : Operation<T, 256, false, false, kLayout == Layout::halves ? 2 : 1> {
  using Base = Operation<T, 256, false, false, kLayout == Layout::halves ? 2 : 1>;
  using Results = HiddenResults;

  template <int kRegisters>
  __device__ static void finish(const Problem& p, const Results& results, const Tile& tile, int row,
                                const float (&d)[kRegisters]) {
    constexpr int kWide = kLayout == Layout::plain ? 1 : 2;
    const int width = results.width;
    const T* bias = static_cast<const T*>(results.bias);
    if (bias) bias = tile.group < p.groups ? bias + int64_t{tile.group} * kWide * width : nullptr;
    T *z = static_cast<T*>(results.z), *h = static_cast<T*>(results.h);
    row += thread_row();
#pragma unroll
    for (int at = 0; at < Base::kStepColumns; at += kQuadColumns) {
      const int column = tile.column + at, c = column + thread_chunk();
      if (column >= p.columns) break;
      float more[kChunk], more_up[kChunk];
      if (bias) {
        take_bias(bias, column, p.columns, more);
        if constexpr (kLayout == Layout::halves) take_bias(bias + width, column, p.columns, more_up);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = row + 8 * half;
        const bool is_wanted = r < tile.row_end && c < p.columns;
        T *z_at = z + int64_t{r} * kWide * width + c, *h_at = h + int64_t{r} * width;
        float v[kChunk], up[kChunk], value[kChunk];
        take(d, at, half, v);
        if (bias) add(v, more);
        if constexpr (kLayout == Layout::halves) {
          take(d, Base::kStepColumns + at, half, up);
          if (bias) add(up, more_up);
          activate_chunk<true>(results.activation, v, up, value);
          if (z) {
            store_quad(v, z_at, is_wanted);
            store_quad(up, z_at + width, is_wanted);
          }
          store_quad(value, h_at + c, is_wanted);
        } else if constexpr (kLayout == Layout::plain) {
          activate_chunk<false>(results.activation, v, v, value);
          if (z) store_quad(v, z_at, is_wanted);
          store_quad(value, h_at + c, is_wanted);
        } else {
          // eight columns side by side are four pairs of a gate and what it is for
          exchange(v);
          float gate[kChunk] = {};
#pragma unroll
          for (int i = 0; i < kChunk; ++i) gate[i] = v[i / 2 * 2], up[i] = v[i / 2 * 2 + 1];
          activate_chunk<true>(results.activation, gate, up, value);
          if (is_wanted) {
            if (z) store_chunk(v, z_at);
            store(reinterpret_cast<Pack<uint32_t, 2>*>(h_at + c / 2),
                  Pack<uint32_t, 2>{{pack<T>(value[0], value[2]), pack<T>(value[4], value[6])}});
          }
        }
      }
    }
  }
};

// ---- backward through the second product and the activation ---------------------------------------------------------

struct BackwardResults {
  const void* z;
  const float* weights;
  void *grad_z, *h;
  float* shares;
  int shares_per_row;
  Activation activation;
  bool is_gated, is_interleaved;
};

template <class T>
struct SecondProductBackward : Operation<T, 128, false, true> {
  using Results = BackwardResults;

  // z or its gradient at eight columns of F: of gate and up, or of the only one there is.
  __device__ static void load_z(const T* z, int width, const Results& results, float (&gate)[kChunk],
                                float (&up)[kChunk]) {
    load_chunk(z, gate);
    if (!results.is_gated) return;
    load_chunk(z + (results.is_interleaved ? kChunk : width), up);
    if (results.is_interleaved) split(gate, up);
  }
  __device__ static void store_z(T* z, int width, const Results& results, float (&gate)[kChunk], float (&up)[kChunk]) {
    if (results.is_gated && results.is_interleaved) join(gate, up);
    store_chunk(gate, z);
    if (results.is_gated) store_chunk(up, z + (results.is_interleaved ? kChunk : width));
  }
  __device__ static void split(float (&first)[kChunk], float (&second)[kChunk]) {
    float gate[kChunk], up[kChunk];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      gate[i] = first[2 * i], up[i] = first[2 * i + 1];
      gate[4 + i] = second[2 * i], up[4 + i] = second[2 * i + 1];
    }
#pragma unroll
    for (int i = 0; i < kChunk; ++i) first[i] = gate[i], second[i] = up[i];
  }
  __device__ static void join(float (&gate)[kChunk], float (&up)[kChunk]) {
    float first[kChunk], second[kChunk];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      first[2 * i] = gate[i], first[2 * i + 1] = up[i];
      second[2 * i] = gate[4 + i], second[2 * i + 1] = up[4 + i];
    }
#pragma unroll
    for (int i = 0; i < kChunk; ++i) gate[i] = first[i], up[i] = second[i];
  }

  template <int kRegisters>
  __device__ static void finish(const Problem& p, const Results& results, const Tile& tile, int row,
                                const float (&d)[kRegisters]) {
    const int width = p.columns, wide = results.is_gated ? 2 * width : width;
    const int apart = results.is_gated && results.is_interleaved ? 2 : 1;
    const T* z = static_cast<const T*>(results.z);
    T *grad_z = static_cast<T*>(results.grad_z), *h = static_cast<T*>(results.h);
    row += thread_row();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row + 8 * half;
      const bool is_row = r < tile.row_end;
      float weight = 1.f, share = 0.f;
      if (results.weights && is_row) weight = load(results.weights + r);
      const int64_t z_row = int64_t{r} * wide, h_row = int64_t{r} * width;
#pragma unroll
      for (int at = 0; at < 128; at += kQuadColumns) {
        const int c = tile.column + at + thread_chunk();
        float v[kChunk], gate[kChunk] = {}, up[kChunk] = {}, value[kChunk] = {};
        take(d, at, half, v);
        exchange(v);
        if (!is_row || c >= width) continue;
        if (tile.group < p.groups) {
          load_z(z + z_row + apart * c, width, results, gate, up);
          if (results.is_gated)
            derive_chunk<true>(results.activation, gate, up, value);
          else
            derive_chunk<false>(results.activation, gate, up, value);
#pragma unroll
          for (int i = 0; i < kChunk; ++i) {
            share += v[i] * value[i];
            gate[i] *= weight * v[i];
            up[i] *= weight * v[i];
            value[i] *= weight;
          }
        }
        store_z(grad_z + z_row + apart * c, width, results, gate, up);
        store_chunk(value, h + h_row + c);
      }
      share += __shfl_xor_sync(kWarp, share, 1);
      share += __shfl_xor_sync(kWarp, share, 2);
      if (results.shares && is_row && threadIdx.x % 4 == 0)
        store(results.shares + int64_t{r} * results.shares_per_row + tile.column / 128, share);
    }
  }
};

}  // namespace omnimoe::cuda::sm90
