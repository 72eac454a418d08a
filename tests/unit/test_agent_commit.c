/* Promise and go as the agent does it: each test is a story, and the trace of actions is what it asserts.
 * The last ones plant the mistakes that the simulator plants, and see the trace change.  One thread. */
#include "tests/unit/agent_story.h"

#define AT_WORK_20MS(s)                                                                                                \
    do {                                                                                                               \
        engine_runs(s, 10);                                                                                            \
        (s)->page.step_ns_min = 20 * STORY_MS;                                                                         \
        (s)->page.wave = 4;                                                                                            \
    } while (0)

/* ---- promise ---- */

START_TEST(promise_lies_the_lead_ahead)
{
    struct story *s = story_serving(3);
    story_prepares(s, 2);
    AT_WORK_20MS(s);
    story_prepare(s, 2, 2, FLIP_VIEW, 250); /* 250 ms are 13 steps of 20 ms: 10 + 1 + 13 */
    story_expect(s, "page gate = 24\n"
                    "send PROMISE 2 limit 24 next 11 wave 4 running\n");
    engine_runs(s, 15);
    story_prepare(s, 2, 2, FLIP_VIEW, 250); /* a repeat repeats, whatever has happened since */
    story_expect(s, "send PROMISE 2 limit 24 next 11 wave 4 running\n");
    story_free(s);
}
END_TEST

START_TEST(promise_of_an_idle_engine_is_its_next_step)
{
    struct story *s = story_serving(3);
    story_prepares(s, 2);
    story_prepare(s, 2, 2, FLIP_VIEW, 250);
    story_expect(s, "page gate = 11\n"
                    "send PROMISE 2 limit 11 next 11 wave 0 idle\n");
    story_free(s);
}
END_TEST

/* Between reading intent and writing the gate the idle engine was woken and began the very step: read again. */
START_TEST(gate_is_raised_until_the_engine_is_below_it)
{
    struct story *s = story_serving(3);
    story_prepares(s, 2);
    s->overtake = 11;
    story_prepare(s, 2, 2, FLIP_VIEW, 250);
    story_expect(s, "page gate = 11\n"
                    "page gate = 14\n" /* 11 + 1 + K, K = 2 while steps are not known */
                    "send PROMISE 2 limit 14 next 12 wave 0 idle\n");
    story_free(s);
}
END_TEST

START_TEST(lead_has_a_limit)
{
    struct story *s = story_serving(3);
    story_prepares(s, 2);
    engine_runs(s, 10);
    s->page.step_ns_min = 1;
    story_prepare(s, 2, 2, FLIP_VIEW, 250);
    story_expect(s, "page gate = 10011\n"
                    "send PROMISE 2 limit 10011 next 11 wave 0 running\n");
    story_free(s);
}
END_TEST

START_TEST(abort_opens_the_gate_and_the_epoch_is_spent)
{
    struct story *s = story_serving(3);
    story_prepares(s, 2);
    story_prepare(s, 2, 2, FLIP_VIEW, 250);
    story_forget(s);
    story_abort(s, 2);
    story_expect(s, "page gate = open\nwake\n");
    story_abort(s, 2);
    story_expect(s, "");
    story_prepare(s, 2, 2, FLIP_VIEW, 250);
    story_expect(s, "send REFUSE 2: the epoch is stale\n");
    story_abort(s, 5); /* overtook its PREPARE, which will never count */
    story_prepare(s, 5, 2, FLIP_VIEW, 250);
    story_expect(s, "send REFUSE 5: the epoch is stale\n");
    story_prepare(s, 6, 2, FLIP_VIEW, 500);
    story_expect(s, "page gate = 11\nsend PROMISE 6 limit 11 next 11 wave 0 idle\n");
    story_free(s);
}
END_TEST

START_TEST(refuses_what_it_is_not_ready_for)
{
    struct story *s = story_new();
    story_link(s);
    story_forget(s);
    story_prepare(s, 3, 2, FLIP_VIEW, 250);
    story_expect(s, "send REFUSE 3: this agent is no member of the view\n");
    story_prepare(s, 4, 2, FLIP_RESET, 250);
    story_expect(s, "send REFUSE 4: this agent is no member of the view\n");
    story_free(s);

    s = story_serving(3);
    story_prepare(s, 3, 2, FLIP_VIEW, 250);
    story_expect(s, "send REFUSE 3: this agent is in no such operation\n");
    story_op_begin(s, 2, OP_SCALE_DOWN, ROLE_REMAINING, 3, 3, 0);
    story_forget(s);
    story_prepare(s, 4, 2, FLIP_VIEW, 250);
    story_expect(s, "send REFUSE 4: the engine has not prepared the new view\n");
    story_stage(s, 2, STAGE_ENGINE_PREPARE, 1);
    story_prepared(s, 2, 1);
    story_detach(s); /* what it prepared is gone with it */
    story_attach(s);
    story_forget(s);
    story_prepare(s, 5, 2, FLIP_VIEW, 250);
    story_expect(s, "send REFUSE 5: the engine has not prepared the new view\n");
    story_stage(s, 2, STAGE_ENGINE_PREPARE, 2);
    story_prepared(s, 2, 2);
    story_prepare(s, 6, 2, FLIP_VIEW, 250);
    story_forget(s);
    story_prepare(s, 7, 2, FLIP_VIEW, 250);
    story_expect(s, "send REFUSE 7: a promise for another epoch is outstanding\n");
    story_go(s, 2, FLIP_VIEW, 20, 3, story_view(6, 2, 0, 2));
    story_forget(s);
    story_prepare(s, 8, 2, FLIP_VIEW, 250);
    story_expect(s, "send REFUSE 8: the flip of an earlier epoch is not applied yet\n");
    story_free(s);
}
END_TEST

