// PyTorch, in a process of its own that answers through pipes: torch_moe.py.
#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <thread>

#include "busy.hpp"
#include "contender.hpp"

namespace steelyard_bench {
namespace {

/// A worker that reads lines, and numbers behind some of them, and answers each with a line, and numbers behind some.
class Worker {
public:
    explicit Worker(const std::string& python) {
        int in[2], out[2];
        if (::pipe(in) != 0 || ::pipe(out) != 0) throw std::runtime_error("no pipe for PyTorch");
        std::signal(SIGPIPE, SIG_IGN);
        child_ = ::fork();
        if (child_ == 0) {
            ::dup2(in[0], 0), ::dup2(out[1], 1);
            for (const int end : {in[0], in[1], out[0], out[1]}) ::close(end);
            ::setenv("THP_MEM_ALLOC_ENABLE", "1", 1);  // large pages for it too
            ::execlp(python.c_str(), python.c_str(), peer_options().script.c_str(), nullptr);
            ::_exit(127);
        }
        ::close(in[0]), ::close(out[1]);
        to_ = ::fdopen(in[1], "w"), from_ = ::fdopen(out[0], "r");
        ::fcntl(in[1], F_SETFD, FD_CLOEXEC), ::fcntl(out[0], F_SETFD, FD_CLOEXEC);  // not for the next worker
        Busy::add_worker(child_);
    }
    ~Worker() {
        std::fclose(to_), std::fclose(from_);  // the end of its input is its end
        ::waitpid(child_, nullptr, 0);
    }
    Worker(const Worker&) = delete;
    Worker& operator=(const Worker&) = delete;

    void say(const std::string& line) { write(line.data(), line.size()), write("\n", 1); }
    template <class V>
    void send(const V& tensor) {
        write(tensor.data, static_cast<std::size_t>(tensor.size()) * sizeof(float));
    }

    std::string answer() {
        std::fflush(to_);
        std::string line;
        for (int c = std::getc(from_); c != '\n'; c = std::getc(from_)) {
            if (c == EOF) throw std::runtime_error("PyTorch's process ended");
            line += static_cast<char>(c);
        }
        return line;
    }
    std::vector<float> numbers() {
        std::vector<float> found(std::stoul(answer()));
        if (std::fread(found.data(), sizeof(float), found.size(), from_) != found.size())
            throw std::runtime_error("PyTorch's process ended");
        return found;
    }

private:
    void write(const void* bytes, std::size_t count) {
        if (std::fwrite(bytes, 1, count, to_) != count) throw std::runtime_error("PyTorch's process ended");
    }
    pid_t child_ = -1;
    std::FILE *to_ = nullptr, *from_ = nullptr;
};

/// One process serves both ways of computing the experts: they share the weights of a model.
struct Session {
    explicit Session(const std::string& python) : worker(python) {}
    Worker worker;
    std::string version = worker.answer();
    bool has_grouped = worker.answer() == "grouped";
    const Model* model = nullptr;
    std::string type;
    std::uint64_t batch = 0;  // its number
    int threads = 0;
};
class TorchContender final : public Contender {
public:
    TorchContender(const Model& model, const Case& of, std::shared_ptr<Session> session, std::string way)
        : model_(model), session_(std::move(session)), way_(std::move(way)) {
        Session& s = *session_;
        const std::string type(name_of(of.type));
        if (s.model == &model && s.type == type) return;
        s.model = &model, s.type = type, s.batch = 0;
        std::ostringstream line;
        line << "model " << of.shape.experts << ' ' << of.shape.width << ' ' << of.shape.hidden << ' ' << type;
        s.worker.say(line.str());
        const auto& weights = model.weights();
        s.worker.send(weights.router), s.worker.send(weights.gate), s.worker.send(weights.up),
            s.worker.send(weights.down);
        s.worker.answer();
    }
    ~TorchContender() override { session_->model = nullptr; }

    void prepare(const Case& of, const Batch& batch) override {
        batch_ = &batch, train_ = of.pass == Pass::train;
        Session& s = *session_;
        if (s.batch == batch.number && s.threads == of.threads) return;
        s.batch = batch.number, s.threads = of.threads;
        std::ostringstream line;
        line << "batch " << of.sets() << ' ' << of.shape.tokens << ' ' << of.shape.top_k << ' ' << of.threads << ' '
             << (train_ ? 1 : 0);
        s.worker.say(line.str());
        s.worker.send(model_.weights().bias), s.worker.send(batch.x), s.worker.send(batch.dy);
        s.worker.answer();
    }
    void forward(index_t set) override { timed(set, false); }
    void backward() override { timed(0, true); }  // with a forward of its own, since it has one graph

    double timed(index_t set, bool with_backward) override {
        Session& s = *session_;
        rest();
        s.worker.say((with_backward ? "train " : "forward ") + way_ + " " + std::to_string(set));
        const double seconds = std::stod(s.worker.answer());
        rest();
        return seconds;
    }
    Outcome outcome() override {
        Session& s = *session_;
        std::string line = "outcome";
        for (const index_t e : batch_->sampled) line += " " + std::to_string(e);
        s.worker.say(line);
        Outcome made{.y = s.worker.numbers()};
        if (!train_) return made;
        for (const auto part : {&Outcome::dx, &Outcome::router, &Outcome::gate, &Outcome::up, &Outcome::down})
            made.*part = s.worker.numbers();
        return made;
    }

private:
    /// Threads that finished a piece of work spin for a while, here or there, before they sleep.
    static void rest() { std::this_thread::sleep_for(std::chrono::milliseconds(10)); }

    const Model& model_;
    std::shared_ptr<Session> session_;
    std::string way_;
    const Batch* batch_ = nullptr;
    bool train_ = false;
};

}  // namespace

void register_torch() {
    int place = 50;
    for (const std::string& python : peer_options().pythons) try {
            const auto session = std::make_shared<Session>(python);
            const std::string& version = session->version;
            const std::string number = version.substr(0, version.find('.', version.find('.') + 1));
            for (const std::string way : {"loop", "grouped"}) {
                if (way == "grouped" && !session->has_grouped) continue;
                entries().push_back(
                    {.name = "PyTorch " + number + (way == "loop" ? " loop" : " grouped_mm"),
                     .version = version,
                     .place = place++,
                     .supports =
                         [](const Case& of) {
                             return of.type == Type::f32 || (of.type == Type::bf16 && of.pass == Pass::forward);
                         },
                     .make = [way, session](const Model& model, const Case& of) -> std::unique_ptr<Contender> {
                         return std::make_unique<TorchContender>(model, of, session, way);
                     }});
            }
        } catch (const std::exception& problem) {
            std::cerr << python << ": " << problem.what() << '\n';
        }
}

}  // namespace steelyard_bench
