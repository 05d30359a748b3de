// loader.cpp: reads a model file and packs its matrices. Nothing in the file is trusted: every length, offset
// and size is checked before it is used, and whatever is not expected is refused by name.
#include "model.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <map>
#include <set>

#include "host/error.h"
#include "host/json.h"
#include "variants.h"

namespace {

constexpr const char* FORMAT = "attn.cu 1";
constexpr int MAX_LAYERS = 1 << 12, MAX_EXPERTS = 1 << 14, MAX_LENGTH = 1 << 27, MAX_PRODUCT = 1 << 26;
constexpr uint64_t MAX_HEADER = 100'000'000;  // safetensors' own bound

// ---- The file.

class MappedFile {
 public:
  explicit MappedFile(const std::string& path) {
    const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a pipe is refused, not waited for
    if (fd < 0) fail("%s: cannot open the model: %s", path.c_str(), std::strerror(errno));
    struct stat info {};
    const bool regular = fstat(fd, &info) == 0 && S_ISREG(info.st_mode);
    if (regular && info.st_size >= 8) {
      size_ = static_cast<size_t>(info.st_size);
      void* p = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, fd, 0);
      data_ = p == MAP_FAILED ? nullptr : static_cast<const std::byte*>(p);
    }
    close(fd);
    if (!regular) fail("%s: not a file; give the .safetensors that export.py wrote", path.c_str());
    if (size_ == 0)
      fail("%s: only %lld bytes; a model file is longer", path.c_str(), static_cast<long long>(info.st_size));
    if (!data_) fail("%s: cannot map %zu bytes: %s", path.c_str(), size_, std::strerror(errno));
  }
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile() { munmap(const_cast<std::byte*>(data_), size_); }

  const std::byte* data() const { return data_; }
  size_t size() const { return size_; }

  // The pages of [first, last) leave this process; the page cache keeps them. Resident memory is then the
  // packed copy.
  void release(const void* first, const void* last) const {
    const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const auto begin = (reinterpret_cast<uintptr_t>(first) + page - 1) / page * page;
    const auto end = reinterpret_cast<uintptr_t>(last) / page * page;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
  }

 private:
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

struct Entry {
  std::string dtype;
  std::vector<int64_t> shape;
  const std::byte* data = nullptr;
  size_t bytes = 0;
  bool used = false;
};

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); i++) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

size_t element_bytes(const std::string& dtype) {
  static const std::map<std::string, size_t> known = {{"F32", 4}, {"BF16", 2}, {"F16", 2}, {"I8", 1}, {"U8", 1}};
  const auto found = known.find(dtype);
  return found == known.end() ? 0 : found->second;
}

// The header of a safetensors file: 8 bytes of length, then JSON. Data follows without holes or overlaps.
class Header {
 public:
  Header(const std::string& path, const MappedFile& file) : path_(path) {
    uint64_t length = 0;
    std::memcpy(&length, file.data(), 8);
    if (length > MAX_HEADER || length > file.size() - 8)
      fail("%s: header length %" PRIu64 " does not fit the file's %zu bytes; truncated or not a safetensors file",
           path.c_str(), length, file.size());
    const char* text = reinterpret_cast<const char*>(file.data()) + 8;
    const Json json = parse_json({text, length}, path + ": the header");
    if (!json.object()) fail("%s: the header is not a JSON object", path.c_str());
    const std::byte* data = file.data() + 8 + length;
    const size_t data_bytes = file.size() - 8 - static_cast<size_t>(length);
    for (const auto& [name, value] : *json.object()) {
      if (name == "__metadata__")
        read_metadata(value);
      else
        entries_.emplace(name, read_entry(name, value, data, data_bytes));
    }
    check_layout(data, data_bytes);
  }

  const std::string& metadata(const char* key) const {
    const auto found = metadata_.find(key);
    if (found == metadata_.end())
      fail("%s: __metadata__ has no \"%s\"; make the file with export.py", path_.c_str(), key);
    return found->second;
  }

  Entry* find(const std::string& name) {
    const auto found = entries_.find(name);
    return found == entries_.end() ? nullptr : &found->second;
  }

