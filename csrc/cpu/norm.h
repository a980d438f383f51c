// The root-mean-square norm with a scale a group, and rotary positions: one pass over the rows forward, two backward.
#pragma once

#include "banks.h"

namespace omnimoe::cpu::OMNIMOE_ISA {
namespace {

// What is left of a number when it is stored.
template <class T, class V>
inline V rounded(V v) {
  if constexpr (sizeof(T) == sizeof(Accumulator<T>)) return v;
  T lanes[kLanes<T>];
  store(lanes, v);
  return load(lanes);
}

// f(column, count) for every vector of columns.
template <class T, class F>
inline void by_vector(int64_t width, const F& f) {
  int64_t c = 0;
  for (; c + kLanes<T> <= width; c += kLanes<T>) f(c, kLanes<T>);
  if (c < width) f(c, int(width - c));
}

template <class T>
inline const T* head_of(const Heads& x, int64_t row, int64_t head) {
  return static_cast<const T*>(x.data) + row * x.row_stride + head * x.head_stride;
}

// Calls f(i, blocks[i]) for blocks of rows of one group; the cut depends on the groups alone.
template <class F>
void by_block(const Threads& threads, const Tasks& blocks, const F& f) {
  for_each_task(threads, blocks.count(), 64, [&](int64_t i, Scratch&) { f(i, blocks[i]); });
}

template <class T>
void rms_norm(const RMSNorm& a) {
  using A = Accumulator<T>;
  using V = typename Lanes<A>::Vector;
  const Tasks blocks(a.groups, 1, 1);
  by_block(a.threads, blocks, [&](int64_t, const Task& block) {
    const A* scale = static_cast<const A*>(a.weight) + block.group * a.width;
    for (int64_t r = block.row; r < block.row_end; ++r)
      for (int64_t m = 0; m < a.x.heads; ++m) {
        const T* from = head_of<T>(a.x, r, m);
        V squares = {};
        by_vector<T>(a.width, [&](int64_t c, int count) {
          const V v = load_some(from + c, count);
          squares += v * v;
        });
        const A inverse = A(1) / A(__builtin_sqrt(sum<A>(squares) / A(a.width) + A(a.eps)));
        static_cast<A*>(a.inverse)[r * a.x.heads + m] = inverse;
        T* to = static_cast<T*>(a.out) + (r * a.x.heads + m) * a.width;
        by_vector<T>(a.width, [&](int64_t c, int count) {
          store_some(to + c, rounded<T>(load_some(from + c, count) * inverse) * load_some(scale + c, count), count);
        });
      }
  });
}

// With n = x * inverse and g = grad * weight: grad_x = (g - n * mean(g n)) * inverse, grad_weight = sum of grad * n.
template <class T>
void rms_norm_backward(const RMSNormBackward& b) {
  using A = Accumulator<T>;
  using V = typename Lanes<A>::Vector;
  const RMSNorm& a = b.forward;
  const Tasks blocks(a.groups, 1, 1);
  Scratch held(blocks.count() * a.width * sizeof(A));
  A* parts = held.take<A>(blocks.count() * a.width);  // what each block adds to the gradient of its group's scale
  by_block(a.threads, blocks, [&](int64_t i, const Task& block) {
    const A* scale = static_cast<const A*>(a.weight) + block.group * a.width;
    A* part = parts + i * a.width;
    std::memset(part, 0, a.width * sizeof(A));
    for (int64_t r = block.row; r < block.row_end; ++r)
      for (int64_t m = 0; m < a.x.heads; ++m) {
        const int64_t at = r * a.x.heads + m;
        const T *from = head_of<T>(a.x, r, m), *grad = static_cast<const T*>(b.grad) + at * a.width;
        const A inverse = static_cast<const A*>(a.inverse)[at];
        V along = {};
        by_vector<T>(a.width, [&](int64_t c, int count) {
          const V normal = load_some(from + c, count) * inverse, given = load_some(grad + c, count) * normal;
          along += given * load_some(scale + c, count);
          store_some(part + c, load_some(part + c, count) + given, count);
        });
        const A mean = sum<A>(along) / A(a.width);
        T* to = static_cast<T*>(b.grad_x) + at * a.width;
        by_vector<T>(a.width, [&](int64_t c, int count) {
          const V normal = load_some(from + c, count) * inverse;
          const V given = load_some(grad + c, count) * load_some(scale + c, count);
          store_some(to + c, (given - normal * mean) * inverse, count);
        });
      }
  });
  A* to = static_cast<A*>(b.grad_weight);
  std::memset(to, 0, a.groups.count * a.width * sizeof(A));
  for (int64_t i = 0; i < blocks.count(); ++i)
    for (int64_t c = 0; c < a.width; ++c) to[blocks[i].group * a.width + c] += parts[i * a.width + c];
}

constexpr int64_t kRowsTurned = 64;  // rows that a task turns

// Turns each pair (i, i + half) of a head by the angle of its row.
template <class T>
void rope(const Rope& a) {
  using A = Accumulator<T>;
  using V = typename Lanes<A>::Vector;
  for_each_task(a.threads, ceil_div(a.rows, kRowsTurned), 64, [&](int64_t task, Scratch&) {
    const int64_t last = least((task + 1) * kRowsTurned, a.rows);
    for (int64_t r = task * kRowsTurned; r < last; ++r)
      for (int64_t m = 0; m < a.x.heads; ++m) {
        const T* from = head_of<T>(a.x, r, m);
        T* to = static_cast<T*>(a.out) + (r * a.x.heads + m) * 2 * a.half;
        by_vector<T>(a.half, [&](int64_t c, int count) {
          const V cos = rounded<T>(load_some(static_cast<const A*>(a.cos) + r * a.half + c, count));
          const V sin = rounded<T>(load_some(static_cast<const A*>(a.sin) + r * a.half + c, count));
          const V first = load_some(from + c, count), second = load_some(from + a.half + c, count);
          store_some(to + c, first * cos - second * sin, count);
          store_some(to + a.half + c, second * cos + first * sin, count);
        });
      }
  });
}

}  // namespace
}  // namespace omnimoe::cpu::OMNIMOE_ISA