/* ---- go ---- */

START_TEST(go_writes_the_flip_before_it_opens_the_gate)
{
    struct story *s = story_serving(3);
    story_prepares(s, 2);
    AT_WORK_20MS(s);
    story_prepare(s, 2, 2, FLIP_VIEW, 250);
    story_forget(s);
    story_go(s, 2, FLIP_VIEW, 30, 9, story_view(2, 2, 0, 5));
    story_expect(s, "engine: commit view 2 at step 30, rank 0, map 5\n"
                    "page flip_wave = 9\n"
                    "page flip_step = 30\n"
                    "page flip_view = 2\n"
                    "page run_to = 31\n"
                    "page gate = open\n"
                    "wake\n");
    engine_runs(s, 29);
    story_happens(s, AE_BELL);
    story_expect(s, "");
    s->page.last_hold_ns = 1234;
    engine_flips(s);
    story_happens(s, AE_BELL);
    story_expect(s, "send FLIPPED 2 held 1234 ns\n"
                    "remaining: SWITCH_AND_PREPARE --FLIPPED--> SWITCH_AND_PREPARE\n");
    story_go(s, 2, FLIP_VIEW, 30, 9, story_view(2, 2, 0, 5));
    story_expect(s, "send FLIPPED 2 held 1234 ns\n"); /* a duplicate only repeats what is true */
    story_free(s);
}
END_TEST

START_TEST(duplicate_go_says_nothing_before_the_flip)
{
    struct story *s = story_serving(3);
    story_prepares(s, 2);
    story_prepare(s, 2, 2, FLIP_VIEW, 250);
    story_go(s, 2, FLIP_VIEW, 12, 9, story_view(2, 2, 0, 5));
    story_forget(s);
    story_go(s, 2, FLIP_VIEW, 12, 9, story_view(2, 2, 0, 5));
    story_expect(s, "");
    story_free(s);
}
END_TEST

static void illegal_go(struct story *s, enum flip_kind kind, uint64_t step, struct view *view)
{
    story_forget(s);
    story_go(s, 2, kind, step, 1, view);
    story_expect(s, "reconnect\n");
    struct agent_status status;
    agent_core_status(s->core, &status);
    ck_assert_uint_eq(status.applied_epoch, 1);
    ck_assert(!status.linked);
    story_link(s);
}

START_TEST(go_that_breaks_the_promise_is_not_followed)
{
    struct story *s = story_serving(3);
    story_prepares(s, 2);
    illegal_go(s, FLIP_VIEW, 30, story_view(2, 2, 0, 5)); /* not promised */
    AT_WORK_20MS(s);
    story_prepare(s, 2, 2, FLIP_VIEW, 250);
    illegal_go(s, FLIP_VIEW, 23, story_view(2, 2, 0, 5)); /* below the limit of 24 */
    illegal_go(s, FLIP_VIEW, 30, story_view(3, 2, 0, 5)); /* of another epoch */
    illegal_go(s, FLIP_MAP, 30, story_view(2, 2, 0, 5));  /* of another kind */
    struct view *other = story_view(2, 2, 0, 5);
    other->members[0].incarnation = ME_INCARNATION + 1;
    illegal_go(s, FLIP_VIEW, 30, other);
    ck_assert_uint_eq(s->page.gate, 24); /* and the promise stands */
    story_free(s);
}
END_TEST

START_TEST(abort_after_go_is_not_followed)
{
    struct story *s = story_serving(3);
    story_prepares(s, 2);
    story_prepare(s, 2, 2, FLIP_VIEW, 250);
    story_go(s, 2, FLIP_VIEW, 12, 9, story_view(2, 2, 0, 5));
    story_forget(s);
    story_abort(s, 2);
    story_expect(s, "reconnect\n");
    story_free(s);
}
END_TEST

START_TEST(joiner_promises_nothing_and_starts_at_s)
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
    story_forget(s);
    story_prepare(s, 2, 2, FLIP_VIEW, 250);
    story_expect(s, "send PROMISE 2 limit 0 next 0 wave 0 joiner\n");
    story_go(s, 2, FLIP_VIEW, 30, 9, story_view(2, 3, 2, 5));
    story_expect(s, "engine: commit view 2 at step 30, rank 2, map 5\n"
                    "page next_step = 30\n"
                    "page flip_wave = 9\n"
                    "page flip_step = 30\n"
                    "page flip_view = 2\n"
                    "page run_to = 31\n"
                    "page gate = open\n"
                    "wake\n");
    engine_flips(s);
    story_happens(s, AE_BELL);
    story_expect(s, "send FLIPPED 2 held 0 ns\n"
                    "new: PREPARE --FLIPPED--> EPLB_RESHUFFLE\n");
    story_free(s);
}
END_TEST

START_TEST(withdrawn_joiner_does_not_touch_its_gate)
{
    struct story *s = story_new();
    story_link(s);
    story_attach(s);
    story_op_begin(s, 2, OP_SCALE_UP, ROLE_NEW, 3, 2, 2);
    story_stage(s, 2, STAGE_KV, 2);
    story_stage(s, 2, STAGE_ENGINE_PREPARE, 3);
    story_prepared(s, 2, 3);
    story_prepare(s, 2, 2, FLIP_VIEW, 250);
    story_forget(s);
    story_abort(s, 2);
    story_expect(s, "");
    story_free(s);
}
END_TEST

