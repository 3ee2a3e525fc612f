// Compile-time mistakes, answered in one sentence each, before a layer is instantiated.
#pragma once

#include <concepts>
#include <type_traits>

#include "steelyard/balance/policy.hpp"
#include "steelyard/balance/traits.hpp"
#include "steelyard/comm/concept.hpp"
#include "steelyard/comm/self.hpp"
#include "steelyard/expert/concept.hpp"
#include "steelyard/layer/memory.hpp"
#include "steelyard/layer/retention.hpp"
#include "steelyard/ops/memory_ops.hpp"
#include "steelyard/plan/overflow.hpp"
#include "steelyard/router/concept.hpp"

namespace steelyard {

/// One sentence for each thing that a policy lacks. `diagnose` says them and tells whether there was nothing to say;
/// the layer of an unsound set of policies is empty (layer/unsound.hpp), so that no follow-on errors bury them. They
/// stand in functions, because clang++ drops a class whose static_assert fails and then complains of its absence.
template <class RouterT>
struct RouterDiagnosis {
    static constexpr bool has_top_k = requires(const RouterT& router, const LayerShape& shape) {
        { router.top_k(shape) } -> std::same_as<int>;
    }
    || requires { typename RouterT::template Mixture<void>; };
    static constexpr bool has_check = requires(const RouterT& router, const LayerShape& shape) {
        { router.check(shape) } -> std::same_as<Status>;
    };
    static constexpr bool has_params = requires { typename RouterT::template Params<float, HostSpace>; };
    /// A router with a mixture of its own is asked for its tensors and options only.
    static constexpr bool has_mixture = requires { typename RouterT::template Mixture<void>; };
    static constexpr bool meets_concept = !(has_top_k && has_check && has_params) || Router<RouterT> ||
                                          (has_mixture && std::equality_comparable<RouterT>);
    static constexpr bool sound = has_top_k && has_check && has_params && meets_concept;

    static constexpr bool diagnose() {
        static_assert(
            has_top_k,
            "steelyard: Router must provide `int top_k(const LayerShape&) const`: see docs/policies/router.md");
        static_assert(has_check,
                      "steelyard: Router must provide `Status check(const LayerShape&) const`: see "
                      "docs/policies/router.md");
        static_assert(has_params,
                      "steelyard: Router must provide `template <class T, class Space> struct Params`: see "
                      "docs/policies/router.md");
        static_assert(meets_concept,
                      "steelyard: Router must provide `route`, `backward`, `scratch_bytes` and `==` as the concept "
                      "Router says: see docs/policies/router.md");
        return sound;
    }
};

template <class ExpertT>
struct ExpertDiagnosis {
    static constexpr bool has_check = requires(const ExpertT& expert, const LayerShape& shape) {
        { expert.check(shape) } -> std::same_as<Status>;
    };
    static constexpr bool has_params = requires { typename ExpertT::template Params<float, HostSpace>; };
    static constexpr bool has_rows = requires {
        typename ExpertT::template Kept<float, HostSpace>;
        typename ExpertT::template Work<float, HostSpace>;
    };
    static constexpr bool meets_concept = !(has_check && has_params && has_rows) || Expert<ExpertT>;
    static constexpr bool sound = has_check && has_params && has_rows && meets_concept;

    static constexpr bool diagnose() {
        static_assert(has_check,
                      "steelyard: Expert must provide `Status check(const LayerShape&) const`: see "
                      "docs/policies/expert.md");
        static_assert(has_params,
                      "steelyard: Expert must provide `template <class T, class Space> struct Params`: see "
                      "docs/policies/expert.md");
        static_assert(has_rows,
                      "steelyard: Expert must provide the bundles `Kept` and `Work`: see docs/policies/expert.md");
        static_assert(meets_concept,
                      "steelyard: Expert must provide `forward`, `backward`, `scratch_bytes` and `==` as the concept "
                      "Expert says: see docs/policies/expert.md");
        return sound;
    }
};

template <class BalanceT>
struct BalanceDiagnosis {
    static constexpr bool is_objective = Objective<BalanceT>;
    static constexpr bool is_policy = BalancePolicy<BalanceT>;
    static constexpr bool sound = !is_objective && is_policy;

