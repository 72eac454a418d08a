/* A layout that the engine produces itself: regions of the agent's memory, allocated one by one, and the manifest that
 * describes them when they are filled.  Any thread but libeep's own, which takes the answers. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "agent/libeep/internal.h"

/* One question at a time: `waiting` is the right to ask. */
static int ask(struct eep *eep, Eep__Engine__EngineUp *up, int *ret_fd)
{
    if (pthread_equal(pthread_self(), eep->thread))
        return eep_fail(ERR_INVALID, "not from the event callback: its thread would wait for itself");
    pthread_mutex_lock(&eep->lock);
    while (eep->waiting && !atomic_load(&eep->dead))
        pthread_cond_wait(&eep->cond, &eep->lock);
    eep->waiting = true;
    eep->answered = false;
    pthread_mutex_unlock(&eep->lock);

    struct err err;
    int rc = link_send(eep, up, &err);
    pthread_mutex_lock(&eep->lock);
    while (!rc && !eep->answered && !atomic_load(&eep->dead))
        pthread_cond_wait(&eep->cond, &eep->lock);
    bool answered = eep->answered;
    int code = eep->answer_code, fd = eep->answer_fd;
    char text[sizeof eep->answer_text];
    memcpy(text, eep->answer_text, sizeof text);
    eep->waiting = eep->answered = false;
    eep->answer_fd = -1;
    pthread_cond_broadcast(&eep->cond);
    pthread_mutex_unlock(&eep->lock);

    if (rc)
        return eep_fail_err(&err);
    if (!answered)
        return eep_fail_dead(eep);
    if (code) {
        if (fd >= 0)
            close(fd);
        return eep_fail(code, "%s", text);
    }
    *ret_fd = fd;
    return 0;
}

/* ---- regions ---- */

static int region_describe(const struct eep *eep, const struct eep_region_spec *spec, struct region *ret_region)
{
    struct region r = {.kind = spec->expert ? REGION_EXPERT : REGION_DENSE, .bytes = spec->bytes};
    if (spec->expert) {
        if (!spec->part || !*spec->part || strlen(spec->part) >= sizeof r.part)
            return eep_fail(ERR_INVALID, "an expert region needs the name of its part");
        snprintf(r.part, sizeof r.part, "%s", spec->part);
        r.layer = spec->layer;
        r.slots = spec->slots;
        r.stride = spec->stride;
        r.slot_bytes = spec->slot_bytes;
        if (spec->slots != eep->load_slots || spec->slot_bytes == 0 || spec->stride < spec->slot_bytes ||
            __builtin_mul_overflow((uint64_t)spec->slots, spec->stride, &r.bytes))
            return eep_fail(ERR_INVALID, "an expert region of %u slots of %llu bytes, %llu apart; the rank has %u slots",
                            spec->slots, (unsigned long long)spec->slot_bytes, (unsigned long long)spec->stride,
                            eep->load_slots);
        snprintf(r.name, sizeof r.name, "layers.%u.experts.%s", spec->layer, spec->part);
    }
    if (spec->name) {
        if (strlen(spec->name) >= sizeof r.name)
            return eep_fail(ERR_INVALID, "the region's name is longer than %zu bytes", sizeof r.name - 1);
        snprintf(r.name, sizeof r.name, "%s", spec->name);
    }
    if (!*r.name || r.bytes == 0)
        return eep_fail(ERR_INVALID, "a region needs a name and a size");
    *ret_region = r;
    return 0;
}

static int tensor_push(struct manifest *m, uint32_t region, const char *name, uint64_t offset, const char *dtype,
                       uint32_t dims, const uint64_t *shape)
{
    struct tensor t = {.region = region, .offset = offset, .dims = dims};
    if (dims > TENSOR_DIMS_MAX || !dtype || strlen(dtype) >= sizeof t.dtype || strlen(name) >= sizeof t.name)
        return eep_fail(ERR_INVALID, "tensor \"%s\": name, dtype or shape is too long", name);
    snprintf(t.name, sizeof t.name, "%s", name);
    snprintf(t.dtype, sizeof t.dtype, "%s", dtype);
    if (dims)
        memcpy(t.shape, shape, dims * sizeof *shape);
    struct tensor *grown = realloc(m->tensors, (m->n_tensors + 1u) * sizeof *grown);
    if (!grown)
        return eep_fail(ERR_NOMEM, "no memory for a tensor");
    grown[m->n_tensors++] = t;
    m->tensors = grown;
    return 0;
}

static int region_push(struct regions *building, const struct region *region, const struct mapping *mapping)
{
    struct manifest *m = &building->manifest;
    struct region *regions = realloc(m->regions, (m->n_regions + 1u) * sizeof *regions);
    if (regions)
        m->regions = regions;
    struct mapping *mappings = realloc(building->mappings, (m->n_regions + 1u) * sizeof *mappings);
    if (mappings)
        building->mappings = mappings;
    if (!regions || !mappings)
        return eep_fail(ERR_NOMEM, "no memory for a region");
    regions[m->n_regions] = *region;
    mappings[m->n_regions] = *mapping;
    m->n_regions++;
    return 0;
}

