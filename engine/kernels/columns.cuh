// The down projection, by rows or by columns.
//
// By columns a thread takes the same columns of all of its block's rows, and multiplies them by activations that it has heard itself: these reach
// no shared memory, no barrier stands before the products, and each is read once instead of once a row (5 % of a step). For a float type,
// weights in shared memory and at most eight rows a block. Attention's output projection is slower so: its weights come from the L2 cache.

#include "projections.cuh"

// Eight rows' sums over a warp: each four lanes end with one row's, lane / 4.
__device__ __forceinline__ float row_of_four_lanes(const float (&sum)[8]) {
    const int lane = this_thread() & 31;
    float four[4], two[2];
    #pragma unroll
    for (int i = 0; i < 4; i++) four[i] = (lane & 16 ? sum[i + 4] : sum[i]) + __shfl_xor_sync(~0u, lane & 16 ? sum[i] : sum[i + 4], 16);
    #pragma unroll
    for (int i = 0; i < 2; i++) two[i] = (lane & 8 ? four[i + 2] : four[i]) + __shfl_xor_sync(~0u, lane & 8 ? four[i] : four[i + 2], 8);
    float one = (lane & 4 ? two[1] : two[0]) + __shfl_xor_sync(~0u, lane & 4 ? two[0] : two[1], 4);
    one += __shfl_xor_sync(~0u, one, 2);
    return one + __shfl_xor_sync(~0u, one, 1);
}
// The sums of all threads' columns -> made and the residual stream; a thread finishes a row.
__device__ __forceinline__ void close_rows(
        Shared& s, const float (&sum)[8], const float* biases, float* made, float* summed, Word* words, unsigned step) {
    const int row = first_of(D) + this_thread(), last = last_of(D);
    const float bias = row < last && biases ? __ldg(biases + row) : 0.f;
    const float one = row_of_four_lanes(sum);
    if (this_thread() % 4 == 0) s.column_part[this_thread() % 32 / 4 * WARPS + this_thread() / 32] = one;
    block_sync();
    if (row >= last) return;
    float y = bias;
    #pragma unroll
    for (int i = 0; i < WARPS / 4; i++) {
        const float4 v = *(const float4*)(s.column_part + this_thread() * WARPS + 4 * i);
        y += (v.x + v.y) + (v.z + v.w);
    }
    close_row(s, row, y, made, summed, words, step);
}

// By rows.
template <unsigned long long TYPE_MASK, bool BY_COLUMNS> struct Down {
    ProjectionBack<FF, DOWN_WARPS, DOWN_ROWS, TYPE_MASK, STAGED> rows;

    __device__ __forceinline__ void load(const Matrix& w) { rows.load(w); }
    __device__ __forceinline__ void take(Shared& s, const Layer& l, unsigned step) { ::take(s, (const unsigned*)(l.words + SWIGLU_WORDS), step); }
    __device__ __forceinline__ void run(Shared& s, const Layer& l, unsigned step) {
        rows.run(s, STAGED ? s.near_down : l.down, l.ffn_out, l.l_out, l.words + OUT_WORDS, step);
    }
};
// By columns, from shared memory: a thread has a piece of each row at a time.
template <unsigned long long TYPE_MASK> struct Down<TYPE_MASK, true> {
    static const int E = Format<last_type(TYPE_MASK), true>::E, PIECES = FF / E;
    using Piece = Format<last_type(TYPE_MASK), true>;

    __device__ __forceinline__ void load(const Matrix&) {}
    __device__ __forceinline__ void take(Shared&, const Layer&, unsigned) {}
    static __device__ __forceinline__ void hear_piece(const unsigned* words, unsigned step, FloatPiece<E>& x) {
        uint4 four[E / 4];
        bool all;
        do {
            all = true;
            #pragma unroll
            for (int i = 0; i < E / 4; i++) four[i] = look_at_four(words + 4 * i);
            #pragma unroll
            for (int i = 0; i < E / 4; i++) all &= told_four(four[i], step);
            if (!all) __nanosleep(PAUSE);
        } while (!all);
        #pragma unroll
        for (int i = 0; i < E / 4; i++) x.x[i] = values_of(four[i]);
    }
    __device__ __forceinline__ void run(Shared& s, const Layer& l, unsigned step) {
        const int first = first_of(D), last = last_of(D);
        float sum[8] = {};
        #pragma unroll 1
        for (int c = this_thread(); first < last && c < PIECES; c += THREADS) {   // blocks without a row have none of its bytes
            Piece piece[SHARE(D)];
            #pragma unroll
            for (int r = 0; r < SHARE(D); r++) piece[r].load(s.near_down, min(first + r, last - 1), PIECES, c);
            FloatPiece<E> x;
            hear_piece((const unsigned*)(l.words + SWIGLU_WORDS) + E * c, step, x);
            #pragma unroll
            for (int r = 0; r < SHARE(D); r++) sum[r] += piece[r].dot(x);
        }
        close_rows(s, sum, l.down.bias, l.ffn_out, l.l_out, l.words + OUT_WORDS, step);
    }
};
