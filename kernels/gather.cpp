// gather.cpp: packs a rank's columns, sends them to all, and puts the columns of all where they belong.
#include "kernels/gather.h"

#include <algorithm>
#include <cstring>

#include "kernels/layers.h"

Gather::Gather(Arena& arena, Workspace& workspace, const Model& model, HeadRuns heads, const Limits& limits,
               Ranks* ranks)
    : part_(model.part), n_heads_(heads.n), ranks_(ranks) {
  if (part_.size == 1) return;
  const Config& c = model.config;
  const int T = limits.max_tokens;
  const int widest = std::max({heads.n * heads.width, c.hidden_dim, c.n_shared_experts * c.moe_intermediate_size});
  whole_ = arena.take<float>(area(T, widest));
  parts_ = arena.take<float>(std::max(area(T, std::max(widest, c.dim)), area(limits.max_logits, c.vocab_size)));
  tokens_ = arena.take<int>(area(T, 1));
  positions_ = arena.take<int>(area(T, 1));
  place_ = arena.take<int>(area(T, 1));
  workspace.plan(matmul_workspace_bytes(T, widest));
}

void Gather::columns(const Team& team, float* x, int rows, int width) const {
  if (part_.size > 1) exchange(team, x + part_.first(width), width, rows, width, 1, x);
}

const float* Gather::whole(const Team& team, const float* mine, int rows, int width) const {
  if (part_.size == 1) return mine;
  exchange(team, mine, part_.count(width), rows, width, 1, whole_);
  return whole_;
}

float* Gather::heads(const Team& team, float* mine, int rows, int width) const {
  if (part_.size == 1) return mine;
  const int unit = width / n_heads_;
  exchange(team, mine, part_.count(n_heads_) * unit, rows, n_heads_, unit, whole_);
  return whole_;
}

void Gather::own_heads(const Team& team, const float* all, int rows, int width, float* mine) const {
  const int unit = width / n_heads_, own = part_.count(n_heads_) * unit;
  copy_rows(team, all + part_.first(n_heads_) * unit, width, rows, own, 1, mine, own);
}

// Of n things of `unit` columns in each of the rows, from mine, whose rows are `stride` apart, to all [rows, n, unit].
void Gather::exchange(const Team& team, const float* mine, int stride, int rows, int n, int unit, float* all) const {
  const auto first = [&](int r) { return part_.edge(n, r) * unit; };
  const auto count = [&](int r) { return first(r + 1) - first(r); };
  std::vector<size_t> floats;
  for (int r = 0; r < part_.size; r++) floats.push_back(area(rows, count(r)));
  const int own = count(part_.rank);
  copy_rows(team, mine, stride, rows, own, 1, parts_ + area(rows, first(part_.rank)), own);
  meet(team, parts_, floats);
  for (int r = 0; r < part_.size; r++)
    if (all + first(r) != mine)  // or they are there already
      copy_rows(team, parts_ + area(rows, first(r)), count(r), rows, count(r), 1, all + first(r), n * unit);
}

void Gather::rows(const Team& team, float* x, const int* start, int n, int width) const {
  if (part_.size == 1) return;
  std::vector<size_t> floats;
  for (int r = 0; r < part_.size; r++)
    floats.push_back(area(start[part_.edge(n, r + 1)] - start[part_.edge(n, r)], width));
  meet(team, x, floats);
}

void Gather::embed(const Team& team, const Model& model, const Batch& batch, float* x) const {
  const Config& c = model.config;
  if (part_.size == 1) return ::embed(team, model.embed_tokens, model.position_embedding, batch, c.embedding_scale, x);
  Batch own = batch;
  own.n_tokens = 0, own.tokens = tokens_, own.positions = positions_;
  std::vector<size_t> floats;
  int row = 0, first_own = 0;
  for (int r = 0; r < part_.size; r++) {
    const int first = part_.edge(c.vocab_size, r), end = part_.edge(c.vocab_size, r + 1), before = row;
    if (r == part_.rank) first_own = row;
    for (int t = 0; t < batch.n_tokens; t++) {
      if (batch.tokens[t] < first || batch.tokens[t] >= end) continue;
      if (team.rank == 0) place_[t] = row;
      row++;
      if (r != part_.rank) continue;
      if (team.rank == 0)
        tokens_[own.n_tokens] = batch.tokens[t] - first, positions_[own.n_tokens] = batch.positions[t];
      own.n_tokens++;
    }
    floats.push_back(area(row - before, c.dim));
  }
  team.barrier();
  ::embed(team, model.embed_tokens, model.position_embedding, own, c.embedding_scale, parts_ + area(first_own, c.dim));
  meet(team, parts_, floats);
  team.for_each(batch.n_tokens, [&](int t) {
    std::memcpy(x + area(t, c.dim), parts_ + area(place_[t], c.dim), area(1, c.dim) * sizeof(float));
  });
}

// The one place in a step where bytes leave this process. all: floats[r] of each rank, one after the other.
void Gather::meet(const Team& team, float* all, const std::vector<size_t>& floats) const {
  if (team.rank == 0) {
    std::vector<size_t> bytes;
    for (const size_t n : floats) bytes.push_back(n * sizeof(float));
    ranks_->gather(all, bytes);
  }
  team.barrier();
}
