// experts.h: a mixture of experts, apart from its products: which experts a token takes, the tokens sorted by expert,
// and the weighted sum of what comes out.
//
// Every thread of the team calls each function, and each ends with a barrier.
#pragma once

#include "kernels/team.h"
#include "model.h"

// Chooses experts for T tokens: scores [T, n_routed_experts] hold the router's logits and are overwritten;
// chosen and weights [T, num_experts_per_tok]; scratch [T, n_routed_experts + n_group]. Softmax or sigmoid scores; bias
// (may be null) counts for the choice alone; groups as in DeepSeek V2 (arXiv 2405.04434, 2.1.2: best expert) and V3
// (arXiv 2412.19437, 2.1.2: sum of the two best). Ties go to the lower index; a NaN score makes all weights NaN.
void route(const Team& team, const Config& config, const float* bias, int T, float* scores, int* chosen, float* weights,
           float* scratch);

// Sorts the T k choices by expert, each expert's in order of token: expert e has the rows row_start[e] ..
// row_start[e + 1] - 1 (row_start [n_experts + 1]); token_of_row [T k]; row_of_choice [T, k].
void sort_by_expert(const Team& team, const int* chosen, int T, int k, int n_experts, int* row_start, int* token_of_row,
                    int* row_of_choice);

// y [T, dim] = for each token the sum over its k choices of weights[choice] * rows[row_of_choice], in order of choice.
void add_experts(const Team& team, const float* rows, const int* row_of_choice, const float* weights, int T, int k,
                 int dim, float* y);
