// Attention of a decode step: the shares of each head, and their sum.

#include "step.cuh"

// One head over one share of the positions: raw scores, exp(score · scale − peak) and the values weighted by it. The row of
// this step comes as words, earlier ones from the cache.
__device__ void attend(Shared& s, const Layer& l, int head, int split, int splits, int seen, float scale, unsigned step) {
    constexpr int EACH = (HEAD + 31) / 32, HELD = SPLIT_ROWS / WARPS;   // positions of a warp whose K and V are fetched at once
    const int from = seen * split / splits, to = seen * (split + 1) / splits, count = to - from, now = seen - 1 - from;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const float *keys = l.k_cache + (long long)from * KW + head / GROUP * HEAD, *values = l.v_cache + (keys - l.k_cache);
    float k[HELD][EACH], v[HELD][EACH], heard[3 * EACH];
    const float *q = heard, *new_k = heard + EACH, *new_v = heard + 2 * EACH;
    #pragma unroll
    for (int h = 0; h < HELD; h++)
        #pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int e = lane + 32 * i, p = warp + h * WARPS;
            const bool there = e < HEAD && p < count && p != now;
            k[h][i] = there ? __ldcg(keys + p * KW + e) : 0.f;
            v[h][i] = there ? __ldcg(values + p * KW + e) : 0.f;
        }
    const bool here = now < count && now % WARPS == warp;
    hear([&](int i) -> const Word* {
        const int e = lane + 32 * (i % EACH), base = i < EACH ? Q_WORDS + head * HEAD
            : (i < 2 * EACH ? K_WORDS : V_WORDS) + head / GROUP * HEAD;
        return e < HEAD && (i < EACH || here) ? l.words + base + e : nullptr;
    }, step, heard);
    #pragma unroll
    for (int h = 0; h < HELD; h++)
        if (warp + h * WARPS == now)
            #pragma unroll
            for (int i = 0; i < EACH; i++) { k[h][i] = new_k[i]; v[h][i] = new_v[i]; }
    float dots[HELD], acc[EACH] = {}, peak = -INFINITY, total = 0.f;
    #pragma unroll
    for (int h = 0; h < HELD; h++) {
        dots[h] = 0.f;
        #pragma unroll
        for (int i = 0; i < EACH; i++) dots[h] = fmaf(q[i], k[h][i], dots[h]);
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
            for (int i = 0; i < EACH; i++) acc[i] = fmaf(w, v[h][i], acc[i]);
        }
    #pragma unroll 1
    for (int p = warp + SPLIT_ROWS; p < count; p += WARPS) {   // the sums so far are rescaled where the peak grows
        float dot = 0.f, value[EACH];
        #pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int e = lane + 32 * i;
            if (e < HEAD) dot = fmaf(q[i], p == now ? new_k[i] : __ldcg(keys + p * KW + e), dot);
            value[i] = e < HEAD ? (p == now ? new_v[i] : __ldcg(values + p * KW + e)) : 0.f;
        }
        for (int far = 16; far; far >>= 1) dot += __shfl_xor_sync(~0u, dot, far);
        if (lane == 0) l.kq[head * POSITIONS + from + p] = dot;
        const float higher = fmaxf(peak, dot * scale), before = expf(peak - higher), w = expf(dot * scale - higher);
        total = total * before + w;
        #pragma unroll
        for (int i = 0; i < EACH; i++) acc[i] = fmaf(w, value[i], acc[i] * before);
        peak = higher;
    }
    #pragma unroll
    for (int i = 0; i < EACH; i++) { int e = lane + 32 * i; if (e < HEAD) s.mixed[warp][e] = acc[i]; }
    if (lane == 0) { s.peak[warp] = peak; s.total[warp] = total; }
    block_sync();
    // Each warp puts the warps' results together: lane w has the share of warp w.
    static_assert(HEAD <= THREADS && WARPS == 16, "a thread takes one element, half a warp the warps");
    const long long slot = (long long)head * SPLITS + split;
    const float its_peak = s.peak[lane % WARPS];
    float top = its_peak, sum = 0.f;
    for (int far = WARPS / 2; far; far >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, far));
    const float share = expf(its_peak - top);
    #pragma unroll
    for (int w = 0; w < WARPS; w++) {
        const float its_share = __shfl_sync(~0u, share, w);
        if (threadIdx.x < HEAD) sum = fmaf(its_share, s.mixed[w][threadIdx.x], sum);
    }
    if (threadIdx.x < HEAD) tell(l.words + MIXED_WORDS + slot * HEAD + threadIdx.x, sum, step);
    total = share * s.total[lane % WARPS];
    for (int far = WARPS / 2; far; far >>= 1) total += __shfl_xor_sync(~0u, total, far);
    if (threadIdx.x == THREADS - 1) {
        tell(l.words + SUMS_WORDS + slot * 2, top, step);
        tell(l.words + SUMS_WORDS + slot * 2 + 1, total, step);
    }
    block_sync();
}

