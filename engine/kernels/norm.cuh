// The norms of a decode step.

#include "step.cuh"

// A norm whose scale is applied last: x = values · weight, padded, in shared memory, and the squares of the values. The products
// with x start from that; their sums are multiplied by 1 / sqrt(mean(values²) + eps) at the end, so that the products hide the
// latency of the sum of squares (in float64 as in ggml).
struct Norm {
    static constexpr int PER = INTEGERS ? 1 : 2, EACH = (D / PER + THREADS - 1) / THREADS;   // neighbours that a thread takes at once: integers' units are found faster one by one
    float weight[EACH][PER], x[EACH][PER];

    __device__ __forceinline__ static int element_of(int i) { return PER * (this_thread() + i * THREADS); }
    __device__ __forceinline__ void load(const float* weights) {
        #pragma unroll
        for (int i = 0; i < EACH; i++)
            #pragma unroll
            for (int j = 0; j < PER; j++) weight[i][j] = element_of(i) < D ? __ldg(weights + element_of(i) + j) : 0.f;
    }
    // The values come as words from the other blocks, or, where they are this block's own, from memory.
    __device__ __forceinline__ void run(Shared& s, const float* values, const Word* words, unsigned step) {
        double squares = 0;
        if (values)
            #pragma unroll
            for (int i = 0; i < EACH; i++)
                #pragma unroll
                for (int j = 0; j < PER; j++) x[i][j] = element_of(i) < D ? __ldcg(values + element_of(i) + j) : 0.f;
        else if constexpr (PER == 1) {
            float heard[EACH];
            hear([&](int i) { return element_of(i) < D ? words + element_of(i) : nullptr; }, step, heard);
            #pragma unroll
            for (int i = 0; i < EACH; i++) x[i][0] = heard[i];
        } else {
            float2 heard[EACH];
            hear_pairs([&](int i) { return element_of(i) < D ? words + element_of(i) : nullptr; }, step, heard);
            #pragma unroll
            for (int i = 0; i < EACH; i++) { x[i][0] = heard[i].x; x[i][1] = heard[i].y; }
        }
        #pragma unroll
        for (int i = 0; i < EACH; i++) {
            #pragma unroll
            for (int j = 0; j < PER; j++) {
                squares += (double)x[i][j] * x[i][j];
                x[i][j] *= weight[i][j];
            }
            if (element_of(i) < D) s.x.put<PER, D % (32 * PER) == 0>(element_of(i), x[i]);
        }
        s.squares[this_thread()] = squares;
        block_sync();
    }
    // By whole warps.
    static __device__ __forceinline__ float scale(const Shared& s, float eps) {
        double sum = 0;
        #pragma unroll 4
        for (int i = 0; i < WARPS; i++) sum += s.squares[(this_thread() & 31) + 32 * i];
        for (int far = 16; far; far >>= 1) sum += __shfl_xor_sync(~0u, sum, far);
        return rsqrtf((float)(sum * (1. / D)) + eps);
    }
    // The last warp, which has the fewest rows, finds the scale beside the products of the others.
    static __device__ __forceinline__ void find_scale(Shared& s, float eps) {
        if (this_thread() < THREADS - 32) return;
        const float found = scale(s, eps);
        if (this_thread() == THREADS - 1) s.scale = found;
    }
    // The normalised values, to be recorded: stored by one block, after what the others wait for.
    __device__ __forceinline__ void keep(float scale, float* out) const {
        if (this_block() != KEEPER) return;
        #pragma unroll
        for (int i = 0; i < EACH; i++)
            if (element_of(i) < D)
                #pragma unroll
                for (int j = 0; j < PER; j++) out[element_of(i) + j] = x[i][j] * scale;
    }
};
