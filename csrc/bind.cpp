// The Python module. Buffers cross as addresses: their owners on the Python side keep them alive.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <cstring>
#include <tuple>

#include "bandwidth.h"
#include "program.h"
#include "suffix.h"

namespace nb = nanobind;
using namespace dovetail;

namespace {

Format format_of(const std::string& name) {
    for (int i = 0; i < NUM_FORMATS; i++)
        if (name == FORMATS[i].name) return (Format)i;
    throw std::invalid_argument("there is no native format '" + name + "'");
}

template <class T> T choice(const std::string& name, std::initializer_list<const char*> names) {
    int i = 0;
    for (const char* n : names) {
        if (name == n) return (T)i;
        i++;
    }
    throw std::invalid_argument("unknown choice '" + name + "'");
}

Summary summary_of(const std::string& kind) { return choice<Summary>(kind, {"bound", "mean_std", "codes", "landmarks"}); }

KVMemory kv_memory(const std::string& layout, const std::string& stored, nb::tuple addresses, nb::tuple sizes) {
    KVMemory kv{};
    kv.layout = choice<Layout>(layout, {"tiled", "NHD", "HND"});
    kv.stored = choice<KVStored>(stored, {"float32", "bf16", "int8", "int4", "fp8"});
    kv.k = (uint8_t*)nb::cast<uintptr_t>(addresses[0]), kv.v = (uint8_t*)nb::cast<uintptr_t>(addresses[1]);
    kv.k_scale = (float*)nb::cast<uintptr_t>(addresses[2]), kv.v_scale = (float*)nb::cast<uintptr_t>(addresses[3]);
    kv.pages_per_layer = nb::cast<int64_t>(sizes[0]), kv.page_size = nb::cast<int>(sizes[1]);
    kv.heads = nb::cast<int>(sizes[2]), kv.dim = nb::cast<int>(sizes[3]), kv.cells = nb::cast<int64_t>(sizes[4]);
    if (kv.layout == TILED && kv.page_size % 16)
        throw std::invalid_argument("tiled KV takes pages of a multiple of 16 tokens");
    if (kv.layout == TILED && kv.cells < 1)
        throw std::invalid_argument("tiled KV needs the number of pages that there is memory for");
    if (kv.dim % 2 || kv.dim > 512) throw std::invalid_argument("head_dim must be even and at most 512");
    return kv;
}

// Append rows of one sequence: those at positions [start, stop), or only at `rows` of them. The arguments are its tokens and
// then its drafts, its pages, and how many of the last rows to sample.
void add_span(Program& p, int start, int stop, nb::list tokens, nb::list drafts, nb::list pages, int64_t first_page,
              int sample, int dense_until, std::pair<uintptr_t, int> aliases, const std::vector<int>& rows) {
    Step& s = p.step;
    const int row = s.rows(), size = p.page_size();
    const int accepted = (int)nb::len(tokens), count = (stop + size - 1) / size;
    if (count > (int)nb::len(pages)) throw std::invalid_argument("a span reaches past its pages");
    const size_t table = s.tables.size();
    s.table_start.push_back(table);
    s.alias_start.push_back(s.aliases.size());
    for (int i = 0; i < aliases.second; i++)
        s.aliases.push_back((int32_t)(((const int64_t*)aliases.first)[i] + first_page));
    for (int i = 0; i < count; i++)
        s.tables.push_back((int32_t)(PyLong_AsLong(PyList_GetItem(pages.ptr(), i)) + first_page));
    const int n = rows.empty() ? stop - start : (int)rows.size();
    if (n <= 0) throw std::invalid_argument("a span must have a row");
    for (int i = 0; i < n; i++) {
        const int at = rows.empty() ? start + i : rows[i];
        if (at < start || at >= stop || (i && at <= s.positions.back()))
            throw std::invalid_argument("a span's rows must ascend and lie between its start and its stop");
        PyObject* token = at < accepted ? PyList_GetItem(tokens.ptr(), at)
                                        : PyList_GetItem(drafts.ptr(), at - accepted);
        if (!token) throw nb::python_error();
        s.tokens.push_back((int32_t)PyLong_AsLong(token));
        s.positions.push_back(at);
        s.pages.push_back(s.tables[table + at / size]);
        s.offsets.push_back(at % size);
    }
    for (int i = n - sample; i < n; i++) s.sampled.push_back(row + i);
    s.sequences.push_back({row, n, s.positions[row], stop, nullptr, count, 1, nullptr});
    s.spans.push_back({row, n, nullptr, dense_until, nullptr, nullptr, aliases.second});
}

// Penalties of a sampled row: rates for repetition, presence and frequency, and its tokens; the first `prompt` are not
// output.
void penalise(Program& p, int row, std::tuple<float, float, float> rates, nb::list tokens, size_t prompt) {
    Change& c = p.step.changes[row];
    std::tie(c.repetition, c.presence, c.frequency) = rates;
    c.prompt = prompt;
    c.tokens.resize(nb::len(tokens));
    for (size_t i = 0; i < c.tokens.size(); i++) c.tokens[i] = (int32_t)PyLong_AsLong(PyList_GetItem(tokens.ptr(), i));
}

void shift(Program& p, int row, const std::vector<int32_t>& tokens, const std::vector<float>& values) {
    if (tokens.size() != values.size()) throw std::invalid_argument("there must be a value for each token");
    auto& added = p.step.changes[row].added;
    for (size_t i = 0; i < tokens.size(); i++) added.emplace_back(tokens[i], values[i]);
}

void allow(Program& p, int row, nb::ndarray<nb::numpy, uint32_t> mask) {
    if (mask.ndim() != 1 || mask.stride(0) != 1) throw std::invalid_argument("a mask is one row of words");
    p.step.changes[row].allowed.assign(mask.data(), mask.data() + mask.size());
}

using Options = std::tuple<double, int, double, double, double>;  // temperature, top_k, top_p, min_p, noise

std::vector<int> choose(Program& p, int slot, const std::vector<Options>& rows) {
    std::vector<Choice> choices;
    for (const auto& [temperature, top_k, top_p, min_p, noise] : rows)
        choices.push_back({temperature, top_k, top_p, min_p, noise});
    nb::gil_scoped_release free;
    return p.choose(slot, choices);
}

// Attention by itself: block-sparse KV given by page lists.
class PagedAttention {
   public:
    PagedAttention(const std::string& isa, int threads, nb::tuple heads, bool cascade, bool split)
        : kernels_(isa.empty() ? best_kernels() : kernels(isa.c_str())), team_(threads), cascade_(cascade), split_(split) {
        if (!kernels_) throw std::invalid_argument("this build or this CPU has no '" + isa + "'");
        heads_ = {nb::cast<int>(heads[0]), nb::cast<int>(heads[1]), nb::cast<int>(heads[2])};
    }

