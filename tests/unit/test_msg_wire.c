/* Messages on the wire: every type there and back with every field, what must be refused, truncation and garbage. */
#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "agent.pb-c.h"
#include "common/control_methods.h"
#include "common/msg_wire.h"
#include "common/rpc.h"
#include "common/topology_wire.h"
#include "control.pb-c.h"
#include "tests/harness/suite.h"

#define EQ(field) same_number((uint64_t)a->field, (uint64_t)b->field, #field)
#define EQS(field) same_text(a->field, b->field, #field)

static void same_number(uint64_t a, uint64_t b, const char *field)
{
    ck_assert_msg(a == b, "%s: %llu became %llu", field, (unsigned long long)a, (unsigned long long)b);
}

static void same_text(const char *a, const char *b, const char *field)
{
    ck_assert_msg(strcmp(a, b) == 0, "%s: '%s' became '%s'", field, a, b);
}

static struct member member_make(unsigned i)
{
    struct member m = {.incarnation = 0xdeadbeef00000000u + i, .node = i / 2, .serving = i % 2, .draining = i % 3 == 0};
    snprintf(m.id, sizeof m.id, "gpu%u", i);
    snprintf(m.address, sizeof m.address, "127.0.0.1:%u", 7000 + i);
    snprintf(m.data_address, sizeof m.data_address, "unix:/tmp/data%u", i);
    snprintf(m.endpoint, sizeof m.endpoint, "http://engine %u \xc3\xa9", i);
    return m;
}

static struct expert_map *map_make(uint32_t ranks)
{
    struct expert_map *map = expert_map_new(3, 5, ranks, 4);
    map->version = 77;
    for (uint32_t i = 0; i < 3 * ranks * 4; i++) {
        map->held[i] = (int32_t)(i % 6) - 1;
        map->live[i] = (uint8_t)(map->held[i] < 0 || i % 4 == 3 ? 0 : i % 5 == 4 ? ENTRIES_MAX : 1 + i % 5);
    }
    return map;
}

static struct view *view_make(uint32_t n)
{
    struct view *view = view_new(n);
    view->epoch = 12;
    view->manifest_digest = 0xfedcba9876543210u;
    view->kv_bytes = NO_LIMIT;
    for (uint32_t i = 0; i < n; i++)
        view->members[i] = member_make(i);
    view->map = map_make(n);
    return view;
}

static struct model *model_make(void)
{
    struct model *model = model_new(3, 5, 4, 2);
    model->manifest = blob_new("mani\0fest", 9);
    model->manifest_digest = 5;
    model->expert_bytes = 1u << 20;
    model->dense_bytes = 7;
    model->sealed = true;
    for (uint32_t i = 0; i < 15; i++)
        model->expert_digest[i] = 0x0102030405060708u * i;
    model->dense_digest[1] = UINT64_MAX;
    return model;
}

static struct plan *plan_make_some(uint32_t parties)
{
    struct plan *plan = plan_new(parties, 2, 1);
    plan->target = map_make(parties);
    plan->moves[0] = (struct move){2, 4, 0, 3, 1, 2, 0, 0};
    plan->moves[1] = (struct move){1, 3, 1, 1, 0, 0, 2, 0};
    plan->retires[0] = (struct retire){2, 1, 3, 1};
    plan->rounds_before = 1;
    plan->rounds_after = 2;
    plan->bound_hard = 1;
    plan->bound_fill = 2;
    plan->arrivals_before = 3;
    plan->arrivals_after = 4;
    return plan;
}

static void same_member(const struct member *a, const struct member *b)
{
    EQS(id), EQ(incarnation), EQS(address), EQS(data_address), EQS(endpoint), EQ(node), EQ(serving), EQ(draining);
}

static void same_map(const struct expert_map *a, const struct expert_map *b)
{
    ck_assert_ptr_nonnull(b);
    EQ(layers), EQ(logical), EQ(ranks), EQ(slots), EQ(version);
    size_t cells = (size_t)a->layers * a->ranks * a->slots;
    ck_assert_mem_eq(a->held, b->held, cells * sizeof *a->held);
    ck_assert_mem_eq(a->live, b->live, cells);
}

