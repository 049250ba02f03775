// Attention of a decode step: the shares of each head, and their sum.

#include "step.cuh"

__device__ __forceinline__ float dot2(float2 a, float2 b, float sum) { return fmaf(a.y, b.y, fmaf(a.x, b.x, sum)); }

// weight · a + sum · before
__device__ __forceinline__ float2 scaled_add(float weight, float2 a, float2 sum, float before) {
    return make_float2(fmaf(weight, a.x, sum.x * before), fmaf(weight, a.y, sum.y * before));
}

// One head over one share of the positions: raw scores, exp(score · scale − peak) and the values weighted by it. The row of
// this step comes as words, earlier ones from the cache. A lane takes neighbouring elements of a row, two by two.
__device__ void attend(Shared& s, const Layer& l, int head, int split, int splits, int seen, float scale, unsigned step) {
    static_assert(HEAD % 2 == 0, "elements two by two");
    constexpr int EACH = (HEAD + 63) / 64, HELD = SPLIT_ROWS / WARPS;   // positions of a warp whose K and V are fetched at once
    const int from = seen * split / splits, to = seen * (split + 1) / splits, count = to - from, now = seen - 1 - from;
    const int warp = this_thread() >> 5, lane = this_thread() & 31;
    const float *keys = l.k_cache + (long long)from * KW + head / GROUP * HEAD, *values = l.v_cache + (keys - l.k_cache);
    const float2 none = make_float2(0.f, 0.f);
    float2 k[HELD][EACH], v[HELD][EACH], heard[3 * EACH];
    const float2 *q = heard, *new_k = heard + EACH, *new_v = heard + 2 * EACH;
    #pragma unroll
    for (int h = 0; h < HELD; h++)
        #pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int e = 2 * lane + 64 * i, p = warp + h * WARPS;
            const bool there = e < HEAD && p < count && p != now;
            k[h][i] = there ? __ldcg((const float2*)(keys + p * KW + e)) : none;
            v[h][i] = there ? __ldcg((const float2*)(values + p * KW + e)) : none;
        }
    const bool here = now < count && now % WARPS == warp;
    hear_pairs([&](int i) -> const Word* {
        const int e = 2 * lane + 64 * (i % EACH), base = i < EACH ? Q_WORDS + head * HEAD
            : (i < 2 * EACH ? K_WORDS : V_WORDS) + head / GROUP * HEAD;
        return e < HEAD && (i < EACH || here) ? l.words + base + e : nullptr;
    }, step, heard);
    #pragma unroll
    for (int h = 0; h < HELD; h++)
        if (warp + h * WARPS == now)
            #pragma unroll
            for (int i = 0; i < EACH; i++) { k[h][i] = new_k[i]; v[h][i] = new_v[i]; }
    float dots[HELD], peak = -INFINITY, total = 0.f;
    float2 acc[EACH];
    #pragma unroll
    for (int i = 0; i < EACH; i++) acc[i] = none;
    #pragma unroll
    for (int h = 0; h < HELD; h++) {
        dots[h] = 0.f;
        #pragma unroll
        for (int i = 0; i < EACH; i++) dots[h] = dot2(q[i], k[h][i], dots[h]);
    }
    #pragma unroll
    for (int far = 16; far; far >>= 1)
        #pragma unroll
        for (int h = 0; h < HELD; h++) dots[h] += __shfl_xor_sync(~0u, dots[h], far);
    #pragma unroll
    for (int h = 0; h < HELD; h++)
        if (warp + h * WARPS < count) {
            if (lane == 0) l.kq[head * POSITIONS + from + warp + h * WARPS] = dots[h];
            peak = fmaxf(peak, dots[h] * scale);
        }
    #pragma unroll
    for (int h = 0; h < HELD; h++)
        if (warp + h * WARPS < count) {
            const float w = expf(dots[h] * scale - peak);
            total += w;
            #pragma unroll
            for (int i = 0; i < EACH; i++) acc[i] = scaled_add(w, v[h][i], acc[i], 1.f);
        }
    #pragma unroll 1
    for (int p = warp + SPLIT_ROWS; p < count; p += WARPS) {   // the sums so far are rescaled where the peak grows
        float dot = 0.f;
        float2 value[EACH];
        #pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int e = 2 * lane + 64 * i;
            value[i] = e >= HEAD ? none : p == now ? new_v[i] : __ldcg((const float2*)(values + p * KW + e));
            dot = dot2(q[i], e >= HEAD ? none : p == now ? new_k[i] : __ldcg((const float2*)(keys + p * KW + e)), dot);
        }
        for (int far = 16; far; far >>= 1) dot += __shfl_xor_sync(~0u, dot, far);
        if (lane == 0) l.kq[head * POSITIONS + from + p] = dot;
        const float higher = fmaxf(peak, dot * scale), before = expf(peak - higher), w = expf(dot * scale - higher);
        total = total * before + w;
        #pragma unroll
        for (int i = 0; i < EACH; i++) acc[i] = scaled_add(w, value[i], acc[i], before);
        peak = higher;
    }
    #pragma unroll
    for (int i = 0; i < EACH; i++) if (2 * lane + 64 * i < HEAD) *(float2*)&s.mixed[warp][2 * lane + 64 * i] = acc[i];
    if (lane == 0) { s.peak[warp] = peak; s.total[warp] = total; }
    block_sync();
    // Each warp combines the results of all warps: lane w has the share of warp w.
    static_assert(HEAD <= THREADS && WARPS == 16, "a thread takes one element, half a warp the warps");
    const long long slot = (long long)head * SPLITS + split;
    if (warp * 32 >= HEAD && warp != WARPS - 1) return;        // it has no element, and is not the one that tells peak and sum
    const float its_peak = s.peak[lane % WARPS];
    float top = its_peak, sum = 0.f;
    for (int far = WARPS / 2; far; far >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, far));
    const float share = expf(its_peak - top);
    #pragma unroll
    for (int w = 0; w < WARPS; w++) {
        const float its_share = __shfl_sync(~0u, share, w);
        if (this_thread() < HEAD) sum = fmaf(its_share, s.mixed[w][this_thread()], sum);
    }
    if (this_thread() < HEAD) tell(l.words + MIXED_WORDS + slot * HEAD + this_thread(), sum, step);
    total = share * s.total[lane % WARPS];
    for (int far = WARPS / 2; far; far >>= 1) total += __shfl_xor_sync(~0u, total, far);
    if (this_thread() == THREADS - 1) {
        tell(l.words + SUMS_WORDS + slot * 2, top, step);
        tell(l.words + SUMS_WORDS + slot * 2 + 1, total, step);
    }
}