    PagedAttention(const PagedAttention&) = delete;

    // Rows and pages of request i are qo_indptr[i].. and kv_indptr[i]..; its first row is at starts[i]; indices hold
    // `lists` lists, one after the other, and positions (or none) the position of each page's first token.
    void plan(const std::vector<int>& qo_indptr, const std::vector<int>& kv_indptr, const std::vector<int>& lengths,
              const std::vector<int>& starts, const std::vector<int>& indices, const std::vector<int>& positions,
              int lists, int page_size) {
        rows_ = qo_indptr.back();
        table_.clear(), where_.clear();
        const int total = kv_indptr.back();
        std::vector<Sequence> sequences;
        for (size_t i = 0; i + 1 < qo_indptr.size(); i++) {  // each request's lists, one after the other
            const int first = kv_indptr[i], pages = kv_indptr[i + 1] - first, rows = qo_indptr[i + 1] - qo_indptr[i];
            for (int l = 0; l < lists; l++)
                for (int p = 0; p < pages; p++) {
                    table_.push_back(indices.at(l * total + first + p));
                    if (!positions.empty()) where_.push_back(positions.at(l * total + first + p));
                }
            sequences.push_back({qo_indptr[i], rows, starts[i], lengths[i], nullptr, pages, lists, nullptr});
        }
        size_t at = 0;
        for (Sequence& s : sequences) {
            s.pages = table_.data() + at;
            if (!positions.empty()) s.page_positions = where_.data() + at;
            at += (size_t)s.num_pages * lists;
        }
        plan_.build(sequences, heads_, page_size, team_.threads, cascade_, split_);
    }

