// Attention of many queries without the matrix of scores: blocks of rows meet blocks of keys, which are packed once for
// all the rows of a task. Queries that share a key are rows of one product, so that no key is copied.
#pragma once

#include "activation.h"
#include "banks.h"

namespace omnimoe::cpu::OMNIMOE_ISA {
namespace {

constexpr int64_t kKeysAtOnce = 512;     // whole panels; what is packed of them stays in the second cache
constexpr int64_t kQueriesAtOnce = 384;  // rows of a task, whole blocks of them
constexpr int64_t kFewQueries = 48;      // that a task has at least, where there would be too few tasks

// One byte a lane, to whole lanes.
template <class A>
struct Flags;
template <>
struct Flags<float> {
  typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes / 4)));
  using Lanes = IntVector;
};
template <>
struct Flags<double> {
  typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes / 8)));
  typedef int64_t Lanes __attribute__((vector_size(kVectorBytes)));
};

// What a row of scores is multiplied with values as: pairs where the machine multiplies pairs, else as it was summed.
template <class T>
struct ShareOf {
  using type = Accumulator<T>;
};
#ifdef __AVX512BF16__
template <>
struct ShareOf<BFloat16> {
  using type = BFloat16;
};
#endif

template <class A>
inline A largest(typename Lanes<A>::Vector v) {
  A found = v[0];
  for (int i = 1; i < Lanes<A>::count; ++i) found = v[i] > found ? v[i] : found;
  return found;
}

template <class A>
constexpr A kLowest = sizeof(A) == 4 ? A(-3e38) : A(-1e300);

// Row i of a tile of scores: from `first` to `own` they count, of those the ones that are seen; the rest become shares
// of nothing.
template <class T>
struct Scores {
  using A = Accumulator<T>;
  A* tiles;        // panel after panel, (kMostRows, kPanel) each
  int64_t first;   // where a panel begins
  int64_t own;     // one past the last score that counts
  int64_t padded;  // whole vectors of shares that are written
  const bool* seen;
  A scale;

  A* at(int64_t row, int64_t key) const {
    return tiles + key / kPanel<T> * (kMostRows * kPanel<T>) + row * kPanel<T> + key % kPanel<T>;
  }
};

// Scales a row and finds its largest number; what does not count becomes the lowest number there is.
template <class T>
Accumulator<T> scale_row(const Scores<T>& s, int64_t row) {
  using A = Accumulator<T>;
  using V = typename Lanes<A>::Vector;
  using F = Flags<A>;
  const V lowest = broadcast(kLowest<A>);
  V most = lowest;
  for (int64_t key = s.first; key < s.own; key += kLanes<T>) {
    A* at = s.at(row, key);
    const int held = int(least(kLanes<T>, s.own - key));
    V v = load(at) * s.scale;
    if (s.seen) {
      typename F::Bytes bytes{};
      std::memcpy(&bytes, s.seen + key, held);
      v = __builtin_convertvector(bytes, typename F::Lanes) != 0 ? v : lowest;
    }
    if (held < kLanes<T>)
      for (int i = held; i < kLanes<T>; ++i) v[i] = kLowest<A>;
    store(at, v);
    most = v > most ? v : most;
  }
  return largest<A>(most);
}

// exp(score - top) of a row as shares, and their sum. NaN is no lower than the lowest, and stays.
template <class T>
Accumulator<T> share_row(const Scores<T>& s, int64_t row, Accumulator<T> top, typename ShareOf<T>::type* to) {
  using A = Accumulator<T>;
  using V = typename Lanes<A>::Vector;
  const V zero = {}, lowest = broadcast(kLowest<A>);
  V total = {};
  int64_t key = s.first;
  for (; key < s.own; key += kLanes<T>) {
    const V v = load(s.at(row, key));
    const V share = v <= lowest ? zero : exponential(v - top);
    total += share;
    store(to + key, share);
  }
  for (; key < s.padded; key += kLanes<T>) store(to + key, zero);
  return sum<A>(total);
}

// One past the last key that a query may see.
inline int64_t end_of_keys(const Attend& a, int64_t sequence, int64_t query) {
  if (a.is_causal) return least(a.keys, query + 1 + a.keys - a.queries);
  if (!a.mask) return a.keys;
  const bool* seen = a.mask + sequence * a.mask_batch_stride + query * a.mask_row_stride;
  int64_t end = a.keys;
  uint64_t eight;
  while (end >= 8 && (std::memcpy(&eight, seen + end - 8, 8), !eight)) end -= 8;
  while (end && !seen[end - 1]) --end;
  return end;
}

