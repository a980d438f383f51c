// The experts' network, forward and backward: gather, activation, biases and weighted sum are parts of two products.
#pragma once

#include "activation.h"
#include "products.h"
#include "sums.h"

namespace omnimoe::cpu::OMNIMOE_ISA {
namespace {

constexpr int64_t kSumsBytes = 4 << 20;  // sums that a task keeps beside its results

// out[token of r] += weights[r] * (x[r] W + bias) for all rows, in order. A task owns columns, so no two write to one
// place.
template <class T>
void scatter_product(const ExpertsMLP& a, const Rows& x, int64_t depth, const Bank& bank, bool is_transposed,
                     const T* bias, const Accumulator<T>* weights, void* out) {
  is_transposed = is_transposed != bank.is_transposed;
  using A = Accumulator<T>;
  using V = typename Lanes<A>::Vector;
  using Unit = typename Scheme<T>::Unit;
  constexpr bool is_wide = sizeof(T) == sizeof(A);
  const int64_t panels = ceil_div(a.hidden, kPanel<T>);
  // As many panels at once as leave no thread waiting for more than a tenth of the time. All of a thread's own are
  // best, since then it reads a matrix to its end and goes on with the next; sums beside `out` should stay small.
  const int64_t kept = kSumsBytes / (a.tokens * kPanel<T> * int64_t{sizeof(A)} + 1);
  const int64_t share = ceil_div(panels, a.threads.count);
  int64_t at_once = is_wide || kept >= share ? share : kept > kPanelsAtOnce ? kept : least(panels, kPanelsAtOnce);
  const auto slowest = [&] { return ceil_div(ceil_div(panels, at_once), a.threads.count) * at_once; };
  while (at_once > 1 && 10 * slowest() * a.threads.count > 11 * panels) at_once /= 2;
  const int64_t own = at_once * kPanel<T>;
  const int64_t bytes = scratch_bytes<T>(depth, is_transposed) + (is_wide ? 0 : a.tokens * own * sizeof(A)) + 256;
  for_each_task(a.threads, ceil_div(panels, at_once), bytes, [&](int64_t task, Scratch& scratch) {
    Unit* copy = scratch.take<Unit>(most_rows<T>(depth) * stage_stride<T>(depth));
    Unit* packed = scratch.take<Unit>(panels_packed<T>(depth, is_transposed) * units<T>(depth) * kPanel<T>);
    const int64_t first = task * at_once, last = least(first + at_once, panels);
    // Sums are kept in the accumulator's type and rounded once.
    A* sums = static_cast<A*>(out) + first * kPanel<T>;
    int64_t stride = a.hidden;
    if constexpr (!is_wide) {
      sums = scratch.take<A>(a.tokens * own);
      stride = own;
      std::memset(sums, 0, a.tokens * own * sizeof(A));
    }
    for (int64_t g = 0; g < a.groups.count; ++g) {
      const Span rows = span_of(a.groups, g);
      const int64_t chunk = chunk_of(rows.end - rows.start, most_rows<T>(depth));
      for (int64_t row = rows.start; row < rows.end; row += chunk) {
        const int64_t size = least(chunk, rows.end - row);
        rows_by_panels<T>(
            stage<T>(x, row, size, depth, copy), size, depth, copy_of<T>(bank, g, is_transposed), first, last,
            [&](int64_t p) { return plain_columns<T>(p, a.hidden); }, packed,
            [&](int64_t start, int64_t count, const A* tile, int64_t p, const Columns& columns) {
              V shift[2] = {};
              if (bias) {
                shift[0] = load_some(bias + g * a.hidden + columns.low, columns.low_count);
                shift[1] = load_some(bias + g * a.hidden + columns.high, columns.high_count);
              }
              for (int64_t i = 0; i < count; ++i) {
                const int64_t r = row + start + i;
                const A weight = weights ? weights[r] : A(1);
                A* to = sums + (a.x.index ? a.x.index[r] : r) * stride + (p - first) * kPanel<T>;
                const A* from = tile + i * kPanel<T>;
                const auto add = [&](int64_t at, int held, V shift) {
                  const V more = weight * (load(from + at) + shift);
                  if (held == kLanes<T>)
                    store(to + at, load(to + at) + more);
                  else
                    for (int c = 0; c < held; ++c) to[at + c] += more[c];
                };
                add(0, columns.low_count, shift[0]);
                add(kLanes<T>, columns.high_count, shift[1]);
              }
            });
      }
    }
    if constexpr (!is_wide)
      for (int64_t t = 0; t < a.tokens; ++t)
        for (int64_t c = 0; c < own && first * kPanel<T> + c < a.hidden; c += kLanes<T>) {
          const int64_t column = first * kPanel<T> + c;
          store_some(static_cast<T*>(out) + t * a.hidden + column, load(sums + t * own + c),
                     int(least(kLanes<T>, a.hidden - column)));
        }
  });
}

// Distance of rows that are written here and read by stage() in place.
template <class T>
int64_t own_stride(int64_t width) {
  return stage_stride<T>(width) * Scheme<T>::kPerUnit;
}

template <class A>
struct Pair {
  typename Lanes<A>::Vector gate, up;
};

// Gate and up of a panel's columns; past them zeros. Where they take turns, they lie side by side.
template <class T>
inline __attribute__((always_inline)) Pair<Accumulator<T>> load_pair(
    const T* row, const Columns& at, bool is_interleaved) {
  constexpr int lanes = kLanes<T>;
  if (!is_interleaved) return {load_some(row + at.low, at.low_count), load_some(row + at.high, at.high_count)};
  T gate[lanes] = {}, up[lanes] = {};
  for (int i = 0; i < at.low_count; ++i) {
    gate[i] = row[at.low + 2 * i];
    up[i] = row[at.high + 2 * i];
  }
  return {load(gate), load(up)};
}

template <class T>
inline __attribute__((always_inline)) void store_pair(
    T* row, const Columns& at, bool is_interleaved, const Pair<Accumulator<T>>& pair) {
  if (!is_interleaved) {
    store_some(row + at.low, pair.gate, at.low_count);
    store_some(row + at.high, pair.up, at.high_count);
    return;
  }
  T gate[kLanes<T>], up[kLanes<T>];
  store(gate, pair.gate);
  store(up, pair.up);
  for (int i = 0; i < at.low_count; ++i) {
    row[at.low + 2 * i] = gate[i];
    row[at.high + 2 * i] = up[i];
  }
}

template <class T>
void experts_mlp(const ExpertsMLP& a) {
  using A = Accumulator<T>;
  using V = typename Lanes<A>::Vector;
  const int64_t rows = total_rows(a.groups), stride = own_stride<T>(a.width), F = a.width;
  Scratch held(rows * stride * sizeof(T));
  T* h = held.take<T>(rows * stride);
  T* z = static_cast<T*>(a.z);
  const T* bias = static_cast<const T*>(a.b_in);
  if (a.is_gated) {
    rows_by_banks<T>(
        a.threads, a.groups, a.x, a.hidden, a.w_in, false, ceil_div(F, kLanes<T>),
        [&](int64_t p) { return paired_columns<T>(p, F, a.is_interleaved); },
        [&](int64_t row, int64_t count, const A* tile, int64_t p, const Columns& columns, int64_t group) {
          Pair<A> shift{};
          if (bias) shift = load_pair<T>(bias + group * 2 * F, columns, a.is_interleaved);
          for (int64_t i = 0; i < count; ++i) {
            const A* sums = tile + i * kPanel<T>;
            const Pair<A> pre{load(sums) + shift.gate, load(sums + kLanes<T>) + shift.up};
            if (z) store_pair<T>(z + (row + i) * 2 * F, columns, a.is_interleaved, pre);
            store_some(h + (row + i) * stride + p * kLanes<T>, gated<A>(a.activation, pre.gate, pre.up),
                       columns.low_count);
          }
        });
  } else {
    rows_by_banks<T>(
        a.threads, a.groups, a.x, a.hidden, a.w_in, false, ceil_div(F, kPanel<T>),
        [&](int64_t p) { return plain_columns<T>(p, F); },
        [&](int64_t row, int64_t count, const A* tile, int64_t, const Columns& columns, int64_t group) {
          const auto half = [&](int64_t column, int held, const A* from) {
            if (!held) return;
            V shift = {};
            if (bias) shift = load_some(bias + group * F + column, held);
            for (int64_t i = 0; i < count; ++i) {
              const V pre = load(from + i * kPanel<T>) + shift;
              if (z) store_some(z + (row + i) * F + column, pre, held);
              store_some(h + (row + i) * stride + column, activate<A>(a.activation, pre).value, held);
            }
          };
          half(columns.low, columns.low_count, tile);
          half(columns.high, columns.high_count, tile + kLanes<T>);
        });
  }
  scatter_product<T>(a, {h, stride, nullptr}, F, a.w_out, false, static_cast<const T*>(a.b_out),
                     static_cast<const A*>(a.weights), a.out);
}

// The gradient of a row's weight is its result times the gradient of its token; `shares` are the parts of it, a panel
// each, that the hidden numbers make.
template <class T>
void weight_gradients(const ExpertsMLP& a, const Rows& grad, const Accumulator<T>* shares, int64_t panels,
                      Accumulator<T>* to) {
  using A = Accumulator<T>;
  using V = typename Lanes<A>::Vector;
  for (int64_t g = 0; g < a.groups.count; ++g) {
    const Span rows = span_of(a.groups, g);
    const T* bias = a.b_out ? static_cast<const T*>(a.b_out) + g * a.hidden : nullptr;
    for (int64_t r = rows.start; r < rows.end; ++r) {
      A total = 0;
      for (int64_t p = 0; p < panels; ++p) total += shares[r * panels + p];
      V share = {};
      for (int64_t c = 0; bias && c < a.hidden; c += kLanes<T>) {
        const int held = int(least(kLanes<T>, a.hidden - c));
        share += load_some(row_of<T>(grad, r) + c, held) * load_some(bias + c, held);
      }
      to[r] = total + sum<A>(share);
    }
  }
}

template <class T>
void experts_mlp_backward(const ExpertsMLPBackward& b) {
  using A = Accumulator<T>;
  using V = typename Lanes<A>::Vector;
  const ExpertsMLP& a = b.forward;
  const int64_t rows = total_rows(a.groups), F = a.width, wide = a.is_gated ? 2 * F : F;
  const int64_t panels = ceil_div(F, kPanel<T>), hidden_stride = own_stride<T>(F), z_stride = own_stride<T>(wide);
  Scratch held((rows * (hidden_stride + z_stride)) * sizeof(T) + rows * panels * sizeof(A) + 256);
  T* weighted = held.take<T>(rows * hidden_stride);  // weight times activation(gate) * up
  T* grad_z = held.take<T>(rows * z_stride);
  A* shares = held.take<A>(rows * panels);  // what each panel adds to the gradient of a weight
  const T* z = static_cast<const T*>(a.z);
  const A* weights = static_cast<const A*>(a.weights);
  const Rows grad{b.grad, a.hidden, a.x.index};
  rows_by_banks<T>(
      a.threads, a.groups, grad, a.hidden, a.w_out, true, panels, [&](int64_t p) { return plain_columns<T>(p, F); },
      [&](int64_t row, int64_t count, const A* tile, int64_t panel, const Columns& columns, int64_t) {
        for (int64_t i = 0; i < count; ++i) {
          const int64_t r = row + i;
          const A weight = weights ? weights[r] : A(1);
          V share = {};
          const auto half = [&](int64_t column, int valid, const A* from) {
            if (!valid) return;
            const V grad_hidden = load(from);
            V value;
            if (a.is_gated) {
              const Columns both = paired_columns<T>(column / kLanes<T>, F, a.is_interleaved);
              const Pair<A> pre = load_pair<T>(z + r * wide, both, a.is_interleaved);
              const GatedSlopes<A> slopes = gated_slopes<A>(a.activation, pre.gate, pre.up);
              value = slopes.value;
              store_pair<T>(grad_z + r * z_stride, both, a.is_interleaved,
                            {weight * grad_hidden * slopes.gate, weight * grad_hidden * slopes.up});
            } else {
              const Activated<A> activated = activate<A>(a.activation, load_some(z + r * wide + column, valid));
              value = activated.value;
              store_some(grad_z + r * z_stride + column, weight * grad_hidden * activated.slope, valid);
            }
            store_some(weighted + r * hidden_stride + column, weight * value, valid);
            share += grad_hidden * value;  // lanes that are not there are zero in grad_hidden
          };
          half(columns.low, columns.low_count, tile + i * kPanel<T>);
          half(columns.high, columns.high_count, tile + i * kPanel<T> + kLanes<T>);
          shares[r * panels + panel] = sum<A>(share);
        }
      });
  if (b.grad_weights) weight_gradients<T>(a, grad, shares, panels, static_cast<A*>(b.grad_weights));
  if (b.grad_w_out)
    grouped_wgrad<T>({a.type, a.threads, a.groups, F, a.hidden, grad, {weighted, hidden_stride, nullptr}, b.grad_w_out});
  const Rows grad_rows{grad_z, z_stride, nullptr};
  if (b.grad_w_in) grouped_wgrad<T>({a.type, a.threads, a.groups, a.hidden, wide, grad_rows, a.x, b.grad_w_in});
  if (b.grad_b_in) sum_groups<T>(a.threads, a.groups, wide, grad_rows, nullptr, false, b.grad_b_in);
  if (b.grad_b_out) sum_groups<T>(a.threads, a.groups, a.hidden, grad, weights, false, b.grad_b_out);
  Bank whole = a.w_in;
  whole.step = 1;  // grad_z lies as the rows of w_in do
  if (b.grad_x) scatter_product<T>(a, grad_rows, wide, whole, true, nullptr, nullptr, b.grad_x);
}

}  // namespace
}  // namespace omnimoe::cpu::OMNIMOE_ISA