static void same_view(const struct view *a, const struct view *b)
{
    ck_assert_ptr_nonnull(b);
    EQ(epoch), EQ(manifest_digest), EQ(kv_bytes), EQ(n);
    for (uint32_t i = 0; i < a->n; i++)
        same_member(&a->members[i], &b->members[i]);
    same_map(a->map, b->map);
}

static void same_model(const struct model *a, const struct model *b)
{
    ck_assert_ptr_nonnull(b);
    EQ(manifest_digest), EQ(layers), EQ(logical), EQ(slots), EQ(expert_bytes), EQ(dense_bytes), EQ(n_dense), EQ(sealed);
    EQ(manifest->len);
    ck_assert_mem_eq(a->manifest->data, b->manifest->data, a->manifest->len);
    ck_assert_mem_eq(a->dense_digest, b->dense_digest, a->n_dense * 8);
    ck_assert_mem_eq(a->expert_digest, b->expert_digest, (size_t)a->layers * a->logical * 8);
}

static void same_plan(const struct plan *a, const struct plan *b)
{
    ck_assert_ptr_nonnull(b);
    EQ(parties), EQ(n_moves), EQ(n_retires), EQ(rounds_before), EQ(rounds_after), EQ(bound_hard), EQ(bound_fill);
    EQ(arrivals_before), EQ(arrivals_after);
    ck_assert_mem_eq(a->moves, b->moves, a->n_moves * sizeof *a->moves);
    ck_assert_mem_eq(a->retires, b->retires, a->n_retires * sizeof *a->retires);
    same_map(a->target, b->target);
}

static int unpack(enum msg_type type, const uint8_t *data, size_t len, struct msg *ret, struct err *err)
{
    return type < MSG_WELCOME ? msg_unpack_up(data, len, 0, ret, err) : msg_unpack_down(data, len, 0, ret, err);
}

/* Packs, checks that every cut and many damages are survived, and unpacks. */
static struct msg there_and_back(const struct msg *msg)
{
    uint8_t *data;
    size_t len;
    struct err err = {0};
    ck_assert_int_eq(msg_pack(msg, &data, &len, &err), 0);
    struct msg got = {0};
    for (size_t cut = 0; cut < len; cut++) {
        uint8_t *part = malloc(cut ? cut : 1);
        memcpy(part, data, cut);
        if (unpack(msg->type, part, cut, &got, &err) == 0)
            msg_done(&got);
        free(part);
    }
    uint64_t random = msg->type;
    for (int i = 0; i < 300; i++) {
        random = random * 6364136223846793005u + 1442695040888963407u;
        uint8_t *copy = malloc(len + 1);
        memcpy(copy, data, len);
        if (len > 0)
            copy[(random >> 33) % len] ^= (uint8_t)(1 + (random >> 24) % 255);
        if (unpack(msg->type, copy, len, &got, &err) == 0)
            msg_done(&got);
        free(copy);
    }
    memset(&got, 0, sizeof got);
    err.text[0] = '\0';
    int rc = unpack(msg->type, data, len, &got, &err);
    ck_assert_msg(rc == 0, "%s: %s", msg_type_name(msg->type), err.text);
    ck_assert_int_eq(got.type, msg->type);
    /* The other direction knows nothing like it. */
    struct msg other;
    if (len > 0)
        (void)(unpack(msg->type < MSG_WELCOME ? MSG_WELCOME : MSG_HELLO, data, len, &other, &err) == 0
                   ? msg_done(&other)
                   : (void)0);
    free(data);
    return got;
}

