// The loops over an array: sums over its rows, and elementwise passes. They know
// nothing of XLA.
//
// An array is float32 or bfloat16, arithmetic is float32, and a sum of more than some
// hundred terms is float64. How an array is divided depends on its size alone, so that
// no result depends on the number of threads.

#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
// No iteration of the loop below writes what another one reads. A compiler cannot know
// that of a job's pointers, and would check for it at each call or not vectorize.
#ifdef __clang__
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define INDEPENDENT _Pragma("GCC ivdep")
#endif

enum {
  ELEMENTWISE_PART = 1 << 15,  // values that a thread takes at once
  REDUCTION_PART = 1 << 16,
  MAX_PARTS = 64,
  ELEMENTWISE_WIDTH = 256,  // values of a row in an elementwise pass, and in a sum,
  REDUCTION_WIDTH = 1024,   // whose running sums stay in the nearest cache
  MIN_REDUCTION_ROWS = 32,
  GROUP = 4,        // rows that are added to each other before they go into a sum
  MAX_GROUPS = 64,  // groups that are added up in float32
};

// What a loop is compiled for: one of three kinds, times four for the dtypes. The
// residual has the dtype of x, and the gradient of an array has the array's.
enum { BF16_X = 1, BF16_Y = 2, DTYPES = 4 };
enum { NO_ACTIVATION, RELU, RELU_AFTER_RESIDUAL, KINDS };
enum { VARIANTS = KINDS * DTYPES };

// Per-channel values, repeated over the width of a row.
enum { ORIGIN, MEAN, MULTIPLIER, BIAS, SHIFT, SLOPE, COLUMNS };

// The array seen as rows of `width` values, a whole number of examples each, so that
// arrays of few features have long inner loops too. The last row may be shorter.
typedef struct {
  int64_t size, features, width, rows, parts, rows_per_part;
} Layout;

// The arrays of a call. `y` is written forward, `saved_y` is the same array read
// backward.
typedef struct {
  Layout layout;
  const void *x, *dy, *residual, *saved_y;
  void *y, *dx, *dresidual;
  float* column[COLUMNS];
  double* sums;  // (parts, 2, width)
} Job;

typedef void Loop(const Job* job, int64_t part);

static int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

static Layout make_layout(int64_t size, int64_t features, int64_t width, int64_t part) {
  width = max(1, width / features) * features;
  int64_t rows = (size + width - 1) / width;
  int64_t parts = max(1, min(min(size / part, MAX_PARTS), rows));
  int64_t rows_per_part = (rows + parts - 1) / parts;
  // Rounding up may leave the last parts without rows: they are not counted.
  parts = (rows + rows_per_part - 1) / rows_per_part;
  return (Layout){size, features, width, rows, parts, rows_per_part};
}

static Layout elementwise_layout(int64_t size, int64_t features) {
  return make_layout(size, features, ELEMENTWISE_WIDTH, ELEMENTWISE_PART);
}

static Layout reduction_layout(int64_t size, int64_t features) {
  int64_t width = min(size / MIN_REDUCTION_ROWS, REDUCTION_WIDTH);
  return make_layout(size, features, width, REDUCTION_PART);
}

static int64_t first_row(const Layout* layout, int64_t part) {
  return min(part * layout->rows_per_part, layout->rows);
}

static int64_t row_length(const Layout* layout, int64_t row) {
  return min(layout->size - row * layout->width, layout->width);
}

