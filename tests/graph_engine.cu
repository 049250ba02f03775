// An engine that decodes by replays of a CUDA graph, for what parity_dump.h records of it.
//
//     graph_engine OUT MODE PASSES LAYERS WIDTH FF VOCAB
//
// MODE: "graph" replays one captured graph, "counted" the same without a step in device memory, "recapture" captures anew every
// 100 passes and updates the executable graph, as llama.cpp does; "ahead" captures a second graph, for the other half of the passes,
// while replays of the first wait in the stream; "eager" makes the same passes without a graph, whose records are
// blocking copies; "bare" replays a graph without checkpoints; "forked" and "forked eager" record in a second stream too, which nothing
// orders behind the first. Prints milliseconds a pass. "unplaced" and "elsewhere" capture wrongly.
#define PARITY_CUDA
#include "parity_dump.h"
#include <cuda_fp16.h>

#define CHECK(call)                                                                                                    \
    do {                                                                                                               \
        cudaError_t status = (call);                                                                                   \
        if (status != cudaSuccess) {                                                                                   \
            fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(status));                                            \
            exit(9);                                                                                                   \
        }                                                                                                              \
    } while (0)

__global__ void fill(__half *w, size_t n, unsigned seed) {
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
        unsigned h = (unsigned)i * 2654435761u ^ seed;
        h ^= h >> 15, h *= 2246822519u, h ^= h >> 13;
        w[i] = __float2half(((int)(h & 1023) - 512) / 8192.f);
    }
}
__global__ void embed(float *x, int n, const int *position) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) x[i] = sinf(*position * 0.37f + i * 0.11f);
}
// y[r] = keep[r] / 2 + sin(row r · x), a warp a row; without `keep` the sum as it is.
__global__ void multiply(const __half *w, const float *x, const float *keep, float *y, int rows, int cols) {
    int r = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x & 31;
    float sum = 0;
    if (r >= rows) return;
    for (int c = 2 * lane; c < cols; c += 64) {
        float2 two = __half22float2(*(const __half2 *)(w + (size_t)r * cols + c));
        sum = fmaf(two.x, x[c], fmaf(two.y, x[c + 1], sum));
    }
    for (int far = 16; far; far >>= 1) sum += __shfl_xor_sync(~0u, sum, far);
    if (lane == 0) y[r] = keep ? keep[r] * 0.5f + sinf(sum) : sum;
}
__global__ void advance(int *position, int *step) { ++*position, ++*step; }

struct Engine {
    int layers, width, ff, vocab;
    __half *w;
    float *x[2], *y, *h, *logits; // two buffers that swap, each overwritten two layers later
    int *place;                 // position and step
    parity_dump *dump;
    cudaStream_t stream, other;
    cudaEvent_t parts, meets;
    bool forked;
};

static int record(Engine &e, const char *point, int position, const float *value, int n, bool elsewhere = false) {
    if (!e.dump) return 0;
    return parity_checkpoint_device(e.dump, point, position, value, PARITY_F32, n, elsewhere ? e.other : e.stream);
}

// One pass; returns what the checkpoints returned.
static int pass(Engine &e, int position, bool elsewhere = false) {
    const __half *w = e.w;
    auto blocks = [](int rows) { return (rows * 32 + 255) / 256; };
    int failed = 0, now = 0;
    char name[32];
    if (e.forked) {
        CHECK(cudaEventRecord(e.parts, e.stream));
        CHECK(cudaStreamWaitEvent(e.other, e.parts, 0));
        embed<<<1, 256, 0, e.other>>>(e.y, e.width, e.place);
    }
    embed<<<1, 256, 0, e.stream>>>(e.x[0], e.width, e.place);
    failed |= record(e, "embd", position, e.x[0], e.width, elsewhere);
    if (e.forked) {
        failed |= record(e, "blk.0.attn_norm", position, e.y, e.width, true);
        CHECK(cudaEventRecord(e.meets, e.other));
    }
    for (int i = 0; i < e.layers; i++, now ^= 1) {
        multiply<<<blocks(e.ff), 256, 0, e.stream>>>(w, e.x[now], nullptr, e.h, e.ff, e.width);
        w += (size_t)e.ff * e.width;
        multiply<<<blocks(e.width), 256, 0, e.stream>>>(w, e.h, e.x[now], e.x[now ^ 1], e.width, e.ff);
        w += (size_t)e.ff * e.width;
        snprintf(name, sizeof name, "blk.%d.l_out", i);
        if (i == 0 || i == 5 || i == 10 || i == e.layers - 1) failed |= record(e, name, position, e.x[now ^ 1], e.width);
    }
    multiply<<<blocks(e.vocab), 256, 0, e.stream>>>(w, e.x[now], nullptr, e.logits, e.vocab, e.width);
    failed |= record(e, "output_norm", position, e.x[now], e.width);
    failed |= record(e, "logits", position, e.logits, e.vocab);
    if (e.forked) CHECK(cudaStreamWaitEvent(e.stream, e.meets, 0));
    advance<<<1, 1, 0, e.stream>>>(e.place, e.place + 1);
    return failed;
}

