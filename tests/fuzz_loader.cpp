// make fuzz: the loader against libFuzzer. Any bytes are either a model or refused with an Error.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <string>

#include "host/error.h"
#include "host/loader.h"
#include "tiny_model.h"
#include "typed_model.h"

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

// Small whole models for the corpus, which is the last argument.
extern "C" int LLVMFuzzerInitialize(int* argc, char*** argv) {
  for (const char* variant : {"mha", "mqa", "gqa", "mla"})
    for (const bool experts : {false, true})
      std::ofstream((*argv)[*argc - 1] + ("/seed-" + std::string(variant)) + (experts ? "-experts" : ""))
          << tiny_model(variant, experts, 1).bytes();
  for (const std::string& type : TYPES)
    std::ofstream((*argv)[*argc - 1] + ("/seed-" + type)) << TypedModel(type).bytes();
  return 0;
}

// Changes the header alone, where the decisions are, and writes its new length, so that the data stays where it was.
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned) {
  uint64_t length = 0;
  if (size >= 8) std::memcpy(&length, data, 8);
  if (size < 8 || length > size - 8) return LLVMFuzzerMutate(data, size, max_size);
  std::string header(reinterpret_cast<char*>(data) + 8, length),
      rest(reinterpret_cast<char*>(data) + 8 + length, size - 8 - length);
  header.resize(length + 64);
  header.resize(LLVMFuzzerMutate(reinterpret_cast<uint8_t*>(header.data()), length, header.size()));
  while (header.size() % 8 != 0) header += ' ';
  length = header.size();
  const std::string whole = std::string(reinterpret_cast<const char*>(&length), 8) + header + rest;
  std::copy_n(whole.data(), std::min(whole.size(), max_size), data);
  return std::min(whole.size(), max_size);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const int fd = memfd_create("model", 0);
  static const std::string path = "/proc/self/fd/" + std::to_string(fd);
  if (ftruncate(fd, 0) != 0 || pwrite(fd, data, size, 0) != static_cast<ssize_t>(size)) return -1;
  static Threads threads(1);
  try {
    load_model(path, threads);
  } catch (const Error&) {
  }
  return 0;
}
