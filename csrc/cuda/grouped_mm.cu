// The grouped product and the gradient of a bank.
#include "product.h"

namespace omnimoe::cuda {

void run(const Product& p, const Queue& queue) {
  with_type(p.type, [&](auto zero) {
    using T = decltype(zero);
    const StoreProduct<T> epilogue{p.columns, static_cast<const T*>(p.bias), static_cast<const Wide<T>*>(p.scale),
                                   static_cast<T*>(p.out)};
    choose_product<T>(p.groups, p.x, p.weight, p.weight.is_flipped, 0, p.depth, ceil_of(p.columns, kColumns), epilogue,
                      queue);
  });
}

void run(const Wgrad& p, const Queue& queue) {
  const auto with = [&](auto loop) {
    using Loop = decltype(loop);
    using T = typename Loop::T;
    const int64_t tiles = p.groups.count * ceil_of(p.columns, Loop::kRows) * ceil_of(p.depth, kColumns);
    launch(wgrad_kernel<Loop>, {blocks_for(queue, tiles), kThreads, Loop::kSharedBytes}, queue.stream, p.groups,
           lines_of<T>(p.dy), lines_of<T>(p.x), p.columns, p.depth, static_cast<T*>(p.out));
  };
  with_type(p.type, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2)
      with(TensorLoop<T, 128, true, true>{});
    else
      with(PlainLoop<T, true, true>{});
  });
}

}  // namespace omnimoe::cuda
