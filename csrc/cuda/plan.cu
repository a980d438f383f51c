// A stable counting sort of group ids: by digits of eight bits, the lowest first. A block counts its rows, one block
// adds the counts up, and every row finds its place by counting the rows before it; nothing depends on who comes first.
#include "kernels.h"
#include "schedule.h"

namespace omnimoe::cuda {

namespace {

constexpr int kSortThreads = 256, kWarps = kSortThreads / 32, kDigits = 256, kRowsOfWarp = 256;
constexpr int kRowsOfBlock = kWarps * kRowsOfWarp, kScanThreads = 1024;

struct Pass {
  const int64_t* ids;  // of the first pass, or null
  const uint32_t* keys;
  const int32_t* values;
  int64_t rows, groups;
  int shift;
  int32_t* totals;  // (kDigits, blocks)
  uint32_t* keys_out;
  int32_t* values_out;  // null in the last pass, which gives order and inverse
  int64_t* order;
  int64_t* inverse;
};

__device__ inline uint32_t key_of(const Pass& pass, int64_t row) {
  if (!pass.ids) return load(pass.keys + row);
  const int64_t id = load(pass.ids + row);
  return id < 0 || id >= pass.groups ? uint32_t(pass.groups) : uint32_t(id);
}

// The lanes whose row has the same digit; none for a lane without a row.
__device__ inline uint32_t peers_of(uint32_t digit, bool is_there) {
  uint32_t peers = __ballot_sync(kFullWarp, is_there);
  for (int bit = 0; bit < 8; ++bit) {
    const uint32_t with = __ballot_sync(kFullWarp, digit >> bit & 1);
    peers &= digit >> bit & 1 ? with : ~with;
  }
  return is_there ? peers : 0;
}

// Walks over the rows of this warp, 32 at a time: body(row, key, digit, place among those of its digit).
template <class Body>
__device__ inline void each_row_of_warp(const Pass& pass, int32_t* counts, Body&& body) {
  const int64_t first = int64_t(blockIdx.x) * kRowsOfBlock + threadIdx.x / 32 * kRowsOfWarp;
  for (int i = 0; i < kRowsOfWarp; i += 32) {
    const int64_t row = first + i + lane_id();
    const bool is_there = row < pass.rows;
    const uint32_t key = is_there ? key_of(pass, row) : 0, digit = key >> pass.shift & (kDigits - 1);
    const uint32_t peers = peers_of(digit, is_there);
    const int before = __popc(peers & ((1u << lane_id()) - 1));
    if (is_there) body(row, key, counts[digit] + before);
    __syncwarp();
    if (is_there && before == 0) counts[digit] += __popc(peers);
    __syncwarp();
  }
}

__device__ inline void count(const Pass& pass, int32_t* counts) {
  for (int i = int(threadIdx.x); i < kWarps * kDigits; i += kSortThreads) counts[i] = 0;
  __syncthreads();
  each_row_of_warp(pass, counts + threadIdx.x / 32 * kDigits, [](int64_t, uint32_t, int) {});
  __syncthreads();
}

__global__ void count_kernel(Pass pass) {
  auto* counts = reinterpret_cast<int32_t*>(shared_memory());
  count(pass, counts);
  int32_t total = 0;
  for (int warp = 0; warp < kWarps; ++warp) total += counts[warp * kDigits + int(threadIdx.x)];
  store(pass.totals + int64_t(threadIdx.x) * gridDim.x + blockIdx.x, total);
}

// Replaces every number by the sum of those before it.
__global__ void scan_kernel(int32_t* totals, int64_t count) {
  auto* sums = reinterpret_cast<int64_t*>(shared_memory());
  const int64_t each = (count + kScanThreads - 1) / kScanThreads, first = each * threadIdx.x;
  const int64_t last = min(first + each, count);
  int64_t sum = 0;
  for (int64_t i = first; i < last; ++i) sum += load(totals + i);
  const int64_t through = scan_sum(sum);
  if (lane_id() == 31) sums[threadIdx.x / 32] = through;
  __syncthreads();
  if (threadIdx.x < 32) {
    const int64_t all = scan_sum(sums[threadIdx.x]);
    sums[threadIdx.x] = all;
  }
  __syncthreads();
  int64_t before = through - sum + (threadIdx.x < 32 ? 0 : sums[threadIdx.x / 32 - 1]);
  for (int64_t i = first; i < last; ++i) {
    const int32_t here = load(totals + i);
    store(totals + i, int32_t(before));
    before += here;
  }
}

__global__ void scatter_kernel(Pass pass) {
  auto* counts = reinterpret_cast<int32_t*>(shared_memory());
  count(pass, counts);
  int32_t place = load(pass.totals + int64_t(threadIdx.x) * gridDim.x + blockIdx.x);
  for (int warp = 0; warp < kWarps; ++warp) {
    int32_t& here = counts[warp * kDigits + int(threadIdx.x)];
    const int32_t rows = here;
    here = place;
    place += rows;
  }
  __syncthreads();
  each_row_of_warp(pass, counts + threadIdx.x / 32 * kDigits, [&](int64_t row, uint32_t key, int to) {
    const int32_t value = pass.ids ? int32_t(row) : load(pass.values + row);
    store(pass.keys_out + to, key);
    if (pass.values_out) {
      store(pass.values_out + to, value);
    } else {
      store(pass.order + to, int64_t(value));
      store(pass.inverse + value, int64_t(to));
    }
  });
}

// The end of a group: how many sorted keys are not above it.
__global__ void ends_kernel(const uint32_t* keys, int64_t rows, int64_t groups, int32_t* ends) {
  for (int64_t group = int64_t(blockIdx.x) * kSortThreads + threadIdx.x; group < groups;
       group += int64_t(gridDim.x) * kSortThreads) {
    int64_t low = 0, high = rows;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (load(keys + middle) <= uint32_t(group))
        low = middle + 1;
      else
        high = middle;
    }
    store(ends + group, int32_t(low));
  }
}

int64_t blocks_of(int64_t rows) { return (rows + kRowsOfBlock - 1) / kRowsOfBlock; }

int passes_of(int64_t groups) {
  int bits = 0;
  while (groups >> bits) ++bits;
  return bits <= 8 ? 1 : (bits + 7) / 8;
}

}  // namespace

