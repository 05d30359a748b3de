// added_tokens.h: the tokens that are found in a text as they are written, before anything splits or merges it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

struct AddedToken {
  // normalized: it is looked for in what the normalizer makes of a text.
  enum Flags : uint32_t { CONTROL = 1, STRIP_LEFT = 2, STRIP_RIGHT = 4, NORMALIZED = 8 };
  uint32_t id, flags;
  std::string text;
};

class AddedTokens {
 public:
  AddedTokens() = default;
  explicit AddedTokens(std::vector<AddedToken> tokens);  // one without a text is never found

  bool empty() const { return tokens_.empty(); }
  // The longest token at text[at], null where there is none. A control token must end at `control_end` or before.
  const AddedToken* find(std::string_view text, size_t at, size_t control_end) const;

 private:
  std::vector<AddedToken> tokens_;  // in order of their texts
  // Those that begin with byte b: tokens_[first_[b] .. first_[b + 1])
  std::array<uint32_t, 257> first_{};
};
