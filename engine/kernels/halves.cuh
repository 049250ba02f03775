// Activations as the tensor cores take them: two halves for each float.
//
// 32 neighbours share a unit, the power of two in which the largest of them is below 2^15. The high half is the float in that unit, the low
// half what is left, times 2^11: together 22 bits of the float's 24, in a product with F16 weights that is exact before it is summed up.

#include "weights.cuh"

#define LOW_SHARE 4.8828125e-4f  // 2^-11, what one of the low half counts

template <int N> struct HalvesOf {
    __align__(16) half high[N + 32], low[N + 32];   // N is a multiple of 64: the same elements of both lie in different banks
    float unit[N / 32 + 1];

    // EACH neighbours from element e on; 32 / EACH neighbouring lanes have a block of 32, and all of them are here. WHOLE: all of a warp are.
    template <int EACH, bool WHOLE> __device__ __forceinline__ void put(int e, const float (&v)[EACH]) {
        constexpr int LANES = 32 / EACH;
        const unsigned lane = threadIdx.x & 31, group = WHOLE ? ~0u : ((1u << LANES % 32) - 1) << (lane & ~(LANES - 1));
        unsigned top = 0;
        #pragma unroll
        for (int i = 0; i < EACH; i++) top = max(top, __float_as_uint(v[i]) & 0x7FFFFFFFu);
        if constexpr (LANES == 32) asm volatile("redux.sync.max.u32 %0, %0, 0xffffffff;" : "+r"(top));
        else
            #pragma unroll
            for (int far = 1; far < LANES; far *= 2) top = max(top, __shfl_xor_sync(group, top, far));
        const unsigned exponent = max(top >> 23, 15u);
        const float units = __uint_as_float((268u - exponent) << 23);
        half two[2][EACH];
        #pragma unroll
        for (int i = 0; i < EACH; i++) {
            const float x = v[i] * units;
            two[0][i] = __float2half_rn(x);
            two[1][i] = __float2half_rn((x - __half2float(two[0][i])) * 2048.f);
        }
        if constexpr (EACH == 4) { *(uint2*)(high + e) = *(const uint2*)two[0]; *(uint2*)(low + e) = *(const uint2*)two[1]; }
        else
            #pragma unroll
            for (int i = 0; i < EACH; i++) { high[e + i] = two[0][i]; low[e + i] = two[1][i]; }
        if (lane % LANES == 0) unit[e / 32] = __uint_as_float(exponent == 255 ? 0x7FC00000u : (exponent - 14u) << 23);   // not finite: NaN
    }
};
