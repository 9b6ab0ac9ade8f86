// Calls the handlers as XLA does, for the sanitizers: from threads of a pool, with
// arrays whose memory ends where their values end, and with malformed calls.
//
// The kernels are compiled into this file, with an allocator that can be told to fail.

#define _DEFAULT_SOURCE 1
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

static long allocations_left = -1;  // -1: any number

static void* limited_malloc(size_t size) {
  if (allocations_left == 0) return NULL;
  if (allocations_left > 0) allocations_left--;
  return malloc(size);
}

#define malloc limited_malloc
#include "kernels.c"
#undef malloc

#define CHECK(condition)                                                      \
  do {                                                                        \
    if (!(condition)) {                                                       \
      fprintf(stderr, "line %d of ffi_driver.c: %s\n", __LINE__, #condition); \
      exit(3);                                                                \
    }                                                                         \
  } while (0)

// ---- The side of XLA ----

struct XLA_FFI_Error {
  XLA_FFI_Error_Code code;
  char message[256];
};

static XLA_FFI_Error* create_error(XLA_FFI_Error_Create_Args* args) {
  XLA_FFI_Error* error = malloc(sizeof *error);
  error->code = args->errc;
  snprintf(error->message, sizeof error->message, "%s", args->message);
  return error;
}

static void destroy_error(XLA_FFI_Error_Destroy_Args* args) { free(args->error); }

// What the pool does with a task: its threads are there to take it, its caller does it
// at once, it is refused, or there is no pool.
typedef enum { THREADS, INLINE_TASKS, REFUSED, NO_POOL, POOLS } Pool;

enum { POOL_THREADS = 4, MAX_TASKS = 1 << 12 };

static Pool pool;
static struct {
  pthread_mutex_t mutex;
  pthread_cond_t changed;
  XLA_FFI_Task* tasks[MAX_TASKS];
  void* data[MAX_TASKS];
  long first, last;
  int ends;
} queue = {.mutex = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

static void* pool_thread(void* unused) {
  pthread_mutex_lock(&queue.mutex);
  while (!queue.ends || queue.first < queue.last) {
    if (queue.first == queue.last) {
      pthread_cond_wait(&queue.changed, &queue.mutex);
      continue;
    }
    long i = queue.first++ % MAX_TASKS;
    XLA_FFI_Task* task = queue.tasks[i];
    void* data = queue.data[i];
    pthread_mutex_unlock(&queue.mutex);
    task(data);
    pthread_mutex_lock(&queue.mutex);
  }
  pthread_mutex_unlock(&queue.mutex);
  return unused;
}

static XLA_FFI_Error* refusal(void) {
  XLA_FFI_Error_Create_Args args = {.message = "no", .errc = XLA_FFI_Error_Code_UNAVAILABLE};
  return create_error(&args);
}

static XLA_FFI_Error* schedule(XLA_FFI_ThreadPool_Schedule_Args* args) {
  if (pool == REFUSED) return refusal();
  if (pool == INLINE_TASKS) {
    args->task(args->data);
    return NULL;
  }
  pthread_mutex_lock(&queue.mutex);
  CHECK(queue.last - queue.first < MAX_TASKS);
  queue.tasks[queue.last % MAX_TASKS] = args->task;
  queue.data[queue.last++ % MAX_TASKS] = args->data;
  pthread_cond_signal(&queue.changed);
  pthread_mutex_unlock(&queue.mutex);
  return NULL;
}

static XLA_FFI_Error* num_threads(XLA_FFI_ThreadPool_NumThreads_Args* args) {
  if (pool == NO_POOL) return refusal();
  *args->num_threads = POOL_THREADS;
  return NULL;
}

static const XLA_FFI_Api api = {.struct_size = XLA_FFI_Api_STRUCT_SIZE,
                                .XLA_FFI_Error_Create = create_error,
                                .XLA_FFI_Error_Destroy = destroy_error,
                                .XLA_FFI_ThreadPool_Schedule = schedule,
                                .XLA_FFI_ThreadPool_NumThreads = num_threads};

// ---- Calls ----

enum { MAX_ARRAYS = 16 };
static const XLA_FFI_DataType F32 = XLA_FFI_DataType_F32, BF16 = XLA_FFI_DataType_BF16;

typedef XLA_FFI_Error* Handler(XLA_FFI_CallFrame* frame);

typedef struct {
  XLA_FFI_CallFrame frame;
  Handler* handler;
  int64_t activation;
  int64_t count;  // of arrays: arguments, then results
  XLA_FFI_Buffer arrays[MAX_ARRAYS];
  int64_t dims[MAX_ARRAYS][2];
  void* pointers[MAX_ARRAYS];
  XLA_FFI_ArgType argument_types[MAX_ARRAYS];
  XLA_FFI_RetType result_types[MAX_ARRAYS];
  XLA_FFI_Scalar scalar;
  XLA_FFI_ByteSpan name, *names[1];
  XLA_FFI_AttrType attribute_types[1];
  void* attributes[1];
} Frame;

static int64_t bytes_of(const XLA_FFI_Buffer* array) {
  int64_t bytes = array->dtype == BF16 ? 2 : 4;
  for (int64_t axis = 0; axis < array->rank; axis++) bytes *= array->dims[axis];
  return bytes;
}

static float random_float(void) { return rand() / (float)RAND_MAX * 4 - 2; }

// Adds an array of random values, all positive for the variance and epsilon.
static void add_array(Frame* call, char letter, int64_t rows, int64_t features, XLA_FFI_DataType x_dtype,
                      XLA_FFI_DataType y_dtype) {
  int64_t i = call->count++;
  XLA_FFI_Buffer* array = &call->arrays[i];
  int matrix = letter == 'x' || letter == 'y';
  *array = (XLA_FFI_Buffer){XLA_FFI_Buffer_STRUCT_SIZE, NULL, F32, NULL, matrix ? 2 : 1,
                            call->dims[i]};
  if (letter == 'x') array->dtype = x_dtype;
  if (letter == 'y') array->dtype = y_dtype;
  call->dims[i][0] = matrix ? rows : letter == 's' ? 1 : features;
  call->dims[i][1] = features;
  int64_t bytes = bytes_of(array), bf16 = array->dtype == BF16;
  array->data = malloc(bytes);
  for (int64_t at = 0; at < bytes / (bf16 ? 2 : 4); at++) {
    float value = random_float();
    store(array->data, at, matrix ? value : value * value + 0.1f, bf16);
  }
  call->pointers[i] = array;
}

// Makes a call from a signature, as kernels.c writes them.
static void make_call(Frame* call, Handler* handler, const char* signature, int64_t rows,
                      int64_t features, XLA_FFI_DataType x_dtype, XLA_FFI_DataType y_dtype, int64_t activation) {
  *call = (Frame){.handler = handler, .activation = activation};
  const char* results = strstr(signature, "->");
  int64_t argument_count = results - signature;
  for (const char* at = signature; *at; at++)
    if (*at != '-' && *at != '>')
      add_array(call, *at, rows, features, x_dtype, y_dtype);
  for (int64_t i = 0; i < MAX_ARRAYS; i++) {
    call->argument_types[i] = XLA_FFI_ArgType_BUFFER;
    call->result_types[i] = XLA_FFI_RetType_BUFFER;
  }
  call->scalar = (XLA_FFI_Scalar){XLA_FFI_DataType_S64, &call->activation};
  call->name = (XLA_FFI_ByteSpan){"activation", 10};
  call->names[0] = &call->name;
  call->attribute_types[0] = XLA_FFI_AttrType_SCALAR;
  call->attributes[0] = &call->scalar;
  XLA_FFI_CallFrame* frame = &call->frame;
  frame->struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame->api = &api;
  frame->stage = XLA_FFI_ExecutionStage_EXECUTE;
  frame->args = (XLA_FFI_Args){XLA_FFI_Args_STRUCT_SIZE, NULL, argument_count,
                               call->argument_types, call->pointers};
  frame->rets = (XLA_FFI_Rets){XLA_FFI_Rets_STRUCT_SIZE, NULL, call->count - argument_count,
                               call->result_types, call->pointers + argument_count};
  frame->attrs = (XLA_FFI_Attrs){XLA_FFI_Attrs_STRUCT_SIZE, NULL, activation >= 0,
                                 call->attribute_types, call->names, call->attributes};
}

static void free_call(Frame* call) {
  for (int64_t i = 0; i < call->count; i++) free(call->arrays[i].data);
}

static void refuses(Frame* call, XLA_FFI_Error_Code code, const char* why, int line) {
  XLA_FFI_Error* error = call->handler(&call->frame);
  if (!error || error->code != code || strncmp(error->message, "bnjax_", 6)) {
    fprintf(stderr, "line %d of ffi_driver.c, %s: %s\n", line, why,
            error ? error->message : "not refused");
    exit(3);
  }
  free(error);
}

static void succeeds(Frame* call) {
  XLA_FFI_Error* error = call->handler(&call->frame);
  if (error) fprintf(stderr, "%s\n", error->message);
  CHECK(!error);
}

typedef struct {
  Handler* handler;
  const char* signature;
  int64_t activation;  // -1: no attribute
} Kind;

static const Kind kinds[] = {
    {bnjax_moments, "x->ccc", -1},
    {bnjax_output, "xcccscc->y", 0},
    {bnjax_output, "xcccscc->y", 1},
    {bnjax_output, "xcccsccx->y", 1},
    {bnjax_gradient, "yxcccscccc->xscc", 0},
    {bnjax_gradient, "yxcccscccc->xscc", 1},
    {bnjax_gradient, "yxcccsccccy->xsccx", 1},
};
enum { KIND_COUNT = sizeof kinds / sizeof *kinds };

// ---- What is tried ----

// The results of a call have the same bits whatever the pool does with its tasks.
static void try_pools(const Kind* kind, int64_t rows, int64_t features, XLA_FFI_DataType x_dtype,
                      XLA_FFI_DataType y_dtype) {
  Frame call;
  make_call(&call, kind->handler, kind->signature, rows, features, x_dtype, y_dtype,
            kind->activation);
  void* expected[MAX_ARRAYS];
  int64_t first = call.frame.args.size;
  for (pool = 0; pool < POOLS; pool++) {
    succeeds(&call);
    for (int64_t i = first; i < call.count; i++) {
      XLA_FFI_Buffer* array = &call.arrays[i];
      int64_t bytes = bytes_of(array);
      if (pool == 0)
        expected[i] = memcpy(malloc(bytes), array->data, bytes);
      else
        CHECK(!memcmp(expected[i], array->data, bytes));
      memset(array->data, 0xff, bytes);
    }
  }
  for (int64_t i = first; i < call.count; i++) free(expected[i]);
  pool = THREADS;
  // Without memory for its sums a call fails; without any for its queue it goes alone.
  allocations_left = 0;
  refuses(&call, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "no memory", __LINE__);
  allocations_left = 1;
  succeeds(&call);
  allocations_left = -1;
  free_call(&call);
}

static void* call_often(void* kind) {
  const Kind* of = kind;
  Frame call;
  make_call(&call, of->handler, of->signature, 4099, 48, F32, BF16, of->activation);
  for (int i = 0; i < 20; i++) succeeds(&call);
  free_call(&call);
  return NULL;
}

// Every way in which a call may be malformed, one at a time.
static long try_malformed(const Kind* kind) {
  static const XLA_FFI_Error_Code invalid = XLA_FFI_Error_Code_INVALID_ARGUMENT;
  Frame call;
  make_call(&call, kind->handler, kind->signature, 5, 3, F32, F32, kind->activation);
  XLA_FFI_CallFrame* frame = &call.frame;
  long tried = 0;
#define WITH(place, value)                       \
  do {                                           \
    __typeof__(place) before = place;            \
    place = value;                               \
    refuses(&call, invalid, #place, __LINE__);   \
    place = before;                              \
    tried++;                                     \
  } while (0)
  for (int64_t i = 0; i < call.count; i++) {
    XLA_FFI_Buffer* array = &call.arrays[i];
    int is_x = kind->activation < 0 && i == 0;
    for (int dtype = 0; dtype < 40; dtype++) {
      // Which of the two it is may be an array's own choice.
      if (dtype != (int)F32 && dtype != (int)BF16) WITH(array->dtype, dtype);
    }
    int64_t more[5] = {array->dims[0], array->dims[1], 1, 1, 1}, *given = array->dims;
    array->dims = more;
    for (int64_t rank = -1; rank < 5; rank++)
      if (rank != array->rank) WITH(array->rank, rank);
    array->dims = given;
    for (int64_t axis = 0; axis < array->rank; axis++) {
      static const int64_t wrong[] = {-1, 0, 4, INT64_MAX, INT64_MIN, (int64_t)1 << 32};
      for (size_t w = 0; w < sizeof wrong / sizeof *wrong; w++) {
        // The moments take any number of rows.
        if (is_x && axis == 0 && (wrong[w] == 4 || wrong[w] == (int64_t)1 << 32)) continue;
        WITH(array->dims[axis], wrong[w]);
      }
    }
    WITH(array->data, NULL);
  }
  for (int64_t i = 0; i < frame->args.size; i++) WITH(call.argument_types[i], 9);
  for (int64_t i = 0; i < frame->rets.size; i++) WITH(call.result_types[i], 9);
  for (int64_t size = -1; size < call.count; size++) {
    // The output without its residual is a call as it should be.
    int valid = size == 7 && frame->rets.size == 1;
    if (size != frame->args.size && !valid) WITH(frame->args.size, size);
    if (size != frame->rets.size) WITH(frame->rets.size, size);
  }
  WITH(frame->struct_size, 8);
  WITH(frame->stage, XLA_FFI_ExecutionStage_PREPARE);
  WITH(frame->attrs.size, kind->activation < 0);
  if (kind->activation >= 0) {
    WITH(frame->attrs.size, 2);
    WITH(call.attribute_types[0], XLA_FFI_AttrType_STRING);
    WITH(call.attribute_types[0], XLA_FFI_AttrType_ARRAY);
    WITH(call.scalar.dtype, XLA_FFI_DataType_S32);
    WITH(call.name.len, 9);
    WITH(call.name.len, 0);
    WITH(call.name.ptr, "activatiom");
    WITH(call.activation, 2);
    WITH(call.activation, -1);
    WITH(call.activation, INT64_MIN);
  }
  // A matrix that cannot be: its size would overflow.
  int64_t dims[2] = {INT64_MAX / 2, 3};
  for (int64_t i = 0; i < call.count; i++) call.arrays[i].dims = dims;
  refuses(&call, invalid, "no such size", __LINE__);
  free_call(&call);
  return tried + 1;
}

int main(void) {
  static const int64_t shapes[][2] = {
      {1, 1},    {2, 1},    {1003, 1},  {131071, 1}, {2, 3},     {53, 7},     {257, 5},
      {1, 2500}, {37, 2500}, {1030, 1025}, {4097, 33}, {8192, 16}, {3, 100003}, {20001, 13},
  };
  const XLA_FFI_DataType dtypes[] = {F32, BF16};
  pthread_t threads[POOL_THREADS], callers[KIND_COUNT];
  for (int i = 0; i < POOL_THREADS; i++)
    CHECK(!pthread_create(&threads[i], NULL, pool_thread, NULL));
  long calls = 0, malformed = 0;
  for (int k = 0; k < KIND_COUNT; k++) {
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
      for (int x = 0; x < 2; x++)
        for (int y = 0; y < (k ? 2 : 1); y++, calls++)
          try_pools(&kinds[k], shapes[s][0], shapes[s][1], dtypes[x], dtypes[y]);
    malformed += try_malformed(&kinds[k]);
  }
  for (int k = 0; k < KIND_COUNT; k++)
    CHECK(!pthread_create(&callers[k], NULL, call_often, (void*)&kinds[k]));
  for (int k = 0; k < KIND_COUNT; k++) CHECK(!pthread_join(callers[k], NULL));
  pthread_mutex_lock(&queue.mutex);
  queue.ends = 1;
  pthread_cond_broadcast(&queue.changed);
  pthread_mutex_unlock(&queue.mutex);
  for (int i = 0; i < POOL_THREADS; i++) CHECK(!pthread_join(threads[i], NULL));
  printf("%ld calls, %ld malformed ones refused\n", calls, malformed);
  return 0;
}
