/* One pass over the stored rows of a trajectory: their inner products with two vectors, in double precision.

   A block of columns of both vectors stays in the first- or second-level cache while the rows stream by; what streams
   is 4 (or 2) bytes a number, so the pass runs at the speed of memory. */
#include <stdint.h>
#include <string.h>

#define BLOCK 2048
#define LANES 8

typedef double wide __attribute__((vector_size(64)));
typedef float floats __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(32), aligned(2), may_alias));

static inline float single_of(float value) { return value; }
static inline float single_of_bf16(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float single;
    memcpy(&single, &bits, sizeof single);
    return single;
}
static inline wide widened(words bits) {
    floats single;
    memcpy(&single, &bits, sizeof single);
    return __builtin_convertvector(single, wide);
}
static inline wide at(const double *p) { return *(const wide *)p; }
static inline double total(wide v) {
    double sum = 0;
    for (int i = 0; i < LANES; i++) sum += v[i];
    return sum;
}

/* Eight numbers of a row as doubles, times both vectors. */
#define STEP_F32(P, A, B)                                                                                        \
    do {                                                                                                         \
        wide x_ = __builtin_convertvector(*(const floats *)((P) + i), wide);                                     \
        A += x_ * at(first + i), B += x_ * at(last + i);                                                         \
    } while (0)
/* Sixteen: bfloat16 is the upper half of a float, so the odd ones need a mask only; both vectors are in that order. */
#define STEP_BF16(P, A, B)                                                                                       \
    do {                                                                                                         \
        words w_ = *(const words *)((P) + i);                                                                    \
        wide x_ = widened(w_ << 16), y_ = widened(w_ & 0xffff0000u);                                             \
        A += x_ * at(first + i) + y_ * at(first + i + LANES), B += x_ * at(last + i) + y_ * at(last + i + LANES);  \
    } while (0)

/* out[r] += row r · first, out[count + r] += row r · last, over the columns column … column + width − 1 */
#define STREAM(NAME, TYPE, GROUP, STEP, SCALAR)                                                                  \
    static void NAME(const TYPE *const *rows, int64_t count, int64_t column, int64_t width, const double *first, \
                     const double *last, double *out) {                                                          \
        int64_t whole = width / GROUP * GROUP;                                                                   \
        for (int64_t r = 0; r < count; r += 2) {                                                                 \
            int64_t s = r + 1 < count ? r + 1 : r;                                                               \
            const TYPE *p = rows[r] + column, *q = rows[s] + column;                                             \
            const TYPE *p_next = r + 2 < count ? rows[r + 2] + column : p;                                       \
            const TYPE *q_next = r + 3 < count ? rows[r + 3] + column : q;                                       \
            wide pf = {0}, pl = {0}, qf = {0}, ql = {0};                                                         \
            for (int64_t i = 0; i < whole; i += GROUP) {                                                         \
                if (!(i & 15)) __builtin_prefetch(p_next + i), __builtin_prefetch(q_next + i);                   \
                STEP(p, pf, pl);                                                                                 \
                STEP(q, qf, ql);                                                                                 \
            }                                                                                                    \
            double a = total(pf), b = total(pl), c = total(qf), d = total(ql);                                   \
            for (int64_t i = whole; i < width; i++) {                                                            \
                double x = SCALAR(p[i]), y = SCALAR(q[i]);                                                       \
                a += x * first[i], b += x * last[i], c += y * first[i], d += y * last[i];                        \
            }                                                                                                    \
            out[r] += a, out[count + r] += b;                                                                    \
            if (s > r) out[s] += c, out[count + s] += d;                                                         \
        }                                                                                                        \
    }
STREAM(stream_f32, float, LANES, STEP_F32, single_of)
STREAM(stream_bf16, uint16_t, (2 * LANES), STEP_BF16, single_of_bf16)

/* rows are snapshots; first is rows[0], last the difference of the two newest */
void border_of_snapshots(const float *const *rows, int64_t count, int64_t start, int64_t stop, double *out) {
    double first[BLOCK] __attribute__((aligned(64))), last[BLOCK] __attribute__((aligned(64)));
    for (int64_t column = start; column < stop; column += BLOCK) {
        int64_t width = stop - column < BLOCK ? stop - column : BLOCK;
        const float *oldest = rows[0] + column, *now = rows[count - 1] + column;
        const float *before = count > 1 ? rows[count - 2] + column : 0;
        for (int64_t i = 0; i < width; i++) {
            first[i] = oldest[i];
            last[i] = before ? (double)now[i] - before[i] : now[i];
        }
        stream_f32(rows, count, column, width, first, last, out);
    }
}

/* rows are bfloat16 increments on top of base, or of base + step; first is that sum, last the newest increment;
   out[2 count] += first · first */
void border_of_increments(const uint16_t *const *rows, int64_t count, const float *base, const uint16_t *step,
                          int64_t start, int64_t stop, double *out) {
    double first[BLOCK] __attribute__((aligned(64))), last[BLOCK] __attribute__((aligned(64)));
    for (int64_t column = start; column < stop; column += BLOCK) {
        int64_t width = stop - column < BLOCK ? stop - column : BLOCK, whole = width / (2 * LANES) * (2 * LANES);
        double square = 0;
        for (int64_t i = 0; i < width; i++) {
            int64_t group = i / (2 * LANES) * (2 * LANES), within = i - group, j = column + i;
            int64_t to = i < whole ? group + within % 2 * LANES + within / 2 : i; /* the even ones, then the odd ones */
            first[to] = step ? base[j] + single_of_bf16(step[j]) : base[j];
            last[to] = count ? single_of_bf16(rows[count - 1][j]) : 0;
            square += first[to] * first[to];
        }
        out[2 * count] += square;
        stream_bf16(rows, count, column, width, first, last, out);
    }
}
