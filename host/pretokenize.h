// pretokenize.h: a text in pieces, by the model's patterns; no merge crosses the border of a piece.
#pragma once

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

template <auto FREE>
struct FreeWith {
  void operator()(auto* p) const { FREE(p); }
};

// Patterns, applied in order to what the ones before them have left whole.
class PreTokenizer {
 public:
  // Throws Error, which names `path`, for a pattern that PCRE2 does not take. \C, which would cut a code point, is
  // none.
  void add(std::string_view pattern, const std::string& path);
  bool empty() const { return patterns_.empty(); }

 private:
  friend class Splitter;
  std::vector<std::unique_ptr<pcre2_code, FreeWith<pcre2_code_free>>> patterns_;
};

// The scratch memory of one text's splitting.
class Splitter {
 public:
  using Piece = std::function<void(std::string_view)>;
  // `piece` gets all of every text, in order.
  Splitter(const PreTokenizer& patterns, Piece piece);
  // `text` is well-formed UTF-8. Throws Error where a pattern takes too many steps.
  void split(std::string_view text) { split(text, 0); }

 private:
  void split(std::string_view text, size_t level);

  const PreTokenizer& patterns_;
  Piece piece_;
  std::unique_ptr<pcre2_match_context, FreeWith<pcre2_match_context_free>> context_;
  std::unique_ptr<pcre2_match_data, FreeWith<pcre2_match_data_free>> match_;
  std::unique_ptr<pcre2_jit_stack, FreeWith<pcre2_jit_stack_free>> jit_stack_;
};
