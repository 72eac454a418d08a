/* The driver's start, its devices and primary contexts, error texts, and the errors that the environment asks for. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/fakecuda/fakecuda.h"

struct fake fake = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

static _Thread_local CUcontext current;
static _Thread_local CUresult late;
static _Thread_local bool in_callback;

void fake_abort(const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    fputs("fakecuda: ", stderr);
    vfprintf(stderr, fmt, args);
    fputc('\n', stderr);
    va_end(args);
    abort();
}

void fake_lock(void)
{
    pthread_mutex_lock(&fake.lock);
}

void fake_unlock(void)
{
    pthread_mutex_unlock(&fake.lock);
}

void fake_callback(bool runs)
{
    in_callback = runs;
}

CUcontext fake_current(void)
{
    return current;
}

bool fake_device_valid(CUdevice device)
{
    return device >= 0 && device < fake.n_gpus;
}

/* ---- errors that are asked for ---- */

#define FAILURES_MAX 8
static struct failure {
    char function[48];
    unsigned long nth, calls;
    CUresult code;
    bool late;
} failures[FAILURES_MAX];
static size_t n_failures;

static void failures_read(const char *text)
{
    while (text && *text) {
        struct failure f = {.calls = 0};
        char when[8] = "";
        unsigned code = 0;
        int used = 0;
        int got = sscanf(text, "%47[^:,]:%lu:%u%n", f.function, &f.nth, &code, &used);
        if (got == 3 && text[used] == ':' && sscanf(text + used + 1, "%7[^,]", when) == 1)
            used += 1 + (int)strlen(when);
        f.late = strcmp(when, "late") == 0;
        f.code = (CUresult)code;
        if (got != 3 || f.nth == 0 || code == 0 || (*when && !f.late) || (text[used] && text[used] != ',') ||
            n_failures == FAILURES_MAX)
            fake_abort("FAKECUDA_FAIL is function:nth:code[:late],..., not \"%s\"", text);
        failures[n_failures++] = f;
        text += used + (text[used] == ',');
    }
}

