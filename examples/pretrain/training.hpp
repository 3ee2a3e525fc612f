// Training one strategy, from the first step or from a checkpoint, to the end or to an interruption.
#pragma once

#include <string>
#include <vector>

#include "corpus.hpp"
#include "record.hpp"

namespace pretrain {

/// The ranks of this program: threads of one process, or processes under mpirun.
///
/// For threads it does nothing. For MPI it starts and ends MPI, and sets `settings.ranks` to the number of
/// processes. Throws `UserError` when this build has no MPI, or when --ranks says something else.
class Ranks {
public:
    explicit Ranks(Settings& settings);
    ~Ranks();
    Ranks(const Ranks&) = delete;
    Ranks& operator=(const Ranks&) = delete;

    /// Whether this process speaks: prints, and writes files.
    [[nodiscard]] bool first() const { return first_; }
    /// Takes the other processes down too, after an error in this one. Returns where there are none.
    void give_up(int exit_code);

private:
    [[maybe_unused]] bool mpi_ = false;
    bool first_ = true;
};

/// Asks every run to finish its step, save and return. May be called from a signal handler.
void ask_to_stop() noexcept;
[[nodiscard]] bool stop_was_asked() noexcept;
/// Takes the wish back.
void forget_stop() noexcept;

/// Throws `UserError` where this build, or this machine, lacks the settings' device.
void require_device(const Settings& settings);

/// Trains under one strategy and returns its record (complete on the first process; empty series elsewhere).
/// With `settings.resume` it goes on from the strategy's checkpoint, where there is one. Throws `UserError` for a
/// checkpoint that does not fit, and `steelyard::Error` for what the library refuses.
[[nodiscard]] RunRecord train(const Settings& settings, Strategy strategy, const Corpus& corpus);

}  // namespace pretrain