  void refuse_unused() const {
    for (const auto& [name, entry] : entries_)
      if (!entry.used)
        fail("%s: tensor %s %s is not one that this model's config calls for", path_.c_str(), name.c_str(),
             shape_text(entry.shape).c_str());
  }

 private:
  void read_metadata(const Json& value) {
    if (!value.object()) fail("%s: __metadata__ is not a JSON object", path_.c_str());
    for (const auto& [key, text] : *value.object()) {
      if (!text.string()) fail("%s: __metadata__ \"%s\" is not a string", path_.c_str(), key.c_str());
      if (key != "format" && key != "config" && key != "tokenizer_sha256" && key != "source")
        fail("%s: __metadata__ has an unknown key \"%s\"", path_.c_str(), key.c_str());
      metadata_[key] = *text.string();
    }
  }

  Entry read_entry(const std::string& name, const Json& value, const std::byte* data, size_t data_bytes) const {
    const auto bad = [&](const char* field, const char* why) {
      fail("%s: tensor %s: %s %s", path_.c_str(), name.c_str(), field, why);
    };
    const Json *dtype = value.find("dtype"), *shape = value.find("shape"), *offsets = value.find("data_offsets");
    if (!dtype || !shape || !offsets || value.object()->size() != 3)
      bad("entry", "must hold dtype, shape and data_offsets and nothing else");
    Entry entry;
    if (!dtype->string()) bad("dtype", "is not a string");
    entry.dtype = *dtype->string();
    const size_t element = element_bytes(entry.dtype);
    if (!element) bad("dtype", ("is " + entry.dtype + ", not one of F32, BF16, F16, I8, U8").c_str());
    if (!shape->array() || shape->array()->size() > 3) bad("shape", "is not an array of at most 3 integers");
    size_t bytes = element;
    for (const Json& d : *shape->array()) {
      const int n = d.integer<int>().value_or(-1);
      if (n < 0) bad("shape", "has a size that is not 0 .. 2^31 - 1");
      entry.shape.push_back(n);
      if (__builtin_mul_overflow(bytes, static_cast<size_t>(n), &bytes)) bad("shape", "overflows");
    }
    const auto offset = [&](size_t i) {
      const auto x =
          offsets->array() && offsets->array()->size() == 2 ? (*offsets->array())[i].integer<uint64_t>() : std::nullopt;
      if (!x) bad("data_offsets", "is not two integers");
      return *x;
    };
    const uint64_t begin = offset(0), end = offset(1);
    if (begin > end || end > data_bytes)
      fail("%s: tensor %s: data_offsets [%" PRIu64 ", %" PRIu64
           "] lie outside the file's %zu bytes of data; truncated?",
           path_.c_str(), name.c_str(), begin, end, data_bytes);
    if (end - begin != bytes)
      fail("%s: tensor %s: %s %s needs %zu bytes, data_offsets give %" PRIu64, path_.c_str(), name.c_str(),
           entry.dtype.c_str(), shape_text(entry.shape).c_str(), bytes, end - begin);
    entry.data = data + begin;
    entry.bytes = bytes;
    if (reinterpret_cast<uintptr_t>(entry.data) % element != 0)
      bad("data_offsets", "are not aligned to the element's size; make the file with export.py");
    return entry;
  }

  void check_layout(const std::byte* data, size_t data_bytes) const {
    std::vector<std::pair<const Entry*, const std::string*>> order;
    for (const auto& [name, entry] : entries_) order.emplace_back(&entry, &name);
    std::sort(order.begin(), order.end(), [](const auto& a, const auto& b) {
      return std::pair(a.first->data, a.first->bytes) < std::pair(b.first->data, b.first->bytes);
    });
    const std::byte* end = data;
    for (const auto& [entry, name] : order) {
      if (entry->data != end)
        fail("%s: tensor %s: data_offsets %s the tensor before", path_.c_str(), name->c_str(),
             entry->data < end ? "overlap" : "leave a hole after");
      end = entry->data + entry->bytes;
    }
    if (end != data + data_bytes)
      fail("%s: %zu bytes after the last tensor", path_.c_str(), static_cast<size_t>(data + data_bytes - end));
  }

