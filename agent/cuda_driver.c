/* The CUDA driver loaded at run time, and opening one GPU.  CUDA's error codes become ours here.  See cuda_driver.h for
 * threads. */
#include "agent/cuda_driver.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "agent/gpu_errors.h"

#define TEXT(name)  TEXT2(name) /* after cuda.h's macros have put the version suffix on */
#define TEXT2(name) #name

#define CUDA_DRIVER_ENTRY(name) {TEXT(name), offsetof(struct cuda_driver, name)},
static const struct {
    const char *name;
    size_t offset;
} function_table[] = {CUDA_DRIVER_FUNCTIONS(CUDA_DRIVER_ENTRY)};

/* ---- errors ---- */

static int code_of(CUresult result)
{
    switch ((int)result) {
    case CUDA_ERROR_OUT_OF_MEMORY:
        return ERR_NOMEM;
    case CUDA_ERROR_NO_DEVICE:
    case CUDA_ERROR_INVALID_DEVICE:
        return ERR_NOTFOUND;
    case CUDA_ERROR_NOT_SUPPORTED:
    case CUDA_ERROR_NO_BINARY_FOR_GPU:
    case CUDA_ERROR_PEER_ACCESS_UNSUPPORTED:
    case CUDA_ERROR_SYSTEM_DRIVER_MISMATCH:
    case CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE:
        return ERR_UNSUPPORTED;
    case CUDA_ERROR_NOT_PERMITTED:
        return ERR_DENIED;
    case CUDA_ERROR_INVALID_VALUE:
    case CUDA_ERROR_INVALID_HANDLE:
        return ERR_INVALID;
    case CUDA_ERROR_TIMEOUT:
        return ERR_TIMEOUT;
    default:
        return ERR_IO;
    }
}

/* The first sticky error.  It is the process's in truth: the driver fails every call in every thread after it. */
static pthread_mutex_t lost_lock = PTHREAD_MUTEX_INITIALIZER;
static char lost_why[256]; /* "": none */

static void lost_set(const char *why)
{
    pthread_mutex_lock(&lost_lock);
    if (!lost_why[0])
        snprintf(lost_why, sizeof lost_why, "%.250s", why);
    pthread_mutex_unlock(&lost_lock);
}

int cuda_health(struct err *err)
{
    int rc = 0;
    pthread_mutex_lock(&lost_lock);
    if (lost_why[0])
        rc = err_set(err, ERR_IO, "this process cannot use the GPU any more: %s", lost_why);
    pthread_mutex_unlock(&lost_lock);
    return rc;
}

int cuda_check(const struct cuda_driver *cu, CUresult result, struct err *err, const char *fmt, ...)
{
    if (result == CUDA_SUCCESS)
        return 0;
    gpu_error_count(GPU_ERROR_CUDA);
    const char *name = NULL, *text = NULL;
    char what[256];
    va_list args;
    va_start(args, fmt);
    vsnprintf(what, sizeof what, fmt, args);
    va_end(args);
    if (cu->cuGetErrorName(result, &name) != CUDA_SUCCESS)
        name = NULL;
    if (cu->cuGetErrorString(result, &text) != CUDA_SUCCESS)
        text = NULL;
    struct err said = {0};
    int rc = err_set(&said, code_of(result), "cannot %s: %s (%s, %d)", what, text ? text : "unknown error",
                     name ? name : "CUDA", (int)result);
    if (!cuda_is_sticky(result))
        return err_set(err, rc, "%s", said.text);
    lost_set(said.text);
    return err_set(err, rc, "%s; this process cannot use the GPU any more", said.text);
}

bool cuda_is_sticky(CUresult result)
{
    switch ((int)result) {
    case CUDA_ERROR_ECC_UNCORRECTABLE:
    case CUDA_ERROR_NVLINK_UNCORRECTABLE:
    case CUDA_ERROR_ILLEGAL_ADDRESS:
    case CUDA_ERROR_LAUNCH_TIMEOUT:
    case CUDA_ERROR_ASSERT:
    case CUDA_ERROR_HARDWARE_STACK_ERROR:
    case CUDA_ERROR_ILLEGAL_INSTRUCTION:
    case CUDA_ERROR_MISALIGNED_ADDRESS:
    case CUDA_ERROR_INVALID_ADDRESS_SPACE:
    case CUDA_ERROR_INVALID_PC:
    case CUDA_ERROR_LAUNCH_FAILED:
    case CUDA_ERROR_CONTEXT_IS_DESTROYED:
    case CUDA_ERROR_DEINITIALIZED:
    case CUDA_ERROR_DEVICE_UNAVAILABLE:
    case CUDA_ERROR_UNKNOWN:
        return true;
    default:
        return false;
    }
}

