/* Virtual memory management: allocations that are memfds, addresses, mappings, descriptors; and what is in use of a
 * GPU.
 *
 * The name of a memfd says whose it is: "fakecuda:<state>:<gpu>:<bytes>".  It lives as long as anybody maps it or has
 * it open, as the real driver's does, also after a kill; so with FAKECUDA_STATE what is in use is read from /proc. */
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tests/fakecuda/fakecuda.h"

#define MEMFD_PREFIX "/memfd:fakecuda:"

/* Addresses that were reserved: of the device from base, for its bytes behind them. */
struct reservation {
    struct reservation *next;
    uintptr_t base;
    size_t size;
};

static struct reservation *reservations;
static struct fake_alloc *allocs;
static CUmemGenericAllocationHandle last_handle = 0xfa000;

/* ---- what is in use ---- */

struct seen {
    uint64_t *inodes;
    size_t n, cap, bytes;
};

static void seen_add(struct seen *seen, uint64_t inode, size_t bytes)
{
    for (size_t i = 0; i < seen->n; i++)
        if (seen->inodes[i] == inode)
            return;
    if (seen->n == seen->cap) {
        seen->cap = seen->cap ? seen->cap * 2 : 64;
        seen->inodes = realloc(seen->inodes, seen->cap * sizeof *seen->inodes);
        if (!seen->inodes)
            fake_abort("out of memory");
    }
    seen->inodes[seen->n++] = inode;
    seen->bytes += bytes;
}

/* Whether a name is one of ours, as /proc shows it; which GPU, how large. */
static bool memfd_name(const char *text, bool any_state, int *ret_gpu, size_t *ret_bytes)
{
    const char *name = strstr(text, MEMFD_PREFIX);
    const char *state = name ? name + strlen(MEMFD_PREFIX) : NULL, *end = state ? strchr(state, ':') : NULL;
    if (!end || (!any_state && ((size_t)(end - state) != strlen(fake.state) ||
                                strncmp(state, fake.state, (size_t)(end - state)) != 0)))
        return false;
    return sscanf(end, ":%d:%zu", ret_gpu, ret_bytes) == 2;
}

static void proc_maps(const char *pid, int gpu, struct seen *seen)
{
    char path[64], line[512];
    snprintf(path, sizeof path, "/proc/%.16s/maps", pid);
    FILE *f = fopen(path, "re");
    while (f && fgets(line, sizeof line, f)) {
        unsigned long long inode;
        size_t bytes;
        int which;
        if (memfd_name(line, false, &which, &bytes) && which == gpu &&
            sscanf(line, "%*s %*s %*s %*s %llu", &inode) == 1)
            seen_add(seen, inode, bytes);
    }
    if (f)
        fclose(f);
}

static void proc_fds(const char *pid, int gpu, struct seen *seen)
{
    char path[320], name[256];
    snprintf(path, sizeof path, "/proc/%.16s/fd", pid);
    DIR *dir = opendir(path);
    for (struct dirent *e = dir ? readdir(dir) : NULL; e; e = readdir(dir)) {
        struct stat st;
        size_t bytes;
        int which;
        snprintf(path, sizeof path, "/proc/%.16s/fd/%.16s", pid, e->d_name);
        ssize_t len = readlink(path, name, sizeof name - 1);
        if (len < 0)
            continue;
        name[len] = 0;
        if (memfd_name(name, false, &which, &bytes) && which == gpu && stat(path, &st) == 0)
            seen_add(seen, st.st_ino, bytes);
    }
    if (dir)
        closedir(dir);
}

size_t fake_bytes_used(int device)
{
    struct seen seen = {0};
    for (const struct fake_alloc *a = allocs; a && !fake.state[0]; a = a->next)
        if (a->device == device)
            seen_add(&seen, a->inode, a->size);
    DIR *dir = fake.state[0] ? opendir("/proc") : NULL;
    for (struct dirent *e = dir ? readdir(dir) : NULL; e; e = readdir(dir))
        if (e->d_name[0] >= '0' && e->d_name[0] <= '9') {
            proc_maps(e->d_name, fake.gpu[device], &seen);
            proc_fds(e->d_name, fake.gpu[device], &seen);
        }
    if (dir)
        closedir(dir);
    free(seen.inodes);
    return seen.bytes;
}

