/* The agent's core outside of promise and go: the link, operations and their stages, maps and waves, letting go.
 * Each test is a story, and the trace of actions is what it asserts.  One thread. */
#include "tests/unit/agent_story.h"

/* ---- link ---- */

START_TEST(hello_first_and_nothing_before_welcome)
{
    struct story *s = story_new();
    story_attach(s);
    story_expect(s, "");
    story_happens(s, AE_LINK_UP);
    story_expect(s, "send HELLO op 0 applied 0 next 1 map 0 joiner attached\n");
    story_detach(s); /* HELLO said that it is there */
    story_passes(s, 10000);
    story_expect(s, "page engine_state = 0\n");
    struct msg m = {.type = MSG_WELCOME, .welcome = {.heartbeat_ms = 300}};
    story_told(s, &m);
    story_expect(s, "send ENGINE gone: killed\n");
    ck_assert_uint_eq(agent_core_deadline(s->core), s->now + 300 * STORY_MS);
    story_passes(s, 299);
    story_expect(s, "");
    story_passes(s, 1);
    story_expect(s, "send HEARTBEAT\n");
    story_happens(s, AE_LINK_DOWN);
    ck_assert_uint_eq(agent_core_deadline(s->core), UINT64_MAX);
    story_passes(s, 10000);
    story_expect(s, "");
    story_free(s);
}
END_TEST

START_TEST(message_before_welcome_is_illegal)
{
    struct story *s = story_new();
    story_happens(s, AE_LINK_UP);
    story_forget(s);
    story_prepare(s, 1, 1, FLIP_VIEW, 250);
    story_expect(s, "reconnect\n");
    story_op(s, MSG_OP_END, 1, 0); /* what still comes from that connection is not read */
    story_expect(s, "");
    story_free(s);
}
END_TEST

START_TEST(agent_message_from_the_coordinator_is_illegal)
{
    struct story *s = story_serving(2);
    struct msg m = {.type = MSG_PROMISE};
    story_told(s, &m);
    story_expect(s, "reconnect\n");
    story_free(s);
}
END_TEST

/* ---- a whole scale-up, seen by the rank that joins and by one that exists ---- */

START_TEST(scale_up_of_a_new_rank)
{
    struct story *s = story_new();
    story_link(s);
    story_attach(s);
    story_forget(s);
    story_op_begin(s, 2, OP_SCALE_UP, ROLE_NEW, 3, 2, 2);
    story_stage(s, 2, STAGE_ALLOCATE, 1);
    story_work_done(s, 0, NULL);
    story_expect(s, "new: NONE --OP_BEGIN--> PRE_KV_INIT\n"
                    "work ALLOCATE\n"
                    "engine: regions\n"
                    "send STAGE_DONE ALLOCATE round 0 bytes 100\n"
                    "new: PRE_KV_INIT --INIT_DONE--> PRE_KV_INIT\n");
    story_stage(s, 2, STAGE_GROUP, 2);
    story_work_done(s, 0, NULL);
    story_mapping(s, 2, 3);
    story_expect(s, "work GROUP\n"
                    "send STAGE_DONE GROUP round 0 bytes 100\n"
                    "new: PRE_KV_INIT --GROUP_DONE--> PRE_KV_INIT\n"
                    "send STAGE_DONE MAPPING round 0\n"
                    "new: PRE_KV_INIT --MAPPING_DONE--> PRE_KV_INIT\n");
    story_stage(s, 2, STAGE_WEIGHTS, 3);
    struct agent_event progress = {.type = AE_WORK_PROGRESS, .value = 5};
    story_event(s, &progress);
    progress.value = 6;
    story_event(s, &progress); /* too soon */
    s->now += 50 * STORY_MS;
    progress.value = 7;
    story_event(s, &progress);
    story_work_done(s, 0, NULL);
    story_expect(s, "work WEIGHTS self 2 of 3, dense from the first 2\n"
                    "send PROGRESS 5\n"
                    "send PROGRESS 7\n"
                    "send STAGE_DONE WEIGHTS round 0 bytes 100\n"
                    "new: PRE_KV_INIT --WEIGHTS_DONE--> PRE_KV_INIT\n");
    story_stage(s, 2, STAGE_KV, 4);
    story_stage(s, 2, STAGE_ENGINE_PREPARE, 5);
    story_prepared(s, 2, 5);
    story_expect(s, "send STAGE_DONE KV round 0 value 4096\n"
                    "new: PRE_KV_INIT --KV_DONE--> PREPARE\n"
                    "new: PREPARE --ENGINE_PREPARE--> PREPARE\n"
                    "engine: prepare op 2 attempt 5 within 750 ms\n"
                    "send STAGE_DONE ENGINE_PREPARE round 0\n");
    story_prepare(s, 2, 2, FLIP_VIEW, 250);
    story_go(s, 2, FLIP_VIEW, 30, 9, story_view(2, 3, 2, 5));
    engine_flips(s);
    story_happens(s, AE_BELL);
    story_forget(s);
    story_notify(s, 2, NOTIFY_RECONFIGURE_FINISHED);
    story_op(s, MSG_DISMISS, 2, 2);
    story_stage(s, 2, STAGE_FILL, 6);
    story_work_done(s, 0, NULL);
    story_op(s, MSG_OP_END, 2, 0);
    story_expect(s, "new: EPLB_RESHUFFLE --RESHUFFLE--> EPLB_RESHUFFLE\n"
                    "work FILL round 0\n"
                    "send STAGE_DONE FILL round 0 bytes 100\n"
                    "new: EPLB_RESHUFFLE --END--> COMPLETE\n"
                    "work GROUP_DESTROY\n");
    story_op(s, MSG_OP_END, 2, 0);
    story_expect(s, "");
    story_free(s);
}
END_TEST

