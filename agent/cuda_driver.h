/* The CUDA driver (libcuda.so.1), loaded at run time, and one GPU of it.
 *
 * Only files that the Makefile compiles when it found cuda.h include this: memory_cuda.c, transport_cuda_peer.c,
 * transport_nccl.c and their parts, libeep/device_cuda.c.  There is no libcudart: contexts are the devices' primary ones, which NCCL and
 * anything that uses the runtime share.
 *
 * Functions are members of `struct cuda_driver` under the names of cuda.h, whose macros put the version suffix on both
 * sides: with `const struct cuda_driver *cu`, write cu->cuMemFree(p).
 *
 * Fork before the first call here: neither the driver nor a context survives a fork. */
#ifndef EEP_AGENT_CUDA_DRIVER_H
#define EEP_AGENT_CUDA_DRIVER_H

#include <cuda.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "agent/gpu.h"
#include "common/err.h"

/* What is looked up; all of it is in every driver since CUDA 11.7. */
#define CUDA_DRIVER_FUNCTIONS(X)                                                                                       \
    X(cuInit) X(cuDriverGetVersion) X(cuGetErrorName) X(cuGetErrorString)                                              \
    X(cuDeviceGet) X(cuDeviceGetCount) X(cuDeviceGetName) X(cuDeviceGetUuid) X(cuDeviceGetAttribute)                   \
    X(cuDeviceTotalMem) X(cuDeviceCanAccessPeer)                                                                       \
    X(cuDevicePrimaryCtxRetain) X(cuDevicePrimaryCtxRelease) X(cuCtxSetCurrent) X(cuCtxGetCurrent) X(cuCtxSynchronize) \
    X(cuMemGetInfo) X(cuMemAlloc) X(cuMemFree) X(cuMemHostAlloc) X(cuMemFreeHost) X(cuMemHostGetDevicePointer)         \
    X(cuMemHostRegister) X(cuMemHostUnregister)                                                                        \
    X(cuMemGetAllocationGranularity) X(cuMemCreate) X(cuMemRelease) X(cuMemAddressReserve) X(cuMemAddressFree)         \
    X(cuMemMap) X(cuMemUnmap) X(cuMemSetAccess) X(cuMemExportToShareableHandle) X(cuMemImportFromShareableHandle)      \
    X(cuMemGetAllocationPropertiesFromHandle)                                                                          \
    X(cuMemcpyHtoDAsync) X(cuMemcpyDtoHAsync) X(cuMemcpyDtoDAsync) X(cuMemsetD8Async)                                  \
    X(cuStreamCreate) X(cuStreamDestroy) X(cuStreamSynchronize) X(cuStreamQuery) X(cuStreamWaitEvent)                  \
    X(cuStreamWriteValue64) X(cuLaunchHostFunc)                                                                        \
    X(cuEventCreate) X(cuEventDestroy) X(cuEventRecord) X(cuEventQuery) X(cuEventSynchronize)                          \
    X(cuModuleLoadData) X(cuModuleUnload) X(cuModuleGetFunction) X(cuLaunchKernel)

#define CUDA_DRIVER_MEMBER(name) __typeof__(name) *name;
struct cuda_driver {
    void *library;
    int version; /* 13000 = CUDA 13.0 */
    CUDA_DRIVER_FUNCTIONS(CUDA_DRIVER_MEMBER)
    /* cuMemcpyBatchAsync as CUDA 13.0 and as 12.8 have it; NULL where the driver is older.  See cuda_copies. */
    void *copy_batch_13, *copy_batch_12;
};
#undef CUDA_DRIVER_MEMBER

/* One GPU with its primary context.  Several may be open on the same GPU; they share the context. */
struct cuda_device {
    struct cuda_driver driver;
    CUdevice device;
    CUcontext context;
    struct gpu gpu;
    bool rdma;          /* NICs can read and write its memory (GPUDirect) */
};

