// tokenize.cpp: the tokenizer behind a pipe, for tests/test_tokenizer.py.
//
//     tokenize FILE.tokenizer.bin
//
// Requests on standard input, a line of ids (or "error: ...") each:
//     encode PARSE_SPECIAL ADD_SPECIAL LENGTH \n bytes
//     chat COUNT \n, then COUNT times: ROLE LENGTH \n bytes          ROLE: 0 system, 1 user, 2 assistant
//     tokens \n                          for every id: is_end_of_generation, bytes and text in hexadecimal, a line each
#include <cstdio>
#include <iostream>

#include "host/error.h"
#include "host/tokenizer.h"
#include "kernels/device.h"

namespace {

std::string read_bytes() {
  size_t length = 0;
  std::cin >> length;
  std::cin.get();
  std::string bytes(length, '\0');
  std::cin.read(bytes.data(), static_cast<std::streamsize>(length));
  return bytes;
}

std::vector<int> answer(const Tokenizer& tokenizer, const std::string& request) {
  if (request == "encode") {
    bool parse_special = false, add_special = false;
    std::cin >> parse_special >> add_special;
    return tokenizer.encode(read_bytes(), parse_special, add_special);
  }
  size_t count = 0;
  std::cin >> count;
  std::vector<Message> messages(count);
  for (Message& message : messages) {
    int role = 0;
    std::cin >> role;
    message = {static_cast<Message::Role>(role), read_bytes()};
  }
  return tokenizer.encode_chat(messages);
}

std::string hexadecimal(std::string_view bytes) {
  std::string out;
  for (const char c : bytes) {
    char digits[3];
    std::snprintf(digits, sizeof digits, "%02x", static_cast<unsigned>(static_cast<unsigned char>(c)));
    out += digits;
  }
  return out;
}

void print_tokens(const Tokenizer& tokenizer) {
  for (int id = 0; id < tokenizer.vocab_size(); ++id) {
    std::cout << tokenizer.is_end_of_generation(id) << " " << hexadecimal(tokenizer.bytes(id)) << " "
              << hexadecimal(tokenizer.text(id)) << "\n";
  }
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 2) return 2;
  std::ios::sync_with_stdio(false);
  const Tokenizer tokenizer = Tokenizer::load(argv[1], "");
  for (std::string request; std::cin >> request;) {
    if (request == "tokens") {
      print_tokens(tokenizer);
    } else {
      try {
        for (const int id : answer(tokenizer, request)) std::cout << id << ' ';
      } catch (const Error& error) {
        std::cout << "error: " << error.what();
      }
      std::cout << "\n";
    }
    std::cout.flush();
  }
  return 0;
} catch (const Error& error) {
  std::cerr << error.what() << "\n";
  return 1;
}
