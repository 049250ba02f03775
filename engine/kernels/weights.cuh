// Dot products of rows of a weight in its file's type with float32 activations in shared memory.
//
// A lane takes 16 bytes of float types, or one block of 32 elements of a quantised type, at a time. Activations are padded
// by 4 floats after every 32, so that lanes 4, 8 or 32 elements apart read different banks. Accumulation is float32;
// the weights' values are exactly those of ggml's dequantisation (d * q, and d * scale * q - dmin * min for Q4_K).

#include <cuda_fp16.h>

#ifndef INFINITY                 // NVRTC has no math.h
#define INFINITY __int_as_float(0x7f800000)
#endif

// Planes that `engine.packing` makes of the file's blocks; `low` has 16 bytes (Q8_0: 32) a block of 32 elements.
struct Matrix {
    const uint4* low;            // float values, int8, or nibbles: element i low, i + 16 high
    const void* high;            // Q5_0: uint32, Q6_K: uint2 of upper bits
    const void* scales;          // Q8_0, Q4_0, Q5_0: half; Q4_K: uchar2 scale and min; Q6_K: char2
    const void* super;           // K-quants: half2 d, dmin (Q4_K), half d (Q6_K) of 256 elements
    const float* bias;           // or null
    long long type;              // ggml_type
};

enum { F32 = 0, F16 = 1, Q4_0 = 2, Q5_0 = 6, Q8_0 = 8, Q4_K = 12, Q6_K = 14, BF16 = 30 };

__device__ __forceinline__ int padded(int e) { return e + ((e >> 5) << 2); }