/* The coordinator was restarted and knows nothing of the round that it had asked for. */
static struct story *story_rebalance(void)
{
    struct story *s = story_serving(2);
    story_op_begin(s, 2, OP_REBALANCE, ROLE_REMAINING, 2, 2, 0);
    story_stage(s, 2, STAGE_GROUP, 2);
    story_work_done(s, 0, NULL);
    story_mapping(s, 2, 2);
    story_stage(s, 2, STAGE_FILL, 6);
    return s;
}

START_TEST(moves_that_are_asked_for_again_are_made_once)
{
    struct story *s = story_rebalance();
    story_forget(s);
    story_stage(s, 2, STAGE_FILL, 7); /* under way */
    story_expect(s, "remaining: EPLB_RESHUFFLE --RESHUFFLE--> EPLB_RESHUFFLE\n");
    story_work_done(s, 0, NULL);
    story_expect(s, "send STAGE_DONE FILL round 0 bytes 100\n");
    story_stage(s, 2, STAGE_FILL, 8); /* done */
    story_expect(s, "remaining: EPLB_RESHUFFLE --RESHUFFLE--> EPLB_RESHUFFLE\n"
                    "send STAGE_DONE FILL round 0 bytes 100\n");
    story_free(s);
}
END_TEST

START_TEST(moves_that_have_failed_are_made_again)
{
    struct story *s = story_rebalance();
    story_work_done(s, ERR_IO, "cut");
    story_forget(s);
    story_stage(s, 2, STAGE_FILL, 7);
    story_expect(s, "remaining: EPLB_RESHUFFLE --RESHUFFLE--> EPLB_RESHUFFLE\n"
                    "work FILL round 0\n");
    story_free(s);
}
END_TEST

START_TEST(scale_up_of_an_existing_rank)
{
    struct story *s = story_serving(2);
    story_op_begin(s, 2, OP_SCALE_UP, ROLE_EXISTING, 3, 2, 0);
    story_stage(s, 2, STAGE_GROUP_ID, 1);
    struct blob *id = blob_new("id", 2);
    struct agent_event made = {.type = AE_WORK_DONE, .work_id = s->last_work, .blob = id};
    story_event(s, &made);
    blob_unref(id);
    story_expect(s, "existing: NONE --OP_BEGIN--> WAIT_NEW_CORE_ENGINES_INIT\n"
                    "work GROUP_ID\n"
                    "send STAGE_DONE GROUP_ID round 0 with id\n");
    story_notify(s, 2, NOTIFY_NEW_CORE_ENGINES_INIT_READY);
    story_notify(s, 2, NOTIFY_NEW_CORE_ENGINES_INIT_READY); /* a repeat */
    story_stage(s, 2, STAGE_GROUP, 2);
    story_work_done(s, 0, NULL);
    story_mapping(s, 2, 3);
    story_notify(s, 2, NOTIFY_NEW_CORE_ENGINES_WEIGHTS_INIT_READY);
    story_stage(s, 2, STAGE_WEIGHTS, 3);
    story_work_done(s, 0, NULL);
    story_stage(s, 2, STAGE_KV, 4);
    story_expect(s, "existing: WAIT_NEW_CORE_ENGINES_INIT --NEW_CORE_ENGINES_INIT_READY--> CREATE_STANDBY_GROUPS\n"
                    "work GROUP\n"
                    "send STAGE_DONE GROUP round 0 bytes 100\n"
                    "existing: CREATE_STANDBY_GROUPS --GROUP_DONE--> TRANSFER_EXPERT_MAPPING\n"
                    "send STAGE_DONE MAPPING round 0\n"
                    "existing: TRANSFER_EXPERT_MAPPING --MAPPING_DONE--> WAIT_NEW_CORE_ENGINES_WEIGHTS_INIT\n"
                    "existing: WAIT_NEW_CORE_ENGINES_WEIGHTS_INIT --NEW_CORE_ENGINES_WEIGHTS_INIT_READY--> "
                    "TRANSFER_WEIGHTS\n"
                    "work WEIGHTS self 0 of 3, dense from the first 2\n"
                    "send STAGE_DONE WEIGHTS round 0 bytes 100\n"
                    "existing: TRANSFER_WEIGHTS --WEIGHTS_DONE--> SYNC_KV_CACHE_MEMORY_SIZE\n"
                    "send STAGE_DONE KV round 0 value 4096\n"
                    "existing: SYNC_KV_CACHE_MEMORY_SIZE --KV_DONE--> SWITCH_AND_PREPARE\n");
    story_op(s, MSG_OP_ABORT, 2, 0); /* serves on as before */
    story_expect(s, "existing: SWITCH_AND_PREPARE --ABORT--> ABORTED\n"
                    "cancel work of op 2\n"
                    "engine: abort op 2\n"
                    "work GROUP_DESTROY\n");
    story_op_begin(s, 3, OP_SCALE_UP, ROLE_EXISTING, 3, 2, 0); /* and the next one is accepted */
    story_expect(s, "existing: NONE --OP_BEGIN--> WAIT_NEW_CORE_ENGINES_INIT\n");
    story_free(s);
}
END_TEST

