// What XLA calls: the passes of batch normalization over an array, as handlers of XLA's
// foreign function interface (xla/ffi/api/c_api.h).
//
// The name of a handler can be called with anything. So a handler compares its call
// with its signature before it touches an array, and answers a mismatch with an error.

#define _DEFAULT_SOURCE 1
#include <math.h>
#include <sched.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "loops.h"
#include "xla/ffi/api/c_api.h"

enum { LARGE_BUFFER = 1 << 22 };  // bytes from which large pages are worth a call

// More values than any memory holds. Below it no size in bytes overflows: the largest
// is that of the sums, 1024 bytes a value.
static const int64_t MAX_SIZE = (int64_t)1 << 48;

// A call that has been checked: `x` has the shape (size / features, features).
typedef struct {
  XLA_FFI_CallFrame* frame;
  const char* handler;
  int64_t size, features;
  XLA_FFI_DataType x_dtype, y_dtype;
  int variant;
} Call;

// ---- Errors ----

__attribute__((format(printf, 3, 4))) static XLA_FFI_Error* make_error(
    const Call* call, XLA_FFI_Error_Code code, const char* format, ...) {
  char message[256];
  int start = snprintf(message, sizeof message, "%s: ", call->handler);
  va_list values;
  va_start(values, format);
  vsnprintf(message + start, sizeof message - start, format, values);
  va_end(values);
  XLA_FFI_Error_Create_Args args = {XLA_FFI_Error_Create_Args_STRUCT_SIZE, NULL, message,
                                    code};
  return call->frame->api->XLA_FFI_Error_Create(&args);
}

#define INVALID(call, ...) \
  make_error(call, XLA_FFI_Error_Code_INVALID_ARGUMENT, __VA_ARGS__)

static XLA_FFI_Error* out_of_memory(const Call* call) {
  return make_error(call, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED,
                    "no memory for the sums of %lld features", (long long)call->features);
}

// Whether XLA refused; what it said is of no use.
static int failed(const XLA_FFI_CallFrame* frame, XLA_FFI_Error* error) {
  if (!error) return 0;
  XLA_FFI_Error_Destroy_Args args = {XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, NULL, error};
  frame->api->XLA_FFI_Error_Destroy(&args);
  return 1;
}

// ---- Checks ----

// An array as it is written in StableHLO, such as f32[32,8].
typedef struct {
  char text[64];
} Description;

static Description describe(XLA_FFI_DataType dtype, int64_t rank, const int64_t* dims) {
  Description to;
  size_t limit = sizeof to.text, used;
  if (dtype == XLA_FFI_DataType_F32 || dtype == XLA_FFI_DataType_BF16)
    used = snprintf(to.text, limit, dtype == XLA_FFI_DataType_F32 ? "f32[" : "bf16[");
  else
    used = snprintf(to.text, limit, "dtype %d[", (int)dtype);
  for (int64_t i = 0; i < rank && used < limit; i++)
    used += snprintf(to.text + used, limit - used, i ? ",%lld" : "%lld", (long long)dims[i]);
  if (used < limit) snprintf(to.text + used, limit - used, "]");
  return to;
}

static int is_float(const XLA_FFI_Buffer* array) {
  return array->dtype == XLA_FFI_DataType_F32 || array->dtype == XLA_FFI_DataType_BF16;
}

// Takes the shape and the dtype of x, by which all other arrays are judged.
static XLA_FFI_Error* check_x(Call* call, const XLA_FFI_Buffer* x) {
  if (x->rank != 2 || !is_float(x))
    return INVALID(call, "x is %s; expected f32 or bf16 of rank 2",
                   describe(x->dtype, x->rank, x->dims).text);
  int64_t rows = x->dims[0], features = x->dims[1];
  if (rows < 1 || features < 1 || rows > MAX_SIZE / features)
    return INVALID(call, "x is %s; expected 1 to 2^48 values",
                   describe(x->dtype, x->rank, x->dims).text);
  call->size = rows * features, call->features = features, call->x_dtype = x->dtype;
  return NULL;
}

