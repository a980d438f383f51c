// The first product of the experts' network, with its activation.
#include "product.h"

namespace omnimoe::cuda {

void run(const Hidden& p, const Queue& queue) {
  with_type(p.type, [&](auto zero) {
    using T = decltype(zero);
    const StoreHidden<T> epilogue{{p.width, p.activation, p.is_gated, p.is_interleaved},
                                  static_cast<const T*>(p.b_in),
                                  static_cast<T*>(p.z),
                                  static_cast<T*>(p.h)};
    const int64_t second = p.is_gated && !p.is_interleaved && p.w_in.is_flipped ? p.width : 0;
    choose_product<T>(p.groups, p.x, p.w_in, p.w_in.is_flipped, second, p.hidden,
                      ceil_of(p.width, p.is_gated ? kColumns / 2 : kColumns), epilogue, queue);
  });
}

}  // namespace omnimoe::cuda
