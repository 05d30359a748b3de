// tokenizer.cpp: text <-> ids. The file's format, and what the parts mean, is at the top of exporter/tokenizer.py.
#include "host/tokenizer.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <nettle/sha2.h>
#include <pcre2.h>
#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <span>

#include "host/error.h"
#include "host/utf8.h"

namespace {

constexpr char MAGIC[] = "attn.tok";
constexpr uint32_t VERSION = 2;
constexpr uint32_t NONE = 0xFFFFFFFF;
constexpr uint32_t MAX_VOCAB = 1 << 24;

enum Flags : uint32_t { BYTE_LEVEL = 1, IGNORE_MERGES = 2, NFC = 4 };
enum Prefix : uint32_t { PREFIX_NONE, PREFIX_EVERY, PREFIX_MISSING, PREFIX_FIRST };
enum class Kind : uint8_t { text, byte, control, unused };
enum SpecialFlags : uint32_t { CONTROL = 1, STRIP_LEFT = 2, STRIP_RIGHT = 4 };

struct Merge {
  uint32_t left, right, result;
};
struct Special {
  uint32_t id, flags;
  std::string_view text;
};

struct FreeCode {
  void operator()(pcre2_code* code) const { pcre2_code_free(code); }
};
using Pattern = std::unique_ptr<pcre2_code, FreeCode>;

constexpr std::string_view SPACE_MARK = "\u2581";  // SentencePiece's spelling of a space
constexpr std::string_view REPLACEMENT = "\uFFFD";
constexpr std::string_view WHITE_SPACE = " \t\n\v\f\r";

size_t hash_pair(uint32_t left, uint32_t right) {
  const uint64_t mixed = (uint64_t{left} << 32 | right) * 0x9E3779B97F4A7C15u;
  return static_cast<size_t>(mixed ^ mixed >> 32);
}

// An open-addressing table of n indices: `slots[i]` is an index or NONE; the keys stay where they are.
std::vector<uint32_t> make_slots(size_t n) {
  return std::vector<uint32_t>(std::bit_ceil(2 * n + 1), NONE);
}

void insert_slot(std::vector<uint32_t>& slots, size_t hash, uint32_t index) {
  const size_t mask = slots.size() - 1;
  while (slots[hash & mask] != NONE) ++hash;
  slots[hash & mask] = index;
}

// The first index inserted under this hash that `is` accepts, or NONE.
template <class Is>
uint32_t find_slot(const std::vector<uint32_t>& slots, size_t hash, Is is) {
  const size_t mask = slots.size() - 1;
  for (;; ++hash) {
    const uint32_t index = slots[hash & mask];
    if (index == NONE || is(index)) return index;
  }
}

// A cursor over the file: nothing is read past its end.
class Reader {
 public:
  Reader(std::string_view data, const std::string& path) : data_(data), path_(path) {}

  template <class T>
  std::span<const T> array(size_t n, const char* what) {
    const size_t left = data_.size() - at_;
    if (n > left / sizeof(T) || (n * sizeof(T) + 3) / 4 * 4 > left) {
      fail(
          "%s: %s: %zu elements of %zu bytes at byte %zu, but the file has only %zu: it is truncated or damaged, "
          "export it again",
          path_.c_str(), what, n, sizeof(T), at_, data_.size());
    }
    const T* first = reinterpret_cast<const T*>(data_.data() + at_);
    at_ += (n * sizeof(T) + 3) / 4 * 4;
    return {first, n};
  }
  uint32_t integer(const char* what) { return array<uint32_t>(1, what)[0]; }
  std::string_view string(const char* what) {
    const auto chars = array<char>(integer(what), what);
    return {chars.data(), chars.size()};
  }
  // An id below the vocabulary's size.
  uint32_t id(uint32_t value, uint32_t vocab_size, const char* what) const {
    if (value >= vocab_size) {
      fail("%s: %s is %u, but vocab_size is %u: the file is damaged, export it again", path_.c_str(), what, value,
           vocab_size);
    }
    return value;
  }
  std::span<const uint32_t> ids(size_t n, uint32_t vocab_size, const char* what) {
    const auto values = array<uint32_t>(n, what);
    for (const uint32_t value : values) id(value, vocab_size, what);
    return values;
  }
  size_t left() const { return data_.size() - at_; }