// Compares an array with its letter in a signature.
static XLA_FFI_Error* check_array(Call* call, const XLA_FFI_Buffer* array, char letter,
                                  const char* role, int64_t i) {
  if (!array) return INVALID(call, "%s %lld is no array", role, (long long)i);
  if (letter == 'y' && call->y_dtype == XLA_FFI_DataType_INVALID && is_float(array))
    call->y_dtype = array->dtype;
  int64_t shape[] = {call->size / call->features, call->features, 1};
  int64_t rank = letter == 'x' || letter == 'y' ? 2 : 1;
  const int64_t* dims = letter == 's' ? shape + 2 : shape + 2 - rank;
  XLA_FFI_DataType dtype = letter == 'x'   ? call->x_dtype
                           : letter == 'y' ? call->y_dtype
                                           : XLA_FFI_DataType_F32;
  int same = dtype != XLA_FFI_DataType_INVALID && array->dtype == dtype &&
             array->rank == rank && array->data;
  for (int64_t axis = 0; same && axis < rank; axis++)
    same = array->dims[axis] == dims[axis];
  if (same) return NULL;
  if (dtype == XLA_FFI_DataType_INVALID) dtype = XLA_FFI_DataType_F32;
  return INVALID(call, "%s %lld is %s; expected %s", role, (long long)i,
                 describe(array->dtype, array->rank, array->dims).text,
                 describe(dtype, rank, dims).text);
}

// NULL where an argument is no array, which no version of XLA passes yet.
static const XLA_FFI_Buffer* argument_at(const XLA_FFI_CallFrame* frame, int64_t i) {
  int is_array = frame->args.types[i] == XLA_FFI_ArgType_BUFFER;
  return is_array ? frame->args.args[i] : NULL;
}

static const XLA_FFI_Buffer* result_at(const XLA_FFI_CallFrame* frame, int64_t i) {
  int is_array = frame->rets.types[i] == XLA_FFI_RetType_BUFFER;
  return is_array ? frame->rets.rets[i] : NULL;
}

// Reads the one attribute, a number of ACTIVATION_CODES in __init__.py.
static XLA_FFI_Error* check_activation(const Call* call, int64_t* activation) {
  const XLA_FFI_Attrs* attrs = &call->frame->attrs;
  static const char name[] = "activation";
  if (attrs->size == 1 && attrs->types[0] == XLA_FFI_AttrType_SCALAR &&
      attrs->names[0]->len == sizeof name - 1 &&
      !memcmp(attrs->names[0]->ptr, name, sizeof name - 1)) {
    const XLA_FFI_Scalar* scalar = attrs->attrs[0];
    if (scalar->dtype == XLA_FFI_DataType_S64) {
      *activation = *(const int64_t*)scalar->value;
      if (*activation == NO_ACTIVATION || *activation == RELU) return NULL;
      return INVALID(call, "activation is %lld; expected 0 for none or 1 for ReLU",
                     (long long)*activation);
    }
  }
  return INVALID(call, "expected one attribute, the int64 activation");
}

// Compares a call with a signature, which is written as "arguments->results", with a
// letter for each array:
//   x  float32 or bfloat16, shape (rows, features); the first one is x itself
//   y  the same shape, and a dtype of its own, float32 or bfloat16
//   c  float32, shape (features,)
//   s  float32, shape (1,)
// `with_residual` is the signature of a call that has a residual; NULL where there is
// neither residual nor activation.
static XLA_FFI_Error* check_call(Call* call, XLA_FFI_CallFrame* frame,
                                 const char* handler, const char* signature,
                                 const char* with_residual) {
  *call = (Call){.frame = frame, .handler = handler};
  if (frame->struct_size < XLA_FFI_CallFrame_STRUCT_SIZE ||
      frame->stage != XLA_FFI_ExecutionStage_EXECUTE)
    return INVALID(call, "called by another version of XLA, or not to execute");
  int residual = 0;
  if (with_residual && frame->args.size == strchr(with_residual, '-') - with_residual) {
    signature = with_residual;
    residual = 1;
  }
  const char* results = strchr(signature, '>') + 1;
  int64_t argument_count = results - 2 - signature, result_count = strlen(results);
  if (frame->args.size != argument_count || frame->rets.size != result_count)
    return INVALID(call, "%lld arguments and %lld results; expected %lld and %lld",
                   (long long)frame->args.size, (long long)frame->rets.size,
                   (long long)argument_count, (long long)result_count);
  int64_t activation = NO_ACTIVATION;
  XLA_FFI_Error* error = NULL;
  if (with_residual)
    error = check_activation(call, &activation);
  else if (frame->attrs.size)
    error = INVALID(call, "expected no attributes");
  if (error) return error;
  if (residual && activation == NO_ACTIVATION)
    return INVALID(call, "a residual without an activation");
  const XLA_FFI_Buffer* x = argument_at(frame, strchr(signature, 'x') - signature);
  error = x ? check_x(call, x) : INVALID(call, "x is no array");
  for (int64_t i = 0; !error && i < argument_count; i++)
    error = check_array(call, argument_at(frame, i), signature[i], "argument", i);
  for (int64_t i = 0; !error && i < result_count; i++)
    error = check_array(call, result_at(frame, i), results[i], "result", i);
  int kind = residual ? RELU_AFTER_RESIDUAL : (int)activation;
  call->variant = kind * DTYPES;
  if (call->x_dtype == XLA_FFI_DataType_BF16) call->variant |= BF16_X;
  if (call->y_dtype == XLA_FFI_DataType_BF16) call->variant |= BF16_Y;
  return error;
}