    // The interpreter's lock is kept: a second thread would change the plan and the copy of q.
    void run(const KVMemory& kv, uintptr_t q, uintptr_t out, uintptr_t lse, int window, uintptr_t variant,
             const std::vector<float>& params) {
        const int padded = kv.padded(), rows = rows_ * heads_.query;
        const float scale = 1.0f / std::sqrt((float)heads_.dim);
        q_.assign((size_t)rows * padded, 0.0f);
        Aligned<float> row(padded, 0.0f);
        for (int r = 0; r < rows; r++) {
            kernels_->scale((const float*)q + (size_t)r * heads_.dim, scale, heads_.dim / 16 * 16, row.data());
            for (int i = heads_.dim / 16 * 16; i < heads_.dim; i++) row[i] = ((const float*)q)[(size_t)r * heads_.dim + i] * scale;
            if (kv.compute() == KV_BF16) kernels_->to_bf16(row.data(), padded, (uint16_t*)q_.data() + (size_t)r * padded);
            else memcpy(q_.data() + (size_t)r * padded, row.data(), (size_t)padded * 4);
        }
        const AttendArgs args{&kv, 0, q_.data(), (float*)out, heads_.query * heads_.dim, window, (Variant)variant,
                              params.data(), (float*)lse};
        plan_.prepare(kv);
        team_.reserve(4);
        team_.run([&](Member& member) { plan_.run(member, *kernels_, args); });
    }

    const PlanStats& stats() const { return plan_.stats(); }

   private:
    const Kernels* kernels_;
    Team team_;
    Heads heads_;
    bool cascade_, split_;
    int rows_ = 0;
    std::vector<int32_t> table_, where_;
    Aligned<float> q_;
    AttentionPlan plan_;
};

nb::dict stats_of(const PlanStats& s) {
    nb::dict d;
    d["items"] = s.items, d["merged_rows"] = s.merged_rows, d["tokens_read"] = s.tokens_read;
    d["tokens_without_sharing"] = s.tokens_without_sharing, d["shared_rows"] = s.shared_rows;
    return d;
}

// A file in a folder, or the host's memory if no folder is named.
std::unique_ptr<SlowTier> slow_tier(const TierShape& s, const std::string& folder) {
    const size_t blobs = (size_t)(s.pages() * s.heads);
    if (folder.empty()) return host_tier(blobs * s.blob);
    return disk_tier(folder, blobs * ((s.blob + SECTOR - 1) / SECTOR * SECTOR));
}

std::vector<std::shared_ptr<Packed>> weights_of(nb::list list) {
    std::vector<std::shared_ptr<Packed>> out;
    for (nb::handle h : list) out.push_back(nb::cast<std::shared_ptr<Packed>>(h));
    return out;
}

using Guessed = std::tuple<std::vector<int32_t>, std::vector<double>, int, bool>;  // tokens, odds, matched, shared

// Guesses for texts (lists of tokens), of at most `room` tokens in all.
std::vector<Guessed> guess(SuffixDrafter& d, const std::vector<std::string>& ids, const std::vector<std::string>& salts,
                           nb::list texts, const std::vector<int>& limits, int room) {
    if (salts.size() != ids.size() || nb::len(texts) != ids.size() || limits.size() != ids.size())
        throw std::invalid_argument("there must be a salt, a text and a limit for each id");
    std::vector<Guessed> out;
    std::vector<int32_t> fresh;
    for (size_t i = 0; i < ids.size(); i++) {
        const nb::list text = nb::cast<nb::list>(texts[i]);
        const int64_t total = (int64_t)nb::len(text);
        fresh.clear();
        for (int64_t at = d.wanted(ids[i], total); at < total; at++)
            fresh.push_back((int32_t)PyLong_AsLong(PyList_GetItem(text.ptr(), at)));
        d.update(ids[i], fresh);
        SuffixDrafter::Guess g = d.propose(ids[i], salts[i], std::min(limits[i], room));
        room -= (int)g.tokens.size();
        out.emplace_back(std::move(g.tokens), std::move(g.odds), g.matched, g.shared);
    }
    return out;
}

std::vector<std::string> running(const char* (*name)(int)) {
    std::vector<std::string> out;
    for (int i = 0; name(i); i++)
        if (kernels(name(i))) out.push_back(name(i));
    return out;
}

}  // namespace

