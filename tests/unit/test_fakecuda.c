/* The CUDA driver on host memory (tests/fakecuda): what it has to catch, it catches.  Each test runs in a process of
 * its own, whose environment it sets first.  On a real driver nothing is tested here. */
#include <check.h>
#include <stdio.h>
#include <stdlib.h>

#ifndef HAVE_CUDA
int main(void)
{
    puts("a build without cuda.h has no driver on host memory");
    return 77;
}
#else
#include <dlfcn.h>
#include <poll.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "agent/cuda_driver.h"
#include "tests/harness/suite.h"

#define MIB           ((size_t)1 << 20)

/* What the agent does not use (yet). */
/* clang-format off */
#define MORE(X)                                                                                                        \
    X(cuMemHostRegister) X(cuMemHostUnregister) X(cuStreamWriteValue64) X(cuStreamWaitValue64) X(cuLaunchHostFunc)     \
    X(cuMemcpyHtoD) X(cuMemcpyDtoH) X(cuMemcpyDtoD) X(cuMemcpyAsync) X(cuMemsetD8) X(cuMemRetainAllocationHandle)      \
    X(cuEventElapsedTime) X(cuCtxGetDevice) X(cuPointerGetAttribute)
/* clang-format on */
#define MEMBER(name)  __typeof__(name) *name;
static struct {
    MORE(MEMBER)
} more;
#define TEXT2(name)   #name
#define TEXT(name)    TEXT2(name)
#define LOOK_UP(name) more.name = (__typeof__(more.name))symbol(TEXT(name));

static struct cuda_driver cu;
static CUcontext context;
static CUstream stream;
static CUdevice device;

#define ok(call)              ck_assert_int_eq(call, CUDA_SUCCESS)
#define fails(call, expected) ck_assert_int_eq(call, expected)

static void *symbol(const char *name)
{
    void *found = dlsym(cu.library, name);
    ck_assert_msg(found != NULL, "%s", name);
    return found;
}

/* Starts the driver with this failure (or NULL), a context and a stream. */
static void begin(const char *failure)
{
    struct err err = {0};
    if (failure)
        setenv("FAKECUDA_FAIL", failure, 1);
    ck_assert_msg(cuda_driver_load(&cu, &err) == 0, "%s", err.text);
    MORE(LOOK_UP)
    ok(cu.cuDeviceGet(&device, 0));
    ok(cu.cuDevicePrimaryCtxRetain(&context, device));
    ok(cu.cuCtxSetCurrent(context));
    ok(cu.cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
}

static void end(void)
{
    ok(cu.cuStreamDestroy(stream));
    ok(cu.cuDevicePrimaryCtxRelease(device));
}

static const CUmemAllocationProp shared_memory = {
    .type = CU_MEM_ALLOCATION_TYPE_PINNED,
    .requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
    .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE},
};
static const CUmemAccessDesc access_0 = {{.type = CU_MEM_LOCATION_TYPE_DEVICE}, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};

static CUdeviceptr map_new(CUmemGenericAllocationHandle handle, size_t bytes)
{
    CUdeviceptr at;
    ok(cu.cuMemAddressReserve(&at, bytes, 0, 0, 0));
    ok(cu.cuMemMap(at, bytes, 0, handle, 0));
    ok(cu.cuMemSetAccess(at, bytes, &access_0, 1));
    return at;
}

static void map_end(CUdeviceptr at, size_t bytes)
{
    ok(cu.cuMemUnmap(at, bytes));
    ok(cu.cuMemAddressFree(at, bytes));
}

static size_t bytes_free(void)
{
    size_t available, total;
    ok(cu.cuMemGetInfo(&available, &total));
    return available;
}

/* ---- memory ---- */

