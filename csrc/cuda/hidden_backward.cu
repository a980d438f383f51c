// Backward through the second product of the experts' network and the activation.
#include "product.h"

namespace omnimoe::cuda {

void run(const HiddenBackward& p, const Queue& queue) {
  with_type(p.type, [&](auto zero) {
    using T = decltype(zero);
    using W = Wide<T>;
    const StoreBackward<T> epilogue{{p.width, p.activation, p.is_gated, p.is_interleaved},
                                    static_cast<const T*>(p.z),
                                    static_cast<const W*>(p.weights),
                                    static_cast<T*>(p.grad_z),
                                    static_cast<T*>(p.h),
                                    static_cast<W*>(p.shares)};
    // the product runs over the rows of W_out, so its lines run across unless it is flipped
    choose_product<T>(p.groups, p.grad, p.w_out, !p.w_out.is_flipped, 0, p.hidden, ceil_of(p.width, kColumns), epilogue,
                      queue);
  });
}

}  // namespace omnimoe::cuda