/* which: "" or NULL = the first GPU, "1" = by index, "GPU-..." = by UUID (a unique beginning of it will do).
 * ERR_UNSUPPORTED without a driver, ERR_NOTFOUND without such a GPU.  The context is current on this thread afterwards. */
int cuda_device_open(const char *which, struct cuda_device **ret_device, struct err *err) MUST_CHECK;
void cuda_device_close(struct cuda_device *device); /* takes NULL; what was made in the context must be gone */

/* Makes the context current on the calling thread; cheap when it is.  At the start of every entry point.  Fails after a
 * sticky error. */
int cuda_device_use(const struct cuda_device *device, struct err *err) MUST_CHECK;

/* Turns a CUresult into an error: "cannot <what>: <text> (CUDA_ERROR_...)" with the code below; 0 for CUDA_SUCCESS.
 *     int rc = cuda_check(cu, cu->cuMemFree(p), err, "free %zu bytes", n);
 * ERR_NOMEM, ERR_NOTFOUND (no such device), ERR_UNSUPPORTED, ERR_DENIED, ERR_INVALID, ERR_TIMEOUT, else ERR_IO. */
int cuda_check(const struct cuda_driver *cu, CUresult result, struct err *err, const char *fmt, ...)
    __attribute__((format(printf, 4, 5))) MUST_CHECK;

/* True of an error that no call in this process gets over (an illegal address, an ECC error, a lost device): the agent
 * has to leave the view and end. */
bool cuda_is_sticky(CUresult result);

/* 0, or the first sticky error that cuda_check has seen, of any device: nothing may call CUDA any more.  cuda_device_use
 * asks this, cuda_unmap and cuda_device_close do nothing then; the end of the process frees what is left.  Any thread. */
int cuda_health(struct err *err) MUST_CHECK;

/* ---- memory (cuda_memory.c); the context must be current ---- */

/* How regions are allocated, and the granularity of their sizes, which agent and engine reckon alike. */
CUmemAllocationProp cuda_properties(const struct cuda_device *device, bool rdma);
int cuda_granularity(const struct cuda_device *device, size_t *ret_granularity, struct err *err) MUST_CHECK;
/* bytes rounded up; false when that makes no size. */
bool cuda_round(size_t granularity, size_t bytes, size_t *ret_mapped);

/* Maps an allocation, with access from this device, at an address of its own.  The handle may be released afterwards:
 * the mapping holds the memory. */
int cuda_map(const struct cuda_device *device, CUmemGenericAllocationHandle handle, size_t mapped, CUdeviceptr *ret_at,
             struct err *err) MUST_CHECK;
void cuda_unmap(const struct cuda_device *device, CUdeviceptr at, size_t mapped);

/* Maps memory that another process exported as a descriptor.  fd stays the caller's, who may close it at once.
 * same_device: refuse memory of another GPU.  ERR_INVALID when fd is no such memory, or smaller than mapped. */
int cuda_import(const struct cuda_device *device, int fd, size_t mapped, bool same_device, CUdeviceptr *ret_at,
                struct err *err) MUST_CHECK;

/* Whether many copies can be queued by one call. */
bool cuda_copies_batched(const struct cuda_driver *cu);
/* Queues n copies on a stream, in any order among each other.  batched: by one call where that is possible. */
int cuda_copies(const struct cuda_driver *cu, CUdeviceptr *dsts, CUdeviceptr *srcs, size_t *sizes, size_t n,
                bool batched, CUstream stream, struct err *err) MUST_CHECK;

/* The driver alone, for lists; cuda_device_open does this itself. */
int cuda_driver_load(struct cuda_driver *ret_driver, struct err *err) MUST_CHECK;
void cuda_driver_unload(struct cuda_driver *driver);
int cuda_gpu_describe(const struct cuda_driver *cu, int index, struct gpu *ret_gpu, struct err *err) MUST_CHECK;

#endif