START_TEST(stage_out_of_turn_is_illegal)
{
    const enum op_stage early[] = {STAGE_ALLOCATE, STAGE_GROUP, STAGE_MAPPING, STAGE_WEIGHTS,       STAGE_KV,
                                   STAGE_GRACE,    STAGE_FILL,  STAGE_LET_GO,  STAGE_ENGINE_PREPARE};
    for (size_t i = 0; i < sizeof(early) / sizeof(early[0]); i++) {
        struct story *s = story_serving(2);
        story_op_begin(s, 2, OP_SCALE_UP, ROLE_EXISTING, 3, 2, 0);
        story_forget(s);
        story_stage(s, 2, early[i], 1);
        story_expect(s, "reconnect\n");
        story_free(s);
    }
}
END_TEST

START_TEST(notification_and_end_out_of_turn)
{
    struct story *s = story_serving(2);
    story_op_begin(s, 2, OP_SCALE_UP, ROLE_EXISTING, 3, 2, 0);
    story_forget(s);
    story_notify(s, 2, NOTIFY_NEW_CORE_ENGINES_WEIGHTS_INIT_READY);
    story_expect(s, "reconnect\n");
    story_link(s);
    story_forget(s);
    story_op(s, MSG_OP_END, 2, 0); /* over, and nothing was decided: rolled back */
    story_expect(s, "existing: WAIT_NEW_CORE_ENGINES_INIT --ABORT--> ABORTED\n"
                    "cancel work of op 2\n"
                    "engine: abort op 2\n");
    story_free(s);
}
END_TEST

START_TEST(op_begin_that_does_not_fit_is_illegal)
{
    struct story *s = story_serving(2);
    story_op_begin(s, 2, OP_SCALE_UP, ROLE_NEW, 3, 2, 2);
    story_expect(s, "reconnect\n");
    story_free(s);
    s = story_new();
    story_link(s);
    story_forget(s);
    story_op_begin(s, 2, OP_SCALE_UP, ROLE_EXISTING, 3, 2, 0);
    story_expect(s, "reconnect\n");
    story_link(s);
    story_forget(s);
    struct msg m = {.type = MSG_OP_BEGIN,
                    .op_begin = {.op = 3, .kind = OP_SCALE_UP, .role = ROLE_NEW, .n = 2, .self = 1}};
    m.op_begin.parties = story_members(2, 0); /* we are named, but not at our place */
    story_told(s, &m);
    story_expect(s, "reconnect\n");
    story_free(s);
}
END_TEST

/* ---- answers ---- */

START_TEST(repeated_command_repeats_the_answer_not_the_work)
{
    struct story *s = story_new();
    story_link(s);
    story_op_begin(s, 2, OP_SCALE_UP, ROLE_NEW, 3, 2, 2);
    story_op_begin(s, 2, OP_SCALE_UP, ROLE_NEW, 3, 2, 2);
    story_stage(s, 2, STAGE_ALLOCATE, 1);
    story_forget(s);
    story_stage(s, 2, STAGE_ALLOCATE, 1);
    story_expect(s, "");
    story_happens(s, AE_LINK_DOWN);
    story_work_done(s, 0, NULL); /* nobody hears it */
    story_link(s);
    story_expect(s, "new: PRE_KV_INIT --INIT_DONE--> PRE_KV_INIT\n"
                    "send HELLO op 2 applied 0 next 1 map 0 joiner\n");
    story_stage(s, 2, STAGE_ALLOCATE, 1);
    story_expect(s, "send STAGE_DONE ALLOCATE round 0 bytes 100\n");
    story_stage(s, 2, STAGE_KV, 5); /* no engine: no limit */
    story_stage(s, 2, STAGE_KV, 5);
    story_expect(s, "send STAGE_DONE KV round 0 value no limit\n"
                    "new: PRE_KV_INIT --KV_DONE--> PREPARE\n"
                    "send STAGE_DONE KV round 0 value no limit\n");
    story_stage(s, 2, STAGE_ENGINE_PREPARE, 6);
    story_expect(s, "new: PREPARE --ENGINE_PREPARE--> PREPARE\n"
                    "send STAGE_DONE ENGINE_PREPARE round 0 notfound: no engine is attached\n");
    story_free(s);
}
END_TEST

START_TEST(failure_carries_its_sentence)
{
    struct story *s = story_new();
    story_link(s);
    story_op_begin(s, 2, OP_SCALE_UP, ROLE_NEW, 3, 2, 2);
    story_stage(s, 2, STAGE_ALLOCATE, 1);
    story_forget(s);
    story_work_done(s, ERR_NOMEM, "no memory for 2 GiB");
    story_expect(s, "send STAGE_DONE ALLOCATE round 0 nomem: no memory for 2 GiB bytes 100\n");
    story_free(s);
}
END_TEST

START_TEST(plan_is_checked)
{
    struct story *s = story_serving(2);
    story_op_begin(s, 2, OP_SCALE_DOWN, ROLE_REMAINING, 2, 2, 0);
    story_forget(s);
    story_mapping(s, 2, 3);
    story_expect(s, "send STAGE_DONE MAPPING round 0 invalid: the plan is not over the 2 parties of the operation\n");
    struct msg m = story_stage_msg(2, STAGE_MAPPING, 2);
    m.stage.plan = story_plan(2);
    m.stage.plan_digest = expert_map_digest(m.stage.plan->target) + 1;
    story_told(s, &m);
    story_expect(s, "send STAGE_DONE MAPPING round 0 corrupt: the target map does not match its digest\n");
    m = story_stage_msg(2, STAGE_MAPPING, 3);
    m.stage.plan = plan_new(2, 0, 0);
    m.stage.plan->target = expert_map_new(4, 2, 2, 2);
    story_told(s, &m);
    story_expect(s, "send STAGE_DONE MAPPING round 0 invalid: the plan is for 4 layers, 2 experts, 2 slots; the model "
                    "has 1, 2, 2\n");
    story_stage(s, 2, STAGE_FILL, 4);
    story_expect(s, "remaining: PREPARE --RESHUFFLE--> EPLB_RESHUFFLE\n"
                    "send STAGE_DONE FILL round 0 notfound: no plan: MAPPING has not been carried out here\n");
    story_free(s);
}
END_TEST

