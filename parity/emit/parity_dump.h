/* parity_dump.h: write checkpoints of an engine for `parity diff` and `parity lint`. One header, C99 or C++, no dependency.
 *
 *   parity_dump *d = parity_open("ours.jsonl");
 *   parity_header(d, "my engine", "model.gguf", 24, tokens, n_tokens, "f32"); // the arithmetic your kernels compute in
 *   parity_only(d, argv[4]);                                                  // what {points} gives; without it, all
 *   parity_checkpoint(d, "blk.5.l_out", position, hidden, PARITY_F32, n);     // n values of one position, HOST memory
 *   parity_token(d, position, id, "text");
 *   parity_close(d);
 *
 * Call parity_checkpoint right where the value is computed: it copies before it returns, no pointer is kept. Every function may
 * be called from several threads. Functions return 0, or -1 with the reason in parity_error(d); what fails once fails on.
 *
 * With PARITY_CUDA defined before the #include, device pointers are taken by a function of another name:
 *
 *   parity_checkpoint_device(d, "blk.5.l_out", position, device_pointer, PARITY_F16, n, stream);
 *
 * It copies in that stream, into pinned memory of its own, and waits for the copy before it returns. A device pointer that is
 * given to parity_checkpoint is an error then, not a crash or garbage.
 *
 * For `parity run --exec … --bisect`, which finds the layers that are wrong given right inputs, add one line behind the checkpoints of
 * the embedding and of each layer's output; it replaces the row where $PARITY_INJECT names a file that has it, and costs nothing else:
 *
 *   parity_inject(d, "blk.5.l_out", position, hidden, PARITY_F32, n);   // or parity_inject_device(…, stream) */
#ifndef PARITY_DUMP_H
#define PARITY_DUMP_H

#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if defined(_WIN32)
#include <windows.h>
#else
#include <pthread.h>
#endif
#ifdef PARITY_CUDA
#include <cuda_runtime.h>
#endif

#ifndef PARITY_SLICE
#define PARITY_SLICE 16 /* leading values that a record carries; define it before the #include for more */
#endif
#define PARITY_SKETCH 32 /* projections of the whole row */

typedef enum { PARITY_F32 = 0, PARITY_F16 = 1, PARITY_BF16 = 2 } parity_type;

/* Values of $PARITY_INJECT: positions first … first + rows − 1 of a point, and where they begin in the file. */
struct parity_injected {
    char point[64];
    long long first, rows, width, at;
};

typedef struct parity_dump {
    FILE *file;
    char error[256];
    long long checkpoints, tokens;
    int step, decode, seq;
    char *only; /* ",name,name," or NULL for all */
    FILE *inject; /* $PARITY_INJECT, NULL without it */
    struct parity_injected *injected;
    int n_injected;
#if defined(_WIN32)
    CRITICAL_SECTION lock;
#else
    pthread_mutex_t lock;
#endif
#ifdef PARITY_CUDA
    void *slab; /* pinned */
    size_t slab_size;
#endif
} parity_dump;

static inline void parity__lock(parity_dump *d) {
#if defined(_WIN32)
    EnterCriticalSection(&d->lock);
#else
    pthread_mutex_lock(&d->lock);
#endif
}

static inline void parity__unlock(parity_dump *d) {
#if defined(_WIN32)
    LeaveCriticalSection(&d->lock);
#else
    pthread_mutex_unlock(&d->lock);
#endif
}

static inline int parity__fail(parity_dump *d, const char *format, ...) {
    if (!d->error[0]) {
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(d->error, sizeof d->error, format, arguments);
        va_end(arguments);
    }
    return -1;
}

/* The same from outside of the lock. The text is what only one caller wrote. */
static inline int parity__refuse(parity_dump *d, const char *point, const char *why) {
    parity__lock(d);
    parity__fail(d, "%s: %s", point, why);
    parity__unlock(d);
    return -1;
}

/* The first thing that went wrong, or an empty text. */
static inline const char *parity_error(const parity_dump *d) { return d ? d->error : "the dump could not be opened"; }

/* Where $PARITY_INJECT has the rows of which point: a line "PARITY-INJECT 1", then for each point a line "name first rows width" and
 * rows × width float32, little-endian. */
