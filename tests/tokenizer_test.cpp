// The tokenizer on small vocabularies built here byte by byte, after the format at the top of exporter/tokenizer.py.
#include "host/tokenizer.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <array>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>

#include "host/error.h"
#include "kernels/device.h"

namespace {

using Ids = std::vector<int>;

constexpr uint32_t NONE = 0xFFFFFFFF;
enum : uint32_t {
  BYTE_LEVEL = 1,
  IGNORE_MERGES = 2,
  NFC = 4,
  BYTE_FALLBACK = 8,
  FUSE_UNK = 16,
  NORMALIZES_SPACES = 32
};
enum : uint32_t { PREFIX_NONE, PREFIX_EVERY, PREFIX_MISSING, PREFIX_FIRST };
enum : char { TEXT, BYTE, CONTROL, UNUSED };
enum : uint32_t { FLAG_CONTROL = 1, STRIP_LEFT = 2, STRIP_RIGHT = 4, NORMALIZED = 8 };

struct TokenizerFile {
  struct Special {
    uint32_t id, flags;
    std::string text;
  };
  uint32_t flags = 0, prefix = PREFIX_NONE, bos = NONE, unk = NONE;
  std::vector<std::string> tokens;
  std::string kinds;
  std::vector<std::array<uint32_t, 3>> merges;
  std::vector<Special> specials;
  std::vector<uint32_t> before, after, end_of_generation;
  std::vector<std::string> patterns;
  std::string no_chat = "no template", chat;

  uint32_t add(const std::string& token, char kind = TEXT) {
    tokens.push_back(token);
    kinds += kind;
    return static_cast<uint32_t>(tokens.size() - 1);
  }
  uint32_t add_special(const std::string& text, uint32_t special_flags) {
    const uint32_t id = add(text, special_flags & FLAG_CONTROL ? CONTROL : TEXT);
    specials.push_back({id, special_flags, text});
    return id;
  }
  // Of the token with this text; the bytes of a fallback are none.
  uint32_t id(const std::string& token) const {
    size_t i = 0;
    while (i < tokens.size() && (tokens[i] != token || kinds[i] == BYTE)) ++i;
    return static_cast<uint32_t>(i);
  }
  // A token made of two others, with the next rank.
  uint32_t merge(const std::string& left, const std::string& right) {
    if (id(left + right) == tokens.size()) add(left + right);
    merges.push_back({id(left), id(right), id(left + right)});
    return id(left + right);
  }

