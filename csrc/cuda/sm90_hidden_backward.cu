// Backward through the second product and the activation of the experts' network, on Hopper.
#include "sm90_host.h"

namespace omnimoe::cuda::sm90 {
namespace {

Operand rows_of(const HiddenBackward& c) { return operand_of(c.grad, c.hidden, c.groups, c.h); }
Operand bank_of(const HiddenBackward& c) {
  return {c.w_out.data, c.width, c.hidden, c.w_out.row_stride, c.groups.count, c.w_out.copy_stride};
}

}  // namespace

const char* why_not(const HiddenBackward& c) {
  if (c.grad.index && why_not_gather()) return why_not_gather();
  if (c.w_out.is_flipped) return "the Hopper kernels take w_out with its columns side by side";
  if (const char* reason = why_not_any(c.type, c.groups, c.width)) return reason;
  if (c.hidden < 1) return "there is nothing to sum";
  if (!is_aligned(c.z, 16) || !is_aligned(c.grad_z, 16) || !is_aligned(c.h, 16)) return "results are not aligned";
  const char* reason = why_not_fetch(rows_of(c));
  return reason ? reason : why_not_fetch(bank_of(c));
}

void run(const HiddenBackward& c, const Queue& queue) {
  if (!c.groups.rows) return;
  const Problem p{
      c.groups.ends, int(c.groups.count), int(c.groups.rows), int(c.hidden), 0, int(c.width), gathered_of(c.grad),
      false};
  by_type(c.type, [&](auto t) {
    launch_kernel<SecondProductBackward<decltype(t)>>(
        queue, c.type, rows_of(c), bank_of(c), p,
        {c.z, static_cast<const float*>(c.weights), c.grad_z, c.h, static_cast<float*>(c.shares),
         int(shares_of(c.width)), c.activation, c.is_gated, c.is_interleaved});
  });
}

}  // namespace omnimoe::cuda::sm90