// The first key that a query may see; the end where it sees none.
inline int64_t start_of_keys(const Attend& a, int64_t sequence, int64_t query, int64_t end) {
  if (!a.mask) return 0;
  const bool* seen = a.mask + sequence * a.mask_batch_stride + query * a.mask_row_stride;
  int64_t start = 0;
  uint64_t eight;
  while (start + 8 <= end && (std::memcpy(&eight, seen + start, 8), !eight)) start += 8;
  while (start < end && !seen[start]) ++start;
  return start;
}

// The keys that a row of a task may see.
struct KeysOf {
  int64_t start, end;
};

// All that a few rows in turn may see; nothing where they see nothing.
inline KeysOf keys_of(const KeysOf* rows, int64_t start, int64_t count) {
  KeysOf all{rows[start].start, rows[start].end};
  for (int64_t r = start + 1; r < start + count; ++r) {
    if (rows[r].start >= rows[r].end) continue;
    if (all.start >= all.end) all = rows[r];
    all.start = rows[r].start < all.start ? rows[r].start : all.start;
    all.end = rows[r].end > all.end ? rows[r].end : all.end;
  }
  return all;
}

template <class T>
void attend(const Attend& a) {
  using A = Accumulator<T>;
  using V = typename Lanes<A>::Vector;
  using Unit = typename Scheme<T>::Unit;
  using Share = typename ShareOf<T>::type;
  constexpr int64_t lanes = kLanes<T>, panel = kPanel<T>;
  const int64_t group = a.heads / a.kv_heads, rows = a.queries * group;
  int64_t at_once = least(kQueriesAtOnce, rows);
  const auto tasks_of = [&] { return a.batch * a.kv_heads * ceil_div(rows, at_once); };
  while (at_once > kFewQueries && tasks_of() < 2 * a.threads.count) at_once = ceil_div(at_once, 2);
  const int64_t chunks = ceil_div(rows, at_once), keys_held = least(kKeysAtOnce, ceil_div(a.keys, panel) * panel);
  const int64_t value_panels = ceil_div(a.value_width, panel), key_panels = ceil_div(keys_held, panel);
  const int64_t key_units = units<T>(a.width), value_units = units<T>(keys_held);
  const int64_t query_stride = stage_stride<T>(a.width), share_stride = stage_stride<T>(keys_held);
  const int64_t bytes =
      (at_once * query_stride + key_panels * key_units * panel + value_panels * value_units * panel +
       kMostRows * share_stride) * int64_t{sizeof(Unit)} +
      (key_panels * kMostRows * panel + at_once * (value_panels * panel + 2)) * int64_t{sizeof(A)} +
      at_once * int64_t{sizeof(int64_t) + sizeof(KeysOf)} + 1024;
  for_each_task(a.threads, tasks_of(), bytes, [&](int64_t task, Scratch& scratch) {
    const int64_t first = task % chunks * at_once, count = least(at_once, rows - first);
    const int64_t kv_head = task / chunks % a.kv_heads, b = task / chunks / a.kv_heads;
    int64_t* place = scratch.take<int64_t>(at_once);
    KeysOf* own_keys = scratch.take<KeysOf>(at_once);
    Unit* copy = scratch.take<Unit>(at_once * query_stride);
    Unit* packed_keys = scratch.take<Unit>(key_panels * key_units * panel);
    Unit* packed_values = scratch.take<Unit>(value_panels * value_units * panel);
    Unit* shares = scratch.take<Unit>(kMostRows * share_stride);
    A* tiles = scratch.take<A>(key_panels * kMostRows * panel);
    A* sums = scratch.take<A>(at_once * value_panels * panel);
    A* top = scratch.take<A>(at_once);
    A* total = scratch.take<A>(at_once);
    // neighbours are queries of one position, so that a block of rows has nearly one border where keys end
    const auto query_of = [&](int64_t r) { return (first + r) / group; };
    const auto head_of = [&](int64_t r) { return kv_head * group + (first + r) % group; };
    for (int64_t r = 0; r < count; ++r) {
      place[r] = head_of(r) * a.query.head_stride + query_of(r) * a.query.row_stride;
      if (r && query_of(r) == query_of(r - 1)) {
        own_keys[r] = own_keys[r - 1];
      } else {
        const int64_t end = end_of_keys(a, b, query_of(r));
        own_keys[r] = {start_of_keys(a, b, query_of(r), end), end};
      }
      top[r] = kLowest<A>;
      total[r] = 0;
    }
    const T* queries = static_cast<const T*>(a.query.data) + b * a.query.batch_stride;
    const T* keys = static_cast<const T*>(a.key.data) + b * a.key.batch_stride + kv_head * a.key.head_stride;
    const T* values = static_cast<const T*>(a.value.data) + b * a.value.batch_stride + kv_head * a.value.head_stride;
    const Staged<T> left = stage<T>({queries, 1, place}, 0, count, a.width, copy);
    const auto [begin, end] = keys_of(own_keys, 0, count);
    std::memset(sums, 0, count * value_panels * panel * sizeof(A));
    for (int64_t block = begin; block < end; block += kKeysAtOnce) {
      const int64_t held = least(kKeysAtOnce, end - block);
      for (int64_t key = 0; key < held; key += lanes)
        pack_along<T>(keys + (block + key) * a.key.row_stride, a.key.row_stride, int(least(lanes, held - key)), a.width,
                      packed_keys + key / panel * key_units * panel + key % panel);
      if (held % panel && held % panel <= lanes)  // the other half of the last panel
        pack_along<T>(keys, a.key.row_stride, 0, a.width, packed_keys + held / panel * key_units * panel + lanes);
      for (int64_t c = 0; c < value_panels * panel; c += lanes)
        pack_across<T>([&](int64_t k) { return values + (block + k) * a.value.row_stride + c; },
                       int(least(lanes, c < a.value_width ? a.value_width - c : 0)), held,
                       packed_values + c / panel * value_units * panel + c % panel, panel);
      in_blocks(count, kMostRows, [&](int64_t start, int64_t size) {
        const KeysOf all = keys_of(own_keys, start, size);
        const int64_t seen = least(held, all.end - block);
        const int64_t from = all.start > block ? (all.start - block) / panel * panel : 0;
        if (seen <= from) return;
        for (int64_t p = from / panel; p < ceil_div(seen, panel); ++p)
          panel_tile<T>(size, left.data + start * left.stride, left.stride, 1, packed_keys + p * key_units * panel,
                        key_units, tiles + p * kMostRows * panel);
        for (int64_t i = 0; i < size; ++i) {
          const int64_t r = start + i, own = least(seen, own_keys[r].end - block);
          const bool* mask = a.mask ? a.mask + b * a.mask_batch_stride + query_of(r) * a.mask_row_stride + block : nullptr;
          const Scores<T> scores{tiles, from, own, ceil_div(seen, lanes) * lanes, mask, A(a.scale)};
          const A found = scale_row<T>(scores, i), most = found > top[r] ? found : top[r];
          const A more = share_row<T>(scores, i, most, reinterpret_cast<Share*>(shares + i * share_stride));
          if (total[r] != 0) {
            const V before = exponential(broadcast(top[r]) - most);
            total[r] *= before[0];
            for (int64_t c = 0; c < value_panels * panel; c += lanes) {
              A* at = sums + start * value_panels * panel + c / panel * size * panel + i * panel + c % panel;
              store(at, load(at) * before);
            }
          }
          total[r] += more;
          top[r] = most;
        }
        for (int64_t p = 0; p < value_panels; ++p)
          panel_tile<T>(size, shares + units<T>(from), share_stride, 1,
                        packed_values + (p * value_units + units<T>(from)) * panel, units<T>(seen - from),
                        sums + start * value_panels * panel + p * size * panel, {}, true);
      });
    }
    in_blocks(count, kMostRows, [&](int64_t start, int64_t size) {
      for (int64_t i = 0; i < size; ++i) {
        const int64_t r = start + i;
        if (a.log_sums)
          static_cast<A*>(a.log_sums)[(b * a.heads + head_of(r)) * a.queries + query_of(r)] =
              total[r] == 0 ? A(0) : top[r] + A(__builtin_log(total[r]));
        T* to = static_cast<T*>(a.out) + ((b * a.queries + query_of(r)) * a.heads + head_of(r)) * a.value_width;
        for (int64_t c = 0; c < a.value_width; c += lanes) {
          const A* from = sums + start * value_panels * panel + c / panel * size * panel + i * panel + c % panel;
          // a query that sees no key has no sums; NaN is none, and stays
          store_some(to + c, total[r] == 0 ? V{} : load(from) / total[r], int(least(lanes, a.value_width - c)));
        }
      }
    });
  });
}

}  // namespace
}  // namespace omnimoe::cpu::OMNIMOE_ISA