/* The new region is part of what is being built. */
static int building_add(struct eep *eep, const struct eep_region_spec *spec, const struct region *region, int fd,
                        void **ret_data)
{
    struct mapping mapping = {.base = NULL};
    struct err err;
    if (fd < 0)
        return eep_fail(ERR_PROTOCOL, "the agent sent no descriptor for region \"%s\"", region->name);
    if (!eep->building)
        eep->building = calloc(1, sizeof *eep->building);
    if (!eep->building)
        return eep_fail(ERR_NOMEM, "no memory for a region");
    eep->building->device = eep->device;
    if (region_map(eep->device, fd, region->bytes, region->name, &mapping, &err))
        return eep_fail_err(&err);
    int rc = region_push(eep->building, region, &mapping);
    if (rc) {
        region_unmap(eep->device, &mapping);
        return rc;
    }
    if (spec->dtype)
        rc = tensor_push(&eep->building->manifest, eep->building->manifest.n_regions - 1, region->name, 0, spec->dtype,
                         spec->dims, spec->shape);
    if (!rc)
        *ret_data = mapping.base;
    return rc;
}

int eep_region_alloc(struct eep *eep, const struct eep_region_spec *spec, void **ret_data)
{
    struct region region;
    pthread_mutex_lock(&eep->lock);
    if (eep->building_void) {
        regions_free(eep->building);
        eep->building = NULL;
        eep->building_void = false;
    }
    int rc = eep->load_slots ? region_describe(eep, spec, &region)
                             : eep_fail(ERR_INVALID, "regions are allocated after EEP_EVENT_LOAD");
    pthread_mutex_unlock(&eep->lock);
    if (rc)
        return rc;
    Eep__Engine__RegionAlloc body = EEP__ENGINE__REGION_ALLOC__INIT;
    body.name = region.name;
    body.expert = spec->expert;
    body.bytes = region.bytes;
    if (spec->expert) {
        body.has_layer = body.has_slots = body.has_stride = body.has_slot_bytes = true;
        body.layer = region.layer;
        body.part = region.part;
        body.slots = region.slots;
        body.stride = region.stride;
        body.slot_bytes = region.slot_bytes;
    }
    Eep__Engine__EngineUp up = EEP__ENGINE__ENGINE_UP__INIT;
    up.body_case = EEP__ENGINE__ENGINE_UP__BODY_REGION_ALLOC;
    up.region_alloc = &body;
    int fd = -1;
    rc = ask(eep, &up, &fd);
    if (rc)
        return rc;
    pthread_mutex_lock(&eep->lock);
    rc = building_add(eep, spec, &region, fd, ret_data);
    pthread_mutex_unlock(&eep->lock);
    if (fd >= 0)
        close(fd);
    return rc;
}

int eep_tensor_add(struct eep *eep, const char *region, const char *name, uint64_t offset, const char *dtype,
                   uint32_t dims, const uint64_t *shape)
{
    pthread_mutex_lock(&eep->lock);
    struct manifest *m = eep->building ? &eep->building->manifest : NULL;
    uint32_t i = 0;
    while (m && i < m->n_regions && strcmp(m->regions[i].name, region) != 0)
        i++;
    int rc = m && i < m->n_regions ? tensor_push(m, i, name, offset, dtype, dims, shape)
                                   : eep_fail(ERR_NOTFOUND, "no region \"%s\" was allocated", region);
    pthread_mutex_unlock(&eep->lock);
    return rc;
}

/* ---- seal ---- */

static int building_encode(struct eep *eep, const char *config, struct blob **ret_blob)
{
    struct err err;
    if (!eep->building)
        return eep_fail(ERR_INVALID, "nothing to seal: no region was allocated");
    struct manifest *m = &eep->building->manifest;
    snprintf(m->producer, sizeof m->producer, "%s", eep->seals);
    m->layers = eep->moe_layers;
    m->logical = eep->logical_experts;
    m->slots = eep->load_slots;
    free(m->config);
    m->config = config ? strdup(config) : NULL;
    if (config && !m->config)
        return eep_fail(ERR_NOMEM, "no memory for the model's description");
    if (manifest_validate(m, &err) || manifest_encode(m, ret_blob, &err))
        return eep_fail_err(&err);
    return 0;
}

int seal_finish(struct eep *eep, struct err *err)
{
    if (!eep->sealing || !eep->building || eep->building_void || eep->regions)
        return err_set(err, ERR_ABORTED, "the cold start was given up while the weights were being sealed");
    int rc = maps_install(eep, &eep->building->manifest, err);
    if (rc)
        return rc;
    eep->building->blob = blob_ref(eep->sealing);
    eep->regions = eep->building;
    eep->building = NULL;
    eep->load_slots = 0;
    return 0;
}

int eep_seal(struct eep *eep, const char *config)
{
    struct blob *blob = NULL;
    pthread_mutex_lock(&eep->lock);
    int rc = eep->sealing ? eep_fail(ERR_CONFLICT, "the weights are being sealed already")
                          : building_encode(eep, config, &blob);
    if (!rc)
        eep->sealing = blob;
    pthread_mutex_unlock(&eep->lock);
    if (rc)
        return rc;
    Eep__Engine__Seal body = EEP__ENGINE__SEAL__INIT;
    body.manifest.data = blob->data;
    body.manifest.len = blob->len;
    Eep__Engine__EngineUp up = EEP__ENGINE__ENGINE_UP__INIT;
    up.body_case = EEP__ENGINE__ENGINE_UP__BODY_SEAL;
    up.seal = &body;
    int fd = -1;
    rc = ask(eep, &up, &fd);
    pthread_mutex_lock(&eep->lock);
    eep->sealing = NULL;
    pthread_mutex_unlock(&eep->lock);
    blob_unref(blob);
    return rc;
}
