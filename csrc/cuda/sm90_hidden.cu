// The first product of the experts' network with its activation, on Hopper.
#include "sm90_host.h"

namespace omnimoe::cuda::sm90 {
namespace {

int64_t wide_of(const Hidden& c) { return c.is_gated ? 2 * c.width : c.width; }
Operand rows_of(const Hidden& c) { return operand_of(c.x, c.hidden, c.groups, c.h); }
Operand bank_of(const Hidden& c) {
  return {c.w_in.data, c.hidden, wide_of(c), c.w_in.row_stride, c.groups.count, c.w_in.copy_stride};
}

template <class T, Layout kLayout>
void run_layout(const Hidden& c, const Queue& queue) {
  const int64_t columns = kLayout == Layout::pairs ? 2 * c.width : c.width;
  const Problem p{
      c.groups.ends, int(c.groups.count), int(c.groups.rows), int(c.hidden), 0, int(columns), gathered_of(c.x), false};
  launch_kernel<FirstProduct<T, kLayout>>(queue, c.type, rows_of(c), bank_of(c), p,
                                          {c.b_in, c.z, c.h, int(c.width), c.activation});
}

}  // namespace

const char* why_not(const Hidden& c) {
  if (c.x.index && why_not_gather()) return why_not_gather();
  if (c.w_in.is_flipped) return "the Hopper kernels take w_in with its columns side by side";
  if (const char* reason = why_not_any(c.type, c.groups, wide_of(c))) return reason;
  if (c.hidden < 1) return "there is nothing to sum";
  if (c.width % 8) return "the Hopper kernels store 8 columns at once";
  if (!is_aligned(c.z, 16) || !is_aligned(c.h, 16) || !is_aligned(c.b_in, 4))
    return "results or biases are not aligned";
  const char* reason = why_not_fetch(rows_of(c));
  return reason ? reason : why_not_fetch(bank_of(c));
}

void run(const Hidden& c, const Queue& queue) {
  if (!c.groups.rows) return;
  by_type(c.type, [&](auto t) {
    using T = decltype(t);
    if (!c.is_gated)
      run_layout<T, Layout::plain>(c, queue);
    else if (c.is_interleaved)
      run_layout<T, Layout::pairs>(c, queue);
    else
      run_layout<T, Layout::halves>(c, queue);
  });
}

}  // namespace omnimoe::cuda::sm90
