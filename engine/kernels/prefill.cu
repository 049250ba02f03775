// The parts of a prefill between cuBLAS's products: rows of float32 activations, rounded to LOW (half or bfloat16) where
// they enter a product. Each mirrors the function of engine/ops.py that it is named after.

#include <cuda_bf16.h>
#include "weights.cuh"

#ifndef LOW
#define LOW __half
#endif
__device__ __forceinline__ void put(__half* p, float x) { *p = __float2half_rn(x); }
__device__ __forceinline__ void put(__nv_bfloat16* p, float x) { *p = __float2bfloat16_rn(x); }

extern "C" __global__ void get_rows(Matrix m, const int* ids, int cols, float* out) {
    for (int e = threadIdx.x; e < cols; e += blockDim.x) out[(long long)blockIdx.x * cols + e] = element(m, ids[blockIdx.x], cols, e);
}

// A whole matrix in the type that products take.
extern "C" __global__ void unpack(Matrix m, int cols, LOW* out) {
    for (int e = threadIdx.x; e < cols; e += blockDim.x) put(out + (long long)blockIdx.x * cols + e, element(m, blockIdx.x, cols, e));
}

// sum = made + bias + residual (with a residual), then sum / sqrt(mean(sum²) + eps) · weight; one block of 256 a row.
extern "C" __global__ void __launch_bounds__(256) add_norm(
        float* made, const float* bias, const float* residual, float* sum, const float* weight, float eps, int n, float* out, LOW* low) {
    __shared__ double parts[8];
    extern __shared__ float row[];
    const long long base = (long long)blockIdx.x * n;
    double squares = 0;
    for (int e = threadIdx.x; e < n; e += 256) {
        float x = made[base + e];
        if (bias) made[base + e] = x = x + bias[e];
        if (residual) sum[base + e] = x = x + residual[base + e];
        row[e] = x;
        squares += (double)x * x;
    }
    for (int step = 16; step; step >>= 1) squares += __shfl_xor_sync(~0u, squares, step);
    if ((threadIdx.x & 31) == 0) parts[threadIdx.x >> 5] = squares;
    __syncthreads();
    squares = 0;
    for (int w = 0; w < 8; w++) squares += parts[w];
    const float scale = 1.f / sqrtf((float)(squares / n) + eps);
    for (int e = threadIdx.x; e < n; e += 256) {
        float y = row[e] * scale * weight[e];
        out[base + e] = y;
        put(low + base + e, y);
    }
}

// Q, K and V of one product [T, (heads + 2 kv_heads) · size]: biases added, Q and K rotated; K and V into their cache rows.
extern "C" __global__ void project(
        const float* made, const float* q_bias, const float* k_bias, const float* v_bias, const float* cosine, const float* sine,
        int position, int heads, int kv_heads, int size, int dims, int neox,
        float* q, float* k, float* q_rope, float* k_cache, float* v_cache) {
    const int t = blockIdx.x, half = size / 2, all = heads + 2 * kv_heads;
    for (int p = threadIdx.x; p < all * half; p += blockDim.x) {
        const int head = p / half, i = p % half;
        const bool query = head < heads, key = !query && head < heads + kv_heads, turned = (query || key) && i < dims / 2;
        const int first = neox && turned ? i : 2 * i, second = neox && turned ? first + dims / 2 : first + 1;
        const int own = query ? head : key ? head - heads : head - heads - kv_heads, base = own * size;
        const long long row = (long long)t * (query ? heads : kv_heads) * size + base;
        const long long cached = (long long)(position + t) * kv_heads * size + base;
        const float* bias = query ? q_bias : key ? k_bias : v_bias;
        const float* from = made + ((long long)t * all + head) * size;
        float a = from[first], b = from[second];
        if (bias) { a += bias[base + first]; b += bias[base + second]; }
        if (query || key) {
            float* before = (query ? q : k) + row;
            before[first] = a;
            before[second] = b;
        }
        if (turned) {
            const long long at = (long long)(position + t) * (dims / 2) + i;
            const float c = cosine[at], s = sine[at], x = a;
            a = x * c - b * s;
            b = x * s + b * c;
        }
        float* after = query ? q_rope + row : (key ? k_cache : v_cache) + cached;
        after[first] = a;
        after[second] = b;
    }
}

// softmax(scores · scale) over the keys at or before each query; one block of 256 for each row [heads · T] of S.
extern "C" __global__ void __launch_bounds__(256) soft_max(const float* scores, int T, int S, int position, float scale, float* weights) {
    __shared__ float parts[8];
    __shared__ double sums[8];
    const long long base = (long long)blockIdx.x * S;
    const int seen = position + blockIdx.x % T + 1;
    float peak = -INFINITY;
    for (int s = threadIdx.x; s < seen; s += 256) peak = fmaxf(peak, scores[base + s] * scale);
    for (int step = 16; step; step >>= 1) peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, step));
    if ((threadIdx.x & 31) == 0) parts[threadIdx.x >> 5] = peak;
    __syncthreads();
    for (int w = 0; w < 8; w++) peak = fmaxf(peak, parts[w]);
    double total = 0;
    for (int s = threadIdx.x; s < seen; s += 256) {
        float w = expf(scores[base + s] * scale - peak);
        weights[base + s] = w;
        total += w;
    }
    for (int step = 16; step; step >>= 1) total += __shfl_xor_sync(~0u, total, step);
    if ((threadIdx.x & 31) == 0) sums[threadIdx.x >> 5] = total;
    __syncthreads();
    total = 0;
    for (int w = 0; w < 8; w++) total += sums[w];
    const float share = (float)(1. / total);
    for (int s = threadIdx.x; s < S; s += 256) weights[base + s] = s < seen ? weights[base + s] * share : 0.f;
}

extern "C" __global__ void lower(const float* x, long long n, LOW* out) {
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n; i += (long long)gridDim.x * blockDim.x) put(out + i, x[i]);
}

extern "C" __global__ void add_bias(float* x, const float* bias, int n) {
    for (int e = threadIdx.x; e < n; e += blockDim.x) x[(long long)blockIdx.x * n + e] += bias[e];
}

extern "C" __global__ void swiglu(const float* gate, const float* up, long long n, float* out, LOW* low) {
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n; i += (long long)gridDim.x * blockDim.x) {
        float y = gate[i] / (1.f + expf(-gate[i])) * up[i];
        out[i] = y;
        put(low + i, y);
    }
}