// The memory of an array that has been checked.
static void* argument(const Call* call, int64_t i) {
  return ((XLA_FFI_Buffer*)call->frame->args.args[i])->data;
}

static void* result(const Call* call, int64_t i) {
  return ((XLA_FFI_Buffer*)call->frame->rets.rets[i])->data;
}

// XLA asks each handler once, at registration, which version of the interface it was
// built for. That call has no arrays.
static int answers_version(const XLA_FFI_CallFrame* frame) {
  // The base of this struct has another name in every version of the header.
  XLA_FFI_Metadata_Extension* asked = (XLA_FFI_Metadata_Extension*)frame->extension_start;
  if (!asked || asked->extension_base.type != XLA_FFI_Extension_Metadata) return 0;
  asked->metadata->api_version.major_version = XLA_FFI_API_MAJOR;
  asked->metadata->api_version.minor_version = XLA_FFI_API_MINOR;
  return 1;
}

// ---- Threads ----

// The parts of a job, shared by the thread that XLA calls and those that help it. A
// helper may start after all is done, so the last one that holds the queue frees it.
typedef struct {
  Loop* loop;
  const Job* job;
  int64_t parts;
  atomic_long next, done, holders;
} Queue;

static void release(Queue* queue) {
  if (atomic_fetch_sub(&queue->holders, 1) == 1) free(queue);
}

// The job lives on the stack of the thread that waits for its parts: a helper reads it
// only while it has a part that is not done.
static void take_parts(void* data) {
  Queue* queue = data;
  for (long part; (part = atomic_fetch_add(&queue->next, 1)) < queue->parts;) {
    queue->loop(queue->job, part);
    atomic_fetch_add(&queue->done, 1);
  }
  release(queue);
}

static int64_t thread_count(const XLA_FFI_CallFrame* frame) {
  int64_t threads = 1;
  XLA_FFI_ThreadPool_NumThreads_Args args = {
      XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE, NULL, frame->ctx, &threads};
  return failed(frame, frame->api->XLA_FFI_ThreadPool_NumThreads(&args)) ? 1 : threads;
}

// Runs a loop over all parts of a job. It needs no helper to ever start: the threads of
// the pool may all be waiting as this one does.
static void run(const Call* call, Loop* loop, const Job* job) {
  const XLA_FFI_CallFrame* frame = call->frame;
  int64_t parts = job->layout.parts;
  int64_t helpers = parts > 1 ? min(thread_count(frame), parts) - 1 : 0;
  Queue* queue = helpers > 0 ? malloc(sizeof *queue) : NULL;
  if (!queue) {
    for (int64_t part = 0; part < parts; part++) loop(job, part);
    return;
  }
  queue->loop = loop, queue->job = job, queue->parts = parts;
  atomic_init(&queue->next, 0);
  atomic_init(&queue->done, 0);
  // This thread holds it twice: once in take_parts, once in the wait after it.
  atomic_init(&queue->holders, helpers + 2);
  XLA_FFI_ThreadPool_Schedule_Args args = {
      XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE, NULL, frame->ctx, take_parts, queue};
  for (int64_t helper = 0; helper < helpers; helper++)
    if (failed(frame, frame->api->XLA_FFI_ThreadPool_Schedule(&args))) release(queue);
  take_parts(queue);
  while (atomic_load(&queue->done) < parts) sched_yield();
  release(queue);
}

// ---- Steps of the handlers ----

