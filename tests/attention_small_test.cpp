// Attention on shapes that are small enough for the emulated GPU's race build: a prompt, a decode, rows in plain
// memory.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "attention_world.h"

namespace {

template <class Kv>
class SmallAttention : public testing::Test {};
TYPED_TEST_SUITE(SmallAttention, TestedTypes);

// The last token alone, which a GPU works on with other warps and a block of threads for each split, gets what it gets
// at the end of a prompt.
TYPED_TEST(SmallAttention, DecodeIsTheEndOfItsPrompt) {
  if (!takes<Flash, TypeParam>()) GTEST_SKIP() << "no flash for this type";
  for (AttentionShape s : {make_shape(4, 2, 72, 72), make_shape(2, 1, 40, 24, true), make_shape(2, 1, 140, 136)}) {
    const int n = 290, width = s.n_heads * s.v_dim;
    const Data d(s, {n});
    const std::vector<float> prompt = attention_of<Flash, TypeParam, 16>(d, {{0, 250, n - 250}}, 2);
    const std::vector<float> decode = attention_of<Flash, TypeParam, 3>(d, {{0, n - 1, 1}}, 2);
    expect_same_bits(decode, {prompt.end() - width, prompt.end()}, std::to_string(s.k_dim) + " wide");
  }
}

// Rows in plain memory, a split at a time, give what attend gives for a cache of the same rows, in the type that is
// multiplied.
TEST(AttendRows, SameBitsAsAttend) {
  const std::vector<float> sinks = {1, -3, 20, 0};
  for (int window : {0, 300}) {
    AttentionShape s = make_shape(4, 2, 24, 20);
    s.window = window;
    s.sinks = window > 0 ? sinks.data() : nullptr;
    const int context = 700, first = 640, n = context - first;
    const Data d(s, {context});
    const std::vector<float> expected = on_tensor_cores() ? attention_of<Flash, KvBF16, 0>(d, {{0, first, n}}, 2)
                                                          : attention_of<Flash, KvF32, 0>(d, {{0, first, n}}, 2);
    Batches batches(2, context, 0);
    DeviceBatch on_device;
    const Batch& batch = on_device.upload(batches.batch({{0, 0, 1}, {1, first, n}}));
    const int q_width = s.n_heads * s.k_dim, out_width = s.n_heads * s.v_dim;
    std::vector<float> q(at(q_width));
    q.insert(q.end(), d.q[0].begin() + first * q_width, d.q[0].end());
    const Buffer<float> device_q = device_copy(q), k = device_copy(d.k[0]), v = device_copy(d.v[0]);
    Buffer<float> device_out = device_copy(std::vector<float>(at((n + 1) * out_width), -7));
    const Buffer<float> device_sinks = device_copy(sinks);
    if (s.sinks) s.sinks = device_sinks.data();
    ScratchMemory<Flash> scratch(s, n + 1, context, 2);
    const int unseen = window > 0 ? first - window + 1 : 0;
    Threads(2).run(2, [&](const Team& team) {
      for (int split = unseen / ATTENTION_SPLIT * ATTENTION_SPLIT; split < context; split += ATTENTION_SPLIT) {
        const PlainRows rows{k.data() + split * s.n_kv_heads * s.k_dim, v.data() + split * s.n_kv_heads * s.v_dim,
                             split, std::min(ATTENTION_SPLIT, context - split)};
        Flash::attend_rows(team, device_q.data(), rows, batch, 1, s, device_out.data(), scratch.workspace);
      }
    });
    std::vector<float> out = host_copy(device_out);
    for (int i = 0; i < out_width; i++) ASSERT_EQ(out[at(i)], -7) << "sequence 0 is not ours";
    out.erase(out.begin(), out.begin() + out_width);
    expect_same_bits(out, expected, "window " + std::to_string(window));
  }
}

// A token's infinite row is no fault of the tokens before it, in one chunk or not; and no number is undefined
// behaviour.
TYPED_TEST(SmallAttention, InfinitiesAndNaNHurtNobodyElse) {
  if (!takes<Flash, TypeParam>()) GTEST_SKIP() << "no flash for this type";
  Data d(make_shape(2, 1, 20, 20), {100, 70});
  const std::vector<float> expected = attention_of<Flash, TypeParam, 16>(d, {{0, 0, 100}, {1, 0, 70}}, 2);
  for (float bad : {INFINITY, NAN, 3e38f}) {
    for (int i = 0; i < 20; i++) d.k[0][at(90 * 20 + i)] = d.v[0][at(90 * 20 + i)] = bad;
    std::vector<float> out = attention_of<Flash, TypeParam, 16>(d, {{0, 0, 100}, {1, 0, 70}}, 2);
    const auto others = out.begin() + 100 * 40;
    expect_same_bits({others, out.end()}, {expected.begin() + 100 * 40, expected.end()}, "the other sequence");
    attention_of<Naive, TypeParam, 16>(d, {{0, 0, 100}}, 2);
  }
}

}  // namespace
