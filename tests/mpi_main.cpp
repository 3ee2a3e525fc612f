// The main of every *_mpi.cpp test: doctest on each rank, one report on rank 0, and an exit code that is
// the worst of all ranks.
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>
#include <mpi.h>

#include <cstdio>
#include <sstream>
#include <string>
#include <vector>

namespace {

enum Count { cases, cases_failed, checks, checks_failed, exit_code, counts };
int count[counts] = {};

/// Keeps the counts that doctest would only print.
struct Counting : doctest::IReporter {
    explicit Counting(const doctest::ContextOptions&) {}
    void test_run_end(const doctest::TestRunStats& stats) override {
        count[cases] = static_cast<int>(stats.numTestCasesPassingFilters);
        count[cases_failed] = static_cast<int>(stats.numTestCasesFailed);
        count[checks] = stats.numAsserts;
        count[checks_failed] = stats.numAssertsFailed;
    }
    void report_query(const doctest::QueryData&) override {}
    void test_run_start() override {}
    void test_case_start(const doctest::TestCaseData&) override {}
    void test_case_reenter(const doctest::TestCaseData&) override {}
    void test_case_end(const doctest::CurrentTestCaseStats&) override {}
    void test_case_exception(const doctest::TestCaseException&) override {}
    void subcase_start(const doctest::SubcaseSignature&) override {}
    void subcase_end() override {}
    void log_assert(const doctest::AssertData&) override {}
    void log_message(const doctest::MessageData&) override {}
    void test_case_skipped(const doctest::TestCaseData&) override {}
};

}  // namespace

REGISTER_LISTENER("counting", 1, Counting);

int main(int argc, char** argv) {
    int level = 0, rank = 0, size = 1;
    MPI_Init_thread(&argc, &argv, MPI_THREAD_MULTIPLE, &level);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);

    std::ostringstream report;
    doctest::Context context(argc, argv);
    context.setOption("no-intro", true);
    context.setOption("no-colors", true);
    context.setCout(&report);
    count[exit_code] = context.run();

    // A rank that failed says what failed; one write, so that the ranks' lines do not mix.
    if (count[exit_code] != 0) {
        const std::string text = "---- rank " + std::to_string(rank) + "\n" + report.str();
        std::fwrite(text.data(), 1, text.size(), stdout);
        std::fflush(stdout);
    }

    std::vector<int> all(static_cast<std::size_t>(counts * size));
    MPI_Gather(count, counts, MPI_INT, all.data(), counts, MPI_INT, 0, MPI_COMM_WORLD);
    int worst = 0;
    MPI_Allreduce(&count[exit_code], &worst, 1, MPI_INT, MPI_MAX, MPI_COMM_WORLD);
    if (rank == 0) {
        for (int r = 0; r < size; ++r) {
            const int* of = &all[static_cast<std::size_t>(r * counts)];
            std::printf("rank %d: %d test cases, %d failed; %d checks, %d failed\n", r, of[cases], of[cases_failed],
                        of[checks], of[checks_failed]);
        }
        std::printf("%d ranks: %s\n", size, worst == 0 ? "passed" : "failed");
    }
    MPI_Finalize();
    return worst;
}
