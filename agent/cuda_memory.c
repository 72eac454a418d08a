/* Mapping GPU memory, our own and what other processes exported.  Threads as in cuda_driver.h. */
#include "agent/cuda_driver.h"

#include <string.h>

CUmemAllocationProp cuda_properties(const struct cuda_device *device, bool rdma)
{
    return (CUmemAllocationProp){
        .type = CU_MEM_ALLOCATION_TYPE_PINNED,
        .requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
        .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = device->device},
        .allocFlags = {.gpuDirectRDMACapable = rdma},
    };
}

int cuda_granularity(const struct cuda_device *device, size_t *ret_granularity, struct err *err)
{
    const struct cuda_driver *cu = &device->driver;
    const CUmemAllocationProp properties = cuda_properties(device, device->rdma);
    return cuda_check(cu,
                      cu->cuMemGetAllocationGranularity(ret_granularity, &properties,
                                                        CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
                      err, "ask for the granularity of GPU memory");
}

bool cuda_round(size_t granularity, size_t bytes, size_t *ret_mapped)
{
    if (bytes == 0 || bytes > SIZE_MAX / 2)
        return false;
    *ret_mapped = (bytes + granularity - 1) / granularity * granularity;
    return true;
}

int cuda_map(const struct cuda_device *device, CUmemGenericAllocationHandle handle, size_t mapped, CUdeviceptr *ret_at,
             struct err *err)
{
    const struct cuda_driver *cu = &device->driver;
    const CUmemAccessDesc access = {
        .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = device->device},
        .flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
    };
    CUdeviceptr at = 0;
    int rc =
        cuda_check(cu, cu->cuMemAddressReserve(&at, mapped, 0, 0, 0), err, "reserve addresses for %zu bytes", mapped);
    if (rc < 0)
        return rc;
    rc = cuda_check(cu, cu->cuMemMap(at, mapped, 0, handle, 0), err, "map %zu bytes of GPU memory", mapped);
    if (rc < 0)
        goto free_address;
    rc = cuda_check(cu, cu->cuMemSetAccess(at, mapped, &access, 1), err, "get access to %zu bytes of GPU memory",
                    mapped);
    if (rc < 0)
        goto unmap;
    *ret_at = at;
    return 0;
unmap:
    (void)cu->cuMemUnmap(at, mapped);
free_address:
    (void)cu->cuMemAddressFree(at, mapped);
    return rc;
}

void cuda_unmap(const struct cuda_device *device, CUdeviceptr at, size_t mapped)
{
    if (cuda_health(NULL) < 0)
        return;
    (void)device->driver.cuMemUnmap(at, mapped);
    (void)device->driver.cuMemAddressFree(at, mapped);
}

int cuda_import(const struct cuda_device *device, int fd, size_t mapped, bool same_device, CUdeviceptr *ret_at,
                struct err *err)
{
    const struct cuda_driver *cu = &device->driver;
    CUmemGenericAllocationHandle handle;
    CUmemAllocationProp properties = {0};
    CUresult result =
        cu->cuMemImportFromShareableHandle(&handle, (void *)(uintptr_t)fd, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
    /* "unknown error" is what the driver says of a pipe; it is no fault of the GPU here, and later calls work. */
    if (result == CUDA_ERROR_UNKNOWN ||
        (result != CUDA_SUCCESS && result != CUDA_ERROR_OUT_OF_MEMORY && !cuda_is_sticky(result)))
        return err_set(
            err, ERR_INVALID,
            "cannot import descriptor %d as GPU memory (CUDA error %d): it is something else, or memory of a "
            "GPU that is not visible here",
            fd, (int)result);
    int rc = cuda_check(cu, result, err, "import descriptor %d as GPU memory", fd);
    if (rc < 0)
        return rc;
    rc = cuda_check(cu, cu->cuMemGetAllocationPropertiesFromHandle(&properties, handle), err,
                    "look at the memory of descriptor %d", fd);
    if (rc == 0 && same_device &&
        (properties.location.type != CU_MEM_LOCATION_TYPE_DEVICE || properties.location.id != (int)device->device))
        rc = err_set(err, ERR_INVALID, "descriptor %d is memory of another GPU than %d", fd, device->gpu.index);
    if (rc == 0)
        rc = cuda_map(device, handle, mapped, ret_at, err);
    (void)cu->cuMemRelease(handle);
    return rc;
}

/* ---- many copies ---- */

bool cuda_copies_batched(const struct cuda_driver *cu)
{
#if CUDA_VERSION >= 12080
    return cu->copy_batch_13 || cu->copy_batch_12;
#else
    (void)cu;
    return false;
#endif
}

#if CUDA_VERSION >= 12080
static CUresult copies_batch(const struct cuda_driver *cu, CUdeviceptr *dsts, CUdeviceptr *srcs, size_t *sizes,
                             size_t n, CUstream stream)
{
    CUresult (*batch_13)(CUdeviceptr *, CUdeviceptr *, size_t *, size_t, CUmemcpyAttributes *, size_t *, size_t,
                         CUstream);
    CUresult (*batch_12)(CUdeviceptr *, CUdeviceptr *, size_t *, size_t, CUmemcpyAttributes *, size_t *, size_t,
                         size_t *, CUstream);
    CUmemcpyAttributes attributes = {.srcAccessOrder = CU_MEMCPY_SRC_ACCESS_ORDER_STREAM};
    size_t first = 0, failed = 0;
    if (cu->copy_batch_13) {
        memcpy(&batch_13, &cu->copy_batch_13, sizeof batch_13); /* C has no cast from an object to a function */
        return batch_13(dsts, srcs, sizes, n, &attributes, &first, 1, stream);
    }
    memcpy(&batch_12, &cu->copy_batch_12, sizeof batch_12);
    return batch_12(dsts, srcs, sizes, n, &attributes, &first, 1, &failed, stream);
}
#endif

int cuda_copies(const struct cuda_driver *cu, CUdeviceptr *dsts, CUdeviceptr *srcs, size_t *sizes, size_t n,
                bool batched, CUstream stream, struct err *err)
{
#if CUDA_VERSION >= 12080
    if (batched && n > 1 && cuda_copies_batched(cu))
        return cuda_check(cu, copies_batch(cu, dsts, srcs, sizes, n, stream), err, "start %zu copies", n);
#endif
    (void)batched;
    int rc = 0;
    for (size_t i = 0; i < n && rc == 0; i++)
        rc = cuda_check(cu, cu->cuMemcpyDtoDAsync(dsts[i], srcs[i], sizes[i], stream), err, "copy %zu bytes", sizes[i]);
    return rc;
}
