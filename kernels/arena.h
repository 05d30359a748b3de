// arena.h: one piece of device memory, handed out in parts by the code that uses them.
//
// What a part costs is said nowhere else: an arena without memory runs the same code and only counts.
//
//     Arena plan;             Stage planned(plan, ...);      plan.bytes() is what it takes
//     Arena memory(bytes);    Stage stage(memory, ...);      memory.bytes() == plan.bytes()
#pragma once

#include "host/error.h"
#include "kernels/device.h"

// Elements of an array [n, width]; where its row n begins.
inline size_t area(int n, int width) {
  return static_cast<size_t>(n) * static_cast<size_t>(width);
}

class Arena {
 public:
  Arena() = default;  // counts
  explicit Arena(size_t bytes) : owned_(bytes), start_(owned_.data()), capacity_(bytes) {
    device_forbid(start_, bytes);
  }
  // Over memory that somebody else owns.
  Arena(std::byte* start, size_t bytes) : start_(start), capacity_(bytes) {}

  // [n], aligned to 64 bytes, zeros when the arena is new; null while it only counts. Throws Error where there is less.
  template <class T>
  T* take(size_t n) {
    const size_t begin = bytes_, size = n * sizeof(T);
    bytes_ = (begin + size + RED_ZONE + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    if (!start_) return nullptr;
    if (bytes_ > capacity_) fail("a stage takes %zu bytes of memory, %zu were planned for it", bytes_, capacity_);
    device_permit(start_ + begin, size);
    return reinterpret_cast<T*>(start_ + begin);
  }
  size_t bytes() const { return bytes_; }  // taken so far

 private:
  static constexpr size_t ALIGNMENT = 64, RED_ZONE = 64;  // between parts: AddressSanitizer sees who leaves his own

  Buffer<std::byte> owned_;
  std::byte* start_ = nullptr;
  size_t capacity_ = 0, bytes_ = 0;
};

// What a layout takes: layout(arena) calls arena.take for its parts.
template <class Layout>
size_t bytes_of(Layout layout) {
  Arena arena;
  layout(arena);
  return arena.bytes();
}

// Scratch memory that calls use one after the other, each from its start. Stages plan their largest call when they are
// made; then the memory is taken.
class Workspace {
 public:
  void plan(size_t bytes) { bytes_ = bytes > bytes_ ? bytes : bytes_; }
  void allocate(Arena& arena) { start_ = arena.take<std::byte>(bytes_); }
  // For one call's parts: the same for every thread of the team.
  Arena begin() const { return Arena(start_, bytes_); }
  size_t bytes() const { return bytes_; }

 private:
  std::byte* start_ = nullptr;
  size_t bytes_ = 0;
};
