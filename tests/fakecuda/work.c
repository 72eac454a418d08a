/* What is put on streams: copies, memsets, words, launches, host functions; modules, where launches come from. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tests/fakecuda/fakecuda.h"

#define POLL_US 50 /* between two looks at a word that a stream waits for */

/* ---- copies ---- */

static CUresult copy_run(struct fake_op *op, int device)
{
    struct fake_use use = {.device = device};
    void *dst = op->host_dst ? op->host_dst : fake_use(&use, op->dst, op->len, true);
    const void *src = op->host_src ? op->host_src : fake_use(&use, op->src, op->len, false);
    if (dst && src)
        memmove(dst, src, op->len);
    fake_use_done(&use);
    return dst && src ? CUDA_SUCCESS : CUDA_ERROR_ILLEGAL_ADDRESS;
}

/* Both sides may be anything that the device can use; host: the one that is host memory by the name of the call. */
static CUresult copy(CUdeviceptr dst, CUdeviceptr src, size_t len, const void *host, CUstream stream, bool wait)
{
    int device = fake_current()->device;
    bool to_host = host && (uintptr_t)host == dst, pageable = host && !fake_pinned(host, len);
    if (len == 0)
        return CUDA_SUCCESS;
    if ((!(to_host && pageable) && !fake_usable(device, dst, len, true)) ||
        (!(host && !to_host && pageable) && !fake_usable(device, src, len, false)))
        return CUDA_ERROR_INVALID_VALUE;
    struct fake_op *op = fake_op_new(copy_run);
    op->dst = dst;
    op->src = src;
    op->len = len;
    if (pageable && to_host) { /* the caller's, and not pinned: it is written before the call returns */
        op->host_dst = (void *)(uintptr_t)dst;
        wait = true;
    } else if (pageable) {
        op->owned = malloc(len);
        if (!op->owned)
            fake_abort("out of memory");
        op->host_src = memcpy(op->owned, host, len);
        wait = false;
    }
    return fake_enqueue(stream, op, wait);
}

CUresult CUDAAPI cuMemcpyHtoDAsync(CUdeviceptr dstDevice, const void *srcHost, size_t ByteCount, CUstream hStream)
{
    CUresult rc = fake_enter(__func__, FAKE_CONTEXT);
    return rc == CUDA_SUCCESS ? copy(dstDevice, (CUdeviceptr)(uintptr_t)srcHost, ByteCount, srcHost, hStream, false)
                              : rc;
}

CUresult CUDAAPI cuMemcpyDtoHAsync(void *dstHost, CUdeviceptr srcDevice, size_t ByteCount, CUstream hStream)
{
    CUresult rc = fake_enter(__func__, FAKE_CONTEXT);
    return rc == CUDA_SUCCESS ? copy((CUdeviceptr)(uintptr_t)dstHost, srcDevice, ByteCount, dstHost, hStream, false)
                              : rc;
}

CUresult CUDAAPI cuMemcpyDtoDAsync(CUdeviceptr dstDevice, CUdeviceptr srcDevice, size_t ByteCount, CUstream hStream)
{
    CUresult rc = fake_enter(__func__, FAKE_CONTEXT);
    return rc == CUDA_SUCCESS ? copy(dstDevice, srcDevice, ByteCount, NULL, hStream, false) : rc;
}

#if CUDA_VERSION >= 13000 /* 12.8 has it with another signature: there the copies are made one by one */
CUresult CUDAAPI cuMemcpyBatchAsync(CUdeviceptr *dsts, CUdeviceptr *srcs, size_t *sizes, size_t count,
                                    CUmemcpyAttributes *attrs, size_t *attrsIdxs, size_t numAttrs, CUstream hStream)
{
    CUresult rc = fake_enter(__func__, FAKE_CONTEXT);
    if (rc == CUDA_SUCCESS && (count == 0 || !hStream || numAttrs != 1 || attrsIdxs[0] != 0 ||
                               attrs[0].srcAccessOrder == CU_MEMCPY_SRC_ACCESS_ORDER_INVALID))
        rc = CUDA_ERROR_INVALID_VALUE;
    for (size_t i = 0; i < count && rc == CUDA_SUCCESS; i++)
        rc = copy(dsts[i], srcs[i], sizes[i], NULL, hStream, false);
    return rc;
}
#endif