// The shares of each head put together -> x; block 0 keeps them as kqv_out, and each head's peak and 1 / sum.
__device__ void merge(Shared& s, const Layer& l, int splits, unsigned step) {
    constexpr int EACH = (QW + THREADS - 1) / THREADS, TOGETHER = SPLITS < 3 ? SPLITS : 3;
    float peak[EACH], total[EACH], value[EACH];
    #pragma unroll
    for (int n = 0; n < EACH; n++) { peak[n] = -INFINITY; total[n] = value[n] = 0.f; }
    #pragma unroll 1
    for (int from = 0; from < splits; from += TOGETHER) {   // the running sums are rescaled where the peak grows
        Word peaks[EACH][TOGETHER], sums[EACH][TOGETHER], values[EACH][TOGETHER];
        bool all;
        do {
            all = true;
            #pragma unroll
            for (int n = 0; n < EACH; n++)
                #pragma unroll
                for (int i = 0; i < TOGETHER; i++) {
                    const int e = threadIdx.x + n * THREADS, slot = e / HEAD * SPLITS + from + i;
                    peaks[n][i] = (Word)step << 32 | 0xFF800000u;   // minus infinity
                    sums[n][i] = values[n][i] = (Word)step << 32;
                    if (e < QW && from + i < splits) {
                        look_at_two(l.words + SUMS_WORDS + 2 * slot, peaks[n][i], sums[n][i]);
                        values[n][i] = look(l.words + MIXED_WORDS + slot * HEAD + e % HEAD);
                    }
                }
            #pragma unroll
            for (int n = 0; n < EACH; n++)
                #pragma unroll
                for (int i = 0; i < TOGETHER; i++) all &= told(peaks[n][i], step) & told(sums[n][i], step) & told(values[n][i], step);
            if (!all) __nanosleep(PAUSE);
        } while (!all);
        #pragma unroll
        for (int n = 0; n < EACH; n++) {
            float now = peak[n];
            #pragma unroll
            for (int i = 0; i < TOGETHER; i++) now = fmaxf(now, value_of(peaks[n][i]));
            const float before = expf(peak[n] - now);
            total[n] *= before;
            value[n] *= before;
            peak[n] = now;
            #pragma unroll
            for (int i = 0; i < TOGETHER; i++) {
                const float w = expf(value_of(peaks[n][i]) - now);
                total[n] += w * value_of(sums[n][i]);
                value[n] += w * value_of(values[n][i]);
            }
        }
    }
    #pragma unroll
    for (int n = 0; n < EACH; n++) {
        const int e = threadIdx.x + n * THREADS, head = e / HEAD;
        if (e >= QW) break;
        value[n] /= total[n];
        s.x[padded(e)] = value[n];
        if (blockIdx.x == 0) {
            l.kqv_out[e] = value[n];
            if (e % HEAD == 0) { l.peaks[2 * head] = peak[n]; l.peaks[2 * head + 1] = 1.f / total[n]; }
        }
    }
    block_sync();
}
