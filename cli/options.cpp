// options.cpp: the command line, with CLI11.
//
// Apart from run.cpp because compiling CLI11 takes longer than all of run.cpp.
#include "cli/options.h"

#include <CLI/CLI.hpp>
#include <charconv>
#include <cmath>
#include <optional>
#include <random>

#include "cli/output.h"
#include "host/error.h"
#include "host/machine.h"

namespace {

std::string complaint(const char* what, const std::string& value, const char* fix) {
  return std::string(what) + " " + value + ": " + fix;
}

// "512M" -> bytes. K, M and G are powers of 1024.
size_t parse_size(const char* flag, const std::string& text) {
  size_t end = 0;
  double number = -1;
  try {
    number = std::stod(text, &end);
  } catch (const std::exception&) {
    end = std::string::npos;
  }
  const std::string unit = end == std::string::npos ? "?" : text.substr(end);
  const int shift = unit.empty() ? 0 : unit == "K" ? 10 : unit == "M" ? 20 : unit == "G" ? 30 : -1;
  const double bytes = std::ldexp(number, shift);
  if (shift < 0 || !(bytes >= 1 && bytes < 0x1p60))
    throw Usage(complaint(flag, text, "must be a size such as 512M or 1.5G"));
  return static_cast<size_t>(bytes);
}

// -e: \n \r \t \\ \" \' and \xHH as in llama.cpp.
std::string unescape(const char* flag, const std::string& text) {
  static const std::map<char, char> letters = {{'n', '\n'},  {'r', '\r'}, {'t', '\t'},
                                               {'\\', '\\'}, {'"', '"'},  {'\'', '\''}};
  std::string out;
  for (size_t i = 0; i < text.size(); i++) {
    if (text[i] != '\\') {
      out += text[i];
      continue;
    }
    const char letter = ++i < text.size() ? text[i] : '\0';
    unsigned code = 0;
    const char* digits = text.data() + std::min(i + 1, text.size());
    const char* end = std::min(digits + 2, text.data() + text.size());
    if (const auto found = letters.find(letter); found != letters.end()) {
      out += found->second;
    } else if (letter == 'x' && end - digits == 2 && std::from_chars(digits, end, code, 16).ptr == end) {
      out += static_cast<char>(code);
      i += 2;
    } else {
      throw Usage(complaint(flag, text, R"(-e knows \n \r \t \\ \" \' and \xHH)"));
    }
  }
  return out;
}

// "1.2,20": GB/s and us.
void parse_link(Options& o) {
  int end = 0;
  const int numbers = std::sscanf(o.link.c_str(), "%lf,%lf%n", &o.link_bandwidth, &o.link_latency, &end);
  if (numbers != 2 || static_cast<size_t>(end) != o.link.size() || !(o.link_bandwidth > 0 && o.link_bandwidth < 1e9) ||
      !(o.link_latency >= 0 && o.link_latency < 1e9))
    throw Usage(complaint("--link", o.link, "must be GB/s,us such as 1.2,20"));
}

// CLI11 takes what is too large for the largest, and 010 for 8.
template <class T>
std::optional<T> whole_number(const std::string& text) {
  T number = 0;
  const char* end = text.data() + text.size();
  const auto [last, error] = std::from_chars(text.data(), end, number);
  return last == end && error == std::errc() ? std::optional(number) : std::nullopt;
}

void unescape_texts(Options& o) {
  o.prompt = unescape("--prompt", o.prompt);
  if (o.system) o.system = unescape("--system", *o.system);
  for (std::string& stop : o.stop) stop = unescape("--stop", stop);
}

void check(const Options& o) {
  const auto require = [](bool right, const char* flag, auto value, const char* fix) {
    if (!right) throw Usage(complaint(flag, CLI::detail::to_string(value), fix));
  };
  if (const std::string wrong = problem(o.sampler); !wrong.empty()) throw Usage("--" + wrong);
  require(o.n >= -2, "-n", o.n, "must be > 0 (0, -1 or -2: until the context is full)");
  require(o.samples >= 1 && o.samples <= 65536, "--samples", o.samples, "must be 1 .. 65536");
  require(o.parallel >= 1 && o.parallel <= 65536, "--parallel", o.parallel, "must be 1 .. 65536");
  require(o.layer >= 0, "--layer", o.layer, "must be >= 0");
  require(o.head >= -1, "--head", o.head, "must be >= 0 (-1: all)");
  require(o.chunks >= 0, "--chunks", o.chunks, "must be >= 0 (0: all)");
  require(o.context >= 0, "--context", o.context, "must be > 0 (0: the model's longest)");
  require(o.batch >= 1 && o.batch <= 65536, "--batch", o.batch, "must be 1 .. 65536");
  require(o.ranks >= 1 && o.ranks <= 1024, "--ranks", o.ranks, "must be 1 .. 1024");
  require(o.threads >= 1 && o.threads <= 1024, "--threads", o.threads, "must be 1 .. 1024 (-1: as without it)");
}

void add_text_flags(CLI::App& app, Options& o) {
  app.add_option("-m,--model,MODEL", o.model, "NAME.safetensors, made by export.py; NAME.tokenizer.bin lies beside it");
  app.add_option("-i,-p,--prompt", o.prompt, "the text to continue; without it: standard input");
  app.add_option("-f,--prompt-file,--file", o.prompt_file, "read it from a file; -: standard input");
  app.add_option("-n,--n-predict,--predict", o.n,
                 "most tokens to generate; 0, -1 or -2: until the context is full (256; chat: 0)");
  app.add_option("--stop", o.stop, "end the text before this one; may be given again")
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->expected(1)
      ->allow_extra_args(false);  // or a text in brackets would be a list
  app.add_flag("-e,--escape", o.escape,
               R"(\n, \t and the like in --prompt, --system and --stop are what they stand for)");
  app.add_flag("--special", o.special, "special tokens in the prompt's text are those tokens, not plain text");
  app.add_flag("--ignore-eos", o.ignore_eos, "go on where the model would end the text");
  app.add_flag("--tokens", o.tokens, "print tokens instead of text: ID and text, one a line");
  app.add_option("--samples", o.samples, "continue the prompt this often, seeds SEED, SEED + 1, ...");
}

void add_sampler_flags(CLI::App& app, SamplerOptions& s) {
  app.add_option("--temp,--temperature", s.temperature, "0 or less: always the likeliest token")->capture_default_str();
  app.add_option("--top-k", s.top_k, "choose among the K likeliest; 0: all")->capture_default_str();
  app.add_option("--top-p", s.top_p, "... the fewest that reach the probability P")->capture_default_str();
  app.add_option("--min-p", s.min_p, "... those of at least P times the largest probability")->capture_default_str();
  app.add_option("--repeat-penalty", s.repeat_penalty, "on the last 64 tokens; 1: none")->capture_default_str();
  app.add_option("-s,--seed", s.seed, "of the draws; -1, as without it: another one each time (the report names it)")
      ->transform([](const std::string& text) {
        const auto seed = whole_number<int64_t>(text);
        if (!seed || *seed < -1) throw Usage(complaint("--seed", text, "must be a whole number from -1 to 2^63 - 1"));
        return std::to_string(*seed == -1 ? random_seed() : static_cast<uint64_t>(*seed));
      });
}

void add_template_flags(CLI::App& app, Options& o, std::string& arguments) {
  app.add_option("--chat-template", o.chat_template, "a chat template in Jinja, instead of the model's own");
  app.add_option("--chat-template-kwargs", arguments, "further variables of it, as JSON: {\"enable_thinking\": false}");
}

// Throws Usage.
Json parse_template_arguments(const std::string& text) {
  try {
    Json arguments = parse_json(text, "--chat-template-kwargs");
    if (!arguments.object()) throw Usage(complaint("--chat-template-kwargs", text, "must be a JSON object"));
    return arguments;
  } catch (const Error& e) {
    throw Usage(e.what());
  }
}

void add_mode_flags(CLI::App& app, Options& o, std::string& max_line) {
  app.add_flag("--chat", o.chat,
               R"(a conversation: each line of standard input is a turn; \ at its end: so is the next)");
  app.add_option("--system", o.system, "the system message of --chat");
  app.add_option("--prompts", o.prompts, "a file of requests, one JSON object a line; -: standard input");
  app.add_option("--max-line", max_line, "longest line of --prompts or --chat (16M)");
  app.add_option("--parallel", o.parallel, "requests of --prompts at once, sequences of --estimate")
      ->capture_default_str();
  app.add_option("--perplexity", o.perplexity, "of this text file, by llama-perplexity's protocol");
  app.add_option("--chunks", o.chunks, "of --perplexity, each of the context's size; 0: all");
  app.add_option("--logits", o.logits, "write the logits of the prompt's tokens to this .npy file");
  app.add_option("--heatmap", o.heatmap, "draw what each head looks at in the prompt to this .png file");
  app.add_flag("--explain", o.explain, "print the step of the prompt's last token as shapes, multiply-adds and bytes");
  app.add_option("--layer", o.layer, "of --heatmap and --explain")->capture_default_str();
  app.add_option("--head", o.head, "of --heatmap (all)");
  app.add_flag("--bench", o.bench, "measure the speed at several contexts; JSON");
}

void add_machine_flags(CLI::App& app, Options& o, std::string& kv_memory) {
  app.add_option("-c,--context,--ctx-size", o.context,
                 "most tokens of a sequence; 0: the model's longest (what is needed, at most 4096)");
  app.add_option("-b,--batch,--batch-size", o.batch, "tokens a step")->capture_default_str();
  app.add_option("--kv-memory", kv_memory, "size of the KV cache: 512M, 1.5G (what the context needs)");
  app.add_option("--mla", o.mla, "absorbed or expanded: MLA in this form alone")
      ->check(CLI::IsMember({"absorbed", "expanded"}));
  app.add_option("-t,--threads", o.threads, "of each step (as -1: the number that is fastest now, at most one a core)");
  app.add_option("--stats", o.stats, "write the report to this JSON file; -: standard output");
  app.add_flag("-q,--quiet", o.quiet, "no report");
}

void add_estimate_flags(CLI::App& app, Options& o) {
  app.add_flag("--estimate", o.estimate, "no run: what the model takes, and how fast it can be; for -c and --parallel");
  app.add_option("--gpu", o.gpu, "on this GPU instead of this machine; list: all that are known");
  app.add_option("--bandwidth", o.bandwidth, "... on one that reads this many GB/s,");
  app.add_option("--flops", o.flops, "... does this many TFLOP/s (dense)");
  app.add_option("--memory", o.memory, "... and has this many GB (10^9 bytes)");
  app.add_option("--ranks", o.ranks, "... cut over up to so many of them (docs/ranks.md),");
  app.add_option("--link", o.link, "... each two joined by so many GB/s with a latency of so many us: 1.2,20");
  app.add_option("--type", o.weight_type, "... with weights of this type instead of the file's");
  app.add_option("--kv-type", o.kv_type, "... with this KV type instead of the build's")
      ->check(CLI::IsMember({"f32", "f16", "bf16", "q8", "q4"}));
}

// CLI11 says of what is no number neither what it should be nor how to mend it.
void require_numbers(CLI::App& app) {
  for (CLI::Option* option : app.get_options()) {
    const std::string name = option->get_name(), type = option->get_type_name();
    if (type == "INT")
      option->transform([name](const std::string& text) {
        const auto number = whole_number<int>(text);
        if (!number) throw Usage(complaint(name.c_str(), text, "must be a whole number below 2^31"));
        return std::to_string(*number);
      });
    if (type == "FLOAT")
      option->check([name](const std::string& text) -> std::string {
        double number = 0;
        return CLI::detail::lexical_cast(text, number) ? ""
                                                       : throw Usage(complaint(name.c_str(), text, "must be a number"));
      });
  }
}

// CLI11 takes nothing for 0.
void refuse_empty(const CLI::App& app) {
  for (const CLI::Option* option : app.get_options())
    for (const std::string& value : option->results())
      if (value.empty() && option->get_name() != "--prompt" && option->get_name() != "--system")
        throw Usage(complaint(option->get_name().c_str(), "''", "must not be empty"));
}

// A flag that means nothing without another one.
void require_modes(const CLI::App& app) {
  for (const auto& [flag, mode] : std::vector<std::pair<std::string, std::string>>{{"--system", "--chat"},
                                                                                   {"--chunks", "--perplexity"},
                                                                                   {"--head", "--heatmap"},
                                                                                   {"--gpu", "--estimate"},
                                                                                   {"--ranks", "--estimate"},
                                                                                   {"--ranks", "--link"},
                                                                                   {"--link", "--ranks"},
                                                                                   {"--type", "--estimate"},
                                                                                   {"--kv-type", "--estimate"}})
    if (app.count(flag) > 0 && app.count(mode) == 0) throw Usage(flag + " needs " + mode);
}

// A flag that another one would silently ignore is refused.
void check_together(const CLI::App& app) {
  using Names = std::vector<std::string>;
  const auto refuse = [&](const Names& some, const Names& others) {
    for (const std::string& a : some)
      for (const std::string& b : others)
        if (a != b && app.count(a) > 0 && app.count(b) > 0) throw Usage(a + " makes no sense with " + b);
  };
  const Names modes = {"--chat",    "--prompts", "--perplexity", "--logits",
                       "--heatmap", "--explain", "--bench",      "--estimate"};
  const Names figures = {"--bandwidth", "--flops", "--memory"};
  refuse(modes, modes);
  refuse({"--tokens", "--samples"}, modes);
  refuse({"--prompt", "--prompt-file"},
         {"--prompt-file", "--chat", "--prompts", "--perplexity", "--bench", "--estimate"});
  refuse({"--n-predict", "--stop", "--ignore-eos", "--temperature", "--top-k", "--top-p", "--min-p", "--repeat-penalty",
          "--seed"},
         {"--perplexity", "--logits", "--heatmap", "--explain", "--bench", "--estimate"});
  refuse({"--stats", "--context"}, {"--heatmap", "--explain"});
  refuse({"--special"}, {"--chat", "--bench", "--estimate"});
  refuse({"--kv-memory", "--mla"}, {"--estimate"});
  refuse({"--gpu"}, figures);
  require_modes(app);
  for (const std::string& flag : figures) {
    if (app.count(flag) == 0) continue;
    for (const std::string& other : {figures[0], figures[1], figures[2], std::string("--estimate")})
      if (app.count(other) == 0) throw Usage(flag + " needs " + other);
    if (const double figure = app[flag]->as<double>(); !(figure > 0 && std::isfinite(figure)))
      throw Usage(complaint(flag.c_str(), app[flag]->as<std::string>(), "must be a number > 0"));
  }
  if (app.count("--estimate") > 0 && app.count("--quiet") > 0 && app.count("--stats") == 0)
    throw Usage("--estimate with --quiet leaves the JSON alone: --stats says where to (-: standard output)");
  const auto any = [&](const Names& flags) {
    return std::any_of(flags.begin(), flags.end(), [&](const std::string& flag) { return app.count(flag) > 0; });
  };
  if (app.count("--parallel") > 0 && !any({"--prompts", "--estimate"}))
    throw Usage("--parallel needs --prompts or --estimate");
  for (const std::string flag : {"--chat-template", "--chat-template-kwargs"})
    if (app.count(flag) > 0 && !any({"--chat", "--prompts"})) throw Usage(flag + " needs --chat or --prompts");
  if (app.count("--escape") > 0 && !any({"--prompt", "--system", "--stop"}))
    throw Usage("--escape needs --prompt, --system or --stop: it is for texts of the command line");
  if (app.count("--layer") > 0 && !any({"--heatmap", "--explain"})) throw Usage("--layer needs --heatmap or --explain");
  if (app.count("--max-line") > 0 && !any({"--prompts", "--chat"})) throw Usage("--max-line needs --prompts or --chat");
}

}  // namespace