CUresult CUDAAPI cuMemcpyHtoD(CUdeviceptr dstDevice, const void *srcHost, size_t ByteCount)
{
    CUresult rc = fake_enter(__func__, FAKE_CONTEXT);
    return rc == CUDA_SUCCESS ? copy(dstDevice, (CUdeviceptr)(uintptr_t)srcHost, ByteCount, srcHost, NULL, true) : rc;
}

CUresult CUDAAPI cuMemcpyDtoH(void *dstHost, CUdeviceptr srcDevice, size_t ByteCount)
{
    CUresult rc = fake_enter(__func__, FAKE_CONTEXT);
    return rc == CUDA_SUCCESS ? copy((CUdeviceptr)(uintptr_t)dstHost, srcDevice, ByteCount, dstHost, NULL, true) : rc;
}

/* Inside the device nothing is waited for, as in the real one. */
CUresult CUDAAPI cuMemcpyDtoD(CUdeviceptr dstDevice, CUdeviceptr srcDevice, size_t ByteCount)
{
    CUresult rc = fake_enter(__func__, FAKE_CONTEXT);
    return rc == CUDA_SUCCESS ? copy(dstDevice, srcDevice, ByteCount, NULL, NULL, false) : rc;
}

/* Each side is what its address is: known to the driver, or else pageable. */
CUresult CUDAAPI cuMemcpyAsync(CUdeviceptr dst, CUdeviceptr src, size_t ByteCount, CUstream hStream)
{
    CUresult rc = fake_enter(__func__, FAKE_CONTEXT);
    if (rc != CUDA_SUCCESS)
        return rc;
    fake_lock();
    bool dst_known = fake_range_at(dst) != NULL, src_known = fake_range_at(src) != NULL;
    fake_unlock();
    if (!dst_known && !src_known)
        return CUDA_ERROR_INVALID_VALUE;
    const void *host = !dst_known ? (void *)(uintptr_t)dst : !src_known ? (void *)(uintptr_t)src : NULL;
    return copy(dst, src, ByteCount, host, hStream, false);
}

/* ---- memsets ---- */

static CUresult memset_run(struct fake_op *op, int device)
{
    struct fake_use use = {.device = device};
    void *dst = fake_use(&use, op->dst, op->len, true);
    if (dst)
        memset(dst, (int)op->value, op->len);
    fake_use_done(&use);
    return dst ? CUDA_SUCCESS : CUDA_ERROR_ILLEGAL_ADDRESS;
}

static CUresult set(CUdeviceptr dst, unsigned char value, size_t len, CUstream stream)
{
    if (len == 0)
        return CUDA_SUCCESS;
    if (!fake_usable(fake_current()->device, dst, len, true))
        return CUDA_ERROR_INVALID_VALUE;
    struct fake_op *op = fake_op_new(memset_run);
    op->dst = dst;
    op->len = len;
    op->value = value;
    return fake_enqueue(stream, op, false);
}

CUresult CUDAAPI cuMemsetD8Async(CUdeviceptr dstDevice, unsigned char uc, size_t N, CUstream hStream)
{
    CUresult rc = fake_enter(__func__, FAKE_CONTEXT);
    return rc == CUDA_SUCCESS ? set(dstDevice, uc, N, hStream) : rc;
}

CUresult CUDAAPI cuMemsetD8(CUdeviceptr dstDevice, unsigned char uc, size_t N)
{
    CUresult rc = fake_enter(__func__, FAKE_CONTEXT);
    return rc == CUDA_SUCCESS ? set(dstDevice, uc, N, NULL) : rc;
}

/* ---- words that streams write and wait for ---- */

static bool value_reached(uint64_t is, const struct fake_op *op)
{
    switch (op->flags & 3u) {
    case CU_STREAM_WAIT_VALUE_GEQ:
        return (int64_t)(is - op->value) >= 0;
    case CU_STREAM_WAIT_VALUE_EQ:
        return is == op->value;
    case CU_STREAM_WAIT_VALUE_AND:
        return (is & op->value) != 0;
    default:
        return (~(is | op->value)) != 0;
    }
}

static CUresult value_wait_run(struct fake_op *op, int device)
{
    for (;;) {
        struct fake_use use = {.device = device};
        const uint64_t *word = fake_use(&use, op->dst, sizeof *word, false);
        bool reached = word && value_reached(__atomic_load_n(word, __ATOMIC_SEQ_CST), op);
        fake_use_done(&use);
        if (!word)
            return CUDA_ERROR_ILLEGAL_ADDRESS;
        fake_lock();
        bool lost = fake.sticky != CUDA_SUCCESS;
        fake_unlock();
        if (reached || lost)
            return CUDA_SUCCESS;
        usleep(POLL_US);
    }
}

