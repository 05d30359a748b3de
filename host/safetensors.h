// safetensors.h: a safetensors file as it lies on disk. Nothing in it is trusted: every length, offset and size is
// checked before it is used.
#pragma once

#include <sys/stat.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "host/json.h"

// Errors below are one line that names the file, the tensor, the field and the value.

class MappedFile {
 public:
  explicit MappedFile(const std::string& path);  // throws Error
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile();

  const std::byte* data() const { return data_; }
  size_t size() const { return size_; }
  // The pages of [first, last) leave this process; the page cache keeps them.
  void release(const void* first, const void* last) const;
  bool begins_with(std::string_view magic) const;  // of at most 8 bytes
  // Throws Error where the file became another since it was opened: what was read of it is of no use.
  void refuse_changed(const std::string& path) const;

 private:
  int fd_ = -1;
  struct stat info_ {};
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

// A tensor of the file, row-major, aligned to its element.
struct Entry {
  std::string dtype;  // F32, BF16, F16, I8 or U8
  std::vector<int64_t> shape;
  const std::byte* data = nullptr;  // where it would be, in a file of shapes alone
  size_t bytes = 0;
  bool taken = false;
};

std::string shape_text(const std::vector<int64_t>& shape);  // "[2, 3]"

// The header: 8 bytes of length, then JSON. Data follows without holes or overlaps, or not at all: shapes alone.
class Header {
 public:
  Header(const std::string& path, const MappedFile& file);  // throws Error

  bool shapes_alone() const { return data_bytes_ == 0; }

  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  bool has(const std::string& name) const { return entries_.count(name) > 0; }
  // The tensor of this name, of this dtype and shape, of which a leading 1 may be left out: [1, n, k] is [n, k]. Throws
  // Error where there is none.
  const Entry& take(const std::string& name, const char* dtype, const std::vector<int64_t>& shape);
  const Entry& take(const std::string& name);  // of any dtype and shape
  [[noreturn]] void refuse(const std::string& name, const char* dtype, const std::vector<int64_t>& shape) const;
  // Throws Error for the first tensor that nobody has taken.
  void refuse_unused() const;

 private:
  void read_metadata(const Json& value);
  Entry read_entry(const std::string& name, const Json& value, const std::byte* data) const;
  void check_layout(const std::byte* data) const;

  std::string path_;
  size_t data_bytes_ = 0;
  std::map<std::string, std::string> metadata_;
  std::map<std::string, Entry> entries_;
};
