#include "formats.cuh"

// The dot products of R rows with x by LANES lanes; `sum` holds this lane's share.
//
// If all matrices of the model have one type, `load` fetches the first pieces into registers before x is known: called
// before a barrier, it overlaps the latencies of memory and barrier.
template <int COLS, int LANES, int R, bool NEAR = false> struct Rows {
    template <int T> struct Of {
        static const int pieces = COLS / Format<T, false>::E, rounds = (pieces + LANES - 1) / LANES;
        static const int ahead = rounds * R <= 12 ? rounds : (R >= 4 ? 2 : 8 / R);   // pieces in flight before the first use
    };
    template <int T> using Piece = Format<T, NEAR>;
    static const int ONLY = ONE_TYPE ? ONLY_TYPE : F32;
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
            const Piece<T> (&piece)[Of<T>::ahead][R], int lane, int i, const float* x, float (&sum)[R]) {
        #pragma unroll
        for (int u = 0; u < Of<T>::ahead; u++) {
            const int c = lane + (i + u) * LANES;
            if (c < Of<T>::pieces)
                #pragma unroll
                for (int r = 0; r < R; r++) sum[r] += piece[u][r].dot(FromShared{x, c * Format<T, false>::E});
        }
    }
    template <int T> static __device__ __forceinline__ void all(
            const Matrix* const (&m)[R], const int (&rows)[R], int lane, const float* x, float (&sum)[R], int from) {
        #pragma unroll 1
        for (int i = from; i < Of<T>::rounds; i += Of<T>::ahead) {
            Piece<T> piece[Of<T>::ahead][R];
            fetch<T>(piece, m, rows, lane, i);
            multiply<T>(piece, lane, i, x, sum);
        }
    }

    // This lane's activations, for all the rows it will take; only if they are few and of one type.
    static const bool HOLDS = ONE_TYPE && NEAR && COLS % Format<ONLY, false>::E == 0 && Of<ONLY>::rounds * Format<ONLY, false>::E <= 32;
    static const int HELD_ROUNDS = HOLDS ? Of<ONLY>::rounds : 1;
    FromRegisters<Format<ONLY, false>::E> activations[HELD_ROUNDS];
    __device__ __forceinline__ void hold(const float* x, int lane) {
        if constexpr (HOLDS)
            #pragma unroll
            for (int i = 0; i < HELD_ROUNDS; i++) {
                const int c = lane + i * LANES;
                #pragma unroll
                for (int j = 0; j < Format<ONLY, false>::E / 4; j++)
                    activations[i].x[j] = c < Of<ONLY>::pieces ? FromShared{x, c * Format<ONLY, false>::E}(4 * j) : make_float4(0.f, 0.f, 0.f, 0.f);
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
                for (int r = 0; r < R; r++) piece[i][r].load(*m[r], rows[r], Of<ONLY>::pieces, min(lane + i * LANES, Of<ONLY>::pieces - 1));
            #pragma unroll
            for (int i = 0; i < HELD_ROUNDS; i++)
                #pragma unroll
                for (int r = 0; r < R; r++) {
                    const float more = piece[i][r].dot(activations[i]);
                    sum[r] += lane + i * LANES < Of<ONLY>::pieces ? more : 0.f;
                }
        }
    }

    __device__ __forceinline__ void load(const Matrix* const (&m)[R], const int (&rows)[R], int lane) {
        if constexpr (ONE_TYPE && !NEAR && COLS % Format<ONLY, false>::E == 0) fetch<ONLY>(held, m, rows, lane, 0);
    }
    // The products of the rows that were loaded last.
    __device__ __forceinline__ void dot(const Matrix* const (&m)[R], const int (&rows)[R], int lane, const float* x, float (&sum)[R]) const {
        #pragma unroll
        for (int r = 0; r < R; r++) sum[r] = 0.f;
        if constexpr (ONE_TYPE) {
            if constexpr (COLS % Format<ONLY, false>::E == 0) {
                if constexpr (!NEAR) multiply<ONLY>(held, lane, 0, x, sum);
                if constexpr (NEAR) all<ONLY>(m, rows, lane, x, sum, 0);
                else if constexpr (Of<ONLY>::rounds > Of<ONLY>::ahead) all<ONLY>(m, rows, lane, x, sum, Of<ONLY>::ahead);
            }
            return;
        }
        switch (type_of(*m[0])) {
#define CASE(T) case T: if constexpr ((TYPES >> T & 1) && COLS % Format<T, false>::E == 0) all<T>(m, rows, lane, x, sum, 0); break;
            CASE(F32) CASE(F16) CASE(BF16) CASE(Q8_0) CASE(Q4_0) CASE(Q5_0) CASE(Q4_K) CASE(Q6_K)
#undef CASE
        }
    }
};
