// Selection: from rows of logits to experts and weights, a block of tokens at once.
//
// Where experts are compared with each other, a token has a lane: maxima, ordered lists and sums are then the same
// few instructions for all tokens of a block, and nothing goes across a register. Where each expert stands alone (the
// exponentials) a register holds neighbouring experts of one token, as memory does. A transposition leads from one to
// the other. No lane sees another, so a token's bits depend on its own logits alone.
namespace part {

/// Rows of tokens, one for each lane. Lanes without a token of their own read the last one's, and are not written.
template <class T>
struct TokenRows {
    static constexpr int lanes = Simd<T>::lanes;
    const T* logits[lanes];
    T* probs[lanes];
    bool valid[lanes];
};

/// Selection of one block: as many tokens as a register has lanes.
template <class T>
class Selection {
    using vec = typename Simd<T>::vec;
    using index = typename Simd<T>::bits;
    static constexpr int lanes = Simd<T>::lanes;

    const SelectCall<T>& call_;
    const SelectionRule& rule_;
    const index_t experts_, top_k_, begin_;
    const int count_;
    const SelectColumns<T>& scratch_;
    TokenRows<T> rows_;
    vec highest_, shift_, inverse_;  // of each token: largest logit, what is taken off it, 1 / sum of numerators
    Chosen<T> chosen_;

public:
    Selection(const SelectCall<T>& call, index_t begin, int count, const SelectColumns<T>& scratch)
        : call_(call),
          rule_(call.rule),
          experts_(call.routing.logits.extents[1]),
          top_k_(call.routing.expert.extents[1]),
          begin_(begin),
          count_(count),
          scratch_(scratch) {
        for (int l = 0; l < lanes; ++l) {
            const index_t t = begin + (l < count ? l : count - 1);
            rows_.logits[l] = &call.routing.logits(t, 0);
            rows_.probs[l] = &call.routing.probs(t, 0);
            rows_.valid[l] = l < count && (!call.mask.present() || call.mask[t] != 0);
        }
    }

    /// Bit l: the logits of valid token l are not all finite, and nothing that was written for it means anything.
    std::uint64_t run() {
        const bool biased = call_.choose && call_.bias.present();
        const bool grouped = call_.choose && rule_.kept_groups < rule_.groups;
        const std::uint64_t bad = transpose_logits();
        numerators();
        if (call_.choose) {
            if (biased) biased_values();
            if (grouped) keep_groups(rule_, biased, experts_, scratch_.value.data, scratch_.group.data);
            choose_experts();
            weigh(biased);
        } else {
            take_given();
            weigh(true);
        }
        normalize();
        return bad;
    }

private:
    /// Logits into columns, with the largest of each token.
    std::uint64_t transpose_logits() {
        T* const values = scratch_.value.data;
        vec column[lanes], nothing = {}, highest = vec{} - std::numeric_limits<T>::infinity();
        for (index_t j = 0; j < experts_; j += lanes) {
            const index_t n = experts_ - j < lanes ? experts_ - j : lanes;
            load_columns<T>(rows_.logits, j, n, column);
#pragma GCC unroll 16
            for (int i = 0; i < lanes; ++i) {
                if (i >= n) break;
                store(values + (j + i) * lanes, column[i]);
                highest = largest<T>(highest, column[i]);
                nothing += column[i] * T(0);  // NaN from whatever is not finite
            }
        }
        highest_ = highest;
        for (index_t e = experts_; e < padded<T>(experts_); ++e)
            store(values + e * lanes, vec{} - std::numeric_limits<T>::infinity());
        shift_ = rule_.score == Score::softmax ? highest_ : smallest<T>(highest_, vec{});
        const auto wrong = nothing != nothing;
        std::uint64_t bad = 0;
        if (any(wrong))
            for (int l = 0; l < lanes; ++l)
                if (wrong[l] != 0 && rows_.valid[l]) bad |= std::uint64_t{1} << l;
        return bad;
    }

    /// probs = numerators of the probabilities, not yet divided by their sum.
    void numerators() {
        alignas(vector_bytes) T shift[lanes];
        store(shift, shift_);
        vec sums[lanes];
        for (int l = 0; l < lanes; ++l) {
            if (!rows_.valid[l]) {
                sums[l] = vec{} + T(1);
                continue;
            }
            const T* const z = rows_.logits[l];
            T* const out = rows_.probs[l];
            const vec from = vec{} + shift[l], none = vec{} - std::numeric_limits<T>::infinity();
            vec sum = {};
            index_t j = 0;
            if (rule_.score == Score::softmax) {
#pragma GCC unroll 4
                for (; j + lanes <= experts_; j += lanes) {
                    const vec v = exp_score<T>(load(z + j) - from);
                    store(out + j, v);
                    sum += v;
                }
                if (j < experts_) {
                    const vec v = exp_score<T>(load_some<T>(z + j, experts_ - j, none) - from);
                    store_some(out + j, v, experts_ - j);
                    sum += v;
                }
            } else if (shift[l] == T(0)) {
                for (; j < experts_; j += lanes) {
                    const vec v = load_some<T>(z + j, experts_ - j, none);
                    const vec small = exp_score<T>(v < vec{} ? v : -v);
                    const vec s = (v < vec{} ? small : vec{} + T(1)) / (small + T(1));
                    store_some(out + j, s, experts_ - j);
                    sum += s;
                }
            } else {
                for (; j < experts_; j += lanes) {
                    const vec s = shifted_sigmoid<T>(load_some<T>(z + j, experts_ - j, none), from);
                    store_some(out + j, s, experts_ - j);
                    sum += s;
                }
            }
            sums[l] = sum;
        }
        inverse_ = T(1) / sum_rows<T>(sums);
    }

