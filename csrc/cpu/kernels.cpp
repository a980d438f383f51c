// The kernels of one instruction set. Compiled once for each; see vector.h.
#include "kernels.h"

#include "attend.h"
#include "attend_backward.h"
#include "experts.h"
#include "norm.h"
#include "products.h"
#include "scan.h"
#include "sums.h"

namespace omnimoe::cpu::OMNIMOE_ISA {
namespace {

template <class Call, class F>
void by_type(const Call& call, Type type, const F& f) {
  switch (type) {
    case Type::f32:
      return f(float{}, call);
    case Type::f64:
      return f(double{}, call);
    case Type::bf16:
      return f(BFloat16{}, call);
    case Type::f16:
      return f(Float16{}, call);
  }
}

}  // namespace

extern const Kernels kernels = {
    [](const GroupedMM& a) { by_type(a, a.type, [](auto t, const auto& c) { grouped_mm<decltype(t)>(c); }); },
    [](const GroupedWgrad& a) { by_type(a, a.type, [](auto t, const auto& c) { grouped_wgrad<decltype(t)>(c); }); },
    [](const ExpertsMLP& a) { by_type(a, a.type, [](auto t, const auto& c) { experts_mlp<decltype(t)>(c); }); },
    [](const ExpertsMLPBackward& a) {
      by_type(a, a.forward.type, [](auto t, const auto& c) { experts_mlp_backward<decltype(t)>(c); });
    },
    [](const SumRows& a) { by_type(a, a.type, [](auto t, const auto& c) { sum_rows<decltype(t)>(c); }); },
    [](const RMSNorm& a) { by_type(a, a.type, [](auto t, const auto& c) { rms_norm<decltype(t)>(c); }); },
    [](const RMSNormBackward& a) {
      by_type(a, a.forward.type, [](auto t, const auto& c) { rms_norm_backward<decltype(t)>(c); });
    },
    [](const Rope& a) { by_type(a, a.type, [](auto t, const auto& c) { rope<decltype(t)>(c); }); },
    [](const Attend& a) { by_type(a, a.type, [](auto t, const auto& c) { attend<decltype(t)>(c); }); },
    [](const AttendBackward& a) {
      by_type(a, a.forward.type, [](auto t, const auto& c) { attend_backward<decltype(t)>(c); });
    },
    [](const Scan& a) { a.type == Type::f64 ? scan<double>(a) : scan<float>(a); },
    [](const ScanBackward& a) { a.forward.type == Type::f64 ? scan_backward<double>(a) : scan_backward<float>(a); },
};

}  // namespace omnimoe::cpu::OMNIMOE_ISA