  std::string path_;
  std::map<std::string, std::string> metadata_;
  std::map<std::string, Entry> entries_;
};

// ---- Hyper-parameters.

// The fields of "config": each is taken once, checked for type and range; what is left over is refused.
class Fields {
 public:
  Fields(const std::string& path, const std::string& text)
      : path_(path), json_(parse_json(text, path + ": __metadata__ \"config\"")) {
    if (!json_.object()) fail("%s: __metadata__ \"config\" is not a JSON object", path.c_str());
  }

  void text(const char* key, std::string& out) {
    const Json* value = take(key, true);
    if (!value->string()) refuse(key, *value, "a string");
    out = *value->string();
  }

  void integer(const char* key, int& out, int low, int high, bool required = true) {
    const Json* value = take(key, required);
    if (value) out = to_integer(key, *value, low, high);
  }

  void number(const char* key, float& out, bool required = false) {
    const Json* value = take(key, required);
    if (value) out = to_number(key, *value);
  }

  void boolean(const char* key, bool& out) {
    const Json* value = take(key, false);
    if (!value) return;
    if (!value->boolean()) refuse(key, *value, "true or false");
    out = *value->boolean();
  }

  void integers(const char* key, std::vector<int>& out, int length, int low, int high) {
    for (const Json& v : array(key, length)) out.push_back(to_integer(key, v, low, high));
  }

  void numbers(const char* key, std::vector<float>& out) {
    for (const Json& v : array(key, -1)) out.push_back(to_number(key, v));
  }

  template <class Enum>
  void choice(const char* key, Enum& out, std::initializer_list<std::pair<const char*, Enum>> choices, bool required) {
    const Json* value = take(key, required);
    if (!value) return;
    std::string right;
    for (const auto& [text, choice] : choices) {
      if (value->string() && *value->string() == text) {
        out = choice;
        return;
      }
      right += (right.empty() ? "" : ", ") + std::string(text);
    }
    refuse(key, *value, right.c_str());
  }

  bool has(const char* key) const { return json_.find(key) != nullptr; }

  void require(bool right, const char* key, const char* what) const {
    if (!right) refuse(key, *json_.find(key), what);
  }

  // The width of a layer: count x size.
  void fits(const char* what, int count, int size) const {
    if (static_cast<int64_t>(count) * size > MAX_PRODUCT)
      fail("%s: config %s is %d x %d; more than %d are not supported", path_.c_str(), what, count, size, MAX_PRODUCT);
  }

  void refuse_unused() const {
    for (const auto& [key, value] : *json_.object())
      if (!used_.count(key))
        fail("%s: config \"%s\" = %s is not known to this build", path_.c_str(), key.c_str(), text(value).c_str());
  }

  [[noreturn]] void refuse(const char* key, const Json& value, const char* right) const {
    fail("%s: config \"%s\" is %s; it must be %s", path_.c_str(), key, text(value).c_str(), right);
  }

 private:
  static std::string text(const Json& value) {
    const std::string t = value.text();
    return t.size() > 60 ? t.substr(0, 60) + "..." : t;
  }

  const Json* take(const char* key, bool required) {
    used_.insert(key);
    const Json* found = json_.find(key);
    if (!found && required) fail("%s: config has no \"%s\"; make the file with export.py", path_.c_str(), key);
    return found;
  }

  const Json::Array& array(const char* key, int length) {
    const Json* value = take(key, true);
    if (!value->array()) refuse(key, *value, "an array");
    if (length >= 0 && value->array()->size() != static_cast<size_t>(length))
      refuse(key, *value, ("an array of n_layers = " + std::to_string(length) + " elements").c_str());
    return *value->array();
  }

  int to_integer(const char* key, const Json& value, int low, int high) const {
    const auto x = value.integer<int>();
    if (!x || *x < low || *x > high)
      refuse(key, value, ("an integer from " + std::to_string(low) + " to " + std::to_string(high)).c_str());
    return *x;
  }

  float to_number(const char* key, const Json& value) const {
    const auto x = static_cast<float>(value.number().value_or(NAN));
    if (!std::isfinite(x)) refuse(key, value, "a finite number");
    return x;
  }