NB_MODULE(_native, m) {
    m.def("isas", [] { return running(isa_name); });
    m.def("emulated", [] { return running(emulated_name); });
    m.def("formats", [] {
        std::vector<std::string> out;
        for (const FormatInfo& f : FORMATS)
            if (f.values) out.push_back(f.name);
        return out;
    });
    m.def("grids", [] {
        std::vector<std::string> out;
        for (const FormatInfo& f : FORMATS)
            if (!f.values) out.push_back(f.name);
        return out;
    });
    m.def("read_bandwidth", [](size_t megabytes, int threads) {
        nb::gil_scoped_release free;
        return read_bandwidth(megabytes << 20, threads);
    }, nb::arg("megabytes"), nb::arg("threads"));
    m.def("run_dots", [](const std::string& isa, int threads) {
        const Kernels* some = kernels(isa.c_str());
        if (!some) throw std::invalid_argument("this build or this CPU has no '" + isa + "'");
        nb::gil_scoped_release free;
        return run_dots(*some, threads);
    }, nb::arg("isa"), nb::arg("threads"));
    m.def("dequantize_row", [](const std::string& format, uintptr_t row, int k, uintptr_t out) {
        dequantize_row(format_of(format), (const uint8_t*)row, k, (float*)out);
    });

    m.def("layout", [] { return LAYOUT; });
    m.def("checksums", [](const std::vector<std::pair<uintptr_t, size_t>>& ranges, int threads) {
        std::vector<std::pair<const uint8_t*, size_t>> at;
        for (const auto& [address, bytes] : ranges) at.emplace_back((const uint8_t*)address, bytes);
        nb::gil_scoped_release free;
        return checksums(at, threads);
    }, nb::arg("ranges"), nb::arg("threads"));

    nb::class_<Mapping>(m, "Mapping")
        .def(nb::init<int, size_t>(), nb::arg("file"), nb::arg("bytes"))
        .def_prop_ro("address", [](const Mapping& f) { return (uintptr_t)f.data; })
        .def("packed", [](std::shared_ptr<Mapping> file, const std::string& format, int n, int k, size_t offset) {
            return std::make_shared<Packed>(format_of(format), std::move(file), offset, n, k);
        }, nb::arg("format"), nb::arg("n"), nb::arg("k"), nb::arg("offset"));

    nb::class_<Packed>(m, "Packed")
        .def("__init__", [](Packed* self, const std::string& format, uintptr_t rows, size_t row_bytes, int n, int k,
                            int threads) {
            const Format f = format_of(format);
            nb::gil_scoped_release free;
            new (self) Packed(f, (const uint8_t*)rows, row_bytes, n, k, threads);
        })
        .def_static("grid", [](const std::string& format, std::tuple<int, int, int, int, bool> sizes, std::pair<uintptr_t, size_t> codes,
                               std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t> parts, const std::string& activation,
                               const std::vector<std::pair<uintptr_t, size_t>>& shared, int threads) {
            const auto [n, k, groups, outliers, pairs] = sizes;
            const auto [scale, zero, outlier_scale, bias] = parts;
            GridWeight w{format_of(format), n, k, groups, (const uint8_t*)codes.first, codes.second, (const float*)scale,
                         (const int16_t*)zero, outliers, pairs, (const float*)outlier_scale, (const float*)bias, activation, {}};
            for (const auto& [address, count] : shared) w.shared.emplace_back((const void*)address, count);
            nb::gil_scoped_release free;
            return std::make_shared<Packed>(w, threads);
        }, nb::arg("format"), nb::arg("sizes"), nb::arg("codes"), nb::arg("parts"), nb::arg("activation"), nb::arg("shared"),
           nb::arg("threads"))
        .def_prop_ro("activation", &Packed::activation)
        .def_prop_ro("row_rule", [](const Packed& p) {
            const std::string rule = p.row_rule();
            return nb::bytes(rule.data(), rule.size());
        })
        .def_ro("bytes", &Packed::bytes)
        .def_prop_ro("address", [](const Packed& p) { return (uintptr_t)p.data; })
        .def_prop_ro("data", [](const Packed& p) {  // to be read
            return nb::ndarray<nb::numpy, uint8_t>((void*)p.data, 1, &p.bytes, nb::find(p));
        })
        .def_ro("n", &Packed::n)
        .def_ro("k", &Packed::k)
        .def_prop_ro("format", [](const Packed& p) { return FORMATS[p.format].name; });

    nb::class_<LowRankKeys>(m, "LowRankKeys")
        .def("__init__", [](LowRankKeys* self, const std::string& stored, nb::tuple sizes,
                            const std::vector<std::tuple<std::vector<float>, float>>& rotations, std::vector<int> of_layer) {
            const nb::tuple all = nb::make_tuple(1, sizes[2], sizes[0], sizes[1], 1), none = nb::make_tuple(0, 0, 0, 0);
            KeysShape shape{kv_memory("tiled", stored, none, all), {}, std::move(of_layer)};
            for (const auto& [frequencies, temper] : rotations) shape.rotations.push_back({frequencies, temper});
            new (self) LowRankKeys(std::move(shape));
        }, nb::arg("stored"), nb::arg("sizes"), nb::arg("rotations"), nb::arg("of_layer"))
        .def("add", [](LowRankKeys& k, const std::vector<int64_t>& aliases,
                       const std::vector<std::tuple<uintptr_t, uintptr_t, int>>& layers) {
            std::vector<Factors> factors;
            for (const auto& [coefficients, basis, rank] : layers)
                factors.push_back({(const uint8_t*)coefficients, (const uint8_t*)basis, rank});
            k.add(aliases, factors);
        })
        .def("remove", &LowRankKeys::remove)
        .def("rebuild", [](const LowRankKeys& k, const std::string& isa, std::tuple<int64_t, int64_t, int> at, uintptr_t out) {
            const Kernels* some = kernels(isa.c_str());
            if (!some) throw std::invalid_argument("this build or this CPU has no '" + isa + "'");
            k.rebuild(*some, {std::get<0>(at), std::get<1>(at), std::get<2>(at)}, (uint8_t*)out);
        });

    nb::class_<Tiers>(m, "Tiers")
        .def("__init__", [](Tiers* self, std::tuple<int, int, int64_t, int64_t, int64_t, bool, size_t> shape,
                            uintptr_t cells, const std::string& folder, double link) {
            const auto [heads, count, layers, stages, layer_pages, aliases, blob] = shape;
            const TierShape s{heads, count, layers, stages, layer_pages, aliases, blob};
            new (self) Tiers(s, (uint8_t*)cells, slow_tier(s, folder), link);
        }, nb::arg("shape"), nb::arg("cells"), nb::arg("folder"), nb::arg("link"))
        .def("bring", &Tiers::bring, nb::arg("layer"), nb::arg("pages"), nb::arg("written"),
             nb::call_guard<nb::gil_scoped_release>())
        .def("put", &Tiers::put, nb::call_guard<nb::gil_scoped_release>())
        .def("drop", &Tiers::drop)
        .def("stored", &Tiers::stored)
        .def("copy", &Tiers::copy_pages)
        .def("load", [](Tiers& t, int64_t page, int head, uintptr_t out) { return t.load(page, head, (uint8_t*)out); })
        .def("step", &Tiers::step)
        .def("alias", [](Tiers& t, const std::vector<int64_t>& names, const std::vector<int64_t>& pages, uintptr_t apart) {
            t.alias(names, pages, (const uint8_t*)apart);
        }, nb::arg("names"), nb::arg("pages"), nb::arg("apart"))
        .def("set_keys", &Tiers::set_keys)
        .def_prop_ro("descriptor", &Tiers::descriptor)
        .def("places", [](Tiers& t) {
            const size_t shape[2] = {(size_t)t.shape().numbers(), (size_t)t.shape().heads};
            return nb::ndarray<nb::numpy, int32_t>((void*)t.places(), 2, shape, nb::find(t));  // to be read
        })
        .def("stats", [](const Tiers& t) {
            const TierStats s = t.stats();
            nb::dict d;
            d["hits"] = s.hits, d["misses"] = s.misses, d["evictions"] = s.evictions, d["bytes_in"] = s.bytes_in;
            d["bytes_out"] = s.bytes_out, d["failures"] = s.failures, d["stall_seconds"] = s.stall_seconds;
            return d;
        });

    nb::class_<Program>(m, "Program")
        .def(nb::init<const std::string&, int, bool, bool>(), nb::arg("isa"), nb::arg("threads"), nb::arg("cascade"),
             nb::arg("split"))
        .def_prop_ro("isa", [](const Program& p) { return p.kernels().name; })
        .def("slot", &Program::slot, nb::arg("width"), nb::arg("sampled") = false)
        .def("mark", &Program::mark)
        .def("shape", [](Program& p, int heads, const std::string& layout, const std::string& stored, nb::tuple addresses,
                         nb::tuple sizes) {
            const KVMemory kv = kv_memory(layout, stored, addresses, sizes);
            return p.shape({heads, kv.heads, kv.dim}, kv);
        }, nb::arg("heads"), nb::arg("layout"), nb::arg("stored"), nb::arg("addresses"), nb::arg("sizes"))
        .def("embed", [](Program& p, int out, const std::string& format, uintptr_t rows, size_t row_bytes, int width,
                         float scale) { p.embed(out, format_of(format), (const uint8_t*)rows, row_bytes, width, scale); })
        .def("angles", &Program::angles)
        .def("linear", [](Program& p, int in, int out, nb::list weights, const std::string& activation,
                          std::vector<float> norm, float eps, std::vector<float> bias, bool add,
                          const std::string& gate, bool sampled) {
            const auto rows = choice<Activation>(
                activation, {"exact", "int8", "bf16", "int16", "int8-token", "fp8-token", "atom",
                             "tender", "tender-explicit"});
            p.linear({in, out, weights_of(weights), rows,
                      std::move(norm), eps, std::move(bias), add,
                      choice<Gate>(gate, {"", "silu", "gelu", "gelu_pytorch_tanh", "relu"}), sampled});
        }, nb::arg("source"), nb::arg("target"), nb::arg("weights"), nb::arg("activation"), nb::arg("norm"),
           nb::arg("eps"), nb::arg("bias"), nb::arg("add"), nb::arg("gate"), nb::arg("sampled"))
        .def("norm_add", &Program::norm_add, nb::arg("source"), nb::arg("target"), nb::arg("norm"), nb::arg("eps"))
        .def("rope", [](Program& p, std::tuple<int, int, int> slots, int layer, int shape, float scale,
                        std::vector<float> q_norm, std::vector<float> k_norm, float eps) {
            const auto [in, angles, q] = slots;
            p.rope({in, angles, q, layer, shape, scale, std::move(q_norm), std::move(k_norm), eps});
        }, nb::arg("slots"), nb::arg("layer"), nb::arg("shape"), nb::arg("scale"), nb::arg("q_norm"), nb::arg("k_norm"),
           nb::arg("eps"))
        .def("attend", [](Program& p, std::tuple<int, int, int, int, int> on, int window, uintptr_t variant,
                          std::vector<float> params) {
            const auto [q, out, layer, shape, chosen] = on;
            p.attend({q, out, layer, shape, chosen}, window, (Variant)variant, std::move(params));
        }, nb::arg("on"), nb::arg("window"), nb::arg("variant"), nb::arg("params"))
        .def("choosing", [](Program& p, int shape, int window, int budget, int leading, bool adaptive) {
            return p.choosing(shape, {window, budget, leading, false, adaptive});
        }, nb::arg("shape"), nb::arg("window"), nb::arg("budget"), nb::arg("leading"), nb::arg("adaptive"))
        .def("pick", [](Program& p, int chosen, int q, int layer, const std::string& kind, uintptr_t summaries, int vectors) {
            p.pick(chosen, q, layer, summary_of(kind), vectors, (const uint8_t*)summaries);
        }, nb::arg("chosen"), nb::arg("q"), nb::arg("layer"), nb::arg("kind"), nb::arg("summaries"), nb::arg("vectors") = 2)
        .def("summarise", [](Program& p, const std::string& kind, int layers, const std::vector<int64_t>& pages,
                             uintptr_t out, int vectors) {
            p.summarise(summary_of(kind), layers, pages, (uint8_t*)out, vectors);
        }, nb::arg("kind"), nb::arg("layers"), nb::arg("pages"), nb::arg("out"), nb::arg("vectors") = 2)
        .def("set_tiers", [](Program& p, std::shared_ptr<Tiers> tiers) { p.set_tiers(std::move(tiers)); })
        .def("fetch", [](Program& p, std::tuple<int, int, int> on, int window, bool guessed) {
            const auto [layer, shape, chosen] = on;
            p.fetch({layer, shape, window, chosen, guessed});
        }, nb::arg("on"), nb::arg("window"), nb::arg("guessed"))
        .def("fetch_ahead", &Program::fetch_ahead, nb::arg("layer"), nb::arg("chosen"))
        .def("turn", [](Program& p, std::tuple<int, int, int> slots, int shape, float scale, std::vector<float> q_norm,
                        float eps, uintptr_t basis, int width) {
            const auto [in, angles, out] = slots;
            p.turn({in, angles, out, shape, scale, std::move(q_norm), eps, (const float*)basis, width});
        }, nb::arg("slots"), nb::arg("shape"), nb::arg("scale"), nb::arg("q_norm"), nb::arg("eps"), nb::arg("basis"),
           nb::arg("width"))
        .def("pick_partial", [](Program& p, int chosen, int q, int layer, uintptr_t keys, int width, float alpha) {
            p.pick_partial(chosen, q, layer, (const uint8_t*)keys, width, alpha);
        }, nb::arg("chosen"), nb::arg("q"), nb::arg("layer"), nb::arg("keys"), nb::arg("width"), nb::arg("alpha"))
        .def("seal_partial", [](Program& p, std::pair<int, int> layers, uintptr_t basis, int width, uintptr_t out,
                                const std::vector<int64_t>& pages) {
            p.seal_partial({layers.first, layers.second, (const float*)basis, width, (uint8_t*)out}, pages);
        }, nb::arg("layers"), nb::arg("basis"), nb::arg("width"), nb::arg("out"), nb::arg("pages"))
        .def("unread", &Program::unread)
        .def("clear", [](Program& p) { p.step.clear(); })
        .def("set_rows", [](Program& p, int rows) {  // rows without a sequence, for operations that need no more
            p.step.clear();
            p.step.tokens.assign(rows, 0);
        })
        .def("add", add_span, nb::arg("start"), nb::arg("stop"), nb::arg("tokens"), nb::arg("drafts"), nb::arg("pages"),
             nb::arg("first_page"), nb::arg("sample"), nb::arg("dense_until") = INT32_MAX,
             nb::arg("aliases") = std::pair<uintptr_t, int>{0, 0}, nb::arg("rows") = std::vector<int>())
        .def("keep", &Program::keep, nb::arg("rows"), nb::arg("slots"))
        .def("restore", &Program::restore)
        .def("sample", [](Program& p, std::vector<int> rows) { p.step.sampled = std::move(rows); })
        .def("plan", &Program::plan)
        .def("run", &Program::run, nb::call_guard<nb::gil_scoped_release>())
        .def("tune", &Program::tune, nb::call_guard<nb::gil_scoped_release>())
        .def("profile", &Program::profile)
        .def("argmax", &Program::argmax)
        .def("penalise", penalise)
        .def("shift", shift)
        .def("allow", allow)
        .def("choose", choose)
        .def("num_rows", [](const Program& p) { return p.step.rows(); })
        .def("view", [](Program& p, int slot, int rows) {  // valid until the program grows
            const size_t shape[2] = {(size_t)rows, (size_t)p.stride(slot)};
            return nb::ndarray<nb::numpy, float>(p.rows(slot), 2, shape, nb::find(p));
        })
        .def("attention_stats", [](const Program& p) { return stats_of(p.attention().stats()); });

    nb::class_<SuffixDrafter>(m, "SuffixDrafter")
        .def("__init__", [](SuffixDrafter* self, std::tuple<int, int, double, double> rule, int64_t history, int64_t shared) {
            const auto [tokens, min_match, factor, min_odds] = rule;
            new (self) SuffixDrafter({tokens, min_match, factor, min_odds}, history, shared);
        }, nb::arg("rule"), nb::arg("history"), nb::arg("shared"))
        .def("propose", guess, nb::arg("ids"), nb::arg("salts"), nb::arg("texts"), nb::arg("limits"), nb::arg("room"))
        .def("forget", &SuffixDrafter::forget)
        .def("keep", &SuffixDrafter::keep, nb::arg("salt"), nb::arg("tokens"))
        .def("tokens", &SuffixDrafter::tokens)
        .def("bytes", &SuffixDrafter::bytes);

    nb::class_<PagedAttention>(m, "PagedAttention")
        .def(nb::init<const std::string&, int, nb::tuple, bool, bool>(), nb::arg("isa"), nb::arg("threads"),
             nb::arg("heads"), nb::arg("cascade"), nb::arg("split"))
        .def("plan", &PagedAttention::plan, nb::arg("qo_indptr"), nb::arg("kv_indptr"), nb::arg("lengths"),
             nb::arg("starts"), nb::arg("indices"), nb::arg("positions"), nb::arg("lists"), nb::arg("page_size"))
        .def("run", [](PagedAttention& a, const std::string& layout, const std::string& stored, nb::tuple addresses,
                       nb::tuple sizes, uintptr_t q, uintptr_t out, uintptr_t lse, int window, uintptr_t variant,
                       const std::vector<float>& params) {
            a.run(kv_memory(layout, stored, addresses, sizes), q, out, lse, window, variant, params);
        })
        .def("stats", [](const PagedAttention& a) { return stats_of(a.stats()); });
}