START_TEST(map_flip_changes_no_membership_and_no_machine)
{
    struct story *s = story_serving(3);
    story_op_begin(s, 2, OP_SCALE_DOWN, ROLE_REMAINING, 3, 3, 0);
    story_forget(s);
    story_prepare(s, 2, 2, FLIP_MAP, 250); /* needs no prepared engine */
    story_expect(s, "page gate = 11\nsend PROMISE 2 limit 11 next 11 wave 0 idle\n");
    story_go(s, 2, FLIP_MAP, 11, 1, story_view(2, 3, 0, 6));
    story_expect(s, "remaining: PREPARE --RESHUFFLE--> EPLB_RESHUFFLE\n"
                    "engine: commit view 2 at step 11, rank 0, map 6\n"
                    "page flip_wave = 1\n"
                    "page flip_step = 11\n"
                    "page flip_view = 2\n"
                    "page run_to = 12\n"
                    "page gate = open\n"
                    "wake\n");
    engine_flips(s);
    story_happens(s, AE_BELL);
    story_expect(s, "send FLIPPED 2 held 0 ns\n");
    story_op(s, MSG_OP_ABORT, 2, 0); /* a map flip decides nothing about the operation */
    story_expect(s, "remaining: EPLB_RESHUFFLE --ABORT--> ABORTED\n"
                    "cancel work of op 2\n"
                    "engine: abort op 2\n");
    story_free(s);
}
END_TEST

/* ---- leaving ---- */

static struct story *story_leaver(void)
{
    struct story *s = story_serving(3);
    story_op_begin(s, 2, OP_SCALE_DOWN, ROLE_REMOVING, 3, 3, 0);
    AT_WORK_20MS(s);
    story_prepare(s, 2, 2, FLIP_VIEW, 250);
    story_forget(s);
    story_go(s, 2, FLIP_VIEW, 30, 9, story_view(2, 2, NOT_IN_IT, 5));
    return s;
}

START_TEST(leaver_runs_up_to_s_and_lets_go_when_dismissed)
{
    struct story *s = story_leaver();
    story_expect(s, "engine: commit view 2 at step 30, rank -1, map 5\n"
                    "page flip_wave = 9\n"
                    "page flip_step = 30\n"
                    "page flip_view = 2\n"
                    "page run_to = 30\n"
                    "page gate = 30\n"
                    "wake\n");
    engine_runs(s, 29);
    story_happens(s, AE_BELL);
    story_expect(s, "");
    engine_held(s);
    story_happens(s, AE_BELL);
    story_expect(s, "send FLIPPED 2 held 0 ns\n"
                    "removing: PREPARE --FLIPPED--> EPLB_RESHUFFLE\n");
    story_happens(s, AE_LINK_DOWN);
    story_link(s); /* it still holds something: not a spare yet */
    story_expect(s, "send HELLO op 2 applied 2 next 30 map 1 running attached\n"
                    "send FLIPPED 2 held 0 ns\n");
    story_op(s, MSG_DISMISS, 2, 2);
    story_expect(s, "engine: release\n");
    story_op(s, MSG_DISMISS, 2, 2);
    story_happens(s, AE_ENGINE_RELEASED);
    story_expect(s, "work RELEASE\n");
    story_work_done(s, 0, NULL);
    story_expect(s, "page revoked = 2\n"
                    "page flip_view = 0\n"
                    "page run_to = 0\n"
                    "page map_pending = 0\n"
                    "page gate = open\n"
                    "send STAGE_DONE LET_GO round 0\n"
                    "removing: EPLB_RESHUFFLE --LET_GO--> COMPLETE\n");
    story_op(s, MSG_DISMISS, 2, 2);
    story_expect(s, "send STAGE_DONE LET_GO round 0\n");
    story_happens(s, AE_LINK_DOWN);
    story_link(s);
    story_expect(s, "send HELLO op 0 applied 2 next 30 map 0 joiner attached\n"
                    "send FLIPPED 2 held 0 ns\n"
                    "send STAGE_DONE LET_GO round 0\n");
    story_free(s);
}
END_TEST

START_TEST(leaver_whose_engine_does_not_let_go_is_cut_off)
{
    struct story *s = story_leaver();
    engine_held(s);
    story_happens(s, AE_BELL);
    story_op(s, MSG_DISMISS, 2, 2);
    story_forget(s);
    story_passes(s, 4999);
    story_forget(s); /* heartbeats */
    story_passes(s, 1);
    story_expect(s, "page revoked = 2\n"
                    "engine: revoke 2\n"
                    "engine: detach, it did not release the weights\n"
                    "page engine_state = 0\n"
                    "send ENGINE gone: it did not release the weights\n"
                    "work RELEASE\n");
    story_free(s);
}
END_TEST

START_TEST(leaver_without_engine_is_at_its_boundary)
{
    struct story *s = story_leaver();
    story_forget(s);
    story_detach(s);
    story_expect(s, "page engine_state = 0\n"
                    "page revoked = 2\n"
                    "send ENGINE gone: killed\n"
                    "send FLIPPED 2 held 0 ns\n"
                    "removing: PREPARE --FLIPPED--> EPLB_RESHUFFLE\n");
    story_free(s);
}
END_TEST

/* It said FLIPPED, but its engine died below S, in a step that the others cannot end without it: another engine that is
 * there by the time the coordinator is back does not mend that. */
START_TEST(leaver_that_lost_its_engine_below_s_says_so_until_it_is_dismissed)
{
    struct story *s = story_leaver();
    story_happens(s, AE_LINK_DOWN);
    story_detach(s);
    story_attach(s);
    story_forget(s);
    story_link(s);
    story_expect(s, "send HELLO op 2 applied 2 next 11 map 1 idle attached\n"
                    "send ENGINE attached tcp:1 epoch 2 is torn: killed\n"
                    "send FLIPPED 2 held 0 ns\n");
    story_free(s);
}
END_TEST

