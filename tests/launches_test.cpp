// How many kernels a decode step launches: each costs a GPU about a microsecond, which is of the order of their work.
#include <gtest/gtest.h>

#include "batches.h"
#include "kernels/gpu.h"
#include "tiny_model.h"
#include "transformer.h"

namespace {

constexpr int CONTEXT = 300;  // more than a split of attention

// Of a step in which n_sequences sequences have a token each.
template <class Attention>
int launches_of_a_step(const TinyModel& tiny, int n_sequences) {
  const Model model = load(tiny);
  Batches batches(n_sequences, CONTEXT, 16);
  const Limits limits{n_sequences, n_sequences, n_sequences, CONTEXT, batches.n_blocks(), 1};
  Transformer<Attention, Flash, KvF16, 16> transformer(model, limits);
  std::vector<Piece> pieces;
  for (int s = 0; s < n_sequences; s++) pieces.push_back({s, 0, 1});
  const std::vector<std::vector<int>> tokens(static_cast<size_t>(n_sequences), {7});
  const int before = emulation::launches();
  transformer.forward(batches.batch(pieces, tokens), test_threads(), 1);
  return emulation::launches() - before;
}

// A model of one layer, which may have norms after its stages too.
TinyModel one_layer(const std::string& variant, bool post_norms) {
  TinyModel m = tiny_model(variant, false, 1);
  std::erase_if(m.tensors, [](const auto& tensor) { return tensor.first.starts_with("layers.1."); });
  m.set({{"n_layers", 1}, {"window", Json::Array{0}}, {"rope", Json::Array{0}}});
  for (const char* norm : {"attention_post_norm", "mlp_post_norm"})
    if (post_norms) m.add(std::string("layers.0.") + norm + ".weight", {tiny::dim}, 0.2f, 1);
  return m;
}

// The second layer of two, a dense one or one of experts.
template <class Attention>
int launches_of_a_layer(bool experts, int n_sequences) {
  const std::string variant = Attention::name;
  return launches_of_a_step<Attention>(tiny_model(variant, experts, 1), n_sequences) -
         launches_of_a_step<Attention>(one_layer(variant, false), n_sequences);
}

TEST(Launches, OfALayer) {
  for (const int n_sequences : {1, 8}) {
    EXPECT_EQ(launches_of_a_layer<Mha>(false, n_sequences), 8);
    EXPECT_EQ(launches_of_a_layer<Mqa>(false, n_sequences), 8);
    EXPECT_EQ(launches_of_a_layer<Gqa>(false, n_sequences), 8);
    EXPECT_EQ(launches_of_a_layer<Mla>(false, n_sequences), 13);  // of which its queries' own latents take two
    // The shared expert takes two; the experts' rows, two for each token, two more where they are many.
    EXPECT_EQ(launches_of_a_layer<Gqa>(true, n_sequences), n_sequences == 1 ? 14 : 16);
  }
}

TEST(Launches, NormsBehindTheStagesTakeNone) {
  EXPECT_EQ(launches_of_a_step<Gqa>(one_layer("gqa", true), 1), launches_of_a_step<Gqa>(one_layer("gqa", false), 1));
}

TEST(Launches, OutsideTheLayers) {
  // Embedding, angles, the first norm, the classifier.
  EXPECT_EQ(launches_of_a_step<Gqa>(one_layer("gqa", false), 1) - launches_of_a_layer<Gqa>(false, 1), 4);
}

}  // namespace
