// grouped_mm and grouped_wgrad on Hopper.
#include "sm90_host.h"

namespace omnimoe::cuda::sm90 {
namespace {

Operand rows_of(const Product& c) { return operand_of(c.x, c.depth, c.groups, c.out); }
Operand bank_of(const Product& c) {
  const Bank& w = c.weight;
  return {w.data,
          w.is_flipped ? c.columns : c.depth,
          w.is_flipped ? c.depth : c.columns,
          w.row_stride,
          c.groups.count,
          w.copy_stride};
}

template <class T, int kTileColumns, bool kIsAcross>
void run_product(const Product& c, const Queue& queue) {
  const Problem p{
      c.groups.ends, int(c.groups.count), int(c.groups.rows), int(c.depth), 0, int(c.columns), gathered_of(c.x), false};
  launch_kernel<Plain<T, kTileColumns, false, kIsAcross>>(queue, c.type, rows_of(c), bank_of(c), p,
                                                          {c.bias, static_cast<const float*>(c.scale), c.out});
}

}  // namespace

const char* why_not(const Product& c) {
  if (c.x.index && why_not_gather()) return why_not_gather();
  if (const char* reason = why_not_any(c.type, c.groups, c.columns)) return reason;
  if (c.depth < 1) return "there is nothing to sum";
  if (!is_aligned(c.out, 16) || !is_aligned(c.bias, 4)) return "results or biases are not aligned";
  const char* reason = why_not_fetch(rows_of(c));
  return reason ? reason : why_not_fetch(bank_of(c));
}

void run(const Product& c, const Queue& queue) {
  if (!c.groups.rows) return;
  // narrow tiles where wide ones would leave multiprocessors without work
  const int64_t high = c.groups.rows / 128 + (c.groups.count < c.groups.rows ? c.groups.count : c.groups.rows);
  const bool is_narrow = c.columns <= 128 || high * ((c.columns + 255) / 256) < queue.multiprocessors;
  by_type(c.type, [&](auto t) {
    using T = decltype(t);
    if (c.weight.is_flipped)
      is_narrow ? run_product<T, 128, true>(c, queue) : run_product<T, 256, true>(c, queue);
    else
      is_narrow ? run_product<T, 128, false>(c, queue) : run_product<T, 256, false>(c, queue);
  });
}

const char* why_not(const Wgrad& c) {
  if (c.dy.index && c.x.index) return "the Hopper kernels gather one operand";
  if ((c.dy.index || c.x.index) && why_not_gather()) return why_not_gather();
  if (const char* reason = why_not_any(c.type, c.groups, c.depth)) return reason;
  if (c.columns < 1) return "an operand is empty";
  if (c.groups.count * ((c.columns + 127) / 128) * ((c.depth + 127) / 128) >= int64_t{1} << 30)
    return "there are too many tiles";
  if (!is_aligned(c.out, 16)) return "results are not aligned";
  const char* reason = why_not_fetch(operand_of(c.dy, c.columns, c.groups, c.out));
  return reason ? reason : why_not_fetch(operand_of(c.x, c.depth, c.groups, c.out));
}

void run(const Wgrad& c, const Queue& queue) {
  const Problem p{c.groups.ends,
                  int(c.groups.count),
                  int(c.groups.rows),
                  0,
                  int(c.columns),
                  int(c.depth),
                  gathered_of(c.x.index ? c.x : c.dy),
                  c.x.index != nullptr};
  by_type(c.type, [&](auto t) {
    launch_kernel<Plain<decltype(t), 256, true, true>>(queue, c.type, operand_of(c.dy, c.columns, c.groups, c.out),
                                                       operand_of(c.x, c.depth, c.groups, c.out), p,
                                                       {nullptr, nullptr, c.out});
  });
}

}  // namespace omnimoe::cuda::sm90
