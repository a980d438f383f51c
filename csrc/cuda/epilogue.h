// What becomes of a finished tile: a warp takes a row, a lane four of its columns.
#pragma once

#include "activation.h"
#include "operand.h"
#include "schedule.h"

namespace omnimoe::cuda {

// N numbers of a row, of which `count` exist, at once where they lie well.
template <int N, class T>
__device__ inline void store_run(T* to, const Wide<T> (&from)[N], int count) {
  if (count >= N && reinterpret_cast<uintptr_t>(to) % (sizeof(T) * N) == 0) {
    Pack<T, N> pack;
#pragma unroll
    for (int i = 0; i < N; ++i) pack.at[i] = narrow<T>(from[i]);
    store(reinterpret_cast<Pack<T, N>*>(to), pack);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < count) store(to + i, narrow<T>(from[i]));
  }
}
template <int N, class T>
__device__ inline void load_run(Wide<T> (&to)[N], const T* from, int count) {
  if (count >= N && reinterpret_cast<uintptr_t>(from) % (sizeof(T) * N) == 0) {
    const Pack<T, N> pack = load(reinterpret_cast<const Pack<T, N>*>(from));
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = widen(pack.at[i]);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = i < count ? widen(load(from + i)) : Wide<T>(0);
  }
}

// Rows of the tile that this warp takes, by number within it.
template <class Body>
__device__ inline void each_row(const Tile& tile, Body&& body) {
  for (int i = int(threadIdx.x) / 32; i < tile.rows; i += kThreads / 32) body(i, tile.row + i);
}

// out = (product + bias) * scale.
template <class T>
struct StoreProduct {
  int64_t columns;
  const T* bias;
  const Wide<T>* scale;
  T* out;

  __device__ int64_t tiles() const { return (columns + kColumns - 1) / kColumns; }
  __device__ Across across(int64_t tile) const { return consecutive<kColumns>(tile * kColumns, columns); }

  __device__ void operator()(const Tile& tile, const Wide<T>* staged, bool is_past_end) const {
    const int64_t column = tile.column_tile * kColumns + int64_t(lane_id()) * 4;
    const int count = clamp_to(columns - column, 4);
    Wide<T> plus[4] = {};
    if (bias && !is_past_end) load_run<4>(plus, bias + tile.group * columns + column, count);
    each_row(tile, [&](int i, int64_t row) {
      Wide<T> values[4] = {};
      if (!is_past_end) {
        const Wide<T> times = scale ? load(scale + row) : Wide<T>(1);
        for (int j = 0; j < 4; ++j) values[j] = (staged[i * kStagedColumns + int(lane_id()) * 4 + j] + plus[j]) * times;
      }
      store_run<4>(out + row * columns + column, values, count);
    });
  }
};

// Where gate and up of a network lie in its pre-activations.
struct Layout {
  int64_t width;
  Activation activation;
  bool is_gated, is_interleaved;

  __device__ int64_t columns() const { return is_gated ? 2 * width : width; }
};

// z = product + bias, h = act(gate) * up. A tile has 64 gates and 64 ups, in two runs or interleaved; or 128 of either.
template <class T>
struct StoreHidden {
  Layout layout;
  const T* bias;
  T* z;
  T* h;

  __device__ int64_t tiles() const {
    const int wide = layout.is_gated ? kColumns / 2 : kColumns;
    return (layout.width + wide - 1) / wide;
  }
  __device__ Across across(int64_t tile) const {
    if (!layout.is_gated || layout.is_interleaved) return consecutive<kColumns>(tile * kColumns, layout.columns());
    const int64_t first = tile * kColumns / 2;
    const int there = clamp_to(layout.width - first, kColumns / 2);
    return {first, layout.width + first, there, there};
  }

  __device__ void operator()(const Tile& tile, const Wide<T>* staged, bool is_past_end) const {
    const int64_t columns = layout.columns();
    const T* plus = bias ? bias + tile.group * columns : nullptr;
    each_row(tile, [&](int i, int64_t row) {
      const Wide<T>* found = staged + i * kStagedColumns;
      T* kept = z ? z + row * columns : nullptr;
      if (!layout.is_gated)
        plain(tile, found, plus, kept, h + row * columns, is_past_end);
      else
        gate_and_up(tile, found, plus, kept, h + row * layout.width, is_past_end);
    });
  }

 private:
  using W = Wide<T>;

  __device__ void plain(const Tile& tile, const W* found, const T* plus, T* kept, T* to, bool is_past_end) const {
    const int64_t column = tile.column_tile * kColumns + int64_t(lane_id()) * 4;
    const int count = clamp_to(layout.width - column, 4);
    W before[4] = {}, after[4] = {};
    if (!is_past_end) {
      if (plus) load_run<4>(before, plus + column, count);
      for (int j = 0; j < 4; ++j) {
        before[j] += found[int(lane_id()) * 4 + j];
        after[j] = activate(layout.activation, before[j]).value;
      }
    }
    if (kept) store_run<4>(kept + column, before, count);
    store_run<4>(to + column, after, count);
  }

