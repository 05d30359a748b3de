// datasheets.cpp: what makers say of their GPUs and chips. A line more is a machine more; --bandwidth, --flops and
// --memory describe one that is not here.
//
// FLOP/s are dense: where a datasheet gives the figure with sparsity (2 of 4 weights zero), half of it. GeForce: with
// float32 accumulation, which is half of the other figure. Memory is the datasheet's number times 10^9 bytes: it means
// GiB there, and the 7 % between are about what the driver, ECC and the program itself take.
#include "host/roofline.h"

namespace {

constexpr Datasheet ALL[] = {
    // name, memory GB, bandwidth GB/s, TFLOP/s of f32, bf16 or f16, int8, source
    {"T4", 16, 320, 8.1, 65, 130, "NVIDIA Turing GPU architecture whitepaper, table 5"},
    {"L4", 24, 300, 30.3, 121, 242.5, "NVIDIA L4 datasheet"},
    {"A10", 24, 600, 31.2, 125, 250, "NVIDIA A10 datasheet"},
    {"A100 40GB", 40, 1555, 19.5, 312, 624, "NVIDIA A100 datasheet, SXM4"},
    {"A100 80GB", 80, 2039, 19.5, 312, 624, "NVIDIA A100 datasheet, SXM4"},
    {"L40S", 48, 864, 91.6, 362.05, 733, "NVIDIA L40S datasheet"},
    {"RTX 3090", 24, 936, 35.6, 71, 284, "NVIDIA Ampere GA102 GPU architecture whitepaper, appendix A"},
    {"RTX 4090", 24, 1008, 82.6, 165.2, 660.6, "NVIDIA Ada GPU architecture whitepaper, appendix A"},
    {"RTX 5090", 32, 1792, 104.8, 209.5, 838, "NVIDIA RTX Blackwell GPU architecture whitepaper 1.1, appendix A"},
    {"H100 PCIe", 80, 2000, 51, 756, 1513,
     "NVIDIA H100 datasheet; tensor FLOP/s: architecture whitepaper 1.04, table 3"},
    {"H100 SXM", 80, 3350, 67, 989.4, 1978.9,
     "NVIDIA H100 datasheet; tensor FLOP/s: architecture whitepaper 1.04, table 3"},
    {"H200", 141, 4800, 67, 989.4, 1978.9, "NVIDIA H200 datasheet; tensor FLOP/s: those of the H100 SXM"},
    {"B200", 180, 8000, 80, 2250, 4500, "NVIDIA DGX B200 datasheet; Blackwell architecture technical brief"},
    {"MI300X", 192, 5300, 163.4, 1307.4, 2614.9, "AMD Instinct MI300X data sheet"},
    {"M1", 16, 68.3, 2.6, 2.6, 2.6,
     "Apple newsroom, 2020-11-10; GB/s: LPDDR4X-4266 of 128 bits (AnandTech, 2020-11-17)"},
    {"M2", 24, 100, 3.6, 3.6, 3.6, "Apple newsroom, 2022-06-06"},
    {"M1 Max", 64, 400, 10.4, 10.4, 10.4, "Apple newsroom, 2021-10-18; FLOP/s: Apple's keynote of that day"},
    {"M2 Ultra", 192, 800, 27.2, 27.2, 27.2, "Apple newsroom, 2023-06-05; FLOP/s: 9728 lanes x 2 x 1.398 GHz"},
};

}  // namespace

std::span<const Datasheet> datasheets() {
  return ALL;
}