START_TEST(hello)
{
    struct msg msg = {.type = MSG_HELLO};
    struct msg_hello *a = &msg.hello;
    *a = (struct msg_hello){.id = "gpu-3.x_Y",
                            .incarnation = 0x8000000000000001u,
                            .address = "h:1",
                            .data_address = "h:2",
                            .node = 3,
                            .slots = 4,
                            .can_load = true,
                            .layers = 5,
                            .logical = 6,
                            .op = 7,
                            .applied_epoch = 8,
                            .promised_epoch = 9,
                            .limit = UINT64_MAX,
                            .next = 11,
                            .wave = 12,
                            .engine = PROMISE_RUNNING,
                            .map_version = 13,
                            .dispatch = DISPATCH_REPLICATED,
                            .endpoint = "e p"};
    struct msg got = there_and_back(&msg);
    struct msg_hello *b = &got.hello;
    EQS(id), EQ(incarnation), EQS(address), EQS(data_address), EQ(node), EQ(slots), EQ(can_load), EQ(layers);
    EQ(logical), EQ(op), EQ(applied_epoch), EQ(promised_epoch), EQ(limit), EQ(next), EQ(wave), EQ(engine);
    EQ(map_version), EQ(dispatch), EQS(endpoint);
    msg_done(&got);
}
END_TEST

START_TEST(small_ones_up)
{
    static const enum msg_type empty[] = {MSG_HEARTBEAT, MSG_LEAVE};
    for (size_t i = 0; i < 2; i++) {
        struct msg got = there_and_back(&(struct msg){.type = empty[i]});
        ck_assert_int_eq(got.type, empty[i]);
    }
    {
        struct msg m = {.type = MSG_ENGINE, .engine = {true, DISPATCH_SOURCE_ROUTED, true, 2, 3, "e", "why not", 12, true}};
        struct msg got = there_and_back(&m);
        struct msg_engine *a = &m.engine, *b = &got.engine;
        EQ(attached), EQ(dispatch), EQ(can_load), EQ(layers), EQ(logical), EQS(endpoint), EQS(why), EQ(torn_epoch), EQ(masks);
    }
    {
        struct msg m = {.type = MSG_PROGRESS, .progress = {1, 2, 3}};
        struct msg got = there_and_back(&m);
        struct msg_progress *a = &m.progress, *b = &got.progress;
        EQ(op), EQ(bytes), EQ(total);
    }
    {
        struct msg m = {.type = MSG_PROMISE, .promise = {1, 2, 3, 4, 5, PROMISE_IDLE}};
        struct msg got = there_and_back(&m);
        struct msg_promise *a = &m.promise, *b = &got.promise;
        EQ(epoch), EQ(incarnation), EQ(limit), EQ(next), EQ(wave), EQ(engine);
    }
    {
        struct msg m = {.type = MSG_REFUSE, .refuse = {1, "because"}};
        struct msg got = there_and_back(&m);
        struct msg_refuse *a = &m.refuse, *b = &got.refuse;
        EQ(epoch), EQS(why);
    }
    {
        struct msg m = {.type = MSG_FLIPPED, .flipped = {1, 2}};
        struct msg got = there_and_back(&m);
        struct msg_flipped *a = &m.flipped, *b = &got.flipped;
        EQ(epoch), EQ(hold_ns);
    }
    {
        struct msg m = {.type = MSG_MAP_ACK, .map_ack = {1, 2}};
        struct msg got = there_and_back(&m);
        struct msg_map_ack *a = &m.map_ack, *b = &got.map_ack;
        EQ(version), EQ(step);
    }
    {
        struct msg m = {.type = MSG_VERIFIED, .verified = {1, 2, 3, 4, 5, "slot 3"}};
        struct msg got = there_and_back(&m);
        struct msg_verified *a = &m.verified, *b = &got.verified;
        EQ(request), EQ(slots), EQ(dense), EQ(bytes), EQ(bad), EQS(text);
    }
    {
        uint64_t tokens[6] = {0, 1, 300, UINT64_MAX, 4, 5};
        struct msg m = {.type = MSG_LOAD, .load = {1, 2, 3, 2, 500, tokens}};
        struct msg got = there_and_back(&m);
        struct msg_load *a = &m.load, *b = &got.load;
        EQ(epoch), EQ(map_version), EQ(layers), EQ(slots), EQ(window_ms);
        ck_assert_int_eq(memcmp(b->tokens, tokens, sizeof tokens), 0);
        struct msg copy;
        msg_copy(&copy, &got);
        msg_done(&got);
        ck_assert_int_eq(memcmp(copy.load.tokens, tokens, sizeof tokens), 0);
        msg_done(&copy);
    }
}
END_TEST