    /// Columns of s + bias.
    void biased_values() {
        T* const values = scratch_.value.data;
        const vec factor = rule_.score == Score::softmax ? inverse_ : exp_score<T>(shift_);
        vec column[lanes];
        for (index_t j = 0; j < experts_; j += lanes) {
            const index_t n = experts_ - j < lanes ? experts_ - j : lanes;
            load_columns<T>(rows_.probs, j, n, column);
            for (index_t i = 0; i < n; ++i)
                store(values + (j + i) * lanes, column[i] * factor + static_cast<T>(call_.bias[j + i]));
        }
    }

    void choose_experts() {
        const T* const values = scratch_.value.data;
        const int top_k = rule_.top_k;
        if (top_k <= 2)
            choose<T, 2>(values, experts_, chosen_);
        else if (top_k <= 4)
            choose<T, 4>(values, experts_, chosen_);
        else if (top_k <= 8)
            choose<T, 8>(values, experts_, chosen_);
        else
            choose<T, 16>(values, experts_, chosen_);
        break_ties(values, experts_, top_k, chosen_);
    }

    /// The choices that are there already; -1 for lanes without a token.
    void take_given() {
        for (int k = 0; k < top_k_; ++k) {
            alignas(vector_bytes) std::uint32_t at[lanes];
            for (int l = 0; l < lanes; ++l)
                at[l] = static_cast<std::uint32_t>(rows_.valid[l] ? call_.routing.expert(begin_ + l, k) : -1);
            std::memcpy(&chosen_.expert[k], at, sizeof at);
        }
    }

    /// chosen_.value = combine weights. They hold the logits of the choices already, or these are gathered.
    void weigh(bool gather) {
        const vec lowest = vec{} - std::numeric_limits<T>::infinity();
        if (gather)
            for (int k = 0; k < top_k_; ++k) {
                alignas(vector_bytes) std::uint32_t at[lanes];
                alignas(vector_bytes) T z[lanes];
                std::memcpy(at, &chosen_.expert[k], sizeof at);
                for (int l = 0; l < lanes; ++l)
                    z[l] = static_cast<std::int32_t>(at[l]) < 0 ? -std::numeric_limits<T>::infinity()
                                                                : rows_.logits[l][at[l]];
                chosen_.value[k] = load(z);
            }
        const T scale = static_cast<T>(rule_.scale);
        const bool sigmoid = rule_.score == Score::sigmoid;
        if (rule_.weight == GateWeight::renormalized) {
            vec most = lowest, sum = {};
            for (int k = 0; k < top_k_; ++k) most = largest<T>(most, chosen_.value[k]);
            const vec from = sigmoid ? smallest<T>(most, vec{}) : most;
            for (int k = 0; k < top_k_; ++k) {
                const vec z = chosen_.value[k];
                sum += chosen_.value[k] = sigmoid ? shifted_sigmoid<T>(z, from) : exp_score<T>(z - from);
            }
            // Where nobody was chosen the sum means nothing.
            for (int k = 0; k < top_k_; ++k)
                chosen_.value[k] = most > lowest ? scale * (chosen_.value[k] / sum) : vec{};
        } else if (sigmoid) {
            for (int k = 0; k < top_k_; ++k) chosen_.value[k] = scale * shifted_sigmoid<T>(chosen_.value[k], vec{});
        } else {
            for (int k = 0; k < top_k_; ++k)
                chosen_.value[k] = scale * (exp_score<T>(chosen_.value[k] - highest_) * inverse_);
        }
        write_choices();
    }

    void write_choices() {
        alignas(vector_bytes) T weight[select_choices][lanes];
        alignas(vector_bytes) expert_t expert[select_choices][lanes];
        for (int k = 0; k < top_k_; ++k) {
            store(weight[k], chosen_.value[k]);
            std::memcpy(expert[k], &chosen_.expert[k], sizeof expert[k]);
        }
        for (int l = 0; l < count_; ++l) {
            expert_t* const to_expert = &call_.routing.expert(begin_ + l, 0);
            T* const to_weight = &call_.routing.weight(begin_ + l, 0);
            const bool valid = rows_.valid[l];
            for (int k = 0; k < top_k_; ++k) {
                to_expert[k] = valid ? expert[k][l] : expert_t{-1};
                to_weight[k] = valid ? weight[k][l] : T(0);
            }
        }
    }

    void normalize() {
        alignas(vector_bytes) T inverse[lanes];
        store(inverse, inverse_);
        for (int l = 0; l < count_; ++l) {
            T* const row = rows_.probs[l];
            index_t j = 0;
            if (!rows_.valid[l]) {
                for (; j < experts_; j += lanes) store_some(row + j, vec{}, experts_ - j);
                continue;
            }
            const vec factor = vec{} + inverse[l];
#pragma GCC unroll 4
            for (; j + lanes <= experts_; j += lanes) store(row + j, load(row + j) * factor);
            if (j < experts_) store_some(row + j, load_some<T>(row + j, experts_ - j) * factor, experts_ - j);
        }
    }
};

}  // namespace part