  std::string bytes() const {
    std::string out = "attn.tok";
    const auto integer = [&](size_t n) {
      const uint32_t value = static_cast<uint32_t>(n);
      out.append(reinterpret_cast<const char*>(&value), 4);
    };
    const auto pad = [&] { out.resize((out.size() + 3) / 4 * 4); };
    const auto string = [&](const std::string& text) {
      integer(text.size());
      out += text;
      pad();
    };
    for (const size_t n :
         {size_t{2}, size_t{flags}, size_t{prefix}, size_t{bos}, size_t{unk}, tokens.size(), merges.size(),
          specials.size(), patterns.size(), before.size(), after.size(), end_of_generation.size()}) {
      integer(n);
    }
    std::string all;
    for (const std::string& token : tokens) {
      integer(all.size());
      all += token;
    }
    integer(all.size());
    out += kinds;
    pad();
    string(all);
    for (const auto& merge : merges) {
      for (const uint32_t n : merge) integer(n);
    }
    for (const Special& special : specials) {
      integer(special.id);
      integer(special.flags);
      string(special.text);
    }
    for (const auto* ids : {&before, &after, &end_of_generation}) {
      for (const uint32_t n : *ids) integer(n);
    }
    for (const std::string& pattern : patterns) string(pattern);
    string(no_chat);
    string(chat);
    integer(1);
    string("bos_token");
    string("<u>");
    return out;
  }
};

class TemporaryFile {
 public:
  explicit TemporaryFile(const std::string& content) { write(content); }
  ~TemporaryFile() { std::filesystem::remove(path); }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;
  void write(const std::string& content) const {
    std::ofstream(path, std::ios::binary).write(content.data(), static_cast<std::streamsize>(content.size()));
  }
  const std::string path =
      (std::filesystem::temp_directory_path() / ("attn-test-" + std::to_string(getpid()) + ".tokenizer.bin")).string();
};

Tokenizer load_bytes(const std::string& bytes, const std::string& sha256 = "") {
  const TemporaryFile file(bytes);
  return Tokenizer::load(file.path, sha256);
}

Tokenizer load(const TokenizerFile& file) {
  return load_bytes(file.bytes());
}

template <class Call>
std::string error_of(Call call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

// All bytes, as ids 0 to 255.
TokenizerFile byte_level() {
  TokenizerFile file;
  file.flags = BYTE_LEVEL;
  for (int byte = 0; byte < 256; ++byte) file.add(std::string(1, static_cast<char>(byte)));
  return file;
}

// unk, BOS, EOS, all bytes as fallback (ids 3 to 258), then code points.
TokenizerFile sentencepiece() {
  TokenizerFile file;
  file.flags = BYTE_FALLBACK | FUSE_UNK | NORMALIZES_SPACES;
  file.unk = file.add_special("<unk>", FLAG_CONTROL);
  file.bos = file.add_special("<s>", FLAG_CONTROL);
  file.end_of_generation = {file.add_special("</s>", FLAG_CONTROL)};
  file.before = {file.bos};
  for (int byte = 0; byte < 256; ++byte) file.add(std::string(1, static_cast<char>(byte)), BYTE);
  for (const char* text : {" ", "a", "b", "é"}) file.add(text);
  return file;
}

Ids ids_of(const TokenizerFile& file, const std::vector<std::string>& tokens) {
  Ids ids;
  for (const std::string& token : tokens) ids.push_back(static_cast<int>(file.id(token)));
  return ids;
}

std::string joined(const Tokenizer& tokenizer, const Ids& ids) {
  std::string out;
  for (const int id : ids) out += tokenizer.bytes(id);
  return out;
}

// BPE by its definition: while a pair of neighbours has a merge, merge the leftmost of the lowest rank.
Ids definition(const TokenizerFile& file, const std::string& text) {
  std::vector<uint32_t> symbols;
  for (const char c : text) symbols.push_back(static_cast<uint8_t>(c));
  for (;;) {
    size_t best_rank = file.merges.size(), best = 0;
    for (size_t i = 0; i + 1 < symbols.size(); ++i) {
      for (size_t rank = 0; rank < best_rank; ++rank) {
        if (file.merges[rank][0] == symbols[i] && file.merges[rank][1] == symbols[i + 1]) {
          best_rank = rank;
          best = i;
        }
      }
    }
    if (best_rank == file.merges.size()) return Ids(symbols.begin(), symbols.end());
    symbols[best] = file.merges[best_rank][2];
    symbols.erase(symbols.begin() + static_cast<std::ptrdiff_t>(best) + 1);
  }
}

TEST(Tokenizer, MergesInOrderOfRank) {
  TokenizerFile file = byte_level();
  file.merge("b", "c");
  file.merge("a", "b");
  file.merge("ab", "c");
  file.merge("a", "a");
  const Tokenizer t = load(file);
  EXPECT_EQ(t.encode("abc", false, false), ids_of(file, {"a", "bc"}));  // bc ranks first, and abc is only ab + c
  EXPECT_EQ(t.encode("aaa", false, false), ids_of(file, {"aa", "a"}));  // a tie goes to the left
  EXPECT_EQ(t.encode("", false, false), Ids{});
  EXPECT_EQ(t.encode("abab", false, false), ids_of(file, {"ab", "ab"}));
}

TEST(Tokenizer, MergesAsTheDefinitionSays) {
  std::mt19937 random(1);
  for (int round = 0; round < 60; ++round) {
    TokenizerFile file = byte_level();
    std::vector<std::string> parts{"a", "b", "c"};
    for (int i = 0; i < 25; ++i) {
      const std::string left = parts[random() % parts.size()], right = parts[random() % parts.size()];
      file.merge(left, right);
      parts.push_back(left + right);
    }
    std::shuffle(file.merges.begin(), file.merges.end(), random);
    // The same pair twice: the lower rank holds.
    const Tokenizer t = load(file);
    for (int i = 0; i < 40; ++i) {
      std::string text;
      for (size_t n = random() % 40; n > 0; --n) text += static_cast<char>('a' + random() % 3);
      ASSERT_EQ(t.encode(text, false, false), definition(file, text)) << text;
    }
  }
}

// A merge loop that looks at every symbol for every merge would take hours here.
TEST(Tokenizer, MergesAMegabyteWithoutASpace) {
  TokenizerFile file = byte_level();
  std::string token = "a";
  for (int i = 0; i < 10; ++i, token += token) file.merge(token, token);
  file.patterns = {"\\p{L}+|[^\\p{L}]+"};
  const Tokenizer t = load(file);
  EXPECT_EQ(t.encode(std::string(1 << 20, 'a'), false, false), Ids(1 << 10, static_cast<int>(file.id(token))));
  EXPECT_EQ(t.encode(std::string(1 << 20, '7'), false, false).size(), size_t{1} << 20);
}

TEST(Tokenizer, SplitsByPatternsInOrder) {
  TokenizerFile file = byte_level();
  file.merge("1", "2");
  file.merge("a", "b");
  file.merge("b", "1");
  file.merge(" ", "ab");
  EXPECT_EQ(load(file).encode("ab12 ab", false, false), ids_of(file, {"ab", "12", " ab"}));
  file.patterns = {"\\p{N}", " ?\\p{L}+"};
  EXPECT_EQ(load(file).encode("ab12 ab", false, false), ids_of(file, {"ab", "1", "2", " ab"}));
  file.patterns = {" "};  // what lies between matches is a piece too
  EXPECT_EQ(load(file).encode("ab12 ab", false, false), ids_of(file, {"ab", "12", " ", "ab"}));
}

TEST(Tokenizer, APieceThatIsATokenNeedsNoMerges) {
  TokenizerFile file = byte_level();
  file.merge("b", "c");
  file.add("abc");
  EXPECT_EQ(load(file).encode("abc", false, false), ids_of(file, {"a", "bc"}));
  file.flags |= IGNORE_MERGES;
  EXPECT_EQ(load(file).encode("abc", false, false), ids_of(file, {"abc"}));
}

TEST(Tokenizer, ControlTokensOnlyWhereAsked) {
  TokenizerFile file = byte_level();
  file.add_special("<a>", FLAG_CONTROL);
  file.add_special("<a>b", 0);
  file.add_special("<a>bc", FLAG_CONTROL);
  file.add_special("<a>", FLAG_CONTROL);  // of equal texts the first holds
  const Tokenizer t = load(file);
  EXPECT_EQ(t.encode("x<a>", true, false), ids_of(file, {"x", "<a>"}));
  EXPECT_EQ(t.encode("x<a>", false, false), ids_of(file, {"x", "<", "a", ">"}));
  EXPECT_EQ(t.encode("<a>bc", true, false), ids_of(file, {"<a>bc"}));  // the longest
  EXPECT_EQ(t.encode("<a>bc", false, false), ids_of(file, {"<a>b", "c"}));
  EXPECT_EQ(t.encode("<a", true, false), ids_of(file, {"<", "a"}));
  EXPECT_EQ(t.bytes(static_cast<int>(file.id("<a>"))), "");
  EXPECT_EQ(t.bytes(static_cast<int>(file.id("<a>b"))), "<a>b");
  EXPECT_EQ(t.text(static_cast<int>(file.id("<a>"))), "<a>");
  // One that the template begins and a message ends is none.
  const Tokenizer begun = t.with_template("t", "<a>{{ messages[0].content }}<{{ messages[0].content }}");
  EXPECT_EQ(begun.encode_chat({{Message::user, "a>"}}, {}), ids_of(file, {"<a>", "a", ">", "<", "a", ">"}));
}

TEST(Tokenizer, SpecialTokensTakeTheWhiteSpaceBesideThem) {
  TokenizerFile file = byte_level();
  file.add_special("<l>", FLAG_CONTROL | STRIP_LEFT);
  file.add_special("<r>", FLAG_CONTROL | STRIP_RIGHT);
  const Tokenizer t = load(file);
  EXPECT_EQ(t.encode("a \n<l> b", true, false), ids_of(file, {"a", "<l>", " ", "b"}));
  EXPECT_EQ(t.encode("a <r> \nb", true, false), ids_of(file, {"a", " ", "<r>", "b"}));
  EXPECT_EQ(t.encode("  <l><r>  ", true, false), ids_of(file, {"<l>", "<r>"}));
}

TEST(Tokenizer, BeginAndEndAsTheModelAddsThem) {
  TokenizerFile file = byte_level();
  file.bos = file.add_special("<s>", FLAG_CONTROL);
  file.before = {file.bos};
  file.after = {file.add_special("</s>", FLAG_CONTROL)};
  file.end_of_generation = file.after;
  const Tokenizer t = load(file);
  EXPECT_EQ(t.encode("a", false, true), ids_of(file, {"<s>", "a", "</s>"}));
  EXPECT_EQ(t.encode("", false, true), ids_of(file, {"<s>", "</s>"}));
  EXPECT_EQ(t.bos(), static_cast<int>(file.bos));
  EXPECT_TRUE(t.is_end_of_generation(static_cast<int>(file.id("</s>"))));
  EXPECT_FALSE(t.is_end_of_generation(static_cast<int>(file.bos)));
  EXPECT_EQ(load(byte_level()).bos(), -1);
}

TEST(Tokenizer, SentencePieceKnowsSpacesAndFallsBackToBytes) {
  TokenizerFile file = sentencepiece();
  file.merge(" ", "a");
  const auto a = static_cast<int>(file.id("a")), space_a = static_cast<int>(file.id(" a")),
             space = static_cast<int>(file.id(" "));
  EXPECT_EQ(load(file).encode("a a", false, false), (Ids{a, space_a}));
  EXPECT_EQ(load(file).encode("a▁a", false, false), (Ids{a, space_a}));
  EXPECT_EQ(load(file).encode("é\xC3\xE2\x82\xAC", false, false),
            (Ids{static_cast<int>(file.id("é")), 3 + 0xC3, 3 + 0xE2, 3 + 0x82, 3 + 0xAC}));
  file.prefix = PREFIX_EVERY;
  EXPECT_EQ(load(file).encode("a<s>a", true, false), (Ids{space_a, 1, space_a}));
  EXPECT_EQ(load(file).encode(" a", true, false), (Ids{space, space_a}));
  EXPECT_EQ(load(file).encode("", true, true), (Ids{1}));
  file.prefix = PREFIX_MISSING;
  EXPECT_EQ(load(file).encode(" a<s>a", true, false), (Ids{space_a, 1, space_a}));
  file.prefix = PREFIX_FIRST;
  EXPECT_EQ(load(file).encode("a<s>a", true, false), (Ids{space_a, 1, a}));
  const Tokenizer t = load(file);
  EXPECT_EQ(t.text(space_a), "▁a");
  EXPECT_EQ(t.text(3 + 10), "<0x0A>");
  EXPECT_EQ(t.bytes(3 + 10), "\n");
}

TEST(Tokenizer, NeighboursThatAreUnknownAreOneUnknownWhereFused) {
  TokenizerFile file;
  file.flags = FUSE_UNK;
  file.unk = file.add_special("<unk>", FLAG_CONTROL);
  const int a = static_cast<int>(file.add("a"));
  EXPECT_EQ(load(file).encode("xéa\xFF", false, false), (Ids{0, a, 0}));
  file.flags = 0;
  EXPECT_EQ(load(file).encode("xéa\xFF", false, false), (Ids{0, 0, a, 0}));
}

TEST(Tokenizer, InvalidBytesStandAlone) {
  TokenizerFile file = byte_level();
  file.merge("\xFF", "\xFF");
  file.merge("a", "\xFF");
  file.patterns = {"\\X+"};
  const Tokenizer t = load(file);
  EXPECT_EQ(t.encode("a\xFF\xFF\xC3", false, false), (Ids{'a', 0xFF, 0xFF, 0xC3}));
  // overlong, surrogate, beyond U+10FFFF, cut short
  for (const std::string bad : {"\xC0\x80", "\xE0\x80\x80", "\xED\xA0\x80", "\xF4\x90\x80\x80", "\xF0\x9F\x99"}) {
    EXPECT_EQ(joined(t, t.encode("x" + bad + "y", false, false)), "x" + bad + "y");
    EXPECT_EQ(t.encode(bad, false, false).size(), bad.size());
  }
  file = {};
  file.flags = BYTE_LEVEL;
  file.add("a");
  EXPECT_EQ(load(file).encode("ab", false, false), Ids{0});  // as Hugging Face: a byte without a token is left out
  EXPECT_NE(error_of([&] { load(file).encode("a\xFF", false, false); }).find("not UTF-8"), std::string::npos);
}

TEST(Tokenizer, ComposesWhereTheModelDoes) {
  TokenizerFile file = byte_level();
  EXPECT_EQ(load(file).encode("e\u0301", false, false).size(), 3u);
  file.flags |= NFC;
  EXPECT_EQ(load(file).encode("e\u0301\xFF", false, false), (Ids{0xC3, 0xA9, 0xFF}));
}

TEST(Tokenizer, ShowsBytesInGpt2sAlphabet) {
  TokenizerFile file = byte_level();
  file.add(" the");
  const Tokenizer t = load(file);
  EXPECT_EQ(t.text(256), "Ġthe");
  EXPECT_EQ(t.text('\n'), "Ċ");
  EXPECT_EQ(t.text(0), "Ā");
  EXPECT_EQ(t.text(0x7F), "ġ");
  EXPECT_EQ(t.text(0xA0), "ł");
  EXPECT_EQ(t.text(0xA1), "¡");
  EXPECT_EQ(t.text(0xAD), "Ń");
  EXPECT_EQ(t.text('~'), "~");
  EXPECT_EQ(t.text(0xFF), "ÿ");
}

TEST(Tokenizer, AConversationIsOneText) {
  TokenizerFile file = byte_level();
  file.add_special("<u>", FLAG_CONTROL);
  file.add_special("<g>", FLAG_CONTROL);
  file.add_special("<e>", FLAG_CONTROL);
  file.merge(":", "h");
  file.no_chat = "";
  file.chat =
      "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}:{{ m.content | trim }}<g>"
      "{% elif m.role == 'assistant' %}{{ m.content }}<e>{% else %}S{{ m.content }}{% endif %}{% endfor %}{{ end }}";
  const Tokenizer t = load(file);
  const auto user = [](const std::string& text) { return Message{Message::user, text}; };
  const auto assistant = [](const std::string& text) { return Message{Message::assistant, text}; };
  const auto system = [](const std::string& text) { return Message{Message::system, text}; };
  EXPECT_EQ(t.encode_chat({user(" h\n")}), ids_of(file, {"<u>", ":h", "<g>"}));  // merged across the border
  EXPECT_EQ(t.encode_chat({user("<e>")}), ids_of(file, {"<u>", ":", "<", "e", ">", "<g>"}));  // never a control token
  EXPECT_EQ(t.encode_chat({user("<"), assistant("g> "), user("")}),
            ids_of(file, {"<u>", ":", "<", "<g>", "g", ">", " ", "<e>", "<u>", ":", "<g>"}));
  EXPECT_EQ(t.encode_chat({system("s"), user("x")}), ids_of(file, {"S", "s", "<u>", ":", "x", "<g>"}));
  // Arguments are plain text, too.
  EXPECT_EQ(t.encode_chat({user("x")}, Json::Object{{"end", "<e>"}}),
            ids_of(file, {"<u>", ":", "x", "<g>", "<", "e", ">"}));
  EXPECT_NE(error_of([&] { t.encode_chat({}); }).find("at least one message"), std::string::npos);
  EXPECT_EQ(error_of([&] { load(byte_level()).encode_chat({user("x")}); }), "no template");
  EXPECT_EQ(t.with_template("other", "<g>{{ messages[0].content }}").encode_chat({user("x")}),
            ids_of(file, {"<g>", "x"}));
  EXPECT_EQ(error_of([&] { t.with_template("other", "{{ ("); }).substr(0, 23), "other, line 1, column 5");
  file.chat = "{{ raise_exception('no\nthanks') }}";
  const std::string error = error_of([&] { load(file).encode_chat({user("x")}); });
  EXPECT_NE(error.find("chat template, line 1, column"), std::string::npos) << error;
  EXPECT_TRUE(error.ends_with("no thanks")) << error;
}

// One of everything.
TokenizerFile tiny() {
  TokenizerFile file = byte_level();
  file.merge("a", "b");
  file.merge("ab", "c");
  file.bos = file.add_special("<s>", FLAG_CONTROL);
  file.add_special("<t>", STRIP_LEFT);
  file.before = file.after = file.end_of_generation = {file.bos};
  file.patterns = {"\\p{N}", " ?\\p{L}+|\\s+(?!\\S)|\\s+"};
  file.no_chat = "";
  file.chat = "<s>{{ messages[0].content }} c";
  return file;
}

TEST(Tokenizer, RefusesWhatIsNoTokenizer) {
  const auto refusal = [](const std::string& bytes) { return error_of([&] { load_bytes(bytes); }); };
  EXPECT_EQ(refusal(tiny().bytes()), "");
  EXPECT_NE(refusal("").find("truncated"), std::string::npos);
  EXPECT_NE(refusal("not a tokenizer").find("not a tokenizer file"), std::string::npos);
  std::string bytes = tiny().bytes();
  bytes[8] = 7;
  EXPECT_NE(refusal(bytes).find("version 7"), std::string::npos);
  EXPECT_NE(refusal(tiny().bytes() + "    ").find("too long"), std::string::npos);
  TokenizerFile file = tiny();
  file.merges.push_back({0, 1, 100000});
  EXPECT_NE(refusal(file.bytes()).find("100000"), std::string::npos);
  file = tiny();
  file.patterns = {"("};
  EXPECT_NE(refusal(file.bytes()).find("pattern"), std::string::npos);
  EXPECT_NE(error_of([] { Tokenizer::load("/nowhere/x.tokenizer.bin", ""); }).find("/nowhere/x.tokenizer.bin"),
            std::string::npos);
  EXPECT_NE(error_of([] { Tokenizer::load("/tmp", ""); }).find("/tmp"), std::string::npos);
}

// Exponential in PCRE2, where nothing bounds it.
TEST(Tokenizer, APatternHasALimitOfSteps) {
  TokenizerFile file = byte_level();
  file.patterns = {"(a+)+$|(a|aa)+b"};
  std::string text(60, 'a');
  text += '!';
  EXPECT_NE(error_of([&] { load(file).encode(text, false, false); }).find("too many steps"), std::string::npos);
  file.patterns = {"a*"};
  EXPECT_NE(error_of([&] { load(file); }).find("empty"), std::string::npos);
  file.patterns = {"\\C"};
  EXPECT_NE(error_of([&] { load(file); }).find("pattern"), std::string::npos);
}

// In quadratic time each would take minutes.
TEST(Tokenizer, EqualMergesAndTextsLoadInLinearTime) {
  TokenizerFile file = byte_level();
  file.flags |= IGNORE_MERGES;
  file.merge("a", "b");
  file.merges.resize(1 << 20, file.merges[0]);
  for (int i = 0; i < 1 << 19; ++i) file.add("same");
  EXPECT_EQ(load(file).encode("ab", false, false), ids_of(file, {"ab"}));
}

// As many as fill a quarter of the table, and all belong into its first place.
TEST(Tokenizer, RefusesMergesThatAreMadeToCollide) {
  constexpr uint32_t IDS = 2400;
  TokenizerFile file = byte_level();
  while (file.tokens.size() < IDS) file.add("t" + std::to_string(file.tokens.size()));
  for (uint64_t left = 0; left < IDS; ++left)
    for (uint64_t right = 0; right < IDS && file.merges.size() < 1100; ++right) {
      const uint64_t mixed = (left << 32 | right) * 0x9E3779B97F4A7C15u;  // hash_pair's
      if (((mixed ^ mixed >> 32) & 4095) == 0)
        file.merges.push_back({static_cast<uint32_t>(left), static_cast<uint32_t>(right), 0});
    }
  ASSERT_EQ(file.merges.size(), 1100);
  EXPECT_NE(error_of([&] { load(file); }).find("made to be slow"), std::string::npos);
}

TEST(Tokenizer, AnotherTemplateEndsTextsWithItsOwnToken) {
  TokenizerFile file = byte_level();
  file.add_special("<s>", FLAG_CONTROL);
  file.add_special("<|end|>", FLAG_CONTROL);
  file.add_special("<|end|>!", NORMALIZED);
  const auto ends = [&](const std::string& after) {
    const std::string source = "{% for m in messages %}{{ m.role + m.content + '" + after + "' }}{% endfor %}";
    const Tokenizer other = load(file).with_template("t", source);
    std::vector<int> ids;
    for (int id = 0; id < other.vocab_size(); id++)
      if (other.is_end_of_generation(id)) ids.push_back(id);
    return ids;
  };
  EXPECT_EQ(ends("\u3000\n<s>"), ids_of(file, {"<s>"}));
  EXPECT_EQ(ends("<|end|>!"), ids_of(file, {"<|end|>!"}));
  EXPECT_EQ(ends("<|end|>"), ids_of(file, {"<|end|>"}));
  EXPECT_EQ(ends("."), ids_of(file, {}));
  file.add_special("<|return|>", FLAG_CONTROL);
  EXPECT_EQ(ends("<|end|>"), ids_of(file, {}));
}

TEST(Tokenizer, BelongsToItsModel) {
  // echo -n abc | sha256sum
  const char* abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
  EXPECT_NE(error_of([&] { load_bytes("abc", abc); }).find("truncated"),
            std::string::npos);  // the right hash, no tokenizer
  EXPECT_NE(error_of([&] { load_bytes(tiny().bytes(), abc); }).find("not the tokenizer of this model"),
            std::string::npos);
}

TEST(Tokenizer, SurvivesTruncation) {
  const std::string bytes = tiny().bytes();
  for (size_t size = 0; size < bytes.size(); ++size) {
    EXPECT_NE(error_of([&] { load_bytes(bytes.substr(0, size)); }), "") << size;
  }
}

// Whatever a damaged file holds, loading it ends in an Error or in a tokenizer that can be used.
TEST(Tokenizer, SurvivesMutations) {
  const std::string good = tiny().bytes();
  std::mt19937 random(2);
  int refused = 0;
  for (int round = 0; round < 4000; ++round) {
    std::string bytes = good;
    for (size_t n = 1 + random() % 3; n > 0; --n) {
      const size_t at = random() % 4 ? random() % bytes.size() : random() % 64;  // the header holds the counts
      const uint32_t values[] = {0, 1, 0xFF, 0x7FFFFFFF, 0xFFFFFFFF, static_cast<uint32_t>(random())};
      const uint32_t value = values[random() % 6];
      std::memcpy(bytes.data() + at, &value, std::min<size_t>(random() % 2 ? 1 : 4, bytes.size() - at));
    }
    const std::string error = error_of([&] {
      const Tokenizer t = load_bytes(bytes);
      for (const int id : t.encode("abc <s>12 \xFF<t>", true, true)) ASSERT_LT(id, t.vocab_size());
      for (int id = 0; id < t.vocab_size(); ++id) t.text(id).append(t.bytes(id));
      if (t.chat().refusal().empty()) t.encode_chat({{Message::user, "ab"}});
    });
    refused += !error.empty();
    EXPECT_EQ(error.find('\n'), std::string::npos) << error;
  }
  EXPECT_GT(refused, 400);
  EXPECT_LT(refused, 4000);
}

TEST(Utf8Stream, NeverEmitsHalfASequence) {
  const std::string text = "aé€🙂\u0301中 z";
  for (size_t step = 1; step < 6; ++step) {
    Utf8Stream stream;
    std::string out;
    for (size_t at = 0; at < text.size(); at += step) {
      const std::string shown = stream.push(std::string_view(text).substr(at, step));
      out += shown;
      // What has been shown so far ends where a sequence ends.
      EXPECT_NE(static_cast<uint8_t>(text.c_str()[out.size()]) & 0xC0, 0x80) << at;
    }
    EXPECT_EQ(stream.finish(), "");
    EXPECT_EQ(out, text);
  }
}

TEST(Utf8Stream, ReplacesWhatCannotBecomeASequence) {
  const auto shown = [](const std::string& bytes) {
    Utf8Stream stream;
    std::string out;
    for (const char c : bytes) out += stream.push({&c, 1});
    return out + "|" + stream.finish();
  };
  EXPECT_EQ(shown("a\xFFz"), "a\uFFFDz|");
  EXPECT_EQ(shown("\xC3z"), "\uFFFDz|");
  EXPECT_EQ(shown("\x80\xC0\xAF"), "\uFFFD\uFFFD\uFFFD|");
  EXPECT_EQ(shown("\xED\xA0\x80"), "\uFFFD\uFFFD\uFFFD|");  // a surrogate
  EXPECT_EQ(shown("ok\xF0\x9F\x99"), "ok|\uFFFD");
  EXPECT_EQ(shown("\xF0\x9F\xF0\x9F\x99\x82"), "\uFFFD\uFFFD🙂|");
}

}  // namespace