START_TEST(stage_of_another_operation_is_declined)
{
    struct story *s = story_serving(2);
    story_stage(s, 9, STAGE_KV, 1);
    story_expect(s, "send STAGE_DONE KV round 0 notfound: this agent is in no such operation\n");
    story_stage(s, 1, STAGE_FILL, 99); /* its operation 1 is complete */
    story_expect(s, "send STAGE_DONE FILL round 0 aborted: the operation has ended here\n");
    story_free(s);
}
END_TEST

START_TEST(later_attempt_counts)
{
    struct story *s = story_serving(2);
    story_op_begin(s, 2, OP_SCALE_DOWN, ROLE_REMAINING, 3, 3, 0);
    story_stage(s, 2, STAGE_ENGINE_PREPARE, 1);
    story_stage(s, 2, STAGE_ENGINE_PREPARE, 2);
    story_forget(s);
    story_prepared(s, 2, 1); /* of a view that is not proposed any more */
    story_prepare(s, 2, 2, FLIP_VIEW, 250);
    story_expect(s, "send STAGE_DONE ENGINE_PREPARE round 0\n"
                    "send REFUSE 2: the engine has not prepared the new view\n");
    story_prepared(s, 2, 2);
    story_prepare(s, 3, 2, FLIP_VIEW, 250);
    story_expect(s, "send STAGE_DONE ENGINE_PREPARE round 0\n"
                    "page gate = 11\n"
                    "send PROMISE 3 limit 11 next 11 wave 0 idle\n");
    story_free(s);
}
END_TEST

START_TEST(engine_dies_while_it_prepares)
{
    struct story *s = story_serving(2);
    story_op_begin(s, 2, OP_SCALE_DOWN, ROLE_REMAINING, 3, 3, 0);
    story_stage(s, 2, STAGE_ENGINE_PREPARE, 1);
    story_forget(s);
    story_detach(s);
    story_expect(s, "page engine_state = 0\n"
                    "page revoked = 1\n"
                    "send ENGINE gone: killed\n"
                    "send STAGE_DONE ENGINE_PREPARE round 0 unreachable: the engine is gone\n");
    story_free(s);
}
END_TEST

/* ---- cold start ---- */

static void cold_allocate(struct story *s)
{
    struct msg m = story_stage_msg(1, STAGE_ALLOCATE, 1);
    m.stage.load = true;
    m.stage.map = expert_map_new(1, 2, 2, 2);
    story_op_begin(s, 1, OP_START, ROLE_NEW, 2, 0, 1);
    story_told(s, &m);
}

START_TEST(cold_start_from_a_checkpoint)
{
    struct story *s = story_new();
    story_link(s);
    story_forget(s);
    cold_allocate(s);
    story_expect(s, "new: NONE --OP_BEGIN--> PRE_KV_INIT\n"
                    "send STAGE_DONE ALLOCATE round 0 notfound: no checkpoint is configured and no engine that seals "
                    "is attached\n");
    story_free(s);

    struct agent_config config = {
        .id = "me", .incarnation = ME_INCARNATION, .can_load = true, .layers = 1, .logical = 2};
    s = story_new();
    agent_core_free(s->core);
    s->core = agent_core_new(&config, s->now);
    story_link(s);
    story_forget(s);
    cold_allocate(s);
    struct model *model = model_new(1, 2, 2, 0);
    struct agent_event loaded = {.type = AE_WORK_DONE, .work_id = s->last_work, .model = model, .bytes = 9};
    story_event(s, &loaded);
    model_unref(model);
    story_expect(s, "new: NONE --OP_BEGIN--> PRE_KV_INIT\n"
                    "work LOAD\n"
                    "send STAGE_DONE ALLOCATE round 0 bytes 9 with model\n"
                    "new: PRE_KV_INIT --INIT_DONE--> PRE_KV_INIT\n");
    story_free(s);
}
END_TEST

START_TEST(cold_start_of_an_engine_that_seals)
{
    struct story *s = story_new();
    story_link(s);
    struct agent_event attach = {.type = AE_ENGINE_ATTACHED, .dispatch = DISPATCH_SOURCE_ROUTED, .seals = true,
                                 .layers = 1, .logical = 2, .endpoint = "e"};
    story_event(s, &attach);
    story_forget(s);
    cold_allocate(s);
    story_expect(s, "new: NONE --OP_BEGIN--> PRE_KV_INIT\n"
                    "engine: load as party 1\n");
    struct model *model = model_new(1, 2, 2, 0);
    struct agent_event sealed = {.type = AE_ENGINE_SEALED, .model = model};
    story_event(s, &sealed);
    model_unref(model);
    story_expect(s, "send STAGE_DONE ALLOCATE round 0 with model\n"
                    "new: PRE_KV_INIT --INIT_DONE--> PRE_KV_INIT\n");
    story_free(s);
}
END_TEST