/* A DISMISS of an earlier operation that comes late is not about the view that it has now. */
START_TEST(leaver_is_not_dismissed_by_an_old_word)
{
    struct story *s = story_leaver();
    story_forget(s);
    story_op(s, MSG_DISMISS, 1, 1);
    story_expect(s, "");
    story_free(s);
}
END_TEST

START_TEST(dismiss_means_nothing_to_those_who_stay)
{
    struct story *s = story_serving(3);
    story_op(s, MSG_DISMISS, 1, 1);
    story_expect(s, "");
    story_free(s);
}
END_TEST

/* ---- the engine and the link come and go ---- */

START_TEST(promise_survives_link_and_engine)
{
    struct story *s = story_serving(3);
    story_prepares(s, 2);
    AT_WORK_20MS(s);
    story_prepare(s, 2, 2, FLIP_VIEW, 250);
    story_forget(s);
    story_happens(s, AE_LINK_DOWN);
    engine_idles(s, 10);
    story_detach(s);
    story_expect(s, "page engine_state = 0\npage revoked = 1\n");
    story_attach(s); /* the gate is not touched; the engine is told where it is */
    story_expect(s, "engine: regions\n"
                    "engine: commit view 1 at step 11, rank 0, map 1\n"
                    "engine: map 1\n"
                    "page map_pending = 1\n"
                    "wake\n");
    ck_assert_uint_eq(s->page.gate, 24);
    story_link(s); /* the loss is told although another engine is there */
    story_expect(s, "send HELLO op 2 applied 1 promised 2 limit 24 next 11 map 1 running attached\n"
                    "send ENGINE attached tcp:1 epoch 1 is torn: killed\n"
                    "send FLIPPED 1 held 0 ns\n");
    story_go(s, 2, FLIP_VIEW, 30, 9, story_view(2, 2, 0, 5));
    story_forget(s);
    story_detach(s);
    story_forget(s);
    story_attach(s); /* both views: it may have to run up to S in the old one */
    story_expect(s, "engine: regions\n"
                    "engine: commit view 1 at step 11, rank 0, map 1\n"
                    "engine: map 1\n"
                    "page map_pending = 1\n"
                    "engine: commit view 2 at step 30, rank 0, map 5\n"
                    "wake\n"
                    "send ENGINE attached tcp:1 epoch 2 is torn: killed\n");
    story_free(s);
}
END_TEST

/* Its communicators are gone, and perhaps the others wait for ever in the step that it died in: nobody may run ahead in
 * the same view.  The coordinator hears of it again with every connection, until a repair has replaced the view. */
START_TEST(engine_that_is_lost_tears_the_view)
{
    struct story *s = story_serving(3);
    engine_runs(s, 17);
    story_detach(s);
    story_expect(s, "page engine_state = 0\n"
                    "page revoked = 1\n"
                    "send ENGINE gone: killed\n");
    story_attach(s);
    story_happens(s, AE_LINK_DOWN);
    story_forget(s);
    story_link(s);
    story_expect(s, "send HELLO op 0 applied 1 next 18 map 1 idle attached\n"
                    "send ENGINE attached tcp:1 epoch 1 is torn: killed\n"
                    "send FLIPPED 1 held 0 ns\n");
    story_free(s);
}
END_TEST

START_TEST(flip_while_the_link_is_down_is_told_later)
{
    struct story *s = story_serving(3);
    story_prepares(s, 2);
    story_prepare(s, 2, 2, FLIP_VIEW, 250);
    story_go(s, 2, FLIP_VIEW, 11, 9, story_view(2, 2, 0, 5));
    story_happens(s, AE_LINK_DOWN);
    story_forget(s);
    engine_flips(s);
    story_happens(s, AE_BELL);
    story_expect(s, "remaining: SWITCH_AND_PREPARE --FLIPPED--> SWITCH_AND_PREPARE\n");
    story_link(s);
    story_expect(s, "send HELLO op 2 applied 2 next 12 map 5 running attached\n"
                    "send FLIPPED 2 held 0 ns\n");
    story_free(s);
}
END_TEST

START_TEST(in_doubt_the_engine_is_cut_off_and_the_gate_stays)
{
    struct story *s = story_serving(3);
    story_prepares(s, 2);
    AT_WORK_20MS(s);
    story_prepare(s, 2, 2, FLIP_VIEW, 250);
    story_happens(s, AE_LINK_DOWN);
    engine_held(s);
    story_forget(s);
    ck_assert_uint_le(agent_core_deadline(s->core), s->now + 30000 * STORY_MS);
    story_passes(s, 29999);
    story_expect(s, "");
    story_passes(s, 1);
    story_expect(s, "page revoked = 1\n"
                    "engine: revoke 1\n"
                    "engine: detach, held in doubt for too long without a coordinator\n"
                    "page engine_state = 0\n");
    ck_assert_uint_eq(s->page.gate, 24);
    story_free(s);
}
END_TEST

START_TEST(in_doubt_an_engine_that_is_not_held_goes_on)
{
    struct story *s = story_serving(3);
    story_prepares(s, 2);
    story_prepare(s, 2, 2, FLIP_VIEW, 250);
    story_happens(s, AE_LINK_DOWN);
    story_forget(s);
    story_passes(s, 60000); /* idle: nobody waits */
    story_expect(s, "");
    engine_held(s); /* now a request has come */
    story_happens(s, AE_BELL);
    story_expect(s, "page revoked = 1\n"
                    "engine: revoke 1\n"
                    "engine: detach, held in doubt for too long without a coordinator\n"
                    "page engine_state = 0\n");
    story_free(s);
}
END_TEST

