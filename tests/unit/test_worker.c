/* The worker: three agents' workers in one process load, join, shuffle, verify and let go, as operations make them. */
#include <check.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "agent/weights.h"
#include "agent/worker.h"
#include "common/address.h"
#include "common/clock.h"
#include "tests/harness/suite.h"

#define WORKERS 3u
#define LAYERS  4u
#define EXPERTS 16u

static const char *data_dir(void)
{
    const char *dir = getenv("EEP_TEST_DATA");
    return dir ? dir : "tests/data";
}

struct world {
    char checkpoint[256];
    struct worker *workers[WORKERS];
    struct member members[WORKERS];
    uint64_t next_id;
};
static struct world world;

static struct worker *worker_make(uint32_t i, const char *checkpoint, uint32_t timeout_ms)
{
    int fd;
    struct err err = {0};
    struct member *m = &world.members[i];
    *m = (struct member){.incarnation = 7 + i};
    snprintf(m->id, sizeof m->id, "gpu%u", i);
    ck_assert_msg(address_listen("127.0.0.1:0", 0, &fd, m->data_address, &err) == 0, "%s", err.text);
    static const struct rpc_identity peer = {.role = RPC_ROLE_PEER, .cluster = "west", .agent = "gpu", .incarnation = 5, .software = "test"};
    struct worker_config config = {
        .peer = &peer,
        .memory = memory_open("host", &err),
        .transport = transport_host_open(fd, &err),
        .checkpoint = checkpoint,
        .transfer_timeout_ms = timeout_ms,
    };
    struct worker *w;
    ck_assert_int_eq(worker_start(&config, &w, &err), 0);
    return w;
}

/* Two workers know the checkpoint; the third has no path to it. */
static void setup(void)
{
    snprintf(world.checkpoint, sizeof world.checkpoint, "%s/qwen3-moe-tiny", data_dir());
    for (uint32_t i = 0; i < WORKERS; i++)
        world.workers[i] = worker_make(i, i < 2 ? world.checkpoint : NULL, 5000);
}

static void teardown(void)
{
    for (uint32_t i = 0; i < WORKERS; i++)
        worker_stop(world.workers[i]);
}

static struct work work_new(enum work_kind kind, uint32_t self)
{
    return (struct work){.id = ++world.next_id, .kind = kind, .op = 1, .self = self};
}

static void work_parties(struct work *work, uint32_t n)
{
    work->n = n;
    work->parties = malloc(n * sizeof *work->parties);
    memcpy(work->parties, world.members, n * sizeof *work->parties);
}

/* The next result that is an end.  Waits on the descriptor, as libevent would. */
static struct worker_result result_wait(struct worker *w, uint64_t id)
{
    struct worker_result result;
    for (;;) {
        if (!worker_next_result(w, &result)) {
            struct pollfd p = {.fd = worker_fd(w), .events = POLLIN};
            ck_assert_int_eq(poll(&p, 1, 20000), 1);
        } else if (!result.progress) {
            ck_assert_uint_eq(result.id, id);
            return result;
        }
    }
}

static struct worker_result do_one(struct worker *w, struct work work)
{
    worker_submit(w, &work);
    struct worker_result result = result_wait(w, work.id);
    ck_assert_int_eq(result.kind, work.kind);
    return result;
}

static void ok(struct worker_result result)
{
    ck_assert_msg(result.code == 0, "%d %s", result.code, result.text);
    worker_result_done(&result);
}

/* ---- an operation's steps ---- */

static struct expert_map *map_of_two(uint32_t ranks, uint32_t slots)
{
    struct expert_map *map = expert_map_new(LAYERS, EXPERTS, ranks, slots);
    for (uint32_t layer = 0; layer < LAYERS; layer++)
        for (uint32_t e = 0; e < EXPERTS; e++)
            map->held[expert_map_at(map, layer, e % 2, e / 2)] = (int32_t)e;
    return map;
}

