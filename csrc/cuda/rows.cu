// What is done to rows by themselves: gathered, summed by token, summed by group, multiplied with each other.
#include "product.h"

namespace omnimoe::cuda {

namespace {

// Calls body(i) for 0 <= i < count, spread over the grid.
template <class Body>
__device__ inline void each(int64_t count, Body&& body) {
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += int64_t(gridDim.x) * kThreads) body(i);
}
LaunchShape shape_for(const Queue& queue, int64_t threads, size_t shared_bytes = 0) {
  const int64_t most = int64_t{16} * queue.multiprocessors, wanted = ceil_of(threads, kThreads);
  return {unsigned(wanted < 1 ? 1 : wanted < most ? wanted : most), kThreads, shared_bytes};
}

template <class V>
__global__ void gather_kernel(Gather p, int64_t per_row) {
  each(p.rows * per_row, [&](int64_t i) {
    const int64_t row = i / per_row, from = load(p.index + row);
    const bool is_there = from >= 0 && from < p.count && (!p.filled || load(p.filled + row));
    V value = {};
    if (is_there) value = load(static_cast<const V*>(p.x) + from * per_row + i % per_row);
    store(static_cast<V*>(p.out) + i, value);
  });
}

// A thread sums `kRun` columns of a token.
template <class T>
__global__ void sum_rows_kernel(SumRows p) {
  constexpr int kRun = 16 / int(sizeof(T));
  using W = Wide<T>;
  const int64_t runs = (p.columns + kRun - 1) / kRun;
  const auto* weights = static_cast<const W*>(p.weights);
  each(p.tokens * runs, [&](int64_t i) {
    const int64_t token = i / runs, column = i % runs * kRun;
    const int count = clamp_to(p.columns - column, kRun);
    const int64_t start = token ? clamped_end(p.ends, token - 1, p.tokens, p.count) : 0;
    const int64_t end = clamped_end(p.ends, token, p.tokens, p.count);
    W sums[kRun] = {};
    for (int64_t at = start; at < end; ++at) {
      const int64_t row = load(p.order + at);
      if (row < 0 || row >= p.count) continue;
      const W weight = weights ? load(weights + row) : W(1);
      W values[kRun];
      load_run<kRun>(values, static_cast<const T*>(p.y) + row * p.columns + column, count);
      for (int j = 0; j < kRun; ++j) sums[j] += weight * values[j];
    }
    store_run<kRun>(static_cast<T*>(p.out) + token * p.columns + column, sums, count);
  });
}

// A warp takes a row.
template <class T>
__global__ void weights_grad_kernel(WeightsGrad p, Lines<T> grad) {
  using W = Wide<T>;
  for (int64_t row = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / 32; row < p.groups.rows;
       row += int64_t(gridDim.x) * (kThreads / 32)) {
    W sum = 0;
    for (int64_t i = lane_id(); i < p.shares_per_row; i += 32)
      sum += load(static_cast<const W*>(p.shares) + row * p.shares_per_row + i);
    if (p.b_out) {
      int64_t group = 0, past = p.groups.count;  // the first group that ends beyond the row
      while (group < past) {
        const int64_t middle = (group + past) / 2;
        if (clamped_end(p.groups.ends, middle, p.groups.count, p.groups.rows) <= row)
          group = middle + 1;
        else
          past = middle;
      }
      const T* line = group < p.groups.count ? grad.line(row) : nullptr;
      const T* bias = static_cast<const T*>(p.b_out) + group * p.hidden;
      if (line)
        for (int64_t i = lane_id(); i < p.hidden; i += 32) sum += widen(load(line + i)) * widen(load(bias + i));
    }
    for (int by = 16; by; by /= 2) sum += __shfl_xor_sync(kFullWarp, sum, by);
    if (lane_id() == 0) store(static_cast<W*>(p.out) + row, sum);
  }
}

// A block takes 64 columns of a group; each quarter of its threads every fourth row.
constexpr int kSumColumns = 64, kSumParts = kThreads / kSumColumns;

template <class T>
__global__ void group_sums_kernel(GroupSums p, Lines<T> y) {
  using W = Wide<T>;
  W* parts = reinterpret_cast<W*>(shared_memory());
  const int64_t wide = (p.columns + kSumColumns - 1) / kSumColumns;
  const int part = int(threadIdx.x) / kSumColumns, place = int(threadIdx.x) % kSumColumns;
  for (int64_t i = blockIdx.x; i < p.groups.count * wide; i += gridDim.x) {
    const int64_t group = i / wide, column = i % wide * kSumColumns + place;
    const Span span = span_of(p.groups.ends, group, p.groups.rows);
    W sum = 0;
    if (column < p.columns)
      for (int64_t row = span.start + part; row < span.end; row += kSumParts) {
        const T* line = y.line(row);
        if (line) sum += (p.weights ? load(static_cast<const W*>(p.weights) + row) : W(1)) * widen(load(line + column));
      }
    parts[threadIdx.x] = sum;
    __syncthreads();
    if (part == 0 && column < p.columns) {
      for (int other = 1; other < kSumParts; ++other) sum += parts[other * kSumColumns + place];
      store(static_cast<T*>(p.out) + group * p.columns + column, narrow<T>(sum));
    }
    __syncthreads();
  }
}

struct alignas(16) Sixteen {
  uint64_t at[2];
};

template <class V>
void gather_as(const Gather& p, const Queue& queue) {
  const int64_t per_row = p.row_bytes / int64_t(sizeof(V));
  launch(gather_kernel<V>, shape_for(queue, p.rows * per_row), queue.stream, p, per_row);
}

}  // namespace

void run(const Gather& p, const Queue& queue) {
  const auto fits = [&](uintptr_t bytes) {
    const auto lies = reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.out) | uintptr_t(p.row_bytes);
    return lies % bytes == 0;
  };
  if (fits(16))
    gather_as<Sixteen>(p, queue);
  else if (fits(4))
    gather_as<uint32_t>(p, queue);
  else if (fits(2))
    gather_as<uint16_t>(p, queue);
  else
    gather_as<uint8_t>(p, queue);
}

void run(const SumRows& p, const Queue& queue) {
  with_type(p.type, [&](auto zero) {
    using T = decltype(zero);
    const int64_t threads = p.tokens * ceil_of(p.columns, 16 / int64_t(sizeof(T)));
    launch(sum_rows_kernel<T>, shape_for(queue, threads), queue.stream, p);
  });
}

void run(const WeightsGrad& p, const Queue& queue) {
  with_type(p.type, [&](auto zero) {
    using T = decltype(zero);
    launch(weights_grad_kernel<T>, shape_for(queue, 32 * p.groups.rows), queue.stream, p, lines_of<T>(p.grad));
  });
}

void run(const GroupSums& p, const Queue& queue) {
  with_type(p.type, [&](auto zero) {
    using T = decltype(zero);
    const int64_t blocks = p.groups.count * ceil_of(p.columns, kSumColumns);
    launch(group_sums_kernel<T>, shape_for(queue, blocks * kThreads, kThreads * sizeof(Wide<T>)), queue.stream, p,
           lines_of<T>(p.y));
  });
}

}  // namespace omnimoe::cuda
