// Rows by the matrices of their groups: the cut into tasks, and one block of rows times one panel of columns.
//
// Work is cut into tasks that write to places of their own, and every sum is taken in one order, so a result does not
// depend on the number of threads nor on which thread took which task.
#pragma once

#include "gemm.h"

namespace omnimoe::cpu::OMNIMOE_ISA {
namespace {

constexpr int64_t kRowChunk = 192;            // rows that a task stages at once, or more where they are short
constexpr int64_t kStagedBytes = 640 << 10;   // of them, to be kept in the second cache
constexpr int64_t kPanelsAtOnce = 8;          // panels that are packed at once
constexpr int64_t kPanelsOfTask = 32;         // panels that a task of several threads goes through at most

// ---- tasks --------------------------------------------------------------------------------------------------------

// Calls f(task, scratch) for every task, each thread taking the next one.
template <class F>
void for_each_task(const Threads& threads, int64_t tasks, int64_t scratch_bytes, const F& f) {
  struct Context {
    const F& f;
    int64_t tasks, scratch_bytes, next;
  } context{f, tasks, scratch_bytes, 0};
  const Body body = [](void* given, int64_t) {
    Context& c = *static_cast<Context*>(given);
    int64_t task = __atomic_fetch_add(&c.next, 1, __ATOMIC_RELAXED);
    if (task >= c.tasks) return;
    Scratch scratch(c.scratch_bytes);
    for (; task < c.tasks; task = __atomic_fetch_add(&c.next, 1, __ATOMIC_RELAXED)) {
      c.f(task, scratch);
      scratch.reset();
    }
  };
  threads.run(least(threads.count, tasks), body, &context);
}

struct Task {
  int64_t group, row, row_end, panel, panel_end;
};

struct Span {
  int64_t start, end;
};

inline Span span_of(const Groups& groups, int64_t group) {
  return {group ? groups.ends[group - 1] : 0, groups.ends[group]};
}

inline int64_t total_rows(const Groups& groups) { return groups.count ? groups.ends[groups.count - 1] : 0; }

// Rows that are staged at once: a panel is packed again for each such chunk, and a chunk staged again for each task.
template <class T>
int64_t most_rows(int64_t depth) {
  const int64_t fit = kStagedBytes / (stage_stride<T>(depth) * int64_t{sizeof(typename Scheme<T>::Unit)});
  return fit < kRowChunk ? kRowChunk : least(fit / kMostRows * kMostRows, 4 * kRowChunk);
}

// So many rows in chunks of nearly equal size, each of whole blocks but the last.
inline int64_t chunk_of(int64_t rows, int64_t most) {
  const int64_t chunks = ceil_div(rows, most);
  return chunks < 2 ? most : ceil_div(ceil_div(rows, chunks), kMostRows) * kMostRows;
}

// All blocks of rows and panels of every group. The cut depends on sizes and the number of threads, results do not.
class Tasks {
 public:
  Tasks(const Groups& groups, int64_t panels, int64_t threads, int64_t most = kRowChunk) {
    int64_t blocks = 0;
    for (int64_t g = 0; g < groups.count; ++g) {
      const Span rows = span_of(groups, g);
      blocks += ceil_div(rows.end - rows.start, most);
    }
    int64_t at_once = threads > 1 ? least(kPanelsOfTask, panels) : panels;
    while (threads > 1 && at_once > 1 && blocks * ceil_div(panels, at_once) < 4 * threads) at_once /= 2;
    const int64_t chunks = ceil_div(panels, at_once);
    tasks_ = static_cast<Task*>(std::malloc((blocks * chunks + 1) * sizeof(Task)));
    for (int64_t g = 0; g < groups.count; ++g) {
      const Span rows = span_of(groups, g);
      const int64_t size = most == kRowChunk ? most : chunk_of(rows.end - rows.start, most);
      for (int64_t chunk = 0; chunk < chunks; ++chunk)
        for (int64_t row = rows.start; row < rows.end; row += size)
          tasks_[count_++] = {g, row, least(row + size, rows.end), chunk * at_once,
                              least((chunk + 1) * at_once, panels)};
    }
  }
  ~Tasks() { std::free(tasks_); }
  Tasks(const Tasks&) = delete;
  int64_t count() const { return count_; }
  const Task& operator[](int64_t i) const { return tasks_[i]; }