START_TEST(sealing_engine_dies_before_it_has_sealed)
{
    struct story *s = story_new();
    story_link(s);
    struct agent_event attach = {.type = AE_ENGINE_ATTACHED, .dispatch = DISPATCH_SOURCE_ROUTED, .seals = true};
    story_event(s, &attach);
    cold_allocate(s);
    story_forget(s);
    story_detach(s);
    story_expect(s, "page engine_state = 0\n"
                    "send ENGINE gone: killed\n"
                    "send STAGE_DONE ALLOCATE round 0 unreachable: the engine is gone\n");
    story_free(s);
}
END_TEST

/* ---- an aborted joiner is a spare again ---- */

START_TEST(aborted_joiner_frees_before_it_allocates_again)
{
    struct story *s = story_new();
    story_link(s);
    story_attach(s);
    story_op_begin(s, 2, OP_SCALE_UP, ROLE_NEW, 3, 2, 2);
    story_stage(s, 2, STAGE_ALLOCATE, 1);
    story_work_done(s, 0, NULL);
    story_stage(s, 2, STAGE_GROUP, 2);
    story_forget(s);
    story_op(s, MSG_OP_ABORT, 2, 0);
    story_expect(s, "new: PRE_KV_INIT --ABORT--> ABORTED\n"
                    "cancel work of op 2\n"
                    "engine: abort op 2\n"
                    "work GROUP_DESTROY\n"
                    "engine: release\n");
    story_op_begin(s, 3, OP_SCALE_UP, ROLE_NEW, 3, 2, 2);
    story_stage(s, 3, STAGE_ALLOCATE, 1); /* has to wait */
    story_expect(s, "new: NONE --OP_BEGIN--> PRE_KV_INIT\n");
    story_happens(s, AE_ENGINE_RELEASED);
    story_expect(s, "work RELEASE\n");
    story_work_done(s, 0, NULL);
    story_expect(s, "work ALLOCATE\n");
    story_work_done(s, 0, NULL);
    story_expect(s, "engine: regions\n"
                    "send STAGE_DONE ALLOCATE round 0 bytes 100\n"
                    "new: PRE_KV_INIT --INIT_DONE--> PRE_KV_INIT\n");
    story_free(s);
}
END_TEST

START_TEST(abort_while_allocating)
{
    struct story *s = story_new();
    story_link(s);
    story_attach(s);
    story_op_begin(s, 2, OP_SCALE_UP, ROLE_NEW, 3, 2, 2);
    story_stage(s, 2, STAGE_ALLOCATE, 1);
    uint64_t allocate = s->last_work;
    story_forget(s);
    story_op(s, MSG_OP_ABORT, 2, 0); /* the engine has no regions yet: it is not asked */
    story_expect(s, "new: PRE_KV_INIT --ABORT--> ABORTED\n"
                    "cancel work of op 2\n"
                    "engine: abort op 2\n"
                    "work RELEASE\n");
    struct agent_event done = {.type = AE_WORK_DONE, .work_id = allocate}; /* it was too late to cancel */
    story_event(s, &done);
    story_work_done(s, 0, NULL);
    story_expect(s, "");
    story_free(s);
}
END_TEST

/* The operation is over and its GO is under way, when a repair already counts on us. */
START_TEST(joiner_that_is_a_rank_before_it_knows)
{
    struct story *s = story_new();
    story_link(s);
    story_attach(s);
    story_op_begin(s, 2, OP_SCALE_UP, ROLE_NEW, 3, 2, 2);
    story_stage(s, 2, STAGE_ALLOCATE, 1);
    story_work_done(s, 0, NULL);
    story_stage(s, 2, STAGE_KV, 2);
    story_stage(s, 2, STAGE_ENGINE_PREPARE, 3);
    story_prepared(s, 2, 3);
    story_prepare(s, 2, 2, FLIP_VIEW, 250);
    story_forget(s);
    story_op(s, MSG_OP_END, 2, 0);
    story_op_begin(s, 3, OP_REPAIR, ROLE_REMAINING, 2, 2, 1);
    story_expect(s, "new: PREPARE --ABORT--> ABORTED\n"
                    "cancel work of op 2\n"
                    "remaining: NONE --OP_BEGIN--> PREPARE\n"); /* the weights stay */
    story_go(s, 2, FLIP_VIEW, 30, 9, story_view(2, 3, 2, 5));
    story_forget(s);
    story_prepare(s, 3, 3, FLIP_RESET, 250);
    story_expect(s, "remaining: PREPARE --ENGINE_PREPARE--> SWITCH_AND_PREPARE\n"
                    "page revoked = 2\n"
                    "engine: revoke 2\n"
                    "page flip_view = 0\n"
                    "wake\n"
                    "page gate = 1\n"
                    "send PROMISE 3 limit 1 next 1 wave 0 idle\n");
    story_free(s);
}
END_TEST

/* ---- drain, grace, maps, waves ---- */

START_TEST(drain_ends_by_answer_or_deadline)
{
    struct story *s = story_serving(2);
    story_op_begin(s, 2, OP_SCALE_DOWN, ROLE_REMOVING, 2, 2, 0);
    story_forget(s);
    story_stage(s, 2, STAGE_DRAIN, 0);
    story_happens(s, AE_ENGINE_DRAINED);
    story_expect(s, "engine: drain within 1000 ms\n"
                    "send STAGE_DONE DRAIN round 0\n");
    story_stage(s, 2, STAGE_DRAIN, 1);
    story_forget(s);
    ck_assert_uint_le(agent_core_deadline(s->core), s->now + 1000 * STORY_MS);
    s->now += 1000 * STORY_MS;
    story_happens(s, AE_TICK);
    story_expect(s, "send STAGE_DONE DRAIN round 0: the engine is not drained by the deadline\n"
                    "send HEARTBEAT\n");
    story_detach(s);
    story_forget(s);
    story_stage(s, 2, STAGE_DRAIN, 2);
    story_expect(s, "send STAGE_DONE DRAIN round 0\n");
    story_free(s);
}
END_TEST

