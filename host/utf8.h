// utf8.h: where a UTF-8 sequence ends.
#pragma once

#include <cstdint>
#include <string_view>

// Length of the well-formed UTF-8 sequence at the start of `text` (Unicode, table 3-7); 0: there is none; -1: `text`
// ends within what may become one.
inline int sequence_length(std::string_view text) {
  const auto at = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  const uint8_t lead = at(0);
  if (lead < 0x80) return 1;
  if (lead < 0xC2 || lead > 0xF4) return 0;
  const int length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  const uint8_t low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
  const uint8_t high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
  for (int i = 1; i < length; ++i) {
    const size_t k = static_cast<size_t>(i);
    if (k == text.size()) return -1;
    if (at(k) < (i == 1 ? low : 0x80) || at(k) > (i == 1 ? high : 0xBF)) return 0;
  }
  return length;
}
