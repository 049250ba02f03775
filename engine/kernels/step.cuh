// What the phases of a decode step share: the model's structures, a block's shared memory, its share of the rows.

#include "weights.cuh"

#define THREADS 512              // that compute; one more warp brings weights near
#define WARPS (THREADS / 32)
#define QW (HEADS * HEAD)
#define KW (KV_HEADS * HEAD)
#define GROUP (HEADS / KV_HEADS)
#define LOGITS_AHEAD 128         // rows of the output matrix that a block asks for during the last layer's end
#define SPLIT_ROWS 64            // positions a block attends to before a head is split over several blocks

// A barrier of the computing warps only.
__device__ __forceinline__ void block_sync() { asm volatile("bar.sync 1, %0;" :: "n"(THREADS) : "memory"); }

struct Layer {
    Matrix q, k, v, o, gate, up, down;
    const float *attn_norm, *ffn_norm;
    // what the step makes, each with a place of its own
    float *attn_norm_out, *q_out, *k_out, *v_out, *q_rope, *k_cache, *v_cache, *kq, *peaks, *kqv_out, *attn_out, *ffn_inp;
    float *ffn_norm_out, *gate_out, *up_out, *swiglu, *ffn_out, *l_out;
};
struct State { int token, position, seen; unsigned step; };
struct Model {
    const Layer* layers;
    Matrix embedding, output;
    const float *norm, *cosine, *sine;       // angles [POSITIONS, ROPE / 2]
    float *embd, *output_norm, *logits;
    float *mixed, *sums;                     // attention's parts: [HEADS][SPLITS][HEAD], [HEADS][SPLITS][2]
    float2* best;                            // [BLOCKS] largest logit and its id (as int bits)
    State* state;
    int* tokens;                             // [POSITIONS] chosen token of each position
    unsigned* arrived;                       // the grid's barrier
};

// The grid's barrier, in two halves. `count` goes on from step to step; differences are taken modulo 2^32.
__device__ __forceinline__ void arrive(unsigned* arrived) {
    block_sync();
    if (threadIdx.x == 0) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" :: "l"(arrived) : "memory");
}
__device__ __forceinline__ void wait(unsigned* arrived, unsigned until) {
    if (threadIdx.x == 0) {
        unsigned seen;
        do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(arrived) : "memory");
        while ((int)(seen - until) < 0);
    }
    block_sync();
}

// Shared memory for this block's rows of a layer's gate and up, and of its down; 0 where they do not fit.
#ifndef GATE_BYTES
#define GATE_BYTES 0
#define DOWN_BYTES 0
#endif
#define STAGED (GATE_BYTES > 0)

// Warps that share a row. Measured with F16 on a 0.5 B model (BENCHMARKS.md): half or twice of any of them is slower.
#ifndef QKV_WARPS
#define QKV_WARPS 4
#endif
#ifndef OUT_WARPS
#define OUT_WARPS 4
#endif
#ifndef GATE_WARPS
#define GATE_WARPS 2
#endif
#ifndef DOWN_WARPS
#define DOWN_WARPS 4
#endif

#define PAIRS ((QW + 2 * KW) / 2)     // rows of Q, K and V, two by two
#define SHARE(COUNT) ((COUNT) / BLOCKS + 1)   // things of a block at most
constexpr int most(int a, int b) { return a > b ? a : b; }
constexpr int PARTS = most(most(SHARE(PAIRS) * 2 * QKV_WARPS, SHARE(FF) * 2 * GATE_WARPS),
                           most(SHARE(D) * most(OUT_WARPS, DOWN_WARPS), 2 * WARPS));

struct Shared {
    Layer layer[2];              // pointers of this layer and the next: read from memory once, ahead of time
    __align__(16) float x[most(most(most(FF, D), QW) * 9 / 8 + 32, SPLIT_ROWS * 64)];   // activations, or scores of one head
    float part[PARTS];           // sums of rows by the warps that share them
    double norm[WARPS];
    float mixed[WARPS][HEAD];
    unsigned long long full[2], used[2];   // barriers of the weights brought near: gate and up, down
    Matrix near_gate, near_up, near_down;
    __align__(16) char weights[GATE_BYTES + DOWN_BYTES];
};

// This block's share of `count` things, as [first, last).
__device__ __forceinline__ int first_of(int count) { return (unsigned)count * blockIdx.x / BLOCKS; }
__device__ __forceinline__ int last_of(int count) { return (unsigned)count * (blockIdx.x + 1) / BLOCKS; }

#ifdef PROFILE
__device__ long long marks[BLOCKS][1024];
#define MARK(N) if (threadIdx.x == 0) { marks[blockIdx.x][N] = clock64(); }
#define INSIDE(N) MARK(600 + N)
#else
#define MARK(N)
#define INSIDE(N)
#endif
