// Pieces of a weight's row and their products with activations.
//
// A lane takes 16 bytes of float types, or 16 elements of a quantised type, at a time. What it loads it keeps as it is until the product: turning
// a scale into a float would wait for it. The weights' values are exactly those of ggml's dequantisation (d * q, and d * scale * q - dmin * min
// for Q4_K); products of float types are summed up in float32, those of quantised types as integers within 16 elements.

#include "step.cuh"

// NEAR: the planes lie in shared memory, where a bulk copy has put this block's rows.
__device__ __forceinline__ unsigned near_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }
template <bool NEAR> __device__ __forceinline__ uint4 stream(const uint4* base, long long at) {
    uint4 v;
    if constexpr (NEAR) asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(near_address(base) + 16 * (unsigned)at));
    else asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(base + at));
    return v;
}
template <bool NEAR> __device__ __forceinline__ uint2 stream(const uint2* base, long long at) {
    uint2 v;
    if constexpr (NEAR) asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(near_address(base) + 8 * (unsigned)at));
    else asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(base + at));
    return v;
}

template <bool NEAR, class T> __device__ __forceinline__ T get(const T* p) {
    if constexpr (NEAR) return *p;
    else return __ldg(p);
}

__device__ __forceinline__ float dot4(float4 a, float4 b, float sum) {
    return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

// Four signed bytes times four unsigned or signed ones, added to `sum`.
__device__ __forceinline__ int dot_unsigned(unsigned weights, unsigned bytes, int sum) {
    asm("dp4a.s32.u32 %0, %1, %2, %0;" : "+r"(sum) : "r"(weights), "r"(bytes));
    return sum;
}
__device__ __forceinline__ int dot_signed(unsigned weights, unsigned bytes, int sum) {
    asm("dp4a.s32.s32 %0, %1, %2, %0;" : "+r"(sum) : "r"(weights), "r"(bytes));
    return sum;
}
__device__ __forceinline__ unsigned word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// 16 signed bytes of weights times 16 activations, in these activations' unit: three exact sums of at most 2^19, each begun with the bits of
// 1.5 · 2^23, so that a subtraction makes a float of it.
__device__ __forceinline__ float product(uint4 weights, const IntegerPiece& x) {
    int sums[3] = {0x4B400000, 0x4B400000, 0x4B400000};
    #pragma unroll
    for (int i = 0; i < 4; i++) {
        sums[0] = dot_unsigned(word(weights, i), word(x.byte[0], i), sums[0]);
        sums[1] = dot_unsigned(word(weights, i), word(x.byte[1], i), sums[1]);
        sums[2] = dot_signed(word(weights, i), word(x.byte[2], i), sums[2]);
    }
    const float low = __int_as_float(sums[0]) - 12582912.f, middle = __int_as_float(sums[1]) - 12582912.f;
    return fmaf(__int_as_float(sums[2]) - 12582912.f, 65536.f, fmaf(middle, 256.f, low));
}

template <int T, bool NEAR = false> struct Format;   // E elements a piece; load(matrix, row, pieces a row, piece); dot(activations)

template <bool NEAR> struct Format<F32, NEAR> {
    static const int E = 4;
    uint4 v;
    __device__ __forceinline__ void load(const Matrix& m, long long row, int pieces, int c) { v = stream<NEAR>(m.low, row * pieces + c); }
    using Operand = FloatPiece<E>;
    __device__ __forceinline__ float dot(const Operand& a) const {
        return dot4(make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)), a.x[0], 0.f);
    }
};
template <bool NEAR> struct Format<F16, NEAR> {
    static const int E = 8;
    uint4 v;
    __device__ __forceinline__ void load(const Matrix& m, long long row, int pieces, int c) { v = stream<NEAR>(m.low, row * pieces + c); }
    using Operand = FloatPiece<E>;
    __device__ __forceinline__ float dot(const Operand& a) const {
        float2 p = __half22float2(*(const half2*)&v.x), q = __half22float2(*(const half2*)&v.y);
        float2 r = __half22float2(*(const half2*)&v.z), s = __half22float2(*(const half2*)&v.w);
        return dot4(make_float4(p.x, p.y, q.x, q.y), a.x[0], dot4(make_float4(r.x, r.y, s.x, s.y), a.x[1], 0.f));
    }
};
template <bool NEAR> struct Format<BF16, NEAR> {
    static const int E = 8;
    uint4 v;
    __device__ __forceinline__ void load(const Matrix& m, long long row, int pieces, int c) { v = stream<NEAR>(m.low, row * pieces + c); }
    __device__ static float2 two(unsigned w) { return make_float2(__uint_as_float(w << 16), __uint_as_float(w & 0xFFFF0000u)); }
    using Operand = FloatPiece<E>;
    __device__ __forceinline__ float dot(const Operand& a) const {
        float2 p = two(v.x), q = two(v.y), r = two(v.z), s = two(v.w);
        return dot4(make_float4(p.x, p.y, q.x, q.y), a.x[0], dot4(make_float4(r.x, r.y, s.x, s.y), a.x[1], 0.f));
    }
};
// What quantised types have in common: 16 elements, whose place among all pieces of a matrix is row * pieces + c.
struct Quantised {
    static const int E = 16;
    using Operand = IntegerPiece;
};
// The nibbles of 16 elements: bytes' low ones, then their high ones.
__device__ __forceinline__ uint4 nibbles(uint2 v, unsigned mask) { return make_uint4(v.x & mask, v.y & mask, (v.x >> 4) & mask, (v.y >> 4) & mask); }