std::string problem(const SamplerOptions& s) {
  const auto text = [](auto x) { return CLI::detail::to_string(x); };
  if (!(std::isfinite(s.temperature) && s.temperature >= 0))
    return complaint("temperature", text(s.temperature), "must be a number >= 0 (0: always the likeliest token)");
  if (s.top_k < 0) return complaint("top-k", text(s.top_k), "must be >= 0 (0: all tokens)");
  if (!(s.top_p > 0 && s.top_p <= 1))
    return complaint("top-p", text(s.top_p),
                     "must be > 0 and <= 1 (1: all tokens; the likeliest alone: temperature 0)");
  if (!(s.min_p >= 0 && s.min_p <= 1))
    return complaint("min-p", text(s.min_p), "must be >= 0 and <= 1 (0: all tokens)");
  if (!(s.repeat_penalty >= 1e-9f && s.repeat_penalty <= 1e9f))  // with it, any logit stays a number
    return complaint("repeat-penalty", text(s.repeat_penalty), "must be a number from 1e-9 to 1e9 (1: no penalty)");
  return "";
}

uint64_t random_seed() {
  return std::random_device()();
}

Options parse(int argc, char** argv) {
  Options o;
  o.sampler = {.temperature = 0.8f, .top_k = 40, .top_p = 0.95f, .min_p = 0.05f, .repeat_penalty = 1, .seed = 0};
  o.sampler.seed = random_seed();
  std::string kv_memory, max_line;

  CLI::App app("Text from a language model.", "run");
  app.footer(
      "Exit codes: 0; 1: it went wrong, or a line of --prompts or a turn of --chat did (its line says why); 2: the\n"
      "command line is wrong; 130: Ctrl-C; 141: the reader of standard output went away.");
  app.option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::Throw);
  add_text_flags(app, o);
  add_sampler_flags(app, o.sampler);
  std::string template_arguments;
  add_mode_flags(app, o, max_line);
  add_template_flags(app, o, template_arguments);
  add_machine_flags(app, o, kv_memory);
  add_estimate_flags(app, o);
  require_numbers(app);
  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp&) {
    print(app.help());
    return {};
  } catch (const CLI::ParseError& e) {
    throw Usage(e.what() + std::string(" (run --help lists the flags)"));
  }
  if (o.gpu == "list") return o;
  if (app.count("--model") == 0) throw Usage("MODEL is required (run --help lists the flags)");
  refuse_empty(app);
  check_together(app);
  o.has_prompt = app.count("--prompt") > 0;
  o.has_n = app.count("--n-predict") > 0;
  o.choose_threads = app.count("--threads") == 0 || o.threads == -1;
  if (o.choose_threads) o.threads = physical_cores();
  if (app.count("--chat-template-kwargs") > 0) o.chat_arguments = parse_template_arguments(template_arguments);
  if (app.count("--kv-memory") > 0) o.kv_memory = parse_size("--kv-memory", kv_memory);
  if (app.count("--max-line") > 0) o.max_line = parse_size("--max-line", max_line);
  o.model_context = app.count("--context") > 0 && o.context == 0;
  if (app.count("--link") > 0) parse_link(o);
  if (o.sampler.temperature < 0) o.sampler.temperature = 0;
  check(o);
  if (o.escape) unescape_texts(o);
  o.n = std::max(0, o.n);
  return o;
}