INLINE float load(const void* array, int64_t i, int bf16) {
  if (!bf16) return ((const float*)array)[i];
  uint32_t bits = (uint32_t)((const uint16_t*)array)[i] << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Rounds to the nearest bfloat16, and to the even one of two that are equally near.
INLINE void store(void* array, int64_t i, float value, int bf16) {
  if (!bf16) {
    ((float*)array)[i] = value;
    return;
  }
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  // Rounding could carry a NaN over into an infinity or a zero.
  uint32_t quiet_nan = (bits >> 16) | 0x40;
  ((uint16_t*)array)[i] = (uint16_t)(value != value ? quiet_nan : rounded);
}

// x - mean. The origin and the mean about it are subtracted one by one: their sum would
// be rounded, by more than a standard deviation where the mean is large beside it.
INLINE float centered_at(const Job* job, int64_t i, int64_t c, int variant) {
  return load(job->x, i, variant & BF16_X) - job->column[ORIGIN][c] -
         job->column[MEAN][c];
}

// The normalized value with scale and bias, before a residual and an activation.
INLINE float affine_at(const Job* job, int64_t i, int64_t c, int variant) {
  return centered_at(job, i, c, variant) * job->column[MULTIPLIER][c] +
         job->column[BIAS][c];
}

INLINE float output_at(const Job* job, int64_t i, int64_t c, int variant) {
  float z = affine_at(job, i, c, variant);
  if (variant / DTYPES == NO_ACTIVATION) return z;
  if (variant / DTYPES == RELU_AFTER_RESIDUAL)
    z += load(job->residual, i, variant & BF16_X);
  return z < 0 ? 0 : z;  // a NaN stays one
}

// The gradient of what goes into the activation. Where a ReLU lets a value pass is
// computed again from x, which is read anyway. After a residual it is read off the
// output instead, so that the residual need not be kept for the backward pass.
INLINE float dz_at(const Job* job, int64_t i, int64_t c, int variant) {
  float dy = load(job->dy, i, variant & BF16_Y);
  if (variant / DTYPES == NO_ACTIVATION) return dy;
  float passed = variant / DTYPES == RELU ? affine_at(job, i, c, variant)
                                          : load(job->saved_y, i, variant & BF16_Y);
  return passed > 0 ? dy : 0;
}

// What a value adds to the two sums of its channel:
//   moments   x - origin   (x - origin)^2
//   gradient  dz           dz * (x - mean)
INLINE float first_term(const Job* job, int64_t i, int64_t c, int variant, int gradient) {
  if (gradient) return dz_at(job, i, c, variant);
  return load(job->x, i, variant & BF16_X) - job->column[ORIGIN][c];
}

INLINE float second_term(const Job* job, int64_t i, int64_t c, int variant, int gradient,
                         float first) {
  return first * (gradient ? centered_at(job, i, c, variant) : first);
}

// Adds up the rows of one part, a block of columns at a time. Whole groups of rows go
// into float32 sums, of MAX_GROUPS groups at most before these go into the float64
// sums: so a float32 sum has few terms, and the float64 sums are seldom touched. Rows
// that make no whole group, and a last row that is not full, are added one by one.
INLINE void sum_part(const Job* shared, int64_t part, int variant, int gradient) {
  const Job job = *shared;  // a copy that no store can change stays in registers
  const Layout layout = job.layout;
  int64_t width = layout.width, start = first_row(&layout, part);
  int64_t end = first_row(&layout, part + 1);
  int64_t full_end = row_length(&layout, end - 1) == width ? end : end - 1;
  double* sums = job.sums + 2 * width * part;
  memset(sums, 0, 2 * width * sizeof *sums);
  for (int64_t left = 0; left < width; left += REDUCTION_WIDTH) {
    float first[REDUCTION_WIDTH], second[REDUCTION_WIDTH];
    int64_t columns = min(width - left, REDUCTION_WIDTH);
    for (int64_t row = start; row < end;) {
      memset(first, 0, columns * sizeof *first);
      memset(second, 0, columns * sizeof *second);
      int64_t groups = min((full_end - row) / GROUP, MAX_GROUPS);
      int64_t single_end = groups ? row : end;
      for (; groups; groups--, row += GROUP) {
        INDEPENDENT
        for (int64_t c = 0; c < columns; c++) {
          float f[GROUP], s[GROUP];
          for (int g = 0; g < GROUP; g++) {
            int64_t i = (row + g) * width + left + c;
            f[g] = first_term(&job, i, left + c, variant, gradient);
            s[g] = second_term(&job, i, left + c, variant, gradient, f[g]);
          }
          first[c] += (f[0] + f[1]) + (f[2] + f[3]);
          second[c] += (s[0] + s[1]) + (s[2] + s[3]);
        }
      }
      for (; row < single_end; row++) {
        int64_t length = min(row_length(&layout, row) - left, columns);
        INDEPENDENT
        for (int64_t c = 0; c < length; c++) {
          int64_t i = row * width + left + c;
          float term = first_term(&job, i, left + c, variant, gradient);
          first[c] += term;
          second[c] += second_term(&job, i, left + c, variant, gradient, term);
        }
      }
      for (int64_t c = 0; c < columns; c++) {
        sums[left + c] += first[c];
        sums[width + left + c] += second[c];
      }
    }
  }
}

// Writes one part of the output, or of the gradients of x and of the residual.
INLINE void write_part(const Job* shared, int64_t part, int variant, int gradient) {
  const Job job = *shared;
  const Layout layout = job.layout;
  int64_t end = first_row(&layout, part + 1);
  for (int64_t row = first_row(&layout, part); row < end; row++) {
    int64_t start = row * layout.width, length = row_length(&layout, row);
    INDEPENDENT
    for (int64_t c = 0; c < length; c++) {
      int64_t i = start + c;
      if (!gradient) {
        store(job.y, i, output_at(&job, i, c, variant), variant & BF16_Y);
        continue;
      }
      float dz = dz_at(&job, i, c, variant);
      float dx = dz * job.column[MULTIPLIER][c] + job.column[SHIFT][c] +
                 centered_at(&job, i, c, variant) * job.column[SLOPE][c];
      store(job.dx, i, dx, variant & BF16_X);
      if (variant / DTYPES == RELU_AFTER_RESIDUAL)
        store(job.dresidual, i, dz, variant & BF16_X);
    }
  }
}

// Each loop is compiled once for every variant, so that no iteration asks which it is.
#define ONE(name, loop, gradient, variant)                   \
  static void name##_##variant(const Job* job, int64_t part) { \
    loop(job, part, variant, gradient);                      \
  }
#define FOUR(name, loop, gradient, a, b, c, d)                  \
  ONE(name, loop, gradient, a) ONE(name, loop, gradient, b)     \
  ONE(name, loop, gradient, c) ONE(name, loop, gradient, d)
#define ALL(name, loop, gradient)                                          \
  FOUR(name, loop, gradient, 0, 1, 2, 3)                                   \
  FOUR(name, loop, gradient, 4, 5, 6, 7)                                   \
  FOUR(name, loop, gradient, 8, 9, 10, 11)                                 \
  static Loop* const name[VARIANTS] = {                                    \
      name##_0, name##_1, name##_2, name##_3, name##_4,  name##_5,         \
      name##_6, name##_7, name##_8, name##_9, name##_10, name##_11};
ALL(sum_gradient, sum_part, 1)
ALL(write_output, write_part, 0)
ALL(write_gradient, write_part, 1)
ONE(sum_moments, sum_part, 0, 0)
ONE(sum_moments, sum_part, 0, 1)
static Loop* const sum_moments[] = {sum_moments_0, sum_moments_1};