START_TEST(stage_done)
{
    struct msg m = {.type = MSG_STAGE_DONE,
                    .stage_done = {1, STAGE_ALLOCATE, 2, 3, ERR_CORRUPT, "sentence", 4, 5, NULL, NULL}};
    m.stage_done.blob = blob_new("secret", 6);
    m.stage_done.model = model_make();
    struct msg got = there_and_back(&m);
    struct msg_stage_done *a = &m.stage_done, *b = &got.stage_done;
    EQ(op), EQ(stage), EQ(round), EQ(attempt), EQ(code), EQS(text), EQ(bytes), EQ(value), EQ(blob->len);
    ck_assert_mem_eq(a->blob->data, b->blob->data, 6);
    same_model(a->model, b->model);
    msg_done(&got);
    msg_done(&m);
}
END_TEST

START_TEST(small_ones_down)
{
    {
        struct msg m = {.type = MSG_EVICTED, .evicted = {"lease"}};
        struct msg got = there_and_back(&m);
        ck_assert_str_eq(got.evicted.why, "lease");
    }
    {
        struct msg m = {.type = MSG_NOTIFY, .notify = {1, NOTIFY_SHUTDOWN_COMPLETE}};
        struct msg got = there_and_back(&m);
        struct msg_notify *a = &m.notify, *b = &got.notify;
        EQ(op), EQ(what);
    }
    static const enum msg_type ends[] = {MSG_OP_END, MSG_OP_ABORT, MSG_DISMISS};
    for (size_t i = 0; i < 3; i++) {
        struct msg m = {.type = ends[i], .op_end = {1, 2, "done"}};
        struct msg got = there_and_back(&m);
        struct msg_op_end *a = &m.op_end, *b = &got.op_end;
        EQ(op), EQ(epoch), EQS(why);
    }
    {
        struct msg m = {.type = MSG_PREPARE, .prepare = {1, 2, FLIP_RESET, 250}};
        struct msg got = there_and_back(&m);
        struct msg_prepare *a = &m.prepare, *b = &got.prepare;
        EQ(epoch), EQ(op), EQ(kind), EQ(lead_ms);
    }
    {
        struct msg got = there_and_back(&(struct msg){.type = MSG_ABORT, .abort = {9}});
        ck_assert_uint_eq(got.abort.epoch, 9);
        got = there_and_back(&(struct msg){.type = MSG_VERIFY, .verify = {8}});
        ck_assert_uint_eq(got.verify.request, 8);
    }
}
END_TEST

START_TEST(views_and_maps)
{
    {
        struct msg m = {.type = MSG_WELCOME, .welcome = {1, 2, 3, 4, view_make(3), true}};
        struct msg got = there_and_back(&m);
        struct msg_welcome *a = &m.welcome, *b = &got.welcome;
        EQ(lease_ms), EQ(heartbeat_ms), EQ(indoubt_ms), EQ(load_window_ms), EQ(member);
        same_view(a->view, b->view);
        msg_done(&got);
        msg_done(&m);
    }
    {
        struct msg got = there_and_back(&(struct msg){.type = MSG_WELCOME, .welcome = {1, 2, 3, 0, NULL, false}});
        ck_assert_ptr_null(got.welcome.view);
    }
    {
        struct msg m = {.type = MSG_GO, .go = {1, 2, 3, 4, FLIP_VIEW, view_make(2)}};
        struct msg got = there_and_back(&m);
        struct msg_go *a = &m.go, *b = &got.go;
        EQ(epoch), EQ(op), EQ(step), EQ(wave), EQ(kind);
        same_view(a->view, b->view);
        msg_done(&got);
        msg_done(&m);
    }
    {
        struct msg m = {.type = MSG_MAP, .map = {1, 2, map_make(2)}};
        struct msg got = there_and_back(&m);
        struct msg_map *a = &m.map, *b = &got.map;
        EQ(epoch), EQ(op);
        same_map(a->map, b->map);
        msg_done(&got);
        msg_done(&m);
    }
}
END_TEST