/* ---- reset ---- */

START_TEST(reset_waits_until_the_engine_has_left_its_step)
{
    struct story *s = story_serving(3);
    engine_runs(s, 17); /* and never ends: a peer is dead */
    story_op_begin(s, 2, OP_REPAIR, ROLE_REMAINING, 2, 2, 0);
    story_expect(s, "remaining: NONE --OP_BEGIN--> PREPARE\n");
    story_prepare(s, 2, 2, FLIP_RESET, 250);
    story_expect(s, "remaining: PREPARE --ENGINE_PREPARE--> SWITCH_AND_PREPARE\n"
                    "page revoked = 1\n"
                    "engine: revoke 1\n"
                    "wake\n"
                    "page gate = 18\n");
    story_prepare(s, 2, 2, FLIP_RESET, 250);
    story_happens(s, AE_BELL);
    story_expect(s, "");
    struct agent_event left = {.type = AE_ENGINE_LEFT_STEP, .value = 17};
    story_event(s, &left);
    story_expect(s, "send PROMISE 2 limit 18 next 18 wave 0 running\n");
    story_go(s, 2, FLIP_RESET, 20, 5, story_view(2, 2, 0, 7));
    story_expect(s, "engine: commit view 2 at step 20, rank 0, map 7\n"
                    "page next_step = 20\n"
                    "page flip_wave = 5\n"
                    "page flip_step = 20\n"
                    "page flip_view = 2\n"
                    "page run_to = 21\n"
                    "page gate = open\n"
                    "wake\n");
    engine_flips(s);
    story_happens(s, AE_BELL);
    story_op(s, MSG_OP_END, 2, 0);
    story_expect(s, "send FLIPPED 2 held 0 ns\n"
                    "remaining: SWITCH_AND_PREPARE --FLIPPED--> SWITCH_AND_PREPARE\n"
                    "remaining: SWITCH_AND_PREPARE --END--> COMPLETE\n");
    story_free(s);
}
END_TEST

static void story_reload(struct story *s, uint64_t attempt)
{
    struct msg m = story_stage_msg(2, STAGE_RELOAD, attempt);
    m.stage.map = expert_map_new(1, 2, 2, 2);
    m.stage.map->held[1] = 1;
    m.stage.load = true;
    story_told(s, &m);
}

/* Slots are overwritten only when nothing that the engine has launched is on the device any more. */
START_TEST(reload_waits_for_the_device)
{
    story_can_load = true;
    struct story *s = story_serving(3);
    engine_runs(s, 17);
    story_op_begin(s, 2, OP_REPAIR, ROLE_REMAINING, 2, 2, 0);
    story_reload(s, 1); /* no promise yet: the engine may read them */
    story_prepare(s, 2, 2, FLIP_RESET, 250);
    struct agent_event left = {.type = AE_ENGINE_LEFT_STEP, .value = 17};
    s->page.launched = 17;
    s->page.done = 16;
    story_event(s, &left);
    story_forget(s);
    story_reload(s, 2);
    story_expect(s, "page notify_done = 17\n");
    story_reload(s, 2); /* a repeat changes nothing */
    story_expect(s, "");
    s->page.done = 17;
    story_happens(s, AE_BELL);
    story_expect(s, "work RELOAD\n"
                    "page notify_done = 0\n");
    story_work_done(s, 0, NULL);
    story_expect(s, "send STAGE_DONE RELOAD round 0 bytes 100\n");
    story_reload(s, 2);
    story_expect(s, "send STAGE_DONE RELOAD round 0 bytes 100\n");
    story_free(s);
}
END_TEST

/* Masked experts: into slots of a view that serves, as a FILL is. */
START_TEST(reload_of_masked_experts_waits_for_the_grace)
{
    story_can_load = true;
    struct story *s = story_serving(2);
    engine_runs(s, 17);
    story_op_begin(s, 2, OP_REBALANCE, ROLE_REMAINING, 2, 2, 0);
    story_forget(s);
    struct msg m = story_stage_msg(2, STAGE_RELOAD, 1);
    m.stage.map = expert_map_new(1, 2, 2, 2);
    m.stage.map->held[1] = 1;
    m.stage.load = true;
    m.stage.step = 18;
    story_told(s, &m);
    story_expect(s, "page notify_done = 17\n");
    s->page.launched = 18;
    s->page.done = 17; /* 18 is on the device, and uses a map without these slots */
    story_happens(s, AE_BELL);
    story_expect(s, "work RELOAD\n"
                    "page notify_done = 0\n");
    story_free(s);
}
END_TEST

START_TEST(reload_outside_of_a_promised_repair_is_refused)
{
    struct story *s = story_serving(2);
    story_op_begin(s, 2, OP_SCALE_DOWN, ROLE_REMAINING, 2, 2, 0);
    story_forget(s);
    story_reload(s, 1);
    story_expect(s, "send STAGE_DONE RELOAD round 0 invalid: RELOAD outside of a repair that was promised: the engine may be "
                    "reading the slots\n");
    story_free(s);
}
END_TEST