  __device__ void gate_and_up(const Tile& tile, const W* found, const T* plus, T* kept, T* to, bool is_past_end) const {
    const int64_t column = tile.column_tile * (kColumns / 2) + int64_t(lane_id()) * 2;
    const int count = clamp_to(layout.width - column, 2);
    W gate[2] = {}, up[2] = {}, after[2] = {};
    if (!is_past_end) {
      if (plus) load_pairs(gate, up, plus, column, count);
      for (int j = 0; j < 2; ++j) {
        const int at = int(lane_id()) * 2 + j;
        gate[j] += found[layout.is_interleaved ? 2 * at : at];
        up[j] += found[layout.is_interleaved ? 2 * at + 1 : at + kColumns / 2];
        after[j] = gated(layout.activation, gate[j], up[j]).value;
      }
    }
    if (kept) store_pairs(kept, gate, up, column, count);
    store_run<2>(to + column, after, count);
  }

  __device__ void load_pairs(W (&gate)[2], W (&up)[2], const T* from, int64_t column, int count) const {
    if (layout.is_interleaved) {
      W both[4];
      load_run<4>(both, from + 2 * column, 2 * count);
      for (int j = 0; j < 2; ++j) gate[j] = both[2 * j], up[j] = both[2 * j + 1];
    } else {
      load_run<2>(gate, from + column, count);
      load_run<2>(up, from + layout.width + column, count);
    }
  }
  __device__ void store_pairs(T* to, const W (&gate)[2], const W (&up)[2], int64_t column, int count) const {
    if (layout.is_interleaved) {
      store_run<4>(to + 2 * column, {gate[0], up[0], gate[1], up[1]}, 2 * count);
    } else {
      store_run<2>(to + column, gate, count);
      store_run<2>(to + layout.width + column, up, count);
    }
  }
};

// From g = grad W_out and z: grad_z, h times the weight, and the row's share of the gradient of its weight.
template <class T>
struct StoreBackward {
  Layout layout;
  const T* z;
  const Wide<T>* weights;
  T* grad_z;
  T* h;
  Wide<T>* shares;

  __device__ int64_t tiles() const { return (layout.width + kColumns - 1) / kColumns; }
  __device__ Across across(int64_t tile) const { return consecutive<kColumns>(tile * kColumns, layout.width); }

  __device__ void operator()(const Tile& tile, const Wide<T>* staged, bool is_past_end) const {
    const int64_t column = tile.column_tile * kColumns + int64_t(lane_id()) * 4, columns = layout.columns();
    const int count = clamp_to(layout.width - column, 4);
    each_row(tile, [&](int i, int64_t row) {
      W of_gate[4] = {}, of_up[4] = {}, after[4] = {}, share = 0;
      if (!is_past_end) {
        const W weight = weights ? load(weights + row) : W(1);
        W gate[4], up[4];
        load_sides(gate, up, z + row * columns, column, count);
        for (int j = 0; j < 4; ++j) {
          const W grad = staged[i * kStagedColumns + int(lane_id()) * 4 + j];
          GatedSlopes<W> at;
          if (layout.is_gated) {
            at = gated(layout.activation, gate[j], up[j]);
          } else {
            const Activated<W> alone = activate(layout.activation, up[j]);
            at = {alone.value, W(0), alone.slope};
          }
          of_gate[j] = weight * grad * at.gate;
          of_up[j] = weight * grad * at.up;
          after[j] = weight * at.value;
          if (j < count) share += grad * at.value;
        }
      }
      store_sides(grad_z + row * columns, of_gate, of_up, column, count);
      store_run<4>(h + row * layout.width + column, after, count);
      if (shares) {
        for (int by = 16; by; by /= 2) share += __shfl_xor_sync(kFullWarp, share, by);
        if (lane_id() == 0) store(shares + row * tiles() + tile.column_tile, share);
      }
    });
  }

 private:
  using W = Wide<T>;

  __device__ void load_sides(W (&gate)[4], W (&up)[4], const T* from, int64_t column, int count) const {
    if (!layout.is_gated) {
      load_run<4>(up, from + column, count);
    } else if (layout.is_interleaved) {
      W both[8];
      load_run<8>(both, from + 2 * column, 2 * count);
      for (int j = 0; j < 4; ++j) gate[j] = both[2 * j], up[j] = both[2 * j + 1];
    } else {
      load_run<4>(gate, from + column, count);
      load_run<4>(up, from + layout.width + column, count);
    }
  }
  __device__ void store_sides(T* to, const W (&gate)[4], const W (&up)[4], int64_t column, int count) const {
    if (!layout.is_gated) {
      store_run<4>(to + column, up, count);
    } else if (layout.is_interleaved) {
      store_run<8>(to + 2 * column, {gate[0], up[0], gate[1], up[1], gate[2], up[2], gate[3], up[3]}, 2 * count);
    } else {
      store_run<4>(to + column, gate, count);
      store_run<4>(to + layout.width + column, up, count);
    }
  }
};

}  // namespace omnimoe::cuda