static struct msg op_begin_make(void)
{
    struct msg m = {.type = MSG_OP_BEGIN,
                    .op_begin = {.op = 1, .kind = OP_SCALE_UP, .role = ROLE_NEW, .n = 3, .self = 2, .n_old = 1}};
    m.op_begin.parties = calloc(3, sizeof *m.op_begin.parties);
    for (unsigned i = 0; i < 3; i++)
        m.op_begin.parties[i] = member_make(i);
    m.op_begin.model = model_make();
    return m;
}

START_TEST(op_begin)
{
    struct msg m = op_begin_make();
    struct msg got = there_and_back(&m);
    struct msg_op_begin *a = &m.op_begin, *b = &got.op_begin;
    EQ(op), EQ(kind), EQ(role), EQ(n), EQ(self), EQ(n_old);
    for (unsigned i = 0; i < 3; i++)
        same_member(&a->parties[i], &b->parties[i]);
    same_model(a->model, b->model);
    msg_done(&got);
    msg_done(&m);
}
END_TEST

static struct msg stage_make(void)
{
    struct msg m = {.type = MSG_STAGE,
                    .stage = {.op = 1,
                              .stage = STAGE_MAPPING,
                              .round = 2,
                              .attempt = 3,
                              .step = 4,
                              .deadline_ms = 5,
                              .load = true,
                              .plan_digest = 6,
                              .bandwidth = 7}};
    m.stage.map = map_make(1);
    m.stage.plan = plan_make_some(2);
    m.stage.view = view_make(2);
    m.stage.blob = blob_new("id", 2);
    m.stage.n_sources = 2;
    m.stage.n_holders = 1;
    m.stage.sources = calloc(2, sizeof *m.stage.sources);
    for (unsigned i = 0; i < 2; i++) {
        snprintf(m.stage.sources[i].id, sizeof m.stage.sources[i].id, "gpu%u", i);
        m.stage.sources[i].incarnation = 3 + i;
    }
    return m;
}

START_TEST(stage)
{
    struct msg m = stage_make();
    struct msg got = there_and_back(&m);
    struct msg_stage *a = &m.stage, *b = &got.stage;
    EQ(op), EQ(stage), EQ(round), EQ(attempt), EQ(step), EQ(deadline_ms), EQ(load), EQ(plan_digest), EQ(bandwidth);
    EQ(n_sources), EQ(n_holders);
    ck_assert_str_eq(b->sources[1].id, "gpu1");
    same_map(a->map, b->map);
    same_plan(a->plan, b->plan);
    same_view(a->view, b->view);
    ck_assert_mem_eq(b->blob->data, "id", 2);
    msg_done(&got);
    msg_done(&m);
    m = (struct msg){.type = MSG_STAGE, .stage = {.op = 1, .stage = STAGE_KV, .attempt = 1}};
    got = there_and_back(&m);
    ck_assert(!got.stage.map && !got.stage.plan && !got.stage.view && !got.stage.blob);
}
END_TEST

/* ---- what must be refused ---- */

static void refused(const struct msg *msg, const char *why)
{
    uint8_t *data;
    size_t len;
    struct err err = {0};
    ck_assert_int_eq(msg_pack(msg, &data, &len, &err), 0);
    struct msg got;
    ck_assert_int_eq(unpack(msg->type, data, len, &got, &err), ERR_PROTOCOL);
    ck_assert_msg(strstr(err.text, why) != NULL, "'%s' does not say '%s'", err.text, why);
    free(data);
}