static inline void parity__index(parity_dump *d, const char *path) {
    char line[128], point[64];
    long long first, rows, width;
    struct parity_injected *more;
    d->inject = fopen(path, "rb");
    if (!d->inject || !fgets(line, sizeof line, d->inject) || strcmp(line, "PARITY-INJECT 1\n") != 0) {
        parity__fail(d, "%.150s: not a file of values to inject", path);
        return;
    }
    while (fgets(line, sizeof line, d->inject)) {
        if (sscanf(line, "%63s %lld %lld %lld", point, &first, &rows, &width) != 4 || first < 0 || rows < 1 || width < 1 ||
            rows > 1 << 24 || width > 1 << 28) {
            parity__fail(d, "%.150s: damaged", path);
            return;
        }
        more = (struct parity_injected *)realloc(d->injected, (size_t)(d->n_injected + 1) * sizeof *more);
        if (!more) {
            parity__fail(d, "out of memory");
            return;
        }
        d->injected = more;
        more += d->n_injected++;
        strcpy(more->point, point);
        more->first = first;
        more->rows = rows;
        more->width = width;
        more->at = (long long)ftell(d->inject);
        if (fseek(d->inject, (long)(4 * rows * width), SEEK_CUR) != 0) parity__fail(d, "%.150s: cut short", path);
    }
}

/* Create a dump; NULL where the file cannot be created or memory is short. */
static inline parity_dump *parity_open(const char *path) {
    parity_dump *d = (parity_dump *)calloc(1, sizeof *d);
    if (!d) return NULL;
    d->file = fopen(path, "wb");
    if (!d->file) {
        free(d);
        return NULL;
    }
#if defined(_WIN32)
    InitializeCriticalSection(&d->lock);
#else
    pthread_mutex_init(&d->lock, NULL);
#endif
    if (getenv("PARITY_INJECT") && *getenv("PARITY_INJECT")) parity__index(d, getenv("PARITY_INJECT"));
    return d;
}

/* JSON text: quotes, backslashes and control characters escaped. Bytes above 127 must be UTF-8. */
static inline void parity__text(FILE *file, const char *text) {
    putc('"', file);
    for (; text && *text; text++) {
        unsigned char c = (unsigned char)*text;
        if (c == '"' || c == '\\') putc('\\', file);
        if (c < 0x20) fprintf(file, "\\u%04x", c);
        else putc(c, file);
    }
    putc('"', file);
}

/* A number with `digits` significant digits, the decimal point whatever the locale says. */
static inline void parity__number(FILE *file, double x, int digits) {
    char text[40], *point;
    if (isnan(x)) {
        fputs("\"NaN\"", file);
        return;
    }
    if (isinf(x)) {
        fputs(x > 0 ? "\"Infinity\"" : "\"-Infinity\"", file);
        return;
    }
    snprintf(text, sizeof text, "%.*g", digits, x);
    for (point = text; *point; point++)
        if (*point == ',') *point = '.';
    fputs(text, file);
}

static inline int parity__written(parity_dump *d) {
    if (fflush(d->file) != 0 || ferror(d->file)) return parity__fail(d, "the dump could not be written: is the disk full?");
    return 0;
}

/* The first line: which engine, which model file's name, how many layers, the prompt's token ids, and the arithmetic of its products
 * ("f32", "tf32", "f16", "bf16", or "q8" where activations are rounded to 8 bits): the limits of the comparison follow from it. NULL,
 * where it really is not known, makes the comparison a loose one. Other unknown numbers are 0, unknown texts NULL. */
static inline int parity_header(parity_dump *d, const char *engine, const char *model, int layers, const int *tokens,
                                int n_tokens, const char *compute) {
    int i, result;
    if (!d) return -1;
    parity__lock(d);
    fputs("{\"type\":\"header\",\"format\":1,\"source\":", d->file);
    parity__text(d->file, engine ? engine : "unknown");
    fputs(",\"model\":{", d->file);
    fputs("\"name\":", d->file);
    parity__text(d->file, model);
    if (layers > 0) fprintf(d->file, ",\"layers\":%d", layers);
    fputs("},\"tokens\":[", d->file);
    for (i = 0; i < n_tokens; i++) fprintf(d->file, i ? ",%d" : "%d", tokens[i]);
    fputs("]", d->file);
    if (compute) {
        fputs(",\"compute\":", d->file);
        parity__text(d->file, compute);
    }
    fprintf(d->file, ",\"slice\":%d}\n", PARITY_SLICE);
    result = parity__written(d);
    parity__unlock(d);
    return result;
}

/* Record these points only: names with commas, as {points} of `parity run --exec` gives them; NULL or "" for all. */
static inline int parity_only(parity_dump *d, const char *names) {
    size_t length = names ? strlen(names) : 0;
    char *only = NULL;
    if (!d) return -1;
    if (length) {
        only = (char *)malloc(length + 3);
        if (!only) return parity__refuse(d, "parity_only", "out of memory");
        only[0] = ',';
        memcpy(only + 1, names, length);
        memcpy(only + 1 + length, ",", 2);
    }
    parity__lock(d);
    free(d->only);
    d->only = only;
    parity__unlock(d);
    return 0;
}