  std::string path_;
  Json json_;
  std::set<std::string> used_;
};

// f(variant) for the variant of this name; false: there is none.
template <class F>
bool with_variant(const std::string& name, F f) {
  const auto try_each = [&]<class... V>(std::type_identity<std::tuple<V...>>) {
    return ((name == V::name && (f(std::type_identity<V>()), true)) || ...);
  };
  return try_each(std::type_identity<Variants>());
}

void read_attention(Fields& f, Config& c) {
  f.text("attention", c.attention);
  f.integer("n_heads", c.n_heads, 1, MAX_WIDTH);
  const bool known = with_variant(c.attention, [&](auto v) { decltype(v)::type::read(f, c); });
  f.require(known, "attention", "mha, mqa, gqa or mla");
}

void read_experts(Fields& f, const std::string& path, Config& c) {
  if (!f.has("n_routed_experts")) return;
  f.integer("n_routed_experts", c.n_routed_experts, 1, MAX_EXPERTS);
  f.integer("num_experts_per_tok", c.num_experts_per_tok, 1, c.n_routed_experts);
  f.integer("n_shared_experts", c.n_shared_experts, 0, MAX_EXPERTS, false);
  f.integer("moe_intermediate_size", c.moe_intermediate_size, 1, MAX_WIDTH);
  f.integers("moe_layers", c.moe_layers, c.n_layers, 0, 1);
  f.choice("scoring_func", c.scoring_func, {{"softmax", Scoring::softmax}, {"sigmoid", Scoring::sigmoid}}, true);
  f.boolean("norm_topk_prob", c.norm_topk_prob);
  f.number("routed_scaling_factor", c.routed_scaling_factor);
  f.integer("n_group", c.n_group, 1, c.n_routed_experts, false);
  f.integer("topk_group", c.topk_group, 1, c.n_group, false);
  f.choice("group_score", c.group_score, {{"max", GroupScore::max}, {"top2_sum", GroupScore::top2_sum}}, false);
  if (c.n_routed_experts % c.n_group != 0)
    fail("%s: config \"n_group\" is %d; it must divide n_routed_experts = %d", path.c_str(), c.n_group,
         c.n_routed_experts);
  const int eligible = c.n_routed_experts / c.n_group * c.topk_group;
  if (c.num_experts_per_tok > eligible)
    fail("%s: config \"num_experts_per_tok\" is %d; topk_group = %d of %d groups hold only %d experts", path.c_str(),
         c.num_experts_per_tok, c.topk_group, c.n_group, eligible);
  if (c.group_score == GroupScore::top2_sum && c.n_routed_experts / c.n_group < 2)
    fail(
        "%s: config \"group_score\" is top2_sum; a group must hold at least 2 experts, n_group = %d leaves "
        "%d",
        path.c_str(), c.n_group, c.n_routed_experts / c.n_group);
}

Config read_config(const std::string& path, const std::string& text) {
  Config c;
  Fields f(path, text);
  f.integer("dim", c.dim, 1, MAX_WIDTH);
  f.integer("hidden_dim", c.hidden_dim, 1, MAX_WIDTH);
  f.integer("n_layers", c.n_layers, 1, MAX_LAYERS);
  f.integer("vocab_size", c.vocab_size, 1, 1 << 24);
  f.integer("seq_len", c.seq_len, 1, MAX_LENGTH);
  read_attention(f, c);
  f.choice("norm", c.norm, {{"rms", NormKind::rms}, {"layer", NormKind::layer}}, true);
  f.number("norm_eps", c.norm_eps, true);
  f.choice("activation", c.activation,
           {{"silu", Activation::silu},
            {"gelu", Activation::gelu},
            {"gelu_tanh", Activation::gelu_tanh},
            {"swiglu_oai", Activation::swiglu_oai}},
           true);
  if (c.activation == Activation::swiglu_oai) f.number("swiglu_limit", c.swiglu_limit, true);
  f.number("attention_scale", c.attention_scale, true);
  f.number("attention_softcap", c.attention_softcap);
  f.number("logit_softcap", c.logit_softcap);
  f.number("embedding_scale", c.embedding_scale);
  f.number("logit_scale", c.logit_scale);
  f.number("residual_scale", c.residual_scale);
  f.integers("window", c.window, c.n_layers, 0, MAX_LENGTH);
  f.numbers("rope_scale", c.rope_scale);
  f.integer("original_seq_len", c.original_seq_len, 0, MAX_LENGTH, false);
  f.integers("rope", c.rope, c.n_layers, -1, static_cast<int>(c.rope_scale.size()) - 1);
  read_experts(f, path, c);
  f.refuse_unused();
  const auto not_below = [&](const char* key, float value, float least) {
    if (value < least) fail("%s: config \"%s\" is %g; it must be at least %g", path.c_str(), key, value, least);
  };
  f.fits("n_shared_experts x moe_intermediate_size", c.n_shared_experts, c.moe_intermediate_size);
  not_below("norm_eps", c.norm_eps, 0);
  not_below("swiglu_limit", c.swiglu_limit, 0);
  not_below("attention_softcap", c.attention_softcap, 0);
  not_below("logit_softcap", c.logit_softcap, 0);
  return c;
}

