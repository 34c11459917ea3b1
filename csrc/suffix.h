// What may follow a text: a suffix automaton of it counts how often each token followed each of its substrings.
//
// The automaton is that of Blumer et al. (1985, "The smallest automaton recognizing the subwords of a text"), built token by
// token. Its counts are kept exact for substrings of at most MOST_MATCHED tokens. A token is added in amortised constant time,
// and counted in at most MOST_MATCHED + 1 steps. Text usually takes a few.
#pragma once
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

namespace dovetail {

constexpr int MOST_MATCHED = 32;  // tokens of a text's end that are looked up

class SuffixAutomaton {
 public:
    SuffixAutomaton() : states_(1) { states_[0].link = NONE; }

    // A state, and how many tokens of what was read it stands for.
    struct Place {
        int32_t state = 0, length = 0;
    };
    // The token that followed most often, of several the one that did so last: in `count` of `all` times. None followed if
    // count is 0.
    struct Next {
        int32_t token, count, all;
    };

    void add(int32_t token);
    // A text ends here. Another may follow; nothing is matched across their boundary.
    void end();

    // The longest end of the text that something followed before.
    Place tail() const { return settled(capped(here_, MOST_MATCHED)); }
    // Read a token behind a place, as far as it occurs there.
    Place read(Place place, int32_t token) const;
    // The longest end of what was read at a place that something followed.
    Place settled(Place place) const;
    Next next(Place place) const { return {states_[place.state].best, states_[place.state].count, states_[place.state].followed}; }

    int64_t tokens() const { return tokens_; }
    int64_t bytes() const;

 private:
    static constexpr int32_t NONE = -1;
    static constexpr int32_t END = -1;  // a token between two texts
    static constexpr int COUNTED = MOST_MATCHED + 1;

    // The substrings of link's length + 1 to `length` tokens that end at the same positions. Most states have one edge.
    struct State {
        int32_t length = 0, link = 0;
        int32_t followed = 0, best = 0, count = 0;
        int32_t token = 0, target = 0;  // the first edge; none leads to the root, so target 0 is no edge
        int32_t more = NONE;            // the other ones
    };
    struct Edge {
        int32_t state, token, target, next;
    };

    int32_t* edge(int32_t state, int32_t token);
    const int32_t* edge(int32_t state, int32_t token) const { return const_cast<SuffixAutomaton*>(this)->edge(state, token); }
    void connect(int32_t state, int32_t token, int32_t target);
    void index(int32_t edge);
    size_t slot(int32_t state, int32_t token) const;
    int32_t create(int length);
    int32_t split(int32_t from, int32_t token, int32_t state);
    void count(int32_t token);
    Place capped(Place place, int most) const;

    std::vector<State> states_;
    std::vector<Edge> edges_;
    std::vector<int32_t> table_;  // open addressing; the number of an edge, or NONE
    int32_t last_ = 0;            // the state of the whole text
    Place here_;                  // that of its last tokens, as far as they are counted
    int64_t tokens_ = 0;
};

// Guesses what follows the texts of requests, from each text itself and from texts that have ended.
class SuffixDrafter {
 public:
    struct Rule {
        int tokens;     // of a guess, at most
        int min_match;  // tokens that must have occurred before
        double factor;  // a guess has at most so many tokens for each that matched
        double min_odds;  // that the whole guess is right
    };
    struct Guess {
        std::vector<int32_t> tokens;
        std::vector<double> odds;  // that each is right if those before it are
        int matched = 0;           // tokens before the first one
        bool shared = false;       // found in another text
    };

    // history: tokens of each text that are remembered, at most; beyond it the older half is forgotten. shared: tokens of all
    // ended texts; beyond it those that ended first are forgotten, half of them at once.
    SuffixDrafter(const Rule& rule, int64_t history, int64_t shared) : rule_(rule), history_(history), shared_(shared) {}
    SuffixDrafter(const SuffixDrafter&) = delete;

    // The first token that must be given to `update`, of a text that has so many now.
    int64_t wanted(const std::string& id, int64_t total);
    // The text's tokens from there on.
    void update(const std::string& id, const std::vector<int32_t>& tokens);
    // Texts that have ended are looked up where they have the same salt.
    Guess propose(const std::string& id, const std::string& salt, int limit);

    void forget(const std::string& id) { texts_.erase(id); }
    // A text has ended.
    void keep(const std::string& salt, const std::vector<int32_t>& tokens);

    int64_t tokens() const;
    int64_t bytes() const;

 private:
    // Where the end of a text is in an automaton of ended texts, while that is as it was.
    struct Cursor {
        uint64_t automaton = 0;
        int64_t size = 0, seen = 0;
        SuffixAutomaton::Place place;
    };
    struct Text {
        SuffixAutomaton automaton;
        int64_t seen = 0;
        std::vector<int32_t> recent;  // its last tokens, up to twice MOST_MATCHED
        Cursor cursors[2];
    };
    struct Ended {
        uint64_t number;  // no two have the same
        SuffixAutomaton automaton;
    };
    using Generation = std::unordered_map<std::string, Ended>;  // by salt

    void follow(Text& text, Cursor& cursor, const Ended& ended) const;
    void extend(const SuffixAutomaton& automaton, SuffixAutomaton::Place place, int limit, Guess& guess) const;

    const Rule rule_;
    const int64_t history_, shared_;
    std::unordered_map<std::string, Text> texts_;
    Generation generations_[2];  // the newer, the older
    int64_t newer_ = 0;          // tokens of the newer generation
    uint64_t number_ = 0;
};

}  // namespace dovetail