/* ---- allocations ---- */

static CUresult alloc_add(int fd, int device, size_t size, struct fake_alloc **ret_alloc)
{
    struct fake_alloc *a = calloc(1, sizeof *a);
    struct stat st;
    if (!a || fstat(fd, &st) < 0) {
        free(a);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    *a = (struct fake_alloc){.next = allocs,
                             .handle = ++last_handle,
                             .refs = 1,
                             .fd = fd,
                             .device = device,
                             .size = size,
                             .inode = st.st_ino};
    allocs = a;
    *ret_alloc = a;
    return CUDA_SUCCESS;
}

CUresult fake_alloc_new(int device, size_t size, struct fake_alloc **ret_alloc)
{
    char name[128];
    size_t used = fake_bytes_used(device);
    if (used > fake.gpu_bytes || size > fake.gpu_bytes - used)
        return CUDA_ERROR_OUT_OF_MEMORY;
    snprintf(name, sizeof name, "fakecuda:%s:%d:%zu", fake.state, fake.gpu[device], size);
    int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0 || ftruncate(fd, (off_t)size) < 0 ||
        fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0 ||
        alloc_add(fd, device, size, ret_alloc) != CUDA_SUCCESS) {
        if (fd >= 0)
            close(fd);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    return CUDA_SUCCESS;
}

void fake_alloc_unref(struct fake_alloc *alloc)
{
    if (--alloc->refs > 0)
        return;
    struct fake_alloc **at = &allocs;
    while (*at != alloc)
        at = &(*at)->next;
    *at = alloc->next;
    close(alloc->fd);
    free(alloc);
}

unsigned fake_allocs_of(int device)
{
    unsigned n = 0;
    for (const struct fake_alloc *a = allocs; a; a = a->next)
        n += a->device == device;
    return n;
}

/* With a handle on it: one that was released is unknown, also while the memory is mapped. */
static struct fake_alloc *alloc_of(CUmemGenericAllocationHandle handle)
{
    struct fake_alloc *a = allocs;
    while (a && (a->handle != handle || a->handles == 0))
        a = a->next;
    return a;
}

static bool granular(size_t size)
{
    return size > 0 && size <= SIZE_MAX / 4 && size % FAKE_GRANULARITY == 0;
}

static CUresult prop_check(const CUmemAllocationProp *prop)
{
    if (!prop || prop->type != CU_MEM_ALLOCATION_TYPE_PINNED || prop->location.type != CU_MEM_LOCATION_TYPE_DEVICE ||
        ((int)prop->requestedHandleTypes & ~CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) != 0)
        return CUDA_ERROR_INVALID_VALUE;
    return fake_device_valid(prop->location.id) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

CUresult CUDAAPI cuMemGetAllocationGranularity(size_t *granularity, const CUmemAllocationProp *prop,
                                               CUmemAllocationGranularity_flags option)
{
    CUresult rc = fake_enter(__func__, FAKE_STARTED);
    if (rc == CUDA_SUCCESS)
        rc = prop_check(prop);
    if (rc == CUDA_SUCCESS && option != CU_MEM_ALLOC_GRANULARITY_MINIMUM &&
        option != CU_MEM_ALLOC_GRANULARITY_RECOMMENDED)
        rc = CUDA_ERROR_INVALID_VALUE;
    if (rc == CUDA_SUCCESS)
        *granularity = FAKE_GRANULARITY;
    return rc;
}

CUresult CUDAAPI cuMemCreate(CUmemGenericAllocationHandle *handle, size_t size, const CUmemAllocationProp *prop,
                             unsigned long long flags)
{
    CUresult rc = fake_enter(__func__, FAKE_STARTED);
    if (rc == CUDA_SUCCESS)
        rc = prop_check(prop);
    if (rc == CUDA_SUCCESS && (flags != 0 || !granular(size)))
        rc = CUDA_ERROR_INVALID_VALUE;
    if (rc != CUDA_SUCCESS)
        return rc;
    struct fake_alloc *a;
    fake_lock();
    rc = fake_alloc_new(prop->location.id, size, &a);
    if (rc == CUDA_SUCCESS) {
        a->handles = 1;
        a->exportable = prop->requestedHandleTypes == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
        *handle = a->handle;
    }
    fake_unlock();
    return rc;
}

CUresult CUDAAPI cuMemRelease(CUmemGenericAllocationHandle handle)
{
    CUresult rc = fake_enter(__func__, FAKE_STARTED);
    if (rc != CUDA_SUCCESS)
        return rc;
    fake_lock();
    struct fake_alloc *a = alloc_of(handle);
    if (!a) {
        rc = CUDA_ERROR_INVALID_VALUE;
    } else {
        a->handles--;
        fake_alloc_unref(a);
    }
    fake_unlock();
    return rc;
}

CUresult CUDAAPI cuMemRetainAllocationHandle(CUmemGenericAllocationHandle *handle, void *addr)
{
    CUresult rc = fake_enter(__func__, FAKE_STARTED);
    if (rc != CUDA_SUCCESS)
        return rc;
    fake_lock();
    struct fake_range *r = fake_range_at((uintptr_t)addr);
    if (!r || r->kind != RANGE_VMM) {
        rc = CUDA_ERROR_INVALID_VALUE;
    } else {
        r->alloc->refs++;
        r->alloc->handles++;
        *handle = r->alloc->handle;
    }
    fake_unlock();
    return rc;
}

CUresult CUDAAPI cuMemGetAllocationPropertiesFromHandle(CUmemAllocationProp *prop, CUmemGenericAllocationHandle handle)
{
    CUresult rc = fake_enter(__func__, FAKE_STARTED);
    if (rc != CUDA_SUCCESS)
        return rc;
    fake_lock();
    struct fake_alloc *a = alloc_of(handle);
    if (!a)
        rc = CUDA_ERROR_INVALID_VALUE;
    else
        *prop = (CUmemAllocationProp){
            .type = CU_MEM_ALLOCATION_TYPE_PINNED,
            .requestedHandleTypes = a->exportable ? CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR : CU_MEM_HANDLE_TYPE_NONE,
            .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = a->device},
        };
    fake_unlock();
    return rc;
}

/* ---- descriptors ---- */

CUresult CUDAAPI cuMemExportToShareableHandle(void *shareableHandle, CUmemGenericAllocationHandle handle,
                                              CUmemAllocationHandleType handleType, unsigned long long flags)
{
    CUresult rc = fake_enter(__func__, FAKE_STARTED);
    if (rc != CUDA_SUCCESS)
        return rc;
    if (handleType != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR || flags != 0)
        return CUDA_ERROR_INVALID_VALUE;
    fake_lock();
    struct fake_alloc *a = alloc_of(handle);
    int fd = a && a->exportable ? dup(a->fd) : -1; /* without close-on-exec: that is the caller's to set */
    if (!a || !a->exportable)
        rc = CUDA_ERROR_INVALID_VALUE;
    else if (fd < 0)
        rc = CUDA_ERROR_OUT_OF_MEMORY;
    else
        *(int *)shareableHandle = fd;
    fake_unlock();
    return rc;
}

CUresult CUDAAPI cuMemImportFromShareableHandle(CUmemGenericAllocationHandle *handle, void *osHandle,
                                                CUmemAllocationHandleType shHandleType)
{
    CUresult rc = fake_enter(__func__, FAKE_STARTED);
    if (rc != CUDA_SUCCESS)
        return rc;
    if (shHandleType != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR)
        return CUDA_ERROR_INVALID_VALUE;
    char path[64], name[256];
    int gpu = -1, device = 0;
    size_t bytes = 0;
    snprintf(path, sizeof path, "/proc/self/fd/%d", (int)(intptr_t)osHandle);
    ssize_t len = readlink(path, name, sizeof name - 1);
    if (len < 0)
        return CUDA_ERROR_INVALID_VALUE; /* not open */
    name[len] = 0;
    if (!memfd_name(name, true, &gpu, &bytes))
        return CUDA_ERROR_UNKNOWN; /* what the real one says of a pipe; nothing is broken by it */
    while (device < fake.n_gpus && fake.gpu[device] != gpu)
        device++;
    if (device == fake.n_gpus)
        return CUDA_ERROR_INVALID_DEVICE;
    int fd = fcntl((int)(intptr_t)osHandle, F_DUPFD_CLOEXEC, 0);
    if (fd < 0)
        return CUDA_ERROR_OUT_OF_MEMORY;
    struct fake_alloc *a;
    fake_lock();
    rc = alloc_add(fd, device, bytes, &a);
    if (rc == CUDA_SUCCESS) {
        a->handles = 1;
        a->exportable = true;
        *handle = a->handle;
    } else {
        close(fd);
    }
    fake_unlock();
    return rc;
}

/* ---- addresses ---- */

uintptr_t fake_addresses_new(size_t size, size_t alignment)
{
    if (alignment < FAKE_GRANULARITY)
        alignment = FAKE_GRANULARITY;
    char *got = mmap(NULL, 2 * size + alignment, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (got == MAP_FAILED)
        return 0;
    uintptr_t at = (uintptr_t)got, base = (at + alignment - 1) / alignment * alignment;
    if (base > at)
        munmap(got, base - at);
    if (at + alignment > base)
        munmap((void *)(base + 2 * size), at + alignment - base);
    return base;
}

void fake_addresses_free(uintptr_t base, size_t size)
{
    munmap((void *)base, 2 * size);
}

CUresult CUDAAPI cuMemAddressReserve(CUdeviceptr *ptr, size_t size, size_t alignment, CUdeviceptr addr,
                                     unsigned long long flags)
{
    CUresult rc = fake_enter(__func__, FAKE_STARTED);
    (void)addr; /* a wish */
    if (rc != CUDA_SUCCESS)
        return rc;
    if (!granular(size) || flags != 0 || (alignment & (alignment - 1)) != 0)
        return CUDA_ERROR_INVALID_VALUE;
    struct reservation *r = calloc(1, sizeof *r);
    uintptr_t base = r ? fake_addresses_new(size, alignment) : 0;
    if (!base) {
        free(r);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    fake_lock();
    *r = (struct reservation){reservations, base, size};
    reservations = r;
    fake_unlock();
    *ptr = base;
    return CUDA_SUCCESS;
}

/* The first mapping that lies in a range, or begins before it and reaches into it. */
static struct fake_range *mapping_in(uintptr_t base, size_t size)
{
    for (size_t done = 0; done < size; done += FAKE_GRANULARITY) {
        struct fake_range *r = fake_range_at(base + done);
        if (r)
            return r;
    }
    return NULL;
}

CUresult CUDAAPI cuMemAddressFree(CUdeviceptr ptr, size_t size)
{
    CUresult rc = fake_enter(__func__, FAKE_STARTED);
    if (rc != CUDA_SUCCESS)
        return rc;
    fake_lock();
    struct reservation **at = &reservations;
    while (*at && ((*at)->base != ptr || (*at)->size != size))
        at = &(*at)->next;
    struct reservation *r = *at;
    if (!r || mapping_in(ptr, size)) {
        rc = CUDA_ERROR_INVALID_VALUE;
    } else {
        *at = r->next;
        fake_addresses_free(r->base, r->size);
        free(r);
    }
    fake_unlock();
    return rc;
}

/* ---- mappings ---- */

static CUresult map(CUdeviceptr ptr, size_t size, struct fake_alloc *a)
{
    const struct reservation *in = reservations;
    while (in && (ptr < in->base || ptr - in->base >= in->size))
        in = in->next;
    if (!a || !in || size > in->size - (ptr - in->base) || size > a->size || mapping_in(ptr, size))
        return CUDA_ERROR_INVALID_VALUE;
    struct fake_range *r = fake_range_new(RANGE_VMM, ptr, size);
    if (!r)
        return CUDA_ERROR_OUT_OF_MEMORY;
    r->shadow = in->size;
    r->alloc = a;
    a->refs++;
    if (mmap((void *)(ptr + r->shadow), size, PROT_NONE, MAP_SHARED | MAP_FIXED, a->fd, 0) == MAP_FAILED)
        fake_abort("cannot map %zu bytes", size);
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuMemMap(CUdeviceptr ptr, size_t size, size_t offset, CUmemGenericAllocationHandle handle,
                          unsigned long long flags)
{
    CUresult rc = fake_enter(__func__, FAKE_STARTED);
    if (rc != CUDA_SUCCESS)
        return rc;
    if (!granular(size) || ptr % FAKE_GRANULARITY != 0 || offset != 0 || flags != 0)
        return CUDA_ERROR_INVALID_VALUE;
    fake_lock();
    rc = map(ptr, size, alloc_of(handle));
    fake_unlock();
    return rc;
}

/* A range that consists of whole mappings. */
static bool whole_mappings(CUdeviceptr ptr, size_t size)
{
    for (size_t done = 0; done < size;) {
        struct fake_range *r = fake_range_at(ptr + done);
        if (!r || r->kind != RANGE_VMM || r->base != ptr + done || r->size > size - done)
            return false;
        done += r->size;
    }
    return size > 0;
}

CUresult CUDAAPI cuMemUnmap(CUdeviceptr ptr, size_t size)
{
    CUresult rc = fake_enter(__func__, FAKE_STARTED);
    if (rc != CUDA_SUCCESS)
        return rc;
    fake_lock();
    if (!whole_mappings(ptr, size))
        rc = CUDA_ERROR_INVALID_VALUE;
    for (size_t done = 0; done < size && rc == CUDA_SUCCESS;) {
        struct fake_range *r = fake_range_at(ptr + done);
        struct fake_alloc *a = r->alloc;
        size_t bytes = r->size;
        void *place = (void *)(r->base + r->shadow);
        fake_range_remove(r);
        if (mmap(place, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == MAP_FAILED)
            fake_abort("cannot unmap %zu bytes", bytes);
        fake_alloc_unref(a);
        done += bytes;
    }
    fake_unlock();
    return rc;
}

static CUresult set_access(struct fake_range *r, const CUmemAccessDesc *desc, size_t count)
{
    for (size_t i = 0; i < count; i++)
        r->access[desc[i].location.id] = (unsigned char)desc[i].flags;
    int any = 0;
    for (int i = 0; i < fake.n_gpus; i++)
        any |= r->access[i];
    /* readable by whoever looks here, writable for the operations that are let through */
    int protection = any == CU_MEM_ACCESS_FLAGS_PROT_NONE ? PROT_NONE : PROT_READ | PROT_WRITE;
    return mprotect((void *)(r->base + r->shadow), r->size, protection) < 0 ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}

CUresult CUDAAPI cuMemSetAccess(CUdeviceptr ptr, size_t size, const CUmemAccessDesc *desc, size_t count)
{
    CUresult rc = fake_enter(__func__, FAKE_STARTED);
    for (size_t i = 0; i < count && rc == CUDA_SUCCESS; i++)
        if (desc[i].location.type != CU_MEM_LOCATION_TYPE_DEVICE || (unsigned)desc[i].flags == 2u ||
            (unsigned)desc[i].flags > CU_MEM_ACCESS_FLAGS_PROT_READWRITE)
            rc = CUDA_ERROR_INVALID_VALUE;
        else if (!fake_device_valid(desc[i].location.id))
            rc = CUDA_ERROR_INVALID_DEVICE;
    if (rc != CUDA_SUCCESS)
        return rc;
    fake_lock();
    if (!whole_mappings(ptr, size) || count == 0)
        rc = CUDA_ERROR_INVALID_VALUE;
    for (size_t done = 0; done < size && rc == CUDA_SUCCESS;) {
        struct fake_range *r = fake_range_at(ptr + done);
        rc = set_access(r, desc, count);
        done += r->size;
    }
    fake_unlock();
    return rc;
}
