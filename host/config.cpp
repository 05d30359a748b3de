#include "host/config.h"

#include <cmath>
#include <initializer_list>
#include <set>

#include "host/error.h"
#include "host/json.h"
#include "variants.h"

namespace {

constexpr const char* FORMAT = "attn.cu 3";
constexpr int MAX_LAYERS = 1 << 12, MAX_EXPERTS = 1 << 14, MAX_LENGTH = 1 << 27, MAX_PRODUCT = 1 << 26;
constexpr int MAX_VOCABULARY = 1 << 24;

void check_metadata(const std::string& path, const std::map<std::string, std::string>& metadata) {
  for (const char* key : {"format", "config", "types", "tokenizer_sha256"}) {
    if (!metadata.count(key)) fail("%s: __metadata__ has no \"%s\"; make the file with export.py", path.c_str(), key);
    if (key == std::string("format") && metadata.at(key) != FORMAT)
      fail(
          "%s: __metadata__ \"format\" is \"%s\", this build reads \"%s\"; make it anew: "
          ".venv/bin/python export.py SOURCE -o %s",
          path.c_str(), metadata.at(key).c_str(), FORMAT, path.c_str());
  }
  const std::set<std::string> known = {"format", "config", "types", "tokenizer_sha256", "source", "made_from"};
  for (const auto& [key, text] : metadata)
    if (!known.count(key)) fail("%s: __metadata__ has an unknown key \"%s\"", path.c_str(), key.c_str());
}

enum Presence { REQUIRED, OPTIONAL };  // an optional field that is not there keeps its value

// The fields of "config": each is taken once, checked for type and range; what is left over is refused.
class Fields {
 public:
  Fields(const std::string& path, const std::string& text)
      : path_(path), json_(parse_json(text, path + ": __metadata__ \"config\"")) {
    if (!json_.object()) fail("%s: __metadata__ \"config\" is not a JSON object", path.c_str());
  }

  bool has(const char* key) const { return json_.find(key) != nullptr; }

  void text(const char* key, std::string& out) {
    const Json* value = take(key, REQUIRED);
    if (!value->string()) refuse(key, *value, "a string");
    out = *value->string();
  }

  void boolean(const char* key, bool& out) {
    const Json* value = take(key, OPTIONAL);
    if (!value) return;
    if (!value->boolean()) refuse(key, *value, "true or false");
    out = *value->boolean();
  }

  void integer(const char* key, int& out, int low, int high, Presence presence = REQUIRED) {
    const Json* value = take(key, presence);
    if (value) out = to_integer(key, *value, low, high);
  }

  void number(const char* key, float& out, Presence presence) {
    const Json* value = take(key, presence);
    if (value) out = to_number(key, *value);
  }
  void not_negative(const char* key, float& out, Presence presence) {
    number(key, out, presence);
    require(out >= 0, key, "at least 0");
  }

  void integers(const char* key, std::vector<int>& out, int length, int low, int high) {
    const Json::Array& values = array(key);
    if (values.size() != static_cast<size_t>(length))
      refuse(key, *json_.find(key), "an array of n_layers = " + std::to_string(length) + " elements");
    for (const Json& value : values) out.push_back(to_integer(key, value, low, high));
  }

  void numbers(const char* key, std::vector<float>& out) {
    for (const Json& value : array(key)) out.push_back(to_number(key, value));
  }

  template <class Enum>
  void choice(const char* key, Enum& out, Presence presence,
              std::initializer_list<std::pair<const char*, Enum>> choices) {
    const Json* value = take(key, presence);
    if (!value) return;
    std::string right;
    for (const auto& [text, choice] : choices) {
      if (value->string() && *value->string() == text) {
        out = choice;
        return;
      }
      right += (right.empty() ? "" : ", ") + std::string(text);
    }
    refuse(key, *value, right);
  }

  // Of a field that is there.
  void require(bool right, const char* key, const std::string& what) const {
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
        fail("%s: config \"%s\" = %s is not known to this build", path_.c_str(), key.c_str(), shown(value).c_str());
  }

 private:
  [[noreturn]] void refuse(const char* key, const Json& value, const std::string& right) const {
    fail("%s: config \"%s\" is %s; it must be %s", path_.c_str(), key, shown(value).c_str(), right.c_str());
  }

  static std::string shown(const Json& value) {
    const std::string text = value.text();
    return text.size() > 60 ? text.substr(0, 60) + "..." : text;
  }

  const Json* take(const char* key, Presence presence) {
    used_.insert(key);
    const Json* found = json_.find(key);
    if (!found && presence == REQUIRED)
      fail("%s: config has no \"%s\"; make the file with export.py", path_.c_str(), key);
    return found;
  }

  const Json::Array& array(const char* key) {
    const Json* value = take(key, REQUIRED);
    if (!value->array()) refuse(key, *value, "an array");
    return *value->array();
  }