START_TEST(mappings_follow_the_rules)
{
    CUmemGenericAllocationHandle handle, other;
    CUdeviceptr at, inside;
    char byte = 7;
    begin(NULL);
    fails(cu.cuMemCreate(&handle, 3 * MIB, &shared_memory, 0), CUDA_ERROR_INVALID_VALUE); /* granularity: 2 MiB */
    ok(cu.cuMemCreate(&handle, 4 * MIB, &shared_memory, 0));
    fails(cu.cuMemAddressReserve(&at, 5 * MIB, 0, 0, 0), CUDA_ERROR_INVALID_VALUE);
    ok(cu.cuMemAddressReserve(&at, 8 * MIB, 0, 0, 0));
    fails(cu.cuMemMap(at, 6 * MIB, 0, handle, 0), CUDA_ERROR_INVALID_VALUE); /* more than there is */
    fails(cu.cuMemMap(at + 6 * MIB, 4 * MIB, 0, handle, 0), CUDA_ERROR_INVALID_VALUE);
    fails(cu.cuMemMap(at + MIB, 4 * MIB, 0, handle, 0), CUDA_ERROR_INVALID_VALUE);
    ok(cu.cuMemMap(at, 4 * MIB, 0, handle, 0));
    fails(cu.cuMemMap(at + 2 * MIB, 4 * MIB, 0, handle, 0), CUDA_ERROR_INVALID_VALUE); /* there is one already */
    fails(cu.cuMemcpyHtoDAsync(at, &byte, 1, stream), CUDA_ERROR_INVALID_VALUE);       /* no access yet */
    fails(cu.cuMemSetAccess(at, 2 * MIB, &access_0, 1), CUDA_ERROR_INVALID_VALUE);
    ok(cu.cuMemSetAccess(at, 4 * MIB, &access_0, 1));
    ok(cu.cuMemcpyHtoDAsync(at + 4 * MIB - 1, &byte, 1, stream));
    fails(cu.cuMemcpyHtoDAsync(at + 4 * MIB, &byte, 1, stream), CUDA_ERROR_INVALID_VALUE);
    ok(cu.cuStreamSynchronize(stream));
    ok(more.cuMemRetainAllocationHandle(&other, (void *)(uintptr_t)(at + 99)));
    ok(cu.cuMemRelease(other));
    ok(cu.cuMemRelease(handle));
    fails(cu.cuMemRelease(handle), CUDA_ERROR_INVALID_VALUE);
    fails(cu.cuMemMap(at + 4 * MIB, 4 * MIB, 0, handle, 0), CUDA_ERROR_INVALID_VALUE);
    byte = 0;
    ok(more.cuMemcpyDtoH(&byte, at + 4 * MIB - 1, 1)); /* the mapping holds it */
    ck_assert_int_eq(byte, 7);
    fails(cu.cuMemAddressFree(at, 8 * MIB), CUDA_ERROR_INVALID_VALUE); /* mapped */
    fails(cu.cuMemUnmap(at, 2 * MIB), CUDA_ERROR_INVALID_VALUE);
    ok(cu.cuMemUnmap(at, 4 * MIB));
    fails(cu.cuMemUnmap(at, 4 * MIB), CUDA_ERROR_INVALID_VALUE);
    fails(cu.cuMemAddressFree(at, 4 * MIB), CUDA_ERROR_INVALID_VALUE);
    ok(cu.cuMemAddressFree(at, 8 * MIB));
    fails(cu.cuMemAddressFree(at, 8 * MIB), CUDA_ERROR_INVALID_VALUE);
    ok(cu.cuMemAlloc(&inside, 100));
    fails(cu.cuMemsetD8Async(inside, 0, 101, stream), CUDA_ERROR_INVALID_VALUE); /* to the byte */
    fails(cu.cuMemFree(inside + 8), CUDA_ERROR_INVALID_VALUE);
    ok(cu.cuMemFree(inside));
    fails(cu.cuMemFree(inside), CUDA_ERROR_INVALID_VALUE);
    end();
}
END_TEST