template <bool NEAR> struct Format<Q8_0, NEAR> : Quantised {
    uint4 v;
    half d;
    __device__ __forceinline__ void load(const Matrix& m, long long row, int pieces, int c) {
        v = stream<NEAR>(m.low, row * pieces + c);
        d = get<NEAR>((const half*)m.scales + (row * pieces + c) / 2);
    }
    __device__ __forceinline__ float dot(const IntegerPiece& x) const { return __half2float(d) * x.unit * product(v, x); }
};
template <bool NEAR> struct Format<Q4_0, NEAR> : Quantised {
    uint2 v;
    half d;
    __device__ __forceinline__ void load(const Matrix& m, long long row, int pieces, int c) {
        v = stream<NEAR>((const uint2*)m.low, row * pieces + c);
        d = get<NEAR>((const half*)m.scales + (row * pieces + c) / 2);
    }
    // A nibble with its highest bit turned, at the top of a byte: 16 (q - 8).
    __device__ __forceinline__ float dot(const IntegerPiece& x) const {
        const unsigned a = v.x ^ 0x88888888u, b = v.y ^ 0x88888888u, top = 0xF0F0F0F0u;
        return __half2float(d) * (x.unit / 16) * product(make_uint4(a << 4 & top, b << 4 & top, a & top, b & top), x);
    }
};
template <bool NEAR> struct Format<Q5_0, NEAR> : Quantised {
    uint2 v;
    unsigned h;
    half d;
    __device__ __forceinline__ void load(const Matrix& m, long long row, int pieces, int c) {
        v = stream<NEAR>((const uint2*)m.low, row * pieces + c);
        h = get<NEAR>((const unsigned*)m.high + (row * pieces + c) / 2);
        d = get<NEAR>((const half*)m.scales + (row * pieces + c) / 2);
    }
    // Five bits, the highest turned, at the top of a byte: 8 (q - 16).
    __device__ __forceinline__ float dot(const IntegerPiece& x) const {
        const unsigned high = ~(h >> 4 * x.half), four = 0x78787878u, top = 0x80808080u;
        return __half2float(d) * (x.unit / 8) * product(make_uint4(
            (v.x << 3 & four) | (high << 7 & top), (v.y << 3 & four) | (high << 6 & top),
            (v.x >> 1 & four) | (high << 5 & top), (v.y >> 1 & four) | (high << 4 & top)), x);
    }
};
template <bool NEAR> struct Format<Q4_K, NEAR> : Quantised {
    uint2 v;
    uchar2 s;
    half2 d;
    __device__ __forceinline__ void load(const Matrix& m, long long row, int pieces, int c) {
        v = stream<NEAR>((const uint2*)m.low, row * pieces + c);
        s = get<NEAR>((const uchar2*)m.scales + (row * pieces + c) / 2);
        d = get<NEAR>((const half2*)m.super + (row * pieces + c) / 16);
    }
    __device__ __forceinline__ float dot(const IntegerPiece& x) const {
        const float2 both = __half22float2(d);
        return x.unit * (both.x * s.x * product(nibbles(v, 0x0F0F0F0Fu), x) - both.y * s.y * x.sum);
    }
};
template <bool NEAR> struct Format<Q6_K, NEAR> : Quantised {
    uint2 v;
    unsigned h;
    signed char s;
    half d;
    __device__ __forceinline__ void load(const Matrix& m, long long row, int pieces, int c) {
        v = stream<NEAR>((const uint2*)m.low, row * pieces + c);
        h = get<NEAR>((const unsigned*)m.high + row * pieces + c);
        s = get<NEAR>((const signed char*)m.scales + row * pieces + c);
        d = get<NEAR>((const half*)m.super + (row * pieces + c) / 16);
    }
    // Six bits, the highest turned, at the top of a byte: 4 (q - 32).
    __device__ __forceinline__ float dot(const IntegerPiece& x) const {
        const unsigned high = h ^ 0xAAAAAAAAu, four = 0x3C3C3C3Cu, top = 0xC0C0C0C0u;
        return __half2float(d) * s * (x.unit / 4) * product(make_uint4(
            (v.x << 2 & four) | (high << 6 & top), (v.y << 2 & four) | (high << 4 & top),
            (v.x >> 2 & four) | (high << 2 & top), (v.y >> 2 & four) | (high & top)), x);
    }
};