static CUresult value_write_run(struct fake_op *op, int device)
{
    struct fake_use use = {.device = device};
    uint64_t *word = fake_use(&use, op->dst, sizeof *word, true);
    if (word)
        __atomic_store_n(word, op->value, __ATOMIC_SEQ_CST);
    fake_use_done(&use);
    return word ? CUDA_SUCCESS : CUDA_ERROR_ILLEGAL_ADDRESS;
}

static CUresult value(CUstream stream, CUdeviceptr addr, uint64_t word, unsigned flags, bool write)
{
    if (addr % sizeof word != 0 || !fake_usable(fake_current()->device, addr, sizeof word, write))
        return CUDA_ERROR_INVALID_VALUE;
    struct fake_op *op = fake_op_new(write ? value_write_run : value_wait_run);
    op->dst = addr;
    op->value = word;
    op->flags = flags;
    return fake_enqueue(stream, op, false);
}

CUresult CUDAAPI cuStreamWaitValue64(CUstream stream, CUdeviceptr addr, cuuint64_t val, unsigned int flags)
{
    CUresult rc = fake_enter(__func__, FAKE_CONTEXT);
    if (rc == CUDA_SUCCESS && (flags & ~3u) != 0) /* FLUSH: no device here can */
        rc = CUDA_ERROR_NOT_SUPPORTED;
    return rc == CUDA_SUCCESS ? value(stream, addr, val, flags, false) : rc;
}

CUresult CUDAAPI cuStreamWriteValue64(CUstream stream, CUdeviceptr addr, cuuint64_t val, unsigned int flags)
{
    CUresult rc = fake_enter(__func__, FAKE_CONTEXT);
    if (rc == CUDA_SUCCESS && (flags & ~1u) != 0)
        rc = CUDA_ERROR_INVALID_VALUE;
    return rc == CUDA_SUCCESS ? value(stream, addr, val, flags, true) : rc;
}

/* ---- host functions ---- */

