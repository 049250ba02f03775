// What the phases of a decode step share: the model's structures, a block's shared memory, its share of the rows.

#include "activations.cuh"
#include "halves.cuh"
#include "messages.cuh"

#define THREADS 512              // that compute; one more warp prefetches weights
#define WARPS (THREADS / 32)
#define QW (HEADS * HEAD)
#define KW (KV_HEADS * HEAD)
#define GROUP (HEADS / KV_HEADS)
#define LOGITS_AHEAD 128         // rows of the output matrix that a block asks for during the last layer's end
#define LOGITS_ROUND (4 * WARPS) // rows of it that a block's warps take at a time
#ifndef SPLIT_ROWS
#define SPLIT_ROWS 64            // positions a block attends to before a head is split over several blocks
#endif

// A barrier of the computing warps only.
__device__ __forceinline__ void block_sync() { asm volatile("bar.sync 1, %0;" :: "n"(THREADS) : "memory"); }

struct Layer {
    Matrix q, k, v, o, gate, up, down;
    const float *attn_norm, *ffn_norm;
    // what the step makes, each with a place of its own
    float *attn_norm_out, *q_out, *k_out, *v_out, *q_rope, *k_cache, *v_cache, *kq, *peaks, *kqv_out, *attn_out, *ffn_inp;
    float *ffn_norm_out, *gate_out, *up_out, *swiglu, *ffn_out, *l_out;
    Word* words;                 // [WORDS]: what of it other blocks need
};
struct State { int token, position, seen; unsigned step; };
struct Model {
    const Layer* layers;
    Matrix embedding, output;
    const float *norm, *cosine, *sine;       // angles [POSITIONS, ROPE / 2]
    float *embd, *output_norm, *logits;
    float2* best;                            // [BLOCKS] largest logit and its id (as int bits)
    State* state;
    int* tokens;                             // [POSITIONS] chosen token of each position
    unsigned *arrived, *settled;             // blocks that have ended, and that have made all but logits, over all steps
    Word* made;                              // [VOCAB] logits, for those that record them
};

// The types of each phase's matrices, among TYPES: with one type the first pieces are loaded ahead of the activations.
#ifndef QKV_TYPES
#define QKV_TYPES TYPES
#define OUT_TYPES TYPES
#define GATE_TYPES TYPES
#define DOWN_TYPES TYPES
#define LOGIT_TYPES TYPES
#endif

// Shared memory for this block's rows of a layer's gate and up, and of its down; 0 where they do not fit.
#ifndef GATE_BYTES
#define GATE_BYTES 0
#define DOWN_BYTES 0
#endif
#define STAGED (GATE_BYTES > 0)

// Warps that share a row, rows they take at once, and what is unrolled or requested together: measured with F16 on a 0.5 B model
// (BENCHMARKS.md), where half or twice of any of these is slower.
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
#ifndef OUT_ROWS                 // rows that such warps take at once
#define OUT_ROWS 1
#endif
#ifndef DOWN_ROWS
#define DOWN_ROWS 1
#endif

#ifndef TAKEN
#define TAKEN 3                  // groups of four activations that a thread requests at once
#endif

#define PAIRS ((QW + 2 * KW) / 2)     // rows of Q, K and V, two by two
// The order of a layer's words: q rotated, k rotated, v, residual stream after attention, swiglu, layer's output; then for each
// head and share of the positions the weights' peak and sum, and the weighted values.
enum {
    Q_WORDS = 0, K_WORDS = Q_WORDS + QW, V_WORDS = K_WORDS + KW, INP_WORDS = V_WORDS + KW, SWIGLU_WORDS = INP_WORDS + D,
    OUT_WORDS = SWIGLU_WORDS + FF, SUMS_WORDS = OUT_WORDS + D, MIXED_WORDS = SUMS_WORDS + HEADS * SPLITS * 2,
    WORDS = MIXED_WORDS + HEADS * SPLITS * HEAD
};
#define SHARE(COUNT) ((COUNT) / BLOCKS + 1)   // the most of COUNT items that a block gets
constexpr int most(int a, int b) { return a > b ? a : b; }
// Whether the tensor cores multiply gate and up, and down: F16 rows in shared memory. Gate and up by tiles of eight rows each, down by one.
constexpr bool GATE_TILED = STAGED && GATE_TYPES == 1ull << F16 && D % 64 == 0 && SHARE(FF) <= 64;
constexpr bool DOWN_TILED = STAGED && DOWN_TYPES == 1ull << F16 && FF % 64 == 0 && SHARE(D) <= 8;
constexpr int GATE_TILES = GATE_TILED ? (SHARE(FF) + 7) / 8 : 1, GATE_SLOTS = D / 64 < WARPS ? D / 64 : WARPS;   // warps that have sums
constexpr int PARTS = most(most(most(SHARE(PAIRS) * 2 * QKV_WARPS, SHARE(FF) * 2 * GATE_WARPS),
                                most((SHARE(D) + 1) * most(OUT_WARPS, DOWN_WARPS), 2 * WARPS)), DOWN_TILED ? 8 * WARPS : 0);
constexpr int MIXED = most(WARPS * HEAD, GATE_TILED ? GATE_SLOTS * GATE_TILES * 16 - PARTS : 0);

using Activations = ActivationsOf<most(most(DOWN_TILED ? 32 : FF, D), QW)>;
using Halves = HalvesOf<most(GATE_TILED ? D : 64, DOWN_TILED ? FF : 64)>;
struct Shared {
    Layer layer[2];              // pointers of this layer and the next: read from memory once, ahead of time
    Activations x;
    Halves halves;
    float part[PARTS];           // sums of rows by the warps that share them; those of gate and up extend over `mixed`
    float mixed[MIXED];          // [WARPS][HEAD], with `peak` and `total`: of the warps that share a head
    float peak[WARPS], total[WARPS], scale;
    double norm[WARPS];
    float rest[SHARE(D)];        // the residual stream of this block's rows
    float2 angle[SHARE(PAIRS)];  // of the pairs of rows of Q and K
    int lines_taken;             // of the block's records
    unsigned long long full[2], used[2];   // barriers of the prefetched weights: gate and up, down
    Matrix near_gate, near_up, near_down;
    __align__(128) char weights[STAGED ? GATE_BYTES + DOWN_BYTES : 16];
};

// This block's share of `count` items, as [first, last).
__device__ __forceinline__ int first_of(int count) { return (unsigned)count * blockIdx.x / BLOCKS; }
__device__ __forceinline__ int last_of(int count) { return (unsigned)count * (blockIdx.x + 1) / BLOCKS; }

#ifdef PROFILE                   // clock reads between the phases
__device__ long long marks[BLOCKS][1024];
#define MARK if (threadIdx.x == 0) marks[blockIdx.x][mark++] = clock64();
#else
#define MARK
#endif