START_TEST(a_strict_drain_that_is_late_is_an_error)
{
    struct story *s = story_serving(2);
    story_op_begin(s, 2, OP_SCALE_DOWN, ROLE_REMOVING, 2, 2, 0);
    story_forget(s);
    struct msg m = story_stage_msg(2, STAGE_DRAIN, 0);
    m.stage.strict = true;
    story_told(s, &m);
    s->now += 1000 * STORY_MS;
    story_happens(s, AE_TICK);
    ck_assert_msg(strstr(s->trace, "send STAGE_DONE DRAIN round 0 timeout: the engine is not drained by the deadline\n"), "%s",
                  s->trace);
    story_free(s);
}
END_TEST

/* Its engine says nothing: the others go on, and it takes part in the commit as one that leaves. */
START_TEST(a_rank_whose_engine_does_not_prepare_leaves)
{
    struct story *s = story_serving(2);
    story_op_begin(s, 2, OP_SCALE_DOWN, ROLE_REMAINING, 3, 3, 0);
    story_forget(s);
    story_stage(s, 2, STAGE_ENGINE_PREPARE, 1);
    story_expect(s, "remaining: PREPARE --ENGINE_PREPARE--> SWITCH_AND_PREPARE\n"
                    "engine: prepare op 2 attempt 1 within 750 ms\n");
    story_prepare(s, 2, 2, FLIP_VIEW, 250);
    ck_assert_msg(strstr(s->trace, "REFUSE"), "%s", s->trace);
    struct msg m = story_stage_msg(2, STAGE_ENGINE_PREPARE, 2);
    m.stage.view = story_view(0, 2, NOT_IN_IT, 1);
    story_forget(s);
    story_told(s, &m);
    story_expect(s, "remaining: SWITCH_AND_PREPARE --ENGINE_PREPARE--> SWITCH_AND_PREPARE\n"
                    "send STAGE_DONE ENGINE_PREPARE round 0\n");
    story_prepare(s, 3, 2, FLIP_VIEW, 250);
    ck_assert_msg(strstr(s->trace, "send PROMISE"), "%s", s->trace);
    story_go(s, 2, FLIP_VIEW, 30, 9, story_view(3, 2, NOT_IN_IT, 5));
    engine_idles(s, 29);
    story_forget(s);
    story_happens(s, AE_BELL);
    ck_assert_msg(strstr(s->trace, "send FLIPPED"), "%s", s->trace);
    story_op(s, MSG_DISMISS, 2, 3);
    story_happens(s, AE_ENGINE_RELEASED);
    story_work_done(s, 0, NULL);
    ck_assert_msg(strstr(s->trace, "engine: release\n"), "%s", s->trace);
    ck_assert_msg(strstr(s->trace, "send STAGE_DONE LET_GO"), "%s", s->trace);
    story_op(s, MSG_OP_END, 2, 0);
    struct agent_status status;
    agent_core_status(s->core, &status);
    ck_assert_ptr_null(status.view);
    ck_assert(machine_final(status.state));
    story_free(s);
}
END_TEST

static void story_grace(struct story *s, uint64_t attempt, uint64_t step)
{
    struct msg m = story_stage_msg(2, STAGE_GRACE, attempt);
    m.stage.step = step;
    story_told(s, &m);
}

START_TEST(grace_lasts_until_the_step_before_is_complete)
{
    struct story *s = story_serving(2);
    story_op_begin(s, 2, OP_SCALE_DOWN, ROLE_REMAINING, 2, 2, 0);
    engine_runs(s, 12);
    story_forget(s);
    story_grace(s, 1, 14);
    story_expect(s, "remaining: PREPARE --RESHUFFLE--> EPLB_RESHUFFLE\n"
                    "page notify_done = 13\n");
    ck_assert_uint_eq(agent_core_deadline(s->core), s->now + 20 * STORY_MS); /* should a bell be lost */
    story_grace(s, 2, 13);
    story_expect(s, "remaining: EPLB_RESHUFFLE --RESHUFFLE--> EPLB_RESHUFFLE\n"
                    "page notify_done = 12\n");
    s->page.intent = 13;
    story_happens(s, AE_BELL);
    story_expect(s, ""); /* begun is not completed */
    s->page.done = 12;
    story_happens(s, AE_BELL);
    story_expect(s, "send STAGE_DONE GRACE round 0\n"
                    "page notify_done = 13\n");
    s->page.done = 13;
    story_passes(s, 20);
    story_expect(s, "send STAGE_DONE GRACE round 0\n"
                    "page notify_done = 0\n");
    story_grace(s, 3, 0);
    story_grace(s, 4, 14);
    story_expect(s, "remaining: EPLB_RESHUFFLE --RESHUFFLE--> EPLB_RESHUFFLE\n"
                    "send STAGE_DONE GRACE round 0\n"
                    "remaining: EPLB_RESHUFFLE --RESHUFFLE--> EPLB_RESHUFFLE\n"
                    "send STAGE_DONE GRACE round 0\n");
    story_grace(s, 5, 99);
    story_forget(s);
    story_detach(s); /* nobody reads any more */
    story_expect(s, "page engine_state = 0\n"
                    "page revoked = 1\n"
                    "send ENGINE gone: killed\n"
                    "send STAGE_DONE GRACE round 0\n"
                    "page notify_done = 0\n");
    story_free(s);
}
END_TEST

