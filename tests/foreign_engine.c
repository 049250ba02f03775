/* A small engine of somebody else's: Qwen2 and Llama in float32, one position at a time, straight from a GGUF file of F32 weights.
 *
 *   foreign_engine MODEL 1,2,3 OUT [FAULT [POINTS]]
 *
 * FAULT is a mistake that engines make: "swap" keeps pointers to two buffers that swap each layer and writes them at the end
 * of the pass; "rope" rotates the other architecture's pairs, "late" does so from layer 7 on, "layers:2,5" in those layers only. "deaf-layers:2"
 * besides takes no injected values. POINTS are the names to record, with
 * commas; without them the embedding, all layers' outputs, the last norm and the logits. What it cannot compute it refuses. */
#include "parity_dump.h"

#define LAYERS 64
#define MAX_TOKENS 256

typedef struct {
    char name[64];
    uint64_t dims[4];
    const float *data;
} tensor;

static unsigned char *file;
static size_t at;
static tensor tensors[2048];
static int n_tensors, n_layers, width, heads, kv_heads, n_ff, head_size;
static char architecture[32];
static float eps = 1e-6f, rope_base = 10000.0f;

static uint64_t number(int bytes) {
    uint64_t value = 0;
    memcpy(&value, file + at, (size_t)bytes);
    at += (size_t)bytes;
    return value;
}

static void text(char *into, size_t room) {
    size_t length = number(8), kept = length < room - 1 ? length : room - 1;
    memcpy(into, file + at, kept);
    into[kept] = 0;
    at += length;
}

static int ends(const char *name, const char *end) {
    size_t a = strlen(name), b = strlen(end);
    return a >= b && strcmp(name + a - b, end) == 0;
}

static void skip(int type) {
    static const int sizes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    if (type == 8) {
        size_t length = number(8);
        at += length;
    } else if (type == 9) {
        int inner = (int)number(4);
        uint64_t count = number(8);
        while (count--) skip(inner);
    } else {
        at += (size_t)sizes[type];
    }
}

static int refuse(const char *why) {
    fprintf(stderr, "foreign_engine: %s\n", why);
    exit(2);
}

static void fact(const char *key, int type) {
    uint64_t raw = 0;
    float real;
    if (type == 8 && strcmp(key, "general.architecture") == 0) {
        text(architecture, sizeof architecture);
        return;
    }
    if (type != 4 && type != 5 && type != 6) {
        skip(type);
        return;
    }
    raw = number(4);
    memcpy(&real, &raw, sizeof real);
    if (ends(key, ".block_count")) n_layers = (int)raw;
    if (ends(key, ".embedding_length")) width = (int)raw;
    if (ends(key, ".feed_forward_length")) n_ff = (int)raw;
    if (ends(key, ".attention.head_count")) heads = (int)raw;
    if (ends(key, ".attention.head_count_kv")) kv_heads = (int)raw;
    if (ends(key, ".attention.layer_norm_rms_epsilon")) eps = real;
    if (ends(key, ".rope.freq_base")) rope_base = real;
    if (ends(key, ".attention.key_length")) head_size = (int)raw;
    if (ends(key, ".expert_count") && raw) refuse("it has no experts");
    if (ends(key, ".rope.scaling.factor")) refuse("it has no RoPE scaling");
}

static void load(const char *path) {
    FILE *in = fopen(path, "rb");
    long size;
    uint64_t n_facts, i;
    char key[128];
    if (!in) exit(3);
    fseek(in, 0, SEEK_END);
    size = ftell(in);
    rewind(in);
    file = malloc((size_t)size);
    if (!file || fread(file, 1, (size_t)size, in) != (size_t)size) exit(3);
    fclose(in);
    at = 8;
    n_tensors = (int)number(8);
    n_facts = number(8);
    for (i = 0; i < n_facts; i++) {
        text(key, sizeof key);
        fact(key, (int)number(4));
    }
    for (i = 0; i < (uint64_t)n_tensors; i++) {
        int dims, d;
        text(tensors[i].name, sizeof tensors[i].name);
        dims = (int)number(4);
        for (d = 0; d < dims; d++) tensors[i].dims[d] = number(8);
        if (number(4) != 0) refuse("it reads F32 weights only");
        tensors[i].data = (const float *)0 + number(8) / 4;
    }
    if (strcmp(architecture, "qwen2") != 0 && strcmp(architecture, "llama") != 0) refuse("it computes qwen2 and llama only");
    at = (at + 31) / 32 * 32;
    for (i = 0; i < (uint64_t)n_tensors; i++)
        tensors[i].data = (const float *)(file + at) + (tensors[i].data - (const float *)0);
}