START_TEST(memory_is_limited_and_counted)
{
    CUmemGenericAllocationHandle handle;
    int fd;
    char state[32];
    setenv("FAKECUDA_BYTES", "67108864", 1);
    snprintf(state, sizeof state, "test%d", (int)getpid());
    setenv("FAKECUDA_STATE", state, 1);
    begin(NULL);
    ck_assert_uint_eq(bytes_free(), 64 * MIB);
    fails(cu.cuMemCreate(&handle, 66 * MIB, &shared_memory, 0), CUDA_ERROR_OUT_OF_MEMORY);
    ok(cu.cuMemCreate(&handle, 40 * MIB, &shared_memory, 0));
    ok(cu.cuMemExportToShareableHandle(&fd, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0));
    CUdeviceptr at = map_new(handle, 40 * MIB);
    ck_assert_uint_eq(bytes_free(), 24 * MIB); /* once */
    fails(cu.cuMemCreate(&handle, 26 * MIB, &shared_memory, 0), CUDA_ERROR_OUT_OF_MEMORY);
    ok(cu.cuMemRelease(handle));
    map_end(at, 40 * MIB);
    ck_assert_uint_eq(bytes_free(), 24 * MIB); /* the descriptor holds it */
    pid_t child = fork();                      /* another process that has it, and no driver */
    if (child == 0) {
        pause();
        _exit(0);
    }
    close(fd);
    ck_assert_uint_eq(bytes_free(), 24 * MIB);
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    ck_assert_uint_eq(bytes_free(), 64 * MIB);
    end();
}
END_TEST

START_TEST(bytes_outlive_who_made_them)
{
    CUmemGenericAllocationHandle handle;
    int fd, pipes[2];
    uint64_t word = 0x1122334455667788u, got = 0;
    begin(NULL);
    ok(cu.cuMemCreate(&handle, 2 * MIB, &shared_memory, 0));
    CUdeviceptr at = map_new(handle, 2 * MIB);
    ok(more.cuMemcpyHtoD(at + 8, &word, sizeof word));
    ok(cu.cuCtxSynchronize());
    ok(cu.cuMemExportToShareableHandle(&fd, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0));
    ok(cu.cuMemRelease(handle));
    map_end(at, 2 * MIB);
    ok(cu.cuMemImportFromShareableHandle(&handle, (void *)(uintptr_t)fd, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR));
    close(fd);
    at = map_new(handle, 2 * MIB);
    ok(cu.cuMemRelease(handle));
    ok(more.cuMemcpyDtoH(&got, at + 8, sizeof got));
    ck_assert_uint_eq(got, word);
    map_end(at, 2 * MIB);
    ck_assert_int_eq(pipe(pipes), 0); /* something else: refused, and nothing is broken by it */
    fails(cu.cuMemImportFromShareableHandle(&handle, (void *)(uintptr_t)pipes[0],
                                            CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
          CUDA_ERROR_UNKNOWN);
    close(pipes[0]);
    close(pipes[1]);
    ok(cu.cuCtxSynchronize());
    end();
}
END_TEST

/* How a child that does this ends. */
static int in_child(void (*play)(CUdeviceptr at), CUdeviceptr at)
{
    int status = 0;
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        if (!freopen("/dev/null", "w", stderr)) /* it complains on purpose */
            _exit(0);
        play(at);
        _exit(0);
    }
    ck_assert_int_eq(waitpid(child, &status, 0), child);
    return status;
}

static void read_it(CUdeviceptr at)
{
    (void)*(volatile char *)(uintptr_t)at;
}

static void use_driver(CUdeviceptr at)
{
    _exit(cu.cuMemFree(at) == CUDA_ERROR_NOT_INITIALIZED && cu.cuInit(0) == CUDA_ERROR_NOT_INITIALIZED ? 5 : 6);
}

