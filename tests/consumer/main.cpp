// A stranger's program: the library from outside, by whichever way its build found it.
#include <steelyard/core/random.hpp>
#include <steelyard/core/view.hpp>

int main() {
    float memory[6] = {};
    const steelyard::view<float, 2> x(memory, 2, 3);
    const steelyard::Philox random(1, steelyard::Stream::user);
    for (steelyard::index_t i = 0; i < x.size(); ++i) memory[i] = static_cast<float>(random.uniform(i));
    for (const float value : memory)
        if (value < 0 || value >= 1) return 1;
    return x(1, 2) == memory[5] ? 0 : 1;
}
