#include "formats.cuh"

// The dot products of R rows with x by LANES lanes; `sum` holds this lane's share.
//
// If all matrices of TYPE_MASK have one type, `load` fetches the first pieces into registers before x is known: called
// before a barrier, it overlaps the latencies of memory and barrier.
template <int COLS, int LANES, int R, unsigned long long TYPE_MASK, bool NEAR = false> struct Rows {
    static const bool ONE = one_type(TYPE_MASK);
    static const int ONLY = ONE ? last_type(TYPE_MASK) : F32;
    template <int T> struct Of {
        static const int pieces = COLS / Format<T, false>::E, rounds = (pieces + LANES - 1) / LANES;
        static const int ahead = rounds * R <= 12 ? rounds : (R >= 4 ? 2 : 8 / R);   // pieces in flight before the first use
    };
    template <int T> using Piece = Format<T, NEAR>;
    template <int T> using Operand = typename Format<T, NEAR>::Operand;
    Piece<ONLY> held[Of<ONLY>::ahead][R];

    template <int T> static __device__ __forceinline__ void fetch(
            Piece<T> (&piece)[Of<T>::ahead][R], const Matrix* const (&m)[R], const int (&rows)[R], int lane, int i) {
        #pragma unroll
        for (int u = 0; u < Of<T>::ahead; u++) {
            const int c = lane + (i + u) * LANES;
            if (c < Of<T>::pieces)
                #pragma unroll
                for (int r = 0; r < R; r++) piece[u][r].load(*m[r], rows[r], Of<T>::pieces, c);
        }
    }
    template <int T> static __device__ __forceinline__ void multiply(
            const Piece<T> (&piece)[Of<T>::ahead][R], int lane, int i, const Activations& x, float (&sum)[R]) {
        #pragma unroll
        for (int u = 0; u < Of<T>::ahead; u++) {
            const int c = lane + (i + u) * LANES;
            if (c < Of<T>::pieces) {
                Operand<T> operand;
                x.take(c, operand);
                #pragma unroll
                for (int r = 0; r < R; r++) sum[r] += piece[u][r].dot(operand);
            }
        }
    }
    template <int T> static __device__ __forceinline__ void all(
            const Matrix* const (&m)[R], const int (&rows)[R], int lane, const Activations& x, float (&sum)[R], int from) {
        #pragma unroll 1
        for (int i = from; i < Of<T>::rounds; i += Of<T>::ahead) {
            Piece<T> piece[Of<T>::ahead][R];
            fetch<T>(piece, m, rows, lane, i);
            multiply<T>(piece, lane, i, x, sum);
        }
    }

    // This lane's activations, for all the rows it will take; only if they are few and of one type.
    static const bool HOLDS = ONE && NEAR && COLS % Format<ONLY, false>::E == 0 && Of<ONLY>::rounds * sizeof(Operand<ONLY>) <= 128;
    static const int HELD_ROUNDS = HOLDS ? Of<ONLY>::rounds : 1;
    static const bool ZEROED = FLOAT_TYPES >> ONLY & 1;      // activations beyond a row's end are zeros, so that no sum has to be masked
    Operand<ONLY> operands[HELD_ROUNDS];
    static __device__ __forceinline__ int held_piece(int lane, int i) { return min(lane + i * LANES, Of<ONLY>::pieces - 1); }
    __device__ __forceinline__ void hold(const Activations& x, int lane) {
        if constexpr (HOLDS)
            #pragma unroll
            for (int i = 0; i < HELD_ROUNDS; i++) {
                x.take(held_piece(lane, i), operands[i]);
                if constexpr (ZEROED)
                    #pragma unroll
                    for (int k = 0; k < (int)(sizeof(operands[i]) / sizeof(float4)); k++)
                        if (lane + i * LANES >= Of<ONLY>::pieces) operands[i].x[k] = make_float4(0.f, 0.f, 0.f, 0.f);
            }
    }
    __device__ __forceinline__ void dot_held(const Matrix* const (&m)[R], const int (&rows)[R], int lane, float (&sum)[R]) const {
        #pragma unroll
        for (int r = 0; r < R; r++) sum[r] = 0.f;
        if constexpr (HOLDS) {
            Piece<ONLY> piece[HELD_ROUNDS][R];
            #pragma unroll
            for (int i = 0; i < HELD_ROUNDS; i++)
                #pragma unroll
                for (int r = 0; r < R; r++) piece[i][r].load(*m[r], rows[r], Of<ONLY>::pieces, held_piece(lane, i));
            #pragma unroll
            for (int i = 0; i < HELD_ROUNDS; i++)
                #pragma unroll
                for (int r = 0; r < R; r++) {
                    const float more = piece[i][r].dot(operands[i]);
                    sum[r] += ZEROED || lane + i * LANES < Of<ONLY>::pieces ? more : 0.f;
                }
        }
    }

    __device__ __forceinline__ void load(const Matrix* const (&m)[R], const int (&rows)[R], int lane) {
        if constexpr (ONE && !NEAR && COLS % Format<ONLY, false>::E == 0) fetch<ONLY>(held, m, rows, lane, 0);
    }
    // The products of the rows that were loaded last.
    __device__ __forceinline__ void dot(
            const Matrix* const (&m)[R], const int (&rows)[R], int lane, const Activations& x, float (&sum)[R]) const {
        #pragma unroll
        for (int r = 0; r < R; r++) sum[r] = 0.f;
        if constexpr (ONE) {
            if constexpr (COLS % Format<ONLY, false>::E == 0) {
                if constexpr (!NEAR) multiply<ONLY>(held, lane, 0, x, sum);
                if constexpr (NEAR) all<ONLY>(m, rows, lane, x, sum, 0);
                else if constexpr (Of<ONLY>::rounds > Of<ONLY>::ahead) all<ONLY>(m, rows, lane, x, sum, Of<ONLY>::ahead);
            }
            return;
        }
        switch (type_of(*m[0])) {
#define CASE(T) case T: if constexpr ((TYPE_MASK >> T & 1) && COLS % Format<T, false>::E == 0) all<T>(m, rows, lane, x, sum, 0); break;
            CASE(F32) CASE(F16) CASE(BF16) CASE(Q8_0) CASE(Q4_0) CASE(Q5_0) CASE(Q4_K) CASE(Q6_K)
#undef CASE
        }
    }
};
