// What XLA calls: the passes of batch normalization over an array.

#define _DEFAULT_SOURCE
#include <math.h>
#include <sys/mman.h>
#include <unistd.h>

#include "queue.h"

enum { LARGE_BUFFER = 1 << 22 };  // bytes of a buffer that gains from large pages

// One call: its arrays, the variant of the loops, and memory of its own.
typedef struct {
  XLA_FFI_CallFrame* frame;
  int64_t size, features;
  int flags;
  double* memory;
} Call;

static XLA_FFI_Buffer* given(Call* call, int at) { return call->frame->args.args[at]; }

static void* argument(Call* call, int at) { return given(call, at)->data; }

static XLA_FFI_Buffer* returned(Call* call, int at) {
  return call->frame->rets.rets[at];
}

static void* result(Call* call, int at) { return returned(call, at)->data; }

static int is_half(XLA_FFI_Buffer* buffer) {
  return buffer->dtype == XLA_FFI_DataType_BF16;
}

// XLA asks a handler once which version of the interface it was built for.
static int asked_for_version(XLA_FFI_CallFrame* frame) {
  // The type of its base has another name in each version of the header.
  XLA_FFI_Metadata_Extension* asked = (XLA_FFI_Metadata_Extension*)frame->extension_start;
  if (!asked || asked->extension_base.type != XLA_FFI_Extension_Metadata) return 0;
  asked->metadata->api_version.major_version = XLA_FFI_API_MAJOR;
  asked->metadata->api_version.minor_version = XLA_FFI_API_MINOR;
  return 1;
}

// A call whose argument `x` is the array, of shape (rows, features).
static Call call_of(XLA_FFI_CallFrame* frame, int x) {
  XLA_FFI_Buffer* array = frame->args.args[x];
  Call call = {frame, array->dims[0] * array->dims[1], array->dims[1], 0, NULL};
  if (is_half(array)) call.flags = HALF_X;
  for (int64_t at = 0; at < frame->attrs.size; at++)
    call.flags |= *(int64_t*)((XLA_FFI_Scalar*)frame->attrs.attrs[at])->value;
  return call;
}

static XLA_FFI_Error* out_of_memory(Call* call) {
  XLA_FFI_Error_Create_Args args = {
      XLA_FFI_Error_Create_Args_STRUCT_SIZE, NULL,
      "batch_norm: no memory for the sums of a batch", XLA_FFI_Error_Code_RESOURCE_EXHAUSTED};
  return call->frame->api->XLA_FFI_Error_Create(&args);
}

// Memory for the sums of a job, if it takes any, and for its columns.
static int allocate(Call* call, Job* job, int64_t width, int summing) {
  int64_t sums = summing ? 2 * job->layout.width * job->layout.parts : 0;
  call->memory = malloc(sums * sizeof(double) + COLUMNS * width * sizeof(float));
  if (!call->memory) return 0;
  job->sums = call->memory;
  float* columns = (float*)(call->memory + sums);
  for (int column = 0; column < COLUMNS; column++)
    job->column[column] = columns + column * width;
  return 1;
}

// Repeats the values of the channels over a row.
static void tile(float* column, int64_t features, int64_t width) {
  for (int64_t at = features; at < width; at += features)
    memcpy(column + at, column, features * sizeof *column);
}

// Adds what all parts and all examples of a row have to the first example of the first.
static void add_up(Job* job) {
  int64_t width = job->layout.width, features = job->layout.features;
  for (int64_t part = 1; part < job->layout.parts; part++)
    for (int64_t c = 0; c < 2 * width; c++) job->sums[c] += job->sums[2 * width * part + c];
  for (int64_t at = features; at < width; at += features)
    for (int64_t c = 0; c < features; c++) {
      job->sums[c] += job->sums[at + c];
      job->sums[width + c] += job->sums[width + at + c];
    }
}

// A fresh buffer takes several times as long to be mapped, in small pages, as to be
// written. A system that has no large ones says no, and nothing is lost.
static void prefer_large_pages(void* data, int64_t size, int half) {
#ifdef MADV_HUGEPAGE
  int64_t bytes = size * (half ? 2 : 4);
  if (bytes < LARGE_BUFFER) return;
  uintptr_t page = sysconf(_SC_PAGESIZE), at = (uintptr_t)data;
  uintptr_t start = (at + page - 1) / page * page, end = (at + bytes) / page * page;
  madvise((void*)start, end - start, MADV_HUGEPAGE);
#else
  (void)data, (void)size, (void)half;
#endif
}

// origin + mean is the mean, and scale / sqrt(var + epsilon) the gain, of each channel.
static void fill_columns(Call* call, Job* job, int first, int64_t width) {
  int64_t features = call->features;
  float* origin = argument(call, first), *mean = argument(call, first + 1);
  float* var = argument(call, first + 2), epsilon = *(float*)argument(call, first + 3);
  float* scale = argument(call, first + 4), *bias = argument(call, first + 5);
  for (int64_t c = 0; c < features; c++) {
    job->column[ORIGIN][c] = origin[c];
    job->column[MEAN][c] = mean[c];
    job->column[GAIN][c] = scale[c] * (1 / sqrtf(var[c] + epsilon));
    job->column[BIAS][c] = bias[c];
  }
  for (int column = ORIGIN; column <= BIAS; column++)
    tile(job->column[column], features, width);
}