// ---- Tensors.

// A matrix to pack and where its description goes.
struct PackJob {
  TensorView source;
  bool transposed;
  Matrix* out;
};

// Takes tensors by name with their expected shape. Matrices are packed, and vectors copied, once all are
// known.
class Collector {
 public:
  Collector(const std::string& path, Header& header) : path_(path), header_(header) {}

  bool has(const std::string& name) { return header_.find(name) != nullptr; }

  // A matrix [n, k] (or, stacked, [count, n, k]) of any weight type: its `count` views. Empty where it may be
  // absent.
  std::vector<TensorView> views(const std::string& name, int count, int n, int k, bool floats_only) {
    const std::string weight = name + ".weight";
    const Entry& e = entry(weight);
    TensorView v;
    v.n = n;
    v.k = k;
    v.type = e.dtype == "F32"    ? DType::f32
             : e.dtype == "BF16" ? DType::bf16
             : e.dtype == "F16"  ? DType::f16
             : e.dtype == "I8"   ? DType::q8
                                 : DType::q4;
    const bool quantised = v.type == DType::q8 || v.type == DType::q4;
    if (quantised && floats_only) refuse(weight, e, "F32, BF16 or F16", {count, n, k});
    if (quantised && k % GROUP != 0)
      refuse(weight, e, "F32, BF16 or F16, since the inputs are no multiple of 32", {n, k});
    expect(weight, e, {count, n, v.type == DType::q4 ? k / 2 : k});
    v.data = e.data;
    if (quantised) v.scale = halves(name + ".scale", {count, n, k / GROUP});
    if (v.type == DType::q4) v.min = halves(name + ".min", {count, n, k / GROUP});

    std::vector<TensorView> all;
    const size_t stride = e.bytes / static_cast<size_t>(count),
                 groups = static_cast<size_t>(n) * static_cast<size_t>(k / GROUP);
    for (int i = 0; i < count; i++) {
      all.push_back(v);
      v.data = static_cast<const std::byte*>(v.data) + stride;
      if (v.scale) v.scale += groups;
      if (v.min) v.min += groups;
    }
    return all;
  }

  void matrix(const std::string& name, int n, int k, Matrix& out) {
    jobs.push_back({views(name, 1, n, k, false)[0], false, &out});
  }

  // [groups, n, k] in one, and a bias [groups, n] where there is one.
  void grouped(const std::string& name, int groups, int n, int k, Linear& out) {
    group(name, groups, n, k, false, false, out.weight);
    optional_vector(name + ".bias", {groups, n}, out.bias);
  }
  // The same where each group is a head of MLA; transposed: [groups, k, n] of it.
  void heads(const std::string& name, int groups, int n, int k, Linear& out) {
    group(name, groups, n, k, true, false, out.weight);
  }
  void heads_transposed(const std::string& name, int groups, int n, int k, Linear& out) {
    group(name, groups, n, k, true, true, out.weight);
  }

