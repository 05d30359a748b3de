// unicode.h: white space and normal form C, for whatever asks. Where a UTF-8 sequence ends: utf8.h.
#pragma once

#include <string>
#include <string_view>

// Unicode's White_Space, which regular expressions call \s.
bool is_white_space(char32_t point);

// Without the white space at its left, at its right. blank: the space itself is white space too.
std::string_view trim_left(std::string_view text, bool blank);
std::string_view trim_right(std::string_view text, bool blank);

// Well-formed UTF-8 in normal form C, in n log n steps whatever it holds.
std::string composed(std::string_view text);
