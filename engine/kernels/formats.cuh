// Pieces of a weight's row and their products with float32 activations.
//
// A lane takes 16 bytes of float types, or one block of 32 elements of a quantised type, at a time. Activations are padded
// by 4 floats after every 32, so that lanes 4, 8 or 32 elements apart read different banks. Accumulation is float32;
// the weights' values are exactly those of ggml's dequantisation (d * q, and d * scale * q - dmin * min for Q4_K).

#include "weights.cuh"

// NEAR: the planes lie in shared memory, where a bulk copy has put this block's rows.
template <bool NEAR> __device__ __forceinline__ uint4 stream(const uint4* p) {
    if constexpr (NEAR) return *p;
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

template <bool NEAR, class T> __device__ __forceinline__ T get(const T* p) {
    if constexpr (NEAR) return *p;
    else return __ldg(p);
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

// Where a piece finds its activations, four at a time: in shared memory, or in registers that serve many rows.
struct FromShared {
    const float* x;
    int e;
    __device__ __forceinline__ float4 operator()(int offset) const { return *(const float4*)(x + padded(e + offset)); }
};
template <int E> struct FromRegisters {
    float4 x[E / 4];
    __device__ __forceinline__ float4 operator()(int offset) const { return x[offset / 4]; }
};
__device__ __forceinline__ unsigned word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

template <int T, bool NEAR = false> struct Format;   // E elements a piece; load(matrix, row, pieces a row, piece); dot(x, first element)

template <bool NEAR> struct Format<F32, NEAR> {
    static const int E = 4;
    uint4 v;
    __device__ __forceinline__ void load(const Matrix& m, long long row, int pieces, int c) { v = stream<NEAR>(m.low + row * pieces + c); }
    template <class X> __device__ __forceinline__ float dot(const X& x) const {
        return dot4(make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)), x(0), 0.f);
    }
};
template <bool NEAR> struct Format<F16, NEAR> {
    static const int E = 8;
    uint4 v;
    __device__ __forceinline__ void load(const Matrix& m, long long row, int pieces, int c) { v = stream<NEAR>(m.low + row * pieces + c); }
    template <class X> __device__ __forceinline__ float dot(const X& x) const {
        float2 a = __half22float2(*(const half2*)&v.x), b = __half22float2(*(const half2*)&v.y);
        float2 c = __half22float2(*(const half2*)&v.z), d = __half22float2(*(const half2*)&v.w);
        return dot4(make_float4(a.x, a.y, b.x, b.y), x(0), dot4(make_float4(c.x, c.y, d.x, d.y), x(4), 0.f));
    }
};
template <bool NEAR> struct Format<BF16, NEAR> {
    static const int E = 8;
    uint4 v;
    __device__ __forceinline__ void load(const Matrix& m, long long row, int pieces, int c) { v = stream<NEAR>(m.low + row * pieces + c); }
    __device__ static float2 two(unsigned w) { return make_float2(__uint_as_float(w << 16), __uint_as_float(w & 0xFFFF0000u)); }
    template <class X> __device__ __forceinline__ float dot(const X& x) const {
        float2 a = two(v.x), b = two(v.y), c = two(v.z), d = two(v.w);
        return dot4(make_float4(a.x, a.y, b.x, b.y), x(0), dot4(make_float4(c.x, c.y, d.x, d.y), x(4), 0.f));
    }
};
template <bool NEAR> struct Format<Q8_0, NEAR> {
    static const int E = 32;
    uint4 v, w;
    float d;
    __device__ __forceinline__ void load(const Matrix& m, long long row, int pieces, int c) {
        long long b = row * pieces + c;
        v = stream<NEAR>(m.low + 2 * b);
        w = stream<NEAR>(m.low + 2 * b + 1);
        d = __half2float(get<NEAR>((const half*)m.scales + b));
    }
    template <class X> __device__ __forceinline__ float dot(const X& x) const {
        float sum = 0.f;
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            sum = dot4(bytes(word(v, i) ^ 0x80808080u, 128.f), x(4 * i), sum);
            sum = dot4(bytes(word(w, i) ^ 0x80808080u, 128.f), x(16 + 4 * i), sum);
        }
        return d * sum;
    }
};
template <bool NEAR> struct Format<Q4_0, NEAR> {
    static const int E = 32;
    uint4 v;
    float d;
    __device__ __forceinline__ void load(const Matrix& m, long long row, int pieces, int c) {
        long long b = row * pieces + c;
        v = stream<NEAR>(m.low + b);
        d = __half2float(get<NEAR>((const half*)m.scales + b));
    }
    template <class X> __device__ __forceinline__ float dot(const X& x) const {
        float sum = 0.f;
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            sum = dot4(bytes(word(v, i) & 0x0F0F0F0Fu, 8.f), x(4 * i), sum);
            sum = dot4(bytes((word(v, i) >> 4) & 0x0F0F0F0Fu, 8.f), x(16 + 4 * i), sum);
        }
        return d * sum;
    }
};
template <bool NEAR> struct Format<Q5_0, NEAR> {
    static const int E = 32;
    uint4 v;
    unsigned h;
    float d;
    __device__ __forceinline__ void load(const Matrix& m, long long row, int pieces, int c) {
        long long b = row * pieces + c;
        v = stream<NEAR>(m.low + b);
        h = get<NEAR>((const unsigned*)m.high + b);
        d = __half2float(get<NEAR>((const half*)m.scales + b));
    }
    template <class X> __device__ __forceinline__ float dot(const X& x) const {
        float sum = 0.f;
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            sum = dot4(bytes((word(v, i) & 0x0F0F0F0Fu) | (((h >> i) & 0x01010101u) << 4), 16.f), x(4 * i), sum);
            sum = dot4(bytes(((word(v, i) >> 4) & 0x0F0F0F0Fu) | (((h >> (4 + i)) & 0x01010101u) << 4), 16.f), x(16 + 4 * i), sum);
        }
        return d * sum;
    }
};
template <bool NEAR> struct Format<Q4_K, NEAR> {
    static const int E = 32;
    uint4 v;
    float scale, low;
    __device__ __forceinline__ void load(const Matrix& m, long long row, int pieces, int c) {
        long long b = row * pieces + c;
        v = stream<NEAR>(m.low + b);
        uchar2 s = get<NEAR>((const uchar2*)m.scales + b);
        float2 d = __half22float2(get<NEAR>((const half2*)m.super + b / 8));
        scale = d.x * s.x;
        low = d.y * s.y;
    }
    template <class X> __device__ __forceinline__ float dot(const X& x) const {
        float sum = 0.f, ones = 0.f;
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            float4 a = x(4 * i), b = x(16 + 4 * i);
            sum = dot4(bytes(word(v, i) & 0x0F0F0F0Fu, 0.f), a, sum);
            sum = dot4(bytes((word(v, i) >> 4) & 0x0F0F0F0Fu, 0.f), b, sum);
            ones += ((a.x + a.y) + (a.z + a.w)) + ((b.x + b.y) + (b.z + b.w));
        }
        return scale * sum - low * ones;
    }
};
template <bool NEAR> struct Format<Q6_K, NEAR> {
    static const int E = 32;
    uint4 v;
    uint2 h;
    float first, second;
    __device__ __forceinline__ void load(const Matrix& m, long long row, int pieces, int c) {
        long long b = row * pieces + c;
        v = stream<NEAR>(m.low + b);
        h = get<NEAR>((const uint2*)m.high + b);
        char2 s = get<NEAR>((const char2*)m.scales + b);
        float d = __half2float(get<NEAR>((const half*)m.super + b / 8));
        first = d * s.x;
        second = d * s.y;
    }
    template <class X> __device__ __forceinline__ float dot(const X& x) const {
        float a = 0.f, b = 0.f;
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            a = dot4(bytes((word(v, i) & 0x0F0F0F0Fu) | (((h.x >> (2 * i)) & 0x03030303u) << 4), 32.f), x(4 * i), a);
            b = dot4(bytes(((word(v, i) >> 4) & 0x0F0F0F0Fu) | (((h.y >> (2 * i)) & 0x03030303u) << 4), 32.f), x(16 + 4 * i), b);
        }
        return first * a + second * b;
    }
};