  void linear(const std::string& name, int n, int k, Linear& out) {
    matrix(name, n, k, out.weight);
    optional_vector(name + ".bias", {n}, out.bias);
  }

  void norm(const std::string& name, int n, Norm& out) {
    out.n = n;
    optional_vector(name + ".weight", {n}, out.weight);
    if (out.weight) return optional_vector(name + ".bias", {n}, out.bias);
  }

  // The norm of `heads` heads of n elements: of each, or of all together, as long as its weight is.
  void norm_of_heads(const std::string& name, int heads, int n, Norm& out) {
    const bool row = has(name + ".weight") && length(name + ".weight") == int64_t{heads} * n;
    norm(name, row ? heads * n : n, out);
  }

  void vector(const std::string& name, std::vector<int64_t> shape, const float*& out) {
    const Entry& e = entry(name);
    if (e.dtype != "F32") refuse(name, e, "F32", shape);
    expect(name, e, shape);
    vectors.emplace_back(&e, &out);
    out = reinterpret_cast<const float*>(e.data);  // until pack() copies it
  }

  void optional_vector(const std::string& name, std::vector<int64_t> shape, const float*& out) {
    if (has(name)) vector(name, std::move(shape), out);
  }

  int64_t length(const std::string& name) {
    const Entry& e = entry(name);
    if (e.shape.size() != 1) refuse(name, e, "F32", {-1});
    return e.shape[0];
  }

  std::vector<PackJob> jobs;
  std::vector<std::pair<const Entry*, const float**>> vectors;

 private:
  void group(const std::string& name, int groups, int n, int k, bool floats_only, bool transposed, Matrix& out) {
    out.groups = groups;
    for (TensorView& view : views(name, groups, n, k, floats_only)) {
      if (transposed) std::swap(view.n, view.k);
      jobs.push_back({view, transposed, &out});
    }
  }

  Entry& entry(const std::string& name) {
    Entry* e = header_.find(name);
    if (!e) fail("%s: tensor %s is missing", path_.c_str(), name.c_str());
    e->used = true;
    return *e;
  }

  const uint16_t* halves(const std::string& name, std::vector<int64_t> shape) {
    const Entry& e = entry(name);
    if (e.dtype != "F16") refuse(name, e, "F16", shape);
    expect(name, e, shape);
    return reinterpret_cast<const uint16_t*>(e.data);
  }

  // A leading size of 1 may be left out: [1, n, k] is [n, k].
  void expect(const std::string& name, const Entry& e, std::vector<int64_t> shape) const {
    if (shape.size() == 3 && shape[0] == 1 && e.shape.size() == 2) shape.erase(shape.begin());
    if (e.shape != shape) refuse(name, e, e.dtype.c_str(), shape);
  }

  [[noreturn]] void refuse(const std::string& name, const Entry& e, const char* dtype,
                           const std::vector<int64_t>& shape) const {
    fail("%s: tensor %s is %s %s, expected %s %s", path_.c_str(), name.c_str(), e.dtype.c_str(),
         shape_text(e.shape).c_str(), dtype, shape_text(shape).c_str());
  }

  std::string path_;
  Header& header_;
};

void collect_mlp(Collector& t, const std::string& at, const Config& c, int hidden, Mlp& mlp) {
  const int dim = c.dim;
  if (t.has(at + "gate_proj.weight") || c.activation == Activation::swiglu_oai)
    t.linear(at + "gate_proj", hidden, dim, mlp.gate);
  t.linear(at + "up_proj", hidden, dim, mlp.up);
  t.linear(at + "down_proj", dim, hidden, mlp.down);
}

void collect_experts(Collector& t, const std::string& at, const Config& c, Layer& l) {
  t.matrix(at + "router", c.n_routed_experts, c.dim, l.router.weight);
  t.optional_vector(at + "router.logit_bias", {c.n_routed_experts}, l.router.bias);
  t.optional_vector(at + "router.bias", {c.n_routed_experts}, l.router_bias);
  const int E = c.n_routed_experts, hidden = c.moe_intermediate_size;
  t.grouped(at + "experts.gate_proj", E, hidden, c.dim, l.experts.gate);
  t.grouped(at + "experts.up_proj", E, hidden, c.dim, l.experts.up);
  t.grouped(at + "experts.down_proj", E, c.dim, hidden, l.experts.down);
  if (c.n_shared_experts)
    collect_mlp(t, at + "shared_experts.", c, c.n_shared_experts * c.moe_intermediate_size, l.shared);
}