/* Its engine died before the switch, and the view has gone on without it: the next engine begins no step of that view. */
START_TEST(dismissed_without_an_engine_voids_its_view)
{
    struct story *s = story_new();
    story_link(s);
    story_attach(s);
    story_op_begin(s, 1, OP_SCALE_UP, ROLE_NEW, 3, 2, 2);
    story_stage(s, 1, STAGE_ALLOCATE, 1);
    story_work_done(s, 0, NULL);
    story_stage(s, 1, STAGE_KV, 1);
    story_stage(s, 1, STAGE_ENGINE_PREPARE, 1);
    story_prepared(s, 1, 1);
    story_prepare(s, 1, 1, FLIP_VIEW, 250);
    story_detach(s);
    story_go(s, 1, FLIP_VIEW, 20, 1, story_view(1, 2, 0, 1));
    story_forget(s);
    story_op(s, MSG_DISMISS, 2, 2);
    ck_assert_uint_eq(s->page.revoked, 1);
    story_free(s);
}
END_TEST

/* Something between the engines is broken.  The coordinator hears of it, with every connection, until there is a repair. */
START_TEST(step_that_fails_by_itself_is_reported)
{
    struct story *s = story_serving(3);
    engine_runs(s, 17);
    struct agent_event left = {.type = AE_ENGINE_LEFT_STEP, .value = 17, .epoch = 1};
    story_event(s, &left);
    story_expect(s, "send ENGINE attached tcp:1 epoch 1 is torn: step 17 of epoch 1 failed\n");
    story_happens(s, AE_LINK_DOWN);
    story_forget(s);
    story_link(s);
    story_expect(s, "send HELLO op 0 applied 1 next 18 map 1 running attached\n"
                    "send ENGINE attached tcp:1 epoch 1 is torn: step 17 of epoch 1 failed\n"
                    "send FLIPPED 1 held 0 ns\n");
    story_op_begin(s, 2, OP_REPAIR, ROLE_REMAINING, 2, 2, 0);
    story_prepare(s, 2, 2, FLIP_RESET, 250);
    story_forget(s);
    left.value = 18; /* revoked by now: it only leaves */
    story_event(s, &left);
    story_expect(s, "send PROMISE 2 limit 18 next 18 wave 0 running\n");
    story_go(s, 2, FLIP_RESET, 65553, 5, story_view(2, 2, 0, 7));
    story_forget(s);
    story_event(s, &left); /* late */
    story_expect(s, "");
    story_free(s);
}
END_TEST

/* A repair that was begun and given up leaves a torn view, whatever a restarted coordinator knows of it. */
START_TEST(reset_that_is_given_up_leaves_the_view_torn)
{
    struct story *s = story_serving(3);
    engine_runs(s, 17);
    story_op_begin(s, 2, OP_REPAIR, ROLE_REMAINING, 2, 2, 0);
    story_prepare(s, 2, 2, FLIP_RESET, 250);
    struct agent_event left = {.type = AE_ENGINE_LEFT_STEP, .value = 17};
    story_event(s, &left);
    story_happens(s, AE_LINK_DOWN);
    story_forget(s);
    story_link(s);
    story_expect(s, "send HELLO op 2 applied 1 promised 2 limit 18 next 18 map 1 running attached\n"
                    "send ENGINE attached tcp:1 epoch 1 is torn: its step was revoked for a repair that is not committed\n"
                    "send FLIPPED 1 held 0 ns\n");
    story_free(s);
}
END_TEST

START_TEST(reset_cuts_off_an_engine_that_stays_in_its_step)
{
    struct story *s = story_serving(3);
    engine_runs(s, 17);
    story_op_begin(s, 2, OP_REPAIR, ROLE_REMAINING, 2, 2, 0);
    story_prepare(s, 2, 2, FLIP_RESET, 250);
    story_happens(s, AE_LINK_DOWN);
    story_forget(s);
    story_passes(s, 4999);
    story_expect(s, "");
    story_passes(s, 1);
    story_expect(s, "engine: revoke 1\n"
                    "engine: detach, it did not leave a step that was revoked\n"
                    "page engine_state = 0\n");
    story_link(s); /* the promise is in HELLO */
    story_expect(s, "send HELLO op 2 applied 1 promised 2 limit 18 next 18 map 1 detached\n"
                    "send ENGINE gone: it did not leave a step that was revoked\n"
                    "send FLIPPED 1 held 0 ns\n");
    story_free(s);
}
END_TEST

START_TEST(reset_drops_an_unapplied_flip_and_overtakes_the_operation)
{
    struct story *s = story_serving(3);
    story_prepares(s, 2);
    AT_WORK_20MS(s);
    story_prepare(s, 2, 2, FLIP_VIEW, 250);
    story_go(s, 2, FLIP_VIEW, 30, 9, story_view(2, 2, 0, 5));
    engine_runs(s, 15);
    s->page.cur_view = 1;
    story_forget(s);
    story_op_begin(s, 3, OP_REPAIR, ROLE_REMAINING, 2, 2, 0);
    story_expect(s, "remaining: SWITCH_AND_PREPARE --ABORT--> ABORTED\n"
                    "cancel work of op 2\n" /* it was decided: the engine keeps what it has prepared */
                    "remaining: NONE --OP_BEGIN--> PREPARE\n");
    story_prepare(s, 3, 3, FLIP_RESET, 250);
    story_expect(s, "remaining: PREPARE --ENGINE_PREPARE--> SWITCH_AND_PREPARE\n"
                    "page revoked = 2\n" /* before the flip is taken back: views 1 and 2 are both void */
                    "engine: revoke 2\n"
                    "page flip_view = 1\n"
                    "wake\n"
                    "page gate = 16\n");
    s->page.done = 15;
    story_happens(s, AE_BELL);
    story_expect(s, "send PROMISE 3 limit 16 next 16 wave 4 running\n");
    story_go(s, 2, FLIP_VIEW, 30, 9, story_view(2, 2, 0, 5)); /* it was never true that view 2 was in use */
    story_expect(s, "");
    story_free(s);
}
END_TEST

