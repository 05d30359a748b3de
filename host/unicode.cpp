// unicode.cpp: white space is written out, so that it does not depend on a library's version; normal form C is
// utf8proc's.
#include "host/unicode.h"

#include <utf8proc.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "host/utf8.h"

namespace {

using Point = utf8proc_int32_t;

// The code point at the start of `text`, negative where there is none.
Point point_at(std::string_view text) {
  Point point = -1;
  utf8proc_iterate(reinterpret_cast<const utf8proc_uint8_t*>(text.data()), std::ssize(text), &point);
  return point;
}

template <class IsSpace>
std::string_view left_of(std::string_view text, IsSpace is_space) {
  while (!text.empty() && is_space(point_at(text))) text.remove_prefix(static_cast<size_t>(sequence_length(text)));
  return text;
}

template <class IsSpace>
std::string_view right_of(std::string_view text, IsSpace is_space) {
  while (!text.empty()) {
    size_t last = text.size() - 1;  // where the last sequence begins
    while (last > 0 && (static_cast<uint8_t>(text[last]) & 0xC0) == 0x80) --last;
    const std::string_view sequence = text.substr(last);
    if (sequence_length(sequence) != std::ssize(sequence) || !is_space(point_at(sequence))) break;
    text.remove_suffix(sequence.size());
  }
  return text;
}

}  // namespace

bool is_white_space(char32_t c) {
  return (c >= 0x09 && c <= 0x0D) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

std::string_view trim_left(std::string_view text, bool blank) {
  return left_of(text, [&](Point c) { return is_white_space(static_cast<char32_t>(c)) && (blank || c != ' '); });
}
std::string_view trim_right(std::string_view text, bool blank) {
  return right_of(text, [&](Point c) { return is_white_space(static_cast<char32_t>(c)) && (blank || c != ' '); });
}

// utf8proc_map would do it all, but it sorts marks neighbour by neighbour: a megabyte of nothing but marks would take
// it an hour.
std::string composed(std::string_view text) {
  constexpr auto OPTIONS = static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE);
  if (std::ranges::all_of(text, [](char c) { return static_cast<uint8_t>(c) < 0x80; })) return std::string(text);
  std::vector<Point> points;
  while (!text.empty()) {
    Point parts[4];  // no canonical decomposition is longer
    points.insert(points.end(), parts, parts + utf8proc_decompose_char(point_at(text), parts, 4, OPTIONS, nullptr));
    text.remove_prefix(static_cast<size_t>(sequence_length(text)));
  }
  const auto order = [](Point point) { return utf8proc_get_property(point)->combining_class; };
  for (auto marks = points.begin(); marks != points.end();) {
    const auto starter = std::find_if(marks, points.end(), [&](Point point) { return order(point) == 0; });
    std::ranges::stable_sort(marks, starter, {}, order);
    marks = starter == points.end() ? starter : starter + 1;
  }
  points.push_back(0);  // utf8proc ends the string
  const auto size = utf8proc_reencode(points.data(), std::ssize(points) - 1, OPTIONS);
  return {reinterpret_cast<const char*>(points.data()), static_cast<size_t>(size)};
}