START_TEST(map_is_acknowledged_when_the_engine_has_it)
{
    struct story *s = story_serving(2);
    story_op_begin(s, 2, OP_SCALE_DOWN, ROLE_REMAINING, 2, 2, 0);
    story_forget(s);
    story_map(s, 1, 2, 2, 4);
    story_expect(s, "remaining: PREPARE --RESHUFFLE--> EPLB_RESHUFFLE\n"
                    "engine: map 4\n"
                    "page map_pending = 4\n"
                    "wake\n");
    story_map(s, 1, 2, 2, 4); /* asked again, too early */
    story_happens(s, AE_BELL);
    story_expect(s, "");
    s->page.map_applied_step = 11;
    s->page.map_applied = 4;
    story_happens(s, AE_BELL);
    story_expect(s, "send MAP_ACK 4 from step 11\n");
    story_map(s, 1, 2, 2, 4);
    story_expect(s, "send MAP_ACK 4 from step 11\n");
    story_map(s, 1, 2, 2, 3);  /* stale */
    story_map(s, 9, 2, 2, 20); /* of an epoch that is not in use */
    story_expect(s, "");
    story_map(s, 1, 2, 2, 5);
    story_forget(s);
    story_detach(s);
    story_expect(s, "page engine_state = 0\n"
                    "page revoked = 1\n"
                    "send ENGINE gone: killed\n"
                    "send MAP_ACK 5 from step 0\n");
    story_map(s, 1, 2, 3, 6); /* of another shape */
    story_expect(s, "reconnect\n");
    story_free(s);
}
END_TEST

START_TEST(map_that_came_with_the_view_is_in_use_from_its_step)
{
    struct story *s = story_serving(2); /* view 1 with map 1 at step 1 */
    story_map(s, 1, 0, 2, 1);           /* asked by a coordinator that was restarted */
    story_expect(s, "send MAP_ACK 1 from step 1\n");
    story_free(s);
}
END_TEST

START_TEST(waves_raise_run_to_behind_the_gate)
{
    struct story *s = story_serving(2);
    struct agent_event wave = {.type = AE_ENGINE_WAVE, .value = 11};
    story_event(s, &wave);
    story_expect(s, "peers: wave in view 1 from step 11\n");
    struct agent_event peer = {.type = AE_PEER_WAVE, .epoch = 1, .value = 14};
    story_event(s, &peer);
    story_event(s, &peer);
    story_expect(s, "page run_to = 15\nwake\n"); /* once, and nothing else: the gate stays as it is */
    peer.value = 12;
    story_event(s, &peer);
    peer = (struct agent_event){.type = AE_PEER_WAVE, .epoch = 7, .value = 99}; /* not our view */
    story_event(s, &peer);
    story_expect(s, "");
    story_prepares(s, 2);
    story_prepare(s, 2, 2, FLIP_VIEW, 250);
    story_go(s, 2, FLIP_VIEW, 30, 9, story_view(2, 2, 0, 5));
    story_forget(s);
    peer = (struct agent_event){.type = AE_PEER_WAVE, .epoch = 1, .value = 20}; /* still the view in use */
    story_event(s, &peer);
    peer = (struct agent_event){.type = AE_PEER_WAVE, .epoch = 2, .value = 31};
    story_event(s, &peer);
    story_expect(s, "page run_to = 32\nwake\n");
    story_free(s);
}
END_TEST

START_TEST(verify_checks_what_is_held)
{
    struct story *s = story_serving(2);
    struct msg m = {.type = MSG_VERIFY, .verify = {.request = 5}};
    story_told(s, &m);
    struct agent_event done = {.type = AE_WORK_DONE, .work_id = s->last_work, .value = 4, .code = ERR_CORRUPT,
                               .text = "layer 0 expert 1"};
    story_event(s, &done);
    story_expect(s, "work VERIFY\n"
                    "send VERIFIED 5 slots 4 bad 1 layer 0 expert 1\n");
    story_free(s);
    s = story_new();
    story_link(s);
    story_forget(s);
    m = (struct msg){.type = MSG_VERIFY, .verify = {.request = 6}};
    story_told(s, &m);
    story_expect(s, "send VERIFIED 6 slots 0 bad 0 \n");
    story_free(s);
}
END_TEST

/* ---- leaving for good ---- */

START_TEST(evicted_agent_exits_to_come_back_as_another)
{
    struct story *s = story_serving(2);
    struct msg m = {.type = MSG_EVICTED};
    story_told(s, &m);
    story_expect(s, "page gate = 11\n"
                    "page revoked = 1\n"
                    "engine: revoke 1\n"
                    "engine: detach, the agent is evicted\n"
                    "page engine_state = 0\n"
                    "send ENGINE gone: the agent is evicted\n"
                    "cancel work of op 1\n"
                    "work RELEASE\n"
                    "exit 3\n");
    story_free(s);
}
END_TEST

