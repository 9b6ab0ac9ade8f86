// The loops over an array: sums over its rows, and elementwise passes.
//
// Arrays are float32 or bfloat16, arithmetic is float32, and sums of more than some
// hundred terms are float64. The size of an array alone decides how it is divided, so
// that no result depends on the number of threads.

#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define INDEPENDENT _Pragma("GCC ivdep")
#endif

enum {
  WRITTEN_PART = 1 << 15,  // values that a thread takes at once
  SUMMED_PART = 1 << 16,
  MOST_PARTS = 64,
  WRITTEN_WIDTH = 256,  // values of the rows that an elementwise pass works on,
  SUMMED_WIDTH = 1024,  // and a sum, whose columns stay in the nearest cache
  LEAST_SUMMED_ROWS = 32,
  GROUP = 4,   // rows added to the sums at once
  GROUPS = 64  // groups added in float32
};

// Variants of a loop. A residual comes with a ReLU; what is of 16 bits is bfloat16, and
// residual and gradient of x are of the dtype of x, dy of that of y.
enum { RELU = 1, RESIDUAL = 2, HALF_X = 4, HALF_Y = 8, VARIANTS = 16 };

// Per-channel values, tiled to the width of a row.
enum { ORIGIN, MEAN, GAIN, BIAS, SHIFT, SLOPE, COLUMNS };

// A whole array seen as rows of several examples each; the last may be shorter.
typedef struct {
  int64_t size, features, width, rows, parts, rows_a_part;
} Layout;

typedef struct {
  Layout layout;
  const void *x, *dy, *residual;
  void *y, *dx, *dresidual;
  float* column[COLUMNS];
  double* sums;  // (parts, 2, width)
} Job;

typedef void Work(const Job* job, int64_t part);

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

static Layout layout_of(int64_t size, int64_t features, int64_t width, int64_t part) {
  width = most(1, width / features) * features;
  int64_t rows = (size + width - 1) / width;
  int64_t parts = most(1, least(least(size / part, MOST_PARTS), rows));
  int64_t each = (rows + parts - 1) / parts;
  return (Layout){size, features, width, rows, (rows + each - 1) / each, each};
}

static Layout written_layout(int64_t size, int64_t features) {
  return layout_of(size, features, WRITTEN_WIDTH, WRITTEN_PART);
}

static Layout summed_layout(int64_t size, int64_t features) {
  int64_t width = least(size / LEAST_SUMMED_ROWS, SUMMED_WIDTH);
  return layout_of(size, features, width, SUMMED_PART);
}

static int64_t first_row(const Layout* layout, int64_t part) {
  return least(part * layout->rows_a_part, layout->rows);
}

static int64_t length_of(const Layout* layout, int64_t row) {
  return least(layout->size - row * layout->width, layout->width);
}

