// oneDNN, expert by expert: for inference matmul primitives over weights in the layout that it asks for, in float or
// bfloat16; for training its plain sgemm.
#include <array>
#include <map>
#include <oneapi/dnnl/dnnl.hpp>

#include "../threads.hpp"
#include "products.hpp"

namespace steelyard_bench {
namespace {

using dnnl::memory;

const dnnl::engine& engine() {
    static const dnnl::engine cpu(dnnl::engine::kind::cpu, 0);
    return cpu;
}

memory::desc plain(index_t rows, index_t columns, memory::data_type type) {
    return {{rows, columns}, type, memory::format_tag::ab};
}

dnnl::matmul::primitive_desc matmul(const memory::desc& a, const memory::desc& b, const memory::desc& c) {
#if DNNL_VERSION_MAJOR >= 3
    return {engine(), a, b, c};
#else
    return {dnnl::matmul::desc(a, b, c), engine()};
#endif
}

/// The matrices of one kind of all experts, [n, k] transposed to [k, n] and blocked.
class PackedMatrices {
public:
    PackedMatrices(const view<float, 3>& from, memory::data_type type, index_t typical_rows)
        : k_(from.extents[2]), n_(from.extents[1]), type_(type) {
        const memory::desc any({k_, n_}, type, memory::format_tag::any);
        layout_ =
            matmul(plain(typical_rows, k_, type), any, plain(typical_rows, n_, memory::data_type::f32)).weights_desc();
        stride_ = (layout_.get_size() + 63) / 64 * 64;
        packed_ = HugeMemory(stride_ * static_cast<std::size_t>(from.extents[0]));
        dnnl::stream stream(engine());
        const memory::desc transposed({k_, n_}, memory::data_type::f32, memory::format_tag::ba);
        for (index_t e = 0; e < from.extents[0]; ++e) {
            memory source(transposed, engine(), from[e].data), target(layout_, engine(), at(e));
            dnnl::reorder(source, target).execute(stream, source, target);
        }
        stream.wait();
    }

    void multiply(index_t e, index_t m, const void* a, float* c) const {
        thread_local std::map<std::pair<std::uint64_t, index_t>, Call> calls;
        auto found = calls.find({number_, m});
        if (found == calls.end()) found = calls.emplace(std::pair{number_, m}, Call(*this, m)).first;
        found->second.run(const_cast<void*>(a), at(e), c);
    }

private:
    /// The primitive for so many rows, with this thread's stream.
    struct Call {
        Call(const PackedMatrices& of, index_t m)
            : a(plain(m, of.k_, of.type_), engine(), nullptr),
              b(of.layout_, engine(), nullptr),
              c(plain(m, of.n_, memory::data_type::f32), engine(), nullptr),
              product(matmul(a.get_desc(), b.get_desc(), c.get_desc())),
              stream(engine()) {}
        void run(void* from, void* weights, float* to) {
            a.set_data_handle(from), b.set_data_handle(weights), c.set_data_handle(to);
            product.execute(stream, {{DNNL_ARG_SRC, a}, {DNNL_ARG_WEIGHTS, b}, {DNNL_ARG_DST, c}});
        }
        memory a, b, c;
        dnnl::matmul product;
        dnnl::stream stream;
    };

    [[nodiscard]] void* at(index_t e) const { return packed_.as<std::byte>() + stride_ * static_cast<std::size_t>(e); }

    std::uint64_t number_ = unique_number();
    index_t k_, n_;
    memory::data_type type_;
    memory::desc layout_;
    std::size_t stride_ = 0;
    HugeMemory packed_;
};

/// The upper halves, rounded to nearest even.
const void* to_bf16(const float* from, index_t count) {
    thread_local std::vector<std::uint16_t> to;
    to.resize(static_cast<std::size_t>(count));
    const auto* bits = reinterpret_cast<const std::uint32_t*>(from);
    for (index_t i = 0; i < count; ++i)
        to[static_cast<std::size_t>(i)] =
            static_cast<std::uint16_t>((bits[i] + 0x7fffu + ((bits[i] >> 16) & 1u)) >> 16);
    return to.data();
}

class PackedOneDnn final : public Products {
public:
    PackedOneDnn(const Model& model, const Case& of)
        : bf16_(of.type == Type::bf16),
          width_(of.shape.width),
          hidden_(of.shape.hidden),
          gate_(model.weights().gate, type(), 128),
          up_(model.weights().up, type(), 128),
          down_(model.weights().down, type(), 128) {}

    [[nodiscard]] index_t row_block() const override { return 256; }
    void gate_and_up(index_t e, index_t m, const float* x, float* gate, float* up) const override {
        const void* const rows = bf16_ ? to_bf16(x, m * width_) : x;
        gate_.multiply(e, m, rows, gate);
        up_.multiply(e, m, rows, up);
    }
    void down(index_t e, index_t m, const float* inner, float* y) const override {
        down_.multiply(e, m, bf16_ ? to_bf16(inner, m * hidden_) : inner, y);
    }

private:
    [[nodiscard]] memory::data_type type() const { return bf16_ ? memory::data_type::bf16 : memory::data_type::f32; }
    bool bf16_;
    index_t width_, hidden_;
    PackedMatrices gate_, up_, down_;
};

class PlainOneDnn final : public Blas {
public:
    PlainOneDnn(const Model& model, const Case&) : Blas(model) {}

    void nt(const Product& p) const override { multiply(p, 'N', 'T', p.k, p.k); }
    void nn(const Product& p) const override { multiply(p, 'N', 'N', p.k, p.n); }
    void tn(const Product& p) const override { multiply(p, 'T', 'N', p.m, p.n); }

private:
    static void multiply(const Product& p, char a, char b, index_t lda, index_t ldb) {
        dnnl_sgemm(a, b, p.m, p.n, p.k, 1.0f, p.a, lda, p.b, ldb, p.add ? 1.0f : 0.0f, p.c, p.n);
    }
};

std::string version() {
    const auto* of = dnnl::version();
    return std::to_string(of->major) + "." + std::to_string(of->minor) + "." + std::to_string(of->patch) +
           ", weights packed for inference";
}

const Registration registered(
    {.name = "oneDNN",
     .version = version(),
     .place = 10,
     .supports =
         [](const Case& of) { return of.type == Type::f32 || (of.type == Type::bf16 && of.pass == Pass::forward); },
     .make =
         [](const Model& model, const Case& of) {
             return of.pass == Pass::forward ? make_products_contender<PackedOneDnn>(model, of)
                                             : make_products_contender<PlainOneDnn>(model, of);
         }});

}  // namespace
}  // namespace steelyard_bench