 private:
  std::string_view data_;
  const std::string& path_;
  size_t at_ = 0;
};

Pattern compile(std::string_view source, const std::string& path) {
  int error = 0;
  PCRE2_SIZE at = 0;
  Pattern pattern(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(source.data()), source.size(), PCRE2_UTF | PCRE2_UCP,
                                &error, &at, nullptr));
  if (!pattern) {
    PCRE2_UCHAR message[128];
    pcre2_get_error_message(error, message, sizeof message);
    fail("%s: pre-tokenizer pattern: %s at byte %zu of %.*s: export it again", path.c_str(),
         reinterpret_cast<char*>(message), size_t{at}, static_cast<int>(std::min<size_t>(source.size(), 200)),
         source.data());
  }
  pcre2_jit_compile(pattern.get(), PCRE2_JIT_COMPLETE);  // where it cannot, pcre2_match interprets
  return pattern;
}

// Well-formed UTF-8 in normal form C. utf8proc_map would do it all, but it sorts marks neighbour by neighbour: a
// megabyte of nothing but marks would take it an hour.
std::string composed(std::string_view text) {
  constexpr auto OPTIONS = static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE);
  std::vector<utf8proc_int32_t> points;
  while (!text.empty()) {
    utf8proc_int32_t point = 0, parts[4];  // no canonical decomposition is longer
    text.remove_prefix(static_cast<size_t>(
        utf8proc_iterate(reinterpret_cast<const utf8proc_uint8_t*>(text.data()), std::ssize(text), &point)));
    points.insert(points.end(), parts, parts + utf8proc_decompose_char(point, parts, 4, OPTIONS, nullptr));
  }
  const auto order = [](utf8proc_int32_t point) { return utf8proc_get_property(point)->combining_class; };
  for (auto marks = points.begin(); marks != points.end();) {
    const auto starter = std::find_if(marks, points.end(), [&](utf8proc_int32_t point) { return order(point) == 0; });
    std::ranges::stable_sort(marks, starter, {}, order);
    marks = starter == points.end() ? starter : starter + 1;
  }
  points.push_back(0);  // utf8proc ends the string
  const auto size = utf8proc_reencode(points.data(), std::ssize(points) - 1, OPTIONS);
  return {reinterpret_cast<const char*>(points.data()), static_cast<size_t>(size)};
}

std::string sha256_hex(std::string_view data) {
  sha256_ctx context;
  uint8_t digest[SHA256_DIGEST_SIZE];
  sha256_init(&context);
  sha256_update(&context, data.size(), reinterpret_cast<const uint8_t*>(data.data()));
  sha256_digest(&context, sizeof digest, digest);
  std::string hex;
  for (const uint8_t byte : digest) {
    hex += "0123456789abcdef"[byte >> 4];
    hex += "0123456789abcdef"[byte & 15];
  }
  return hex;
}

}  // namespace

struct Tokenizer::Impl {
  std::unique_ptr<char[]> file;  // everything below that is a view looks into it
  size_t file_size = 0;
  uint32_t flags = 0, prefix = 0, vocab_size = 0, bos = NONE, unk = NONE;
  std::span<const uint32_t> offsets;  // [vocab_size + 1] into texts
  std::span<const Kind> kinds;        // [vocab_size]
  std::string_view texts;
  std::span<const Merge> merges;  // in order of rank
  std::vector<Special> specials;  // in order of their texts
  std::array<uint32_t, 257>
      first_special{};  // those that begin with byte b: specials[first_special[b] .. first_special[b + 1])
  std::span<const uint32_t> before, after, end_of_generation;
  std::vector<Pattern> patterns;
  ChatTemplate chat;
  std::vector<uint32_t> text_slots, merge_slots;  // open-addressing tables: id by text (where needed), rank by pair
  std::array<uint32_t, 256> byte_ids{};           // the token that stands for one byte, or NONE

  void read_file(const std::string& path);
  void parse(const std::string& path);
  void parse_specials(Reader& in, size_t n);
  void parse_chat(Reader& in, const std::string& path);
  void index();

  std::string_view token(uint32_t id) const { return texts.substr(offsets[id], offsets[id + 1] - offsets[id]); }
  uint32_t find_text(std::string_view text) const {
    return find_slot(text_slots, std::hash<std::string_view>()(text), [&](uint32_t id) { return token(id) == text; });
  }
  uint32_t find_merge(uint32_t left, uint32_t right) const {
    return find_slot(merge_slots, hash_pair(left, right),
                     [&](uint32_t rank) { return merges[rank].left == left && merges[rank].right == right; });
  }
};