/* ---- the library ---- */

int cuda_driver_load(struct cuda_driver *ret_driver, struct err *err)
{
    struct cuda_driver cu = {.library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL)};
    if (!cu.library)
        return err_set(err, ERR_UNSUPPORTED, "there is no CUDA driver here: %s", dlerror());
    for (size_t i = 0; i < sizeof function_table / sizeof function_table[0]; i++) {
        void *symbol = dlsym(cu.library, function_table[i].name);
        if (!symbol) {
            dlclose(cu.library);
            return err_set(err, ERR_UNSUPPORTED, "the CUDA driver is too old: it has no %s; 11.7 or newer is needed",
                           function_table[i].name);
        }
        memcpy((char *)&cu + function_table[i].offset, &symbol, sizeof symbol);
    }
    cu.copy_batch_13 = dlsym(cu.library, "cuMemcpyBatchAsync_v2");
    cu.copy_batch_12 = dlsym(cu.library, "cuMemcpyBatchAsync");
    int rc = cuda_check(&cu, cu.cuInit(0), err, "start the CUDA driver");
    if (rc == 0)
        rc = cuda_check(&cu, cu.cuDriverGetVersion(&cu.version), err, "ask the CUDA driver for its version");
    if (rc == 0)
        *ret_driver = cu;
    else
        cuda_driver_unload(&cu);
    return rc;
}

void cuda_driver_unload(struct cuda_driver *driver)
{
    /* Not unloaded in truth: threads of the driver may run.  The count of openings is what goes down. */
    if (driver->library)
        dlclose(driver->library);
    driver->library = NULL;
}

/* ---- devices ---- */

static bool attribute(const struct cuda_driver *cu, CUdevice device, CUdevice_attribute which)
{
    int value = 0;
    return cu->cuDeviceGetAttribute(&value, which, device) == CUDA_SUCCESS && value != 0;
}

static void uuid_write(const CUuuid *uuid, char text[GPU_UUID_MAX])
{
    size_t at = (size_t)snprintf(text, GPU_UUID_MAX, "GPU-");
    for (size_t i = 0; i < sizeof uuid->bytes; i++)
        at += (size_t)snprintf(text + at, GPU_UUID_MAX - at, "%s%02x", i == 4 || i == 6 || i == 8 || i == 10 ? "-" : "",
                               (unsigned)(unsigned char)uuid->bytes[i]);
}

int cuda_gpu_describe(const struct cuda_driver *cu, int index, struct gpu *ret_gpu, struct err *err)
{
    struct gpu gpu = {.index = index};
    CUdevice device;
    CUuuid uuid;
    size_t bytes = 0;
    int rc = cuda_check(cu, cu->cuDeviceGet(&device, index), err, "find GPU %d", index);
    if (rc == 0)
        rc = cuda_check(cu, cu->cuDeviceGetUuid(&uuid, device), err, "ask GPU %d for its UUID", index);
    if (rc == 0)
        rc = cuda_check(cu, cu->cuDeviceGetName(gpu.name, sizeof gpu.name, device), err, "ask GPU %d for its name",
                        index);
    if (rc == 0)
        rc = cuda_check(cu, cu->cuDeviceTotalMem(&bytes, device), err, "ask GPU %d for its memory", index);
    if (rc < 0)
        return rc;
    uuid_write(&uuid, gpu.uuid);
    gpu.bytes = bytes;
    gpu.exports = attribute(cu, device, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED) &&
                  attribute(cu, device, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED);
    *ret_gpu = gpu;
    return 0;
}

int gpu_list(struct gpu *ret_gpus, size_t max, size_t *ret_n, struct err *err)
{
    struct cuda_driver cu = {0};
    int n = 0;
    int rc = cuda_driver_load(&cu, err);
    if (rc < 0)
        return rc;
    rc = cuda_check(&cu, cu.cuDeviceGetCount(&n), err, "count the GPUs");
    for (int i = 0; i < n && (size_t)i < max && rc == 0; i++)
        rc = cuda_gpu_describe(&cu, i, &ret_gpus[i], err);
    if (rc == 0)
        *ret_n = (size_t)n;
    cuda_driver_unload(&cu);
    return rc;
}

