// gather.h: where ranks meet in a step: what each has computed for itself becomes whole on all of them.
//
// A layer does so four times: with the heads' results and with the MLP's hidden row, which the next product reads
// whole, and with the columns that these two products add to x. Of experts their outputs meet instead of a hidden row.
// A step does so at its embedding and at its logits as well. With one rank nothing happens and no memory is taken.
#pragma once

#include "kernels/batch.h"
#include "kernels/ranks.h"
#include "kernels/team.h"
#include "model.h"

// A token's attention result, whose heads are cut over the ranks: n runs of `width` elements.
struct HeadRuns {
  int n = 0, width = 0;
};

class Gather {
 public:
  Gather() = default;  // of a model that is whole
  // ranks may be null where it is.
  Gather(Arena& arena, Workspace& workspace, const Model& model, HeadRuns heads, const Limits& limits, Ranks* ranks);

  const Part& part() const { return part_; }

  // Every thread of the team calls these, and they end with a barrier.

  // x [rows, width], of which each rank has its columns: Part's of `width`.
  void columns(const Team& team, float* x, int rows, int width) const;
  // mine [rows, own of `width`]: its columns alone. Returns [rows, width], until the next call.
  const float* whole(const Team& team, const float* mine, int rows, int width) const;
  // The same of this rank's heads: `width` is that of all heads. It may be changed; own_heads copies them back.
  float* heads(const Team& team, float* mine, int rows, int width) const;
  void own_heads(const Team& team, const float* all, int rows, int width, float* mine) const;
  // x [start[n], width]: the rows start[i] .. start[i + 1] - 1 belong to thing i of n.
  void rows(const Team& team, float* x, const int* start, int n, int width) const;
  // x [T, dim]: the embeddings of the batch's tokens, whose rows in the matrix are cut over the ranks.
  void embed(const Team& team, const Model& model, const Batch& batch, float* x) const;

 private:
  void exchange(const Team& team, const float* mine, int stride, int rows, int n, int unit, float* all) const;
  void meet(const Team& team, float* all, const std::vector<size_t>& floats) const;

  Part part_;
  int n_heads_ = 0;  // runs of them
  Ranks* ranks_ = nullptr;
  float* parts_ = nullptr;                        // what is on its way: rank 0's part, rank 1's ...
  float* whole_ = nullptr;                        // [T, widest input that is gathered]
  int *tokens_ = nullptr, *positions_ = nullptr;  // [T] of the tokens whose embeddings this rank has
  int* place_ = nullptr;                          // [T] row of parts_ with the token's embedding
};