INLINE float load(const void* from, int64_t at, int half) {
  if (!half) return ((const float*)from)[at];
  uint32_t bits = (uint32_t)((const uint16_t*)from)[at] << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// The nearest bfloat16, and of two as near the even one; a NaN stays one.
INLINE void store(void* to, int64_t at, float value, int half) {
  if (!half) {
    ((float*)to)[at] = value;
    return;
  }
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  uint32_t to_even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  uint32_t quiet_nan = (bits >> 16) | 0x40;
  ((uint16_t*)to)[at] = (uint16_t)(value != value ? quiet_nan : to_even);
}

// Origin and mean are subtracted one by one: their sum would round where it is large.
INLINE float distance_at(const Job* job, int64_t at, int64_t c, int flags) {
  return load(job->x, at, flags & HALF_X) - job->column[ORIGIN][c] -
         job->column[MEAN][c];
}

INLINE float preactivation_at(const Job* job, int64_t at, int64_t c, int flags) {
  float z = distance_at(job, at, c, flags) * job->column[GAIN][c] + job->column[BIAS][c];
  return flags & RESIDUAL ? z + load(job->residual, at, flags & HALF_X) : z;
}

// The gradient of the preactivation.
INLINE float dz_at(const Job* job, int64_t at, int64_t c, int flags) {
  float dy = load(job->dy, at, flags & HALF_Y);
  if (!(flags & RELU)) return dy;
  return preactivation_at(job, at, c, flags) > 0 ? dy : 0;
}

// What one value adds to the two sums: of moments, or of the gradient.
INLINE float first_term(const Job* job, int64_t at, int64_t c, int flags, int gradient) {
  if (gradient) return dz_at(job, at, c, flags);
  return load(job->x, at, flags & HALF_X) - job->column[ORIGIN][c];
}

INLINE float second_term(const Job* job, int64_t at, int64_t c, int flags, int gradient,
                         float first) {
  return first * (gradient ? distance_at(job, at, c, flags) : first);
}

INLINE void sum_part(const Job* shared, int64_t part, int flags, int gradient) {
  const Job job = *shared;
  const Layout layout = job.layout;
  int64_t width = layout.width, start = first_row(&layout, part);
  int64_t end = first_row(&layout, part + 1);
  int64_t full = length_of(&layout, end - 1) == width ? end : end - 1;
  double* sums = job.sums + 2 * width * part;
  memset(sums, 0, 2 * width * sizeof *sums);
  for (int64_t left = 0; left < width; left += SUMMED_WIDTH) {
    float first[SUMMED_WIDTH], second[SUMMED_WIDTH];
    int64_t columns = least(width - left, SUMMED_WIDTH);
    for (int64_t row = start; row < end;) {
      memset(first, 0, columns * sizeof *first);
      memset(second, 0, columns * sizeof *second);
      int64_t groups = least((full - row) / GROUP, GROUPS);
      int64_t single = groups ? row : end;
      for (; groups; groups--, row += GROUP) {
        INDEPENDENT
        for (int64_t c = 0; c < columns; c++) {
          float f[GROUP], s[GROUP];
          for (int g = 0; g < GROUP; g++) {
            int64_t at = (row + g) * width + left + c;
            f[g] = first_term(&job, at, left + c, flags, gradient);
            s[g] = second_term(&job, at, left + c, flags, gradient, f[g]);
          }
          first[c] += (f[0] + f[1]) + (f[2] + f[3]);
          second[c] += (s[0] + s[1]) + (s[2] + s[3]);
        }
      }
      for (; row < single; row++) {
        int64_t here = least(length_of(&layout, row) - left, columns);
        INDEPENDENT
        for (int64_t c = 0; c < here; c++) {
          int64_t at = row * width + left + c;
          float term = first_term(&job, at, left + c, flags, gradient);
          first[c] += term;
          second[c] += second_term(&job, at, left + c, flags, gradient, term);
        }
      }
      for (int64_t c = 0; c < columns; c++) {
        sums[left + c] += first[c];
        sums[width + left + c] += second[c];
      }
    }
  }
}

INLINE void write_part(const Job* shared, int64_t part, int flags, int gradient) {
  const Job job = *shared;
  const Layout layout = job.layout;
  int64_t end = first_row(&layout, part + 1);
  for (int64_t row = first_row(&layout, part); row < end; row++) {
    int64_t start = row * layout.width, length = length_of(&layout, row);
    INDEPENDENT
    for (int64_t c = 0; c < length; c++) {
      int64_t at = start + c;
      if (!gradient) {
        float z = preactivation_at(&job, at, c, flags);
        store(job.y, at, flags & RELU && z < 0 ? 0 : z, flags & HALF_Y);
        continue;
      }
      float dz = dz_at(&job, at, c, flags);
      float dx = dz * job.column[GAIN][c] + job.column[SHIFT][c] +
                 distance_at(&job, at, c, flags) * job.column[SLOPE][c];
      store(job.dx, at, dx, flags & HALF_X);
      if (flags & RESIDUAL) store(job.dresidual, at, dz, flags & HALF_X);
    }
  }
}

// Each function once for every variant, so that no loop asks for it.
#define ONE(name, loop, gradient, flags)               \
  static void name##flags(const Job* job, int64_t p) { \
    loop(job, p, flags, gradient);                     \
  }
#define FOUR(name, loop, gradient, a, b, c, d)            \
  ONE(name, loop, gradient, a) ONE(name, loop, gradient, b) \
  ONE(name, loop, gradient, c) ONE(name, loop, gradient, d)
#define EACH(name, loop, gradient)                                          \
  FOUR(name, loop, gradient, 0, 4, 8, 12)                                   \
  FOUR(name, loop, gradient, 1, 5, 9, 13)                                   \
  FOUR(name, loop, gradient, 3, 7, 11, 15)                                  \
  static Work* const name[VARIANTS] = {                                     \
      name##0, name##1, 0, name##3,  name##4,  name##5,  0, name##7,        \
      name##8, name##9, 0, name##11, name##12, name##13, 0, name##15};
EACH(sum_gradient, sum_part, 1)
EACH(write_output, write_part, 0)
EACH(write_gradient, write_part, 1)
ONE(sum_moments, sum_part, 0, 0)
ONE(sum_moments, sum_part, 0, 4)