/* Cold start: each loads its half; the coordinator's part is to merge what they know. */
static struct model *cold_start(const struct expert_map *map)
{
    struct model *merged = NULL;
    for (uint32_t i = 0; i < 2; i++) {
        struct work work = work_new(WORK_LOAD, i);
        work.map = expert_map_copy(map);
        struct worker_result r = do_one(world.workers[i], work);
        ck_assert_msg(r.code == 0, "%s", r.text);
        ck_assert_ptr_nonnull(r.model);
        ck_assert_uint_ge(r.bytes, LAYERS * EXPERTS / 2 * r.model->expert_bytes);
        if (!merged)
            merged = model_new(r.model->layers, r.model->logical, r.model->slots, r.model->n_dense);
        if (!merged->manifest) {
            merged->manifest = blob_ref(r.model->manifest);
            merged->manifest_digest = r.model->manifest_digest;
            merged->expert_bytes = r.model->expert_bytes;
            merged->dense_bytes = r.model->dense_bytes;
        }
        ck_assert_int_eq(model_merge(merged, r.model, NULL), 0);
        worker_result_done(&r);
    }
    return merged;
}

static void group_make(uint32_t n)
{
    struct worker_result id = do_one(world.workers[0], work_new(WORK_GROUP_ID, 0));
    ck_assert_int_eq(id.code, 0);
    uint64_t ids[WORKERS];
    for (uint32_t i = 0; i < n; i++) {
        struct work work = work_new(WORK_GROUP, i);
        work_parties(&work, n);
        work.blob = blob_ref(id.blob);
        ids[i] = work.id;
        worker_submit(world.workers[i], &work);
    }
    for (uint32_t i = 0; i < n; i++)
        ok(result_wait(world.workers[i], ids[i]));
    worker_result_done(&id);
}

static uint64_t bandwidth; /* of what transfer_submit asks for; 0 = no limit */

static void transfer_submit(enum work_kind kind, uint32_t i, uint32_t n, struct plan *plan, struct model *model,
                            uint32_t round, uint64_t *ret_id)
{
    struct work work = work_new(kind, i);
    work.bandwidth = bandwidth;
    work_parties(&work, n);
    work.plan = plan_ref(plan);
    work.model = model_ref(model);
    work.round = round;
    work.dense_from = 2;
    *ret_id = work.id;
    worker_submit(world.workers[i], &work);
}

/* Party 2 joins with slots 0..3 of every layer, from both; then round 1 shuffles: 2 gets two more, one copy is local.
 */
static struct plan *join_plan(void)
{
    struct plan *plan = plan_new(3, LAYERS * 7, 0);
    uint32_t n = 0;
    for (uint32_t layer = 0; layer < LAYERS; layer++)
        for (uint32_t k = 0; k < 4; k++) {
            uint32_t e = 3 * k + layer;
            plan->moves[n++] =
                (struct move){.layer = layer, .expert = e, .src = e % 2, .src_slot = e / 2, .dst = 2, .dst_slot = k};
        }
    for (uint32_t layer = 0; layer < LAYERS; layer++) {
        uint32_t e = 3 * 1 + layer; /* lies in slot 1 of party 2 now */
        plan->moves[n++] =
            (struct move){.layer = layer, .expert = e, .src = 2, .src_slot = 1, .dst = 2, .dst_slot = 4, .round = 1};
        plan->moves[n++] =
            (struct move){.layer = layer, .expert = 15, .src = 1, .src_slot = 7, .dst = 2, .dst_slot = 5, .round = 1};
        /* party 0 gets an expert that it has not loaded: only the operation's model knows its digest */
        plan->moves[n++] =
            (struct move){.layer = layer, .expert = 13, .src = 1, .src_slot = 6, .dst = 0, .dst_slot = 8, .round = 1};
    }
    ck_assert_uint_eq(n, plan->n_moves);
    return plan;
}

static struct worker_result verify(uint32_t i, const struct expert_map *map, uint32_t self)
{
    struct work work = work_new(WORK_VERIFY, self);
    work.map = expert_map_copy(map);
    return do_one(world.workers[i], work);
}

