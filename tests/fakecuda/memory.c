/* Addresses: what can be used, by which device, where the bytes are; cuMemAlloc and pinned host memory. */
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "tests/fakecuda/fakecuda.h"

static struct fake_range *ranges;

struct fake_range *fake_range_at(uintptr_t at)
{
    for (struct fake_range *r = ranges; r; r = r->next)
        if (at >= r->base && at - r->base < r->size)
            return r;
    return NULL;
}

static bool range_overlaps(uintptr_t base, size_t size)
{
    for (struct fake_range *r = ranges; r; r = r->next)
        if (base < r->base + r->size && r->base < base + size)
            return true;
    return false;
}

struct fake_range *fake_range_new(enum fake_kind kind, uintptr_t base, size_t size)
{
    struct fake_range *r = range_overlaps(base, size) ? NULL : calloc(1, sizeof *r);
    if (!r)
        return NULL;
    r->kind = kind;
    r->base = base;
    r->size = size;
    if (kind != RANGE_VMM) {
        r->context = fake_current();
        r->context->things++;
    }
    if (kind == RANGE_HOST || kind == RANGE_REGISTERED)
        for (int i = 0; i < FAKE_GPUS_MAX; i++)
            r->access[i] = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    r->next = ranges;
    ranges = r;
    return r;
}

void fake_range_remove(struct fake_range *range)
{
    struct fake_range **at = &ranges;
    while (*at != range)
        at = &(*at)->next;
    *at = range->next; /* no operation finds it any more */
    while (range->users > 0)
        pthread_cond_wait(&fake.changed, &fake.lock);
    if (range->context)
        range->context->things--;
    free(range);
}

/* ---- use ---- */

/* The first byte's place; every range that the addresses lie in is noted in `use`, if there is one. */
static void *use_find(struct fake_use *use, int device, CUdeviceptr at, size_t len, bool write)
{
    struct fake_range *first = fake_range_at(at);
    for (size_t done = 0; first && (done < len || len == 0);) {
        struct fake_range *r = fake_range_at(at + done);
        if (!r || r->shadow != first->shadow || r->access[device] == CU_MEM_ACCESS_FLAGS_PROT_NONE ||
            (write && r->access[device] != CU_MEM_ACCESS_FLAGS_PROT_READWRITE))
            return NULL;
        if (use && use->n == use->cap) {
            size_t cap = use->cap ? use->cap * 2 : 8;
            struct fake_range **v = realloc(use->v, cap * sizeof *v);
            if (!v)
                fake_abort("out of memory");
            use->v = v;
            use->cap = cap;
        }
        if (use) {
            use->v[use->n++] = r;
            r->users++;
        }
        if (len == 0)
            break;
        done = r->base + r->size - at;
    }
    return first ? (void *)(at + first->shadow) : NULL;
}

void *fake_use(struct fake_use *use, CUdeviceptr at, size_t len, bool write)
{
    fake_lock();
    void *place = use_find(use, use->device, at, len, write);
    fake_unlock();
    return place;
}

void fake_use_done(struct fake_use *use)
{
    fake_lock();
    for (size_t i = 0; i < use->n; i++)
        use->v[i]->users--;
    if (use->n > 0)
        pthread_cond_broadcast(&fake.changed);
    fake_unlock();
    free(use->v);
    *use = (struct fake_use){.device = use->device};
}

bool fake_usable(int device, CUdeviceptr at, size_t len, bool write)
{
    fake_lock();
    bool usable = use_find(NULL, device, at, len, write) != NULL;
    fake_unlock();
    return usable;
}

bool fake_pinned(const void *at, size_t len)
{
    fake_lock();
    struct fake_range *r = fake_range_at((uintptr_t)at);
    bool pinned =
        r && (r->kind == RANGE_HOST || r->kind == RANGE_REGISTERED) && len <= r->size - ((uintptr_t)at - r->base);
    fake_unlock();
    return pinned;
}

/* ---- cuMemAlloc ---- */

static size_t round_up(size_t bytes, size_t to)
{
    return (bytes + to - 1) / to * to;
}

