// The grouped product and the gradient of a bank.
#pragma once

#include "banks.h"

namespace omnimoe::cpu::OMNIMOE_ISA {
namespace {

// ---- grouped_mm -----------------------------------------------------------------------------------------------------

template <class T>
void grouped_mm(const GroupedMM& a) {
  T* out = static_cast<T*>(a.out);
  const T* bias = static_cast<const T*>(a.bias);
  rows_by_banks<T>(
      a.threads, a.groups, a.x, a.depth, a.weight, a.is_transposed, ceil_div(a.columns, kPanel<T>),
      [&](int64_t p) { return plain_columns<T>(p, a.columns); },
      [&](int64_t row, int64_t count, const Accumulator<T>* tile, int64_t, const Columns& columns, int64_t group) {
        const auto put = [&](int64_t column, int held, const Accumulator<T>* from) {
          if (!held) return;
          typename Lanes<Accumulator<T>>::Vector shift = {};
          if (bias) shift = load_some(bias + group * a.columns + column, held);
          for (int64_t i = 0; i < count; ++i)
            store_some(out + (row + i) * a.columns + column, load(from + i * kPanel<T>) + shift, held);
        };
        put(columns.low, columns.low_count, tile);
        put(columns.high, columns.high_count, tile + kLanes<T>);
      });
}

// ---- grouped_wgrad --------------------------------------------------------------------------------------------------

constexpr int64_t kLeft = 48;   // columns of dy that are packed at once: whole blocks of rows, whole vectors
constexpr int64_t kDeep = 512;  // units along the rows that are packed at once, whole runs of sums

// A task keeps some panels of x packed and goes through its columns of dy. A group of many rows is taken in stretches,
// so that what is packed stays in the second cache; the sums lie in memory between them.
template <class T>
void grouped_wgrad(const GroupedWgrad& a) {
  using S = Scheme<T>;
  using Unit = typename S::Unit;
  static_assert(kDeep % kRunOfSums == 0);
  constexpr int64_t kTile = kLeft * kPanel<T>;
  T* out = static_cast<T*>(a.out);
  int64_t most = 1;
  for (int64_t g = 0; g < a.groups.count; ++g) {
    const Span rows = span_of(a.groups, g);
    if (units<T>(rows.end - rows.start) > most) most = units<T>(rows.end - rows.start);
  }
  const int64_t stretch = least(most, kDeep);
  const int64_t panels = ceil_div(a.depth, kPanel<T>), lefts = ceil_div(a.columns, kLeft);
  int64_t at_once = (512 << 10) / (stretch * kPanel<T> * int64_t{sizeof(Unit)});
  at_once = least(panels, at_once < 1 ? 1 : at_once);
  int64_t lefts_at_once = lefts;
  const auto tasks_of = [&] { return a.groups.count * ceil_div(panels, at_once) * ceil_div(lefts, lefts_at_once); };
  while (tasks_of() < 4 * a.threads.count && lefts_at_once > 1) lefts_at_once = ceil_div(lefts_at_once, 2);
  const int64_t panel_chunks = ceil_div(panels, at_once), left_chunks = ceil_div(lefts, lefts_at_once);
  const int64_t tiles = most > stretch ? lefts_at_once * at_once : 1;
  const int64_t bytes = stretch * (at_once * kPanel<T> + kLeft) * int64_t{sizeof(Unit)} +
                        tiles * kTile * int64_t{sizeof(Accumulator<T>)} + 256;
  for_each_task(a.threads, tasks_of(), bytes, [&](int64_t task, Scratch& scratch) {
    const int64_t group = task / (panel_chunks * left_chunks), rest = task % (panel_chunks * left_chunks);
    const int64_t panel = rest / left_chunks * at_once, panel_end = least(panel + at_once, panels);
    const int64_t left_start = rest % left_chunks * lefts_at_once;
    const int64_t left_end = least(left_start + lefts_at_once, lefts);
    const Span rows = span_of(a.groups, group);
    Unit* packed = scratch.take<Unit>(stretch * at_once * kPanel<T>);
    Unit* left = scratch.take<Unit>(stretch * kLeft);
    Accumulator<T>* sums = scratch.take<Accumulator<T>>(tiles * kTile);
    const bool is_kept = units<T>(rows.end - rows.start) > stretch;
    for (int64_t row = rows.start; row == rows.start || row < rows.end; row += stretch * S::kPerUnit) {
      const int64_t count = least(stretch * S::kPerUnit, rows.end - row), depth = units<T>(count);
      const bool is_last = row + count == rows.end;
      for (int64_t p = panel; p < panel_end; ++p) {
        const Columns columns = plain_columns<T>(p, a.depth);
        Unit* to = packed + (p - panel) * depth * kPanel<T>;
        const auto row_at = [&](int64_t column) {
          return [&, column](int64_t r) { return row_of<T>(a.x, row + r) + column; };
        };
        pack_across<T>(row_at(columns.low), columns.low_count, count, to, kPanel<T>);
        pack_across<T>(row_at(columns.high), columns.high_count, count, to + kLanes<T>, kPanel<T>);
      }
      for (int64_t l = left_start; l < left_end; ++l) {
        const int64_t first = l * kLeft, held = least(kLeft, a.columns - first);
        for (int64_t lane = 0; lane < held; lane += kLanes<T>)
          pack_across<T>([&](int64_t r) { return row_of<T>(a.dy, row + r) + first + lane; },
                         int(least(kLanes<T>, held - lane)), count, left + lane, kLeft);
        for (int64_t p = panel; p < panel_end; ++p) {
          const Columns columns = plain_columns<T>(p, a.depth);
          in_blocks(held, kMostRows, [&](int64_t start, int64_t size) {
            const int64_t place = is_kept ? (l - left_start) * at_once + p - panel : 0;
            Accumulator<T>* tile = sums + place * kTile + start * kPanel<T>;
            panel_tile<T>(size, left + start, 1, kLeft, packed + (p - panel) * depth * kPanel<T>, depth, tile, {},
                          row > rows.start);
            for (int64_t i = 0; is_last && i < size; ++i) {
              T* to = out + (group * a.columns + first + start + i) * a.depth;
              const auto put = [&](int64_t column, int valid, const Accumulator<T>* from) {
                if (valid == kLanes<T>) return stream(to + column, load(from));
                if (valid) store_some(to + column, load(from), valid);
              };
              put(columns.low, columns.low_count, tile + i * kPanel<T>);
              put(columns.high, columns.high_count, tile + i * kPanel<T> + kLanes<T>);
            }
          });
        }
      }
    }
    finish_stream();
  });
}

}  // namespace
}  // namespace omnimoe::cpu::OMNIMOE_ISA
