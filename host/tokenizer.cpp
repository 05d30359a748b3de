// tokenizer.cpp: text <-> ids. The file's format, and what the parts mean, is at the top of exporter/tokenizer.py.
#include "host/tokenizer.h"

#include <nettle/sha2.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
#include <span>

#include "host/added_tokens.h"
#include "host/error.h"
#include "host/pretokenize.h"
#include "host/unicode.h"
#include "host/utf8.h"

namespace {

constexpr char MAGIC[] = "attn.tok";
constexpr uint32_t VERSION = 2;
constexpr uint32_t NONE = 0xFFFFFFFF;
constexpr uint32_t MAX_VOCAB = 1 << 24;

enum Flags : uint32_t {
  BYTE_LEVEL = 1,
  IGNORE_MERGES = 2,
  NFC = 4,
  BYTE_FALLBACK = 8,      // a code point that is no token is its bytes
  FUSE_UNK = 16,          // neighbours that are unknown are one unknown
  NORMALIZES_SPACES = 32  // writing U+2581 for spaces is the normalizer's work, else the pre-tokenizer's
};
constexpr uint32_t ALL_FLAGS = 63;
// PREFIX_EVERY is the normalizer's, the others are the pre-tokenizer's.
enum Prefix : uint32_t { PREFIX_NONE, PREFIX_EVERY, PREFIX_MISSING, PREFIX_FIRST };
enum class Kind : uint8_t { text, byte, control, unused, added };

struct Merge {
  uint32_t left, right, result;
};

constexpr std::string_view SPACE_MARK = "\u2581";  // SentencePiece's spelling of a space
constexpr std::string_view REPLACEMENT = "\uFFFD";

size_t hash_pair(uint32_t left, uint32_t right) {
  const uint64_t mixed = (uint64_t{left} << 32 | right) * 0x9E3779B97F4A7C15u;
  return static_cast<size_t>(mixed ^ mixed >> 32);
}

// An open-addressing table of n indices: `slots[i]` is an index or NONE; the keys stay where they are.
std::vector<uint32_t> make_slots(size_t n) {
  return std::vector<uint32_t>(std::bit_ceil(2 * n + 1), NONE);
}

// The slot of the index inserted under this hash that `is` accepts, or the free one where it would be.
template <class Slots, class Is>
auto& find_slot(Slots& slots, size_t hash, Is is) {
  const size_t mask = slots.size() - 1;
  while (slots[hash & mask] != NONE && !is(slots[hash & mask])) ++hash;
  return slots[hash & mask];
}

// Half of a table is free, so that hundreds of neighbours that are not can only be meant.
constexpr size_t MAX_PROBES = 1024;

// Of equal keys the first stays.
template <class Is>
void insert_slot(std::vector<uint32_t>& slots, size_t hash, uint32_t index, const std::string& path, Is is) {
  size_t probes = 0;
  uint32_t& slot = find_slot(slots, hash, [&](uint32_t other) {
    if (++probes > MAX_PROBES) fail("%s: its texts or merges are made to be slow: fetch the model again", path.c_str());
    return is(other);
  });
  if (slot == NONE) slot = index;
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

// Spaces where SentencePiece writes U+2581.
std::string spaces_for_marks(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (size_t at = 0;;) {
    const size_t mark = text.find(SPACE_MARK, at);
    out += text.substr(at, mark - at);
    if (mark == text.npos) return out;
    out += ' ';
    at = mark + SPACE_MARK.size();
  }
}

// Patterns and normalizers see well-formed text, in stretches as long as can be, and no other byte.
template <class Valid, class Invalid>
void for_each_valid(std::string_view text, Valid valid, Invalid invalid) {
  size_t begin = 0, at = 0;
  while (at < text.size()) {
    const int length = sequence_length(text.substr(at));
    if (length > 0) {
      at += static_cast<size_t>(length);
      continue;
    }
    if (at > begin) valid(text.substr(begin, at - begin));
    invalid(text.substr(at, 1));
    begin = ++at;
  }
  if (at > begin) valid(text.substr(begin));
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
  AddedTokens added;              // looked for in a text as it is
  AddedTokens normalized;         // looked for in what the normalizer makes of it
  AddedTokens texts_of_added;     // all of both, as they are written
  std::span<const uint32_t> before, after, end_of_generation;
  PreTokenizer patterns;
  ChatTemplate chat;
  std::vector<uint32_t> text_slots, merge_slots;  // open-addressing tables: id by text (where needed), rank by pair
  std::array<uint32_t, 256> byte_ids{};           // the token that stands for one byte, or NONE

  void read_file(const std::string& path);
  void parse(const std::string& path);
  void parse_added(Reader& in, size_t n);
  void parse_chat(Reader& in, const std::string& path);
  void index(const std::string& path);
  uint32_t end_of_turn(const ChatTemplate& other) const;  // NONE where it writes no token there

  bool normalizes() const { return flags & (NFC | NORMALIZES_SPACES) || prefix == PREFIX_EVERY || !normalized.empty(); }
  std::string normalizer_prefix() const { return prefix == PREFIX_EVERY ? " " : ""; }  // put before every text
  std::string normalize(std::string_view text) const;
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
  if (flags > ALL_FLAGS || prefix > PREFIX_FIRST)
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
  if (std::ranges::any_of(kinds, [](Kind kind) { return kind > Kind::added; })) {
    fail("%s: a token of an unknown kind: the file is damaged, export it again", path.c_str());
  }
  merges = in.array<Merge>(counts[0], "merges");
  uint32_t largest = 0;
  for (const Merge& merge : merges) largest = std::max({largest, merge.left, merge.right, merge.result});
  in.id(largest, vocab_size, "the largest id of a merge");
  parse_added(in, counts[1]);
  before = in.ids(counts[3], vocab_size, "before");
  after = in.ids(counts[4], vocab_size, "after");
  end_of_generation = in.ids(counts[5], vocab_size, "end_of_generation");
  for (uint32_t i = 0; i < counts[2]; ++i) patterns.add(in.string("pattern"), path);
  parse_chat(in, path);
  if (in.left() != 0) fail("%s: %zu bytes too long: the file is damaged, export it again", path.c_str(), in.left());
}

void Tokenizer::Impl::parse_added(Reader& in, size_t n) {
  std::vector<AddedToken> as_written, in_normalized, all;
  for (size_t i = 0; i < n; ++i) {
    const uint32_t id = in.id(in.integer("added tokens"), vocab_size, "the id of an added token");
    const uint32_t token_flags = in.integer("added tokens");
    AddedToken token{id, token_flags, std::string(in.string("added tokens"))};
    all.push_back(token);
    if (token_flags & AddedToken::NORMALIZED) token.text = normalizer_prefix() + normalize(token.text);
    (token_flags & AddedToken::NORMALIZED ? in_normalized : as_written).push_back(std::move(token));
  }
  added = AddedTokens(std::move(as_written));
  normalized = AddedTokens(std::move(in_normalized));
  texts_of_added = AddedTokens(std::move(all));
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

void Tokenizer::Impl::index(const std::string& path) {
  byte_ids.fill(NONE);
  // Whole pieces are looked up where they need no merges, and code points where merging starts from them: a vocabulary
  // of 262144 tokens has 19000 of those.
  std::vector<uint32_t> found_by_text;
  const Kind byte_kind = flags & BYTE_LEVEL ? Kind::text : Kind::byte;
  for (uint32_t id = 0; id < vocab_size; ++id) {
    const std::string_view text = token(id);
    const bool code_point = !(flags & BYTE_LEVEL) && !text.empty() && sequence_length(text) == std::ssize(text);
    if (kinds[id] == Kind::text && (flags & IGNORE_MERGES || code_point)) found_by_text.push_back(id);
    if (kinds[id] == byte_kind && text.size() == 1) {
      uint32_t& byte_id = byte_ids[static_cast<uint8_t>(text[0])];
      byte_id = std::min(byte_id, id);
    }
  }
  text_slots = make_slots(found_by_text.size());
  for (const uint32_t id : found_by_text) {
    insert_slot(text_slots, std::hash<std::string_view>()(token(id)), id, path,
                [&](uint32_t other) { return token(other) == token(id); });
  }
  merge_slots = make_slots(merges.size());
  for (uint32_t rank = 0; rank < merges.size(); ++rank) {
    const auto& [left, right, result] = merges[rank];
    insert_slot(merge_slots, hash_pair(left, right), rank, path,
                [&](uint32_t other) { return merges[other].left == left && merges[other].right == right; });
  }
}

// The normalizer, on bytes that need not be UTF-8: those that are not stay as they are.
std::string Tokenizer::Impl::normalize(std::string_view text) const {
  std::string out;
  if (flags & NFC) {
    for_each_valid(
        text, [&](std::string_view valid) { out += composed(valid); }, [&](std::string_view byte) { out += byte; });
  } else {
    out = text;
  }
  return flags & NORMALIZES_SPACES ? spaces_for_marks(out) : out;
}

// As exporter/ends.py: what a template writes after an answer ends a text; but gpt-oss ends each of an answer's
// messages with <|end|>, and the answer with <|return|>.
uint32_t Tokenizer::Impl::end_of_turn(const ChatTemplate& other) const {
  constexpr std::string_view ANSWER = "Qanswerq", MESSAGE_END = "<|end|>", ANSWER_END = "<|return|>";
  std::string text;
  try {
    text =
        other.render({{Message::user, "Q"}, {Message::assistant, std::string(ANSWER)}, {Message::user, "Q"}}, {}).text;
  } catch (const Error&) {
    return NONE;  // said where the template is used
  }
  const size_t answer = text.find(ANSWER);
  if (answer == text.npos) return NONE;
  const std::string_view next = trim_left(std::string_view(text).substr(answer + ANSWER.size()), true);
  const AddedToken* token = next.empty() ? nullptr : texts_of_added.find(next, 0, next.size());
  const bool of_message = token && token->text == MESSAGE_END && texts_of_added.find(ANSWER_END, 0, ANSWER_END.size());
  return token && !of_message ? token->id : NONE;
}

namespace {

// One call of encode: its scratch memory and what it has made so far.
class Encoder {
 public:
  explicit Encoder(const Tokenizer::Impl& tokenizer)
      : t_(tokenizer), splitter_(t_.patterns, [this](std::string_view piece) { encode_piece(piece); }) {}

  using Range = ChatText::Range;
  // Control tokens are found only within `control_ranges`, which are in order.
  void encode(std::string_view text, std::span<const Range> control_ranges);
  std::vector<int> ids;

 private:
  struct Symbol {
    uint32_t id, previous, next;  // NONE: no symbol; a merged one keeps its left part's place
  };

  template <class Between>
  void extract(const AddedTokens& added, std::string_view text, std::span<const Range> control_ranges, Between between);
  void encode_raw(std::string_view text, std::span<const Range> control_ranges, size_t offset);
  void encode_plain(std::string_view text, bool first);
  void encode_piece(std::string_view piece);
  void add_symbols(std::string_view piece);
  void add_symbol(uint32_t id);
  void push_merge(uint32_t left);
  void merge_symbols();

  const Tokenizer::Impl& t_;
  Splitter splitter_;
  std::vector<Symbol> symbols_;
  std::vector<uint64_t> heap_;  // rank << 32 | place of the left symbol, the least first: ties go to the left
};

void Encoder::encode(std::string_view text, std::span<const Range> control_ranges) {
  if (text.size() > 1u << 30) fail("a text of %zu bytes: give at most %u", text.size(), 1u << 30);
  extract(t_.added, text, control_ranges,
          [&](size_t begin, size_t end) { encode_raw(text.substr(begin, end - begin), control_ranges, begin); });
}

// The ids of the added tokens in `text`; `between(begin, end)` gets what lies between two.
template <class Between>
void Encoder::extract(const AddedTokens& added, std::string_view text, std::span<const Range> control_ranges,
                      Between between) {
  size_t begin = 0, at = 0, range = 0;
  while (at < text.size()) {
    while (range < control_ranges.size() && control_ranges[range].end <= at) ++range;
    const bool control = range < control_ranges.size() && control_ranges[range].begin <= at;
    const AddedToken* token = added.find(text, at, control ? control_ranges[range].end : at);
    if (!token) {
      ++at;
      continue;
    }
    // Where the normalizer writes U+2581 for spaces, none of those is white space.
    const bool blank = !(token->flags & AddedToken::NORMALIZED && t_.flags & NORMALIZES_SPACES);
    std::string_view before = text.substr(std::min(begin, at), at - std::min(begin, at));
    std::string_view after = text.substr(at += token->text.size());
    if (token->flags & AddedToken::STRIP_LEFT) before = trim_right(before, blank);
    if (token->flags & AddedToken::STRIP_RIGHT) after = trim_left(after, blank);
    if (!before.empty()) between(begin, begin + before.size());
    ids.push_back(static_cast<int>(token->id));
    begin = text.size() - after.size();  // white space that is stripped may be a token still
  }
  if (begin < text.size()) between(begin, text.size());
}

// A text between added tokens that are found as they are written; it begins at `offset` of the whole, which the ranges
// are of.
void Encoder::encode_raw(std::string_view text, std::span<const Range> control_ranges, size_t offset) {
  if (!t_.normalizes()) return encode_plain(text, offset == 0);
  // Stretch by stretch, so that what lay in a control range does so afterwards.
  std::string changed = t_.normalizer_prefix();
  std::vector<Range> ranges;
  size_t at = 0;
  const auto normalize_up_to = [&](size_t end) {
    if (end > at) changed += t_.normalize(text.substr(at, end - at));
    at = std::max(at, end);
  };
  for (const auto& [range_begin, range_end] : control_ranges) {
    if (range_end <= offset || range_begin >= offset + text.size()) continue;
    normalize_up_to(std::max(range_begin, offset) - offset);
    const size_t begin = ranges.empty() && at == 0 ? 0 : changed.size();  // the prefix goes with what it is put before
    normalize_up_to(std::min(range_end - offset, text.size()));
    ranges.push_back({begin, changed.size()});
  }
  normalize_up_to(text.size());
  extract(t_.normalized, changed, ranges, [&](size_t begin, size_t end) {
    encode_plain(std::string_view(changed).substr(begin, end - begin), offset == 0 && begin == 0);
  });
}

// A normalized text without added tokens; first: at the start of it all.
void Encoder::encode_plain(std::string_view text, bool first) {
  std::string changed;
  const bool missing = t_.prefix == PREFIX_MISSING || (t_.prefix == PREFIX_FIRST && first);
  if (!(t_.flags & BYTE_LEVEL)) text = changed = spaces_for_marks(text);
  if (missing && !text.starts_with(' ')) {
    changed = std::string(text);
    text = changed.insert(0, 1, ' ');
  }
  if (!(t_.flags & BYTE_LEVEL) && t_.patterns.empty()) return encode_piece(text);  // takes any byte as it comes
  for_each_valid(
      text, [&](std::string_view valid) { splitter_.split(valid); },
      [&](std::string_view byte) { encode_piece(byte); });
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

// What merging starts from: bytes; or code points, and the bytes of those that the vocabulary lacks. What it lacks
// altogether is unknown, or nothing where it has no token for that.
void Encoder::add_symbols(std::string_view piece) {
  const auto byte_id = [&](char c) { return t_.byte_ids[static_cast<uint8_t>(c)]; };
  bool unknown = false;  // one that is still to be added: the tokenizers library lets the bytes of others go before it
  for (size_t at = 0, length = 1; at < piece.size(); at += length) {
    const int sequence = sequence_length(piece.substr(at));
    length = t_.flags & BYTE_LEVEL ? 1 : static_cast<size_t>(std::max(1, sequence));
    const std::string_view bytes = piece.substr(at, length);
    const uint32_t id = t_.flags & BYTE_LEVEL ? byte_id(bytes[0]) : t_.find_text(bytes);
    const bool invalid = sequence <= 0 && (!(t_.flags & BYTE_LEVEL) || piece.size() == 1);
    if (id != NONE) {
      if (unknown) add_symbol(t_.unk);
      unknown = false;
      add_symbol(id);
    } else if (t_.flags & BYTE_FALLBACK && std::ranges::all_of(bytes, [&](char c) { return byte_id(c) != NONE; })) {
      for (const char c : bytes) add_symbol(byte_id(c));
    } else if (t_.unk != NONE) {
      if (unknown && !(t_.flags & FUSE_UNK)) add_symbol(t_.unk);
      unknown = true;
    } else if (invalid) {
      fail("the text is not UTF-8, and the vocabulary has no token for its byte 0x%02X: give UTF-8",
           static_cast<uint8_t>(bytes[0]));
    }
  }
  if (unknown) add_symbol(t_.unk);
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

std::string tokenizer_path(const std::string& model) {
  namespace fs = std::filesystem;
  std::error_code error;  // a model that is not there is load_model's to report
  const fs::path file = fs::weakly_canonical(model, error);
  const fs::path own = fs::path(model).replace_extension(".tokenizer.bin");
  const fs::path linked = fs::path(file).replace_extension(".tokenizer.bin");
  const fs::path shared = file.parent_path().parent_path() / "tokenizer.bin";
  for (const fs::path& path : {own, linked, shared})
    if (fs::exists(path, error)) return path.string();
  return own.string();
}

Tokenizer Tokenizer::load(const std::string& path, const std::string& sha256) {
  auto impl = std::make_shared<Impl>();
  impl->read_file(path);
  if (!sha256.empty() && sha256_hex({impl->file.get(), impl->file_size}) != sha256) {
    fail("%s: not the tokenizer of this model (tokenizer_sha256 is %.64s): give the file that export.py wrote with it",
         path.c_str(), sha256.c_str());
  }
  impl->parse(path);
  impl->index(path);
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
  other.end_of_turn_ = impl_->end_of_turn(other.chat());
  return other;
}

bool Tokenizer::is_end_of_generation(int id) const {
  const uint32_t i = static_cast<uint32_t>(id);
  return i == end_of_turn_ || std::ranges::find(impl_->end_of_generation, i) != impl_->end_of_generation.end();
}

std::string_view Tokenizer::bytes(int id) const {
  const uint32_t i = static_cast<uint32_t>(id);
  const Kind kind = impl_->kinds[i];
  return kind == Kind::control || kind == Kind::unused ? "" : impl_->token(i);
}

std::string Tokenizer::text(int id) const {
  const uint32_t i = static_cast<uint32_t>(id);
  const std::string_view token = impl_->token(i);
  const Kind kind = impl_->kinds[i];
  if (kind == Kind::control || kind == Kind::unused) return std::string(token);
  if (kind == Kind::added && impl_->flags & BYTE_LEVEL) return std::string(token);  // no spelling of bytes
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
