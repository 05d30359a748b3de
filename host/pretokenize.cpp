// pretokenize.cpp: PCRE2 does the matching. Patterns come from files that may be hostile, so their steps are bounded.
#include "host/pretokenize.h"

#include <algorithm>
#include <cstdint>
#include <new>

#include "host/error.h"
#include "host/utf8.h"

namespace {

// Steps of one match: a run of white space may be as long as the text, and is looked at a few times.
constexpr uint32_t STEPS = 1 << 20, STEPS_PER_BYTE = 4;

}  // namespace

void PreTokenizer::add(std::string_view pattern, const std::string& path) {
  int error = 0;
  PCRE2_SIZE at = 0;
  patterns_.emplace_back(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                                       PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &error, &at, nullptr));
  if (!patterns_.back()) {
    PCRE2_UCHAR message[128];
    pcre2_get_error_message(error, message, sizeof message);
    fail("%s: pre-tokenizer pattern: %s at byte %zu of %.*s: export it again", path.c_str(),
         reinterpret_cast<char*>(message), size_t{at}, static_cast<int>(std::min<size_t>(pattern.size(), 200)),
         pattern.data());
  }
  uint32_t empty = 0;
  pcre2_pattern_info(patterns_.back().get(), PCRE2_INFO_MATCHEMPTY, &empty);
  if (empty)
    fail("%s: pre-tokenizer pattern %.*s matches the empty text: use another model", path.c_str(),
         static_cast<int>(std::min<size_t>(pattern.size(), 200)), pattern.data());
  pcre2_jit_compile(patterns_.back().get(), PCRE2_JIT_COMPLETE);  // where it cannot, pcre2_match interprets
}

Splitter::Splitter(const PreTokenizer& patterns, Piece piece) : patterns_(patterns), piece_(std::move(piece)) {
  if (patterns_.empty()) return;
  context_.reset(pcre2_match_context_create(nullptr));
  match_.reset(pcre2_match_data_create(1, nullptr));
  jit_stack_.reset(pcre2_jit_stack_create(32 << 10, 32 << 20, nullptr));
  if (!context_ || !match_ || !jit_stack_) throw std::bad_alloc();
  pcre2_jit_stack_assign(context_.get(), nullptr, jit_stack_.get());
}

// By the patterns from `level` on: matches are pieces, and so is what lies between two.
void Splitter::split(std::string_view text, size_t level) {
  if (level == patterns_.patterns_.size()) return piece_(text);
  const size_t steps = std::min<size_t>(STEPS + STEPS_PER_BYTE * text.size(), UINT32_MAX);
  size_t begin = 0, from = 0;
  while (from < text.size()) {
    pcre2_set_match_limit(context_.get(), static_cast<uint32_t>(steps));
    const int found = pcre2_match(patterns_.patterns_[level].get(), reinterpret_cast<PCRE2_SPTR>(text.data()),
                                  text.size(), from, PCRE2_NO_UTF_CHECK, match_.get(), context_.get());
    if (found == PCRE2_ERROR_NOMATCH) break;
    if (found < 0) {
      fail(
          "the tokenizer's pattern %zu takes too many steps on this text (PCRE2 error %d): use a model whose pattern "
          "does not",
          level, found);
    }
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