START_TEST(a_device_address_is_no_host_address)
{
    CUdeviceptr at;
    begin(NULL);
    ok(cu.cuMemAlloc(&at, 4096));
    ck_assert_int_ne(in_child(read_it, at), 0);
    ck_assert_int_eq(WEXITSTATUS(in_child(use_driver, at)), 5); /* nor does a driver survive a fork */
    ok(cu.cuMemFree(at));
    end();
}
END_TEST

/* ---- contexts ---- */

static void leak(CUdeviceptr at)
{
    CUevent event;
    (void)at;
    begin(NULL);
    ok(cu.cuEventCreate(&event, 0));
    end();
}

static void leak_mapping(CUdeviceptr at)
{
    CUmemGenericAllocationHandle handle;
    (void)at;
    begin(NULL);
    ok(cu.cuMemCreate(&handle, 2 * MIB, &shared_memory, 0));
    map_new(handle, 2 * MIB);
    ok(cu.cuMemRelease(handle));
    end();
}

START_TEST(contexts_are_needed_and_left_empty)
{
    CUdeviceptr at;
    int status = in_child(leak, 0); /* before this process has a driver */
    ck_assert(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT);
    status = in_child(leak_mapping, 0);
    ck_assert(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT);
    begin(NULL);
    ok(cu.cuCtxSetCurrent(NULL));
    fails(cu.cuMemAlloc(&at, 100), CUDA_ERROR_INVALID_CONTEXT);
    fails(cu.cuStreamSynchronize(stream), CUDA_ERROR_INVALID_CONTEXT);
    ok(cu.cuCtxSetCurrent(context));
    fails(cu.cuStreamSynchronize((CUstream)&at), CUDA_ERROR_INVALID_HANDLE);
    end();
    fails(cu.cuMemAlloc(&at, 100), CUDA_ERROR_CONTEXT_IS_DESTROYED);
}
END_TEST

START_TEST(a_gpu_reaches_anothers_memory_only_with_access)
{
    CUcontext second;
    CUdevice device_1;
    CUdeviceptr a, b;
    int can = 0;
    setenv("FAKECUDA_GPUS", "2", 1);
    begin(NULL);
    ok(cu.cuDeviceGet(&device_1, 1));
    ok(cu.cuDeviceCanAccessPeer(&can, device, device_1));
    ck_assert_int_eq(can, 1);
    ok(cu.cuMemAlloc(&a, 100));
    ok(cu.cuDevicePrimaryCtxRetain(&second, device_1));
    ok(cu.cuCtxSetCurrent(second));
    ok(cu.cuMemAlloc(&b, 100));
    fails(more.cuMemcpyDtoD(b, a, 100), CUDA_ERROR_INVALID_VALUE);
    fails(cu.cuMemcpyDtoDAsync(b, b, 100, stream), CUDA_ERROR_INVALID_HANDLE); /* a stream of the other */
    ok(cu.cuMemFree(b));
    ok(cu.cuDevicePrimaryCtxRelease(device_1));
    ok(cu.cuCtxSetCurrent(context));
    ok(cu.cuMemFree(a));
    end();
}
END_TEST

/* ---- streams ---- */

/* A word of pinned memory for which a stream waits: what follows does not run before it is 1. */
static uint64_t *gate_close(CUstream on)
{
    uint64_t *word;
    ok(cu.cuMemHostAlloc((void **)&word, sizeof *word, 0));
    *word = 0;
    ok(more.cuStreamWaitValue64(on, (CUdeviceptr)(uintptr_t)word, 1, CU_STREAM_WAIT_VALUE_GEQ));
    return word;
}

static void gate_open(uint64_t *word)
{
    __atomic_store_n(word, 1, __ATOMIC_SEQ_CST);
}

