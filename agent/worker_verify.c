/* Proof of what lies in memory: slots and dense regions against the digests of the model, many at a time, so that a GPU
 * is asked rarely and reads at full speed.  Worker thread. */
#include <stdio.h>
#include <stdlib.h>

#include "agent/weights.h"
#include "agent/worker_internal.h"

#define BATCH_BYTES (UINT64_C(2) << 30) /* between two looks whether to give up */

int worker_slots_verify(struct worker *w, const struct slot_claim *claims, size_t n,
                        int (*found)(void *user, const struct slot_claim *claim, int rc, struct err *err), void *user,
                        struct err *err)
{
    const uint64_t slot_bytes = w->weights->model->expert_bytes;
    const size_t most = slot_bytes > 0 && slot_bytes < BATCH_BYTES ? (size_t)(BATCH_BYTES / slot_bytes) : 1;
    struct weights_place *places = calloc(n + 1, sizeof *places);
    uint64_t *digests = calloc(n + 1, sizeof *digests);
    int rc = places && digests ? 0 : err_set(err, ERR_NOMEM, "out of memory");
    for (size_t at = 0, batch; at < n && rc == 0; at += batch) {
        batch = n - at < most ? n - at : most;
        for (size_t i = 0; i < batch; i++)
            places[i] = claims[at + i].place;
        rc = worker_cancelled_check(w, err);
        if (rc == 0)
            rc = weights_slot_digests(w->weights, places, batch, digests, err);
        for (size_t i = 0; i < batch && rc == 0; i++) {
            const struct slot_claim *c = &claims[at + i];
            rc = found(user, c,
                       weights_slot_check(w->weights, c->place.layer, c->place.slot, c->expert, digests[i], err), err);
        }
    }
    free(places);
    free(digests);
    return rc;
}

int worker_dense_verify(struct worker *w, int (*found)(void *user, int rc, struct err *err), void *user,
                        struct err *err)
{
    const struct model *model = w->weights->model;
    uint64_t *digests = calloc(model->n_dense + 1u, sizeof *digests);
    if (!digests)
        return err_set(err, ERR_NOMEM, "out of memory");
    int rc = weights_dense_digests(w->weights, digests, err);
    for (uint32_t i = 0; i < model->n_dense && rc == 0; i++)
        rc = found(user, weights_dense_check(w->weights, i, digests[i], err), err);
    free(digests);
    return rc;
}

/* ---- eepctl verify ---- */

/* A mismatch is a finding, not a failure: all of them are counted.  Bytes that cannot be read are no finding. */
static int verify_count(void *user, int rc, struct err *err)
{
    struct worker_result *result = user;
    if (rc < 0 && rc != ERR_CORRUPT)
        return rc;
    if (rc < 0 && result->bad++ == 0)
        snprintf(result->text, sizeof result->text, "%.*s", (int)sizeof result->text - 1, err->text);
    return 0;
}

static int verify_slot(void *user, const struct slot_claim *claim, int rc, struct err *err)
{
    struct worker_result *result = user;
    (void)claim;
    result->value++;
    return verify_count(result, rc, err);
}

/* What the map says lies here. */
static int verify_claims(const struct expert_map *map, uint32_t self, struct slot_claim **ret_claims, size_t *ret_n,
                         struct err *err)
{
    struct slot_claim *claims = calloc((size_t)map->layers * map->slots + 1, sizeof *claims);
    size_t n = 0;
    if (!claims)
        return err_set(err, ERR_NOMEM, "out of memory");
    for (uint32_t layer = 0; layer < map->layers; layer++)
        for (uint32_t slot = 0; slot < map->slots; slot++) {
            int32_t expert = map->held[expert_map_at(map, layer, self, slot)];
            if (expert >= 0)
                claims[n++] = (struct slot_claim){.place = {layer, slot}, .expert = (uint32_t)expert};
        }
    *ret_claims = claims;
    *ret_n = n;
    return 0;
}

int worker_job_verify(struct worker *w, const struct job *job, struct worker_result *ret_result, struct err *err)
{
    const struct expert_map *map = job->work.map;
    if (!w->weights)
        return err_set(err, ERR_INVALID, "this agent holds no weights to verify");
    int rc = worker_model_update(w, job->work.model, err);
    if (rc < 0)
        return rc;
    const struct manifest *m = &w->weights->manifest;
    if (!map || map->layers != m->layers || map->slots != m->slots || job->work.self >= map->ranks)
        return err_set(err, ERR_INVALID, "the map does not fit the weights that are held here");
    struct slot_claim *claims = NULL;
    size_t n = 0;
    rc = worker_dense_verify(w, verify_count, ret_result, err);
    if (rc == 0)
        rc = verify_claims(map, job->work.self, &claims, &n, err);
    if (rc < 0)
        return rc;
    rc = worker_slots_verify(w, claims, n, verify_slot, ret_result, err);
    const struct model *model = w->weights->model;
    ret_result->bytes = model->dense_bytes + ret_result->value * model->expert_bytes;
    free(claims);
    return rc;
}
