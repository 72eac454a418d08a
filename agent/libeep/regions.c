/* The weights as the engine sees them: the agent's regions mapped into this process, and tensors by name.
 * Any thread, under the lock of struct eep. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "agent/libeep/internal.h"

static int region_map_host(int fd, size_t bytes, const char *name, struct mapping *ret_mapping, struct err *err)
{
    struct stat st;
    if (fstat(fd, &st) < 0 || (uint64_t)st.st_size < bytes)
        return err_set(err, ERR_PROTOCOL, "region \"%s\" is smaller than the %zu bytes of its manifest", name, bytes);
    void *base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (base == MAP_FAILED)
        return err_set(err, ERR_NOMEM, "cannot map region \"%s\" (%zu bytes): %s", name, bytes, strerror(errno));
    *ret_mapping = (struct mapping){.base = base, .bytes = bytes};
    return 0;
}

int region_map(struct device *device, int fd, size_t bytes, const char *name, struct mapping *ret_mapping,
               struct err *err)
{
    struct mapping mapping = {.base = NULL};
    if (!device)
        return region_map_host(fd, bytes, name, ret_mapping, err);
    int rc = device_map(device, fd, bytes, &mapping.base, &mapping.bytes, err);
    if (rc)
        return err_wrap(err, "region \"%s\" (%zu bytes)", name, bytes);
    *ret_mapping = mapping;
    return 0;
}

void region_unmap(struct device *device, struct mapping *mapping)
{
    if (mapping->base && device)
        device_unmap(device, mapping->base, mapping->bytes);
    else if (mapping->base)
        munmap(mapping->base, mapping->bytes);
    mapping->base = NULL;
}

void regions_free(struct regions *regions)
{
    if (!regions)
        return;
    for (uint32_t i = 0; regions->mappings && i < regions->manifest.n_regions; i++)
        region_unmap(regions->device, &regions->mappings[i]);
    free(regions->mappings);
    manifest_done(&regions->manifest);
    blob_unref(regions->blob);
    free(regions);
}

static int regions_make(struct device *device, struct blob *manifest, const int *fds, uint32_t n,
                        struct regions **ret_regions, struct err *err)
{
    struct regions *regions = calloc(1, sizeof *regions);
    if (!regions)
        return err_set(err, ERR_NOMEM, "no memory for regions");
    regions->device = device;
    regions->blob = blob_ref(manifest);
    int rc = manifest_decode(manifest, &regions->manifest, err);
    if (!rc && regions->manifest.n_regions != n)
        rc = err_set(err, ERR_PROTOCOL, "%u descriptors for %u regions", n, regions->manifest.n_regions);
    if (!rc) {
        regions->mappings = calloc(n ? n : 1, sizeof *regions->mappings);
        if (!regions->mappings)
            rc = err_set(err, ERR_NOMEM, "no memory for regions");
    }
    for (uint32_t i = 0; i < n && !rc; i++)
        rc = region_map(device, fds[i], regions->manifest.regions[i].bytes, regions->manifest.regions[i].name,
                        &regions->mappings[i], err);
    if (rc) {
        regions_free(regions);
        return rc;
    }
    *ret_regions = regions;
    return 0;
}

/* An engine that has sealed holds these very regions already: its mappings stay. */
int regions_install(struct eep *eep, struct blob *manifest, const int *fds, uint32_t n, struct err *err)
{
    int rc = 0;
    struct regions *regions = eep->regions;
    if (regions && (regions->blob->len != manifest->len ||
                    memcmp(regions->blob->data, manifest->data, manifest->len) != 0)) {
        rc = err_set(err, ERR_PROTOCOL, "the agent sent other regions before the present ones were released");
    } else if (!regions) {
        rc = regions_make(eep->device, manifest, fds, n, &regions, err);
        if (!rc)
            rc = maps_install(eep, &regions->manifest, err);
        if (rc && regions)
            regions_free(regions);
        else if (!rc)
            eep->regions = regions;
    }
    for (uint32_t i = 0; i < n; i++)
        close(fds[i]);
    return rc;
}

int eep_device(struct eep *eep)
{
    return eep->device ? device_ordinal(eep->device) : -1;
}

int eep_model_get(struct eep *eep, struct eep_model *ret_model)
{
    int rc = 0;
    pthread_mutex_lock(&eep->lock);
    if (eep->regions) {
        const struct manifest *m = &eep->regions->manifest;
        *ret_model = (struct eep_model){.layers = m->layers,
                                        .logical = m->logical,
                                        .slots = m->slots,
                                        .device = eep_device(eep),
                                        .config = m->config,
                                        .producer = m->producer};
    } else {
        rc = ERR_NOTFOUND;
    }
    pthread_mutex_unlock(&eep->lock);
    return rc ? eep_fail(rc, "no weights yet: wait for EEP_EVENT_REGIONS") : 0;
}

static int tensor_fill(const struct regions *regions, const struct tensor *t, int device,
                       struct eep_tensor *ret_tensor)
{
    const struct region *r = &regions->manifest.regions[t->region];
    bool expert = r->kind == REGION_EXPERT;
    struct eep_tensor out = {.data = (char *)regions->mappings[t->region].base + t->offset,
                             .device = device,
                             .dtype = t->dtype,
                             .dims = t->dims + (expert ? 1u : 0u),
                             .stride = expert ? r->stride : 0};
    if (out.dims > sizeof out.shape / sizeof out.shape[0])
        return ERR_UNSUPPORTED;
    if (expert)
        out.shape[0] = r->slots;
    for (uint32_t i = 0; i < t->dims; i++)
        out.shape[i + (expert ? 1u : 0u)] = t->shape[i];
    *ret_tensor = out;
    return 0;
}

int eep_tensor_get(struct eep *eep, const char *name, struct eep_tensor *ret_tensor)
{
    int rc = ERR_NOTFOUND;
    bool any;
    pthread_mutex_lock(&eep->lock);
    const struct regions *regions = eep->regions;
    any = regions != NULL;
    for (uint32_t i = 0; regions && i < regions->manifest.n_tensors && rc == ERR_NOTFOUND; i++)
        if (strcmp(regions->manifest.tensors[i].name, name) == 0)
            rc = tensor_fill(regions, &regions->manifest.tensors[i], eep_device(eep), ret_tensor);
    pthread_mutex_unlock(&eep->lock);
    if (rc == ERR_UNSUPPORTED)
        return eep_fail(rc, "tensor \"%s\" has too many dimensions for an array of slots", name);
    if (rc)
        return eep_fail(rc, any ? "no tensor \"%s\" in the weights" : "no weights yet, so no tensor \"%s\"", name);
    return 0;
}

int eep_released(struct eep *eep)
{
    /* What was launched may still read them. */
    if (eep->device && !device_drain(eep->device, DRAIN_MS))
        return eep_fail(ERR_TIMEOUT, "the steps that were launched have not ended within %d ms: the regions stay mapped",
                        DRAIN_MS);
    pthread_mutex_lock(&eep->lock);
    regions_free(eep->regions);
    eep->regions = NULL;
    atomic_store(&eep->maps, NULL);
    pthread_mutex_unlock(&eep->lock);
    Eep__Engine__Released body = EEP__ENGINE__RELEASED__INIT;
    Eep__Engine__EngineUp up = EEP__ENGINE__ENGINE_UP__INIT;
    up.body_case = EEP__ENGINE__ENGINE_UP__BODY_RELEASED;
    up.released = &body;
    struct err err;
    int rc = link_send(eep, &up, &err);
    return rc ? eep_fail_err(&err) : 0;
}