static CUresult host_run(struct fake_op *op, int device)
{
    (void)device;
    fake_callback(true);
    op->function(op->user);
    fake_callback(false);
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuLaunchHostFunc(CUstream hStream, CUhostFn fn, void *userData)
{
    CUresult rc = fake_enter(__func__, FAKE_CONTEXT);
    if (rc == CUDA_SUCCESS && !fn)
        rc = CUDA_ERROR_INVALID_VALUE;
    if (rc != CUDA_SUCCESS)
        return rc;
    struct fake_op *op = fake_op_new(host_run);
    op->function = fn;
    op->user = userData;
    return fake_enqueue(hStream, op, false);
}

/* ---- modules and launches ---- */

struct CUfunc_st {
    CUfunction next;
    CUmodule module;
    const struct fake_kernel *kernel;
};
struct CUmod_st {
    CUmodule next;
    CUcontext context;
};
static CUmodule modules;
static CUfunction functions;

CUresult CUDAAPI cuModuleLoadData(CUmodule *module, const void *image)
{
    CUresult rc = fake_enter(__func__, FAKE_CONTEXT);
    if (rc == CUDA_SUCCESS && !image)
        rc = CUDA_ERROR_INVALID_VALUE;
    if (rc != CUDA_SUCCESS)
        return rc;
    CUmodule m = calloc(1, sizeof *m);
    if (!m)
        return CUDA_ERROR_OUT_OF_MEMORY;
    fake_lock();
    *m = (struct CUmod_st){modules, fake_current()};
    modules = m;
    m->context->things++;
    fake_unlock();
    *module = m;
    return CUDA_SUCCESS;
}

/* With the lock; where the list points to it, or to its end. */
static CUmodule *module_find(CUmodule module)
{
    CUmodule *at = &modules;
    while (*at && *at != module)
        at = &(*at)->next;
    return at;
}

CUresult CUDAAPI cuModuleUnload(CUmodule hmod)
{
    CUresult rc = fake_enter(__func__, FAKE_CONTEXT);
    if (rc != CUDA_SUCCESS)
        return rc;
    fake_lock();
    CUmodule *at = module_find(hmod);
    if (!*at) {
        fake_unlock();
        return CUDA_ERROR_INVALID_HANDLE;
    }
    *at = hmod->next;
    hmod->context->things--;
    for (CUfunction *f = &functions; *f;) {
        CUfunction function = *f;
        if (function->module != hmod) {
            f = &function->next;
            continue;
        }
        *f = function->next;
        free(function);
    }
    fake_unlock();
    free(hmod);
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuModuleGetFunction(CUfunction *hfunc, CUmodule hmod, const char *name)
{
    CUresult rc = fake_enter(__func__, FAKE_CONTEXT);
    if (rc != CUDA_SUCCESS)
        return rc;
    const struct fake_kernel *kernel = fake_kernel_find(name);
    CUfunction f = calloc(1, sizeof *f);
    fake_lock();
    if (!f)
        rc = CUDA_ERROR_OUT_OF_MEMORY;
    else if (!*module_find(hmod))
        rc = CUDA_ERROR_INVALID_HANDLE;
    else if (!kernel)
        rc = CUDA_ERROR_NOT_FOUND;
    if (rc == CUDA_SUCCESS) {
        *f = (struct CUfunc_st){functions, hmod, kernel};
        functions = f;
        *hfunc = f;
    }
    fake_unlock();
    if (rc != CUDA_SUCCESS)
        free(f);
    return rc;
}

/* Of the copy of a parameter, which keeps them aligned. */
static size_t param_room(size_t size)
{
    return (size + 15) / 16 * 16;
}

static CUresult launch_run(struct fake_op *op, int device)
{
    struct fake_launch launch = {.use = {.device = device}};
    unsigned char *at = op->owned;
    void *args[sizeof op->kernel->sizes];
    memcpy(launch.grid, op->grid, sizeof launch.grid);
    memcpy(launch.block, op->block, sizeof launch.block);
    for (size_t i = 0; i < sizeof op->kernel->sizes && op->kernel->sizes[i]; at += param_room(op->kernel->sizes[i++]))
        args[i] = at;
    CUresult rc = op->kernel->run(&launch, args);
    fake_use_done(&launch.use);
    return rc;
}

/* The kernel of a function of the current context, or NULL. */
static const struct fake_kernel *function_kernel(CUfunction function)
{
    fake_lock();
    CUfunction f = functions;
    while (f && f != function)
        f = f->next;
    const struct fake_kernel *kernel = f && f->module->context == fake_current() ? f->kernel : NULL;
    fake_unlock();
    return kernel;
}

CUresult CUDAAPI cuLaunchKernel(CUfunction f, unsigned int gridDimX, unsigned int gridDimY, unsigned int gridDimZ,
                                unsigned int blockDimX, unsigned int blockDimY, unsigned int blockDimZ,
                                unsigned int sharedMemBytes, CUstream hStream, void **kernelParams, void **extra)
{
    CUresult rc = fake_enter(__func__, FAKE_CONTEXT);
    if (rc != CUDA_SUCCESS)
        return rc;
    const struct fake_kernel *kernel = function_kernel(f);
    if (!kernel)
        return CUDA_ERROR_INVALID_HANDLE;
    const unsigned long long threads = (unsigned long long)blockDimX * blockDimY * blockDimZ;
    if (gridDimX == 0 || gridDimX > INT32_MAX || gridDimY == 0 || gridDimY > UINT16_MAX || gridDimZ == 0 ||
        gridDimZ > UINT16_MAX || threads == 0 || threads > 1024 || sharedMemBytes > 227u << 10 ||
        (!kernelParams && kernel->sizes[0]))
        return CUDA_ERROR_INVALID_VALUE;
    if (extra)
        return CUDA_ERROR_NOT_SUPPORTED;
    struct fake_op *op = fake_op_new(launch_run);
    op->kernel = kernel;
    memcpy(op->grid, (unsigned[3]){gridDimX, gridDimY, gridDimZ}, sizeof op->grid);
    memcpy(op->block, (unsigned[3]){blockDimX, blockDimY, blockDimZ}, sizeof op->block);
    size_t room = 1;
    for (size_t i = 0; i < sizeof kernel->sizes; i++)
        room += param_room(kernel->sizes[i]);
    unsigned char *at = op->owned = calloc(1, room);
    if (!at)
        fake_abort("out of memory");
    for (size_t i = 0; i < sizeof kernel->sizes && kernel->sizes[i]; at += param_room(kernel->sizes[i++]))
        memcpy(at, kernelParams[i], kernel->sizes[i]);
    return fake_enqueue(hStream, op, false);
}