void Tokenizer::Impl::read_file(const std::string& path) {
  const std::unique_ptr<FILE, int (*)(FILE*)> in(std::fopen(path.c_str(), "rb"), std::fclose);
  if (!in || std::fseek(in.get(), 0, SEEK_END) != 0) {
    fail("%s: %s: export.py writes it beside the model", path.c_str(), std::strerror(errno));
  }
  const long size = std::ftell(in.get());
  std::rewind(in.get());
  if (size < 0 || size > 1L << 31) fail("%s: not a tokenizer file: give the one that export.py wrote", path.c_str());
  file_size = static_cast<size_t>(size);
  file = std::make_unique_for_overwrite<char[]>(file_size);
  if (std::fread(file.get(), 1, file_size, in.get()) != file_size)
    fail("%s: cannot be read: %s", path.c_str(), std::strerror(errno));
}

void Tokenizer::Impl::parse(const std::string& path) {
  Reader in({file.get(), file_size}, path);
  const auto magic = in.array<char>(sizeof MAGIC - 1, "magic");
  if (std::string_view(magic.data(), magic.size()) != MAGIC) {
    fail("%s: not a tokenizer file (its first bytes are not %s): give the one that export.py wrote", path.c_str(),
         MAGIC);
  }
  if (const uint32_t version = in.integer("version"); version != VERSION) {
    fail("%s: version %u, this program reads version %u: export it again", path.c_str(), version, VERSION);
  }
  flags = in.integer("flags");
  prefix = in.integer("prefix");
  if (flags > 7 || prefix > PREFIX_FIRST)
    fail("%s: flags %u, prefix %u: unknown here, export it again", path.c_str(), flags, prefix);
  bos = in.integer("bos");
  unk = in.integer("unk");
  vocab_size = in.integer("vocab_size");
  if (vocab_size == 0 || vocab_size > MAX_VOCAB) {
    fail("%s: vocab_size %u is not between 1 and %u: the file is damaged, export it again", path.c_str(), vocab_size,
         MAX_VOCAB);
  }
  if (bos != NONE) in.id(bos, vocab_size, "bos");
  if (unk != NONE) in.id(unk, vocab_size, "unk");
  const auto counts = in.array<uint32_t>(6, "counts");

  offsets = in.array<uint32_t>(size_t{vocab_size} + 1, "offsets");
  kinds = in.array<Kind>(vocab_size, "kinds");
  texts = in.string("tokens");
  if (offsets.front() != 0 || offsets.back() != texts.size() || !std::is_sorted(offsets.begin(), offsets.end())) {
    fail("%s: offsets of the tokens are not in order: the file is damaged, export it again", path.c_str());
  }
  if (std::ranges::any_of(kinds, [](Kind kind) { return kind > Kind::unused; })) {
    fail("%s: a token of an unknown kind: the file is damaged, export it again", path.c_str());
  }
  merges = in.array<Merge>(counts[0], "merges");
  uint32_t largest = 0;
  for (const Merge& merge : merges) largest = std::max({largest, merge.left, merge.right, merge.result});
  in.id(largest, vocab_size, "the largest id of a merge");
  parse_specials(in, counts[1]);
  before = in.ids(counts[3], vocab_size, "before");
  after = in.ids(counts[4], vocab_size, "after");
  end_of_generation = in.ids(counts[5], vocab_size, "end_of_generation");
  for (uint32_t i = 0; i < counts[2]; ++i) patterns.push_back(compile(in.string("pattern"), path));
  parse_chat(in, path);
  if (in.left() != 0) fail("%s: %zu bytes too long: the file is damaged, export it again", path.c_str(), in.left());
}

void Tokenizer::Impl::parse_specials(Reader& in, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    const uint32_t id = in.id(in.integer("specials"), vocab_size, "the id of a special token");
    const uint32_t special_flags = in.integer("specials");
    const std::string_view text = in.string("specials");
    if (!text.empty()) specials.push_back({id, special_flags, text});
  }
  std::ranges::stable_sort(specials, {}, &Special::text);
  for (const Special& special : specials) ++first_special[static_cast<uint8_t>(special.text[0]) + size_t{1}];
  for (size_t byte = 1; byte < first_special.size(); ++byte) first_special[byte] += first_special[byte - 1];
}

