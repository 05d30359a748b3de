// device.cpp: memory as the contract says, and an estimate of what is free that a real allocation agrees
// with.
#include "kernels/device.h"
#include "host/error.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <fstream>

namespace {

TEST(Device, MemoryIsZeroAlignedAndWritableToItsLastByte) {
  for (size_t bytes : {1ul, 63ul, 64ul, 4095ul, 4096ul, (2ul << 20) - 1, 2ul << 20, (2ul << 20) + 1, 5000000ul}) {
    auto* memory = static_cast<unsigned char*>(device_allocate(bytes));
    EXPECT_EQ(reinterpret_cast<uintptr_t>(memory) % 64, 0u);
    EXPECT_EQ(bytes >= 2ul << 20 ? reinterpret_cast<uintptr_t>(memory) % (2ul << 20) : 0u, 0u);
    size_t not_zero = 0;
    for (size_t i = 0; i < bytes; ++i) not_zero += memory[i] != 0, memory[i] = 0xff;
    EXPECT_EQ(not_zero, 0u) << bytes;
    device_free(memory, bytes);
  }
}

TEST(Device, MovedBuffersFreeOnce) {
  Buffer<int> a(1000);
  a.data()[999] = 7;
  Buffer<int> b = std::move(a);
  EXPECT_EQ(b.data()[999], 7);
  EXPECT_EQ(a.size(), 0u);
  a = std::move(b);
  EXPECT_EQ(a.data()[999], 7);
  EXPECT_EQ(Buffer<int>(0).data(), nullptr);
}

TEST(Device, ImpossibleSizesAreErrors) {
  EXPECT_THROW(device_allocate(SIZE_MAX), Error);
  EXPECT_THROW(device_allocate(size_t(1) << 62), Error);
}

TEST(Device, AvailableMemoryIsMoreThanNothingAndNotMoreThanTheMachine) {
  size_t total_kb = 0;
  std::string key;
  std::ifstream("/proc/meminfo") >> key >> total_kb;
  ASSERT_EQ(key, "MemTotal:");
  EXPECT_GT(device_memory_available(), 1u << 20);
  EXPECT_LE(device_memory_available(), total_kb * 1024);
}

TEST(Device, FailFormatsItsLine) {
  try {
    fail("%s: field %d", "model.safetensors", 3);
    FAIL();
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "model.safetensors: field 3");
  }
}

#ifdef __SANITIZE_ADDRESS__
TEST(DeviceDeathTest, SanitizerSeesAnOverrun) {
  Buffer<char> buffer(4096);
  EXPECT_DEATH(const_cast<volatile char*>(buffer.data())[4096] = 1, "use-after-poison");
}
#endif

}  // namespace
