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

#ifndef TYPES                    // bit mask of the ggml types that the model has; others cost no code
#define TYPES ~0ull
#endif
constexpr bool ONE_TYPE = (TYPES & (TYPES - 1)) == 0;
constexpr int only_type(unsigned long long mask) { int t = 0; while (mask >>= 1) t++; return t; }
constexpr int ONLY_TYPE = only_type(TYPES);
__device__ __forceinline__ int type_of(const Matrix& m) { return ONE_TYPE ? ONLY_TYPE : (int)m.type; }

__device__ __forceinline__ int padded(int e) { return e + ((e >> 5) << 2); }

// NEAR: the planes lie in shared memory, where a bulk copy has put this block's rows.
template <bool NEAR> __device__ __forceinline__ uint4 stream(const uint4* p) {
    if constexpr (NEAR) { __builtin_assume(__isShared(p)); return *p; }
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

template <bool NEAR, class T> __device__ __forceinline__ T get(const T* p) {
    if constexpr (NEAR) { __builtin_assume(__isShared(p)); return *p; }
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


// A plane's bytes for a block of 32 elements, times 8 (K-quants share two or four bytes among 8 blocks).
enum { LOW_PLANE, HIGH_PLANE, SCALES_PLANE, SUPER_PLANE };
__device__ __forceinline__ int eighths(int type, int plane) {
    switch (plane) {
        case LOW_PLANE: return 8 * (type == F32 ? 128 : type == F16 || type == BF16 ? 64 : type == Q8_0 ? 32 : 16);
        case HIGH_PLANE: return 8 * (type == Q5_0 ? 4 : type == Q6_K ? 8 : 0);
        case SCALES_PLANE: return 8 * (type == F32 || type == F16 || type == BF16 ? 0 : 2);
        default: return type == Q4_K ? 4 : type == Q6_K ? 2 : 0;
    }
}

// Bulk copies of a block's rows into shared memory end in a barrier of shared memory.
__device__ __forceinline__ unsigned near_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void await(const unsigned long long* full, unsigned phase) {
    asm volatile("{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n@!done bra again;\n}"
                 :: "r"(near_address(full)), "r"(phase) : "memory");
}
// Rows [first, first + rows) of a plane: where they begin, and where the planes before leave room for them.
struct Place { unsigned long long from; unsigned offset, size, skip; };
__device__ __forceinline__ Place place_of(const Matrix& m, int plane, int first, int rows, int cols, unsigned offset) {
    const int row = eighths(type_of(m), plane) * (cols / 32) / 8;
    if (!row) return Place{0, offset, 0, 0};
    const void* start = plane == LOW_PLANE ? (const void*)m.low : plane == HIGH_PLANE ? m.high : plane == SCALES_PLANE ? m.scales : m.super;
    const unsigned long long from = (unsigned long long)start + (unsigned long long)first * row;
    const unsigned skip = from & 15;
    return Place{from - skip, offset, (skip + (unsigned)rows * row + 15) & ~15u, skip};
}
__device__ __forceinline__ unsigned places_end(const Matrix& m, int first, int rows, int cols, unsigned offset) {
    for (int k = 0; k < 4; k++) offset += place_of(m, k, first, rows, cols, offset).size;
    return offset;
}
// The matrix as if all of it were there: only those rows may be read.
__device__ Matrix near_matrix(const Matrix& m, char* base, int first, int rows, int cols, unsigned& offset) {
    Matrix here = m;
    const void* out[4];
    #pragma unroll
    for (int k = 0; k < 4; k++) {
        const Place p = place_of(m, k, first, rows, cols, offset);
        out[k] = p.size ? base + p.offset + p.skip - (long long)first * (eighths(type_of(m), k) * (cols / 32) / 8) : nullptr;
        offset += p.size;
    }
    here.low = (const uint4*)out[0]; here.high = out[1]; here.scales = out[2]; here.super = out[3];
    return here;
}
__device__ __forceinline__ void leave(unsigned long long* used) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" :: "r"(near_address(used)) : "memory");
}
__device__ __forceinline__ void expect(unsigned long long* full, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" :: "r"(near_address(full)), "r"(bytes) : "memory");
}

// The dot products of R rows with x by LANES lanes; `sum` holds this lane's share.
//
// Where all matrices of the model have one type, `load` fetches the first pieces into registers before x is known: called
// ahead of a barrier, it hides the memory's latency behind the barrier's.
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

    // This lane's activations, for all the rows it will take; only where they are few and of one type.
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

// One element of a row, as ggml dequantises it.
__device__ __noinline__ float element(const Matrix& m, long long row, int cols, int e) {
    const int type = type_of(m), b = e >> 5, i = e & 31, k = i & 3, w = (i >> 2) & 3;
    const long long block = row * (cols / 32) + b;
    const unsigned char* low = (const unsigned char*)m.low;
    int q = type == Q8_0 || type < 2 || type == BF16 ? 0 : (i < 16 ? low[block * 16 + i] & 15 : low[block * 16 + i - 16] >> 4);
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
