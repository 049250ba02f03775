// The vector that a block multiplies its rows by, in shared memory: as float32 for rows of float types, as integers for rows of quantised ones.
//
// 32 neighbours share a unit, the power of two in which the largest of them is an integer of 23 bits and a sign; each is rounded to half a
// unit, 2^-23 of the largest. Three planes of bytes hold the integers, so that their products with the bytes of quantised weights are
// summed up four at a time (dp4a), and nothing rounds these sums: that takes half the time of turning each weight into a float.

#include "weights.cuh"

constexpr unsigned long long FLOAT_TYPES = 1ull << F32 | 1ull << F16 | 1ull << BF16;
constexpr bool FLOATS = (TYPES & FLOAT_TYPES) != 0, INTEGERS = (TYPES & ~FLOAT_TYPES) != 0, SUMS = (TYPES >> Q4_K & 1) != 0;

__device__ __forceinline__ int padded(int e) { return e + ((e >> 5) << 2); }

// Activations as a piece of a row finds them: E floats, or 16 integers.
template <int E> struct FloatPiece { float4 x[E / 4]; };
struct IntegerPiece {
    uint4 byte[3];               // lowest first; the highest has the sign
    float unit, sum;             // sum of the integers, only where a type has minima
    int half;                    // of a block of 32
};

template <int N> struct ActivationsOf {
    __align__(16) float x[FLOATS ? N * 9 / 8 + 32 : 4];      // padded by 4 after every 32: lanes 4, 8 or 32 apart read different banks
    __align__(16) unsigned char bytes[3][INTEGERS ? N : 16];
    float unit[INTEGERS ? N / 32 : 1], sum[SUMS ? N / 16 : 1];

    // EACH neighbours from element e on; 32 / EACH neighbouring lanes have a block of 32, and all of them are here. WHOLE: all of a warp are,
    // which is faster: shuffles among some lanes are made group by group.
    template <int EACH, bool WHOLE> __device__ __forceinline__ void put(int e, const float (&v)[EACH]) {
        if constexpr (FLOATS) {
            if constexpr (EACH == 4) *(float4*)(x + padded(e)) = make_float4(v[0], v[1], v[2], v[3]);
            else if constexpr (EACH == 2) *(float2*)(x + padded(e)) = make_float2(v[0], v[1]);
            else x[padded(e)] = v[0];
        }
        if constexpr (INTEGERS) {
            constexpr int LANES = 32 / EACH;
            const unsigned lane = threadIdx.x & 31, group = WHOLE ? ~0u : ((1u << LANES % 32) - 1) << (lane & ~(LANES - 1));
            unsigned top = 0;
            #pragma unroll
            for (int i = 0; i < EACH; i++) top = max(top, __float_as_uint(v[i]) & 0x7FFFFFFFu);
            if constexpr (LANES == 32) asm volatile("redux.sync.max.u32 %0, %0, 0xffffffff;" : "+r"(top));
            else
                #pragma unroll
                for (int far = 1; far < LANES; far *= 2) top = max(top, __shfl_xor_sync(group, top, far));
            const unsigned exponent = max(top >> 23, 23u);     // of the unit 22 less
            const float units = __uint_as_float((276u - exponent) << 23);
            unsigned words[3] = {0, 0, 0};
            int total = 0;
            #pragma unroll
            for (int i = 0; i < EACH; i++) {
                const int q = min(__float2int_rn(v[i] * units), 0x7FFFFF);
                total += q;
                #pragma unroll
                for (int j = 0; j < 3; j++) words[j] |= ((unsigned)q >> 8 * j & 255u) << 8 * i;
            }
            #pragma unroll
            for (int j = 0; j < 3; j++) {
                if constexpr (EACH == 4) *(unsigned*)(bytes[j] + e) = words[j];
                else if constexpr (EACH == 2) *(unsigned short*)(bytes[j] + e) = (unsigned short)words[j];
                else bytes[j][e] = (unsigned char)words[j];
            }
            if (lane % LANES == 0) unit[e / 32] = __uint_as_float(exponent == 255 ? 0x7FC00000u : (exponent - 22u) << 23);   // not finite: NaN
            if constexpr (SUMS) {
                #pragma unroll
                for (int far = 1; far < LANES / 2; far *= 2) total += __shfl_xor_sync(group, total, far);
                if (lane % (LANES / 2) == 0) sum[e / 16] = (float)total;
            }
        }
    }

    // The activations of a row's piece number c.
    template <int E> __device__ __forceinline__ void take(int c, FloatPiece<E>& piece) const {
        #pragma unroll
        for (int i = 0; i < E / 4; i++) piece.x[i] = *(const float4*)(x + padded(c * E + 4 * i));
    }
    __device__ __forceinline__ void take(int c, IntegerPiece& piece) const {
        #pragma unroll
        for (int j = 0; j < 3; j++) piece.byte[j] = *(const uint4*)(bytes[j] + 16 * c);
        piece.unit = unit[c / 2];
        if constexpr (SUMS) piece.sum = sum[c];
        piece.half = c & 1;
    }
};
