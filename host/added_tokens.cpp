// added_tokens.cpp: a vocabulary may have thousands of added tokens, so they are sorted and narrowed down byte by byte.
#include "host/added_tokens.h"

#include <algorithm>

AddedTokens::AddedTokens(std::vector<AddedToken> tokens) : tokens_(std::move(tokens)) {
  std::erase_if(tokens_, [](const AddedToken& token) { return token.text.empty(); });
  std::ranges::stable_sort(tokens_, {}, &AddedToken::text);
  const auto again = std::ranges::unique(tokens_, {}, &AddedToken::text);  // a text has one id, its first
  tokens_.erase(again.begin(), again.end());
  for (const AddedToken& token : tokens_) ++first_[static_cast<uint8_t>(token.text[0]) + size_t{1}];
  for (size_t byte = 1; byte < first_.size(); ++byte) first_[byte] += first_[byte - 1];
}

const AddedToken* AddedTokens::find(std::string_view text, size_t at, size_t control_end) const {
  const uint8_t lead = static_cast<uint8_t>(text[at]);
  const AddedToken* low = tokens_.data() + first_[lead];
  const AddedToken* high = tokens_.data() + first_[lead + size_t{1}];
  const AddedToken* longest = nullptr;
  // Those in [low, high) share the text's next k bytes; they are sorted, so the one that ends there comes first.
  for (size_t k = 1; low < high; ++k) {
    for (; low < high && low->text.size() == k; ++low) {
      if (!(low->flags & AddedToken::CONTROL) || at + k <= control_end) longest = low;
    }
    if (at + k == text.size()) break;
    const uint8_t next = static_cast<uint8_t>(text[at + k]);
    const auto byte = [&](const AddedToken& token) { return static_cast<uint8_t>(token.text[k]); };
    low = std::partition_point(low, high, [&](const AddedToken& token) { return byte(token) < next; });
    high = std::partition_point(low, high, [&](const AddedToken& token) { return byte(token) == next; });
  }
  return longest;
}
