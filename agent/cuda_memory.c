/* Mapping GPU memory, our own and what other processes exported.  Threads as in cuda_driver.h. */
#include "agent/cuda_driver.h"

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
