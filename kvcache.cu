// kvcache.cu: the cache on a GPU: the kernel that writes it, and the readers that are not in a hurry. A warp has a row.
#include "kvcache.h"

#include "kernels/build.h"
#include "kernels/kv_gpu.h"
#include "kernels/norm_gpu.h"

static constexpr int WARP = 32;

template <class Kv, int Block>
size_t KVCache<Kv, Block>::block_bytes(const CacheShape& shape) {
  return HeadRows<Kv, Block>::block_bytes(shape);
}

// --- writing ---------------------------------------------------------------------------------------------------------

// The largest of the warp's 32 numbers, none of them NaN.
static __device__ float largest_of_warp(float x) {
  for (int by = WARP / 2; by > 0; by /= 2) x = fmaxf(x, __shfl_xor_sync(WHOLE_WARP, x, by));
  return x;
}

// x [dim] becomes a row; elements from dim up to whole chunks are zeros. Returns whether a finite number of this lane's
// was too large. q8: a step of the loop is a group, and a lane has one of its elements.
template <class Kv>
static __device__ bool store_row(const float* x, int dim, std::byte* row, std::byte* scales) {
  using Element = typename Codec<Kv>::Element;
  static_assert(WARP == KvQ8::QUANT_GROUP);
  const int lane = static_cast<int>(threadIdx.x);
  const int n = static_cast<int>(whole_chunks(static_cast<size_t>(dim) * sizeof(Element)) / sizeof(Element));
  bool too_large = false;
  for (int first = 0; first < n; first += WARP) {
    const int i = first + lane;
    const float number = i < dim ? x[i] : 0, magnitude = fabsf(number);
    too_large |= magnitude > Kv::largest && magnitude <= FLOAT_MAX;
    if constexpr (std::is_same_v<Kv, KvQ8>) {
      // A NaN counts as infinite: fmaxf would pass it over.
      const float amax = largest_of_warp(magnitude <= FLOAT_MAX ? magnitude : INFINITY);
      const uint16_t scale = Codec<Kv>::scale(amax);
      const float inverse = scale == 0 ? 0 : 1 / f16_to_float(scale);
      if (lane == 0 && first < dim) reinterpret_cast<uint16_t*>(scales)[first / WARP] = scale;
      if (i < n) reinterpret_cast<Element*>(row)[i] = Codec<Kv>::narrow(number, inverse);
    } else {
      if (i < n) reinterpret_cast<Element*>(row)[i] = Codec<Kv>::narrow(number);
    }
  }
  return too_large;
}

// A head of a token, by a warp, all of whose lanes see it afterwards (RoFormer, arXiv 2104.09864, equation 34).
static __device__ void turn_head(const Turn& turn, const Heads& heads, int token, int head) {
  float* x =
      heads.x + static_cast<ptrdiff_t>(token) * heads.x_stride + static_cast<ptrdiff_t>(head) * heads.head_stride;
  const Normed normed(turn.kind, turn.eps, heads.norm, x, heads.norm.n, nullptr);
  for (int i = lane_id(); i < heads.norm.n; i += WARP) x[i] = normed(x, i);
  __syncwarp();
  const int n = turn.n_angles;
  const float *cos = turn.cos + static_cast<ptrdiff_t>(token) * n, *sin = turn.sin + static_cast<ptrdiff_t>(token) * n;
  float *a = x + heads.rotated, *b = a + n;
  for (int i = lane_id(); i < n; i += WARP) {
    const float rotated = a[i] * cos[i] - b[i] * sin[i];
    b[i] = b[i] * cos[i] + a[i] * sin[i];
    a[i] = rotated;
  }
  __syncwarp();
}

// grid: tokens, query heads and then KV heads. k [T, n_kv_heads, k_dim], v [T, n_kv_heads, v_dim].
template <class Kv, int Block>
__global__ void __launch_bounds__(WARP) append_rows(CacheView<Kv, Block> view, int layer, const int* slot_mapping,
                                                    Turn turn, const float* k, const float* v, int* overflowed) {
  const int token = static_cast<int>(blockIdx.x), head = static_cast<int>(blockIdx.y) - turn.q.n;
  if (head < 0) return turn_head(turn, turn.q, token, static_cast<int>(blockIdx.y));
  if (turn.k.x) turn_head(turn, turn.k, token, head);
  const int block = slot_mapping[token] / view.block_size(), slot = slot_mapping[token] % view.block_size();
  const int k_dim = view.shape.k_dim, v_dim = view.shape.v_dim;
  const HeadRows<Kv, Block> rows(view, layer, head);
  const size_t from =
      static_cast<size_t>(token) * static_cast<size_t>(view.shape.n_kv_heads) + static_cast<size_t>(head);
  bool too_large =
      store_row<Kv>(k + from * static_cast<size_t>(k_dim), k_dim, rows.k(block, slot), rows.k_scales(block, slot));
  if (v_dim > 0)
    too_large |=
        store_row<Kv>(v + from * static_cast<size_t>(v_dim), v_dim, rows.v(block, slot), rows.v_scales(block, slot));
  if (too_large) atomicExch(overflowed, 1);
}

