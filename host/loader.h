// loader.h: a model file becomes a model.
#pragma once

#include <memory>
#include <string>

#include "model.h"

class Threads;

// A model file, mapped and checked. All but the weights is known, so that what they take can be told, and refused,
// before it is taken.
class ModelFile {
 public:
  // Checks every tensor (name, dtype, shape, offsets, overlap, file size) and every hyper-parameter. Throws Error with
  // one line naming the file, the field, the value and the fix. part: the matrices' rows that this process has; of the
  // file no other pages are read.
  explicit ModelFile(const std::string& path, Part part = {});
  ~ModelFile();
  // Throws Error where the file holds shapes alone: pack would.
  void require_weights() const;
  // Brings the weights into memory, once. The file's pages leave this process as they are copied: at
  // most 8 MB of them (of a transposed matrix: all) come on top of weight_bytes, and those the kernel can take back.
  // With CUDA a matrix at a time passes through the host's memory.
  void pack(Threads& threads);

  Model model;  // without weights until pack()

 private:
  struct Contents;
  std::unique_ptr<Contents> contents_;  // until pack()
};

// Both steps.
Model load_model(const std::string& path, Threads& threads);
