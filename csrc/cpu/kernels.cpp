// The grouped products and the experts' network. Compiled once for each instruction set; see vector.h.
//
// Work is cut into tasks that write to places of their own, and every sum is taken in one order, so a result does not
// depend on the number of threads nor on which thread took which task.
#include "kernels.h"

#include "activation.h"
#include "gemm.h"

namespace omnimoe::cpu::OMNIMOE_ISA {
namespace {

constexpr int64_t kRowChunk = 192;    // rows that a task stages at once
constexpr int64_t kPanelsAtOnce = 8;  // panels that a task goes through, where there are tasks enough without more

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

// All blocks of rows and panels of every group. The cut depends on sizes and the number of threads, results do not.
class Tasks {
 public:
  Tasks(const Groups& groups, int64_t panels, int64_t threads) {
    int64_t blocks = 0;
    for (int64_t g = 0; g < groups.count; ++g) {
      const Span rows = span_of(groups, g);
      blocks += ceil_div(rows.end - rows.start, kRowChunk);
    }
    int64_t at_once = least(kPanelsAtOnce, panels);
    while (at_once > 1 && blocks * ceil_div(panels, at_once) < 4 * threads) at_once /= 2;
    const int64_t chunks = ceil_div(panels, at_once);
    tasks_ = static_cast<Task*>(std::malloc((blocks * chunks + 1) * sizeof(Task)));
    for (int64_t g = 0; g < groups.count; ++g) {
      const Span rows = span_of(groups, g);
      for (int64_t chunk = 0; chunk < chunks; ++chunk)
        for (int64_t row = rows.start; row < rows.end; row += kRowChunk)
          tasks_[count_++] = {g, row, least(row + kRowChunk, rows.end), chunk * at_once,
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
Columns paired_columns(int64_t panel, int64_t width) {
  constexpr int lanes = kLanes<T>;
  const int64_t low = panel * lanes;
  const int count = int(least(lanes, width - low));
  return {low, width + low, count, count};
}

template <class T>
struct PanelOf {
  const T* matrix;
  int64_t row_stride;
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
      if (second && at.high_count == kLanes<T> && at.high == at.low + kLanes<T>) {
        panel_across<T>(first + at.low, second + at.low, unit);
        continue;
      }
      const auto half = [&](int64_t column, int count) {
        return unit_across<T>(first + column, second ? second + column : nullptr, count);
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
  if (!from.is_transposed && rows <= Scheme<T>::kFewRows) {
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
          for (int c = 0; c < kDotColumns; ++c) right[c] = start + least(j + c, held - 1) * from.row_stride;
          dot_tile<T>(count, left.data + first * left.stride, left.stride, right, depth,
                      kDotColumns * from.row_stride, to);
        }
      }
      use(first, count, tile);
    });
    return;
  }
  Ahead ahead{};
  if (!from.is_transposed) {
    const auto half = [&](int64_t column, int count, typename Scheme<T>::Unit* to) {
      pack_along(from.matrix + column * from.row_stride, from.row_stride, count, depth, to);
    };
    half(columns.low, columns.low_count, panel);
    half(columns.high, columns.high_count, panel + kLanes<T>);
    ahead = {reinterpret_cast<const char*>(from.matrix + next.low * from.row_stride),
             reinterpret_cast<const char*>(from.matrix + next.high * from.row_stride)};
  }
  in_blocks(rows, kMostRows, [&](int64_t first, int64_t count) {
    const auto* start = left.data + first * left.stride;
    if (ahead.low && !first)
      panel_tile<T, true>(count, start, left.stride, 1, panel, units<T>(depth), tile, ahead);
    else
      panel_tile<T>(count, start, left.stride, 1, panel, units<T>(depth), tile);
    use(first, count, tile);
  });
}

template <class T>
PanelOf<T> copy_of(const Bank& bank, int64_t group, bool is_transposed) {
  return {static_cast<const T*>(bank.data) + group * bank.copy_stride, bank.row_stride, is_transposed};
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
  return (kRowChunk * stage_stride<T>(depth) + packed + 64) * sizeof(typename Scheme<T>::Unit);
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
      rows_by_panel<T>(left, rows, depth, from, columns[i], columns_of(p + i + 1),
                       packed + i * units<T>(depth) * kPanel<T>,
                       [&](int64_t row, int64_t size, const Accumulator<T>* tile) {
                         use(row, size, tile, p + i, columns[i]);
                       });
  }
}

// Every row of every group times its matrix: use(row, rows, tile, panel, columns of the panel, group).
template <class T, class ColumnsOf, class Use>
void rows_by_banks(const Threads& threads, const Groups& groups, const Rows& x, int64_t depth, const Bank& bank,
                   bool is_transposed, int64_t panels, const ColumnsOf& columns_of, const Use& use) {
  const Tasks tasks(groups, panels, threads.count);
  for_each_task(threads, tasks.count(), scratch_bytes<T>(depth, is_transposed), [&](int64_t i, Scratch& scratch) {
    using Unit = typename Scheme<T>::Unit;
    const Task& task = tasks[i];
    Unit* copy = scratch.take<Unit>(kRowChunk * stage_stride<T>(depth));
    Unit* packed = scratch.take<Unit>(panels_packed<T>(depth, is_transposed) * units<T>(depth) * kPanel<T>);
    const int64_t rows = task.row_end - task.row;
    rows_by_panels<T>(stage<T>(x, task.row, rows, depth, copy), rows, depth,
                      copy_of<T>(bank, task.group, is_transposed), task.panel, task.panel_end, columns_of, packed,
                      [&](int64_t first, int64_t count, const Accumulator<T>* tile, int64_t p, const Columns& columns) {
                        use(task.row + first, count, tile, p, columns, task.group);
                      });
  });
}

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

constexpr int64_t kLeft = 48;  // columns of dy that are packed at once: whole blocks of rows, whole vectors

template <class T>
void grouped_wgrad(const GroupedWgrad& a) {
  using S = Scheme<T>;
  using Unit = typename S::Unit;
  T* out = static_cast<T*>(a.out);
  int64_t most = 1;
  for (int64_t g = 0; g < a.groups.count; ++g) {
    const Span rows = span_of(a.groups, g);
    if (rows.end - rows.start > most) most = rows.end - rows.start;
  }
  const int64_t panels = ceil_div(a.depth, kPanel<T>), lefts = ceil_div(a.columns, kLeft);
  // A task keeps its panels of x packed, half a megabyte at most, and goes through its columns of dy.
  int64_t at_once = (512 << 10) / (units<T>(most) * kPanel<T> * int64_t{sizeof(Unit)});
  at_once = least(panels, at_once < 1 ? 1 : at_once);
  int64_t lefts_at_once = lefts;
  const auto tasks_of = [&] { return a.groups.count * ceil_div(panels, at_once) * ceil_div(lefts, lefts_at_once); };
  while (tasks_of() < 4 * a.threads.count && lefts_at_once > 1) lefts_at_once = ceil_div(lefts_at_once, 2);
  const int64_t panel_chunks = ceil_div(panels, at_once), left_chunks = ceil_div(lefts, lefts_at_once);
  const int64_t bytes = units<T>(most) * (at_once * kPanel<T> + kLeft) * sizeof(Unit) + 256;
  for_each_task(a.threads, tasks_of(), bytes, [&](int64_t task, Scratch& scratch) {
    const int64_t group = task / (panel_chunks * left_chunks), rest = task % (panel_chunks * left_chunks);
    const int64_t panel = rest / left_chunks * at_once, panel_end = least(panel + at_once, panels);
    const int64_t left_start = rest % left_chunks * lefts_at_once;
    const int64_t left_end = least(left_start + lefts_at_once, lefts);
    const Span rows = span_of(a.groups, group);
    const int64_t count = rows.end - rows.start, depth = units<T>(count);
    Unit* packed = scratch.take<Unit>(depth * (panel_end - panel) * kPanel<T>);
    Unit* left = scratch.take<Unit>(depth * kLeft);
    for (int64_t p = panel; p < panel_end; ++p) {
      const Columns columns = plain_columns<T>(p, a.depth);
      Unit* to = packed + (p - panel) * depth * kPanel<T>;
      const auto row_at = [&](int64_t column) {
        return [&, column](int64_t r) { return row_of<T>(a.x, rows.start + r) + column; };
      };
      pack_across<T>(row_at(columns.low), columns.low_count, count, to, kPanel<T>);
      pack_across<T>(row_at(columns.high), columns.high_count, count, to + kLanes<T>, kPanel<T>);
    }
    Accumulator<T> tile[kMostRows * kPanel<T>] __attribute__((aligned(64)));
    for (int64_t l = left_start; l < left_end; ++l) {
      const int64_t first = l * kLeft, held = least(kLeft, a.columns - first);
      for (int64_t lane = 0; lane < held; lane += kLanes<T>)
        pack_across<T>([&](int64_t r) { return row_of<T>(a.dy, rows.start + r) + first + lane; },
                       int(least(kLanes<T>, held - lane)), count, left + lane, kLeft);
      for (int64_t p = panel; p < panel_end; ++p) {
        const Columns columns = plain_columns<T>(p, a.depth);
        in_blocks(held, kMostRows, [&](int64_t start, int64_t size) {
          panel_tile<T>(size, left + start, 1, kLeft, packed + (p - panel) * depth * kPanel<T>, depth, tile);
          for (int64_t i = 0; i < size; ++i) {
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
    finish_stream();
  });
}

// ---- experts_mlp ----------------------------------------------------------------------------------------------------

// out[token of r] += weights[r] * x[r] W for all rows, in order. A task owns columns, so no two write to one place.
template <class T>
void scatter_product(const ExpertsMLP& a, const Rows& x, int64_t depth, const Bank& bank, bool is_transposed,
                     const Accumulator<T>* weights, void* out) {
  using A = Accumulator<T>;
  using Unit = typename Scheme<T>::Unit;
  constexpr bool is_wide = sizeof(T) == sizeof(A);
  const int64_t panels = ceil_div(a.hidden, kPanel<T>);
  // as many panels at once as leave no thread waiting for more than a tenth of the time
  int64_t at_once = least(panels, kPanelsAtOnce);
  const auto slowest = [&] { return ceil_div(ceil_div(panels, at_once), a.threads.count) * at_once; };
  while (at_once > 1 && 10 * slowest() * a.threads.count > 11 * panels) at_once /= 2;
  const int64_t own = at_once * kPanel<T>;
  const int64_t bytes = scratch_bytes<T>(depth, is_transposed) + (is_wide ? 0 : a.tokens * own * sizeof(A)) + 256;
  for_each_task(a.threads, ceil_div(panels, at_once), bytes, [&](int64_t task, Scratch& scratch) {
    Unit* copy = scratch.take<Unit>(kRowChunk * stage_stride<T>(depth));
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
      for (int64_t row = rows.start; row < rows.end; row += kRowChunk) {
        const int64_t size = least(kRowChunk, rows.end - row);
        rows_by_panels<T>(
            stage<T>(x, row, size, depth, copy), size, depth, copy_of<T>(bank, g, is_transposed), first, last,
            [&](int64_t p) { return plain_columns<T>(p, a.hidden); }, packed,
            [&](int64_t start, int64_t count, const A* tile, int64_t p, const Columns& columns) {
              for (int64_t i = 0; i < count; ++i) {
                const int64_t r = row + start + i;
                const A weight = weights ? weights[r] : A(1);
                A* to = sums + (a.x.index ? a.x.index[r] : r) * stride + (p - first) * kPanel<T>;
                const A* from = tile + i * kPanel<T>;
                const auto add = [&](int64_t at, int held) {
                  if (held == kLanes<T>)
                    store(to + at, load(to + at) + weight * load(from + at));
                  else
                    for (int c = 0; c < held; ++c) to[at + c] += weight * from[at + c];
                };
                add(0, columns.low_count);
                add(kLanes<T>, columns.high_count);
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

template <class T>
void experts_mlp(const ExpertsMLP& a) {
  using A = Accumulator<T>;
  const int64_t rows = total_rows(a.groups), stride = own_stride<T>(a.width), F = a.width;
  Scratch held(rows * stride * sizeof(T));
  T* h = held.take<T>(rows * stride);
  T* z = static_cast<T*>(a.z);
  const auto put = [&](T* to, int64_t column, const A* from, int count) {
    if (count) store_some(to + column, load(from), count);
  };
  if (a.is_gated) {
    rows_by_banks<T>(
        a.threads, a.groups, a.x, a.hidden, a.w_in, false, ceil_div(F, kLanes<T>),
        [&](int64_t p) { return paired_columns<T>(p, F); },
        [&](int64_t row, int64_t count, const A* tile, int64_t, const Columns& columns, int64_t) {
          for (int64_t i = 0; i < count; ++i) {
            const A *gate = tile + i * kPanel<T>, *up = gate + kLanes<T>;
            if (z) {
              put(z + (row + i) * 2 * F, columns.low, gate, columns.low_count);
              put(z + (row + i) * 2 * F, columns.high, up, columns.low_count);
            }
            store_some(h + (row + i) * stride + columns.low, gated<A>(a.activation, load(gate), load(up)),
                       columns.low_count);
          }
        });
  } else {
    rows_by_banks<T>(
        a.threads, a.groups, a.x, a.hidden, a.w_in, false, ceil_div(F, kPanel<T>),
        [&](int64_t p) { return plain_columns<T>(p, F); },
        [&](int64_t row, int64_t count, const A* tile, int64_t, const Columns& columns, int64_t) {
          const auto half = [&](int64_t column, int held, const A* from) {
            if (!held) return;
            for (int64_t i = 0; i < count; ++i) {
              const A* up = from + i * kPanel<T>;
              if (z) put(z + (row + i) * F, column, up, held);
              store_some(h + (row + i) * stride + column, activate<A>(a.activation, load(up)).value, held);
            }
          };
          half(columns.low, columns.low_count, tile);
          half(columns.high, columns.high_count, tile + kLanes<T>);
        });
  }
  scatter_product<T>(a, {h, stride, nullptr}, F, a.w_out, false, static_cast<const A*>(a.weights), a.out);
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
            const T* pre = z + r * wide + column;
            const V grad_hidden = load(from);
            const auto read = [&](const T* at) { return valid == kLanes<T> ? load(at) : load_some(at, valid); };
            T* to = grad_z + r * z_stride + column;
            V value;
            if (a.is_gated) {
              const GatedSlopes<A> slopes = gated_slopes<A>(a.activation, read(pre), read(pre + F));
              value = slopes.value;
              store_some(to, weight * grad_hidden * slopes.gate, valid);
              store_some(to + F, weight * grad_hidden * slopes.up, valid);
            } else {
              const Activated<A> activated = activate<A>(a.activation, read(pre));
              value = activated.value;
              store_some(to, weight * grad_hidden * activated.slope, valid);
            }
            store_some(weighted + r * hidden_stride + column, weight * value, valid);
            share += grad_hidden * value;  // lanes that are not there are zero in grad_hidden
          };
          half(columns.low, columns.low_count, tile + i * kPanel<T>);
          half(columns.high, columns.high_count, tile + i * kPanel<T> + kLanes<T>);
          shares[r * panels + panel] = sum<A>(share);
        }
      });
  if (b.grad_weights)
    for (int64_t r = 0; r < rows; ++r) {
      A total = 0;
      for (int64_t p = 0; p < panels; ++p) total += shares[r * panels + p];
      static_cast<A*>(b.grad_weights)[r] = total;
    }
  if (b.grad_w_out)
    grouped_wgrad<T>({a.type, a.threads, a.groups, F, a.hidden, grad, {weighted, hidden_stride, nullptr}, b.grad_w_out});
  const Rows grad_rows{grad_z, z_stride, nullptr};
  if (b.grad_w_in) grouped_wgrad<T>({a.type, a.threads, a.groups, a.hidden, wide, grad_rows, a.x, b.grad_w_in});
  if (b.grad_x) scatter_product<T>(a, grad_rows, wide, a.w_in, true, nullptr, b.grad_x);
}

// ---- the table ------------------------------------------------------------------------------------------------------

template <class Call, class F>
void by_type(const Call& call, Type type, const F& f) {
  switch (type) {
    case Type::f32:
      return f(float{}, call);
    case Type::f64:
      return f(double{}, call);
    case Type::bf16:
      return f(BFloat16{}, call);
    case Type::f16:
      return f(Float16{}, call);
  }
}

}  // namespace

extern const Kernels kernels = {
    [](const GroupedMM& a) { by_type(a, a.type, [](auto t, const auto& c) { grouped_mm<decltype(t)>(c); }); },
    [](const GroupedWgrad& a) { by_type(a, a.type, [](auto t, const auto& c) { grouped_wgrad<decltype(t)>(c); }); },
    [](const ExpertsMLP& a) { by_type(a, a.type, [](auto t, const auto& c) { experts_mlp<decltype(t)>(c); }); },
    [](const ExpertsMLPBackward& a) {
      by_type(a, a.forward.type, [](auto t, const auto& c) { experts_mlp_backward<decltype(t)>(c); });
    },
};

}  // namespace omnimoe::cpu::OMNIMOE_ISA
