/* The GPU that the agent's weights lie on, as the engine's process sees it.  device_cuda.c, or device_stub.c in a build
 * without cuda.h, whose device_open says so; nobody calls anything else there.
 *
 * A stream is a CUstream (cudaStream_t); NULL means none: the engine's work is complete when it says so.  The device's
 * primary context is used, the one that the CUDA runtime uses as well, and the calling thread's current context is what
 * it was on return.  Any thread; the device_step_* functions and device_maps_write are the stepping thread's.
 *
 * The words of a step: its work is *launched* when step_end returns, and *done* when the stream has come to that point.
 * `done` is written in stream order, by the stream itself where the device can write to host memory (cuStreamWriteValue64
 * to the control page), else by a host function.  So it may come when no thread of the engine passes a boundary. */
#ifndef EEP_LIBEEP_DEVICE_H
#define EEP_LIBEEP_DEVICE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "agent/libeep/eep.h"
#include "common/err.h"
#include "common/page.h"

struct device;
struct device_maps;

/* gpu: the UUID that the agent told.  page: borrowed, until device_close. */
int device_open(const char *gpu, struct control_page *page, size_t page_bytes, struct device **ret_device,
                struct err *err) MUST_CHECK;
/* Takes NULL.  Unless device_drain has said that nothing runs any more, what it may touch is left where it is. */
void device_close(struct device *d);
int device_ordinal(const struct device *d);

/* Maps memory of the agent that came as a descriptor; fd stays the caller's. */
int device_map(struct device *d, int fd, size_t bytes, void **ret_base, size_t *ret_mapped, struct err *err) MUST_CHECK;
void device_unmap(struct device *d, void *base, size_t mapped);

/* Waits until every step that was launched is complete, at most limit_ms: false then. */
bool device_drain(struct device *d, int limit_ms);

/* ---- maps ---- */
/* Sets maps->device_*: copies of the arrays at fixed addresses, and load counters that begin with maps->expert_load. */
int device_maps_new(struct device *d, struct eep_maps *maps, struct device_maps **ret_maps, struct err *err) MUST_CHECK;
void device_maps_free(struct device *d, struct device_maps *m);
/* Enqueues the arrays as they are now.  They may be rewritten on return.  Without a stream they are there on return. */
int device_maps_write(struct device *d, struct device_maps *m, const struct eep_maps *maps, void *stream,
                      struct err *err) MUST_CHECK;

/* ---- steps ---- */
/* False: as many steps as may be unfinished (DEVICE_STEPS_AHEAD) are. */
#define DEVICE_STEPS_AHEAD 64u
bool device_step_room(struct device *d);
/* From here on work for this step goes to the stream, after that of the steps before, whichever stream had them. */
int device_step_begin(struct device *d, void *stream, struct err *err) MUST_CHECK;
/* All work of the step is in the stream: behind it the load counters of `m` (or NULL) go to the agent. */
int device_step_end(struct device *d, struct device_maps *m, const struct eep_maps *maps, void *stream,
                    struct err *err) MUST_CHECK;
/* The step is over, or failed: done = step when the stream comes to this point.  When this fails, the context is at its
 * end, nothing runs in it any more, and the word is written at once. */
int device_step_done(struct device *d, void *stream, uint64_t step, struct err *err) MUST_CHECK;
/* How long a step that has completed took on the device; each is said once.  False: none has. */
bool device_step_ns(struct device *d, uint64_t *ret_ns);

#endif