/* What puts something on a stream, which can fail later. */
static bool queues(const char *function)
{
    static const char *const names[] = {"cuMemcpy", "cuMemset", "cuLaunch", "cuStreamW", "cuEventRecord"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        if (strncmp(function, names[i], strlen(names[i])) == 0)
            return true;
    return false;
}

/* The name of the call, without the suffix of its version. */
static bool failure_matches(const struct failure *f, const char *function)
{
    size_t len = strlen(f->function);
    if (f->late && !queues(function))
        return false;
    if (strcmp(f->function, "*") == 0)
        return true;
    return strncmp(f->function, function, len) == 0 && (!function[len] || strncmp(function + len, "_v", 2) == 0);
}

bool fake_is_sticky(CUresult result)
{
    switch ((int)result) { /* as in agent/cuda_driver.c */
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

static CUresult failure_due(const char *function)
{
    for (size_t i = 0; i < n_failures; i++) {
        struct failure *f = &failures[i];
        if (!failure_matches(f, function) || ++f->calls != f->nth)
            continue;
        if (f->late) {
            late = f->code;
            continue;
        }
        if (fake_is_sticky(f->code))
            fake.sticky = f->code;
        return f->code;
    }
    return CUDA_SUCCESS;
}

CUresult fakecuda_sticky(void)
{
    fake_lock();
    CUresult code = fake.sticky;
    fake_unlock();
    return code;
}

CUresult fake_late(void)
{
    CUresult code = late;
    late = CUDA_SUCCESS;
    return code;
}

CUresult fake_enter(const char *function, enum fake_need need)
{
    if (fake.forked || !fake.started)
        return CUDA_ERROR_NOT_INITIALIZED;
    if (in_callback)
        return CUDA_ERROR_NOT_PERMITTED;
    if (need == FAKE_ALWAYS)
        return CUDA_SUCCESS;
    fake_lock();
    late = CUDA_SUCCESS;
    CUresult rc = fake.sticky;
    if (rc == CUDA_SUCCESS)
        rc = failure_due(function);
    if (rc == CUDA_SUCCESS && need == FAKE_CONTEXT && !current)
        rc = CUDA_ERROR_INVALID_CONTEXT;
    if (rc == CUDA_SUCCESS && need == FAKE_CONTEXT && current->refs == 0)
        rc = CUDA_ERROR_CONTEXT_IS_DESTROYED;
    fake_unlock();
    return rc;
}

/* ---- texts ---- */

#define ERRORS(X)                                                                                                      \
    X(CUDA_SUCCESS, "no error")                                                                                        \
    X(CUDA_ERROR_INVALID_VALUE, "invalid argument")                                                                    \
    X(CUDA_ERROR_OUT_OF_MEMORY, "out of memory")                                                                       \
    X(CUDA_ERROR_NOT_INITIALIZED, "initialization error")                                                              \
    X(CUDA_ERROR_DEINITIALIZED, "driver shutting down")                                                                \
    X(CUDA_ERROR_NO_DEVICE, "no CUDA-capable device is detected")                                                      \
        X(CUDA_ERROR_INVALID_DEVICE, "invalid device ordinal") X(CUDA_ERROR_INVALID_CONTEXT, "invalid device context") \
            X(CUDA_ERROR_ECC_UNCORRECTABLE, "uncorrectable ECC error encountered")                                     \
                X(CUDA_ERROR_INVALID_HANDLE, "invalid resource handle")                                                \
                    X(CUDA_ERROR_NOT_FOUND, "named symbol not found") X(CUDA_ERROR_NOT_READY, "device not ready")      \
                        X(CUDA_ERROR_ILLEGAL_ADDRESS, "an illegal memory access was encountered")                      \
                            X(CUDA_ERROR_LAUNCH_TIMEOUT, "the launch timed out and was terminated")                    \
                                X(CUDA_ERROR_CONTEXT_IS_DESTROYED, "context is destroyed")                             \
                                    X(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED,                                       \
                                      "part or all of the requested memory range is already mapped")                   \
                                        X(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED,                                       \
                                          "pointer does not correspond to a registered memory region")                 \
                                            X(CUDA_ERROR_LAUNCH_FAILED, "unspecified launch failure")                  \
                                                X(CUDA_ERROR_NOT_PERMITTED, "operation not permitted")                 \
                                                    X(CUDA_ERROR_NOT_SUPPORTED, "operation not supported")             \
                                                        X(CUDA_ERROR_UNKNOWN, "unknown error")

#define ERROR_ENTRY(code, text) {code, #code, text},
static const struct {
    CUresult code;
    const char *name, *text;
} error_table[] = {ERRORS(ERROR_ENTRY)};

static CUresult error_text(CUresult error, const char **ret_text, bool name)
{
    for (size_t i = 0; i < sizeof error_table / sizeof error_table[0]; i++)
        if (error_table[i].code == error) {
            *ret_text = name ? error_table[i].name : error_table[i].text;
            return CUDA_SUCCESS;
        }
    *ret_text = NULL;
    return CUDA_ERROR_INVALID_VALUE;
}

CUresult CUDAAPI cuGetErrorName(CUresult error, const char **pStr)
{
    return error_text(error, pStr, true);
}

CUresult CUDAAPI cuGetErrorString(CUresult error, const char **pStr)
{
    return error_text(error, pStr, false);
}

/* ---- start ---- */

static void forked(void)
{
    fake.forked = fake.started;
}

static unsigned long long number(const char *name, unsigned long long otherwise)
{
    const char *text = getenv(name);
    char *end = NULL;
    unsigned long long value = text && *text ? strtoull(text, &end, 10) : otherwise;
    if (end && *end)
        fake_abort("%s is not a number: \"%s\"", name, text);
    return value;
}

/* As the real one: what follows an index that does not exist is not seen either. */
static void visible_read(int n)
{
    const char *text = getenv("CUDA_VISIBLE_DEVICES");
    if (!text) {
        for (int i = 0; i < n; i++)
            fake.gpu[fake.n_gpus++] = i;
        return;
    }
    while (*text && fake.n_gpus < FAKE_GPUS_MAX) {
        char *end;
        long index = strtol(text, &end, 10);
        if (end == text || index < 0 || index >= n)
            return;
        fake.gpu[fake.n_gpus++] = (int)index;
        text = end + (*end == ',');
    }
}

static void start(void)
{
    unsigned long long n = number("FAKECUDA_GPUS", 1);
    const char *state = getenv("FAKECUDA_STATE");
    if (n > FAKE_GPUS_MAX)
        fake_abort("FAKECUDA_GPUS is at most %d", FAKE_GPUS_MAX);
    visible_read((int)n);
    fake.gpu_bytes = (size_t)number("FAKECUDA_BYTES", 16ull << 30);
    fake.delay_us = (unsigned)number("FAKECUDA_DELAY_US", 0);
    if (state && (strlen(state) >= sizeof fake.state || strpbrk(state, "/: \n")))
        fake_abort("FAKECUDA_STATE is a short word, not \"%s\"", state);
    snprintf(fake.state, sizeof fake.state, "%s", state ? state : "");
    failures_read(getenv("FAKECUDA_FAIL"));
    for (int i = 0; i < fake.n_gpus; i++)
        fake.contexts[i].device = i;
    pthread_atfork(NULL, NULL, forked);
    fake.started = true;
}

CUresult CUDAAPI cuInit(unsigned int Flags)
{
    if (fake.forked)
        return CUDA_ERROR_NOT_INITIALIZED;
    if (Flags != 0)
        return CUDA_ERROR_INVALID_VALUE;
    fake_lock();
    if (!fake.started)
        start();
    CUresult rc = fake.n_gpus == 0 ? CUDA_ERROR_NO_DEVICE : failure_due(__func__);
    fake_unlock();
    return rc;
}

CUresult CUDAAPI cuDriverGetVersion(int *driverVersion)
{
    *driverVersion = CUDA_VERSION;
    return CUDA_SUCCESS;
}

/* ---- devices ---- */

static CUresult enter_device(CUdevice device)
{
    CUresult rc = fake_enter("", FAKE_ALWAYS);
    return rc == CUDA_SUCCESS && !fake_device_valid(device) ? CUDA_ERROR_INVALID_DEVICE : rc;
}

CUresult CUDAAPI cuDeviceGetCount(int *count)
{
    CUresult rc = fake_enter(__func__, FAKE_ALWAYS);
    if (rc == CUDA_SUCCESS)
        *count = fake.n_gpus;
    return rc;
}

CUresult CUDAAPI cuDeviceGet(CUdevice *device, int ordinal)
{
    CUresult rc = enter_device(ordinal);
    if (rc == CUDA_SUCCESS)
        *device = ordinal;
    return rc;
}

CUresult CUDAAPI cuDeviceGetName(char *name, int len, CUdevice dev)
{
    CUresult rc = enter_device(dev);
    if (rc == CUDA_SUCCESS && len > 0)
        snprintf(name, (size_t)len, "Fake GPU");
    return rc;
}

CUresult CUDAAPI cuDeviceGetUuid(CUuuid *uuid, CUdevice dev)
{
    CUresult rc = enter_device(dev);
    if (rc != CUDA_SUCCESS)
        return rc;
    *uuid = (CUuuid){.bytes = "FAKE"};
    uuid->bytes[sizeof uuid->bytes - 1] = (char)fake.gpu[dev];
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuDeviceTotalMem(size_t *bytes, CUdevice dev)
{
    CUresult rc = enter_device(dev);
    if (rc == CUDA_SUCCESS)
        *bytes = fake.gpu_bytes;
    return rc;
}

CUresult CUDAAPI cuDeviceGetAttribute(int *pi, CUdevice_attribute attrib, CUdevice dev)
{
    CUresult rc = enter_device(dev);
    if (rc != CUDA_SUCCESS)
        return rc;
    switch ((int)attrib) {
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
        *pi = 132;
        break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
        *pi = 9;
        break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
        *pi = 32;
        break;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
        *pi = 1024;
        break;
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
    case CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY:
    case CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM:
    case CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS:
    case CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED:
        *pi = 1;
        break;
    default:
        *pi = 0;
        break;
    }
    return attrib > 0 && attrib < CU_DEVICE_ATTRIBUTE_MAX ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult CUDAAPI cuDeviceCanAccessPeer(int *canAccessPeer, CUdevice dev, CUdevice peerDev)
{
    CUresult rc = enter_device(dev);
    if (rc == CUDA_SUCCESS)
        rc = enter_device(peerDev);
    if (rc == CUDA_SUCCESS)
        *canAccessPeer = dev != peerDev;
    return rc;
}

/* ---- contexts ---- */

CUresult CUDAAPI cuDevicePrimaryCtxRetain(CUcontext *pctx, CUdevice dev)
{
    CUresult rc = fake_enter(__func__, FAKE_STARTED);
    if (rc == CUDA_SUCCESS && !fake_device_valid(dev))
        rc = CUDA_ERROR_INVALID_DEVICE;
    if (rc != CUDA_SUCCESS)
        return rc;
    fake_lock();
    fake.contexts[dev].refs++;
    fake_unlock();
    *pctx = &fake.contexts[dev];
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuDevicePrimaryCtxRelease(CUdevice dev)
{
    CUresult rc = fake_enter(__func__, FAKE_STARTED);
    if (rc == CUDA_SUCCESS && !fake_device_valid(dev))
        rc = CUDA_ERROR_INVALID_DEVICE;
    if (rc != CUDA_SUCCESS) {
        if (!fake.forked)
            fake_streams_join();
        return rc;
    }
    fake_lock();
    CUcontext context = &fake.contexts[dev];
    if (context->refs == 0)
        rc = CUDA_ERROR_INVALID_CONTEXT;
    else if (--context->refs == 0) {
        fake_context_settle(context);
        fake_streams_end(context);
        unsigned left = context->things + fake_allocs_of(dev);
        if (left > 0 && fake.sticky == CUDA_SUCCESS)
            fake_abort("GPU %d's context ends with %u streams, events, modules, allocations or mappings left",
                       fake.gpu[dev], left);
    }
    fake_unlock();
    return rc;
}

CUresult CUDAAPI cuCtxSetCurrent(CUcontext ctx)
{
    CUresult rc = fake_enter(__func__, FAKE_STARTED);
    if (rc != CUDA_SUCCESS)
        return rc;
    if (ctx && (ctx < fake.contexts || ctx >= fake.contexts + fake.n_gpus))
        return CUDA_ERROR_INVALID_CONTEXT;
    current = ctx;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuCtxGetCurrent(CUcontext *pctx)
{
    CUresult rc = fake_enter(__func__, FAKE_ALWAYS);
    if (rc == CUDA_SUCCESS)
        *pctx = current;
    return rc;
}

CUresult CUDAAPI cuCtxGetDevice(CUdevice *device)
{
    CUresult rc = fake_enter(__func__, FAKE_CONTEXT);
    if (rc == CUDA_SUCCESS)
        *device = current->device;
    return rc;
}

CUresult CUDAAPI cuCtxSynchronize(void)
{
    CUresult rc = fake_enter(__func__, FAKE_CONTEXT);
    if (rc != CUDA_SUCCESS)
        return rc;
    fake_lock();
    fake_context_settle(current);
    rc = fake.sticky;
    fake_unlock();
    return rc;
}