void Tokenizer::Impl::parse_chat(Reader& in, const std::string& path) {
  const std::string refusal(in.string("chat")), source(in.string("chat"));
  ChatTemplate::Variables variables;
  for (uint32_t n = in.integer("chat"); n > 0; --n) {
    const std::string name(in.string("chat"));
    variables.emplace_back(name, in.string("chat"));
  }
  chat = ChatTemplate(path + ": chat template", source, std::move(variables), refusal);
}

void Tokenizer::Impl::index() {
  byte_ids.fill(NONE);
  // Whole pieces are looked up where they need no merges, and code points where merging starts from them: a vocabulary
  // of 262144 tokens has 19000 of those.
  std::vector<uint32_t> found_by_text;
  const Kind byte_kind = flags & BYTE_LEVEL ? Kind::text : Kind::byte;
  for (uint32_t id = 0; id < vocab_size; ++id) {
    const std::string_view text = token(id);
    const bool code_point =
        !(flags & BYTE_LEVEL) && !text.empty() && sequence_length(text) == static_cast<int>(text.size());
    if (kinds[id] == Kind::text && (flags & IGNORE_MERGES || code_point)) found_by_text.push_back(id);
    if (kinds[id] == byte_kind && text.size() == 1) {
      uint32_t& byte_id = byte_ids[static_cast<uint8_t>(text[0])];
      byte_id = std::min(byte_id, id);
    }
  }
  text_slots = make_slots(found_by_text.size());
  for (const uint32_t id : found_by_text) insert_slot(text_slots, std::hash<std::string_view>()(token(id)), id);
  merge_slots = make_slots(merges.size());
  for (uint32_t rank = 0; rank < merges.size(); ++rank) {
    insert_slot(merge_slots, hash_pair(merges[rank].left, merges[rank].right), rank);
  }
}

namespace {

// One call of encode: its scratch memory and what it has made so far.
class Encoder {
 public:
  explicit Encoder(const Tokenizer::Impl& tokenizer) : t_(tokenizer) {
    if (t_.patterns.empty()) return;
    // A pattern takes a bounded number of steps for a character, and no limit of PCRE2 ends a match early on a long
    // text.
    context_.reset(pcre2_match_context_create(nullptr));
    match_.reset(pcre2_match_data_create(1, nullptr));
    jit_stack_.reset(pcre2_jit_stack_create(32 << 10, 32 << 20, nullptr));
    if (!context_ || !match_ || !jit_stack_) throw std::bad_alloc();
    pcre2_set_match_limit(context_.get(), 0xFFFFFFFF);
    pcre2_set_depth_limit(context_.get(), 0xFFFFFFFF);
    pcre2_jit_stack_assign(context_.get(), nullptr, jit_stack_.get());
  }

  using Range = ChatText::Range;
  // Control tokens are found only within `control_ranges`, which are in order.
  void encode(std::string_view text, std::span<const Range> control_ranges);
  std::vector<int> ids;

 private:
  struct Symbol {
    uint32_t id, previous, next;  // NONE: no symbol; a merged one keeps its left part's place
  };
  struct FreeMatch {
    void operator()(pcre2_match_context* p) const { pcre2_match_context_free(p); }
    void operator()(pcre2_match_data* p) const { pcre2_match_data_free(p); }
    void operator()(pcre2_jit_stack* p) const { pcre2_jit_stack_free(p); }
  };

  const Special* find_special(std::string_view text, size_t at, size_t control_end) const;
  void encode_plain(std::string_view text, bool first);
  std::string spaced(std::string_view text, bool first) const;
  void encode_valid(std::string_view text);
  void split(std::string_view text, size_t level);
  void encode_piece(std::string_view piece);
  void add_symbols(std::string_view piece);
  void add_symbol(uint32_t id);
  void push_merge(uint32_t left);
  void merge_symbols();