void collect(Collector& t, Model& m) {
  const Config& c = m.config;
  t.matrix("embed_tokens", c.vocab_size, c.dim, m.embed_tokens);
  if (t.has("lm_head.weight")) t.matrix("lm_head", c.vocab_size, c.dim, m.lm_head.weight);
  t.optional_vector("lm_head.bias", {c.vocab_size}, m.lm_head.bias);
  t.optional_vector("position_embedding.weight", {c.seq_len, c.dim}, m.position_embedding);
  t.norm("norm", c.dim, m.final_norm);
  int rotated = 0;
  with_variant(c.attention, [&](auto v) { rotated = decltype(v)::type::rotated(c); });
  m.rope.resize(c.rope_scale.size());
  for (size_t i = 0; i < m.rope.size(); i++) {
    const std::string at = "rope." + std::to_string(i) + ".", name = at + "inv_freq";
    const int64_t n = t.length(name);
    if (2 * n > rotated || n < 1)
      fail("%s: tensor %s has %lld frequencies; a head has 1 to %d", m.path.c_str(), name.c_str(),
           static_cast<long long>(n), rotated / 2);
    m.rope[i].n = static_cast<int>(n);
    t.vector(name, {n}, m.rope[i].inv_freq);
    if (c.original_seq_len > 0) t.vector(at + "long_inv_freq", {n}, m.rope[i].long_inv_freq);
  }
  m.layers.resize(static_cast<size_t>(c.n_layers));
  for (int i = 0; i < c.n_layers; i++) {
    Layer& l = m.layers[static_cast<size_t>(i)];
    const std::string at = "layers." + std::to_string(i) + ".";
    t.norm(at + "attention_norm", c.dim, l.attention_norm);
    t.norm(at + "attention_post_norm", c.dim, l.attention_post_norm);
    t.norm(at + "mlp_norm", c.dim, l.mlp_norm);
    t.norm(at + "mlp_post_norm", c.dim, l.mlp_post_norm);
    with_variant(c.attention, [&](auto v) { decltype(v)::type::collect(t, at, c, l); });
    if (c.is_moe(i))
      collect_experts(t, at, c, l);
    else
      collect_mlp(t, at, c, c.hidden_dim, l.mlp);
  }
}

// ---- Packing.

constexpr size_t RELEASE_EVERY = size_t{8} << 20;  // bytes of the file that are resident at most while packing

size_t source_row_bytes(const TensorView& v) {
  const auto k = static_cast<size_t>(v.k);
  return v.type == DType::f32 ? 4 * k : v.type == DType::q8 ? k : v.type == DType::q4 ? k / 2 : 2 * k;
}

size_t packed_bytes(const PackJob& j) {
  return packed_bytes(j.source.type, j.source.n, j.source.k);
}

void pack_matrices(const MappedFile& file, const std::vector<PackJob>& jobs, Model& m, Threads& threads) {
  size_t total = 0;
  for (const PackJob& j : jobs) total += packed_bytes(j);
  m.packed = Buffer<std::byte>(total);
  std::byte* at = m.packed.data();
  for (const PackJob& j : jobs) {
    const TensorView& s = j.source;
    const int blocks = row_blocks(s.n);
    const size_t block_rows = static_cast<size_t>(s.n + blocks - 1) / static_cast<size_t>(blocks);
    const size_t row = source_row_bytes(s);
    // A transposed source is read by columns: all of it at once.
    const int step = j.transposed ? blocks : static_cast<int>(std::max<size_t>(1, RELEASE_EVERY / (row * block_rows)));
    for (int first = 0; first < blocks; first += step) {
      const int last = std::min(blocks, first + step);
      threads.run(threads.most(), [&](const Team& team) {
        team.for_each(last - first, [&](int b) { pack(s, j.transposed, first + b, at); });
      });
      const auto* data = static_cast<const std::byte*>(s.data);
      file.release(data, data + row * std::min(static_cast<size_t>(s.n), static_cast<size_t>(last) * block_rows));
    }
    if (!j.out->data) *j.out = {s.type, s.n, s.k, j.out->groups, at};  // the first of its groups
    at += packed_bytes(j);
  }
}