static CUresult device_map(struct fake_alloc *alloc, size_t bytes, CUdeviceptr *ret_at)
{
    const size_t size = alloc->size;
    uintptr_t base = fake_addresses_new(size, 0);
    if (!base)
        return CUDA_ERROR_OUT_OF_MEMORY;
    struct fake_range *r = NULL;
    if (mmap((void *)(base + size), size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, alloc->fd, 0) != MAP_FAILED)
        r = fake_range_new(RANGE_DEVICE, base, bytes); /* to the byte: one beyond the end is noticed */
    if (!r) {
        fake_addresses_free(base, size);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    r->alloc = alloc;
    r->shadow = size;
    r->access[alloc->device] = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    *ret_at = base;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuMemAlloc(CUdeviceptr *dptr, size_t bytesize)
{
    CUresult rc = fake_enter(__func__, FAKE_CONTEXT);
    if (rc != CUDA_SUCCESS)
        return rc;
    if (bytesize == 0)
        return CUDA_ERROR_INVALID_VALUE;
    if (bytesize > SIZE_MAX / 4)
        return CUDA_ERROR_OUT_OF_MEMORY;
    int device = fake_current()->device;
    size_t size = round_up(bytesize, FAKE_GRANULARITY);
    struct fake_alloc *alloc;
    fake_lock();
    rc = fake_alloc_new(device, size, &alloc);
    if (rc == CUDA_SUCCESS) {
        rc = device_map(alloc, bytesize, dptr);
        if (rc != CUDA_SUCCESS)
            fake_alloc_unref(alloc);
    }
    fake_unlock();
    return rc;
}

CUresult CUDAAPI cuMemFree(CUdeviceptr dptr)
{
    CUresult rc = fake_enter(__func__, FAKE_CONTEXT);
    if (rc != CUDA_SUCCESS || dptr == 0)
        return rc;
    fake_lock();
    struct fake_range *r = fake_range_at(dptr);
    if (!r || r->kind != RANGE_DEVICE || r->base != dptr) {
        rc = CUDA_ERROR_INVALID_VALUE;
    } else {
        struct fake_alloc *alloc = r->alloc;
        fake_context_settle(r->context);
        fake_range_remove(r);
        fake_addresses_free(dptr, alloc->size);
        fake_alloc_unref(alloc);
        rc = fake.sticky;
    }
    fake_unlock();
    return rc;
}

CUresult CUDAAPI cuMemGetInfo(size_t *free_bytes, size_t *total)
{
    CUresult rc = fake_enter(__func__, FAKE_CONTEXT);
    if (rc != CUDA_SUCCESS)
        return rc;
    fake_lock();
    size_t used = fake_bytes_used(fake_current()->device);
    fake_unlock();
    *total = fake.gpu_bytes;
    *free_bytes = used < fake.gpu_bytes ? fake.gpu_bytes - used : 0;
    return CUDA_SUCCESS;
}

/* ---- pinned host memory ---- */

CUresult CUDAAPI cuMemHostAlloc(void **pp, size_t bytesize, unsigned int Flags)
{
    CUresult rc = fake_enter(__func__, FAKE_CONTEXT);
    if (rc != CUDA_SUCCESS)
        return rc;
    if (bytesize == 0 || bytesize > SIZE_MAX / 4 || (Flags & ~7u) != 0)
        return CUDA_ERROR_INVALID_VALUE;
    void *at = mmap(NULL, bytesize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED)
        return CUDA_ERROR_OUT_OF_MEMORY;
    fake_lock();
    if (!fake_range_new(RANGE_HOST, (uintptr_t)at, bytesize))
        rc = CUDA_ERROR_OUT_OF_MEMORY;
    fake_unlock();
    if (rc == CUDA_SUCCESS)
        *pp = at;
    else
        munmap(at, bytesize);
    return rc;
}

static CUresult host_remove(void *p, enum fake_kind kind, CUresult unknown)
{
    CUresult rc = unknown;
    fake_lock();
    struct fake_range *r = fake_range_at((uintptr_t)p);
    if (r && r->kind == kind && r->base == (uintptr_t)p) {
        size_t size = r->size;
        fake_context_settle(r->context);
        fake_range_remove(r);
        if (kind == RANGE_HOST)
            munmap(p, size);
        rc = fake.sticky;
    }
    fake_unlock();
    return rc;
}

CUresult CUDAAPI cuMemFreeHost(void *p)
{
    CUresult rc = fake_enter(__func__, FAKE_CONTEXT);
    return rc == CUDA_SUCCESS ? host_remove(p, RANGE_HOST, CUDA_ERROR_INVALID_VALUE) : rc;
}

CUresult CUDAAPI cuMemHostRegister(void *p, size_t bytesize, unsigned int Flags)
{
    CUresult rc = fake_enter(__func__, FAKE_CONTEXT);
    if (rc != CUDA_SUCCESS)
        return rc;
    if (!p || bytesize == 0 || bytesize > SIZE_MAX / 4 || (Flags & ~15u) != 0)
        return CUDA_ERROR_INVALID_VALUE;
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), from = (uintptr_t)p / page * page;
    size_t len = round_up((uintptr_t)p + bytesize - from, page);
    unsigned char *pages = malloc(len / page);
    bool mapped = pages && mincore((void *)from, len, pages) == 0;
    free(pages);
    if (!mapped)
        return CUDA_ERROR_INVALID_VALUE;
    fake_lock();
    if (range_overlaps((uintptr_t)p, bytesize))
        rc = CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
    else if (!fake_range_new(RANGE_REGISTERED, (uintptr_t)p, bytesize))
        rc = CUDA_ERROR_OUT_OF_MEMORY;
    fake_unlock();
    return rc;
}

CUresult CUDAAPI cuMemHostUnregister(void *p)
{
    CUresult rc = fake_enter(__func__, FAKE_CONTEXT);
    return rc == CUDA_SUCCESS ? host_remove(p, RANGE_REGISTERED, CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED) : rc;
}

CUresult CUDAAPI cuMemHostGetDevicePointer(CUdeviceptr *pdptr, void *p, unsigned int Flags)
{
    CUresult rc = fake_enter(__func__, FAKE_CONTEXT);
    if (rc != CUDA_SUCCESS)
        return rc;
    if (Flags != 0 || !fake_pinned(p, 0))
        return CUDA_ERROR_INVALID_VALUE;
    *pdptr = (CUdeviceptr)(uintptr_t)p;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr ptr)
{
    CUresult rc = fake_enter(__func__, FAKE_CONTEXT);
    if (rc != CUDA_SUCCESS)
        return rc;
    fake_lock();
    struct fake_range *r = fake_range_at(ptr);
    bool host = r && (r->kind == RANGE_HOST || r->kind == RANGE_REGISTERED);
    if (!r)
        rc = CUDA_ERROR_INVALID_VALUE;
    else if (attribute == CU_POINTER_ATTRIBUTE_MEMORY_TYPE)
        *(unsigned *)data = host ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE;
    else if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL)
        *(int *)data = r->alloc ? r->alloc->device : r->context->device;
    else if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
        *(CUdeviceptr *)data = ptr;
    else if (attribute == CU_POINTER_ATTRIBUTE_HOST_POINTER && host)
        *(void **)data = (void *)(uintptr_t)ptr;
    else
        rc = CUDA_ERROR_INVALID_VALUE;
    fake_unlock();
    return rc;
}
