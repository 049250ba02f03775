// What the phases of a decode step share: the model's structures, a block's shared memory, its share of the rows.

#include "activations.cuh"
#include "messages.cuh"

#define THREADS 512              // that compute; two more warps bring weights near, find norms' scales and record
#define ALL_THREADS (THREADS + 64)
#define WARPS (THREADS / 32)
#define QW (HEADS * HEAD)
#define KW (KV_HEADS * HEAD)
#define GROUP (HEADS / KV_HEADS)
#define LOGITS_ROUND (4 * WARPS) // rows of the output matrix that a block's warps take at a time
#define LOGIT_SLOTS 2            // pairs of its rows that a warp has on their way to shared memory (logits.cuh)
#ifndef SPLIT_ROWS
#define SPLIT_ROWS 180           // positions that a block attends to before a head is split over several blocks
#endif

// The thread's and the block's number, read anew: what a phase computes from them is not kept in registers through the others. Registers
// that were spilled for it made a phase wait for memory, 4 % of a step.
__device__ __forceinline__ unsigned this_thread() {
    unsigned number = threadIdx.x;
    asm volatile("" : "+r"(number));
    return number;
}
__device__ __forceinline__ unsigned this_block() {
    unsigned number = blockIdx.x;
    asm volatile("" : "+r"(number));
    return number;
}

// A barrier of the computing warps only.
__device__ __forceinline__ void block_sync() { asm volatile("bar.sync 1, %0;" :: "n"(THREADS) : "memory"); }
// Barriers of these and the warp beside that finds a norm's scale: the squares are there; the scale is, and nobody waited for it until then.
__device__ __forceinline__ void sync_squares() { asm volatile("bar.sync 3, %0;" :: "n"(THREADS + 32) : "memory"); }
__device__ __forceinline__ void sync_scale() { asm volatile("bar.sync 4, %0;" :: "n"(THREADS + 32) : "memory"); }
// Which of the values that a block's threads finish behind a barrier this thread finishes: the first ones by a warp that has few rows, which
// finds out meanwhile where they go.
__device__ __forceinline__ int finisher() { return (THREADS - 33 - (int)this_thread()) & (THREADS - 1); }

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
    Word* best;                              // [BLOCKS][2] largest logit and its id (as int bits)
    State* state;
    int* tokens;                             // [POSITIONS] chosen token of each position
    unsigned* settled;                       // blocks that have made all but logits, over all steps
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
// Whether the down projection goes by columns (columns.cuh), and the most rows of a block for which it can.
#define COLUMN_ROWS 8
#define DOWN_BY_COLUMNS (STAGED && one_type(DOWN_TYPES) && (DOWN_TYPES & FLOAT_TYPES) && SHARE(D) <= COLUMN_ROWS)

// Warps that share a row, rows they take at once, and what is unrolled or requested together: measured with F16 on a 0.5 B model
// (docs/benchmarks-log.md), where half or twice of any of these is slower.
#ifndef QKV_WARPS
#define QKV_WARPS 2
#endif
#ifndef OUT_WARPS
#define OUT_WARPS 2
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
constexpr int PARTS = most(most(SHARE(PAIRS) * 2 * QKV_WARPS, SHARE(FF) * 2 * GATE_WARPS),
                           most((SHARE(D) + 1) * most(OUT_WARPS, DOWN_WARPS), 2 * WARPS));

constexpr int LOGIT_ROUNDS = (VOCAB - 1) / (BLOCKS * LOGITS_ROUND) + 1;
constexpr bool LOGITS_FIT = GATE_BYTES + DOWN_BYTES >= 4 * LOGIT_ROUNDS * LOGITS_ROUND;   // where the weights of the last layer were

using Activations = ActivationsOf<most(most(FF, D), QW)>;
struct Shared {
    Layer layer[2];              // pointers of this layer and the next: read from memory once, ahead of time
    Activations x;
    float part[PARTS];           // sums of rows by the warps that share them
    __align__(16) float column_part[DOWN_BY_COLUMNS ? COLUMN_ROWS * WARPS : 4];   // the same by columns: no barrier separates them from `part`
    float scale;                 // of the norm whose values are in x
    float rest[SHARE(D)];        // the residual stream of this block's rows
    float2 angle[SHARE(PAIRS)];  // of this block's pairs of rows of Q and K
    union {
        float mixed[WARPS][HEAD];   // of the warps that share a head
        double squares[THREADS];    // a norm's, between two barriers at other times
    };
    float peak[WARPS], total[WARPS];
    int lines_taken;             // of the block's records
    unsigned long long full[2], used[2];   // barriers of the prefetched weights: gate and up, down
    unsigned long long round_made[LOGIT_ROUNDS];   // barriers of the logits, which the recording warp takes as they are made
    unsigned long long rows_there[WARPS * LOGIT_SLOTS];   // barriers of the rows of the output matrix that a warp has asked for
    float made[LOGITS_FIT ? 1 : LOGIT_ROUNDS * LOGITS_ROUND];
    Matrix near_gate, near_up, near_down;
    __align__(128) char weights[STAGED ? GATE_BYTES + DOWN_BYTES : 16];
};

#define KEEPER (BLOCKS - 1)      // the block that records what all blocks have: the one least likely to have a head

// This block's share of `count` items, as [first, last).
__device__ __forceinline__ int first_of(int count) { return (unsigned)count * this_block() / BLOCKS; }
__device__ __forceinline__ int last_of(int count) { return (unsigned)count * (this_block() + 1) / BLOCKS; }
// The first row of the output matrix that this block takes in a round: all blocks take neighbouring ones, which the memory gives faster.
__device__ __forceinline__ int logits_start(int round) { return (round * BLOCKS + (int)this_block()) * LOGITS_ROUND; }

#ifdef PROFILE                   // clock reads between the phases
__device__ long long marks[BLOCKS][1024];
#define MARK if (threadIdx.x == 0) marks[blockIdx.x][mark++] = clock64();
#else
#define MARK
#endif