void copy_vectors(const std::vector<std::pair<const Entry*, const float**>>& vectors, Model& m) {
  size_t total = 0;
  for (const auto& v : vectors) total += v.first->bytes / sizeof(float);
  m.vectors = Buffer<float>(total);
  float* at = m.vectors.data();
  for (const auto& [entry, out] : vectors) {
    std::memcpy(at, entry->data, entry->bytes);
    *out = at;
    at += entry->bytes / sizeof(float);
  }
}

// What the report says of the weights. A transposed matrix is a second copy of parameters that are counted
// already.
void count(const Collector& tensors, Model& m) {
  const Config& c = m.config;
  std::map<std::string, double> by_type;
  std::set<const Matrix*> routed, not_read = {&m.embed_tokens};
  for (const Layer& l : m.layers) {
    routed.insert({&l.experts.gate.weight, &l.experts.up.weight, &l.experts.down.weight});
    not_read.insert(&l.w_uk.weight);  // decode takes the absorbed form
  }
  const auto is_classifier = [&](const PackJob& j) { return j.out == &m.lm_head.weight; };
  if (std::none_of(tensors.jobs.begin(), tensors.jobs.end(), is_classifier)) not_read.erase(&m.embed_tokens);  // it is
  double read = 0;
  for (const PackJob& j : tensors.jobs) {
    const auto bytes = static_cast<double>(packed_bytes(j));
    const double parameters = static_cast<double>(j.source.n) * j.source.k;
    m.weight_bytes += packed_bytes(j);
    if (!j.transposed) by_type[name(j.source.type)] += parameters;
    if (routed.count(j.out))
      read += bytes * c.num_experts_per_tok / c.n_routed_experts;
    else if (!not_read.count(j.out))
      read += bytes;
  }
  for (const auto& [entry, out] : tensors.vectors) {
    m.weight_bytes += entry->bytes;
    read += static_cast<double>(entry->bytes);
    by_type["f32"] += static_cast<double>(entry->bytes / sizeof(float));
  }
  m.weight_bytes_per_token = static_cast<size_t>(read);
  for (const auto& [type, parameters] : by_type) {
    char text[64];
    std::snprintf(text, sizeof text, "%s%s %.2fM", m.types.empty() ? "" : ", ", type.c_str(), parameters / 1e6);
    m.types += text;
    m.n_parameters += parameters;
  }
}

Config read_checked_config(const std::string& path, const Header& header) {
  if (header.metadata("format") != FORMAT)
    fail("%s: __metadata__ \"format\" is \"%s\", this build reads \"%s\"; make the file again with export.py",
         path.c_str(), header.metadata("format").c_str(), FORMAT);
  return read_config(path, header.metadata("config"));
}

}  // namespace

struct ModelFile::Contents {
  explicit Contents(const std::string& path) : file(path), header(path, file), tensors(path, header) {}
  MappedFile file;
  Header header;
  Collector tensors;
};

ModelFile::ModelFile(const std::string& path) : contents_(new Contents(path)) {
  model.path = path;
  model.config = read_checked_config(path, contents_->header);
  model.tokenizer_sha256 = contents_->header.metadata("tokenizer_sha256");
  collect(contents_->tensors, model);
  contents_->header.refuse_unused();
  count(contents_->tensors, model);
}

ModelFile::~ModelFile() = default;

void ModelFile::pack(Threads& threads) {
  pack_matrices(contents_->file, contents_->tensors.jobs, model, threads);
  copy_vectors(contents_->tensors.vectors, model);
  if (!model.lm_head) model.lm_head.weight = model.embed_tokens;
  contents_.reset();
}

Model load_model(const std::string& path, Threads& threads) {
  ModelFile file(path);
  file.pack(threads);
  return std::move(file.model);
}
