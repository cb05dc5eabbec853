/* One pass over the stored rows of a trajectory: their inner products with two vectors, in double precision.

   A block of columns of both vectors stays in the first- or second-level cache while the rows stream by; what streams
   is 4 (or 2) bytes a number, so the pass runs at the speed of memory. */
#include <stdint.h>
#include <string.h>

#define BLOCK 2048
#define LANES 8

typedef double wide __attribute__((vector_size(64)));
typedef float floats __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(16), aligned(2), may_alias));
typedef uint32_t words __attribute__((vector_size(32)));

static inline float single_of(float value) { return value; }
static inline float single_of_bf16(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float single;
    memcpy(&single, &bits, sizeof single);
    return single;
}
static inline wide load_f32(const float *p) { return __builtin_convertvector(*(const floats *)p, wide); }
static inline wide load_bf16(const uint16_t *p) {
    words bits = __builtin_convertvector(*(const halves *)p, words) << 16;
    floats single;
    memcpy(&single, &bits, sizeof single);
    return __builtin_convertvector(single, wide);
}
static inline double total(wide v) {
    double sum = 0;
    for (int i = 0; i < LANES; i++) sum += v[i];
    return sum;
}

/* out[r] += row r · first, out[count + r] += row r · last, over the columns start … stop − 1 */
#define STREAM(NAME, TYPE, LOAD, SCALAR)                                                                          \
    static void NAME(const TYPE *const *rows, int64_t count, int64_t at, int64_t width, const double *first,      \
                     const double *last, double *out) {                                                           \
        int64_t whole = width / LANES * LANES, r = 0;                                                             \
        for (; r + 2 <= count; r += 2) {                                                                          \
            const TYPE *p = rows[r] + at, *q = rows[r + 1] + at;                                                  \
            const TYPE *p_next = r + 2 < count ? rows[r + 2] + at : p, *q_next = r + 3 < count ? rows[r + 3] + at : q; \
            wide pf = {0}, pl = {0}, qf = {0}, ql = {0};                                                          \
            for (int64_t i = 0; i < whole; i += LANES) {                                                          \
                if (!(i & 15)) __builtin_prefetch(p_next + i), __builtin_prefetch(q_next + i);                    \
                wide x = LOAD(p + i), y = LOAD(q + i);                                                            \
                wide f = *(const wide *)(first + i), l = *(const wide *)(last + i);                               \
                pf += x * f, pl += x * l, qf += y * f, ql += y * l;                                               \
            }                                                                                                     \
            double a = total(pf), b = total(pl), c = total(qf), d = total(ql);                                    \
            for (int64_t i = whole; i < width; i++) {                                                             \
                double x = SCALAR(p[i]), y = SCALAR(q[i]);                                                        \
                a += x * first[i], b += x * last[i], c += y * first[i], d += y * last[i];                         \
            }                                                                                                     \
            out[r] += a, out[count + r] += b, out[r + 1] += c, out[count + r + 1] += d;                           \
        }                                                                                                         \
        for (; r < count; r++) {                                                                                  \
            const TYPE *p = rows[r] + at;                                                                         \
            double a = 0, b = 0;                                                                                  \
            for (int64_t i = 0; i < width; i++) a += SCALAR(p[i]) * first[i], b += SCALAR(p[i]) * last[i];        \
            out[r] += a, out[count + r] += b;                                                                     \
        }                                                                                                         \
    }
STREAM(stream_f32, float, load_f32, single_of)
STREAM(stream_bf16, uint16_t, load_bf16, single_of_bf16)

/* rows are snapshots; first is rows[0], last the difference of the two newest */
void border_of_snapshots(const float *const *rows, int64_t count, int64_t start, int64_t stop, double *out) {
    double first[BLOCK] __attribute__((aligned(64))), last[BLOCK] __attribute__((aligned(64)));
    for (int64_t at = start; at < stop; at += BLOCK) {
        int64_t width = stop - at < BLOCK ? stop - at : BLOCK;
        const float *oldest = rows[0] + at, *now = rows[count - 1] + at;
        const float *before = count > 1 ? rows[count - 2] + at : 0;
        for (int64_t i = 0; i < width; i++) {
            first[i] = oldest[i];
            last[i] = before ? (double)now[i] - before[i] : now[i];
        }
        stream_f32(rows, count, at, width, first, last, out);
    }
}

/* rows are bfloat16 increments on top of base, or of base + step; first is that sum, last the newest increment;
   out[2 count] += first · first */
void border_of_increments(const uint16_t *const *rows, int64_t count, const float *base, const uint16_t *step,
                          int64_t start, int64_t stop, double *out) {
    double first[BLOCK] __attribute__((aligned(64))), last[BLOCK] __attribute__((aligned(64)));
    for (int64_t at = start; at < stop; at += BLOCK) {
        int64_t width = stop - at < BLOCK ? stop - at : BLOCK;
        double square = 0;
        for (int64_t i = 0; i < width; i++) {
            first[i] = step ? base[at + i] + single_of_bf16(step[at + i]) : base[at + i];
            last[i] = count ? single_of_bf16(rows[count - 1][at + i]) : 0;
            square += first[i] * first[i];
        }
        out[2 * count] += square;
        stream_bf16(rows, count, at, width, first, last, out);
    }
}