static cudaGraph_t capture(Engine &e, bool elsewhere, int *failed) {
    cudaGraph_t graph;
    CHECK(cudaStreamBeginCapture(e.stream, cudaStreamCaptureModeGlobal));
    *failed = pass(e, 0, elsewhere);
    CHECK(cudaStreamEndCapture(e.stream, &graph));
    return graph;
}

int main(int argc, char **argv) {
    if (argc < 8) return 1;
    const char *mode = argv[2];
    auto is = [mode](const char *name) { return strcmp(mode, name) == 0; };
    const int passes = atoi(argv[3]), first[2] = {7, 0};
    Engine e = {atoi(argv[4]), atoi(argv[5]), atoi(argv[6]), atoi(argv[7])};
    size_t weights = 2 * (size_t)e.layers * e.ff * e.width + (size_t)e.vocab * e.width;
    int failed = 0, tokens[] = {1, 2, 3, 4, 5, 6, 7};
    float milliseconds;
    CHECK(cudaStreamCreate(&e.stream));
    CHECK(cudaStreamCreate(&e.other));
    CHECK(cudaEventCreateWithFlags(&e.parts, cudaEventDisableTiming));
    CHECK(cudaEventCreateWithFlags(&e.meets, cudaEventDisableTiming));
    e.forked = strncmp(mode, "forked", 6) == 0;
    CHECK(cudaMalloc(&e.w, weights * sizeof *e.w));
    for (float **x : {&e.x[0], &e.x[1]}) CHECK(cudaMalloc(x, e.width * sizeof(float)));
    CHECK(cudaMalloc(&e.y, e.width * sizeof(float)));
    CHECK(cudaMalloc(&e.h, e.ff * sizeof(float)));
    CHECK(cudaMalloc(&e.logits, e.vocab * sizeof(float)));
    CHECK(cudaMalloc(&e.place, sizeof first));
    CHECK(cudaMemcpy(e.place, first, sizeof first, cudaMemcpyHostToDevice));
    fill<<<1024, 256, 0, e.stream>>>(e.w, weights, 17);
    CHECK(cudaStreamSynchronize(e.stream));
    if (!is("bare")) {
        e.dump = parity_open(argv[1]);
        parity_header(e.dump, "graphs", "m", e.layers, tokens, 7, "f32");
        parity_pass(e.dump, 0, 1);
        if (!is("unplaced")) parity_position_device(e.dump, e.place, is("counted") ? NULL : e.place + 1);
    }
    cudaEvent_t begun, ended;
    CHECK(cudaEventCreate(&begun));
    CHECK(cudaEventCreate(&ended));
    if (is("eager") || is("forked eager")) {
        CHECK(cudaEventRecord(begun, e.stream));
        for (int i = 0; i < passes && !failed; i++) {
            parity_pass(e.dump, i, 1);
            failed = pass(e, first[0] + i);
        }
        CHECK(cudaEventRecord(ended, e.stream));
    } else {
        cudaGraphExec_t replay;
        cudaGraph_t graph = capture(e, is("elsewhere"), &failed);
        CHECK(cudaGraphInstantiate(&replay, graph, 0));
        CHECK(cudaGraphDestroy(graph));
        CHECK(cudaEventRecord(begun, e.stream));
        for (int i = 0; i < passes && !failed; i++) {
            if (is("recapture") && i && i % 100 == 0) {
                cudaGraphExecUpdateResultInfo result;
                graph = capture(e, false, &failed);
                CHECK(cudaGraphExecUpdate(replay, graph, &result));
                CHECK(cudaGraphDestroy(graph));
            }
            if (is("ahead") && i == passes / 2) {
                graph = capture(e, false, &failed);
                CHECK(cudaGraphInstantiate(&replay, graph, 0));
                CHECK(cudaGraphDestroy(graph));
            }
            CHECK(cudaGraphLaunch(replay, e.stream));
        }
        CHECK(cudaEventRecord(ended, e.stream));
        if (is("graph")) CHECK(cudaGraphExecDestroy(replay));   // the last replay is staged all the same
    }
    CHECK(cudaEventSynchronize(ended));
    CHECK(cudaEventElapsedTime(&milliseconds, begun, ended));
    printf("%.6f\n", milliseconds / (passes ? passes : 1));
    if (failed) {
        fprintf(stderr, "%s\n", parity_error(e.dump));
        return 3;
    }
    return e.dump && parity_close(e.dump) ? 4 : 0;
}