// Allocates the sums of a job, if it has any, and its columns; free(job->sums) frees
// both. Returns whether there was memory.
static int allocate(Job* job, int64_t width, int has_sums) {
  int64_t sums = has_sums ? 2 * job->layout.width * job->layout.parts : 0;
  job->sums = malloc(sums * sizeof(double) + COLUMNS * width * sizeof(float));
  if (!job->sums) return 0;
  float* columns = (float*)(job->sums + sums);
  for (int column = 0; column < COLUMNS; column++)
    job->column[column] = columns + column * width;
  return 1;
}

// Repeats the values of the channels over a row.
static void tile(float* column, int64_t features, int64_t width) {
  for (int64_t i = features; i < width; i += features)
    memcpy(column + i, column, features * sizeof *column);
}

// Adds the sums of all parts, and of all examples of a row, to those of the first.
static void add_up(Job* job) {
  int64_t width = job->layout.width, features = job->layout.features;
  for (int64_t part = 1; part < job->layout.parts; part++)
    for (int64_t c = 0; c < 2 * width; c++) job->sums[c] += job->sums[2 * width * part + c];
  for (int64_t i = features; i < width; i += features)
    for (int64_t c = 0; c < features; c++) {
      job->sums[c] += job->sums[i + c];
      job->sums[width + c] += job->sums[width + i + c];
    }
}

// Asks for large pages before a buffer is written. To map fresh memory in small pages
// takes several times as long as to write it. A system without large pages refuses,
// and nothing is lost.
static void prefer_large_pages(void* data, int64_t size, int bf16) {
#ifdef MADV_HUGEPAGE
  int64_t bytes = size * (bf16 ? 2 : 4);
  if (bytes < LARGE_BUFFER) return;
  uintptr_t page = sysconf(_SC_PAGESIZE), address = (uintptr_t)data;
  uintptr_t start = (address + page - 1) / page * page;
  uintptr_t end = (address + bytes) / page * page;
  madvise((void*)start, end - start, MADV_HUGEPAGE);
#else
  (void)data, (void)size, (void)bf16;
#endif
}

// Fills the columns of the forward map from origin, mean, var, epsilon, scale and bias,
// which are the arguments from `first` on.
static void fill_columns(const Call* call, Job* job, int64_t first, int64_t width) {
  int64_t features = call->features;
  const float *origin = argument(call, first), *mean = argument(call, first + 1);
  const float *var = argument(call, first + 2), *epsilon = argument(call, first + 3);
  const float *scale = argument(call, first + 4), *bias = argument(call, first + 5);
  for (int64_t c = 0; c < features; c++) {
    job->column[ORIGIN][c] = origin[c];
    job->column[MEAN][c] = mean[c];
    job->column[MULTIPLIER][c] = scale[c] * (1 / sqrtf(var[c] + *epsilon));
    job->column[BIAS][c] = bias[c];
  }
  for (int column = ORIGIN; column <= BIAS; column++)
    tile(job->column[column], features, width);
}

// ---- Handlers ----

// x -> origin, mean, var
//
// The origin is the first row, a number close to the mean: the variance is the small
// difference of two sums, and about an origin far from the mean they would be large.
// `mean` is that of x - origin, and `var` the biased variance.
XLA_FFI_Error* bnjax_moments(XLA_FFI_CallFrame* frame) {
  if (answers_version(frame)) return NULL;
  Call call;
  XLA_FFI_Error* error = check_call(&call, frame, "bnjax_moments", "x->ccc", NULL);
  if (error) return error;
  float *origin = result(&call, 0), *mean = result(&call, 1), *var = result(&call, 2);
  int64_t features = call.features;
  Job job = {.layout = reduction_layout(call.size, features), .x = argument(&call, 0)};
  if (!allocate(&job, job.layout.width, 1)) return out_of_memory(&call);
  for (int64_t c = 0; c < features; c++)
    job.column[ORIGIN][c] = origin[c] = load(job.x, c, call.variant & BF16_X);
  tile(job.column[ORIGIN], features, job.layout.width);
  run(&call, sum_moments[call.variant], &job);
  add_up(&job);
  const double count = call.size / features, *squares = job.sums + job.layout.width;
  for (int64_t c = 0; c < features; c++) {
    double centered_mean = job.sums[c] / count;
    float variance = squares[c] / count - centered_mean * centered_mean;
    mean[c] = centered_mean;
    // A variance that overflows is a NaN: an infinite one would make all outputs zero.
    var[c] = isfinite(variance) ? fmaxf(variance, 0) : NAN;
  }
  free(job.sums);
  return NULL;
}