  const Tokenizer::Impl& t_;
  std::unique_ptr<pcre2_match_context, FreeMatch> context_;
  std::unique_ptr<pcre2_match_data, FreeMatch> match_;
  std::unique_ptr<pcre2_jit_stack, FreeMatch> jit_stack_;
  std::vector<Symbol> symbols_;
  std::vector<uint64_t> heap_;  // rank << 32 | place of the left symbol, the least first: ties go to the left
};

void Encoder::encode(std::string_view text, std::span<const Range> control_ranges) {
  if (text.size() > 1u << 30) fail("a text of %zu bytes: give at most %u", text.size(), 1u << 30);
  size_t begin = 0, at = 0, range = 0;
  while (at < text.size()) {
    while (range < control_ranges.size() && control_ranges[range].end <= at) ++range;
    const bool control = range < control_ranges.size() && control_ranges[range].begin <= at;
    const Special* special = find_special(text, at, control ? control_ranges[range].end : at);
    if (!special) {
      ++at;
      continue;
    }
    std::string_view plain = text.substr(begin, at - begin);
    if (special->flags & STRIP_LEFT) plain = plain.substr(0, plain.find_last_not_of(WHITE_SPACE) + 1);
    encode_plain(plain, begin == 0);
    ids.push_back(static_cast<int>(special->id));
    at += special->text.size();
    if (special->flags & STRIP_RIGHT) at = std::min(text.find_first_not_of(WHITE_SPACE, at), text.size());
    begin = at;
  }
  encode_plain(text.substr(begin), begin == 0);
}

// The longest special token at text[at], null where there is none. A control token must end at `control_end` or before.
const Special* Encoder::find_special(std::string_view text, size_t at, size_t control_end) const {
  const uint8_t lead = static_cast<uint8_t>(text[at]);
  const Special* low = t_.specials.data() + t_.first_special[lead];
  const Special* high = t_.specials.data() + t_.first_special[lead + size_t{1}];
  const Special* longest = nullptr;
  // Those in [low, high) share the text's next k bytes; they are sorted, so the one that ends there comes first.
  for (size_t k = 1; low < high; ++k) {
    for (; low < high && low->text.size() == k; ++low) {
      if (!(low->flags & CONTROL) || at + k <= control_end) longest = low;
    }
    if (at + k == text.size()) break;
    const uint8_t next = static_cast<uint8_t>(text[at + k]);
    const auto byte = [&](const Special& special) { return static_cast<uint8_t>(special.text[k]); };
    low = std::partition_point(low, high, [&](const Special& special) { return byte(special) < next; });
    high = std::partition_point(low, high, [&](const Special& special) { return byte(special) == next; });
  }
  return longest;
}

// A text between special tokens; first: at the start of it all.
void Encoder::encode_plain(std::string_view text, bool first) {
  if (text.empty()) return;
  std::string changed;
  if (!(t_.flags & BYTE_LEVEL)) text = changed = spaced(text, first);
  if (t_.patterns.empty() && !(t_.flags & NFC)) return encode_piece(text);
  // Patterns see well-formed text; every other byte is a piece of its own.
  size_t begin = 0, at = 0;
  while (at < text.size()) {
    const int length = sequence_length(text.substr(at));
    if (length > 0) {
      at += static_cast<size_t>(length);
      continue;
    }
    encode_valid(text.substr(begin, at - begin));
    encode_piece(text.substr(at, 1));
    begin = ++at;
  }
  encode_valid(text.substr(begin));
}

// SentencePiece's normalisation, with spaces where it writes U+2581.
std::string Encoder::spaced(std::string_view text, bool first) const {
  std::string out;
  out.reserve(text.size() + 1);
  for (size_t at = 0;;) {
    const size_t mark = text.find(SPACE_MARK, at);
    out += text.substr(at, mark - at);
    if (mark == text.npos) break;
    out += ' ';
    at = mark + SPACE_MARK.size();
  }
  const bool missing = out[0] != ' ' && (t_.prefix == PREFIX_MISSING || (t_.prefix == PREFIX_FIRST && first));
  if (t_.prefix == PREFIX_EVERY || missing) out.insert(0, 1, ' ');
  return out;
}

void Encoder::encode_valid(std::string_view text) {
  if (text.empty()) return;
  if (!(t_.flags & NFC) || std::ranges::all_of(text, [](char c) { return static_cast<uint8_t>(c) < 0x80; }))
    return split(text, 0);
  split(composed(text), 0);
}

// Splits by the patterns from `level` on: matches are pieces, and so is what lies between two.
void Encoder::split(std::string_view text, size_t level) {
  if (level == t_.patterns.size()) return encode_piece(text);
  size_t begin = 0, from = 0;
  while (from < text.size()) {
    const int found = pcre2_match(t_.patterns[level].get(), reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(),
                                  from, PCRE2_NO_UTF_CHECK, match_.get(), context_.get());
    if (found == PCRE2_ERROR_NOMATCH) break;
    if (found < 0)
      fail("tokenizer: pre-tokenizer pattern %zu fails on this text (PCRE2 error %d): shorten it", level, found);
    const PCRE2_SIZE* match = pcre2_get_ovector_pointer(match_.get());
    const size_t match_begin = match[0], match_end = match[1];
    if (match_end <= match_begin) {  // an empty match splits nothing
      from = std::max(from, match_end);
      if (from < text.size()) from += static_cast<size_t>(sequence_length(text.substr(from)));
      continue;
    }
    if (match_begin > begin) split(text.substr(begin, match_begin - begin), level + 1);
    split(text.substr(match_begin, match_end - match_begin), level + 1);
    begin = from = match_end;
  }
  if (begin < text.size()) split(text.substr(begin), level + 1);
}

void Encoder::encode_piece(std::string_view piece) {
  if (t_.flags & IGNORE_MERGES) {
    if (const uint32_t id = t_.find_text(piece); id != NONE) return ids.push_back(static_cast<int>(id));
  }
  symbols_.clear();
  add_symbols(piece);
  merge_symbols();
  for (const Symbol& symbol : symbols_) {
    if (symbol.id != NONE) ids.push_back(static_cast<int>(symbol.id));
  }
}

// What merging starts from: bytes; or code points, and the bytes of those that the vocabulary lacks.
void Encoder::add_symbols(std::string_view piece) {
  for (size_t at = 0, length = 1; at < piece.size(); at += length) {
    length = 1;
    if (!(t_.flags & BYTE_LEVEL)) {
      length = static_cast<size_t>(std::max(1, sequence_length(piece.substr(at))));
      if (const uint32_t id = t_.find_text(piece.substr(at, length)); id != NONE) {
        add_symbol(id);
        continue;
      }
    }
    const std::string_view bytes = piece.substr(at, length);
    const auto byte_id = [&](char c) { return t_.byte_ids[static_cast<uint8_t>(c)]; };
    if (std::ranges::all_of(bytes, [&](char c) { return byte_id(c) != NONE; })) {
      for (const char c : bytes) add_symbol(byte_id(c));
    } else if (t_.unk == NONE && sequence_length(bytes) <= 0) {
      fail("the text is not UTF-8, and the vocabulary has no token for its byte 0x%02X: give UTF-8",
           static_cast<uint8_t>(bytes[0]));
    } else if (t_.unk != NONE && (symbols_.empty() || symbols_.back().id != t_.unk)) {
      add_symbol(t_.unk);  // neighbours that are unknown are one unknown
    }
  }
}

void Encoder::add_symbol(uint32_t id) {
  const uint32_t place = static_cast<uint32_t>(symbols_.size());
  if (place > 0) symbols_.back().next = place;
  symbols_.push_back({id, place - 1, NONE});  // place 0: NONE
}

// Puts the merge of the symbol at `left` with its right neighbour, where there is one, on the heap.
void Encoder::push_merge(uint32_t left) {
  const uint32_t right = symbols_[left].next;
  if (right == NONE) return;
  const uint32_t rank = t_.find_merge(symbols_[left].id, symbols_[right].id);
  if (rank == NONE) return;
  heap_.push_back(uint64_t{rank} << 32 | left);
  std::ranges::push_heap(heap_, std::greater());
}

// Every merge pushes at most two others, so n symbols take n log n steps.
void Encoder::merge_symbols() {
  heap_.clear();
  for (uint32_t place = 0; place < symbols_.size(); ++place) push_merge(place);
  while (!heap_.empty()) {
    std::ranges::pop_heap(heap_, std::greater());
    const Merge& merge = t_.merges[heap_.back() >> 32];
    const uint32_t place = static_cast<uint32_t>(heap_.back());
    heap_.pop_back();
    Symbol& left = symbols_[place];
    // One of the two may have been merged away since.
    if (left.id != merge.left || left.next == NONE || symbols_[left.next].id != merge.right) continue;
    Symbol& right = symbols_[left.next];
    left.id = merge.result;
    left.next = right.next;
    right.id = NONE;
    if (left.next != NONE) symbols_[left.next].previous = place;
    push_merge(place);
    if (left.previous != NONE) push_merge(left.previous);
  }
}

}  // namespace