/* A RESET takes the place of an outstanding promise; and is never followed by an open gate but through GO. */
START_TEST(reset_keeps_the_gate_shut)
{
    struct story *s = story_serving(3);
    story_prepares(s, 2);
    AT_WORK_20MS(s);
    story_prepare(s, 2, 2, FLIP_VIEW, 250);
    story_forget(s);
    s->page.done = 10;
    story_prepare(s, 3, 2, FLIP_RESET, 250);
    story_expect(s, "remaining: SWITCH_AND_PREPARE --ENGINE_PREPARE--> SWITCH_AND_PREPARE\n"
                    "page revoked = 1\n"
                    "engine: revoke 1\n"
                    "wake\n"
                    "page gate = 11\n"
                    "send PROMISE 3 limit 11 next 11 wave 4 running\n");
    story_abort(s, 2); /* of the promise that is gone */
    story_expect(s, "");
    story_prepare(s, 4, 2, FLIP_RESET, 250); /* another death */
    story_expect(s, "remaining: SWITCH_AND_PREPARE --ENGINE_PREPARE--> SWITCH_AND_PREPARE\n"
                    "engine: revoke 1\n"
                    "wake\n"
                    "page gate = 11\n"
                    "send PROMISE 4 limit 11 next 11 wave 4 running\n");
    story_abort(s, 4);
    ck_assert_uint_eq(s->page.gate, 11);
    story_free(s);
}
END_TEST

START_TEST(reset_without_engine)
{
    struct story *s = story_serving(3);
    story_detach(s);
    story_op_begin(s, 2, OP_REPAIR, ROLE_REMAINING, 2, 2, 0);
    story_forget(s);
    story_prepare(s, 2, 2, FLIP_RESET, 250);
    story_expect(s, "remaining: PREPARE --ENGINE_PREPARE--> SWITCH_AND_PREPARE\n"
                    "engine: revoke 1\n"
                    "wake\n"
                    "page gate = 11\n"
                    "send PROMISE 2 limit 11 next 11 wave 0 detached\n");
    story_attach(s); /* into a torn view: it waits for GO */
    story_expect(s, "engine: regions\nwake\nsend ENGINE attached tcp:1 epoch 1 is torn: killed\n");
    story_free(s);
}
END_TEST

START_TEST(repair_that_went_on_without_us)
{
    struct story *s = story_serving(3);
    engine_runs(s, 17);
    story_go(s, 5, FLIP_RESET, 30, 9, story_view(4, 2, NOT_IN_IT, 5));
    story_expect(s, "page revoked = 1\n"
                    "engine: revoke 1\n"
                    "engine: detach, the view has gone on without this rank\n"
                    "page engine_state = 0\n"
                    "send ENGINE gone: the view has gone on without this rank\n"
                    "work RELEASE\n");
    story_work_done(s, 0, NULL);
    story_expect(s, "page revoked = 4\n"
                    "page flip_view = 0\n"
                    "page run_to = 0\n"
                    "page map_pending = 0\n"
                    "page gate = open\n"
                    "send STAGE_DONE LET_GO round 0\n");
    story_free(s);
}
END_TEST

/* ---- planted mistakes ---- */

static struct story *story_promised(enum agent_bug bug)
{
    struct story *s = story_serving(3);
    story_prepares(s, 2);
    AT_WORK_20MS(s);
    agent_core_plant(s->core, bug);
    story_prepare(s, 2, 2, FLIP_VIEW, 250);
    return s;
}

START_TEST(bug_no_reread)
{
    struct story *s = story_serving(3);
    story_prepares(s, 2);
    agent_core_plant(s->core, AGENT_BUG_NO_REREAD);
    s->overtake = 11;
    story_prepare(s, 2, 2, FLIP_VIEW, 250);
    story_expect(s, "page gate = 11\nsend PROMISE 2 limit 11 next 11 wave 0 idle\n"); /* yet 11 has begun */
    story_free(s);
}
END_TEST

START_TEST(bug_gate_before_flip)
{
    struct story *s = story_promised(AGENT_BUG_GATE_BEFORE_FLIP);
    story_forget(s);
    story_go(s, 2, FLIP_VIEW, 30, 9, story_view(2, 2, 0, 5));
    story_expect(s, "engine: commit view 2 at step 30, rank 0, map 5\n"
                    "page gate = open\n"
                    "page flip_wave = 9\n"
                    "page flip_step = 30\n"
                    "page flip_view = 2\n"
                    "page run_to = 31\n"
                    "wake\n");
    story_free(s);
}
END_TEST

START_TEST(bug_go_next_boundary)
{
    struct story *s = story_promised(AGENT_BUG_GO_NEXT_BOUNDARY);
    story_go(s, 2, FLIP_VIEW, 30, 9, story_view(2, 2, 0, 5));
    ck_assert_uint_eq(s->page.flip_step, 11);
    story_free(s);
}
END_TEST

START_TEST(bug_attach_clears_gate)
{
    struct story *s = story_promised(AGENT_BUG_ATTACH_CLEARS_GATE);
    story_detach(s);
    ck_assert_uint_eq(s->page.gate, 24);
    story_attach(s);
    ck_assert_uint_eq(s->page.gate, GATE_OPEN);
    story_free(s);
}
END_TEST

