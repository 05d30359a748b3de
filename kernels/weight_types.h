// weight_types.h: the weight types of matmul, one struct each: what the file holds, how it is packed, how it
// multiplies.
//
// To add a type of ggml's, describe its blocks in ggml_blocks.h. To add another, write its struct:
//
//   NAME                   in the model file's "types" and in reports
//   BLOCK                  inputs of a row that are stored together; 1: plain floats
//   DTYPE, BLOCK_ELEMENTS  its tensor in the file, [n, k / BLOCK * BLOCK_ELEMENTS]
//   STEP, STEP_BYTES       the packed panel is a sequence of steps of STEP inputs
//   Input, ROWS            the activations it multiplies; rows of a register tile
//   pack(source, transposed, panel, out)  fills a panel of zeros; false: a scale is no finite number
//   unpack(panel, row, k, out)            row `row` of a panel as float32
//   multiply<R>(panel, k, x, acc)         acc[r][v] = the products of row x[r] with vector v of the panel's outputs.
//                                         Per row and output the additions are in the order of k, whatever R is.
//   WORTH_EXPANDING        for many rows; then Unit, a loop Expanded over units, and
//   expand(packed, k, units)              k inputs of a panel; the loop's sums are the same bits as multiply's
#pragma once

#include "kernels/weights_float.h"
#include "kernels/weights_quant.h"

#include "kernels/weight_list.h"