START_TEST(bad_members)
{
    struct msg m = op_begin_make();
    struct member *p = m.op_begin.parties;
    m.op_begin.self = 3;
    refused(&m, "party 3");
    m.op_begin.self = 0;
    m.op_begin.n_old = 4;
    refused(&m, "4 of them old");
    m.op_begin.n_old = 1;
    strcpy(p[1].id, "a/b");
    refused(&m, "id");
    strcpy(p[1].id, "");
    refused(&m, "id");
    strcpy(p[1].id, "gpu0");
    refused(&m, "twice");
    strcpy(p[1].id, "gpu1");
    p[2].incarnation = 0;
    refused(&m, "incarnation 0");
    p[2].incarnation = 1;
    m.op_begin.kind = 99;
    refused(&m, "kind");
    m.op_begin.kind = OP_REPAIR;
    m.op_begin.role = 0;
    refused(&m, "role");
    msg_done(&m);

    m = (struct msg){.type = MSG_OP_BEGIN, .op_begin = {.op = 1, .kind = OP_START, .role = ROLE_NEW, .n = RANKS_MAX + 1}};
    m.op_begin.parties = calloc(RANKS_MAX + 1, sizeof *p);
    for (unsigned i = 0; i <= RANKS_MAX; i++)
        m.op_begin.parties[i] = member_make(i);
    refused(&m, "257 members");
    m.op_begin.n = RANKS_MAX;
    struct msg got = {0};
    uint8_t *data;
    size_t len;
    ck_assert_int_eq(msg_pack(&m, &data, &len, NULL), 0);
    ck_assert_int_eq(msg_unpack_down(data, len, 0, &got, NULL), 0);
    free(data);
    msg_done(&got);
    msg_done(&m);
}
END_TEST

START_TEST(bad_maps_and_plans)
{
    struct msg m = stage_make();
    m.stage.map->held[3] = 5;
    refused(&m, "slot 3");
    m.stage.map->held[3] = -1;
    m.stage.map->live[3] = 1;
    refused(&m, "slot 3");
    m.stage.map->live[3] = 0;
    uint8_t entries = m.stage.map->live[1];
    m.stage.map->live[1] = ENTRIES_MAX + 1;
    refused(&m, "slot 1");
    m.stage.map->live[1] = entries;
    struct plan *plan = m.stage.plan;
    for (int i = 0; i < 7; i++) {
        uint32_t *word = (uint32_t *)&plan->moves[1] + i, good = *word;
        *word = 1000;
        refused(&m, "move 1");
        *word = good;
    }
    for (int i = 0; i < 4; i++) {
        uint32_t *word = (uint32_t *)&plan->retires[0] + i, good = *word;
        *word = 1000;
        refused(&m, "retire 0");
        *word = good;
    }
    plan->moves[0].round = 2;
    plan->moves[1].round = 1;
    refused(&m, "move 1"); /* not sorted */
    plan->moves[0].round = 0;
    plan->parties = 3;
    refused(&m, "3 parties");
    plan->parties = 2;
    struct expert_map *map = m.stage.view->map;
    m.stage.view->map = map_make(3);
    refused(&m, "map of 3 ranks");
    expert_map_unref(m.stage.view->map);
    m.stage.view->map = map;
    m.stage.stage = STAGE_MAX;
    refused(&m, "stage");
    msg_done(&m);

    static const struct {
        enum op_stage stage;
        const char *lacks;
    } lacks[] = {{STAGE_MAPPING, "plan"}, {STAGE_ENGINE_PREPARE, "view"}, {STAGE_GROUP, "id"}, {STAGE_ALLOCATE, "map"}};
    for (size_t i = 0; i < sizeof lacks / sizeof *lacks; i++)
        refused(&(struct msg){.type = MSG_STAGE, .stage = {.op = 1, .stage = lacks[i].stage, .load = true}},
                lacks[i].lacks);
}
END_TEST

START_TEST(bad_small_things)
{
    refused(&(struct msg){.type = MSG_HELLO, .hello = {.id = "", .incarnation = 1}}, "id");
    refused(&(struct msg){.type = MSG_HELLO, .hello = {.id = "a b", .incarnation = 1}}, "id");
    refused(&(struct msg){.type = MSG_HELLO, .hello = {.id = "a"}}, "incarnation");
    refused(&(struct msg){.type = MSG_HELLO, .hello = {.id = "a", .incarnation = 1, .engine = 4}}, "engine");
    refused(&(struct msg){.type = MSG_HELLO, .hello = {.id = "a", .incarnation = 1, .dispatch = 3}}, "dispatch");
    refused(&(struct msg){.type = MSG_PROMISE, .promise = {.epoch = 0}}, "epoch");
    refused(&(struct msg){.type = MSG_PREPARE, .prepare = {.epoch = 1}}, "kind");
    refused(&(struct msg){.type = MSG_GO, .go = {.epoch = 1, .kind = FLIP_VIEW}}, "view");
    refused(&(struct msg){.type = MSG_WELCOME, .welcome = {.member = true}}, "view");
    refused(&(struct msg){.type = MSG_LOAD}, "token counts");
    refused(&(struct msg){.type = MSG_STAGE_DONE, .stage_done = {.stage = STAGE_KV, .code = 1}}, "code");
    refused(&(struct msg){.type = MSG_STAGE_DONE, .stage_done = {.stage = STAGE_KV, .code = -1000}}, "code");
    struct msg got;
    ck_assert_int_eq(msg_unpack_up(NULL, 0, 0, &got, NULL), ERR_PROTOCOL); /* no body */
    ck_assert_int_eq(msg_unpack_down(NULL, 0, 0, &got, NULL), ERR_PROTOCOL);
}
END_TEST