  int to_integer(const char* key, const Json& value, int low, int high) const {
    const auto x = value.integer<int>();
    if (!x || *x < low || *x > high)
      refuse(key, value, "an integer from " + std::to_string(low) + " to " + std::to_string(high));
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

void read_experts(Fields& f, Config& c) {
  if (!f.has("n_routed_experts")) return;
  f.integer("n_routed_experts", c.n_routed_experts, 1, MAX_EXPERTS);
  f.integer("num_experts_per_tok", c.num_experts_per_tok, 1, c.n_routed_experts);
  f.integer("n_shared_experts", c.n_shared_experts, 0, MAX_EXPERTS, OPTIONAL);
  f.integer("moe_intermediate_size", c.moe_intermediate_size, 1, MAX_WIDTH);
  f.fits("n_shared_experts x moe_intermediate_size", c.n_shared_experts, c.moe_intermediate_size);
  f.integers("moe_layers", c.moe_layers, c.n_layers, 0, 1);
  f.choice("scoring_func", c.scoring_func, REQUIRED, {{"softmax", Scoring::softmax}, {"sigmoid", Scoring::sigmoid}});
  f.boolean("norm_topk_prob", c.norm_topk_prob);
  f.number("routed_scaling_factor", c.routed_scaling_factor, OPTIONAL);
  f.integer("n_group", c.n_group, 1, c.n_routed_experts, OPTIONAL);
  f.integer("topk_group", c.topk_group, 1, c.n_group, OPTIONAL);
  f.choice("group_score", c.group_score, OPTIONAL, {{"max", GroupScore::max}, {"top2_sum", GroupScore::top2_sum}});
  const int in_a_group = c.n_routed_experts / c.n_group, eligible = in_a_group * c.topk_group;
  f.require(c.n_routed_experts % c.n_group == 0, "n_group", "a divisor of n_routed_experts");
  f.require(c.num_experts_per_tok <= eligible, "num_experts_per_tok",
            "at most " + std::to_string(eligible) + ", the experts of topk_group groups");
  f.require(c.group_score != GroupScore::top2_sum || in_a_group >= 2, "group_score",
            "max: with this n_group a group holds one expert");
}

}  // namespace

Config read_config(const std::string& path, const std::map<std::string, std::string>& metadata) {
  check_metadata(path, metadata);
  Config c;
  Fields f(path, metadata.at("config"));
  f.integer("dim", c.dim, 1, MAX_WIDTH);
  f.integer("hidden_dim", c.hidden_dim, 1, MAX_WIDTH);
  f.integer("n_layers", c.n_layers, 1, MAX_LAYERS);
  f.integer("vocab_size", c.vocab_size, 1, MAX_VOCABULARY);
  f.integer("seq_len", c.seq_len, 1, MAX_LENGTH);
  f.text("attention", c.attention);
  f.integer("n_heads", c.n_heads, 1, MAX_WIDTH);
  const bool known = with_variant(c.attention, [&](auto v) { decltype(v)::type::read(f, c); });
  f.require(known, "attention", "mha, mqa, gqa or mla");
  f.choice("norm", c.norm, REQUIRED, {{"rms", NormKind::rms}, {"layer", NormKind::layer}});
  f.not_negative("norm_eps", c.norm_eps, REQUIRED);
  c.latent_norm_eps = c.norm_eps;
  if (c.attention == "mla") f.not_negative("latent_norm_eps", c.latent_norm_eps, OPTIONAL);
  f.choice("activation", c.activation, REQUIRED,
           {{"silu", Activation::silu},
            {"gelu", Activation::gelu},
            {"gelu_tanh", Activation::gelu_tanh},
            {"swiglu_oai", Activation::swiglu_oai}});
  if (c.activation == Activation::swiglu_oai) f.not_negative("swiglu_limit", c.swiglu_limit, REQUIRED);
  f.number("attention_scale", c.attention_scale, REQUIRED);
  f.not_negative("attention_softcap", c.attention_softcap, OPTIONAL);
  f.not_negative("logit_softcap", c.logit_softcap, OPTIONAL);
  f.number("embedding_scale", c.embedding_scale, OPTIONAL);
  f.number("logit_scale", c.logit_scale, OPTIONAL);
  f.number("residual_scale", c.residual_scale, OPTIONAL);
  f.integers("window", c.window, c.n_layers, 0, MAX_LENGTH);
  f.numbers("rope_scale", c.rope_scale);
  f.integer("original_seq_len", c.original_seq_len, 0, MAX_LENGTH, OPTIONAL);
  f.integers("rope", c.rope, c.n_layers, -1, static_cast<int>(c.rope_scale.size()) - 1);
  read_experts(f, c);
  f.refuse_unused();
  return c;
}