/* Whether a point is recorded, so that an engine need not copy what nobody asks for. */
static inline int parity_wants(parity_dump *d, const char *point) {
    const char *at;
    size_t length;
    int wanted;
    if (!d || !point) return 0;
    length = strlen(point);
    parity__lock(d);
    for (at = d->only ? d->only + 1 : NULL; at && (at = strstr(at, point)) != NULL; at++)
        if (at[-1] == ',' && at[length] == ',') break;
    wanted = !d->only || at;
    parity__unlock(d);
    return wanted;
}

/* Say before each forward pass which one it is (from 0) and whether it decodes a single token. */
static inline void parity_pass(parity_dump *d, int step, int decode) {
    if (!d) return;
    parity__lock(d);
    d->step = step;
    d->decode = decode;
    parity__unlock(d);
}

/* MurmurHash3's finaliser: the sketch's signs. */
static inline uint32_t parity__fmix32(uint32_t h) {
    h ^= h >> 16;
    h *= 0x85EBCA6Bu;
    h ^= h >> 13;
    h *= 0xC2B2AE35u;
    return h ^ (h >> 16);
}

static inline float parity__f16(uint16_t half) {
    uint32_t sign = (uint32_t)(half >> 15) << 31, exponent = (half >> 10) & 31, mantissa = half & 1023, bits;
    float value;
    if (exponent == 31) bits = sign | 0x7F800000u | mantissa << 13;
    else if (exponent) bits = sign | (exponent + 112) << 23 | mantissa << 13;
    else { /* zero or subnormal: mantissa · 2^-24 */
        value = (float)mantissa * 5.9604644775390625e-8f;
        return sign ? -value : value;
    }
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float parity__value(const void *values, parity_type type, size_t i) {
    const unsigned char *at = (const unsigned char *)values;
    uint16_t half;
    uint32_t bits;
    float value;
    if (type == PARITY_F32) {
        memcpy(&value, at + 4 * i, sizeof value);
        return value;
    }
    memcpy(&half, at + 2 * i, sizeof half);
    if (type == PARITY_F16) return parity__f16(half);
    bits = (uint32_t)half << 16;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline int parity__checkpoint(parity_dump *d, const char *point, int position, const void *values, parity_type type,
                                     size_t n) {
    static const char *const names[] = {"f32", "f16", "bf16"};
    double sum = 0, squares = 0, least = 0, most = 0, sketch[PARITY_SKETCH] = {0};
    size_t i, nonfinite = 0, largest_at = 0;
    float largest = -1;
    int j, result, some = 0;
    /* Non-finite elements are counted and are zero to everything else. */
    for (i = 0; i < n; i++) {
        float value = parity__value(values, type, i);
        double x = value;
        uint32_t signs = parity__fmix32((uint32_t)(i + 1));
        if (!isfinite(value)) {
            nonfinite++;
            x = 0;
            if (largest < 0) largest = 0, largest_at = i;
            continue;
        }
        if (fabsf(value) > largest) largest = fabsf(value), largest_at = i;
        least = some ? (x < least ? x : least) : x;
        most = some ? (x > most ? x : most) : x;
        some = 1;
        sum += x;
        squares += x * x;
        for (j = 0; j < PARITY_SKETCH; j++) sketch[j] += (signs >> j & 1) ? x : -x;
    }
    parity__lock(d);
    fputs("{\"type\":\"checkpoint\",\"checkpoint\":", d->file);
    parity__text(d->file, point);
    fprintf(d->file, ",\"seq\":%d,\"token_idx\":%d,\"step\":%d,\"phase\":\"%s\",\"dtype\":\"%s\",\"shape\":[%llu],\"values\":[", d->seq,
            position, d->step, d->decode ? "decode" : "prefill", names[type], (unsigned long long)n);
    for (i = 0; i < n && i < PARITY_SLICE; i++) {
        if (i) putc(',', d->file);
        parity__number(d->file, parity__value(values, type, i), 9); /* 9 digits give every float32 back */
    }
    fprintf(d->file, "],\"stats\":{\"n\":%llu,\"sum\":", (unsigned long long)n);
    parity__number(d->file, sum, 17);
    fputs(",\"l2\":", d->file);
    parity__number(d->file, sqrt(squares), 17);
    fputs(",\"min\":", d->file);
    parity__number(d->file, least, 17);
    fputs(",\"max\":", d->file);
    parity__number(d->file, most, 17);
    fprintf(d->file, ",\"nonfinite\":%llu,\"absmax_at\":%llu},\"sketch\":[", (unsigned long long)nonfinite,
            (unsigned long long)largest_at);
    for (j = 0; j < PARITY_SKETCH; j++) {
        if (j) putc(',', d->file);
        parity__number(d->file, (float)sketch[j], 9);
    }
    fputs("]}\n", d->file);
    d->checkpoints++;
    result = parity__written(d);
    parity__unlock(d);
    return result;
}

static inline int parity__arguments(parity_dump *d, const char *point, int position, const void *values, parity_type type,
                                    size_t n) {
    int failed;
    if (!d) return -1;
    if (!point || !values || !n || position < 0)
        return parity__refuse(d, point ? point : "checkpoint", "needs a name, a position from 0, and values");
    if ((int)type < PARITY_F32 || (int)type > PARITY_BF16) return parity__refuse(d, point, "unknown type");
    parity__lock(d);
    failed = d->error[0] ? -1 : 0;
    parity__unlock(d);
    return failed;
}

/* One position's row of an activation: n values in HOST memory, all of them (statistics and sketch see the whole row). */
static inline int parity_checkpoint(parity_dump *d, const char *point, int position, const void *values, parity_type type,
                                    size_t n) {
    if (parity__arguments(d, point, position, values, type, n)) return -1;
    if (!parity_wants(d, point)) return 0;
#ifdef PARITY_CUDA
    {
        struct cudaPointerAttributes at;
        if (cudaPointerGetAttributes(&at, values) == cudaSuccess && at.type == cudaMemoryTypeDevice)
            return parity__refuse(d, point, "this is a device pointer; give it to parity_checkpoint_device");
        cudaGetLastError(); /* plain host memory is no error */
    }
#endif
    return parity__checkpoint(d, point, position, values, type, n);
}

#ifdef PARITY_CUDA
/* The same for DEVICE memory: copied in `stream`, after what it computed, into pinned memory; waits for the copy. */
static inline int parity_checkpoint_device(parity_dump *d, const char *point, int position, const void *device_values,
                                           parity_type type, size_t n, cudaStream_t stream) {
    struct cudaPointerAttributes at;
    size_t size = n * (type == PARITY_F32 ? 4 : 2);
    cudaError_t status;
    void *copy;
    int result;
    if (parity__arguments(d, point, position, device_values, type, n)) return -1;
    if (!parity_wants(d, point)) return 0;
    if (cudaPointerGetAttributes(&at, device_values) != cudaSuccess ||
        (at.type != cudaMemoryTypeDevice && at.type != cudaMemoryTypeManaged)) {
        cudaGetLastError();
        return parity__refuse(d, point, "this is host memory; give it to parity_checkpoint");
    }
    parity__lock(d); /* the slab is one thread's until its values are taken out of it */
    if (d->slab_size < size) {
        if (d->slab) cudaFreeHost(d->slab);
        d->slab = NULL;
        d->slab_size = 0;
        status = cudaMallocHost(&d->slab, size);
        if (status == cudaSuccess) d->slab_size = size;
    } else status = cudaSuccess;
    if (status == cudaSuccess) status = cudaMemcpyAsync(d->slab, device_values, size, cudaMemcpyDeviceToHost, stream);
    if (status == cudaSuccess) status = cudaStreamSynchronize(stream);
    copy = status == cudaSuccess ? malloc(size) : NULL;
    if (copy) memcpy(copy, d->slab, size);
    parity__unlock(d);
    if (!copy) return parity__refuse(d, point, status == cudaSuccess ? "out of memory" : cudaGetErrorString(status));
    result = parity__checkpoint(d, point, position, copy, type, n);
    free(copy);
    return result;
}
#endif

/* A float32 as F16 or BF16, rounded to nearest, ties to even. */
static inline uint16_t parity__half(float value, parity_type type) {
    uint32_t bits, sign, shift, mantissa, rest, halfway;
    int exponent;
    uint16_t result;
    memcpy(&bits, &value, sizeof bits);
    if (type == PARITY_BF16) {
        if (isnan(value)) return (uint16_t)(bits >> 16 | 64);
        return (uint16_t)((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
    }
    sign = bits >> 16 & 0x8000u;
    if (isnan(value)) return (uint16_t)(sign | 0x7E00u);
    exponent = (int)(bits >> 23 & 255) - 112;
    if (exponent >= 31) return (uint16_t)(sign | 0x7C00u);
    if (exponent < -10) return (uint16_t)sign;
    mantissa = (bits & 0x7FFFFFu) | 0x800000u;
    shift = exponent > 0 ? 13 : (uint32_t)(14 - exponent);
    rest = mantissa & ((1u << shift) - 1);
    halfway = 1u << (shift - 1);
    mantissa >>= shift;
    /* The implicit bit counts one exponent up; a carry out of the mantissa does, too, and 65520 becomes infinity. */
    result = (uint16_t)(exponent > 0 ? ((uint32_t)(exponent - 1) << 10) + mantissa : mantissa);
    if (rest > halfway || (rest == halfway && (mantissa & 1))) result++;
    return (uint16_t)(sign | result);
}

/* Replace one position's row, n values in HOST memory, by the reference's, where $PARITY_INJECT names a file that has it; call it
 * right behind parity_checkpoint. Returns 1 if it was replaced, 0 if not, -1 for an error. */
static inline int parity_inject(parity_dump *d, const char *point, int position, void *values, parity_type type, size_t n) {
    struct parity_injected *found = NULL;
    float *row;
    size_t i;
    int j;
    if (!d) return -1;
    if (!d->inject) return 0;
    if (parity__arguments(d, point, position, values, type, n)) return -1;
    for (j = 0; j < d->n_injected && !found; j++)
        if (strcmp(d->injected[j].point, point) == 0 && position >= d->injected[j].first &&
            position < d->injected[j].first + d->injected[j].rows)
            found = &d->injected[j];
    if (!found) return 0;
    if ((size_t)found->width != n) return parity__refuse(d, point, "the reference's row has another number of values");
    row = (float *)malloc(4 * n);
    if (!row) return parity__refuse(d, point, "out of memory");
    parity__lock(d);
    if (fseek(d->inject, (long)(found->at + 4 * (position - found->first) * found->width), SEEK_SET) != 0 ||
        fread(row, 4, n, d->inject) != n)
        parity__fail(d, "%s: the values to inject are cut short", point);
    j = d->error[0] ? -1 : 1;
    parity__unlock(d);
    for (i = 0; i < n && j == 1; i++) {
        uint16_t half;
        if (type == PARITY_F32) {
            memcpy((unsigned char *)values + 4 * i, row + i, 4);
            continue;
        }
        half = parity__half(row[i], type);
        memcpy((unsigned char *)values + 2 * i, &half, 2);
    }
    free(row);
    return j;
}

#ifdef PARITY_CUDA
/* The same for DEVICE memory, in `stream`, behind what computed it; waits for the copy. */
static inline int parity_inject_device(parity_dump *d, const char *point, int position, void *device_values, parity_type type,
                                       size_t n, cudaStream_t stream) {
    size_t size = n * (type == PARITY_F32 ? 4 : 2);
    cudaError_t status = cudaSuccess;
    void *row;
    int result;
    if (!d) return -1;
    if (!d->inject) return 0;
    row = malloc(size ? size : 1);
    if (!row) return parity__refuse(d, point, "out of memory");
    result = parity_inject(d, point, position, row, type, n);
    if (result == 1) {
        status = cudaMemcpyAsync(device_values, row, size, cudaMemcpyHostToDevice, stream);
        if (status == cudaSuccess) status = cudaStreamSynchronize(stream);
    }
    free(row);
    return status == cudaSuccess ? result : parity__refuse(d, point, cudaGetErrorString(status));
}
#endif

/* A generated token: the position it will stand at, its id, its text (or NULL). */
static inline int parity_token(parity_dump *d, int position, int id, const char *text) {
    int result;
    if (!d) return -1;
    parity__lock(d);
    fprintf(d->file, "{\"type\":\"token\",\"seq\":%d,\"token_idx\":%d,\"id\":%d,\"text\":", d->seq, position, id);
    parity__text(d->file, text ? text : "");
    fputs(",\"top\":[]}\n", d->file);
    d->tokens++;
    result = parity__written(d);
    parity__unlock(d);
    return result;
}

/* Write the end record and close. A dump without it was cut short, and parity says so. */
static inline int parity_close(parity_dump *d) {
    int result;
    if (!d) return -1;
    if (!d->error[0])
        fprintf(d->file, "{\"type\":\"end\",\"checkpoints\":%lld,\"tokens\":%lld}\n", d->checkpoints, d->tokens);
    result = d->error[0] ? -1 : 0;
    if (fclose(d->file) != 0) result = -1;
#ifdef PARITY_CUDA
    if (d->slab) cudaFreeHost(d->slab);
#endif
#if defined(_WIN32)
    DeleteCriticalSection(&d->lock);
#else
    pthread_mutex_destroy(&d->lock);
#endif
    if (d->inject) fclose(d->inject);
    free(d->injected);
    free(d->only);
    free(d);
    return result;
}

#endif