START_TEST(streams_run_later_and_in_order)
{
    CUevent begun, over, untimed;
    CUstream second;
    CUdeviceptr at;
    uint8_t pageable = 1, *pinned, *got;
    float ms = -1;
    begin(NULL);
    ok(cu.cuStreamCreate(&second, CU_STREAM_NON_BLOCKING));
    ok(cu.cuEventCreate(&begun, 0));
    ok(cu.cuEventCreate(&over, 0));
    ok(cu.cuEventCreate(&untimed, CU_EVENT_DISABLE_TIMING));
    ok(cu.cuMemAlloc(&at, 3));
    ok(cu.cuMemHostAlloc((void **)&pinned, 1, 0));
    ok(cu.cuMemHostAlloc((void **)&got, 3, 0));
    ok(cu.cuEventRecord(begun, stream));
    uint64_t *gate = gate_close(stream);
    *pinned = 1;
    ok(cu.cuMemcpyHtoDAsync(at, &pageable, 1, stream));  /* taken now */
    ok(cu.cuMemcpyHtoDAsync(at + 1, pinned, 1, stream)); /* read later */
    ok(cu.cuMemsetD8Async(at + 2, 9, 1, stream));
    ok(cu.cuEventRecord(over, stream));
    ok(cu.cuStreamWaitEvent(second, over, 0));
    ok(cu.cuMemcpyDtoHAsync(got, at, 3, second));
    pageable = *pinned = 2;
    fails(cu.cuStreamQuery(stream), CUDA_ERROR_NOT_READY);
    fails(cu.cuStreamQuery(second), CUDA_ERROR_NOT_READY);
    fails(cu.cuEventQuery(over), CUDA_ERROR_NOT_READY);
    fails(more.cuEventElapsedTime(&ms, begun, over), CUDA_ERROR_NOT_READY);
    poll(NULL, 0, 20);
    gate_open(gate);
    ok(cu.cuStreamSynchronize(second));
    ck_assert(got[0] == 1 && got[1] == 2 && got[2] == 9);
    ok(cu.cuEventQuery(over));
    ok(more.cuEventElapsedTime(&ms, begun, over));
    ck_assert(ms > 10 && ms < 60000);
    ok(cu.cuEventRecord(untimed, stream));
    fails(more.cuEventElapsedTime(&ms, begun, untimed), CUDA_ERROR_INVALID_HANDLE);
    ok(cu.cuEventDestroy(begun));
    ok(cu.cuEventDestroy(over));
    ok(cu.cuEventDestroy(untimed));
    ok(cu.cuStreamDestroy(second));
    fails(cu.cuStreamSynchronize(second), CUDA_ERROR_INVALID_HANDLE);
    ok(cu.cuMemFreeHost(got));
    ok(cu.cuMemFreeHost(pinned));
    ok(cu.cuMemFreeHost(gate));
    ok(cu.cuMemFree(at));
    end();
}
END_TEST

static CUresult from_callback;

static void callback(void *user)
{
    from_callback = cu.cuStreamQuery(stream);
    ++*(int *)user;
}

START_TEST(host_memory_is_pinned_and_called_back)
{
    static uint64_t words[4];
    CUdeviceptr at, device_at;
    unsigned type = 0;
    int called = 0;
    begin(NULL);
    ok(cu.cuMemAlloc(&device_at, sizeof words));
    fails(cu.cuMemHostGetDevicePointer(&at, words, 0), CUDA_ERROR_INVALID_VALUE);
    ok(more.cuMemHostRegister(words, sizeof words, 0));
    fails(more.cuMemHostRegister(words + 1, 8, 0), CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED);
    ok(cu.cuMemHostGetDevicePointer(&at, words, 0));
    ok(more.cuStreamWriteValue64(stream, at + 8, 77, 0));
    ok(more.cuMemcpyAsync(device_at, at, sizeof words, stream));
    ok(more.cuLaunchHostFunc(stream, callback, &called));
    ok(cu.cuStreamSynchronize(stream));
    ck_assert_uint_eq(words[1], 77);
    ck_assert_int_eq(called, 1);
    ck_assert_int_eq(from_callback, CUDA_ERROR_NOT_PERMITTED);
    ok(more.cuPointerGetAttribute(&type, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, at));
    ck_assert_uint_eq(type, CU_MEMORYTYPE_HOST);
    ok(more.cuPointerGetAttribute(&type, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, device_at));
    ck_assert_uint_eq(type, CU_MEMORYTYPE_DEVICE);
    ok(more.cuMemHostUnregister(words));
    fails(more.cuMemHostUnregister(words), CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED);
    ok(cu.cuMemFree(device_at));
    end();
}
END_TEST

