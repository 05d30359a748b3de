// experts.cu: routing of a mixture of experts on a GPU: a warp chooses for a token, a block sorts all choices.
#include "kernels/experts.h"

#include <cfloat>

#include "kernels/gpu.h"

namespace {

constexpr int WARP = 32;

__device__ int own_lane() {
  return static_cast<int>(threadIdx.x) % WARP;
}

struct Best {
  float value;
  int index;
};

// The larger one; of equal ones the one with the lower index.
__device__ Best better(const Best& a, const Best& b) {
  return b.value > a.value || (b.value == a.value && b.index < a.index) ? b : a;
}

// The best of values [n], to every lane; no value is NaN.
__device__ Best best_of(const float* values, int n) {
  Best best{-INFINITY, n};
  for (int i = own_lane(); i < n; i += WARP) best = better(best, {values[i], i});
  for (int by = WARP / 2; by > 0; by /= 2)
    best = better(best, {__shfl_xor_sync(WHOLE_WARP, best.value, by), __shfl_xor_sync(WHOLE_WARP, best.index, by)});
  return best;
}

// Logits become scores.
__device__ void score(Scoring kind, float* scores, int n) {
  if (kind == Scoring::sigmoid) {
    for (int e = own_lane(); e < n; e += WARP) scores[e] = 1 / (1 + expf(-scores[e]));
    return;
  }
  float largest = -FLT_MAX, total = 0;
  for (int e = own_lane(); e < n; e += WARP) largest = fmaxf(largest, scores[e]);
  for (int by = WARP / 2; by > 0; by /= 2) largest = fmaxf(largest, __shfl_xor_sync(WHOLE_WARP, largest, by));
  for (int e = own_lane(); e < n; e += WARP) total += scores[e] = expf(scores[e] - largest);
  for (int by = WARP / 2; by > 0; by /= 2) total += __shfl_xor_sync(WHOLE_WARP, total, by);
  for (int e = own_lane(); e < n; e += WARP) scores[e] /= total;
}

// What a group is worth: its best score, or the sum of its two best.
__device__ float group_worth(GroupScore kind, const float* scores, int n) {
  float best = -INFINITY, second = -INFINITY;
  for (int i = 0; i < n; i++) {
    const float score = scores[i];
    second = fmaxf(second, fminf(best, score));
    best = fmaxf(best, score);
  }
  return kind == GroupScore::max ? best : best + second;
}

struct Routing {
  int n_experts, k, n_group, topk_group;
  Scoring scoring;
  GroupScore group_score;
  bool norm_topk_prob;
  float factor;
};

// Scores of experts outside the topk_group best groups become -infinity; worth [n_group] is scratch.
__device__ void limit_groups(const Routing& r, float* scores, float* worth) {
  const int size = r.n_experts / r.n_group;
  for (int g = own_lane(); g < r.n_group; g += WARP) worth[g] = group_worth(r.group_score, scores + g * size, size);
  __syncwarp();
  for (int g = own_lane(); g < r.n_group; g += WARP) {
    int better = 0;
    for (int other = 0; other < r.n_group; other++)
      better += worth[other] > worth[g] || (worth[other] == worth[g] && other < g);
    for (int e = g * size; better >= r.topk_group && e < (g + 1) * size; e++) scores[e] = -INFINITY;
  }
  __syncwarp();
}

// grid: tokens; a warp. choice [n_experts + n_group] is scratch.
__global__ void __launch_bounds__(WARP)
    route_token(Routing r, const float* bias, float* scores, int* chosen, float* weights, float* scratch) {
  const size_t token = blockIdx.x, E = static_cast<size_t>(r.n_experts), k = static_cast<size_t>(r.k);
  scores += token * E, chosen += token * k, weights += token * k;
  float* choice = scratch + token * (E + static_cast<size_t>(r.n_group));
  score(r.scoring, scores, r.n_experts);
  bool bad = false;
  for (int e = own_lane(); e < r.n_experts; e += WARP) {
    choice[e] = scores[e] + (bias ? bias[e] : 0);
    bad |= choice[e] != choice[e];  // NaN
  }
  __syncwarp();
  // Compared, NaN is never the largest: its expert would be passed over in silence instead of reaching the logits.
  if (__ballot_sync(WHOLE_WARP, bad)) {
    for (int j = own_lane(); j < r.k; j += WARP) chosen[j] = j, weights[j] = NAN;
    return;
  }
  if (r.topk_group < r.n_group) limit_groups(r, choice, choice + E);
  float total = 0;
  for (int j = 0; j < r.k; j++) {
    const Best best = best_of(choice, r.n_experts);
    total += scores[best.index];
    __syncwarp();  // all have read
    if (own_lane() == 0) chosen[j] = best.index, choice[best.index] = -INFINITY;
    __syncwarp();
  }
  const float factor = r.factor / (r.norm_topk_prob ? total + 1e-20f : 1);
  for (int j = own_lane(); j < r.k; j += WARP) weights[j] = scores[chosen[j]] * factor;
}

constexpr int SORT_THREADS = 256;

// One block; a thread has an expert at a time, and finds its choices in order.
__global__ void __launch_bounds__(SORT_THREADS) sort_choices(const int* chosen, int n_choices, int k, int n_experts,
                                                             int* row_start, int* token_of_row, int* row_of_choice) {
  for (int e = static_cast<int>(threadIdx.x); e < n_experts; e += SORT_THREADS) {
    int before = 0;
    for (int i = 0; i < n_choices; i++) before += chosen[i] < e;
    row_start[e] = before;
    for (int i = 0, row = before; i < n_choices; i++) {
      if (chosen[i] != e) continue;
      row_of_choice[i] = row;
      token_of_row[row++] = i / k;
    }
  }
  if (threadIdx.x == 0) row_start[n_experts] = n_choices;
}

// grid: tokens
__global__ void add_rows(const float* rows, const int* row_of_choice, const float* weights, int k, int dim, float* y) {
  const size_t token = blockIdx.x, width = static_cast<size_t>(dim);
  for (int i = static_cast<int>(threadIdx.x); i < dim; i += static_cast<int>(blockDim.x)) {
    float sum = 0;
    for (size_t choice = token * static_cast<size_t>(k); choice < (token + 1) * static_cast<size_t>(k); choice++)
      sum += weights[choice] * rows[static_cast<size_t>(row_of_choice[choice]) * width + static_cast<size_t>(i)];
    y[token * width + static_cast<size_t>(i)] = sum;
  }
}

}  // namespace

void route(const Team& team, const Config& c, const float* bias, int T, float* scores, int* chosen, float* weights,
           float* scratch) {
  const Routing routing{c.n_routed_experts, c.num_experts_per_tok, c.n_group,        c.topk_group,
                        c.scoring_func,     c.group_score,         c.norm_topk_prob, c.routed_scaling_factor};
  launch(team, route_token, static_cast<unsigned>(T), WARP, 0, routing, bias, scores, chosen, weights, scratch);
}

void sort_by_expert(const Team& team, const int* chosen, int T, int k, int n_experts, int* row_start, int* token_of_row,
                    int* row_of_choice) {
  launch(team, sort_choices, 1, SORT_THREADS, 0, chosen, T * k, k, n_experts, row_start, token_of_row, row_of_choice);
}

void add_experts(const Team& team, const float* rows, const int* row_of_choice, const float* weights, int T, int k,
                 int dim, float* y) {
  launch(team, add_rows, static_cast<unsigned>(T), 256, 0, rows, row_of_choice, weights, k, dim, y);
}
