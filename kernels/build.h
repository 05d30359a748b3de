// build.h: the one place where make's choices become types.
//
//     make ATTENTION=mha|mqa|gqa|mla CACHE=contiguous|paged KERNEL=naive|flash KV=f32|f16|bf16|q8|q4
//
// passes -DBUILD_ATTENTION=Gqa -DBUILD_KERNEL=Flash -DBUILD_KV=KvF16 -DBUILD_BLOCK=0 (0: contiguous). A stage that is a
// template over a choice ends its .cpp with FOR_EACH_CACHE(INSTANTIATE) or a longer name below; `run` instantiates
// one combination, the tests (-DBUILD_EVERY_COMBINATION) the whole cross-product. The CPU alone keeps q4: its stages
// end with FOR_EACH_CPU_CACHE, and what tests every device is compiled once more for it (-DBUILD_Q4).
#pragma once

#ifdef BUILD_EVERY_COMBINATION
// Block sizes: 0 is contiguous, 16 the default of CACHE=paged, 1 and 3 find off-by-one errors.
#define FOR_EACH_BLOCK(X, ...) X(__VA_ARGS__, 0) X(__VA_ARGS__, 1) X(__VA_ARGS__, 3) X(__VA_ARGS__, 16)
#ifdef BUILD_Q4
#define FOR_EACH_CACHE(X) FOR_EACH_BLOCK(X, KvQ4)
#define FOR_EACH_KERNEL_BLOCKS(X, ...) FOR_EACH_BLOCK(X, __VA_ARGS__, KvQ4)
#else
#define FOR_EACH_CACHE(X) \
  FOR_EACH_BLOCK(X, KvF32) FOR_EACH_BLOCK(X, KvF16) FOR_EACH_BLOCK(X, KvBF16) FOR_EACH_BLOCK(X, KvQ8)
#define FOR_EACH_KERNEL_BLOCKS(X, ...)  \
  FOR_EACH_BLOCK(X, __VA_ARGS__, KvF32) \
  FOR_EACH_BLOCK(X, __VA_ARGS__, KvF16) FOR_EACH_BLOCK(X, __VA_ARGS__, KvBF16) FOR_EACH_BLOCK(X, __VA_ARGS__, KvQ8)
#endif
#define FOR_EACH_CPU_CACHE(X) \
  FOR_EACH_CACHE(X)           \
  FOR_EACH_BLOCK(X, KvQ4)
#define FOR_EACH_VARIANT_KERNELS(X, V) FOR_EACH_KERNEL_BLOCKS(X, V, Naive) FOR_EACH_KERNEL_BLOCKS(X, V, Flash)
#define FOR_EACH_TRANSFORMER(X)    \
  FOR_EACH_VARIANT_KERNELS(X, Mha) \
  FOR_EACH_VARIANT_KERNELS(X, Mqa) FOR_EACH_VARIANT_KERNELS(X, Gqa) FOR_EACH_VARIANT_KERNELS(X, Mla)
#else
#define FOR_EACH_CACHE(X) X(BUILD_KV, BUILD_BLOCK)  // X(Kv, Block)
#define FOR_EACH_CPU_CACHE FOR_EACH_CACHE
#define FOR_EACH_TRANSFORMER(X) X(BUILD_ATTENTION, BUILD_KERNEL, BUILD_KV, BUILD_BLOCK)  // X(Attention, Kernel, ...)
#endif
