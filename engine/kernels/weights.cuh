// A weight in its file's type, as `engine.weights.packing` lays it out, and one element of it, as ggml dequantises it.

#include <cuda_fp16.h>

#ifndef INFINITY                 // NVRTC has no math.h
#define INFINITY __int_as_float(0x7f800000)
#endif

// Planes that `engine.weights.packing` makes from the file's blocks; `low` has 16 bytes (Q8_0: 32) a block of 32 elements.
struct Matrix {
    const uint4* low;            // float values, int8, or nibbles: of 16 elements, number i low, i + 8 high
    const void* high;            // Q5_0: uint32, Q6_K: uint2 of upper bits
    const void* scales;          // Q8_0, Q4_0, Q5_0: half; Q4_K: uchar2 scale and min; Q6_K: char2
    const void* super;           // K-quants: half2 d, dmin (Q4_K), half d (Q6_K) of 256 elements
    const float* bias;           // or null
    long long type;              // ggml_type
};

enum { F32 = 0, F16 = 1, Q4_0 = 2, Q5_0 = 6, Q8_0 = 8, Q4_K = 12, Q6_K = 14, BF16 = 30 };

#ifndef TYPES                    // bit mask of the ggml types that the model has; no code is compiled for others
#define TYPES ~0ull
#endif
constexpr bool one_type(unsigned long long mask) { return (mask & (mask - 1)) == 0; }
constexpr int last_type(unsigned long long mask) { int t = 0; while (mask >>= 1) t++; return t; }
__device__ __forceinline__ int type_of(const Matrix& m) { return one_type(TYPES) ? last_type(TYPES) : (int)m.type; }

// One element of a row, as ggml dequantises it.
__device__ __noinline__ float element(const Matrix& m, long long row, int cols, int e) {
    const int type = type_of(m), b = e >> 5, i = e & 31, k = i & 3, w = (i >> 2) & 3, at = (i >> 4 << 3) + (i & 7);
    const long long block = row * (cols / 32) + b;
    const unsigned char* low = (const unsigned char*)m.low;
    int q = type == Q8_0 || type < 2 || type == BF16 ? 0 : low[block * 16 + at] >> (i & 8) / 2 & 15;
    switch (type) {
        case F32: return ((const float*)m.low)[row * cols + e];
        case F16: return __half2float(((const half*)m.low)[row * cols + e]);
        case BF16: return __uint_as_float((unsigned)((const unsigned short*)m.low)[row * cols + e] << 16);
        case Q8_0: return (float)((const signed char*)m.low)[row * cols + e] * __half2float(((const half*)m.scales)[block]);
        case Q4_0: return (float)(q - 8) * __half2float(((const half*)m.scales)[block]);
        case Q5_0: {
            unsigned h = ((const unsigned*)m.high)[block] >> (8 * k + (i < 16 ? w : 4 + w)) & 1;
            return (float)((int)(q | h << 4) - 16) * __half2float(((const half*)m.scales)[block]);
        }
        case Q4_K: {
            uchar2 s = ((const uchar2*)m.scales)[block];
            float2 d = __half22float2(((const half2*)m.super)[block / 8]);
            return __fsub_rn(__fmul_rn(__fmul_rn(d.x, s.x), (float)q), __fmul_rn(d.y, s.y));
        }
        case Q6_K: {
            uint2 h = ((const uint2*)m.high)[block];
            char2 s = ((const char2*)m.scales)[block];
            unsigned bits = (i < 16 ? h.x : h.y) >> (8 * k + 2 * w) & 3;
            return __half2float(((const half*)m.super)[block / 8]) * (i < 16 ? s.x : s.y) * (float)((int)(q | bits << 4) - 32);
        }
    }
    return 0.f;
}
