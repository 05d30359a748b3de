// JSON is read to the letter and written so that it can be read again.
#include "host/json.h"

#include <gtest/gtest.h>

#include <cmath>

#include "host/error.h"
#include "kernels/device.h"

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
      R"({"b":[true,false,null],"a":{"n":-12,"u":9223372036854775807,"x":0.1},"":"\"\\\n\u0001é😀"})";
  const Json json = parse_json(" " + text + "\r\n", "the text");
  EXPECT_EQ(json.text(), text);
  EXPECT_EQ(parse_json(json.text(true), "the text").text(), text);
  EXPECT_EQ(Json(Json::Object{{"a", 1}, {"b", Json::Array{2.5, "c"}}}).text(true),
            "{\n  \"a\": 1,\n  \"b\": [\n    2.5,\n    \"c\"\n  ]\n}");
  EXPECT_EQ(Json(Json::Array{NAN, INFINITY, "\xff"}).text(), "[null,null,\"\xef\xbf\xbd\"]");
  EXPECT_EQ(*parse_json(R"("\u00e9\u20ac\ud83d\ude00")", "the text").string(), "é€😀");
  const Json zero = parse_json(R"("a\u0000b")", "the text");
  EXPECT_EQ(*zero.string(), std::string("a\0b", 3));
  EXPECT_EQ(zero.text(), R"("a\u0000b")");
}

TEST(Json, AnIntegerIsOneThatFits) {
  const auto number = [](const char* text) { return parse_json(text, "the text"); };
  EXPECT_EQ(number("2147483647").integer<int>(), 2147483647);
  EXPECT_EQ(number("2147483648").integer<int>(), std::nullopt);
  EXPECT_EQ(number("-1").integer<uint64_t>(), std::nullopt);
  EXPECT_EQ(number("9223372036854775807").integer<uint64_t>(), INT64_MAX);
  for (const char* text : {"1.0", "1e2", "\"1\"", "true"}) EXPECT_EQ(number(text).integer<int>(), std::nullopt) << text;
  EXPECT_EQ(number("1e2").number(), 100);
}

TEST(Json, SaysInOneLineWhatIsWrongAndWhere) {
  EXPECT_TRUE(refusal("[1,\n]").starts_with("the text is not JSON: at byte 5: ")) << refusal("[1,\n]");
  EXPECT_NE(refusal("{\"a\": 1, \"a\": 2}").find("duplicate"), std::string::npos);
  for (const std::string& text :
       {std::string("{\"a\": 1"), std::string("1e999"), std::string("9223372036854775808"), std::string(100000, '[')}) {
    const std::string why = refusal(text);
    EXPECT_NE(why, "");
    EXPECT_EQ(why.find('\n'), why.npos) << why;
  }
}

TEST(Json, TakesNothingThatIsAlmostJson) {
  for (const char* text : {"",
                           "[1.]",
                           "[01]",
                           "[-]",
                           "[+1]",
                           "[.5]",
                           "[1e]",
                           "[0x10]",
                           "[NaN]",
                           "[1,]",
                           "[,1]",
                           "[1]x",
                           "[1 2]",
                           "{\"a\"}",
                           "{\"a\":}",
                           "{a:1}",
                           "{\"a\":1,}",
                           "['a']",
                           "[\"\\ud800\"]",
                           "[\"\\udc00\\ud800\"]",
                           "[\"\\x\"]",
                           "[\"a\nb\"]",
                           "[\"\xff\"]",
                           "[\"\xc0\x80\"]",
                           "\"\xed\xa0\x80\"",
                           "[/*c*/1]",
                           "nulll",
                           "\f1"})
    EXPECT_NE(refusal(text), "") << text;
  EXPECT_NE(refusal(std::string("[1\0]", 4)), "");
}

}  // namespace