START_TEST(a_joiner_receives_everything_from_its_peers)
{
    struct expert_map *map = map_of_two(3, 9);
    struct model *model = cold_start(map);
    struct plan *plan = join_plan();
    uint64_t ids[WORKERS];

    struct work work = work_new(WORK_ALLOCATE, 2);
    work.model = model_ref(model);
    ok(do_one(world.workers[2], work));
    group_make(3);
    for (uint32_t i = 0; i < 3; i++)
        transfer_submit(WORK_WEIGHTS, i, 3, plan, model, 0, &ids[i]);
    for (uint32_t i = 0; i < 3; i++) {
        struct worker_result r = result_wait(world.workers[i], ids[i]);
        ck_assert_msg(r.code == 0, "%s", r.text);
        ck_assert_uint_eq(r.bytes, i < 2 ? 0 : model->dense_bytes + LAYERS * 4 * model->expert_bytes);
    }
    bandwidth = _i ? 20 * model->expert_bytes : 0; /* two experts in a batch, which takes 100 ms */
    uint64_t begun = clock_now_ns();
    for (uint32_t i = 0; i < 3; i++)
        transfer_submit(WORK_FILL, i, 3, plan, model, 1, &ids[i]);
    bandwidth = 0;
    for (uint32_t i = 0; i < 3; i++) {
        struct worker_result r = result_wait(world.workers[i], ids[i]);
        ck_assert_msg(r.code == 0, "%s", r.text);
        if (_i) /* however many arrive: not faster than that */
            ck_assert_uint_ge((clock_now_ns() - begun) / 1000000, LAYERS * 1000 / 20 - 10);
        ck_assert_uint_eq(r.bytes, i == 1 ? 0 : LAYERS * model->expert_bytes);
        for (uint32_t k = 0; k < plan->n_moves; k++) {
            const struct move *m = &plan->moves[k];
            if (m->dst == i)
                map->held[expert_map_at(map, m->layer, i, m->dst_slot)] = (int32_t)m->expert;
        }
    }
    for (uint32_t i = 0; i < 3; i++) {
        struct worker_result r = verify(i, map, i);
        ck_assert_msg(r.code == 0 && r.bad == 0, "%s", r.text);
        ck_assert_uint_eq(r.value, LAYERS * (i == 0 ? 9 : i == 1 ? 8 : 6));
    }
    for (uint32_t i = 0; i < 3; i++) {
        ok(do_one(world.workers[i], work_new(WORK_GROUP_DESTROY, i)));
        ok(do_one(world.workers[i], work_new(WORK_RELEASE, i)));
        ck_assert_ptr_null(worker_weights(world.workers[i]));
    }
    plan_unref(plan);
    model_unref(model);
    expert_map_unref(map);
}
END_TEST

START_TEST(verify_counts_every_mismatch)
{
    struct expert_map *map = map_of_two(2, 8);
    struct model *model = cold_start(map);
    const struct weights *w = worker_weights(world.workers[1]);
    ck_assert_ptr_nonnull(w);
    struct worker_result r = verify(1, map, 1);
    ck_assert_uint_eq(r.bad, 0);
    ck_assert_uint_eq(r.value, LAYERS * 8);
    ck_assert_uint_eq(r.bytes, model->dense_bytes + LAYERS * 8 * model->expert_bytes);

    for (uint32_t i = 0; i < w->manifest.n_regions; i++)
        if (strcmp(w->manifest.regions[i].name, "layers.2.experts.w2") == 0) {
            uint8_t *base = w->regions[i].base;
            base[w->manifest.regions[i].stride * 3 + 17] ^= 4;
            base[w->manifest.regions[i].stride * 5] ^= 1;
        }
    r = verify(1, map, 1);
    ck_assert_int_eq(r.code, 0); /* a finding, not a failure */
    ck_assert_uint_eq(r.bad, 2);
    ck_assert_msg(strstr(r.text, "layer 2 slot 3 does not hold expert 7") != NULL, "%s", r.text);
    ((uint8_t *)w->regions[0].base)[5] ^= 1;
    r = verify(1, map, 1);
    ck_assert_uint_eq(r.bad, 3);
    ck_assert_msg(strstr(r.text, "dense region 0 has digest") != NULL, "%s", r.text);
    r = verify(1, map, 0); /* the other rank's experts are not here */
    ck_assert_uint_eq(r.bad, LAYERS * 8 + 1);
    model_unref(model);
    expert_map_unref(map);
}
END_TEST

