// Values that blocks pass to each other within a step: a float and the step's number in one 64-bit word.
//
// A block that needs a value reads its word until the number is this step's. A word is written and read as a whole, so that neither a
// grid-wide barrier nor a fence is needed between the block that makes a value and one that takes it (NCCL's LL protocol). A word
// belongs to one value of one layer and is written once a step; a step begins when all blocks have finished the last one.

#ifndef PAUSE                    // nanoseconds between reads: constant polling slows down the writer (docs/benchmarks-log.md)
#define PAUSE 50
#endif
#ifndef FIRST_PAUSE              // before the first read of the residual stream behind attention: looking too early slows down those
#define FIRST_PAUSE 400          // blocks that still make it (docs/benchmarks-log.md)
#endif
typedef unsigned long long Word;

__device__ __forceinline__ void tell(Word* to, float value, unsigned step) {
    const Word word = (Word)step << 32 | __float_as_uint(value);
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" :: "l"(to), "l"(word) : "memory");
}
__device__ __forceinline__ Word look(const Word* from) {
    Word word;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(word) : "l"(from) : "memory");
    return word;
}
__device__ __forceinline__ void look_at_two(const Word* from, Word& a, Word& b) {
    asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(a), "=l"(b) : "l"(from) : "memory");
}
__device__ __forceinline__ bool told(Word word, unsigned step) { return (unsigned)(word >> 32) == step; }
__device__ __forceinline__ float value_of(Word word) { return __uint_as_float((unsigned)word); }

// Half the bytes, for many values taken by many blocks: a float whose two lowest bits are those of the step's number. The block that
// computes the value rounds it first, so that what is recorded is what is taken. The last step's word has other bits, and every step
// writes every word.
__device__ __forceinline__ float short_of(float value) {
    const unsigned bits = __float_as_uint(value);
    return __uint_as_float((isfinite(value) ? bits + 2 : bits) & ~3u);
}
__device__ __forceinline__ void tell_short(unsigned* to, float value, unsigned step) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" :: "l"(to), "r"(__float_as_uint(value) | (step & 3)) : "memory");
}
__device__ __forceinline__ uint4 look_at_four(const unsigned* from) {
    uint4 words;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w) : "l"(from) : "memory");
    return words;
}
__device__ __forceinline__ bool told_four(uint4 w, unsigned step) {
    return !(((w.x ^ step) | (w.y ^ step) | (w.z ^ step) | (w.w ^ step)) & 3);
}
__device__ __forceinline__ float4 values_of(uint4 w) {
    return make_float4(__uint_as_float(w.x & ~3u), __uint_as_float(w.y & ~3u), __uint_as_float(w.z & ~3u), __uint_as_float(w.w & ~3u));
}

// N values, all requested at once: at(i) is the word of the i-th, or null for a value of 0.
template <int N, class At> __device__ __forceinline__ void hear(const At& at, unsigned step, float (&values)[N]) {
    Word words[N];
    bool all;
    do {
        all = true;
        #pragma unroll
        for (int i = 0; i < N; i++) words[i] = at(i) ? look(at(i)) : (Word)step << 32;
        #pragma unroll
        for (int i = 0; i < N; i++) all &= told(words[i], step);
        if (!all) __nanosleep(PAUSE);
    } while (!all);
    #pragma unroll
    for (int i = 0; i < N; i++) values[i] = value_of(words[i]);
}
// The same for adjacent pairs: at(i) is the word of the i-th pair's first value. WAIT: nanoseconds between reads; none where few blocks
// read, or where most values are there at the first look.
template <int N, int WAIT = PAUSE, class At> __device__ __forceinline__ void hear_pairs(const At& at, unsigned step, float2 (&values)[N]) {
    Word words[N][2];
    bool all;
    do {
        all = true;
        #pragma unroll
        for (int i = 0; i < N; i++) {
            words[i][0] = words[i][1] = (Word)step << 32;
            if (at(i)) look_at_two(at(i), words[i][0], words[i][1]);
        }
        #pragma unroll
        for (int i = 0; i < N; i++) all &= told(words[i][0], step) & told(words[i][1], step);
        if (WAIT && !all) __nanosleep(WAIT);
    } while (!all);
    #pragma unroll
    for (int i = 0; i < N; i++) values[i] = make_float2(value_of(words[i][0]), value_of(words[i][1]));
}
