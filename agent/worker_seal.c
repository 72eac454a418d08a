/* An engine that lays out its own weights: regions are allocated one by one, and sealed when all are filled.
 * Worker thread. */
#include <stdlib.h>
#include <string.h>

#include "agent/weights.h"
#include "agent/worker_internal.h"

void worker_sealing_free(struct worker *w)
{
    for (size_t i = 0; i < w->n_sealing; i++)
        w->config.memory->release(w->config.memory, &w->sealing[i].memory);
    free(w->sealing);
    w->sealing = NULL;
    w->n_sealing = 0;
}

int worker_job_region_alloc(struct worker *w, const struct job *job, struct err *err)
{
    const struct region *region = job->region;
    if (w->weights)
        return err_set(err, ERR_CONFLICT, "this agent holds weights already; region \"%s\" cannot be added",
                       region->name);
    for (size_t i = 0; i < w->n_sealing; i++)
        if (strcmp(w->sealing[i].region.name, region->name) == 0)
            return err_set(err, ERR_CONFLICT, "region \"%s\" was allocated before", region->name);
    struct sealing *sealing = realloc(w->sealing, (w->n_sealing + 1) * sizeof *sealing);
    if (!sealing)
        return err_set(err, ERR_NOMEM, "out of memory");
    w->sealing = sealing;
    sealing[w->n_sealing].region = *region;
    int rc = w->config.memory->alloc(w->config.memory, region->name, (size_t)region->bytes,
                                     &sealing[w->n_sealing].memory, err);
    if (rc == 0)
        *job->ret_region = sealing[w->n_sealing++].memory;
    return rc;
}

/* Each region of the manifest is one that was allocated, and none is left over. */
static int seal_match(const struct worker *w, struct weights *weights, struct err *err)
{
    const struct manifest *m = &weights->manifest;
    if (m->n_regions != w->n_sealing)
        return err_set(err, ERR_INVALID, "the engine allocated %zu regions, but its layout has %u", w->n_sealing,
                       m->n_regions);
    for (uint32_t i = 0; i < m->n_regions; i++) {
        size_t k = 0;
        while (k < w->n_sealing && strcmp(w->sealing[k].region.name, m->regions[i].name) != 0)
            k++;
        if (k == w->n_sealing || w->sealing[k].memory.bytes != m->regions[i].bytes)
            return err_set(err, ERR_INVALID, "the layout's region \"%s\" of %llu bytes was not allocated like that",
                           m->regions[i].name, (unsigned long long)m->regions[i].bytes);
        weights->regions[i] = w->sealing[k].memory;
    }
    return 0;
}

/* The expert in slot `at` (counted through all layers), -1 for none. */
static int32_t slot_expert(const struct expert_map *map, uint32_t self, size_t at, uint32_t logical)
{
    int32_t expert = map->held[expert_map_at(map, (uint32_t)(at / map->slots), self, (uint32_t)(at % map->slots))];
    return expert >= 0 && (uint32_t)expert < logical ? expert : -1;
}

static int seal_digests(struct weights *weights, const struct expert_map *map, uint32_t self, struct err *err)
{
    struct model *model = weights->model;
    if (map->layers != model->layers || map->logical != model->logical || map->slots != model->slots ||
        self >= map->ranks)
        return err_set(err, ERR_INVALID,
                       "the engine's layout has %u layers, %u experts and %u slots, but the map has %u, %u and %u",
                       model->layers, model->logical, model->slots, map->layers, map->logical, map->slots);
    const size_t n = (size_t)map->layers * map->slots;
    struct weights_place *places = calloc(n + 1, sizeof *places);
    uint64_t *digests = calloc(n + 1, sizeof *digests);
    size_t k = 0;
    int rc = places && digests ? weights_dense_digests(weights, model->dense_digest, err)
                               : err_set(err, ERR_NOMEM, "out of memory");
    for (size_t i = 0; i < n && rc == 0; i++)
        if (slot_expert(map, self, i, model->logical) >= 0)
            places[k++] = (struct weights_place){(uint32_t)(i / map->slots), (uint32_t)(i % map->slots)};
    if (rc == 0)
        rc = weights_slot_digests(weights, places, k, digests, err);
    for (size_t i = 0; i < k && rc == 0; i++) {
        size_t at = (size_t)places[i].layer * map->slots + places[i].slot;
        int32_t expert = slot_expert(map, self, at, model->logical);
        model->expert_digest[(size_t)places[i].layer * model->logical + (uint32_t)expert] = digests[i];
    }
    free(places);
    free(digests);
    return rc;
}

int worker_job_seal(struct worker *w, const struct job *job, struct worker_result *ret_result, struct err *err)
{
    if (job->code < 0)
        return err_set(err, job->code, "%s", job->err.text);
    if (w->weights)
        return err_set(err, ERR_CONFLICT, "this agent holds weights already; others cannot be sealed");
    struct weights *weights = calloc(1, sizeof *weights);
    if (!weights)
        return err_set(err, ERR_NOMEM, "out of memory");
    weights->memory = w->config.memory;
    int rc = manifest_decode(job->manifest, &weights->manifest, err);
    if (rc == 0)
        rc = manifest_model(&weights->manifest, &weights->model, err);
    if (rc == 0) {
        weights->regions = calloc(weights->manifest.n_regions + 1u, sizeof *weights->regions);
        rc = weights->regions ? seal_match(w, weights, err) : err_set(err, ERR_NOMEM, "out of memory");
    }
    if (rc == 0)
        rc = seal_digests(weights, job->work.map, job->work.self, err);
    if (rc < 0) {
        free(weights->regions); /* the memory stays with the engine's allocations, for another attempt */
        weights->regions = NULL;
        weights_free(weights);
        return rc;
    }
    free(w->sealing);
    w->sealing = NULL;
    w->n_sealing = 0;
    worker_weights_set(w, weights);
    ret_result->model = model_ref(weights->model);
    ret_result->bytes = weights->model->dense_bytes;
    return 0;
}