START_TEST(what_arrives_broken_is_noticed)
{
    struct expert_map *map = map_of_two(3, 9);
    struct model *model = cold_start(map);
    struct plan *plan = join_plan();
    uint64_t ids[WORKERS];
    struct work work = work_new(WORK_ALLOCATE, 2);
    work.model = model_ref(model);
    ok(do_one(world.workers[2], work));
    group_make(3);
    /* layer 3's first move is of expert 3, slot 1 of party 1 */
    const struct weights *w = worker_weights(world.workers[1]);
    for (uint32_t i = 0; i < w->manifest.n_regions; i++)
        if (strcmp(w->manifest.regions[i].name, "layers.3.experts.w13") == 0)
            ((uint8_t *)w->regions[i].base)[w->manifest.regions[i].stride + 99] ^= 8;
    for (uint32_t i = 0; i < 3; i++)
        transfer_submit(WORK_WEIGHTS, i, 3, plan, model, 0, &ids[i]);
    ok(result_wait(world.workers[0], ids[0]));
    ok(result_wait(world.workers[1], ids[1]));
    struct worker_result r = result_wait(world.workers[2], ids[2]);
    ck_assert_int_eq(r.code, ERR_CORRUPT);
    ck_assert_msg(strstr(r.text, "received from gpu1: layer 3 slot 0 does not hold expert 3") != NULL, "%s", r.text);
    plan_unref(plan);
    model_unref(model);
    expert_map_unref(map);
}
END_TEST

START_TEST(a_slot_is_written_once_in_a_round)
{
    struct expert_map *map = map_of_two(3, 9);
    struct model *model = cold_start(map);
    struct plan *plan = join_plan();
    uint64_t id;
    struct work work = work_new(WORK_ALLOCATE, 2);
    work.model = model_ref(model);
    ok(do_one(world.workers[2], work));
    group_make(3);
    for (uint32_t i = 1; i < plan->n_moves; i++)
        if (plan->moves[i].round == 0 && plan->moves[i].layer == 2)
            plan->moves[i].dst_slot = 3;
    transfer_submit(WORK_FILL, 2, 3, plan, model, 0, &id);
    struct worker_result r = result_wait(world.workers[2], id);
    ck_assert_int_eq(r.code, ERR_INVALID);
    ck_assert_msg(strstr(r.text, "slot 3 of MoE layer 2 twice") != NULL, "%s", r.text);
    plan_unref(plan);
    model_unref(model);
    expert_map_unref(map);
}
END_TEST

START_TEST(broken_dense_weights_are_noticed)
{
    struct expert_map *map = map_of_two(3, 9);
    struct model *model = cold_start(map);
    struct plan *plan = plan_new(3, 0, 0);
    uint64_t ids[WORKERS];
    struct work work = work_new(WORK_ALLOCATE, 2);
    work.model = model_ref(model);
    ok(do_one(world.workers[2], work));
    group_make(3);
    for (uint32_t i = 0; i < 2; i++)
        ((uint8_t *)worker_weights(world.workers[i])->regions[0].base)[1000] ^= 8;
    for (uint32_t i = 0; i < 3; i++)
        transfer_submit(WORK_WEIGHTS, i, 3, plan, model, 0, &ids[i]);
    ok(result_wait(world.workers[0], ids[0]));
    ok(result_wait(world.workers[1], ids[1]));
    struct worker_result r = result_wait(world.workers[2], ids[2]);
    ck_assert_int_eq(r.code, ERR_CORRUPT);
    ck_assert_msg(strstr(r.text, "dense region 0 has digest") != NULL, "%s", r.text);
    plan_unref(plan);
    model_unref(model);
    expert_map_unref(map);
}
END_TEST

static void refused(struct worker_result r, int code, const char *says)
{
    ck_assert_msg(r.code == code, "%d %s", r.code, r.text);
    ck_assert_msg(strstr(r.text, says) != NULL, "%s", r.text);
    ck_assert_ptr_null(r.model);
    ck_assert_ptr_null(r.blob);
}

