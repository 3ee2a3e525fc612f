// One implementation of the layer: ours, or a peer.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "model.hpp"

namespace steelyard_bench {

/// What a contender computed, for the comparison with ours. Gradients are empty after a forward for inference.
struct Outcome {
    std::vector<float> y = {}, dx = {};                // [T, d]
    std::vector<float> router = {};                    // [E, d]
    std::vector<float> gate = {}, up = {}, down = {};  // of the sampled experts, one after the other
};

/// A contender with the weights of one model, packed or copied as it likes. Made once for all cases of the model.
class Contender {
public:
    virtual ~Contender() = default;

    /// Gets ready for a case: everything below is about it. The batch and the model outlive it.
    virtual void prepare(const Case& of, const Batch& batch) = 0;
    /// y of one set of tokens; in training of the first set, keeping what backward needs.
    virtual void forward(index_t set) = 0;
    /// dx (=) and the weights' gradients (=).
    virtual void backward() = 0;
    /// Of the last calls.
    virtual Outcome outcome() = 0;
    /// Before the calls that are compared: forgets gradients of the sampled experts, whose memory contenders share.
    virtual void forget_gradients() {}

    /// Seconds of forward, and in training of backward too. A contender in another process has its own clock.
    virtual double timed(index_t set, bool with_backward) {
        const double start = now();
        forward(set);
        if (with_backward) backward();
        return now() - start;
    }
};

/// How to make one.
struct Entry {
    std::string name;     ///< of the column
    std::string version;  ///< of the library, with what it was told
    int place = 0;        ///< of the column: ours is 0, its variants are below 10, peers follow
    std::function<bool(const Case&)> supports;
    std::function<std::unique_ptr<Contender>(const Model&, const Case&)> make;

    [[nodiscard]] bool is_ours() const { return place < 10; }
};

/// All that were compiled in; a peer's file adds itself when the program starts.
[[nodiscard]] std::vector<Entry>& entries();
struct Registration {
    explicit Registration(Entry entry) { entries().push_back(std::move(entry)); }
};

/// Ours in float with the weights as they are: what the others are compared with.
[[nodiscard]] std::unique_ptr<Contender> make_reference(const Model& model);

/// Options that contenders read.
struct PeerOptions {
    std::vector<std::string> pythons;  ///< interpreters with PyTorch
    std::string script;                ///< bench/compare/torch_moe.py
};
[[nodiscard]] PeerOptions& peer_options();
/// PyTorch's entries, once the options are known: asks the interpreter what it has.
void register_torch();

/// Largest error, relative in norm, of any part that both have; infinite where sizes differ or anything is not finite.
[[nodiscard]] double relative_error(const Outcome& found, const Outcome& expected);
/// What is still the same function: rounding of the sums, of bf16 (8 bits), of int8.
[[nodiscard]] double tolerance(Type type);

}  // namespace steelyard_bench
