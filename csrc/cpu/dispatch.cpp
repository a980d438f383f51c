// Chooses the instruction set, once, when the kernels are first used. OMNIMOE_CPU names a lesser one.
#include "dispatch.h"

#include <cstdlib>
#include <cstring>

namespace omnimoe::cpu {

namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512bf16 {
extern const Kernels kernels;
}

namespace {

struct Set {
  const char* name;
  const Kernels* kernels;
  bool is_there;
};

Set choose() {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const Set sets[] = {
      {"avx512bf16", &avx512bf16::kernels, avx512 && __builtin_cpu_supports("avx512bf16")},
      {"avx512", &avx512::kernels, avx512},
      {"avx2", &avx2::kernels, avx2},
  };
  const char* wanted = std::getenv("OMNIMOE_CPU");
  bool may_take = !wanted || !*wanted;
  for (const Set& set : sets) {
    may_take = may_take || !std::strcmp(wanted, set.name);
    if (may_take && set.is_there) return set;
  }
  return {"none", nullptr, false};
}

const Set& chosen() {
  static const Set set = choose();
  return set;
}

}  // namespace

const Kernels* kernels() { return chosen().kernels; }
const char* kernels_name() { return chosen().name; }

}  // namespace omnimoe::cpu