START_TEST(what_cannot_be_done_says_so)
{
    struct expert_map *map = map_of_two(2, 8);
    struct work work = work_new(WORK_LOAD, 0);
    work.map = expert_map_copy(map);
    refused(do_one(world.workers[2], work), ERR_INVALID, "no checkpoint path (start it with --checkpoint)");
    refused(do_one(world.workers[0], work_new(WORK_LOAD, 0)), ERR_INVALID, "no map");
    refused(do_one(world.workers[0], work_new(WORK_ALLOCATE, 0)), ERR_INVALID, "no model");
    refused(do_one(world.workers[0], work_new(WORK_FILL, 0)), ERR_INVALID, "no memory is allocated");
    refused(do_one(world.workers[0], work_new(WORK_VERIFY, 0)), ERR_INVALID, "holds no weights");
    refused(do_one(world.workers[0], work_new(WORK_GROUP, 0)), ERR_INVALID, "group id");
    refused(do_one(world.workers[0], work_new((enum work_kind)99, 0)), ERR_INVALID, "no work of kind 99");
    ok(do_one(world.workers[0], work_new(WORK_GROUP_DESTROY, 0)));
    ok(do_one(world.workers[0], work_new(WORK_RELEASE, 0)));

    struct model *model = cold_start(map);
    work = work_new(WORK_LOAD, 0);
    work.map = expert_map_copy(map);
    refused(do_one(world.workers[0], work), ERR_CONFLICT, "holds weights already");
    refused(do_one(world.workers[0], work_new(WORK_FILL, 0)), ERR_INVALID, "no group");
    struct model *other = model_new(model->layers, model->logical, model->slots, model->n_dense);
    other->manifest = blob_new("x", 1);
    other->manifest_digest = 12;
    work = work_new(WORK_ALLOCATE, 0);
    work.model = other;
    refused(do_one(world.workers[0], work), ERR_CONFLICT, "but the operation is about 000000000000000c");

    struct plan *plan = plan_new(3, 1, 0);
    uint64_t ids[2];
    plan->moves[0] = (struct move){.layer = LAYERS, .src = 0, .dst = 1};
    group_make(2);
    transfer_submit(WORK_FILL, 0, 2, plan, model, 0, &ids[0]);
    refused(result_wait(world.workers[0], ids[0]), ERR_INVALID, "party 0 of 3, but the group was made as party 0 of 2");
    plan->parties = 2;
    transfer_submit(WORK_FILL, 0, 2, plan, model, 0, &ids[0]);
    refused(result_wait(world.workers[0], ids[0]), ERR_INVALID, "out of bounds");
    plan_unref(plan);
    model_unref(model);
    expert_map_unref(map);
}
END_TEST

/* ---- cancelling, time-outs ---- */

START_TEST(a_cancel_stops_the_present_and_the_queued)
{
    struct worker *w = world.workers[0];
    struct blob *id = blob_new("0123456789abcdef0123456789abcdef", 32);
    uint64_t ids[4], begin = clock_now_ns();
    for (int k = 0; k < 2; k++) { /* the first waits for parties that never come, the second never begins */
        struct work work = work_new(WORK_GROUP, 0);
        work_parties(&work, 3);
        work.blob = blob_ref(id);
        work.op = 5;
        ids[k] = work.id;
        worker_submit(w, &work);
    }
    struct work release = work_new(WORK_RELEASE, 0), other = work_new(WORK_GROUP_ID, 0);
    release.op = 5;
    other.op = 6;
    worker_submit(w, &release);
    worker_submit(w, &other);
    poll(NULL, 0, 50);
    worker_cancel(w, 7); /* nobody's */
    worker_cancel(w, 5);
    refused(result_wait(w, ids[0]), ERR_ABORTED, "cancelled");
    refused(result_wait(w, ids[1]), ERR_ABORTED, "cancelled");
    ok(result_wait(w, release.id)); /* cleaning up is not cancelled */
    struct worker_result r = result_wait(w, other.id);
    ck_assert_int_eq(r.code, 0); /* nor is another operation */
    worker_result_done(&r);
    ck_assert_uint_lt(clock_now_ns() - begin, 3000000000u);

    /* The bell of the cancel is silent again: the next group is not cancelled by it. */
    group_make(3);
    blob_unref(id);
}
END_TEST

START_TEST(without_progress_a_transfer_ends)
{
    struct expert_map *map = map_of_two(2, 9);
    struct model *model = cold_start(map);
    struct plan *plan = plan_new(2, 1, 0);
    uint64_t id;
    plan->moves[0] = (struct move){.layer = 1, .expert = 1, .src = 1, .src_slot = 0, .dst = 0, .dst_slot = 8};
    group_make(2);
    uint64_t begin = clock_now_ns();
    transfer_submit(WORK_FILL, 0, 2, plan, model, 0, &id); /* the other one does not take part */
    refused(result_wait(world.workers[0], id), ERR_TIMEOUT, "gpu1");
    ck_assert_uint_ge(clock_now_ns() - begin, 400000000u);
    plan_unref(plan);
    model_unref(model);
    expert_map_unref(map);
}
END_TEST

static void setup_impatient(void)
{
    setup();
    for (uint32_t i = 0; i < 2; i++) {
        worker_stop(world.workers[i]);
        world.workers[i] = worker_make(i, world.checkpoint, 500);
    }
}

/* A memory backend that loses its device with its first allocation. */
struct lossy {
    struct memory_backend base;
    bool lost;
};

