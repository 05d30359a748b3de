// make fuzz: the loader against libFuzzer. Any bytes are either a model or refused with an Error.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <string>

#include "model.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const int fd = memfd_create("model", 0);
  static const std::string path = "/proc/self/fd/" + std::to_string(fd);
  if (ftruncate(fd, 0) != 0 || pwrite(fd, data, size, 0) != static_cast<ssize_t>(size)) return -1;
  try {
    load_model(path);
  } catch (const Error&) {
  }
  return 0;
}