__device__ __forceinline__ uint4 stream(const uint4* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

// Four bytes 0…255 of a word as floats, less `zero`: 2^23 + b is the float 0x4B0000bb.
__device__ __forceinline__ float4 bytes(unsigned word, float zero) {
    float4 v;
    v.x = __uint_as_float(__byte_perm(word, 0x4B000000u, 0x7650)) - (8388608.f + zero);
    v.y = __uint_as_float(__byte_perm(word, 0x4B000000u, 0x7651)) - (8388608.f + zero);
    v.z = __uint_as_float(__byte_perm(word, 0x4B000000u, 0x7652)) - (8388608.f + zero);
    v.w = __uint_as_float(__byte_perm(word, 0x4B000000u, 0x7653)) - (8388608.f + zero);
    return v;
}

__device__ __forceinline__ float dot4(float4 a, float4 b, float sum) {
    return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}
__device__ __forceinline__ float4 at(const float* x, int e) { return *(const float4*)(x + padded(e)); }
__device__ __forceinline__ unsigned word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

template <int T> struct Format;   // E elements a piece; load(matrix, row, pieces a row, piece); dot(x, first element)

template <> struct Format<F32> {
    static const int E = 4;
    uint4 v;
    __device__ void load(const Matrix& m, long long row, int pieces, int c) { v = stream(m.low + row * pieces + c); }
    __device__ float dot(const float* x, int e) const {
        return dot4(make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)), at(x, e), 0.f);
    }
};
template <> struct Format<F16> {
    static const int E = 8;
    uint4 v;
    __device__ void load(const Matrix& m, long long row, int pieces, int c) { v = stream(m.low + row * pieces + c); }
    __device__ float dot(const float* x, int e) const {
        float2 a = __half22float2(*(const half2*)&v.x), b = __half22float2(*(const half2*)&v.y);
        float2 c = __half22float2(*(const half2*)&v.z), d = __half22float2(*(const half2*)&v.w);
        return dot4(make_float4(a.x, a.y, b.x, b.y), at(x, e), dot4(make_float4(c.x, c.y, d.x, d.y), at(x, e + 4), 0.f));
    }
};
template <> struct Format<BF16> {
    static const int E = 8;
    uint4 v;
    __device__ void load(const Matrix& m, long long row, int pieces, int c) { v = stream(m.low + row * pieces + c); }
    __device__ static float2 two(unsigned w) { return make_float2(__uint_as_float(w << 16), __uint_as_float(w & 0xFFFF0000u)); }
    __device__ float dot(const float* x, int e) const {
        float2 a = two(v.x), b = two(v.y), c = two(v.z), d = two(v.w);
        return dot4(make_float4(a.x, a.y, b.x, b.y), at(x, e), dot4(make_float4(c.x, c.y, d.x, d.y), at(x, e + 4), 0.f));
    }
};
template <> struct Format<Q8_0> {
    static const int E = 32;
    uint4 v, w;
    float d;
    __device__ void load(const Matrix& m, long long row, int pieces, int c) {
        long long b = row * pieces + c;
        v = stream(m.low + 2 * b);
        w = stream(m.low + 2 * b + 1);
        d = __half2float(__ldg((const half*)m.scales + b));
    }
    __device__ float dot(const float* x, int e) const {
        float sum = 0.f;
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            sum = dot4(bytes(word(v, i) ^ 0x80808080u, 128.f), at(x, e + 4 * i), sum);
            sum = dot4(bytes(word(w, i) ^ 0x80808080u, 128.f), at(x, e + 16 + 4 * i), sum);
        }
        return d * sum;
    }
};
template <> struct Format<Q4_0> {
    static const int E = 32;
    uint4 v;
    float d;
    __device__ void load(const Matrix& m, long long row, int pieces, int c) {
        long long b = row * pieces + c;
        v = stream(m.low + b);
        d = __half2float(__ldg((const half*)m.scales + b));
    }
    __device__ float dot(const float* x, int e) const {
        float sum = 0.f;
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            sum = dot4(bytes(word(v, i) & 0x0F0F0F0Fu, 8.f), at(x, e + 4 * i), sum);
            sum = dot4(bytes((word(v, i) >> 4) & 0x0F0F0F0Fu, 8.f), at(x, e + 16 + 4 * i), sum);
        }
        return d * sum;
    }
};
template <> struct Format<Q5_0> {
    static const int E = 32;
    uint4 v;
    unsigned h;
    float d;
    __device__ void load(const Matrix& m, long long row, int pieces, int c) {
        long long b = row * pieces + c;
        v = stream(m.low + b);
        h = __ldg((const unsigned*)m.high + b);
        d = __half2float(__ldg((const half*)m.scales + b));
    }
    __device__ float dot(const float* x, int e) const {
        float sum = 0.f;
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            sum = dot4(bytes((word(v, i) & 0x0F0F0F0Fu) | (((h >> i) & 0x01010101u) << 4), 16.f), at(x, e + 4 * i), sum);
            sum = dot4(bytes(((word(v, i) >> 4) & 0x0F0F0F0Fu) | (((h >> (4 + i)) & 0x01010101u) << 4), 16.f), at(x, e + 16 + 4 * i), sum);
        }
        return d * sum;
    }
};
template <> struct Format<Q4_K> {
    static const int E = 32;
    uint4 v;
    float scale, low;
    __device__ void load(const Matrix& m, long long row, int pieces, int c) {
        long long b = row * pieces + c;
        v = stream(m.low + b);
        uchar2 s = __ldg((const uchar2*)m.scales + b);
        float2 d = __half22float2(__ldg((const half2*)m.super + b / 8));
        scale = d.x * s.x;
        low = d.y * s.y;
    }
    __device__ float dot(const float* x, int e) const {
        float sum = 0.f, ones = 0.f;
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            float4 a = at(x, e + 4 * i), b = at(x, e + 16 + 4 * i);
            sum = dot4(bytes(word(v, i) & 0x0F0F0F0Fu, 0.f), a, sum);
            sum = dot4(bytes((word(v, i) >> 4) & 0x0F0F0F0Fu, 0.f), b, sum);
            ones += ((a.x + a.y) + (a.z + a.w)) + ((b.x + b.y) + (b.z + b.w));
        }
        return scale * sum - low * ones;
    }
};
template <> struct Format<Q6_K> {
    static const int E = 32;
    uint4 v;
    uint2 h;
    float first, second;
    __device__ void load(const Matrix& m, long long row, int pieces, int c) {
        long long b = row * pieces + c;
        v = stream(m.low + b);
        h = __ldg((const uint2*)m.high + b);
        char2 s = __ldg((const char2*)m.scales + b);
        float d = __half2float(__ldg((const half*)m.super + b / 8));
        first = d * s.x;
        second = d * s.y;
    }
    __device__ float dot(const float* x, int e) const {
        float a = 0.f, b = 0.f;
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            a = dot4(bytes((word(v, i) & 0x0F0F0F0Fu) | (((h.x >> (2 * i)) & 0x03030303u) << 4), 32.f), at(x, e + 4 * i), a);
            b = dot4(bytes(((word(v, i) >> 4) & 0x0F0F0F0Fu) | (((h.y >> (2 * i)) & 0x03030303u) << 4), 32.f), at(x, e + 16 + 4 * i), b);
        }
        return first * a + second * b;
    }
};