/* Strings that do not fit, and shapes that do not fit their arrays: made from the wire side. */
START_TEST(bad_lengths)
{
    char longer[AGENT_ID_MAX + 1];
    memset(longer, 'a', AGENT_ID_MAX);
    longer[AGENT_ID_MAX] = '\0';
    ck_assert(!name_valid(longer));
    ck_assert(name_valid(longer + 1));

    struct err err = {0};
    Pb__Refuse refuse = PB__REFUSE__INIT;
    char why[200];
    memset(why, 'y', sizeof why - 1);
    why[sizeof why - 1] = '\0';
    refuse.why = why;
    Pb__AgentUp up = PB__AGENT_UP__INIT;
    up.body_case = PB__AGENT_UP__BODY_REFUSE;
    up.refuse = &refuse;
    uint8_t data[512];
    size_t len = pb__agent_up__pack(&up, data);
    struct msg got;
    ck_assert_int_eq(msg_unpack_up(data, len, 0, &got, &err), ERR_PROTOCOL);
    ck_assert_ptr_nonnull(strstr(err.text, "REFUSE"));
    ck_assert_ptr_nonnull(strstr(err.text, "199"));

    struct expert_map *map = map_make(2), *back = NULL;
    Pb__ExpertMap *pb = expert_map_to_pb(map);
    uint32_t *const dims[] = {&pb->layers, &pb->logical, &pb->ranks, &pb->slots};
    for (size_t i = 0; i < 4; i++) {
        static const uint32_t bad[] = {0, 1, 0x10000, 0x80000000, 0xffffffff};
        for (size_t k = 0; k < sizeof bad / sizeof *bad; k++) {
            uint32_t good = *dims[i];
            *dims[i] = bad[k];
            if (i == 1 && bad[k] == 0x10000) /* more experts than are placed is a shape */
                *dims[i] = 0x10001;
            ck_assert_int_eq(expert_map_from_pb(pb, &back, &err), ERR_PROTOCOL);
            *dims[i] = good;
        }
    }
    ck_assert_int_eq(expert_map_from_pb(pb, &back, &err), 0);
    expert_map_unref(back);
    pb->cells.len -= 4;
    ck_assert_int_eq(expert_map_from_pb(pb, &back, &err), ERR_PROTOCOL);
    pb->cells.len += 4;
    pb_free(pb);
    expert_map_unref(map);

    struct model *model = model_make(), *model_back;
    Pb__Model *pm = model_to_pb(model);
    pm->n_dense = 0x20000000; /* times 8 is 0 in 32 bits */
    ck_assert_int_eq(model_from_pb(pm, &model_back, &err), ERR_PROTOCOL);
    pm->n_dense = 2;
    pm->layers = 4;
    ck_assert_int_eq(model_from_pb(pm, &model_back, &err), ERR_PROTOCOL);
    pb_free(pm);
    model_unref(model);
}
END_TEST

