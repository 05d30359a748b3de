// Our JSON against nlohmann's: what one takes the other takes, for the same value.
#include "json.h"

#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <random>

#include "device.h"

namespace {

std::string refusal(const std::string& text) {
  try {
    parse_json(text, "the text");
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

TEST(Json, ReadsAndWritesEveryKindOfValue) {
  const std::string text =
      R"({"b":[true,false,null],"a":{"n":-12,"u":18446744073709551615,"x":0.1},"":"\"\\\n\u0001é😀"})";
  const Json json = parse_json(" " + text + "\r\n", "the text");
  EXPECT_EQ(json.text(), text);
  EXPECT_EQ(parse_json(json.text(true), "the text").text(), text);
  EXPECT_EQ(Json(Json::Object{{"a", 1}, {"b", Json::Array{2.5, "c"}}}).text(true),
            "{\n  \"a\": 1,\n  \"b\": [\n    2.5,\n    \"c\"\n  ]\n}");
  EXPECT_EQ(Json(Json::Array{NAN, INFINITY, "\xff"}).text(), "[null,null,\"\xef\xbf\xbd\"]");
  EXPECT_EQ(*parse_json(R"("\u00e9\u20ac\ud83d\ude00")", "the text").string(), "é€😀");
}

TEST(Json, AnIntegerIsOneThatFits) {
  const auto number = [](const char* text) { return parse_json(text, "the text"); };
  EXPECT_EQ(number("2147483647").integer<int>(), 2147483647);
  EXPECT_EQ(number("2147483648").integer<int>(), std::nullopt);
  EXPECT_EQ(number("-1").integer<uint64_t>(), std::nullopt);
  EXPECT_EQ(number("18446744073709551615").integer<uint64_t>(), UINT64_MAX);
  EXPECT_EQ(number("18446744073709551616").integer<uint64_t>(), std::nullopt);
  for (const char* text : {"1.0", "1e2", "\"1\"", "true"}) EXPECT_EQ(number(text).integer<int>(), std::nullopt) << text;
  EXPECT_EQ(number("18446744073709551616").number(), 0x1p64);
}

TEST(Json, SaysInOneLineWhatIsWrongAndWhere) {
  EXPECT_EQ(refusal("[1,\n]"), "the text is not JSON: at byte 4 a value is missing");
  EXPECT_EQ(refusal("{\"a\": 1"), "the text is not JSON: at byte 7 it ends");
  EXPECT_EQ(refusal("{\"a\": 1, \"a\": 2}"), "the text names \"a\" twice");
  EXPECT_EQ(refusal("1e999"), "the text is not JSON: at byte 0 a number is too large or too small");
  EXPECT_NE(refusal(std::string(100000, '[')).find("nested too deep"), std::string::npos);
}

void compare(const std::string& text) {
  const std::string why = refusal(text);
  if (why.ends_with("twice") || why.find("too large or too small") != why.npos) return;  // stricter than nlohmann
  EXPECT_EQ(why.find('\n'), why.npos) << why;
  ASSERT_EQ(nlohmann::json::accept(text), why.empty()) << text << "\n" << why;
  if (!why.empty()) return;
  EXPECT_EQ(nlohmann::json::parse(text), nlohmann::json::parse(parse_json(text, "the text").text())) << text;
}

TEST(Json, TakesWhatAnotherReaderTakes) {
  for (const char* text : {"",
                           "[1.]",
                           "[01]",
                           "[-]",
                           "[-0]",
                           "[\"\\ud800\"]",
                           "[\"\\udc00\"]",
                           "[\"\\udc00\\ud800\"]",
                           "[\"a\nb\"]",
                           "[\"\xff\"]",
                           "[1,]",
                           "[,1]",
                           "[1]x",
                           "[NaN]",
                           "[1e]",
                           "[.5]",
                           "[+1]",
                           "[\"\\x\"]",
                           "[/*c*/1]",
                           "['a']",
                           "[1--2]",
                           "[\"\\u12\"]",
                           "[\"\\u12g4\"]",
                           "\xef\xbb\xbf[1]",
                           "[nulll]",
                           "[1 2]",
                           "[\"\x01\"]",
                           "{\"a\"}",
                           "{\"a\":}",
                           "{a:1}",
                           "{\"a\":1,}",
                           "\"\xed\xa0\x80\"",
                           "\"\xc0\x80\"",
                           "\"\xf4\x90\x80\x80\"",
                           "\"\xe2\x82\"",
                           "\"\x7f\"",
                           "[]",
                           "{}",
                           " 1 ",
                           "\"",
                           "\"\\",
                           "\"\\u",
                           "tru",
                           "1e5",
                           "1E-5",
                           "-",
                           "[",
                           "{",
                           "\f1",
                           "0x10",
                           "1e+",
                           "[\"\\u+123\"]"})
    compare(text);
  compare(std::string("[1\0]", 4));
  const std::string seeds[] = {
      R"({"a": [1, -2.5e+3, true, false, null], "b": {"c": "d\u00e9\ud83d\ude00\n"}, "": "é😀", "x": 18446744073709551615})",
      R"([[[0, 0.0, -0, 1E5]], "\\\"\/\b\f\n\r\t", {}, [], [{"k": []}]])"};
  std::mt19937 random(1);
  for (int i = 0; i < 20000; i++) {
    std::string text = seeds[i % 2];
    for (unsigned changes = 1 + static_cast<unsigned>(random() % 3); changes > 0; changes--) {
      const size_t at = random() % text.size();
      const char signs[] = "0123456789-+eE.[]{},:\"\\ udtfn";
      const char c = random() % 3 ? signs[random() % (sizeof signs - 1)] : static_cast<char>(random());
      if (random() % 2)
        text[at] = c;
      else if (random() % 2)
        text.insert(at, 1, c);
      else
        text.erase(at, 1);
    }
    compare(text);
  }
}

}  // namespace
