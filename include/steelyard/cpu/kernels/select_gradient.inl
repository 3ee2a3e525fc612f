// The gradient of selection: what select.inl is for the logits.
namespace part {

/// dlogits of one block of tokens: see token_backward (router_token.hpp) for the formulas.
template <class T>
class SelectionGradient {
    using vec = typename Simd<T>::vec;
    static constexpr int lanes = Simd<T>::lanes;

    const SelectCall<T>& call_;
    const RoutingGrad<T>& grad_;
    const index_t experts_;
    const bool sigmoid_, weights_are_probs_;

public:
    SelectionGradient(const SelectCall<T>& call, const RoutingGrad<T>& grad)
        : call_(call),
          grad_(grad),
          experts_(call.routing.logits.extents[1]),
          sigmoid_(call.rule.score == Score::sigmoid),
          weights_are_probs_(!sigmoid_ && call.rule.weight == GateWeight::score) {}

    void run(index_t begin, int count) const {
        alignas(vector_bytes) T mean[lanes] = {};
        if (grad_.probs.present()) {
            vec sums[lanes] = {};
            for (int l = 0; l < count; ++l)
                if (valid(begin + l)) sums[l] = product(begin + l);
            store(mean, sum_rows<T>(sums));
        }
        for (int l = 0; l < count; ++l) {
            const index_t t = begin + l;
            T* const out = &grad_.logits(t, 0);
            if (!valid(t)) {
                for (index_t j = 0; j < experts_; j += lanes) store_some(out + j, vec{}, experts_ - j);
                continue;
            }
            const ChosenGradient chosen = gradient_of_chosen(t);
            add_row(t, mean[l] + (weights_are_probs_ ? chosen.sum : T(0)), out);
            add_chosen(t, chosen.centre, out);
        }
    }

private:
    [[nodiscard]] bool valid(index_t t) const { return !call_.mask.present() || call_.mask[t] != 0; }

    /// Partial sums of p dp.
    [[nodiscard]] vec product(index_t t) const {
        vec sum = {};
        const T *const p = &call_.routing.probs(t, 0), *const dp = &grad_.probs(t, 0);
        for (index_t j = 0; j < experts_; j += lanes)
            sum += load_some<T>(p + j, experts_ - j) * load_some<T>(dp + j, experts_ - j);
        return sum;
    }

    struct ChosenGradient {
        T sum, centre;  // sum of w dw, around the first where weights are renormalised; and the centre of dw
    };
    [[nodiscard]] ChosenGradient gradient_of_chosen(index_t t) const {
        if (!grad_.weight.present()) return {T(0), T(0)};
        const bool renormalized = call_.rule.weight == GateWeight::renormalized;
        const index_t top_k = call_.routing.expert.extents[1];
        const expert_t* const expert = &call_.routing.expert(t, 0);
        const T *const weight = &call_.routing.weight(t, 0), *const dweight = &grad_.weight(t, 0);
        T first = 0, sum = 0;
        index_t k = 0;
        while (renormalized && k < top_k && expert[k] < 0) ++k;
        if (renormalized && k < top_k) first = dweight[k];
        for (k = 0; k < top_k; ++k)
            if (expert[k] >= 0) sum += weight[k] * (dweight[k] - first);
        return {sum, renormalized ? first + sum / static_cast<T>(call_.rule.scale) : T(0)};
    }

    /// dlogits += p (dp - mean), times dl/dz.
    void add_row(index_t t, T mean, T* out) const {
        const bool with_probs = grad_.probs.present();
        if (!with_probs && (!weights_are_probs_ || !grad_.weight.present())) return;
        const T *const p = &call_.routing.probs(t, 0), *const z = &call_.routing.logits(t, 0);
        const T* const dp = with_probs ? &grad_.probs(t, 0) : nullptr;
        for (index_t j = 0; j < experts_; j += lanes) {
            const index_t n = experts_ - j;
            vec slope = vec{} - mean;
            if (with_probs) slope = load_some<T>(dp + j, n) - mean;
            slope *= load_some<T>(p + j, n);
            if (sigmoid_) slope *= shifted_sigmoid<T>(-load_some<T>(z + j, n), vec{});
            store_some(out + j, load_some<T>(out + j, n) + slope, n);
        }
    }

    void add_chosen(index_t t, T centre, T* out) const {
        if (!grad_.weight.present()) return;
        const expert_t* const expert = &call_.routing.expert(t, 0);
        const T *const weight = &call_.routing.weight(t, 0), *const dweight = &grad_.weight(t, 0);
        for (index_t k = 0; k < call_.routing.expert.extents[1]; ++k) {
            const index_t e = expert[k];
            if (e < 0) continue;
            out[e] += weight[k] * (dweight[k] - centre) * (sigmoid_ ? cpu::sigmoid(-call_.routing.logits(t, e)) : T(1));
        }
    }
};

}  // namespace part