START_TEST(bug_hold_times_out)
{
    struct story *s = story_promised(AGENT_BUG_HOLD_TIMES_OUT);
    story_happens(s, AE_LINK_DOWN);
    engine_held(s);
    story_forget(s);
    story_passes(s, 30000);
    story_expect(s, "page gate = open\nwake\n");
    story_free(s);
}
END_TEST

START_TEST(bug_run_to_not_raised)
{
    struct story *s = story_promised(AGENT_BUG_RUN_TO_NOT_RAISED);
    uint64_t before = s->page.run_to;
    story_go(s, 2, FLIP_VIEW, 30, 9, story_view(2, 2, 0, 5));
    ck_assert_uint_eq(s->page.flip_step, 30);
    ck_assert_uint_eq(s->page.run_to, before);
    story_free(s);
}
END_TEST

START_TEST(bug_early_flipped)
{
    struct story *s = story_promised(AGENT_BUG_EARLY_FLIPPED);
    story_go(s, 2, FLIP_VIEW, 30, 9, story_view(2, 2, 0, 5));
    story_forget(s);
    engine_runs(s, 29);
    story_happens(s, AE_BELL);
    story_expect(s, "send FLIPPED 2 held 0 ns\n"
                    "remaining: SWITCH_AND_PREPARE --FLIPPED--> SWITCH_AND_PREPARE\n");
    story_free(s);
}
END_TEST

START_TEST(bug_duplicate_go_opens_gate)
{
    struct story *s = story_leaver();
    agent_core_plant(s->core, AGENT_BUG_DUPLICATE_GO_OPENS_GATE);
    story_forget(s);
    story_go(s, 2, FLIP_VIEW, 30, 9, story_view(2, 2, NOT_IN_IT, 5));
    story_expect(s, "page gate = open\n");
    story_free(s);
}
END_TEST

int main(void)
{
    TCase *promise = tcase_create("promise"), *go = tcase_create("go"), *leave = tcase_create("leave");
    TCase *faults = tcase_create("faults"), *reset = tcase_create("reset"), *bugs = tcase_create("planted mistakes");
    tcase_add_test(promise, promise_lies_the_lead_ahead);
    tcase_add_test(promise, promise_of_an_idle_engine_is_its_next_step);
    tcase_add_test(promise, gate_is_raised_until_the_engine_is_below_it);
    tcase_add_test(promise, lead_has_a_limit);
    tcase_add_test(promise, abort_opens_the_gate_and_the_epoch_is_spent);
    tcase_add_test(promise, refuses_what_it_is_not_ready_for);
    tcase_add_test(go, go_writes_the_flip_before_it_opens_the_gate);
    tcase_add_test(go, duplicate_go_says_nothing_before_the_flip);
    tcase_add_test(go, go_that_breaks_the_promise_is_not_followed);
    tcase_add_test(go, abort_after_go_is_not_followed);
    tcase_add_test(go, joiner_promises_nothing_and_starts_at_s);
    tcase_add_test(go, withdrawn_joiner_does_not_touch_its_gate);
    tcase_add_test(go, map_flip_changes_no_membership_and_no_machine);
    tcase_add_test(leave, leaver_runs_up_to_s_and_lets_go_when_dismissed);
    tcase_add_test(leave, leaver_whose_engine_does_not_let_go_is_cut_off);
    tcase_add_test(leave, leaver_without_engine_is_at_its_boundary);
    tcase_add_test(leave, leaver_that_lost_its_engine_below_s_says_so_until_it_is_dismissed);
    tcase_add_test(leave, leaver_is_not_dismissed_by_an_old_word);
    tcase_add_test(leave, dismiss_means_nothing_to_those_who_stay);
    tcase_add_test(faults, promise_survives_link_and_engine);
    tcase_add_test(faults, engine_that_is_lost_tears_the_view);
    tcase_add_test(faults, flip_while_the_link_is_down_is_told_later);
    tcase_add_test(faults, in_doubt_the_engine_is_cut_off_and_the_gate_stays);
    tcase_add_test(faults, in_doubt_an_engine_that_is_not_held_goes_on);
    tcase_add_test(reset, reset_waits_until_the_engine_has_left_its_step);
    tcase_add_test(reset, reload_waits_for_the_device);
    tcase_add_test(reset, dismissed_without_an_engine_voids_its_view);
    tcase_add_test(reset, reload_outside_of_a_promised_repair_is_refused);
    tcase_add_test(reset, reload_of_masked_experts_waits_for_the_grace);
    tcase_add_test(reset, step_that_fails_by_itself_is_reported);
    tcase_add_test(reset, reset_that_is_given_up_leaves_the_view_torn);
    tcase_add_test(reset, reset_cuts_off_an_engine_that_stays_in_its_step);
    tcase_add_test(reset, reset_drops_an_unapplied_flip_and_overtakes_the_operation);
    tcase_add_test(reset, reset_keeps_the_gate_shut);
    tcase_add_test(reset, reset_without_engine);
    tcase_add_test(reset, repair_that_went_on_without_us);
    tcase_add_test(bugs, bug_no_reread);
    tcase_add_test(bugs, bug_gate_before_flip);
    tcase_add_test(bugs, bug_go_next_boundary);
    tcase_add_test(bugs, bug_attach_clears_gate);
    tcase_add_test(bugs, bug_hold_times_out);
    tcase_add_test(bugs, bug_run_to_not_raised);
    tcase_add_test(bugs, bug_early_flipped);
    tcase_add_test(bugs, bug_duplicate_go_opens_gate);
    TCase *const cases[] = {promise, go, leave, faults, reset, bugs};
    return story_run("agent commit", cases, sizeof(cases) / sizeof(cases[0]));
}
