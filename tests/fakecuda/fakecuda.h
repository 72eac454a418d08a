/* A CUDA driver on host memory, so that the GPU paths run where no GPU is: what its files share.
 *
 * Built as fakecuda/libcuda.so.1 of the build folder, which a process opens when LD_LIBRARY_PATH names that folder.  It
 * is an instrument: it answers mistakes as the real driver does, or more strictly, and emulates no GPU's arithmetic.
 *
 *   driver.c   start, devices, contexts, errors that are asked for          memory.c   addresses, allocations, pinning
 *   streams.c  a thread for each stream; events                             vmm.c      cuMemCreate and what belongs to
 * it work.c     copies, launches, waits: what is queued                      kernels.c  kernels by name
 *
 * What it is strict about:
 *  - A device address is no host address: nothing can be read or written there (SIGSEGV).  The bytes lie elsewhere, at
 * an address that only this library knows.  But a descriptor of GPU memory is a memfd, which anybody can map.
 *  - Every queued operation checks its ranges when it is queued (an error of the call) and again when it runs (a sticky
 *    CUDA_ERROR_ILLEGAL_ADDRESS): memory that is unmapped under a copy is noticed.
 *  - Pageable host memory is copied when the call is made, pinned memory is read when the operation runs.
 *  - What is left when the last reference to a context goes, mappings of the GPU's memory among it, aborts the process
 * with a sentence on stderr.
 *
 * Environment, read by cuInit:
 *   FAKECUDA_GPUS=1          how many; CUDA_VISIBLE_DEVICES takes indices among them
 *   FAKECUDA_BYTES           memory of each, 16 GiB
 *   FAKECUDA_STATE=word      memory is accounted over all processes of this user that have the same word: whatever
 *                            allocation any of them still maps or has open.  Without it, each process has GPUs of its
 * own. FAKECUDA_DELAY_US=n      before each queued operation a random time up to this
 *   FAKECUDA_FAIL=function:nth:code[:late][,...]   the nth call of that function ("*": of any that can fail so) fails
 *                            with that code; "late": the call succeeds and what it queued fails when it runs.  After a
 *                            code that no context survives every later call fails with it.
 *
 * Limits: no graphs, arrays, textures, memory pools, nor anything that is not defined here; NCCL does not run on it.
 * Any thread; one lock guards everything that is not a stream's own. */
#ifndef EEP_TESTS_FAKECUDA_H
#define EEP_TESTS_FAKECUDA_H

#include <cuda.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "tests/engine/kernels.h"

#define FAKE_GPUS_MAX    16
#define FAKE_GRANULARITY ((size_t)2 << 20)

/* ---- driver.c ---- */

struct CUctx_st {
    int device;
    unsigned refs;
    unsigned things; /* streams, events, modules and memory that belong to it */
    CUstream null_stream;
};

struct fake {
    pthread_mutex_t lock;
    pthread_cond_t changed; /* an operation, or a use of a range, has ended */
    _Atomic bool started, forked;
    CUresult sticky; /* what all calls answer from then on */
    int n_gpus;
    int gpu[FAKE_GPUS_MAX]; /* which one device i is */
    size_t gpu_bytes;
    unsigned delay_us;
    char state[64]; /* "": no accounting beyond this process */
    struct CUctx_st contexts[FAKE_GPUS_MAX];
};
extern struct fake fake;

enum fake_need {
    FAKE_ALWAYS,  /* also after an error that lasts */
    FAKE_STARTED, /* cuInit was called */
    FAKE_CONTEXT, /* and a context is current */
};
/* At the start of every function: what it has to answer at once.  function: __func__. */
CUresult fake_enter(const char *function, enum fake_need need);
/* The code with which the operation that this call queues is to fail; asking takes it away. */
CUresult fake_late(void);
CUcontext fake_current(void);
bool fake_device_valid(CUdevice device);
bool fake_is_sticky(CUresult result);
/* Exported, for a test that has the library by dlopen: the error that has broken the contexts of this process, or
 * CUDA_SUCCESS.  Asking is no call of the driver that could fail. */
CUresult fakecuda_sticky(void);
/* In a stream's thread: while it runs a function of the user's, which may not call the driver. */
void fake_callback(bool runs);
/* A mistake that the real driver would let pass. */
__attribute__((noreturn, format(printf, 1, 2))) void fake_abort(const char *fmt, ...);

/* With the lock held around. */
void fake_lock(void);
void fake_unlock(void);

/* ---- memory.c ---- */

enum fake_kind { RANGE_VMM, RANGE_DEVICE, RANGE_HOST, RANGE_REGISTERED };