// R rows, each the sum over this lane's pieces: lane `lane` of LANES that share the rows.
template <int T, int COLS, int LANES, int R>
__device__ __forceinline__ void lanes_dot(const Matrix* const (&m)[R], const int (&rows)[R], int lane, const float* x, float (&sum)[R]) {
    typedef Format<T> Piece;
    constexpr int pieces = COLS / Piece::E, rounds = (pieces + LANES - 1) / LANES;
    constexpr int ahead = rounds * R <= 12 ? rounds : (R >= 4 ? 2 : 8 / R);   // loads in flight before the first use
    #pragma unroll 1
    for (int i = 0; i < rounds; i += ahead) {
        Piece piece[ahead][R];
        #pragma unroll
        for (int u = 0; u < ahead; u++) {
            const int c = lane + (i + u) * LANES;
            if (c < pieces)
                #pragma unroll
                for (int r = 0; r < R; r++) piece[u][r].load(*m[r], rows[r], pieces, c);
        }
        #pragma unroll
        for (int u = 0; u < ahead; u++) {
            const int c = lane + (i + u) * LANES;
            if (c < pieces)
                #pragma unroll
                for (int r = 0; r < R; r++) sum[r] += piece[u][r].dot(x, c * Piece::E);
        }
    }
}

#ifndef TYPES                    // bit mask of the ggml types that the model has; others cost no code
#define TYPES ~0ull
#endif

template <int COLS, int LANES, int R>
__device__ __forceinline__ void dot_rows(const Matrix* const (&m)[R], const int (&rows)[R], int lane, const float* x, float (&sum)[R]) {
    #pragma unroll
    for (int r = 0; r < R; r++) sum[r] = 0.f;
    switch (m[0]->type) {
#define CASE(T) case T: if constexpr ((TYPES >> T & 1) && COLS % Format<T>::E == 0) lanes_dot<T, COLS, LANES, R>(m, rows, lane, x, sum); break;
        CASE(F32) CASE(F16) CASE(BF16) CASE(Q8_0) CASE(Q4_0) CASE(Q5_0) CASE(Q4_K) CASE(Q6_K)
#undef CASE
    }
}

// One element of a row, as ggml dequantises it.
__device__ float element(const Matrix& m, long long row, int cols, int e) {
    const int b = e >> 5, i = e & 31, k = i & 3, w = (i >> 2) & 3;
    const long long block = row * (cols / 32) + b;
    const unsigned char* low = (const unsigned char*)m.low;
    int q = m.type == Q8_0 || m.type < 2 || m.type == BF16 ? 0 : (i < 16 ? low[block * 16 + i] & 15 : low[block * 16 + i - 16] >> 4);
    switch (m.type) {
        case F32: return ((const float*)m.low)[row * cols + e];
        case F16: return __half2float(((const half*)m.low)[row * cols + e]);
        case BF16: return __uint_as_float((unsigned)((const unsigned short*)m.low)[row * cols + e] << 16);
        case Q8_0: return (float)((const signed char*)m.low)[row * cols + e] * __half2float(((const half*)m.scales)[block]);
        case Q4_0: return (float)(q - 8) * __half2float(((const half*)m.scales)[block]);
        case Q5_0: {
            unsigned h = ((const unsigned*)m.high)[block] >> (8 * k + (i < 16 ? w : 4 + w)) & 1;
            return (float)((q | h << 4) - 16) * __half2float(((const half*)m.scales)[block]);
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
