#include "suffix.h"

#include <algorithm>

namespace dovetail {

namespace {

using Place = SuffixAutomaton::Place;

// The odds that a token is right which followed in `count` of `all` times, after a match of so many tokens: with absolute
// discounting (Ney, Essen and Kneser 1994). The discount was fitted to guesses in answers of SmolLM2-135M and Qwen2.5-Coder-1.5B.
double discounted(int count, int all, int matched) { return (count - 1 / (matched + 0.5)) / all; }

}  // namespace

// ---- the automaton

size_t SuffixAutomaton::slot(int32_t state, int32_t token) const {
    const uint64_t mixed = ((uint64_t)(uint32_t)state << 32 | (uint32_t)token) * 0x9E3779B97F4A7C15u;
    return (mixed ^ mixed >> 32) & (table_.size() - 1);
}

int32_t* SuffixAutomaton::edge(int32_t state, int32_t token) {
    State& s = states_[state];
    if (s.target && s.token == token) return &s.target;
    if (s.more == NONE) return nullptr;
    for (size_t at = slot(state, token);; at = (at + 1) & (table_.size() - 1)) {
        if (table_[at] == NONE) return nullptr;
        Edge& e = edges_[table_[at]];
        if (e.state == state && e.token == token) return &e.target;
    }
}

void SuffixAutomaton::index(int32_t number) {
    size_t at = slot(edges_[number].state, edges_[number].token);
    while (table_[at] != NONE) at = (at + 1) & (table_.size() - 1);
    table_[at] = number;
}

// Adds an edge that is not there.
void SuffixAutomaton::connect(int32_t state, int32_t token, int32_t target) {
    State& s = states_[state];
    if (!s.target) {
        s.token = token, s.target = target;
        return;
    }
    edges_.push_back({state, token, target, s.more});
    s.more = (int32_t)edges_.size() - 1;
    if (edges_.size() * 2 <= table_.size()) return index(s.more);
    table_.assign(std::max<size_t>(16, table_.size() * 2), NONE);
    for (size_t i = 0; i < edges_.size(); i++) index((int32_t)i);
}

int32_t SuffixAutomaton::create(int length) {
    states_.emplace_back();
    states_.back().length = length;
    return (int32_t)states_.size() - 1;
}

// Gives those of a state's substrings a state of their own that `from` and `token` lead to.
int32_t SuffixAutomaton::split(int32_t from, int32_t token, int32_t state) {
    const int32_t made = (int32_t)states_.size(), more = states_[state].more;
    states_.push_back(State(states_[state]));
    states_[made].length = states_[from].length + 1, states_[made].more = NONE;
    for (int32_t e = more; e != NONE; e = edges_[e].next) connect(made, edges_[e].token, edges_[e].target);
    states_[state].link = made;
    for (int32_t* target; from != NONE && (target = edge(from, token)) && *target == state; from = states_[from].link)
        *target = made;
    return made;
}

void SuffixAutomaton::add(int32_t token) {
    const int32_t made = create(states_[last_].length + 1);
    int32_t from = last_;
    const int32_t* target = nullptr;
    for (; from != NONE && !(target = edge(from, token)); from = states_[from].link) connect(from, token, made);
    if (from != NONE) {
        const int32_t found = *target;
        const bool exact = states_[from].length + 1 == states_[found].length;
        const int32_t link = exact ? found : split(from, token, found);
        states_[made].link = link;
    }
    last_ = made;
    if (token == END) return;
    tokens_++;
    count(token);
}

void SuffixAutomaton::end() {
    here_ = capped(here_, COUNTED);
    for (int32_t s = here_.state; s != NONE; s = states_[s].link) states_[s].followed++;
    add(END);
    here_ = {};
}

// Counts that `token`, which was just added, followed each end of the text before it. Its states are those that `here_` links
// to; in parallel with them go the states of the ends of the text as it is now.
void SuffixAutomaton::count(int32_t token) {
    const Place before = capped(here_, COUNTED);  // the state may have been split
    here_ = capped({*edge(before.state, token), before.length + 1}, COUNTED);
    int32_t now = here_.state;
    for (int32_t s = before.state; s != NONE; s = states_[s].link) {
        State& state = states_[s];
        state.followed++;
        if (s && states_[state.link].length + 1 >= COUNTED) continue;
        const int longest = std::min({state.length, before.length, MOST_MATCHED}) + 1;
        while (states_[states_[now].link].length >= longest) now = states_[now].link;
        if (const int seen = states_[now].followed + 1; seen >= state.count) state.best = token, state.count = seen;
    }
}

// The place of at most so many last tokens.
Place SuffixAutomaton::capped(Place place, int most) const {
    place.length = std::min(place.length, most);
    while (place.state && states_[states_[place.state].link].length >= place.length) place.state = states_[place.state].link;
    return place;
}

Place SuffixAutomaton::read(Place place, int32_t token) const {
    for (;;) {
        if (const int32_t* target = edge(place.state, token)) return capped({*target, place.length + 1}, MOST_MATCHED);
        if (!place.state) return {};
        place.state = states_[place.state].link, place.length = states_[place.state].length;
    }
}

Place SuffixAutomaton::settled(Place place) const {
    while (place.state && !states_[place.state].count)
        place.state = states_[place.state].link, place.length = states_[place.state].length;
    return place;
}

int64_t SuffixAutomaton::bytes() const {
    return (int64_t)(states_.capacity() * sizeof(State) + edges_.capacity() * sizeof(Edge) + table_.capacity() * sizeof(int32_t));
}

// ---- the drafter

int64_t SuffixDrafter::wanted(const std::string& id, int64_t total) {
    Text& text = texts_[id];
    if (text.automaton.tokens() + total - text.seen > history_) {
        text.automaton = {};
        text.recent.clear();
        text.seen = std::max<int64_t>(0, total - (history_ + 1) / 2);
    }
    return text.seen;
}

void SuffixDrafter::update(const std::string& id, const std::vector<int32_t>& tokens) {
    Text& text = texts_[id];
    for (const int32_t token : tokens) text.automaton.add(token);
    text.seen += (int64_t)tokens.size();
    const size_t fresh = std::min<size_t>(tokens.size(), MOST_MATCHED);
    text.recent.insert(text.recent.end(), tokens.end() - fresh, tokens.end());
    if (text.recent.size() > 2 * MOST_MATCHED) text.recent.erase(text.recent.begin(), text.recent.end() - MOST_MATCHED);
}

// Where the end of the text is in ended texts: from where it was before, or from its last tokens.
void SuffixDrafter::follow(Text& text, Cursor& cursor, const Ended& ended) const {
    const bool same = cursor.automaton == ended.number && cursor.size == ended.automaton.tokens();
    if (!same || text.seen - cursor.seen > MOST_MATCHED)
        cursor = {ended.number, ended.automaton.tokens(), text.seen - MOST_MATCHED, {}};
    const int64_t fresh = std::min(text.seen - cursor.seen, (int64_t)text.recent.size());
    for (auto token = text.recent.end() - fresh; token != text.recent.end(); token++)
        cursor.place = ended.automaton.read(cursor.place, *token);
    cursor.seen = text.seen;
}

SuffixDrafter::Guess SuffixDrafter::propose(const std::string& id, const std::string& salt, int limit) {
    Text& text = texts_[id];
    const SuffixAutomaton* best = &text.automaton;
    Place place = best->tail();
    Guess guess;
    for (int i = 0; i < 2 && shared_; i++) {
        const auto found = generations_[i].find(salt);
        if (found == generations_[i].end()) continue;
        follow(text, text.cursors[i], found->second);
        const Place other = found->second.automaton.settled(text.cursors[i].place);
        if (other.length > place.length) best = &found->second.automaton, place = other, guess.shared = true;
    }
    guess.matched = place.length;
    extend(*best, place, limit, guess);
    return guess;
}

void SuffixDrafter::extend(const SuffixAutomaton& automaton, Place place, int limit, Guess& guess) const {
    limit = (int)std::min<double>(std::min(limit, rule_.tokens), rule_.factor * place.length);
    for (double all = 1; (int)guess.tokens.size() < limit && place.length >= rule_.min_match;) {
        const SuffixAutomaton::Next next = automaton.next(place);
        if (!next.count) return;
        const double odds = discounted(next.count, next.all, place.length);
        if ((all *= odds) < rule_.min_odds) return;
        guess.tokens.push_back(next.token), guess.odds.push_back(odds);
        place = automaton.settled(automaton.read(place, next.token));
    }
}

void SuffixDrafter::keep(const std::string& salt, const std::vector<int32_t>& tokens) {
    const int64_t most = shared_ / 2, count = std::min<int64_t>(most, (int64_t)tokens.size());
    if (!count) return;
    if (newer_ + count > most) {
        generations_[1] = std::move(generations_[0]);
        generations_[0].clear();
        newer_ = 0;
    }
    newer_ += count;
    auto [found, made] = generations_[0].try_emplace(salt);
    if (made) found->second.number = ++number_;
    for (auto token = tokens.end() - count; token != tokens.end(); token++) found->second.automaton.add(*token);
    found->second.automaton.end();
}

int64_t SuffixDrafter::tokens() const {
    int64_t n = 0;
    for (const auto& [id, text] : texts_) n += text.automaton.tokens();
    for (const Generation& g : generations_)
        for (const auto& [salt, ended] : g) n += ended.automaton.tokens();
    return n;
}

int64_t SuffixDrafter::bytes() const {
    int64_t n = 0;
    for (const auto& [id, text] : texts_) n += text.automaton.bytes();
    for (const Generation& g : generations_)
        for (const auto& [salt, ended] : g) n += ended.automaton.bytes();
    return n;
}

}  // namespace dovetail