static int lossy_alloc(struct memory_backend *self, const char *label, size_t bytes, struct memory_region *ret_region,
                       struct err *err)
{
    (void)label, (void)bytes, (void)ret_region;
    ((struct lossy *)self)->lost = true;
    return err_set(err, ERR_IO, "cannot clear memory: illegal address");
}

static void lossy_release(struct memory_backend *self, struct memory_region *region)
{
    (void)self, (void)region;
}

static int lossy_health(struct memory_backend *self, struct err *err)
{
    return ((struct lossy *)self)->lost ? err_set(err, ERR_IO, "this process cannot use the GPU any more") : 0;
}

static void lossy_close(struct memory_backend *self)
{
    (void)self;
}

/* The work that failed is answered first, so that the operation ends with the reason; then, once, that all is lost. */
START_TEST(a_lost_device_is_told_once_and_after_the_failure)
{
    struct lossy lossy = {.base = {.name = "lossy", .alloc = lossy_alloc, .release = lossy_release, .health = lossy_health, .close = lossy_close}};
    struct expert_map *map = map_of_two(2, 8);
    struct model *model = cold_start(map);
    struct worker_config config = {.memory = &lossy.base};
    struct worker *w;
    struct err err = {0};
    ck_assert_int_eq(worker_start(&config, &w, &err), 0);
    for (int k = 0; k < 2; k++) {
        struct work work = work_new(WORK_ALLOCATE, 0);
        uint64_t id = work.id;
        work.model = model_ref(model);
        worker_submit(w, &work);
        struct worker_result r = result_wait(w, id);
        ck_assert(r.code == ERR_IO && !r.fatal && strstr(r.text, "illegal address"));
        if (k == 0) {
            r = result_wait(w, 0);
            ck_assert_msg(r.fatal && strstr(r.text, "any more"), "%s", r.text);
        }
    }
    ck_assert(!worker_next_result(w, &(struct worker_result){0}));
    worker_stop(w);
    model_unref(model);
    expert_map_unref(map);
}
END_TEST

/* A transport whose group takes its time: in steps, each of which it tells, or in one. */
struct slow {
    struct transport base;
    unsigned steps, step_ms;
};

static int slow_create(struct transport *self, const struct blob *id, const struct member *parties, uint32_t n,
                       uint32_t self_party, const struct transport_call *call, struct transport_group **ret_group,
                       struct err *err)
{
    (void)id, (void)parties, (void)n, (void)self_party, (void)err;
    const struct slow *slow = (const struct slow *)self;
    for (unsigned i = 0; i < slow->steps; i++) {
        poll(NULL, 0, (int)slow->step_ms);
        call->progress(call->user, i + 1);
    }
    *ret_group = (struct transport_group *)self;
    return 0;
}

static void slow_destroy(struct transport_group *group)
{
    (void)group;
}

static void slow_close(struct transport *self)
{
    (void)self;
}

/* The sentence when the worker was stuck at some time during this work, or "". */
static const char *stuck_during(unsigned steps, unsigned step_ms)
{
    static char why[256];
    struct slow slow = {{.name = "slow", .group_create = slow_create, .destroy = slow_destroy, .close = slow_close}, steps, step_ms};
    struct worker_config config = {.transport = &slow.base, .stuck_ms = 200, .transfer_timeout_ms = 100};
    struct worker *w;
    struct worker_result r;
    struct err err = {0};
    char text[256];
    strcpy(why, "");
    ck_assert_int_eq(worker_start(&config, &w, &err), 0);
    struct work work = work_new(WORK_GROUP, 0);
    work_parties(&work, 2);
    work.blob = blob_new("x", 1);
    worker_submit(w, &work);
    do {
        struct pollfd p = {.fd = worker_fd(w), .events = POLLIN};
        poll(&p, 1, 10);
        if (worker_stuck(w, text, sizeof text))
            strcpy(why, text);
        r = (struct worker_result){.progress = true};
        (void)worker_next_result(w, &r);
    } while (r.progress);
    ck_assert_int_eq(r.code, 0);
    worker_result_done(&r);
    poll(NULL, 0, 400); /* with nothing to do it is not stuck, however long */
    ck_assert_msg(!worker_stuck(w, text, sizeof text), "%s", text);
    worker_stop(w);
    return why;
}