START_TEST(memory_that_goes_under_a_copy_is_noticed)
{
    CUmemGenericAllocationHandle handle;
    begin(NULL);
    ok(cu.cuMemCreate(&handle, 2 * MIB, &shared_memory, 0));
    CUdeviceptr at = map_new(handle, 2 * MIB);
    uint64_t *gate = gate_close(stream);
    ok(cu.cuMemsetD8Async(at, 1, 100, stream));
    ok(cu.cuMemUnmap(at, 2 * MIB));
    gate_open(gate);
    fails(cu.cuStreamSynchronize(stream), CUDA_ERROR_ILLEGAL_ADDRESS);
    fails(cu.cuMemRelease(handle), CUDA_ERROR_ILLEGAL_ADDRESS); /* for good */
}
END_TEST

/* ---- failures that are asked for ---- */

START_TEST(failures_come_when_asked_for)
{
    CUdeviceptr at;
    begin("cuMemAlloc:2:2,cuMemsetD8Async:2:700:late");
    ok(cu.cuMemAlloc(&at, 100));
    fails(cu.cuMemAlloc(&at, 100), CUDA_ERROR_OUT_OF_MEMORY);
    ok(cu.cuMemAlloc(&at, 100));
    ok(cu.cuMemsetD8Async(at, 1, 100, stream));
    ok(cu.cuStreamSynchronize(stream));
    ok(cu.cuMemsetD8Async(at, 1, 100, stream));
    fails(cu.cuStreamSynchronize(stream), CUDA_ERROR_ILLEGAL_ADDRESS);
    fails(cu.cuMemFree(at), CUDA_ERROR_ILLEGAL_ADDRESS);
    fails(cu.cuStreamDestroy(stream), CUDA_ERROR_ILLEGAL_ADDRESS);
}
END_TEST

/* In a child: whether what LD_LIBRARY_PATH has is the driver on host memory. */
static bool fake_present(void)
{
    int status = 1;
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        struct gpu gpu = {0};
        size_t n = 0;
        _exit(gpu_list(&gpu, 1, &n, NULL) < 0 || strcmp(gpu.name, "Fake GPU") != 0);
    }
    return child > 0 && waitpid(child, &status, 0) == child && status == 0;
}

int main(void)
{
    if (!fake_present()) {
        puts("LD_LIBRARY_PATH does not name the driver on host memory");
        return 77;
    }
    Suite *s = suite_create("CUDA driver on host memory");
    TCase *t = tcase_create("contract");
    tcase_add_test(t, mappings_follow_the_rules);
    tcase_add_test(t, memory_is_limited_and_counted);
    tcase_add_test(t, bytes_outlive_who_made_them);
    tcase_add_test(t, a_device_address_is_no_host_address);
    tcase_add_test(t, contexts_are_needed_and_left_empty);
    tcase_add_test(t, a_gpu_reaches_anothers_memory_only_with_access);
    tcase_add_test(t, streams_run_later_and_in_order);
    tcase_add_test(t, host_memory_is_pinned_and_called_back);
    tcase_add_test(t, memory_that_goes_under_a_copy_is_noticed);
    tcase_add_test(t, failures_come_when_asked_for);
    suite_add_tcase(s, t);
    tcase_set_timeout(t, 60);
    return suite_run(s);
}
#endif