// The shares of each head combined -> x; one block stores them as kqv_out, with each head's peak and 1 / sum. A thread takes two
// neighbouring elements.
__device__ void merge(Shared& s, const Layer& l, int splits, unsigned step) {
    constexpr int TOGETHER = SPLITS < 3 ? SPLITS : 3;
    #pragma unroll 1
    for (int e = 2 * this_thread(); e < QW; e += 2 * THREADS) {
        const int head = e / HEAD;
        float peak = -INFINITY, total = 0.f;
        float2 value = make_float2(0.f, 0.f);
        if (splits == 1) {
            const Word *sums = l.words + SUMS_WORDS + head * SPLITS * 2, *mixed = l.words + MIXED_WORDS + head * SPLITS * HEAD + e % HEAD;
            float2 heard[2];
            hear_pairs([&](int i) -> const Word* { return i ? mixed : sums; }, step, heard);
            peak = heard[0].x; total = heard[0].y; value = heard[1];
        } else
        #pragma unroll 1
        for (int from = 0; from < splits; from += TOGETHER) {   // the running sums are rescaled where the peak grows
            const Word *sums = l.words + SUMS_WORDS + (head * SPLITS + from) * 2,
                       *mixed = l.words + MIXED_WORDS + (head * SPLITS + from) * HEAD + e % HEAD;
            float2 heard[2 * TOGETHER];                         // peak and sum, and two values, of each share
            hear_pairs([&](int i) -> const Word* {
                const int share = i / 2;
                return from + share >= splits ? nullptr : i % 2 ? mixed + share * HEAD : sums + share * 2;
            }, step, heard);
            float now = peak;
            #pragma unroll
            for (int i = 0; i < TOGETHER; i++) {
                if (from + i >= splits) heard[2 * i].x = -INFINITY;
                now = fmaxf(now, heard[2 * i].x);
            }
            const float before = expf(peak - now);
            total *= before; value.x *= before; value.y *= before;
            peak = now;
            #pragma unroll
            for (int i = 0; i < TOGETHER; i++) {
                const float w = expf(heard[2 * i].x - now);
                total = fmaf(w, heard[2 * i].y, total);
                value.x = fmaf(w, heard[2 * i + 1].x, value.x);
                value.y = fmaf(w, heard[2 * i + 1].y, value.y);
            }
        }
        const float share = 1.f / total;
        value.x *= share; value.y *= share;
        s.x.put<2, QW % 64 == 0>(e, {value.x, value.y});
        if (this_block() == KEEPER) {
            *(float2*)(l.kqv_out + e) = value;
            if (e % HEAD == 0) *(float2*)(l.peaks + 2 * head) = make_float2(peak, share);
        }
    }
    block_sync();
}