int64_t plan_work(int64_t rows, int64_t) { return 4 * (4 * rows + kDigits * blocks_of(rows)); }

void run(const Plan& plan, const Queue& queue) {
  const auto blocks = unsigned(blocks_of(plan.rows));
  auto* keys = static_cast<uint32_t*>(plan.work);
  auto* values = reinterpret_cast<int32_t*>(keys + 2 * plan.rows);
  int32_t* totals = values + 2 * plan.rows;
  const int passes = passes_of(plan.groups);
  const auto counts_bytes = size_t(kWarps * kDigits) * sizeof(int32_t);
  for (int i = 0; i < passes; ++i) {
    const int64_t from = (i + 1) % 2 * plan.rows, to = i % 2 * plan.rows;
    const Pass pass{i ? nullptr : plan.ids, keys + from, values + from, plan.rows, plan.groups, 8 * i, totals,
                    keys + to, i + 1 < passes ? values + to : nullptr, plan.order, plan.inverse};
    launch(count_kernel, {blocks, kSortThreads, counts_bytes}, queue.stream, pass);
    launch(scan_kernel, {1, kScanThreads, 32 * sizeof(int64_t)}, queue.stream, totals, int64_t(kDigits) * blocks);
    launch(scatter_kernel, {blocks, kSortThreads, counts_bytes}, queue.stream, pass);
  }
  const int64_t most = int64_t{8} * queue.multiprocessors, wanted = (plan.groups + kSortThreads - 1) / kSortThreads;
  launch(ends_kernel, {unsigned(wanted < most ? wanted : most), kSortThreads}, queue.stream,
         keys + (passes - 1) % 2 * plan.rows, plan.rows, plan.groups, plan.ends);
}

}  // namespace omnimoe::cuda
