// The norms of a decode step.

#include "step.cuh"

// A norm whose scale is applied last: x = values · weight, padded, in shared memory, and the squares of the values. The products
// with x start from that; their sums are multiplied by 1 / sqrt(mean(values²) + eps) at the end, so that the products hide the
// latency of the sum of squares (in float64 as in ggml).
struct Norm {
    static constexpr int EACH = (D + THREADS - 1) / THREADS;
    float weight[EACH], x[EACH];

    __device__ __forceinline__ void load(const float* weights) {
        #pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int e = this_thread() + i * THREADS;
            weight[i] = e < D ? __ldg(weights + e) : 0.f;
        }
    }
    // The values come as words from the other blocks, or, where they are this block's own, from memory.
    __device__ __forceinline__ void run(Shared& s, const float* values, const Word* words, unsigned step) {
        float v[EACH];
        double squares = 0;
        if (values)
            #pragma unroll
            for (int i = 0; i < EACH; i++) v[i] = this_thread() + i * THREADS < D ? __ldcg(values + this_thread() + i * THREADS) : 0.f;
        else hear([&](int i) { return this_thread() + i * THREADS < D ? words + this_thread() + i * THREADS : nullptr; }, step, v);
        #pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int e = this_thread() + i * THREADS;
            x[i] = v[i] * weight[i];
            if (e < D) s.x.put<1, true>(e, {x[i]});   // D is a multiple of 32
            squares += (double)v[i] * v[i];
        }
        for (int far = 16; far; far >>= 1) squares += __shfl_xor_sync(~0u, squares, far);
        if ((this_thread() & 31) == 0) s.norm[this_thread() >> 5] = squares;
        block_sync();
    }
    // By whole warps.
    static __device__ __forceinline__ float scale(const Shared& s, float eps) {
        double squares = s.norm[this_thread() & (WARPS - 1)];
        for (int far = WARPS / 2; far; far >>= 1) squares += __shfl_xor_sync(~0u, squares, far);
        return rsqrtf((float)(squares * (1. / D)) + eps);
    }
    // The normalised values, to be recorded: stored by one block, after what the others wait for.
    __device__ __forceinline__ void keep(const Shared& s, float eps, float* out) const {
        if (blockIdx.x) return;
        const float scale = Norm::scale(s, eps);
        #pragma unroll
        for (int i = 0; i < EACH; i++) if (this_thread() + i * THREADS < D) out[this_thread() + i * THREADS] = x[i] * scale;
    }
};
