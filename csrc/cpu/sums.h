// Sums over the rows of a group.
#pragma once

#include "banks.h"

namespace omnimoe::cpu::OMNIMOE_ISA {
namespace {

constexpr int kSumsAtOnce = 8;         // vectors of columns that one pass over the rows adds up
constexpr int64_t kGroupsAtOnce = 64;  // groups that a task sums up, where there are many

// out[g] = sum over the rows of g of weights[row] * x[row], row being index[r] where there is an index; zero where a
// group is empty. Sums are taken in the accumulator's type, in the order of the rows, and rounded once.
template <class T>
void sum_groups(const Threads& threads, const Groups& groups, int64_t columns, const Rows& x,
                const Accumulator<T>* weights, bool weights_by_index, void* out) {
  using V = typename Lanes<Accumulator<T>>::Vector;
  constexpr int64_t lanes = kLanes<T>, at_once = kSumsAtOnce * lanes;
  const int64_t chunks = ceil_div(columns, at_once);
  const int64_t held = groups.count < threads.count * kGroupsAtOnce ? 1 : kGroupsAtOnce;
  for_each_task(threads, ceil_div(groups.count, held) * chunks, 64, [&](int64_t task, Scratch&) {
    const int64_t first = task % chunks * at_once, width = least(at_once, columns - first);
    const int64_t start = task / chunks * held, end = least(start + held, groups.count);
    for (int64_t g = start; g < end; ++g) {
      const Span rows = span_of(groups, g);
      V sums[kSumsAtOnce] = {};
      for (int64_t r = rows.start; r < rows.end; ++r) {
        const T* from = row_of<T>(x, r) + first;
        const Accumulator<T> weight = weights ? weights[weights_by_index ? x.index[r] : r] : 1;
        int64_t c = 0, i = 0;
        for (; c + lanes <= width; c += lanes, ++i) sums[i] += weight * load(from + c);
        if (c < width) sums[i] += weight * load_some(from + c, int(width - c));
      }
      T* to = static_cast<T*>(out) + g * columns + first;
      for (int64_t c = 0; c < width; c += lanes) store_some(to + c, sums[c / lanes], int(least(lanes, width - c)));
    }
  });
}

template <class T>
void sum_rows(const SumRows& a) {
  sum_groups<T>(a.threads, a.groups, a.columns, a.y, static_cast<const Accumulator<T>*>(a.weights), true, a.out);
}

}  // namespace
}  // namespace omnimoe::cpu::OMNIMOE_ISA