Tokenizer Tokenizer::load(const std::string& path, const std::string& sha256) {
  auto impl = std::make_shared<Impl>();
  impl->read_file(path);
  if (!sha256.empty() && sha256_hex({impl->file.get(), impl->file_size}) != sha256) {
    fail("%s: not the tokenizer of this model (tokenizer_sha256 is %.64s): give the file that export.py wrote with it",
         path.c_str(), sha256.c_str());
  }
  impl->parse(path);
  impl->index();
  Tokenizer tokenizer;
  tokenizer.impl_ = std::move(impl);
  return tokenizer;
}

int Tokenizer::vocab_size() const {
  return static_cast<int>(impl_->vocab_size);
}
int Tokenizer::bos() const {
  return impl_->bos == NONE ? -1 : static_cast<int>(impl_->bos);
}
const ChatTemplate& Tokenizer::chat() const {
  return chat_ ? *chat_ : impl_->chat;
}

Tokenizer Tokenizer::with_template(const std::string& name, const std::string& source) const {
  Tokenizer other = *this;
  other.chat_ = std::make_shared<const ChatTemplate>(name, source, chat().variables());
  if (!other.chat().refusal().empty()) fail("%s", other.chat().refusal().c_str());
  return other;
}

bool Tokenizer::is_end_of_generation(int id) const {
  return std::ranges::find(impl_->end_of_generation, static_cast<uint32_t>(id)) != impl_->end_of_generation.end();
}

