// The norms of a decode step.

#include "step.cuh"

// The earlier keys and values of this block's shares of heads, on their way to the L2 cache: a step's weights have evicted them from there.
__device__ __noinline__ void ask_for_cache(const Layer& l, int seen, int splits) {
    #pragma unroll 1
    for (int u = this_block(); u < HEADS * splits; u += BLOCKS) {
        const int head = u / splits, split = u % splits, from = seen * split / splits, to = seen * (split + 1) / splits;
        #pragma unroll 1
        for (int p = from + (int)(this_thread() % 32); p < to; p += 32) {
            const long long at = (long long)p * KW + head / GROUP * HEAD;
            #pragma unroll
            for (int e = 0; e < HEAD; e += 32) {
                asm volatile("prefetch.global.L2 [%0];" :: "l"(l.k_cache + at + e));
                asm volatile("prefetch.global.L2 [%0];" :: "l"(l.v_cache + at + e));
            }
        }
    }
    __syncwarp();   // the lanes leave the loop apart, and the next barrier counts a warp once
}

// A norm whose scale is applied last: x = values · weight, padded, in shared memory, and the squares of the values. The products
// with x start from that; their sums are multiplied by 1 / sqrt(mean(values²) + eps) at the end, so that the products hide the
// latency of the sum of squares (in float64 as in ggml).
struct Norm {
    // PER neighbours at once, EACH times a thread. The unit of 32 integers is found faster by lanes that have one each (docs/benchmarks-log.md).
    static constexpr int PER = INTEGERS ? 1 : 2, EACH = (D / PER + THREADS - 1) / THREADS;
    float weight[EACH][PER], x[EACH][PER];

    __device__ __forceinline__ static int element_of(int i) { return PER * (this_thread() + i * THREADS); }
    __device__ __forceinline__ void load(const float* weights) {
        #pragma unroll
        for (int i = 0; i < EACH; i++)
            #pragma unroll
            for (int j = 0; j < PER; j++) weight[i][j] = element_of(i) < D ? __ldg(weights + element_of(i) + j) : 0.f;
    }
    // The values, to be used by `leave`: as words from the other blocks, or a token's row of the embedding.
    __device__ __forceinline__ void hear_values(const Word* words, unsigned step) {
        if constexpr (PER == 1) {
            float heard[EACH];
            hear([&](int i) { return element_of(i) < D ? words + element_of(i) : nullptr; }, step, heard);
            #pragma unroll
            for (int i = 0; i < EACH; i++) x[i][0] = heard[i];
        } else {
            float2 heard[EACH];
            hear_pairs<EACH, 0>([&](int i) { return element_of(i) < D ? words + element_of(i) : nullptr; }, step, heard);
            #pragma unroll
            for (int i = 0; i < EACH; i++) { x[i][0] = heard[i].x; x[i][1] = heard[i].y; }
        }
    }
    __device__ __forceinline__ void read_values(const Matrix& embedding, int token) {
        #pragma unroll
        for (int i = 0; i < EACH; i++)
            #pragma unroll
            for (int j = 0; j < PER; j++) x[i][j] = element_of(i) < D ? element(embedding, token, D, element_of(i) + j) : 0.f;
    }
    __device__ __forceinline__ void leave(Shared& s) {
        double squares = 0;
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
        sync_squares();
    }
    __device__ __forceinline__ void run(Shared& s, const Word* words, unsigned step) {
        hear_values(words, step);
        leave(s);
    }
    // By a warp beside those that compute, while they multiply: the scale of each of a step's norms. Then it asks for what attention will read.
    static __device__ __forceinline__ void find_scales(Shared& s, float eps, int seen, int splits) {
        static_assert(WARPS == 16, "four levels");
        #pragma unroll 1
        for (int norm = 0; norm <= 2 * LAYERS; norm++) {
            sync_squares();
            double sums[WARPS];
            #pragma unroll
            for (int i = 0; i < WARPS; i++) sums[i] = s.squares[(this_thread() & 31) + 32 * i];
            #pragma unroll
            for (int i = 0; i < 8; i++) sums[i] += sums[i + 8];
            #pragma unroll
            for (int i = 0; i < 4; i++) sums[i] += sums[i + 4];
            double sum = (sums[0] + sums[2]) + (sums[1] + sums[3]);
            for (int far = 16; far; far >>= 1) sum += __shfl_xor_sync(~0u, sum, far);
            const float scale = rsqrtf((float)(sum * (1. / D)) + eps);
            if (this_thread() % 32 == 0) s.scale = scale;
            sync_scale();
            if (norm % 2 && norm + 1 < 2 * LAYERS) ask_for_cache(s.layer[(norm + 1) / 2 & 1], seen, splits);   // for the next layer
        }
    }
    // The normalised values, to be recorded: stored by one block, after what the others wait for. Before `leave`: the values themselves.
    __device__ __forceinline__ void keep(float scale, float* out) const {
        if (this_block() != KEEPER) return;
        #pragma unroll
        for (int i = 0; i < EACH; i++)
            if (element_of(i) < D)
                #pragma unroll
                for (int j = 0; j < PER; j++) out[element_of(i) + j] = x[i][j] * scale;
    }
};
