// variant.cpp: prints the attention variant of a model file, so that `make run` builds the binary for it.
#include <cstdio>
#include <exception>

#include "host/loader.h"

int main(int argc, char** argv) try {
  if (argc != 2) return std::fprintf(stderr, "usage: variant NAME.safetensors\n"), 2;
  std::puts(ModelFile(argv[1]).model.config.attention.c_str());
} catch (const std::exception& e) {
  return std::fprintf(stderr, "variant: %s\n", e.what()), 1;
}
