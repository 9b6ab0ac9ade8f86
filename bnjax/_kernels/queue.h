// A job divided among the threads that XLA has.

#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "loops.h"
#include "xla/ffi/api/c_api.h"

// The parts of a job, for the threads of XLA and for the one that waits for them.
typedef struct {
  Work* work;
  const Job* job;
  int64_t parts;
  atomic_long next, done, users;
} Queue;

static void leave(Queue* queue) {
  if (atomic_fetch_sub(&queue->users, 1) == 1) free(queue);
}

static void take_parts(void* data) {
  Queue* queue = data;
  for (long part; (part = atomic_fetch_add(&queue->next, 1)) < queue->parts;) {
    queue->work(queue->job, part);
    atomic_fetch_add(&queue->done, 1);
  }
  leave(queue);
}

static int failed(XLA_FFI_CallFrame* frame, XLA_FFI_Error* error) {
  if (!error) return 0;
  XLA_FFI_Error_Destroy_Args args = {XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, NULL,
                                     error};
  frame->api->XLA_FFI_Error_Destroy(&args);
  return 1;
}

static int64_t threads_of(XLA_FFI_CallFrame* frame) {
  int64_t threads = 1;
  XLA_FFI_ThreadPool_NumThreads_Args args = {
      XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE, NULL, frame->ctx, &threads};
  return failed(frame, frame->api->XLA_FFI_ThreadPool_NumThreads(&args)) ? 1 : threads;
}

static void run(XLA_FFI_CallFrame* frame, Work* work, const Job* job) {
  int64_t parts = job->layout.parts;
  int64_t helpers = parts > 1 ? least(threads_of(frame), parts) - 1 : 0;
  Queue* queue = helpers > 0 ? malloc(sizeof *queue) : NULL;
  if (!queue) {
    for (int64_t part = 0; part < parts; part++) work(job, part);
    return;
  }
  queue->work = work, queue->job = job, queue->parts = parts;
  atomic_init(&queue->next, 0);
  atomic_init(&queue->done, 0);
  atomic_init(&queue->users, helpers + 2);
  XLA_FFI_ThreadPool_Schedule_Args args = {
      XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE, NULL, frame->ctx, take_parts, queue};
  for (int64_t helper = 0; helper < helpers; helper++)
    if (failed(frame, frame->api->XLA_FFI_ThreadPool_Schedule(&args))) leave(queue);
  take_parts(queue);
  while (atomic_load(&queue->done) < parts) sched_yield();
  leave(queue);
}
