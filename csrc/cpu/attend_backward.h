// Gradients of attention: shares are made again from the logarithms of their sums, a block of rows and keys at a time.
//
// A task has all queries and keys of one key head, so no two tasks add to one place, and every sum is taken in one order.
// Products are of the accumulator's type: what is read once is widened once.
#pragma once

#include "attend.h"

namespace omnimoe::cpu::OMNIMOE_ISA {
namespace {

constexpr int64_t kBackwardRows = 192;  // rows whose shares are kept at once, whole blocks of them
constexpr int64_t kBackwardKeys = 128;  // keys of them, whole panels

// Rows of a head as the accumulator's type, multiplied, `stride` apart.
template <class T>
void widen(const T* from, int64_t depth, Accumulator<T> factor, Accumulator<T>* to) {
  for (int64_t c = 0; c < depth; c += kLanes<T>) {
    const int held = int(least(kLanes<T>, depth - c));
    store_some(to + c, load_some(from + c, held) * factor, held);
  }
}

// Panels whose lanes are rows, for products along the depth.
template <class A>
void panels_of_rows(const A* from, int64_t stride, int64_t rows, int64_t depth, A* to) {
  for (int64_t r = 0; r < ceil_div(rows, kPanel<A>) * kPanel<A>; r += kLanes<A>) {
    const int64_t held = r < rows ? least(kLanes<A>, rows - r) : 0;
    pack_along<A>(from + (held ? r * stride : 0), stride, int(held), depth,
                  to + r / kPanel<A> * depth * kPanel<A> + r % kPanel<A>);
  }
}

// Panels whose lanes are numbers of a row, for products along the rows.
template <class A>
void panels_of_numbers(const A* from, int64_t stride, int64_t rows, int64_t depth, A* to) {
  for (int64_t c = 0; c < ceil_div(depth, kPanel<A>) * kPanel<A>; c += kLanes<A>)
    pack_across<A>([&](int64_t r) { return from + r * stride + c; }, int(c < depth ? least(kLanes<A>, depth - c) : 0),
                   rows, to + c / kPanel<A> * rows * kPanel<A> + c % kPanel<A>, kPanel<A>);
}

// Shares of a block of rows and their gradients, from tiles of scores and of what shares are worth.
template <class A>
struct Slopes {
  const A *scores, *worth;  // (rows, kPanel)
  A *shares, *slopes;       // rows `stride` apart
  int64_t stride;
};

template <class A>
void slope_row(const Slopes<A>& s, int64_t row, int64_t held, const bool* seen, A log_sum, A delta) {
  using V = typename Lanes<A>::Vector;
  using F = Flags<A>;
  constexpr int lanes = Lanes<A>::count;
  for (int64_t key = 0; key < kPanel<A>; key += lanes) {
    V share = {};
    const int valid = int(held < key ? 0 : least(lanes, held - key));
    if (valid) share = exponential(load(s.scores + row * kPanel<A> + key) - log_sum);
    if (valid && seen) {
      typename F::Bytes bytes{};
      std::memcpy(&bytes, seen + key, valid);
      share = __builtin_convertvector(bytes, typename F::Lanes) != 0 ? share : V{};
    } else if (valid < lanes) {
      for (int i = valid; i < lanes; ++i) share[i] = 0;
    }
    const V worth = load(s.worth + row * kPanel<A> + key);
    store(s.shares + row * s.stride + key, share);
    store(s.slopes + row * s.stride + key, valid ? share * (worth - delta) : V{});
  }
}

template <class T>
void attend_backward(const AttendBackward& given) {
  using A = Accumulator<T>;
  using V = typename Lanes<A>::Vector;
  constexpr int64_t lanes = kLanes<A>, panel = kPanel<A>;
  const Attend& a = given.forward;
  const int64_t group = a.heads / a.kv_heads, rows = a.queries * group, at_once = least(kBackwardRows, rows);
  const int64_t keys_at_once = least(kBackwardKeys, ceil_div(a.keys, panel) * panel);
  const int64_t wide = ceil_div(a.width, panel) * panel, value_wide = ceil_div(a.value_width, panel) * panel;
  const int64_t stride = stage_stride<A>(a.width), value_stride = stage_stride<A>(a.value_width);
  const int64_t share_stride = keys_at_once + 16, key_blocks = ceil_div(a.keys, keys_at_once);
  const int64_t numbers = at_once * (stride + value_stride + 2 * wide + value_wide + 2 * share_stride + 2) +
                          keys_at_once * (stride + value_stride + 2 * wide + value_wide) +
                          key_blocks * keys_at_once * (wide + value_wide) + 2 * kMostRows * panel;
  const int64_t bytes = numbers * int64_t{sizeof(A)} + at_once * int64_t{sizeof(KeysOf)} + 2048;
  for_each_task(a.threads, a.batch * a.kv_heads, bytes, [&](int64_t task, Scratch& scratch) {
    const int64_t kv_head = task % a.kv_heads, b = task / a.kv_heads;
    A* queries = scratch.take<A>(at_once * stride);
    A* grads = scratch.take<A>(at_once * value_stride);
    A* query_panels = scratch.take<A>(at_once * wide);
    A* grad_panels = scratch.take<A>(at_once * value_wide);
    A* grad_queries = scratch.take<A>(at_once * wide);
    A* shares = scratch.take<A>(at_once * share_stride);
    A* slopes = scratch.take<A>(at_once * share_stride);
    A* log_sums = scratch.take<A>(at_once);
    A* deltas = scratch.take<A>(at_once);
    A* key_rows = scratch.take<A>(keys_at_once * stride);
    A* value_rows = scratch.take<A>(keys_at_once * value_stride);
    A* keys_along = scratch.take<A>(keys_at_once * a.width);
    A* values_along = scratch.take<A>(keys_at_once * a.value_width);
    A* keys_across = scratch.take<A>(keys_at_once * wide);
    A* grad_keys = scratch.take<A>(key_blocks * keys_at_once * wide);
    A* grad_values = scratch.take<A>(key_blocks * keys_at_once * value_wide);
    A* scores = scratch.take<A>(kMostRows * panel);
    A* worth = scratch.take<A>(kMostRows * panel);
    KeysOf* own_keys = scratch.take<KeysOf>(at_once);
    std::memset(grad_keys, 0, key_blocks * keys_at_once * wide * sizeof(A));
    std::memset(grad_values, 0, key_blocks * keys_at_once * value_wide * sizeof(A));
    const T* query = static_cast<const T*>(a.query.data) + b * a.query.batch_stride;
    const T* key = static_cast<const T*>(a.key.data) + b * a.key.batch_stride + kv_head * a.key.head_stride;
    const T* value = static_cast<const T*>(a.value.data) + b * a.value.batch_stride + kv_head * a.value.head_stride;

    for (int64_t first = 0; first < rows; first += at_once) {
      const int64_t count = least(at_once, rows - first);
      const auto query_of = [&](int64_t r) { return (first + r) / group; };
      const auto head_of = [&](int64_t r) { return kv_head * group + (first + r) % group; };
      for (int64_t r = 0; r < count; ++r) {
        const int64_t q = query_of(r), h = head_of(r), place = ((b * a.queries + q) * a.heads + h) * a.value_width;
        widen(query + h * a.query.head_stride + q * a.query.row_stride, a.width, A(a.scale), queries + r * stride);
        widen(static_cast<const T*>(given.grad) + place, a.value_width, A(1), grads + r * value_stride);
        const T* out = static_cast<const T*>(a.out) + place;
        V delta = {};
        for (int64_t c = 0; c < a.value_width; c += lanes) {
          const int held = int(least(lanes, a.value_width - c));
          delta += load_some(out + c, held) * load_some(grads + r * value_stride + c, held);
        }
        deltas[r] = sum<A>(delta);
        log_sums[r] = static_cast<const A*>(a.log_sums)[(b * a.heads + h) * a.queries + q];
        if (r && q == query_of(r - 1)) {
          own_keys[r] = own_keys[r - 1];
        } else {
          const int64_t end = end_of_keys(a, b, q);
          own_keys[r] = {start_of_keys(a, b, q, end), end};
        }
      }
      panels_of_numbers(queries, stride, count, a.width, query_panels);
      panels_of_numbers(grads, value_stride, count, a.value_width, grad_panels);
      std::memset(grad_queries, 0, count * wide * sizeof(A));
      const KeysOf all = keys_of(own_keys, 0, count);
      for (int64_t block = all.start / keys_at_once * keys_at_once; block < all.end; block += keys_at_once) {
        const int64_t held = least(keys_at_once, a.keys - block);
        for (int64_t k = 0; k < held; ++k) {
          widen(key + (block + k) * a.key.row_stride, a.width, A(1), key_rows + k * stride);
          widen(value + (block + k) * a.value.row_stride, a.value_width, A(1), value_rows + k * value_stride);
        }
        panels_of_rows(key_rows, stride, held, a.width, keys_along);
        panels_of_rows(value_rows, value_stride, held, a.value_width, values_along);
        panels_of_numbers(key_rows, stride, held, a.width, keys_across);
        KeysOf touched{keys_at_once, 0};
        in_blocks(count, kMostRows, [&](int64_t start, int64_t size) {
          const KeysOf seen = keys_of(own_keys, start, size);
          const int64_t last = least(held, seen.end - block), from = seen.start > block ? seen.start - block : 0;
          const int64_t low = from / panel * panel, high = last > low ? ceil_div(last, panel) * panel : low;
          A* const both[] = {shares, slopes};
          for (A* part : both)
            for (int64_t i = start; i < start + size; ++i) {
              A* to = part + i * share_stride;
              std::memset(to, 0, least(low, share_stride) * sizeof(A));
              if (high < share_stride) std::memset(to + high, 0, (share_stride - high) * sizeof(A));
            }
          if (high == low) return;
          touched = {least(touched.start, low), touched.end > high ? touched.end : high};
          for (int64_t k = low; k < high; k += panel) {
            panel_tile<A>(size, queries + start * stride, stride, 1, keys_along + k * a.width, a.width, scores);
            panel_tile<A>(size, grads + start * value_stride, value_stride, 1, values_along + k * a.value_width,
                          a.value_width, worth);
            const Slopes<A> found{scores, worth, shares + start * share_stride + k, slopes + start * share_stride + k,
                                  share_stride};
            for (int64_t i = 0; i < size; ++i) {
              const int64_t r = start + i;
              const bool* mask =
                  a.mask ? a.mask + b * a.mask_batch_stride + query_of(r) * a.mask_row_stride + block + k : nullptr;
              slope_row<A>(found, i, least(held, own_keys[r].end - block) - k, mask, log_sums[r], deltas[r]);
            }
          }
          for (int64_t c = 0; c < wide; c += panel)
            panel_tile<A>(size, slopes + start * share_stride + low, share_stride, 1,
                          keys_across + c * held + low * panel, least(high, held) - low,
                          grad_queries + start * wide + c * size, {}, true);
        });
        in_blocks(held, kMostRows, [&](int64_t start, int64_t size) {
          if (start + size <= touched.start || start >= touched.end) return;
          for (int64_t c = 0; c < value_wide; c += panel)
            panel_tile<A>(size, shares + start, 1, share_stride, grad_panels + c * count, count,
                          grad_values + (block + start) * value_wide + c * size, {}, true);
          for (int64_t c = 0; c < wide; c += panel)
            panel_tile<A>(size, slopes + start, 1, share_stride, query_panels + c * count, count,
                          grad_keys + (block + start) * wide + c * size, {}, true);
        });
      }
      in_blocks(count, kMostRows, [&](int64_t start, int64_t size) {
        for (int64_t i = 0; i < size; ++i) {
          T* to = static_cast<T*>(given.grad_query) +
                  ((b * a.queries + query_of(start + i)) * a.heads + head_of(start + i)) * a.width;
          for (int64_t c = 0; c < a.width; c += lanes)
            store_some(to + c, load(grad_queries + start * wide + c / panel * panel * size + i * panel + c % panel) *
                                   A(a.scale), int(least(lanes, a.width - c)));
        }
      });
    }
    for (int64_t block = 0; block < a.keys; block += keys_at_once)
      in_blocks(least(keys_at_once, a.keys - block), kMostRows, [&](int64_t start, int64_t size) {
        const auto put = [&](const A* sums, int64_t width, int64_t padded, void* out) {
          for (int64_t i = 0; i < size; ++i) {
            T* to = static_cast<T*>(out) + ((b * a.keys + block + start + i) * a.kv_heads + kv_head) * width;
            for (int64_t c = 0; c < width; c += lanes)
              store_some(to + c, load(sums + (block + start) * padded + c / panel * panel * size + i * panel + c % panel),
                         int(least(lanes, width - c)));
          }
        };
        put(grad_keys, a.width, wide, given.grad_key);
        put(grad_values, a.value_width, value_wide, given.grad_value);
      });
  });
}

}  // namespace
}  // namespace omnimoe::cpu::OMNIMOE_ISA