// x, origin, mean, var, epsilon, scale, bias[, residual] -> y
XLA_FFI_Error* bnjax_output(XLA_FFI_CallFrame* frame) {
  if (answers_version(frame)) return NULL;
  Call call;
  XLA_FFI_Error* error =
      check_call(&call, frame, "bnjax_output", "xcccscc->y", "xcccsccx->y");
  if (error) return error;
  Job job = {.layout = elementwise_layout(call.size, call.features),
             .x = argument(&call, 0),
             .y = result(&call, 0)};
  if (frame->args.size == 8) job.residual = argument(&call, 7);
  if (!allocate(&job, job.layout.width, 0)) return out_of_memory(&call);
  fill_columns(&call, &job, 1, job.layout.width);
  prefer_large_pages(job.y, call.size, call.variant & BF16_Y);
  run(&call, write_output[call.variant], &job);
  free(job.sums);
  return NULL;
}

// dy, x, origin, mean, var, epsilon, scale, bias, dmean, dvar[, y]
// -> dx, depsilon, dscale, dbias[, dresidual]
//
// With z = (x - mean) * multiplier + bias, dz the gradient of z, and m values in a
// channel, the paper's backward pass is
//
//   dbias  = sum(dz)
//   dscale = sum(dz * (x - mean)) * inv_std
//   dx     = dz * multiplier + shift + (x - mean) * slope
//   shift  = (dmean - multiplier * sum(dz)) / m
//   slope  = (2 * dvar - multiplier * inv_std^2 * sum(dz * (x - mean))) / m
//
// where dmean and dvar are the gradients of the statistics that the layer returns. The
// two sums take one pass over the arrays, and what is written takes another.
XLA_FFI_Error* bnjax_gradient(XLA_FFI_CallFrame* frame) {
  if (answers_version(frame)) return NULL;
  Call call;
  XLA_FFI_Error* error = check_call(&call, frame, "bnjax_gradient",
                                    "yxcccscccc->xscc", "yxcccsccccy->xsccx");
  if (error) return error;
  int64_t features = call.features;
  Layout elementwise = elementwise_layout(call.size, features);
  Job job = {.layout = reduction_layout(call.size, features),
             .dy = argument(&call, 0),
             .x = argument(&call, 1),
             .dx = result(&call, 0)};
  if (frame->args.size == 11) {
    job.saved_y = argument(&call, 10);
    job.dresidual = result(&call, 4);
    prefer_large_pages(job.dresidual, call.size, call.variant & BF16_X);
  }
  int64_t width = max(job.layout.width, elementwise.width);
  if (!allocate(&job, width, 1)) return out_of_memory(&call);
  fill_columns(&call, &job, 2, width);
  run(&call, sum_gradient[call.variant], &job);
  add_up(&job);
  const float *var = argument(&call, 4), *epsilon = argument(&call, 5);
  const float *dmean = argument(&call, 8), *dvar = argument(&call, 9);
  float *dscale = result(&call, 2), *dbias = result(&call, 3);
  const double count = call.size / features, *sum_dz = job.sums;
  const double* sum_dz_centered = job.sums + job.layout.width;
  double depsilon = 0;
  for (int64_t c = 0; c < features; c++) {
    double inv_std = 1 / sqrt((double)var[c] + *epsilon);
    double multiplier = job.column[MULTIPLIER][c];
    dbias[c] = sum_dz[c];
    dscale[c] = sum_dz_centered[c] * inv_std;
    // Minus twice the gradient of var, through the multiplier: d(var^-1/2)/d(var) is
    // -1/2 var^-3/2.
    double through_var = multiplier * inv_std * inv_std * sum_dz_centered[c];
    depsilon -= 0.5 * through_var;
    job.column[SHIFT][c] = (dmean[c] - multiplier * sum_dz[c]) / count;
    job.column[SLOPE][c] = (2 * dvar[c] - through_var) / count;
  }
  *(float*)result(&call, 1) = depsilon;
  tile(job.column[SHIFT], features, width);
  tile(job.column[SLOPE], features, width);
  job.layout = elementwise;
  prefer_large_pages(job.dx, call.size, call.variant & BF16_X);
  run(&call, write_gradient[call.variant], &job);
  free(job.sums);
  return NULL;
}