static const tensor *find(const char *name) {
    int i;
    for (i = 0; i < n_tensors; i++)
        if (strcmp(tensors[i].name, name) == 0) return &tensors[i];
    return NULL;
}

static const float *weight(int layer, const char *name) {
    char full[64];
    const tensor *found;
    snprintf(full, sizeof full, "blk.%d.%s", layer, name);
    found = find(full);
    return found ? found->data : NULL;
}

static void norm(float *out, const float *x, const float *w) {
    double squares = 0;
    float scale;
    int i;
    for (i = 0; i < width; i++) squares += (double)x[i] * x[i];
    scale = 1.0f / sqrtf((float)(squares / width) + eps);
    for (i = 0; i < width; i++) out[i] = x[i] * scale * w[i];
}

static void linear(float *out, const float *x, const float *w, const float *bias, int rows, int columns) {
    int r, c;
    for (r = 0; r < rows; r++) {
        double sum = 0;
        for (c = 0; c < columns; c++) sum += (double)x[c] * w[(size_t)r * (size_t)columns + (size_t)c];
        out[r] = (float)sum + (bias ? bias[r] : 0.0f);
    }
}

static void rope(float *x, int n_heads, int size, int position, int neighbours) {
    int h, i;
    for (h = 0; h < n_heads; h++) {
        float *head = x + h * size, theta = (float)position, step = powf(rope_base, -2.0f / (float)size);
        for (i = 0; i < size / 2; i++, theta *= step) {
            float *a = head + (neighbours ? 2 * i : i), *b = head + (neighbours ? 2 * i + 1 : i + size / 2);
            float first = *a, second = *b;
            *a = first * cosf(theta) - second * sinf(theta);
            *b = first * sinf(theta) + second * cosf(theta);
        }
    }
}

/* Whether "layers:2,5" names this layer. */
static int named(const char *fault, int layer) {
    const char *at = strstr(fault, "layers:");
    for (at = at ? at + 6 : NULL; at; at = strchr(at + 1, ','))
        if (atoi(at + 1) == layer) return 1;
    return 0;
}

static void attention(float *out, const float *q, const float *keys, const float *values, int position, int size) {
    int h, t, i, kv = kv_heads * size;
    for (h = 0; h < heads; h++) {
        int group = h / (heads / kv_heads);
        float scores[MAX_TOKENS], most = -INFINITY;
        double total = 0;
        for (t = 0; t <= position; t++) {
            double dot = 0;
            for (i = 0; i < size; i++) dot += (double)q[h * size + i] * keys[t * kv + group * size + i];
            scores[t] = (float)dot / sqrtf((float)size);
            if (scores[t] > most) most = scores[t];
        }
        for (t = 0; t <= position; t++) total += scores[t] = expf(scores[t] - most);
        for (i = 0; i < size; i++) {
            double sum = 0;
            for (t = 0; t <= position; t++) sum += scores[t] / total * values[t * kv + group * size + i];
            out[h * size + i] = (float)sum;
        }
    }
}

#define INNER(kind, values, count)                                                           \
    if (everything) {                                                                        \
        snprintf(name, sizeof name, "blk.%d." kind, layer);                                  \
        parity_checkpoint(dump, name, position, values, PARITY_F32, (size_t)(count));        \
    }