    static constexpr bool diagnose() {
        static_assert(!is_objective,
                      "steelyard: an objective needs a scope: write Balance<MicroBatch, Objective>: see "
                      "docs/policies/balance.md");
        static_assert(is_objective || is_policy,
                      "steelyard: BalancePolicy must be Balance<Scope, Objective>, AllOf<...>, Scheduled<...> or meet "
                      "the concept BalancePolicy: see docs/policies/balance.md");
        return sound;
    }
};

template <class T, class RouterT, class ExpertT, class BalanceT, class CommT, class OverflowT, class RetentionT,
          class DeviceT>
struct LayerDiagnosis {
    /// float or double, or what the device says that it has: `template <class T> static constexpr bool has_element`.
    static constexpr bool element = [] {
        if constexpr (requires { DeviceT::template has_element<T>; })
            return bool(DeviceT::template has_element<T>);
        else
            return std::is_same_v<T, float> || std::is_same_v<T, double>;
    }();
    static constexpr bool comm = CommBackend<CommT>;
    static constexpr bool overflow = Overflow<OverflowT>;
    static constexpr bool retention = Retention<RetentionT>;
    static constexpr bool device = requires(const DeviceT& value) {
        typename DeviceT::space;
        { value.check() } -> std::same_as<Status>;
    };

    /// Policies that are sound alone may not fit together.
    static constexpr bool diagnose_together() {
        using Routed = MixtureOf<
            MixtureTypes<T, RouterT, OverflowT, typename ExpertParts<ExpertT>::Routed, DeviceT, RetentionT::keeps>>;
        constexpr bool balances = Routed::has_routing || std::is_same_v<BalanceT, NoBalance>;
        constexpr bool drops = Routed::takes_overflow || !OverflowT::drops;
        constexpr bool load = !BalanceTraits<BalanceT>::needs_smooth_load || RouterTraits<RouterT>::has_smooth_load;
        static_assert(balances,
                      "steelyard: this router chooses no experts, so there is nothing to balance: use NoBalance");
        static_assert(drops, "steelyard: this router chooses no experts, so there is nothing to drop: use Dropless");
        static_assert(load,
                      "steelyard: this balance acts on a smooth load, which the router does not have: use NoisyTopK");
        return balances && drops && load;
    }

    static constexpr bool diagnose() {
        static_assert(
            element,
            "steelyard: the element type of a layer is float or double on the CPU, float or bf16 on the CUDA device");
        static_assert(comm,
                      "steelyard: CommBackend must provide rank, size, begin_sum and end_sum: see "
                      "docs/policies/comm.md");
        static_assert(overflow,
                      "steelyard: Overflow must provide `static constexpr bool drops`, `check`, `==` and, where it "
                      "drops, `scratch_bytes` and `admit`: see docs/policies/overflow.md");
        static_assert(retention, "steelyard: Retention is KeepActivations or RecomputeActivations");
        static_assert(device,
                      "steelyard: Device must name its memory `space` and provide `Status check() const`: see "
                      "docs/policies/device.md");
        RouterDiagnosis<RouterT>::diagnose();
        ExpertDiagnosis<typename ExpertParts<ExpertT>::Routed>::diagnose();
        ExpertDiagnosis<typename ExpertParts<ExpertT>::Shared>::diagnose();
        RouterDiagnosis<typename ExpertParts<ExpertT>::Gate>::diagnose();
        BalanceDiagnosis<BalanceT>::diagnose();
        constexpr bool alone = element && comm && overflow && retention && device && RouterDiagnosis<RouterT>::sound &&
                               ExpertDiagnosis<typename ExpertParts<ExpertT>::Routed>::sound &&
                               ExpertDiagnosis<typename ExpertParts<ExpertT>::Shared>::sound &&
                               RouterDiagnosis<typename ExpertParts<ExpertT>::Gate>::sound &&
                               BalanceDiagnosis<BalanceT>::sound;
        if constexpr (alone) return diagnose_together();
        return false;
    }
};

}  // namespace steelyard
