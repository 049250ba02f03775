// The parts of a prefill between cuBLAS's products: rows of float32 activations, rounded to LOW (half or bfloat16) where
// they enter a product. Each mirrors the function of engine/ops.py that it is named after.

#include <cuda_bf16.h>
#include "weights.cuh"

#ifndef LOW
#define LOW __half
#endif
__device__ __forceinline__ void put(__half* p, float x) { *p = __float2half_rn(x); }
__device__ __forceinline__ void put(__nv_bfloat16* p, float x) { *p = __float2bfloat16_rn(x); }
__device__ __forceinline__ void put(float* p, float x) { *p = x; }

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

// Bias and rotation of one projection's heads: x [T, heads · size], in place plus bias; rotated -> after [T, …].
extern "C" __global__ void rope(
        float* x, const float* bias, const float* cosine, const float* sine, int position, int heads, int size, int dims, int neox,
        float* after) {
    const int pairs = heads * size / 2, t = blockIdx.x;
    float* row = x + (long long)t * heads * size;
    float* out = after + (long long)t * heads * size;
    for (int p = threadIdx.x; p < pairs; p += blockDim.x) {
        int i = p % (size / 2), base = p / (size / 2) * size;
        bool turned = i < dims / 2;
        int first = base + (neox && turned ? i : 2 * i), second = neox && turned ? first + dims / 2 : first + 1;
        float a = row[first], b = row[second];
        if (bias) { row[first] = a = a + bias[first]; row[second] = b = b + bias[second]; }
        if (turned && dims) {
            float c = cosine[(long long)(position + t) * (dims / 2) + i], s = sine[(long long)(position + t) * (dims / 2) + i];
            out[first] = a * c - b * s;
            out[second] = a * s + b * c;
        } else { out[first] = a; out[second] = b; }
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

extern "C" __global__ void add(const float* x, const float* y, long long n, float* out) {
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n; i += (long long)gridDim.x * blockDim.x) out[i] = x[i] + y[i];
}

extern "C" __global__ void swiglu(const float* gate, const float* up, long long n, float* out, LOW* low) {
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n; i += (long long)gridDim.x * blockDim.x) {
        float y = gate[i] / (1.f + expf(-gate[i])) * up[i];
        out[i] = y;
        put(low + i, y);
    }
}