/* For systemd's watchdog: slow is not stuck, and a call may use its own deadline. */
START_TEST(who_shows_no_progress_is_stuck)
{
    ck_assert_str_eq(stuck_during(20, 60), ""); /* 1.2 s in all */
    ck_assert_str_eq(stuck_during(1, 250), ""); /* longer than stuck_ms, but not than that after its deadline */
    const char *why = stuck_during(1, 1300);
    ck_assert_msg(strstr(why, "no progress for 1 s in GROUP of operation 1") != NULL, "%s", why);
}
END_TEST

START_TEST(stopping_ends_everything)
{
    /* In the middle of a group that never comes, with work queued and results unread. */
    struct blob *id = blob_new("0123456789abcdef0123456789abcdef", 32);
    struct work done = work_new(WORK_GROUP_ID, 0);
    worker_submit(world.workers[0], &done);
    for (int k = 0; k < 3; k++) {
        struct work work = work_new(WORK_GROUP, 0);
        work_parties(&work, 3);
        work.blob = blob_ref(id);
        worker_submit(world.workers[0], &work);
    }
    poll(NULL, 0, 30);
    uint64_t begin = clock_now_ns();
    worker_stop(world.workers[0]);
    ck_assert_uint_lt(clock_now_ns() - begin, 2000000000u);
    world.workers[0] = NULL;
    blob_unref(id);
}
END_TEST

/* ---- an engine that lays out its own weights ---- */

static struct region seal_regions[] = {
    {.kind = REGION_DENSE, .name = "all dense", .bytes = 3000},
    {.kind = REGION_EXPERT,
     .name = "l0",
     .layer = 0,
     .part = "fused",
     .slots = 2,
     .stride = 512,
     .slot_bytes = 500,
     .bytes = 1024},
    {.kind = REGION_EXPERT,
     .name = "l1",
     .layer = 1,
     .part = "fused",
     .slots = 2,
     .stride = 512,
     .slot_bytes = 500,
     .bytes = 1024},
};

static struct worker_result seal(uint32_t i, const struct expert_map *map, uint32_t self)
{
    struct manifest m = {
        .producer = "test", .layers = 2, .logical = 3, .slots = 2, .n_regions = 3, .regions = seal_regions};
    uint64_t id = ++world.next_id;
    worker_seal(world.workers[i], id, &m, map, self);
    struct worker_result r = result_wait(world.workers[i], id);
    ck_assert_int_eq(r.kind, WORK_LOAD);
    return r;
}

START_TEST(an_engine_seals_its_own_layout)
{
    struct err err = {0};
    struct memory_region memory[3];
    struct expert_map *map = expert_map_new(2, 3, 2, 2);
    map->held[expert_map_at(map, 0, 1, 0)] = 2;
    map->held[expert_map_at(map, 1, 1, 1)] = 0;

    refused(seal(2, map, 1), ERR_INVALID, "allocated 0 regions, but its layout has 3");
    for (int k = 0; k < 3; k++) {
        ck_assert_int_eq(worker_region_alloc(world.workers[2], &seal_regions[k], &memory[k], &err), 0);
        memset(memory[k].base, k + 1, memory[k].bytes);
    }
    ck_assert_int_eq(worker_region_alloc(world.workers[2], &seal_regions[1], &memory[1], &err), ERR_CONFLICT);
    struct expert_map *wrong = expert_map_new(2, 4, 2, 2);
    refused(seal(2, wrong, 1), ERR_INVALID, "but the map has 2, 4 and 2");
    expert_map_unref(wrong);
    ck_assert_ptr_null(worker_weights(world.workers[2]));

    struct worker_result r = seal(2, map, 1);
    ck_assert_msg(r.code == 0, "%s", r.text);
    ck_assert_uint_ne(r.model->expert_digest[2], 0);
    ck_assert_uint_ne(r.model->expert_digest[3], 0);
    ck_assert_uint_eq(r.model->expert_digest[0], 0);
    ck_assert_uint_ne(r.model->dense_digest[0], 0);
    ck_assert_uint_eq(r.model->expert_bytes, 500);
    const struct weights *w = worker_weights(world.workers[2]);
    ck_assert_ptr_eq(w->regions[1].base, memory[1].base); /* the very memory */
    struct worker_result v = verify(2, map, 1);
    ck_assert_msg(v.code == 0 && v.bad == 0, "%s", v.text);
    ck_assert_uint_eq(v.value, 2);
    ((uint8_t *)memory[2].base)[512 + 499] ^= 1;
    v = verify(2, map, 1);
    ck_assert_uint_eq(v.bad, 1);
    ck_assert_int_eq(worker_region_alloc(world.workers[2], &seal_regions[0], &memory[0], &err), ERR_CONFLICT);
    worker_result_done(&r);
    expert_map_unref(map);
}
END_TEST

