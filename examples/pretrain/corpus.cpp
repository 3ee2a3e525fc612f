#include "corpus.hpp"

#include <algorithm>
#include <array>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <numeric>

#include "steelyard/core/random.hpp"

namespace pretrain {

namespace {

namespace fs = std::filesystem;
using steelyard::Philox;
using steelyard::Stream;

/// Appends a file's bytes, up to `limit` in all.
void append_file(const fs::path& path, std::int64_t limit, std::vector<std::uint8_t>& bytes) {
    std::ifstream in(path, std::ios::binary);
    if (!in) throw UserError("the text '" + path.string() + "' cannot be read");
    std::array<char, 1 << 16> chunk;
    while (static_cast<std::int64_t>(bytes.size()) < limit) {
        const std::int64_t room = limit - static_cast<std::int64_t>(bytes.size());
        in.read(chunk.data(), std::min<std::int64_t>(room, chunk.size()));
        if (in.gcount() == 0) break;
        bytes.insert(bytes.end(), chunk.begin(), chunk.begin() + in.gcount());
    }
    if (in.bad()) throw UserError("the text '" + path.string() + "' cannot be read");
}

Domain read_domain(const TextSource& source, std::int64_t limit) {
    Domain domain;
    domain.name = source.name;
    std::error_code error;
    if (!fs::exists(source.path, error))
        throw UserError("--text " + source.name + ": there is no file or folder '" + source.path + "'");
    std::vector<fs::path> files;
    if (fs::is_directory(source.path, error)) {
        fs::recursive_directory_iterator walk(source.path, fs::directory_options::skip_permission_denied, error), end;
        for (; !error && walk != end; walk.increment(error))
            if (walk->is_regular_file()) files.push_back(walk->path());
        if (error) throw UserError("--text " + source.name + ": the folder '" + source.path + "' cannot be read");
        // By bytes: the order must not depend on the file system or the locale.
        std::sort(files.begin(), files.end(),
                  [](const fs::path& a, const fs::path& b) { return a.generic_string() < b.generic_string(); });
    } else {
        files.push_back(source.path);
    }
    for (const fs::path& file : files) append_file(file, limit, domain.bytes);
    if (domain.bytes.empty()) throw UserError("--text " + source.name + ": '" + source.path + "' holds no text");
    return domain;
}

/// Cuts a domain into blocks, each training text first and then its held-out part. Many blocks make the
/// held-out part like the rest; too many would leave no room for whole sequences.
void split(Domain& domain, double held_out, std::int64_t needed) {
    const auto size = static_cast<std::int64_t>(domain.bytes.size());
    const auto blocks_that_fit = static_cast<std::int64_t>(static_cast<double>(size) * held_out) / (8 * needed);
    const std::int64_t blocks = std::clamp<std::int64_t>(blocks_that_fit, 1, 16);
    for (std::int64_t b = 0; b < blocks; ++b) {
        const std::int64_t begin = size * b / blocks, end = size * (b + 1) / blocks;
        const auto held = static_cast<std::int64_t>(static_cast<double>(end - begin) * held_out);
        domain.train.push_back({begin, end - held});
        domain.held_out.push_back({end - held, end});
    }
    if (domain.train[0].size() < needed || domain.held_out[0].size() < needed) {
        const auto least = static_cast<std::int64_t>(static_cast<double>(needed) / held_out) + 1;
        throw UserError("the domain '" + domain.name + "' has " + std::to_string(size) +
                        " bytes, but for sequences of " + std::to_string(needed - 1) + " and --held-out " +
                        std::to_string(held_out).substr(0, 4) + " it needs at least " + std::to_string(least));
    }
}

}  // namespace

Corpus::Corpus(const Settings& settings) : sequence_(settings.sequence), seed_(settings.seed) {
    const auto limit =
        settings.text_limit > 0 ? static_cast<std::int64_t>(settings.text_limit * 1e6) : std::int64_t{1} << 62;
    generated_ = settings.text.empty();
    if (generated_)
        domains_ = synthetic_domains(std::min(limit, synthetic_bytes));
    else
        for (const TextSource& source : settings.text) domains_.push_back(read_domain(source, limit));

    for (Domain& domain : domains_) {
        split(domain, settings.held_out, sequence_ + 1);
        std::vector<std::int64_t> starts;
        for (const Range& range : domain.held_out)
            for (std::int64_t at = range.begin; at + sequence_ + 1 <= range.end; at += sequence_ + 1)
                starts.push_back(at);
        const auto all = static_cast<std::int64_t>(starts.size());
        const std::int64_t wanted =
            settings.eval_sequences > 0 ? std::min<std::int64_t>(settings.eval_sequences, all) : all;
        std::vector<std::int64_t> chosen;
        for (std::int64_t i = 0; i < wanted; ++i) chosen.push_back(starts[static_cast<std::size_t>(i * all / wanted)]);
        held_out_starts_.push_back(std::move(chosen));
    }
}

std::vector<std::string> Corpus::domain_names() const {
    std::vector<std::string> names;
    for (const Domain& domain : domains_) names.push_back(domain.name);
    return names;
}

Sample Corpus::train(std::int64_t index) const {
    // The pair decides the domain: the (pair mod D)-th entry of a permutation drawn for each D pairs.
    const auto count = static_cast<std::int64_t>(domains_.size());
    const std::int64_t pair = index / 2;
    std::vector<int> order(domains_.size());
    std::iota(order.begin(), order.end(), 0);
    const Philox shuffle(seed_, Stream::data, static_cast<std::uint64_t>(pair / count), /*layer=*/0);
    for (std::int64_t i = count - 1; i > 0; --i)
        std::swap(order[static_cast<std::size_t>(i)],
                  order[shuffle.below(static_cast<std::uint64_t>(i), static_cast<std::uint32_t>(i + 1))]);

    Sample sample;
    sample.domain = order[static_cast<std::size_t>(pair % count)];
    const Domain& domain = domains_[static_cast<std::size_t>(sample.domain)];
    const std::int64_t length = sequence_ + 1;
    std::int64_t starts = 0;
    for (const Range& range : domain.train) starts += range.size() - length + 1;
    // Another layer than the permutation's: another stream.
    const Philox position(seed_, Stream::data, static_cast<std::uint64_t>(index), /*layer=*/1);
    auto at = static_cast<std::int64_t>(position.uniform(0) * static_cast<double>(starts));
    for (const Range& range : domain.train) {
        const std::int64_t here = range.size() - length + 1;
        if (at < here) {
            sample.bytes = std::span(domain.bytes)
                               .subspan(static_cast<std::size_t>(range.begin + at), static_cast<std::size_t>(length));
            break;
        }
        at -= here;
    }
    return sample;
}

std::int64_t Corpus::held_out_count(int domain) const {
    return static_cast<std::int64_t>(held_out_starts_[static_cast<std::size_t>(domain)].size());
}

Sample Corpus::held_out(int domain, std::int64_t index) const {
    const auto d = static_cast<std::size_t>(domain);
    const auto at = static_cast<std::size_t>(held_out_starts_[d][static_cast<std::size_t>(index)]);
    return {domain, std::span(domains_[d].bytes).subspan(at, static_cast<std::size_t>(sequence_ + 1))};
}

std::uint64_t Corpus::fingerprint() const {
    std::uint64_t hash = 0xCBF29CE484222325u;
    const auto add = [&](std::uint8_t byte) { hash = (hash ^ byte) * 0x100000001B3u; };
    for (const Domain& domain : domains_) {
        for (const char c : domain.name) add(static_cast<std::uint8_t>(c));
        add(0);
        for (const std::uint8_t byte : domain.bytes) add(byte);
        add(0);
    }
    return hash;
}

namespace {

/// Random choices for one synthetic language, in order. The seed is fixed: all runs read the same text. No
/// expression below draws twice, for C++ leaves open which operand of + comes first.
class Dice {
public:
    explicit Dice(std::uint64_t language) : philox_(20250121, Stream::data, language) {}
    int below(int bound) { return static_cast<int>(philox_.below(next_++, static_cast<std::uint32_t>(bound))); }
    /// Small numbers are likelier, as words of a language are.
    int skewed(int bound) {
        const double u = philox_.uniform(next_++);
        return std::min(bound - 1, static_cast<int>(u * u * bound));
    }

private:
    Philox philox_;
    std::uint64_t next_ = 0;
};

/// "37 + 5 = 42 ; 9 * 8 = 72 ; ..."
void arithmetic_line(Dice& dice, std::string& text) {
    const int a = dice.skewed(100), b = dice.skewed(100);
    switch (dice.below(3)) {
        case 0:
            text += std::to_string(a) + "+" + std::to_string(b) + "=" + std::to_string(a + b);
            break;
        case 1:
            text += std::to_string(a + b) + "-" + std::to_string(b) + "=" + std::to_string(a);
            break;
        default:
            text += std::to_string(a % 10) + "*" + std::to_string(b) + "=" + std::to_string(a % 10 * b);
            break;
    }
    text += dice.below(8) == 0 ? ";\n" : "; ";
}

/// Balanced brackets of four kinds.
void bracket_line(Dice& dice, std::string& text) {
    static constexpr char open[] = "([{<", close[] = ")]}>";
    std::string stack;
    const int length = 10 + dice.below(50);
    for (int i = 0; i < length; ++i) {
        if (!stack.empty() && (stack.size() > 12 || dice.below(2) == 0)) {
            text += stack.back();
            stack.pop_back();
        } else {
            const int kind = dice.skewed(4);
            text += open[kind];
            stack += close[kind];
        }
    }
    for (; !stack.empty(); stack.pop_back()) text += stack.back();
    text += '\n';
}

const std::string& pick(Dice& dice, const std::vector<std::string>& words) {
    return words[static_cast<std::size_t>(dice.skewed(static_cast<int>(words.size())))];
}

/// `count` invented words of two to four syllables.
std::vector<std::string> invented_words(Dice& dice, int count, const std::vector<std::string>& consonants,
                                        const std::vector<std::string>& vowels) {
    std::vector<std::string> words;
    for (int w = 0; w < count; ++w) {
        std::string word;
        for (int s = 2 + dice.below(3); s > 0; --s) {
            word += pick(dice, consonants);
            word += pick(dice, vowels);
        }
        words.push_back(word);
    }
    return words;
}

/// Sentences in which verb and adjective agree with the noun in number.
struct Prose {
    std::vector<std::string> nouns, verbs, adjectives;
    explicit Prose(Dice& dice) {
        const std::vector<std::string> consonants = {"t", "n", "s", "l", "m", "r", "d", "k", "p", "th", "br", "st"};
        const std::vector<std::string> vowels = {"a", "e", "o", "i", "u", "ea"};
        nouns = invented_words(dice, 120, consonants, vowels);
        verbs = invented_words(dice, 60, consonants, vowels);
        adjectives = invented_words(dice, 40, consonants, vowels);
    }
    void noun_phrase(Dice& dice, bool plural, std::string& text) const {
        text += plural ? "the " : dice.below(2) ? "a " : "the ";
        if (dice.below(3) == 0) text += pick(dice, adjectives) + (plural ? "en " : " ");
        text += pick(dice, nouns) + (plural ? "s" : "");
    }
    void line(Dice& dice, std::string& text) const {
        const bool plural = dice.below(2) == 0;
        noun_phrase(dice, plural, text);
        text += " " + pick(dice, verbs) + (plural ? "" : "eth") + " ";
        noun_phrase(dice, dice.below(2) == 0, text);
        text += dice.below(3) == 0 ? ".\n" : ". ";
    }
};

/// Small functions whose bodies use only names that were defined before.
void program_lines(Dice& dice, std::string& text) {
    static const std::vector<std::string> functions = {"Load", "Store", "Mix", "Fold", "Emit", "Scan", "Join", "Trim"};
    static const std::vector<std::string> types = {"INT", "REAL", "BOOL", "LIST"};
    const int arguments = 1 + dice.below(3), body = 2 + dice.below(4);
    text += "FUNC " + pick(dice, functions);
    text += pick(dice, functions) + "(";
    for (int a = 0; a < arguments; ++a) text += (a ? ", " : "") + std::string("X") + std::to_string(a);
    text += ") -> " + pick(dice, types) + "\n";
    int names = arguments;
    for (int i = 0; i < body; ++i) {
        const int left = dice.below(names), right = dice.below(names);
        text += "    LET X" + std::to_string(names++) + " := " + pick(dice, functions) + "(X" + std::to_string(left) +
                ", X" + std::to_string(right) + ")\n";
    }
    text += "    RETURN X" + std::to_string(names - 1) + "\nEND\n\n";
}

/// Words in another script (two bytes a letter), each drawn given the one before.
struct Runes {
    std::vector<std::string> words;
    int last = 0;
    explicit Runes(Dice& dice)
        : words(invented_words(dice, 200, {"б", "в", "г", "д", "ж", "з", "к", "л", "м", "н", "р", "с", "т"},
                               {"а", "о", "е", "и", "у", "я"})) {}
    void line(Dice& dice, std::string& text) {
        const int length = 5 + dice.below(8);
        for (int i = 0; i < length; ++i) {
            last = (last * 7 + 3 + dice.skewed(12)) % static_cast<int>(words.size());
            text += (i ? " " : "") + words[static_cast<std::size_t>(last)];
        }
        text += "\n";
    }
};

}  // namespace

std::vector<Domain> synthetic_domains(std::int64_t bytes_each) {
    std::vector<Domain> domains;
    const auto make = [&](const char* name, auto&& line) {
        std::string text;
        Dice dice(domains.size());
        while (static_cast<std::int64_t>(text.size()) < bytes_each) line(dice, text);
        Domain domain;
        domain.name = name;
        domain.bytes.assign(text.begin(), text.begin() + bytes_each);
        domains.push_back(std::move(domain));
    };
    Dice words(100);
    const Prose prose(words);
    Runes runes(words);
    make("arithmetic", arithmetic_line);
    make("brackets", bracket_line);
    make("prose", [&](Dice& dice, std::string& text) { prose.line(dice, text); });
    make("program", program_lines);
    make("runes", [&](Dice& dice, std::string& text) { runes.line(dice, text); });
    return domains;
}

}  // namespace pretrain