template <class Kv, int Block>
void KVCache<Kv, Block>::append(const Team& team, int layer, const Batch& batch, const Turn& turn, const float* k,
                                const float* v) {
  const dim3 grid(static_cast<unsigned>(batch.n_tokens), static_cast<unsigned>(turn.q.n + shape().n_kv_heads));
  launch(team, append_rows<Kv, Block>, grid, WARP, 0, view_, layer, batch.slot_mapping, turn, k, v, overflowed_);
}

template <class Kv, int Block>
bool KVCache<Kv, Block>::overflowed() const {
  int flag = 0;
  download(&flag, overflowed_, sizeof flag);
  return flag != 0;
}

// grid: copies, KV heads, layers
template <class Kv, int Block>
__global__ void copy_whole_blocks(CacheView<Kv, Block> view, const int* copy_from, const int* copy_to) {
  const int head = static_cast<int>(blockIdx.y), layer = static_cast<int>(blockIdx.z);
  const std::byte* from = view.block(layer, copy_from[blockIdx.x], head);
  std::byte* to = view.block(layer, copy_to[blockIdx.x], head);
  for (size_t i = threadIdx.x * CHUNK; i < view.block_bytes; i += blockDim.x * CHUNK)
    store_vector(to + i, load_vector<uint4>(from + i));
}

template <class Kv, int Block>
void KVCache<Kv, Block>::copy_blocks(const Team& team, const Batch& batch) {
  const dim3 grid(static_cast<unsigned>(batch.n_copies), static_cast<unsigned>(shape().n_kv_heads),
                  static_cast<unsigned>(shape().n_layers));
  launch(team, copy_whole_blocks<Kv, Block>, grid, 128, 0, view_, batch.copy_from, batch.copy_to);
}

// --- reading ---------------------------------------------------------------------------------------------------------

// Row blockIdx.x of out [rows, n] is the first n elements of the K (or V) row at position first + blockIdx.x of a
// sequence with this table; without a table, of the cache's slot of that number.
template <class Kv, int Block>
__global__ void __launch_bounds__(WARP) read_rows(CacheView<Kv, Block> view, int layer, int kv_head, bool of_v,
                                                  const int* table, int first, int n, float* out) {
  const int position = first + static_cast<int>(blockIdx.x), slot = position % view.block_size();
  const int block = table ? table[position / view.block_size()] : position / view.block_size();
  const HeadRows<Kv, Block> rows(view, layer, kv_head);
  const std::byte* row = of_v ? rows.v(block, slot) : rows.k(block, slot);
  const std::byte* scales = of_v ? rows.v_scales(block, slot) : rows.k_scales(block, slot);
  for (int i = static_cast<int>(threadIdx.x); i < n; i += WARP)
    out[static_cast<size_t>(blockIdx.x) * static_cast<size_t>(n) + static_cast<size_t>(i)] =
        load_element<Kv>(row, scales, i);
}

template <class Kv, int Block>
void KVCache<Kv, Block>::read_k(const Team& team, int layer, const Batch& batch, int s, int first, int n,
                                float* out) const {
  const int* table = batch.block_table + static_cast<size_t>(s) * static_cast<size_t>(batch.max_blocks);
  launch(team, read_rows<Kv, Block>, static_cast<unsigned>(n), WARP, 0, view_, layer, 0, false, table, first,
         shape().k_dim, out);
}

template <class Kv, int Block>
static void load_row(const CacheView<Kv, Block>& view, int layer, int block, int kv_head, int slot, bool of_v, int n,
                     float* out) {
  Buffer<float> row(static_cast<size_t>(n));
  launch(Team{}, read_rows<Kv, Block>, 1, WARP, 0, view, layer, kv_head, of_v, nullptr,
         block * view.block_size() + slot, n, row.data());
  download(out, row.data(), row.size() * sizeof(float));
}

template <class Kv, int Block>
void KVCache<Kv, Block>::load_k(int layer, int block, int kv_head, int slot, float* out) const {
  load_row(view_, layer, block, kv_head, slot, false, shape().k_dim, out);
}

template <class Kv, int Block>
void KVCache<Kv, Block>::load_v(int layer, int block, int kv_head, int slot, int n, float* out) const {
  load_row(view_, layer, block, kv_head, slot, shape().v_dim > 0, n, out);
}

#define INSTANTIATE(Kv, Block) template class KVCache<Kv, Block>;
FOR_EACH_CACHE(INSTANTIATE)