/* Physical memory: a memfd. */
struct fake_alloc {
    struct fake_alloc *next;
    CUmemGenericAllocationHandle handle;
    unsigned refs; /* handles and mappings */
    unsigned handles;
    int fd, device;
    size_t size;
    uint64_t inode;
    bool exportable;
};
/* Addresses that can be used.  Those of the device have their bytes at base + shadow. */
struct fake_range {
    struct fake_range *next;
    enum fake_kind kind;
    uintptr_t base;
    size_t size, shadow;
    struct fake_alloc *alloc;            /* VMM, DEVICE */
    CUcontext context;                   /* not VMM */
    unsigned char access[FAKE_GPUS_MAX]; /* CUmemAccess_flags of each device */
    unsigned users;                      /* operations that run */
};

/* Ranges that an operation uses while it runs. */
struct fake_use {
    int device;
    struct fake_range **v;
    size_t n, cap;
};
/* Where the bytes of a device's addresses are, or NULL if the device must not read (write) all of them.  They stay
 * until fake_use_done(). */
void *fake_use(struct fake_use *use, CUdeviceptr at, size_t len, bool write);
void fake_use_done(struct fake_use *use);
/* Whether it could be used now. */
bool fake_usable(int device, CUdeviceptr at, size_t len, bool write);
/* All of it is pinned host memory. */
bool fake_pinned(const void *at, size_t len);
/* The range that has this address, any kind; with the lock. */
struct fake_range *fake_range_at(uintptr_t at);
struct fake_range *fake_range_new(enum fake_kind kind, uintptr_t base, size_t size);
void fake_range_remove(struct fake_range *range); /* waits for operations that use it */

/* ---- vmm.c; with the lock ---- */

CUresult fake_alloc_new(int device, size_t size, struct fake_alloc **ret_alloc);
void fake_alloc_unref(struct fake_alloc *alloc);
size_t fake_bytes_used(int device);
/* How many allocations of cuMemCreate, made or imported here, have a handle or a mapping. */
unsigned fake_allocs_of(int device);
/* Addresses for `size` bytes, with as many behind them for the bytes; 0: none. */
uintptr_t fake_addresses_new(size_t size, size_t alignment);
void fake_addresses_free(uintptr_t base, size_t size);

/* ---- streams.c ---- */

/* The end of one operation. */
struct fake_mark {
    unsigned refs;
    bool done;
    uint64_t ns;
};

struct fake_op {
    struct fake_op *next;
    struct fake_mark *mark;
    CUresult fail; /* it fails with this instead of running */
    CUresult (*run)(struct fake_op *op, int device);
    void *owned; /* freed with it: staged bytes, arguments */
    /* of copies, memsets, values */
    CUdeviceptr dst, src;
    void *host_dst;
    const void *host_src;
    size_t len;
    uint64_t value;
    unsigned flags;
    /* of launches */
    const struct fake_kernel *kernel;
    unsigned grid[3], block[3];
    CUhostFn function;
    void *user;
    struct fake_mark *wait;
};

struct fake_op *fake_op_new(CUresult (*run)(struct fake_op *op, int device));
/* Queues it, or fails and frees it.  wait: until it has run. */
CUresult fake_enqueue(CUstream stream, struct fake_op *op, bool wait);
/* Waits for everything in a context; with the lock. */
void fake_context_settle(CUcontext context);
/* When a context ends: ends the stream that it had by itself, and waits for destroyed ones that still work. */
void fake_streams_end(CUcontext context);
/* Joins the threads of streams that were destroyed and are done; without the lock. */
void fake_streams_join(void);

/* ---- kernels.c ---- */

struct fake_launch {
    unsigned grid[3], block[3];
    struct fake_use use; /* for pointers in the arguments: fake_use() */
};
/* args as the launch had them, copied: one pointer to each parameter.  CUDA_ERROR_ILLEGAL_ADDRESS for a bad pointer. */
struct fake_kernel {
    const char *name;
    CUresult (*run)(struct fake_launch *launch, void **args);
    unsigned char sizes[16]; /* of the parameters, in bytes; 0 ends them */
};
const struct fake_kernel *fake_kernel_find(const char *name);

/* ---- kernels_engine.c: those of tests/engine/kernels.cu ---- */
#define FAKE_ENGINE_KERNEL(name) CUresult fake_##name(struct fake_launch *launch, void **args);
KERNEL_TABLE(FAKE_ENGINE_KERNEL)
#undef FAKE_ENGINE_KERNEL

#endif