START_TEST(stop_asks_to_leave_once)
{
    struct story *s = story_new();
    story_happens(s, AE_STOP); /* a spare just goes */
    story_expect(s, "exit 0\n");
    story_free(s);

    s = story_serving(3);
    story_happens(s, AE_STOP);
    story_expect(s, "send LEAVE\n");
    story_op_begin(s, 2, OP_SCALE_DOWN, ROLE_REMOVING, 3, 3, 0);
    story_prepare(s, 2, 2, FLIP_VIEW, 250);
    story_go(s, 2, FLIP_VIEW, 11, 9, story_view(2, 2, NOT_IN_IT, 5));
    story_op(s, MSG_DISMISS, 2, 2);
    story_happens(s, AE_ENGINE_RELEASED);
    story_forget(s);
    story_work_done(s, 0, NULL);
    ck_assert_ptr_nonnull(strstr(s->trace, "send STAGE_DONE LET_GO round 0\n"));
    ck_assert_ptr_nonnull(strstr(s->trace, "exit 0\n"));
    story_free(s);

    s = story_serving(3);
    story_happens(s, AE_STOP);
    story_happens(s, AE_STOP);
    story_expect(s, "send LEAVE\nexit 0\n");
    story_free(s);
}
END_TEST

/* ---- planted mistakes ---- */

START_TEST(bug_map_ack_first)
{
    struct story *s = story_serving(2);
    agent_core_plant(s->core, AGENT_BUG_MAP_ACK_FIRST);
    story_map(s, 1, 0, 2, 4);
    story_expect(s, "send MAP_ACK 4 from step 11\n"
                    "engine: map 4\n"
                    "page map_pending = 4\n"
                    "wake\n");
    story_free(s);
}
END_TEST

START_TEST(bug_no_grace)
{
    struct story *s = story_serving(2);
    story_op_begin(s, 2, OP_SCALE_DOWN, ROLE_REMAINING, 2, 2, 0);
    engine_runs(s, 12);
    agent_core_plant(s->core, AGENT_BUG_NO_GRACE);
    story_forget(s);
    story_grace(s, 1, 14);
    story_expect(s, "remaining: PREPARE --RESHUFFLE--> EPLB_RESHUFFLE\n"
                    "send STAGE_DONE GRACE round 0\n");
    story_free(s);
}
END_TEST

START_TEST(bug_digest_unchecked)
{
    for (int planted = 0; planted < 2; planted++) {
        struct story *s = story_serving(2);
        story_op_begin(s, 2, OP_SCALE_DOWN, ROLE_REMAINING, 2, 2, 0);
        story_mapping(s, 2, 2);
        agent_core_plant(s->core, planted ? AGENT_BUG_DIGEST_UNCHECKED : AGENT_BUG_NONE);
        story_stage(s, 2, STAGE_FILL, 2);
        story_forget(s);
        story_work_done(s, ERR_CORRUPT, "");
        story_expect(s, planted ? "send STAGE_DONE FILL round 0 bytes 100\n"
                                : "send STAGE_DONE FILL round 0 corrupt: corrupt bytes 100\n");
        story_free(s);
    }
}
END_TEST

int main(void)
{
    TCase *link = tcase_create("link"), *op = tcase_create("operation"), *answers = tcase_create("answers");
    TCase *join = tcase_create("joining"), *serve = tcase_create("serving"), *leave = tcase_create("leaving");
    TCase *bugs = tcase_create("planted mistakes");
    tcase_add_test(link, hello_first_and_nothing_before_welcome);
    tcase_add_test(link, message_before_welcome_is_illegal);
    tcase_add_test(link, agent_message_from_the_coordinator_is_illegal);
    tcase_add_test(op, scale_up_of_a_new_rank);
    tcase_add_test(op, scale_up_of_an_existing_rank);
    tcase_add_test(op, moves_that_are_asked_for_again_are_made_once);
    tcase_add_test(op, moves_that_have_failed_are_made_again);
    tcase_add_test(op, stage_out_of_turn_is_illegal);
    tcase_add_test(op, notification_and_end_out_of_turn);
    tcase_add_test(op, op_begin_that_does_not_fit_is_illegal);
    tcase_add_test(answers, repeated_command_repeats_the_answer_not_the_work);
    tcase_add_test(answers, failure_carries_its_sentence);
    tcase_add_test(answers, plan_is_checked);
    tcase_add_test(answers, stage_of_another_operation_is_declined);
    tcase_add_test(answers, later_attempt_counts);
    tcase_add_test(answers, engine_dies_while_it_prepares);
    tcase_add_test(join, cold_start_from_a_checkpoint);
    tcase_add_test(join, cold_start_of_an_engine_that_seals);
    tcase_add_test(join, sealing_engine_dies_before_it_has_sealed);
    tcase_add_test(join, aborted_joiner_frees_before_it_allocates_again);
    tcase_add_test(join, abort_while_allocating);
    tcase_add_test(join, joiner_that_is_a_rank_before_it_knows);
    tcase_add_test(serve, drain_ends_by_answer_or_deadline);
    tcase_add_test(serve, a_strict_drain_that_is_late_is_an_error);
    tcase_add_test(serve, a_rank_whose_engine_does_not_prepare_leaves);
    tcase_add_test(serve, grace_lasts_until_the_step_before_is_complete);
    tcase_add_test(serve, map_is_acknowledged_when_the_engine_has_it);
    tcase_add_test(serve, map_that_came_with_the_view_is_in_use_from_its_step);
    tcase_add_test(serve, waves_raise_run_to_behind_the_gate);
    tcase_add_test(serve, verify_checks_what_is_held);
    tcase_add_test(leave, evicted_agent_exits_to_come_back_as_another);
    tcase_add_test(leave, stop_asks_to_leave_once);
    tcase_add_test(bugs, bug_map_ack_first);
    tcase_add_test(bugs, bug_no_grace);
    tcase_add_test(bugs, bug_digest_unchecked);
    TCase *const cases[] = {link, op, answers, join, serve, leave, bugs};
    return story_run("agent core", cases, sizeof(cases) / sizeof(cases[0]));
}