// (x) -> origin, mean, var: x - origin has the mean and the biased variance.
XLA_FFI_Error* bnjax_moments(XLA_FFI_CallFrame* frame) {
  if (asked_for_version(frame)) return NULL;
  Call call = call_of(frame, 0);
  float *origin = result(&call, 0), *mean = result(&call, 1), *var = result(&call, 2);
  int64_t features = call.features;
  Job job = {.layout = summed_layout(call.size, features), .x = argument(&call, 0)};
  if (!allocate(&call, &job, job.layout.width, 1)) return out_of_memory(&call);
  for (int64_t c = 0; c < features; c++)
    job.column[ORIGIN][c] = origin[c] = load(job.x, c, call.flags & HALF_X);
  tile(job.column[ORIGIN], features, job.layout.width);
  run(frame, call.flags & HALF_X ? sum_moments4 : sum_moments0, &job);
  add_up(&job);
  double count = call.size / features, *second = job.sums + job.layout.width;
  for (int64_t c = 0; c < features; c++) {
    double average = job.sums[c] / count;
    float spread = second[c] / count - average * average;
    mean[c] = average;
    // What overflows has no variance: an infinite one would give a finite output.
    var[c] = isfinite(spread) ? fmaxf(spread, 0) : NAN;
  }
  free(call.memory);
  return NULL;
}

// (x, origin, mean, var, epsilon, scale, bias[, residual]) -> y
XLA_FFI_Error* bnjax_output(XLA_FFI_CallFrame* frame) {
  if (asked_for_version(frame)) return NULL;
  Call call = call_of(frame, 0);
  Job job = {.layout = written_layout(call.size, call.features),
             .x = argument(&call, 0),
             .y = result(&call, 0)};
  if (call.flags & RESIDUAL) job.residual = argument(&call, 7);
  if (is_half(returned(&call, 0))) call.flags |= HALF_Y;
  if (!allocate(&call, &job, job.layout.width, 0)) return out_of_memory(&call);
  fill_columns(&call, &job, 1, job.layout.width);
  prefer_large_pages(job.y, call.size, call.flags & HALF_Y);
  run(frame, write_output[call.flags], &job);
  free(call.memory);
  return NULL;
}

// (dy, x, origin, mean, var, epsilon, scale, bias, dmean, dvar[, residual])
// -> dx, depsilon, dscale, dbias[, dresidual]
XLA_FFI_Error* bnjax_gradient(XLA_FFI_CallFrame* frame) {
  if (asked_for_version(frame)) return NULL;
  Call call = call_of(frame, 1);
  int64_t features = call.features;
  Layout written = written_layout(call.size, features);
  Job job = {.layout = summed_layout(call.size, features),
             .dy = argument(&call, 0),
             .x = argument(&call, 1),
             .dx = result(&call, 0)};
  if (is_half(given(&call, 0))) call.flags |= HALF_Y;
  if (call.flags & RESIDUAL) {
    job.residual = argument(&call, 10);
    job.dresidual = result(&call, 4);
    prefer_large_pages(job.dresidual, call.size, call.flags & HALF_X);
  }
  int64_t width = most(job.layout.width, written.width);
  if (!allocate(&call, &job, width, 1)) return out_of_memory(&call);
  fill_columns(&call, &job, 2, width);
  run(frame, sum_gradient[call.flags], &job);
  add_up(&job);
  float *var = argument(&call, 4), epsilon = *(float*)argument(&call, 5);
  float *dmean = argument(&call, 8), *dvar = argument(&call, 9);
  float *dscale = result(&call, 2), *dbias = result(&call, 3);
  double count = call.size / features, depsilon = 0;
  double *second = job.sums + job.layout.width;
  for (int64_t c = 0; c < features; c++) {
    double inverse = 1 / sqrt((double)var[c] + epsilon), gain = job.column[GAIN][c];
    dbias[c] = job.sums[c];
    dscale[c] = second[c] * inverse;
    double through_var = gain * inverse * inverse * second[c];
    depsilon -= 0.5 * through_var;
    job.column[SHIFT][c] = (dmean[c] - gain * job.sums[c]) / count;
    job.column[SLOPE][c] = (2 * dvar[c] - through_var) / count;
  }
  *(float*)result(&call, 1) = depsilon;
  tile(job.column[SHIFT], features, width);
  tile(job.column[SLOPE], features, width);
  job.layout = written;
  prefer_large_pages(job.dx, call.size, call.flags & HALF_X);
  run(frame, write_gradient[call.flags], &job);
  free(call.memory);
  return NULL;
}