START_TEST(an_engine_that_dies_before_sealing_leaves_nothing)
{
    struct err err = {0};
    struct memory_region memory;
    ck_assert_int_eq(worker_region_alloc(world.workers[2], &seal_regions[0], &memory, &err), 0);
    worker_seal_discard(world.workers[2]);
    ok(do_one(world.workers[2], work_new(WORK_RELEASE, 0))); /* in order: the discard is done */
    ck_assert_int_eq(close(memory.fd), -1);
    ck_assert_int_eq(worker_region_alloc(world.workers[2], &seal_regions[0], &memory, &err), 0);
}
END_TEST

/* Two that read from each other would wait for each other: here the other end does not answer at all. */
START_TEST(who_waits_for_another_agent_answers_reads_meanwhile)
{
    struct expert_map *map = map_of_two(2, 10), *load = expert_map_new(LAYERS, EXPERTS, 2, 10);
    struct model *model = cold_start(map);
    struct worker *w = world.workers[0];
    struct work reload = work_new(WORK_RELOAD, 0);
    struct err err;
    int fd;
    reload.sources = calloc(1, sizeof *reload.sources);
    strcpy(reload.sources->id, "mute");
    ck_assert_int_eq(address_listen("127.0.0.1:0", 0, &fd, reload.sources->address, &err), 0);
    reload.n_sources = reload.n_holders = 1;
    reload.model = model_ref(model);
    load->held[expert_map_at(load, 0, 0, 9)] = 1;
    reload.map = load;
    worker_submit(w, &reload);
    const struct expert_read memory = {.manifest = model->manifest_digest, .slots = 10, .expert = 4, .length = 64}, file = {.manifest = model->manifest_digest, .slots = 10, .expert = 1, .length = 64};
    const struct work after = work_new(WORK_GROUP_ID, 0);
    worker_submit(w, &after);
    worker_expert_read(w, 1001, &memory, 2);
    worker_expert_read(w, 1002, &file, -1);
    for (uint64_t id = 1001; id <= 1002; id++) {
        struct worker_result r = result_wait(w, id);
        ck_assert_msg(r.code == 0 && r.expert && r.blob->len == 64, "%s", r.text);
        worker_result_done(&r);
    }
    worker_cancel(w, reload.op);
    refused(result_wait(w, reload.id), ERR_ABORTED, "cancelled");
    struct worker_result r = result_wait(w, after.id); /* the queue is whole */
    worker_result_done(&r);
    worker_expert_read(w, 1003, &memory, 2);
    ok(result_wait(w, 1003));
    close(fd);
    model_unref(model);
    expert_map_unref(map);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("worker");
    TCase *t = tcase_create("worker");
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_set_timeout(t, 60);
    tcase_add_loop_test(t, a_joiner_receives_everything_from_its_peers, 0, 2);
    tcase_add_test(t, verify_counts_every_mismatch);
    tcase_add_test(t, what_arrives_broken_is_noticed);
    tcase_add_test(t, a_slot_is_written_once_in_a_round);
    tcase_add_test(t, broken_dense_weights_are_noticed);
    tcase_add_test(t, what_cannot_be_done_says_so);
    tcase_add_test(t, a_cancel_stops_the_present_and_the_queued);
    tcase_add_test(t, a_lost_device_is_told_once_and_after_the_failure);
    tcase_add_test(t, who_shows_no_progress_is_stuck);
    tcase_add_test(t, stopping_ends_everything);
    tcase_add_test(t, an_engine_seals_its_own_layout);
    tcase_add_test(t, an_engine_that_dies_before_sealing_leaves_nothing);
    tcase_add_test(t, who_waits_for_another_agent_answers_reads_meanwhile);
    suite_add_tcase(s, t);
    t = tcase_create("impatient");
    tcase_add_checked_fixture(t, setup_impatient, teardown);
    tcase_set_timeout(t, 60);
    tcase_add_test(t, without_progress_a_transfer_ends);
    suite_add_tcase(s, t);
    return suite_run(s);
}