int main(int argc, char **argv) {
    static float *keys[LAYERS], *values[LAYERS];
    const float *kept[LAYERS + 1]; /* what a wrong capture keeps */
    const char *fault = argc > 4 ? argv[4] : "", *rest;
    int tokens[MAX_TOKENS], n = 0, position, layer, i, size, kv, vocabulary;
    float *hidden, *other, *x, *q, *gate, *up, *logits;
    parity_dump *dump;
    char name[32];
    int wrong, everything = argc > 5 && argv[5][0], neighbours;
    if (argc < 4) return refuse("usage: foreign_engine MODEL 1,2,3 OUT [FAULT [POINTS]]");
    load(argv[1]);
    for (rest = argv[2]; rest && *rest && n < MAX_TOKENS; rest = strchr(rest, ',') ? strchr(rest, ',') + 1 : NULL)
        tokens[n++] = atoi(rest);
    if (n_layers > LAYERS || (head_size && head_size * heads != width)) refuse("it has no models of this shape");
    if (find("rope_freqs.weight")) refuse("it has no RoPE factors");
    size = width / heads, kv = kv_heads * size, vocabulary = (int)find("token_embd.weight")->dims[1];
    for (layer = 0; layer < n_layers; layer++) {
        keys[layer] = malloc(sizeof(float) * MAX_TOKENS * (size_t)kv);
        values[layer] = malloc(sizeof(float) * MAX_TOKENS * (size_t)kv);
    }
    hidden = malloc(sizeof(float) * (size_t)width), other = malloc(sizeof(float) * (size_t)width);
    x = malloc(sizeof(float) * (size_t)width), q = malloc(sizeof(float) * (size_t)width);
    gate = malloc(sizeof(float) * (size_t)n_ff), up = malloc(sizeof(float) * (size_t)n_ff);
    logits = malloc(sizeof(float) * (size_t)vocabulary);
    if (!(dump = parity_open(argv[3]))) return 1;
    parity_header(dump, "foreign_engine", argv[1], n_layers, tokens, n, "f32");
    parity_only(dump, everything ? argv[5] : NULL);

    for (position = 0; position < n; position++) {
        memcpy(hidden, find("token_embd.weight")->data + (size_t)tokens[position] * (size_t)width, sizeof(float) * (size_t)width);
        kept[0] = hidden;
        if (strcmp(fault, "swap") != 0) parity_checkpoint(dump, "embd", position, hidden, PARITY_F32, (size_t)width);
        if (strncmp(fault, "deaf", 4) != 0) parity_inject(dump, "embd", position, hidden, PARITY_F32, (size_t)width);
        for (layer = 0; layer < n_layers; layer++) {
            float *k = keys[layer] + position * kv, *v = values[layer] + position * kv, *swapped = hidden;
            wrong = strcmp(fault, "rope") == 0 || (strcmp(fault, "late") == 0 && layer >= 7) || named(fault, layer);
            neighbours = (strcmp(architecture, "llama") == 0) != wrong;
            norm(x, hidden, weight(layer, "attn_norm.weight"));
            linear(q, x, weight(layer, "attn_q.weight"), weight(layer, "attn_q.bias"), width, width);
            linear(k, x, weight(layer, "attn_k.weight"), weight(layer, "attn_k.bias"), kv, width);
            linear(v, x, weight(layer, "attn_v.weight"), weight(layer, "attn_v.bias"), kv, width);
            INNER("attn_norm", x, width);
            INNER("q", q, width);
            INNER("k", k, kv);
            INNER("v", v, kv);
            rope(q, heads, size, position, neighbours);
            rope(k, kv_heads, size, position, neighbours);
            INNER("q_rope", q, width);
            INNER("k_rope", k, kv);
            attention(x, q, keys[layer], values[layer], position, size);
            INNER("kqv_out", x, width);
            linear(q, x, weight(layer, "attn_output.weight"), weight(layer, "attn_output.bias"), width, width);
            INNER("attn_out", q, width);
            for (i = 0; i < width; i++) hidden[i] += q[i];
            INNER("ffn_inp", hidden, width);
            norm(x, hidden, weight(layer, "ffn_norm.weight"));
            INNER("ffn_norm", x, width);
            linear(gate, x, weight(layer, "ffn_gate.weight"), NULL, n_ff, width);
            linear(up, x, weight(layer, "ffn_up.weight"), NULL, n_ff, width);
            INNER("ffn_gate", gate, n_ff);
            INNER("ffn_up", up, n_ff);
            for (i = 0; i < n_ff; i++) gate[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
            INNER("ffn_swiglu", gate, n_ff);
            linear(other, gate, weight(layer, "ffn_down.weight"), NULL, width, n_ff);
            INNER("ffn_out", other, width);
            for (i = 0; i < width; i++) other[i] += hidden[i];
            hidden = other, other = swapped;
            kept[layer + 1] = hidden;
            snprintf(name, sizeof name, "blk.%d.l_out", layer);
            if (strcmp(fault, "swap") != 0) parity_checkpoint(dump, name, position, hidden, PARITY_F32, (size_t)width);
            if (strncmp(fault, "deaf", 4) != 0) parity_inject(dump, name, position, hidden, PARITY_F32, (size_t)width);
        }
        if (strcmp(fault, "swap") == 0) /* too late: both buffers have been written again */
            for (layer = 0; layer <= n_layers; layer++) {
                snprintf(name, sizeof name, layer ? "blk.%d.l_out" : "embd", layer - 1);
                parity_checkpoint(dump, name, position, kept[layer], PARITY_F32, (size_t)width);
            }
        norm(x, hidden, find("output_norm.weight")->data);
        parity_checkpoint(dump, "output_norm", position, x, PARITY_F32, (size_t)width);
        linear(logits, x, find(find("output.weight") ? "output.weight" : "token_embd.weight")->data, NULL, vocabulary, width);
        parity_checkpoint(dump, "logits", position, logits, PARITY_F32, (size_t)vocabulary);
    }
    if (parity_error(dump)[0]) fprintf(stderr, "%s\n", parity_error(dump));
    return parity_close(dump) ? 1 : 0;
}