/* Two bytes each for a member that takes over a hundred once unpacked. */
START_TEST(small_frames_get_little_memory)
{
    size_t n = 100000, len = 2 * n;
    uint8_t *data = malloc(len);
    for (size_t i = 0; i < n; i++) {
        data[2 * i] = 4 << 3 | 2; /* View.members, an empty one */
        data[2 * i + 1] = 0;
    }
    ProtobufCMessage *msg;
    struct err err = {0};
    ck_assert_int_eq(rpc_unpack(&pb__view__descriptor, data, len, 1 << 16, &msg, &err), ERR_PROTOCOL);
    ck_assert_ptr_nonnull(strstr(err.text, "memory"));
    free(data);
    ck_assert_uint_le(rpc_budget(100), 100000);
    ck_assert_uint_le(rpc_budget(FRAME_LIMIT), 5 * (size_t)FRAME_LIMIT);

    struct msg m = stage_make();
    uint8_t *packed;
    ck_assert_int_eq(msg_pack(&m, &packed, &len, NULL), 0);
    struct msg got;
    ck_assert_int_eq(msg_unpack_down(packed, len, 64, &got, &err), ERR_PROTOCOL);
    free(packed);
    msg_done(&m);
}
END_TEST

/* The positions in the service are those that both ends count with. */
START_TEST(control_methods)
{
    static const char *const names[CONTROL_METHODS] = {
        [CONTROL_VERSION] = "Version",         [CONTROL_STATUS] = "Status",
        [CONTROL_AGENTS] = "Agents",           [CONTROL_OPERATIONS] = "Operations",
        [CONTROL_SCALE] = "Scale",             [CONTROL_ABORT] = "Abort",
        [CONTROL_VERIFY] = "Verify",           [CONTROL_WATCH_OPERATION] = "WatchOperation",
        [CONTROL_WATCH_VIEW] = "WatchView",    [CONTROL_KV_SET] = "KvSet",
        [CONTROL_KV_GET] = "KvGet",            [CONTROL_KV_CHECK] = "KvCheck",
        [CONTROL_KV_ADD] = "KvAdd",            [CONTROL_KV_CAS] = "KvCas",
        [CONTROL_KV_DELETE] = "KvDelete",      [CONTROL_KV_LIST] = "KvList",
        [CONTROL_KV_WAIT] = "KvWait",          [CONTROL_BARRIER_ARRIVE] = "BarrierArrive",
        [CONTROL_KV_MULTI_GET] = "KvMultiGet", [CONTROL_KV_MULTI_SET] = "KvMultiSet",
        [CONTROL_KV_COUNT] = "KvCount",        [CONTROL_KV_WATCH] = "KvWatch",
        [CONTROL_KV_STAT] = "KvStat",          [CONTROL_LEASE_GRANT] = "LeaseGrant",
        [CONTROL_LEASE_KEEP] = "LeaseKeep",    [CONTROL_LEASE_END] = "LeaseEnd",
        [CONTROL_QUEUE_PUSH] = "QueuePush",    [CONTROL_QUEUE_POP] = "QueuePop",
        [CONTROL_QUEUE_LENGTH] = "QueueLength", [CONTROL_BARRIER_LIST] = "BarrierList",
        [CONTROL_BARRIER_SHOW] = "BarrierShow", [CONTROL_PAUSE] = "Pause",
        [CONTROL_RESTART] = "Restart",         [CONTROL_LOAD] = "Load",
    };
    ck_assert_uint_eq(pb__control__descriptor.n_methods, CONTROL_METHODS);
    for (unsigned i = 0; i < CONTROL_METHODS; i++)
        ck_assert_str_eq(pb__control__descriptor.methods[i].name, names[i]);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("msg_wire");
    TCase *tc = tcase_create("msg_wire");
    tcase_set_timeout(tc, 30);
    tcase_add_test(tc, hello);
    tcase_add_test(tc, small_ones_up);
    tcase_add_test(tc, stage_done);
    tcase_add_test(tc, small_ones_down);
    tcase_add_test(tc, views_and_maps);
    tcase_add_test(tc, op_begin);
    tcase_add_test(tc, stage);
    tcase_add_test(tc, bad_members);
    tcase_add_test(tc, bad_maps_and_plans);
    tcase_add_test(tc, bad_small_things);
    tcase_add_test(tc, bad_lengths);
    tcase_add_test(tc, small_frames_get_little_memory);
    tcase_add_test(tc, control_methods);
    suite_add_tcase(suite, tc);
    return suite_run(suite);
}