std::string_view Tokenizer::bytes(int id) const {
  const uint32_t i = static_cast<uint32_t>(id);
  const Kind kind = impl_->kinds[i];
  return kind == Kind::text || kind == Kind::byte ? impl_->token(i) : "";
}

std::string Tokenizer::text(int id) const {
  const uint32_t i = static_cast<uint32_t>(id);
  const std::string_view token = impl_->token(i);
  const Kind kind = impl_->kinds[i];
  if (kind == Kind::control || kind == Kind::unused) return std::string(token);
  if (kind == Kind::byte) {
    char name[8];
    std::snprintf(name, sizeof name, "<0x%02X>",
                  token.empty() ? 0u : static_cast<unsigned>(static_cast<uint8_t>(token[0])));
    return name;
  }
  std::string out;
  for (const char c : token) {
    const uint8_t byte = static_cast<uint8_t>(c);
    uint32_t shown = byte;
    if (!(impl_->flags & BYTE_LEVEL)) {
      out += c == ' ' ? SPACE_MARK : std::string_view(&c, 1);
      continue;
    }
    // GPT-2's alphabet: bytes that do not print are U+0100 onwards, in their order.
    if (byte <= 0x20) shown = 0x100u + byte;
    if (byte >= 0x7F && byte <= 0xA0) shown = 0x121u + (byte - 0x7Fu);
    if (byte == 0xAD) shown = 0x143;
    if (shown >= 0x80) out += static_cast<char>(0xC0 | shown >> 6);
    out += static_cast<char>(shown >= 0x80 ? 0x80 | (shown & 0x3F) : shown);
  }
  return out;
}

std::vector<int> Tokenizer::encode(std::string_view text, bool parse_special, bool add_special) const {
  Encoder encoder(*impl_);
  const Encoder::Range everywhere{0, text.size()};
  if (add_special) encoder.ids.assign(impl_->before.begin(), impl_->before.end());
  encoder.encode(text, {&everywhere, parse_special ? size_t{1} : size_t{0}});
  if (add_special) encoder.ids.insert(encoder.ids.end(), impl_->after.begin(), impl_->after.end());
  return std::move(encoder.ids);
}

std::vector<int> Tokenizer::encode_chat(const std::vector<Message>& messages, const Json& arguments) const {
  const ChatText chat = this->chat().render(messages, arguments);
  Encoder encoder(*impl_);
  encoder.encode(chat.text, chat.own);
  return std::move(encoder.ids);
}

std::string Utf8Stream::push(std::string_view bytes) {
  pending_ += bytes;
  std::string out;
  std::string_view rest = pending_;
  while (!rest.empty()) {
    const int length = sequence_length(rest);
    if (length < 0) break;
    out += length ? rest.substr(0, static_cast<size_t>(length)) : REPLACEMENT;
    rest.remove_prefix(static_cast<size_t>(std::max(1, length)));
  }
  pending_.erase(0, pending_.size() - rest.size());
  return out;
}

std::string Utf8Stream::finish() {
  const bool incomplete = !pending_.empty();
  pending_.clear();
  return incomplete ? std::string(REPLACEMENT) : "";
}