 private:
  Task* tasks_;
  int64_t count_ = 0;
};

// ---- one block of rows times one panel ------------------------------------------------------------------------------

// The columns of a panel: two runs, each of up to one vector.
struct Columns {
  int64_t low, high;
  int low_count, high_count;
};

template <class T>
Columns plain_columns(int64_t panel, int64_t columns) {
  constexpr int lanes = kLanes<T>;
  const int64_t low = panel * kPanel<T>, high = low + lanes;
  return {low, high, int(least(lanes, columns - low)), int(high < columns ? least(lanes, columns - high) : 0)};
}

// Gate in the first half and up in the second, so that both of a number lie in one tile.
template <class T>
Columns paired_columns(int64_t panel, int64_t width, bool is_interleaved) {
  constexpr int lanes = kLanes<T>;
  const int64_t low = panel * lanes;
  const int count = int(least(lanes, width - low));
  if (is_interleaved) return {2 * low, 2 * low + 1, count, count};
  return {low, width + low, count, count};
}

template <class T>
struct PanelOf {
  const T* matrix;
  int64_t row_stride;
  int64_t step;  // from a column of the product to the next: rows, or columns where it is transposed
  bool is_transposed;
};

constexpr int64_t kRowsAhead = 16;  // rows that are fetched before they are packed

// Panels of a matrix that lies along the columns are packed together, row by row: memory likes that better.
template <class T>
void pack_panels(const PanelOf<T>& from, const Columns* columns, int64_t panels, int64_t depth,
                 typename Scheme<T>::Unit* to) {
  constexpr int per = Scheme<T>::kPerUnit;
  for (int64_t k = 0; k < depth; k += per) {
    const T* first = from.matrix + k * from.row_stride;
    const T* second = k + per <= depth ? first + (per - 1) * from.row_stride : nullptr;
    for (int64_t p = 0; p < panels; ++p) {
      typename Scheme<T>::Unit* unit = to + (p * units<T>(depth) + k / per) * kPanel<T>;
      const Columns& at = columns[p];
      for (int64_t row = 0; row < per; ++row) {
        const T* ahead = first + (kRowsAhead + row) * from.row_stride + at.low;
        __builtin_prefetch(ahead, 0, 2);
        if constexpr (kPanel<T> * sizeof(T) > 64) __builtin_prefetch(ahead + 64 / sizeof(T), 0, 2);
      }
      if (second && at.high_count == kLanes<T> && at.high == at.low + kLanes<T> && from.step == 1) {
        panel_across<T>(first + at.low, second + at.low, unit);
        continue;
      }
      const auto half = [&](int64_t column, int count) {
        if (from.step == 1) return unit_across<T>(first + column, second ? second + column : nullptr, count);
        T rows[2][kLanes<T>];
        for (int i = 0; i < count; ++i) {
          rows[0][i] = first[column + i * from.step];
          if (second) rows[1][i] = second[column + i * from.step];
        }
        return unit_across<T>(rows[0], second ? rows[1] : nullptr, count);
      };
      store_as(unit, half(at.low, at.low_count));
      store_as(unit + kLanes<T>, half(at.high, at.high_count));
    }
  }
}

// Multiplies staged rows by one panel and hands on tiles: use(first row, rows, tile).
template <class T, class Use>
void rows_by_panel(const Staged<T>& left, int64_t rows, int64_t depth, const PanelOf<T>& from, const Columns& columns,
                   const Columns& next, typename Scheme<T>::Unit* panel, const Use& use) {
  Accumulator<T> tile[kMostRows * kPanel<T>] __attribute__((aligned(64)));
  const int64_t lane_stride = from.step * from.row_stride;
  if (!from.is_transposed && is_for_dots<T>(rows, depth)) {
    in_blocks(rows, kMostDotRows, [&](int64_t first, int64_t count) {
      for (int half = 0; half < 2; ++half) {
        const T* start = from.matrix + (half ? columns.high : columns.low) * from.row_stride;
        const int held = half ? columns.high_count : columns.low_count;
        for (int j = 0; j < kLanes<T>; j += kDotColumns) {
          Accumulator<T>* to = tile + half * kLanes<T> + j;
          if (j >= held) {  // columns that are not there
            for (int64_t i = 0; i < count; ++i)
              for (int c = 0; c < kDotColumns; ++c) to[i * kPanel<T> + c] = 0;
            continue;
          }
          const T* right[kDotColumns];
          for (int c = 0; c < kDotColumns; ++c) right[c] = start + least(j + c, held - 1) * lane_stride;
          dot_tile<T>(count, left.data + first * left.stride, left.stride, right, depth, to);
        }
      }
      use(first, count, tile);
    });
    return;
  }
  const auto address = [&](int64_t row, int64_t column) {
    return reinterpret_cast<const char*>(from.matrix + row * from.row_stride + column);
  };
  Ahead ahead{{address(next.low, 0), address(next.high, 0)}, 64};
  if (from.is_transposed) {
    // a run is a column of lines, one a unit; where a unit is of two rows and a line holds both halves, one of a row each
    const bool is_pair = Scheme<T>::kPerUnit == 2 && next.high == next.low + kLanes<T>;
    ahead = {{address(0, next.low), is_pair ? address(1, next.low) : address(0, next.high)},
             from.row_stride * Scheme<T>::kPerUnit * int64_t{sizeof(T)}};
  } else {
    const auto half = [&](int64_t column, int count, typename Scheme<T>::Unit* to) {
      pack_along(from.matrix + column * from.row_stride, lane_stride, count, depth, to);
    };
    half(columns.low, columns.low_count, panel);
    half(columns.high, columns.high_count, panel + kLanes<T>);
  }
  // Pairs are multiplied faster than memory gives two lines a unit: then a second block of rows fetches the second run.
  const bool is_shared = Scheme<T>::kPerUnit == 2 && rows > 2 * kMostRows;
  int64_t block = 0;
  in_blocks(rows, kMostRows, [&](int64_t first, int64_t count) {
    const auto multiply = [&]<int Fetched>(const Ahead& ahead) {
      panel_tile<T, Fetched>(count, left.data + first * left.stride, left.stride, 1, panel, units<T>(depth), tile,
                             ahead);
    };
    if (block > is_shared)
      multiply.template operator()<0>({});
    else if (is_shared)
      multiply.template operator()<1>({{ahead.runs[block]}, ahead.step});
    else
      multiply.template operator()<2>(ahead);
    ++block;
    use(first, count, tile);
  });
}

template <class T>
PanelOf<T> copy_of(const Bank& bank, int64_t group, bool is_transposed) {
  const T* matrix = static_cast<const T*>(bank.data) + group * bank.copy_stride;
  return {matrix, bank.row_stride, bank.step, is_transposed};
}

constexpr int64_t kPackedBytes = 512 << 10;  // packed panels that a thread keeps, well within its second cache

// Panels that are packed at once.
template <class T>
int64_t panels_packed(int64_t depth, bool is_transposed) {
  const int64_t fit = kPackedBytes / (units<T>(depth) * kPanel<T> * int64_t{sizeof(typename Scheme<T>::Unit)});
  return !is_transposed || fit < 1 ? 1 : least(fit, kPanelsAtOnce);
}

template <class T>
int64_t scratch_bytes(int64_t depth, bool is_transposed) {
  const int64_t packed = panels_packed<T>(depth, is_transposed) * units<T>(depth) * kPanel<T>;
  return (most_rows<T>(depth) * stage_stride<T>(depth) + packed + 64) * sizeof(typename Scheme<T>::Unit);
}

// Staged rows by panels first to last: use(first row, rows, tile, panel, columns of the panel).
template <class T, class ColumnsOf, class Use>
void rows_by_panels(const Staged<T>& left, int64_t rows, int64_t depth, const PanelOf<T>& from, int64_t first,
                    int64_t last, const ColumnsOf& columns_of, typename Scheme<T>::Unit* packed, const Use& use) {
  const int64_t at_once = panels_packed<T>(depth, from.is_transposed);
  for (int64_t p = first; p < last; p += at_once) {
    Columns columns[kPanelsAtOnce];
    const int64_t count = least(at_once, last - p);
    for (int64_t i = 0; i < count; ++i) columns[i] = columns_of(p + i);
    if (from.is_transposed) pack_panels(from, columns, count, depth, packed);
    for (int64_t i = 0; i < count; ++i)
      rows_by_panel<T>(left, rows, depth, from, columns[i], columns_of(p + i + at_once),
                       packed + i * units<T>(depth) * kPanel<T>,
                       [&](int64_t row, int64_t size, const Accumulator<T>* tile) {
                         use(row, size, tile, p + i, columns[i]);
                       });
  }
}

// Every row of every group times its matrix: use(row, rows, tile, panel, columns of the panel, group).
template <class T, class ColumnsOf, class Use>
void rows_by_banks(const Threads& threads, const Groups& groups, const Rows& x, int64_t depth, const Bank& bank,
                   bool by_transposed, int64_t panels, const ColumnsOf& columns_of, const Use& use) {
  const bool is_transposed = by_transposed != bank.is_transposed;
  const Tasks tasks(groups, panels, threads.count, most_rows<T>(depth));
  for_each_task(threads, tasks.count(), scratch_bytes<T>(depth, is_transposed), [&](int64_t i, Scratch& scratch) {
    using Unit = typename Scheme<T>::Unit;
    const Task& task = tasks[i];
    Unit* copy = scratch.take<Unit>(most_rows<T>(depth) * stage_stride<T>(depth));
    Unit* packed = scratch.take<Unit>(panels_packed<T>(depth, is_transposed) * units<T>(depth) * kPanel<T>);
    const int64_t rows = task.row_end - task.row;
    rows_by_panels<T>(stage<T>(x, task.row, rows, depth, copy), rows, depth,
                      copy_of<T>(bank, task.group, is_transposed), task.panel, task.panel_end, columns_of, packed,
                      [&](int64_t first, int64_t count, const Accumulator<T>* tile, int64_t p, const Columns& columns) {
                        use(task.row + first, count, tile, p, columns, task.group);
                      });
  });
}

}  // namespace
}  // namespace omnimoe::cpu::OMNIMOE_ISA
