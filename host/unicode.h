// unicode.h: white space and normal form C, for whatever asks. Where a UTF-8 sequence ends: utf8.h.
#pragma once

#include <string>
#include <string_view>

// Without the white space (Unicode's White_Space, which regular expressions call \s) at its left, at its right. blank:
// the space itself is white space too.
std::string_view trim_left(std::string_view text, bool blank);
std::string_view trim_right(std::string_view text, bool blank);
// Python's str.strip(), which templates call: it takes U+001C to U+001F too.
std::string_view strip(std::string_view text);

// Well-formed UTF-8 in normal form C, in n log n steps whatever it holds.
std::string composed(std::string_view text);