/* The GPU that `which` means. */
static int device_choose(const struct cuda_driver *cu, const char *which, struct gpu *ret_gpu, struct err *err)
{
    int n = 0;
    int rc = cuda_check(cu, cu->cuDeviceGetCount(&n), err, "count the GPUs");
    if (rc < 0)
        return rc;
    if (n == 0)
        return err_set(err, ERR_NOTFOUND, "the CUDA driver shows no GPU; see CUDA_VISIBLE_DEVICES");
    if (!which || !*which)
        return cuda_gpu_describe(cu, 0, ret_gpu, err);
    if (strncmp(which, "GPU-", 4) != 0) {
        char *end;
        unsigned long index = strtoul(which, &end, 10);
        if (*which < '0' || *which > '9' || *end)
            return err_set(err, ERR_INVALID, "a GPU is named by its index or by GPU-uuid, not \"%s\"", which);
        if (index >= (unsigned long)n)
            return err_set(err, ERR_NOTFOUND, "there is no GPU %s: this process sees %d", which, n);
        return cuda_gpu_describe(cu, (int)index, ret_gpu, err);
    }
    int found = 0;
    for (int i = 0; i < n; i++) {
        struct gpu gpu;
        rc = cuda_gpu_describe(cu, i, &gpu, err);
        if (rc < 0)
            return rc;
        if (strncmp(gpu.uuid, which, strlen(which)) != 0)
            continue;
        *ret_gpu = gpu;
        found++;
    }
    if (found != 1)
        return err_set(err, ERR_NOTFOUND, "%s GPU has a UUID that begins with %s; eep-agent --list-gpus shows them",
                       found ? "more than one" : "no", which);
    return 0;
}

int gpu_find(const char *which, struct gpu *ret_gpu, struct err *err)
{
    struct cuda_driver cu = {0};
    int rc = cuda_driver_load(&cu, err);
    if (rc == 0)
        rc = device_choose(&cu, which, ret_gpu, err);
    cuda_driver_unload(&cu);
    return rc;
}

int cuda_device_open(const char *which, struct cuda_device **ret_device, struct err *err)
{
    struct cuda_device *d = calloc(1, sizeof *d);
    if (!d)
        return err_set(err, ERR_NOMEM, "out of memory");
    const struct cuda_driver *cu = &d->driver;
    int rc = cuda_driver_load(&d->driver, err);
    if (rc < 0)
        goto free_device;
    rc = device_choose(cu, which, &d->gpu, err);
    if (rc == 0)
        rc = cuda_check(cu, cu->cuDeviceGet(&d->device, d->gpu.index), err, "find GPU %d", d->gpu.index);
    if (rc == 0 && !d->gpu.exports)
        rc = err_set(err, ERR_UNSUPPORTED, "the memory of GPU %d (%s) cannot be shared with other processes",
                     d->gpu.index, d->gpu.name);
    if (rc < 0)
        goto unload;
    d->rdma = attribute(cu, d->device, CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED);
    rc = cuda_check(cu, cu->cuDevicePrimaryCtxRetain(&d->context, d->device), err, "open GPU %d (%s)", d->gpu.index,
                    d->gpu.name);
    if (rc < 0)
        goto unload;
    rc = cuda_device_use(d, err);
    if (rc < 0)
        goto release;
    *ret_device = d;
    return 0;
release:
    cu->cuDevicePrimaryCtxRelease(d->device);
unload:
    cuda_driver_unload(&d->driver);
free_device:
    free(d);
    return rc;
}

void cuda_device_close(struct cuda_device *device)
{
    if (!device)
        return;
    if (cuda_health(NULL) == 0)
        device->driver.cuDevicePrimaryCtxRelease(device->device);
    cuda_driver_unload(&device->driver);
    free(device);
}

int cuda_device_use(const struct cuda_device *device, struct err *err)
{
    const struct cuda_driver *cu = &device->driver;
    CUcontext current = NULL;
    int rc = cuda_health(err);
    if (rc < 0)
        return rc;
    if (cu->cuCtxGetCurrent(&current) == CUDA_SUCCESS && current == device->context)
        return 0;
    return cuda_check(cu, cu->cuCtxSetCurrent(device->context), err, "use GPU %d on this thread", device->gpu.index);
}
