/* Step boundaries of libeep against a real engine socket: views, the gate, maps, revoke, leaving and coming back.  The
 * test plays the agent's core and the engine. */
#include "engine_player.h"

/* ---- views ---- */

START_TEST(prepare_commit_and_flip_at_the_step)
{
    attach();
    give_regions(2);
    begin(true, 0, EEP_STEP_IDLE); /* a spare runs nothing, whatever it has */
    ck_assert_uint_eq(atomic_load(&agent.page->intent), 0);

    struct view *proposed = view_make(0, 3, 1, 2, 1);
    agent_do(&agent, (struct agent_action){.type = AA_ENGINE_PREPARE, .view = proposed, .op = 5, .attempt = 2});
    view_unref(proposed);
    struct record p = records_expect(&said, EEP_EVENT_PREPARE);
    ck_assert_uint_eq(p.op, 5);
    ck_assert_int_eq(p.view->rank, 1);
    ck_assert_uint_eq(p.view->n, 3);
    ck_assert_uint_eq(p.view->kv_bytes, 1234);
    ck_assert_str_eq(p.view->members[2].endpoint, "unix:/engine-2");
    eep_view_unref(p.view);
    ck_assert_int_eq(eep_prepared(eep, p.op, p.attempt, ERR_IO, "no room"), 0);
    struct record r = records_expect(&agent.events, AE_ENGINE_PREPARED);
    ck_assert_uint_eq(r.op, 5);
    ck_assert_uint_eq(r.attempt, 2);
    ck_assert_int_eq(r.code, ERR_IO);
    ck_assert_str_eq(r.text, "no room");

    join();
    struct eep_step s = begin(false, -1, EEP_STEP_RUN);
    ck_assert_uint_eq(s.step, 1);
    ck_assert(s.view_changed && s.map_changed);
    ck_assert_uint_eq(s.view->epoch, 1);
    ck_assert_uint_eq(s.wave, 10);
    ck_assert_uint_eq(s.held_ns, 0);
    end(true);

    go(2, 3, 1, 2, 1, 4);
    sleep_ms(30); /* a lead: libeep's thread has the view before its step */
    const struct eep_view *old = s.view;
    for (uint64_t n = 2; n < 4; n++) {
        s = begin(true, 0, EEP_STEP_RUN);
        ck_assert_uint_eq(s.step, n);
        ck_assert_uint_eq(s.view->epoch, 1);
        ck_assert(!s.view_changed);
        end(true);
    }
    unsigned bells = agent_bells(&agent);
    s = begin(true, 0, EEP_STEP_RUN);
    ck_assert_uint_eq(s.step, 4);
    ck_assert(s.view_changed);
    ck_assert_uint_eq(s.view->epoch, 2);
    ck_assert_int_eq(s.view->rank, 1);
    ck_assert_uint_eq(old->epoch, 1); /* valid until the next view has been used */
    ck_assert_uint_eq(atomic_load(&agent.page->cur_view), 2);
    ck_assert_uint_eq(atomic_load(&agent.page->last_hold_ns), 0);
    ck_assert_uint_eq(eep_maps_get(eep)->version, 2);
    agent_expect_bell(&agent, bells);
    end(false);
    struct eep_stats stats;
    eep_stats_get(eep, &stats);
    ck_assert_uint_eq(stats.flips, 2);
    ck_assert_uint_eq(stats.steps, 4);
    ck_assert_uint_eq(stats.holds, 0);
}
END_TEST

START_TEST(a_view_beyond_max_ranks_is_declined)
{
    attach();
    struct view *view = view_make(0, 9, 0, 1, 0);
    agent_do(&agent, (struct agent_action){.type = AA_ENGINE_PREPARE, .view = view, .op = 5, .attempt = 1});
    view_unref(view);
    struct record r = records_expect(&agent.events, AE_ENGINE_PREPARED);
    ck_assert_int_eq(r.code, ERR_LIMIT);
    records_expect_none(&said, 10);
}
END_TEST

/* The page can be faster than the message: the engine waits for the view that it has switched to. */
START_TEST(a_flip_waits_for_its_view)
{
    attach();
    join();
    begin(false, -1, EEP_STEP_RUN);
    end(true);
    write_flip((struct flip){.epoch = 2, .step = 2});
    struct beginner b;
    beginner_start(&b, true, -1);
    for (int i = 0; i < 1000 && atomic_load(&agent.page->cur_view) != 2; i++)
        sleep_ms(1);
    sleep_ms(30);
    struct view *view = view_make(2, 2, 0, 2, 1);
    send_commit(view, 2);
    view_unref(view);
    beginner_join(&b, EEP_STEP_RUN);
    ck_assert_uint_eq(b.step.view->epoch, 2);
    ck_assert_uint_ge(b.step.held_ns, 20000000);
    end(false);

    write_flip((struct flip){.epoch = 3, .step = 3}); /* an engine with nothing to run is not held by that */
    beginner_start(&b, false, -1);
    sleep_ms(30);
    view = view_make(3, 2, 0, 3, 1);
    send_commit(view, 3);
    view_unref(view);
    beginner_join(&b, EEP_STEP_RUN);
    ck_assert_uint_eq(b.step.view->epoch, 3);
    ck_assert_uint_eq(b.step.held_ns, 0);
    end(false);
}
END_TEST

START_TEST(a_map_only_flip_keeps_the_communicators)
{
    attach();
    give_regions(1);
    join();
    begin(false, -1, EEP_STEP_RUN);
    end(true);
    go(2, 2, 0, 2, 1, 2);
    struct eep_step s = begin(true, 0, EEP_STEP_RUN);
    ck_assert_uint_eq(s.view->epoch, 2);
    ck_assert(s.map_changed && !s.view_changed);
    end(false);
}
END_TEST

/* ---- the gate ---- */

START_TEST(a_hold_is_waited_out_and_measured)
{
    attach();
    join();
    begin(false, -1, EEP_STEP_RUN);
    end(true);
    agent_store(&agent, PAGE_GATE, 3);
    begin(true, 0, EEP_STEP_RUN); /* step 2 is below the gate */
    end(true);
    unsigned bells = agent_bells(&agent);
    struct beginner b;
    beginner_start(&b, true, 0);
    agent_expect_bell(&agent, bells);
    agent_expect_state(&agent, PAGE_ENGINE_HELD);
    ck_assert_uint_eq(atomic_load(&agent.page->intent), 2);
    sleep_ms(20);
    uint64_t syscalls = atomic_load(&agent.page->boundary_syscalls);
    sleep_ms(60);
    ck_assert_uint_eq(atomic_load(&agent.page->boundary_syscalls), syscalls); /* it sleeps, it does not spin */
    go(2, 3, 2, 2, 0, 3);
    beginner_join(&b, EEP_STEP_RUN);
    ck_assert_uint_eq(b.step.step, 3);
    ck_assert(b.step.view_changed);
    ck_assert_uint_ge(b.step.held_ns, 60000000);
    ck_assert_uint_eq(atomic_load(&agent.page->last_hold_ns), b.step.held_ns);
    ck_assert_uint_eq(atomic_load(&agent.page->holds), 1);
    struct eep_stats stats;
    eep_stats_get(eep, &stats);
    ck_assert_uint_eq(stats.holds, 1);
    ck_assert_uint_eq(stats.longest_hold_ns, b.step.held_ns);
    unsigned bucket = 0;
    while (b.step.held_ns >> (bucket + 1))
        bucket++;
    ck_assert_uint_eq(stats.hold_histogram[bucket], 1);
    end(false);
}
END_TEST

START_TEST(an_aborted_promise_lets_the_engine_go_on)
{
    attach();
    join();
    begin(false, -1, EEP_STEP_RUN);
    end(true);
    agent_store(&agent, PAGE_GATE, 2);
    struct beginner b;
    beginner_start(&b, true, 0);
    agent_expect_state(&agent, PAGE_ENGINE_HELD);
    eep_wake(eep); /* an engine that must look at something else gets out, and is still held when it comes back */
    beginner_join(&b, EEP_STEP_IDLE);
    beginner_start(&b, true, 0);
    sleep_ms(20);
    agent_store(&agent, PAGE_GATE, GATE_OPEN);
    agent_wake(&agent);
    beginner_join(&b, EEP_STEP_RUN);
    ck_assert_uint_eq(b.step.view->epoch, 1);
    ck_assert_uint_ge(b.step.held_ns, 20000000);
    end(false);
}
END_TEST

START_TEST(idle_waves_and_wake_ups)
{
    attach();
    join();
    begin(false, -1, EEP_STEP_RUN);
    end(false);
    begin(false, 0, EEP_STEP_IDLE);
    uint64_t before = clock_now_ns();
    begin(false, 30, EEP_STEP_IDLE);
    ck_assert_uint_ge(clock_now_ns() - before, 29000000);
    ck_assert_uint_eq(atomic_load(&agent.page->engine_state), PAGE_ENGINE_IDLE);

    struct beginner b;
    beginner_start(&b, false, -1);
    sleep_ms(10);
    agent_wake(&agent); /* nothing to do: it goes on waiting */
    sleep_ms(10);
    eep_wake(eep);
    beginner_join(&b, EEP_STEP_IDLE);
    records_expect_none(&agent.events, 10);

    struct eep_step s = begin(true, 0, EEP_STEP_RUN); /* starts a wave */
    struct record r = records_expect(&agent.events, AE_ENGINE_WAVE);
    ck_assert_uint_eq(r.value, s.step);
    ck_assert_uint_eq(r.epoch, 1);
    end(false);

    beginner_start(&b, false, -1); /* a peer's wave: run_to is raised */
    sleep_ms(10);
    agent_store(&agent, PAGE_RUN_TO, s.step + 2);
    agent_wake(&agent);
    beginner_join(&b, EEP_STEP_RUN);
    ck_assert_uint_eq(b.step.step, s.step + 1);
    ck_assert_uint_eq(b.step.held_ns, 0);
    end(false);
    records_expect_none(&agent.events, 10);
}
END_TEST

START_TEST(a_done_step_rings_when_asked_to)
{
    attach();
    join();
    agent_store(&agent, PAGE_NOTIFY_DONE, 3);
    begin(false, -1, EEP_STEP_RUN);
    end(true);
    begin(true, 0, EEP_STEP_RUN);
    end(true);
    sleep_ms(30); /* the flip has rung, too */
    unsigned bells = agent_bells(&agent);
    begin(true, 0, EEP_STEP_RUN);
    end(true);
    agent_expect_bell(&agent, bells);
    bells = agent_bells(&agent);
    begin(true, 0, EEP_STEP_RUN);
    end(true);
    sleep_ms(20);
    ck_assert_uint_eq(agent_bells(&agent), bells); /* once */
    ck_assert_uint_gt(atomic_load(&agent.page->step_ns_min), 0);
}
END_TEST

/* ---- maps ---- */

static void send_map(uint64_t version, unsigned shift)
{
    struct view *view = view_make(1, 2, 0, version, shift);
    view->map->live[expert_map_at(view->map, 1, 1, 3)] = 0; /* a dormant slot */
    agent_do(&agent, (struct agent_action){.type = AA_ENGINE_MAP, .map = view->map});
    view_unref(view);
    agent_store(&agent, PAGE_MAP_PENDING, version);
    agent_wake(&agent);
}

/* A slot with several entries: as many times among its expert's, after every replica has come once. */
START_TEST(entries_repeat_a_slot)
{
    attach();
    give_regions(1);
    join();
    const struct eep_maps *maps = eep_maps_get(eep);
    ck_assert_uint_eq(maps->max_replicas, ENTRIES_MAX > maps->max_ranks ? ENTRIES_MAX : maps->max_ranks);
    begin(false, -1, EEP_STEP_RUN);
    struct view *view = view_make(1, 2, 0, 2, 0);
    view->map->live[expert_map_at(view->map, 1, 0, 0)] = 3;
    view->map->live[expert_map_at(view->map, 1, 1, 1)] = ENTRIES_MAX - 1;
    agent_do(&agent, (struct agent_action){.type = AA_ENGINE_MAP, .map = view->map});
    view_unref(view);
    agent_store(&agent, PAGE_MAP_PENDING, 2);
    agent_wake(&agent);
    sleep_ms(10);
    end(true);
    begin(true, 0, EEP_STEP_RUN);
    ck_assert_uint_eq(maps->version, 2);
    const int32_t *count = maps->logical_replica_count + LOGICAL;
    const int32_t *slots = maps->logical_to_physical_map + (size_t)LOGICAL * maps->max_replicas;
    const int32_t want[] = {0, SLOTS, 0, 0, -1};
    ck_assert_int_eq(count[0], 4);
    for (int i = 0; i < 5; i++)
        ck_assert_int_eq(slots[i], want[i]);
    slots += maps->max_replicas;
    ck_assert_int_eq(count[1], ENTRIES_MAX);
    for (int i = 0; i < ENTRIES_MAX; i++)
        ck_assert_int_eq(slots[i], i == 0 ? 1 : SLOTS + 1);
    ck_assert_int_eq(maps->logical_replica_count[0], 2);
    ck_assert_int_eq(maps->physical_to_logical_map[maps->max_ranks * SLOTS + SLOTS + 1], 1);
    end(false);
}
END_TEST

START_TEST(maps_are_rewritten_in_place_at_boundaries)
{
    attach();
    give_regions(1);
    join();
    const struct eep_maps *maps = eep_maps_get(eep);
    const int32_t *physical = maps->physical_to_logical_map;
    begin(false, -1, EEP_STEP_RUN);
    ck_assert_uint_eq(maps->version, 1);
    ck_assert_int_eq(physical[0], 0);
    ck_assert_int_eq(physical[2 * SLOTS], -1); /* beyond the ranks of the view */
    send_map(2, 1);
    sleep_ms(10);
    ck_assert_int_eq(physical[0], 0); /* not inside a step */
    end(true);
    unsigned bells = agent_bells(&agent);
    struct eep_step s = begin(true, 0, EEP_STEP_RUN);
    ck_assert(s.map_changed && !s.view_changed);
    ck_assert_uint_eq(s.step, 2);
    ck_assert_int_eq(physical[0], 1);
    ck_assert_ptr_eq(eep_maps_get(eep)->physical_to_logical_map, physical);
    ck_assert_int_eq(physical[maps->max_ranks * SLOTS + SLOTS + 3], -1);
    /* expert 1 of layer 0: slot 0 of both ranks; expert 0 of layer 1: the dormant replica does not count */
    ck_assert_int_eq(maps->logical_replica_count[1], 2);
    ck_assert_int_eq(maps->logical_to_physical_map[1 * maps->max_replicas], 0);
    ck_assert_int_eq(maps->logical_to_physical_map[1 * maps->max_replicas + 1], SLOTS);
    ck_assert_int_eq(maps->logical_to_physical_map[1 * maps->max_replicas + 2], -1);
    ck_assert_int_eq(maps->logical_replica_count[LOGICAL + 0], 1);
    ck_assert_uint_eq(atomic_load(&agent.page->map_applied), 2);
    ck_assert_uint_eq(atomic_load(&agent.page->map_applied_step), 2);
    agent_expect_bell(&agent, bells);
    end(false);
    s = begin(false, 0, EEP_STEP_IDLE);

    struct beginner b; /* also while it sleeps */
    beginner_start(&b, false, -1);
    sleep_ms(10);
    bells = agent_bells(&agent);
    send_map(3, 2);
    agent_expect_bell(&agent, bells);
    ck_assert_uint_eq(atomic_load(&agent.page->map_applied), 3);
    ck_assert_uint_eq(atomic_load(&agent.page->map_applied_step), 3);
    eep_wake(eep);
    beginner_join(&b, EEP_STEP_IDLE);
    s = begin(true, 0, EEP_STEP_RUN);
    ck_assert(s.map_changed);
    end(false);
}
END_TEST

/* ---- revoke ---- */

static void do_revoke(uint64_t epoch)
{
    agent_store(&agent, PAGE_REVOKED, epoch);
    agent_do(&agent, (struct agent_action){.type = AA_ENGINE_REVOKE, .epoch = epoch, .text = "gpu1 is lost"});
    agent_wake(&agent);
    agent_store(&agent, PAGE_GATE, atomic_load(&agent.page->intent) + 1);
}

static void repair(uint64_t epoch, uint64_t step)
{
    struct view *view = view_make(epoch, 1, 0, epoch, 0);
    send_commit(view, step);
    view_unref(view);
    write_flip((struct flip){.epoch = epoch, .step = step, .next_step = step});
}

START_TEST(revoked_inside_a_step)
{
    attach();
    join();
    struct eep_step s = begin(false, -1, EEP_STEP_RUN);
    ck_assert(!eep_revoked(eep) && !readable(eep_revoke_fd(eep)));
    do_revoke(1);
    struct record r = records_expect(&said, EEP_EVENT_REVOKE);
    ck_assert_uint_eq(r.epoch, 1);
    ck_assert_str_eq(r.text, "gpu1 is lost");
    ck_assert(eep_revoked(eep) && readable(eep_revoke_fd(eep)));
    records_expect_none(&agent.events, 20); /* it is still inside */
    ck_assert_int_eq(eep_step_failed(eep), 0);
    ck_assert_uint_eq(records_expect(&agent.events, AE_ENGINE_LEFT_STEP).value, s.step);

    struct beginner b;
    beginner_start(&b, true, -1);
    agent_expect_state(&agent, PAGE_ENGINE_HELD);
    sleep_ms(20);
    repair(2, 9);
    beginner_join(&b, EEP_STEP_RUN);
    ck_assert_uint_eq(b.step.step, 9);
    ck_assert_uint_eq(b.step.view->epoch, 2);
    ck_assert(b.step.view_changed);
    ck_assert_uint_ge(b.step.held_ns, 20000000);
    ck_assert(!eep_revoked(eep) && !readable(eep_revoke_fd(eep)));
    end(false);
    records_expect_none(&agent.events, 10);
}
END_TEST

/* The engine's own connections broke before the agent knew: it waits for the repair all the same. */
START_TEST(a_failed_step_waits_for_the_next_view)
{
    attach();
    join();
    struct eep_step s = begin(false, -1, EEP_STEP_RUN);
    ck_assert_int_eq(eep_step_failed(eep), 0);
    ck_assert_int_eq(eep_step_failed(eep), ERR_INVALID);
    struct record left = records_expect(&agent.events, AE_ENGINE_LEFT_STEP);
    ck_assert_uint_eq(left.value, s.step);
    ck_assert_uint_eq(left.epoch, 1); /* so that the agent asks for a repair */
    struct beginner b;
    beginner_start(&b, true, -1);
    agent_expect_state(&agent, PAGE_ENGINE_HELD);
    do_revoke(1);
    records_expect(&agent.events, AE_ENGINE_LEFT_STEP); /* said once more, for the revoke */
    records_expect(&said, EEP_EVENT_REVOKE);
    repair(2, 5);
    beginner_join(&b, EEP_STEP_RUN);
    ck_assert_uint_eq(b.step.step, 5);
    end(false);
}
END_TEST

START_TEST(revoked_while_idle_or_held)
{
    attach();
    join();
    begin(false, -1, EEP_STEP_RUN);
    end(false);
    struct beginner b;
    beginner_start(&b, false, -1);
    agent_expect_state(&agent, PAGE_ENGINE_IDLE);
    do_revoke(1);
    ck_assert_uint_eq(records_expect(&agent.events, AE_ENGINE_LEFT_STEP).value, 1);
    records_expect(&said, EEP_EVENT_REVOKE);
    repair(2, 3);
    beginner_join(&b, EEP_STEP_RUN);
    ck_assert_uint_lt(b.step.held_ns, 20000000); /* it had nothing to run until the repair asked it to */
    end(true);

    agent_store(&agent, PAGE_GATE, 4);
    beginner_start(&b, true, -1);
    agent_expect_state(&agent, PAGE_ENGINE_HELD);
    do_revoke(2);
    ck_assert_uint_eq(records_expect(&agent.events, AE_ENGINE_LEFT_STEP).value, 3);
    repair(3, 6);
    beginner_join(&b, EEP_STEP_RUN);
    ck_assert_uint_eq(b.step.step, 6);
    ck_assert_uint_gt(b.step.held_ns, 0);
    end(false);
}
END_TEST

/* A step that completes although it was revoked counts as left. */
START_TEST(revoked_step_that_ends_well)
{
    attach();
    join();
    struct eep_step s = begin(false, -1, EEP_STEP_RUN);
    do_revoke(1);
    records_expect(&said, EEP_EVENT_REVOKE);
    end(true);
    ck_assert_uint_eq(records_expect(&agent.events, AE_ENGINE_LEFT_STEP).value, s.step);
    (void)s;
}
END_TEST

/* ---- leaving ---- */

START_TEST(leave_release_and_join_again)
{
    attach();
    give_regions(2);
    join();
    begin(false, -1, EEP_STEP_RUN);
    end(true);
    agent_do(&agent, (struct agent_action){.type = AA_ENGINE_DRAIN, .value = 1500});
    ck_assert_uint_eq(records_expect(&said, EEP_EVENT_DRAIN).value, 1500);
    ck_assert_int_eq(eep_drained(eep), 0);
    records_expect(&agent.events, AE_ENGINE_DRAINED);

    agent_store(&agent, PAGE_GATE, 3);
    go(2, 1, -1, 2, 0, 3);
    ck_assert_uint_eq(begin(true, 0, EEP_STEP_RUN).step, 2);
    end(true);
    unsigned bells = agent_bells(&agent);
    begin(true, 0, EEP_STEP_LEFT);
    agent_expect_bell(&agent, bells);
    ck_assert_uint_eq(atomic_load(&agent.page->engine_state), PAGE_ENGINE_IDLE);
    begin(true, 0, EEP_STEP_IDLE); /* said once; a spare now */

    agent_do(&agent, (struct agent_action){.type = AA_ENGINE_RELEASE});
    records_expect(&said, EEP_EVENT_RELEASE);
    ck_assert_int_eq(eep_released(eep), 0);
    records_expect(&agent.events, AE_ENGINE_RELEASED);
    struct eep_tensor t;
    ck_assert_int_eq(eep_tensor_get(eep, "dense", &t), ERR_NOTFOUND);
    ck_assert_ptr_null(eep_maps_get(eep));

    agent_do(&agent, (struct agent_action){.type = AA_ENGINE_REGIONS}); /* the agent has them still */
    records_expect(&said, EEP_EVENT_REGIONS);
    ck_assert_int_eq(eep_tensor_get(eep, "dense", &t), 0);
    ck_assert_int_eq(eep_maps_get(eep)->physical_to_logical_map[0], -1);
    agent_store(&agent, PAGE_NEXT_STEP, 20);
    struct beginner b;
    beginner_start(&b, false, -1);
    go(3, 2, 1, 3, 1, 20);
    beginner_join(&b, EEP_STEP_RUN);
    ck_assert_uint_eq(b.step.step, 20);
    ck_assert_uint_eq(b.step.view->epoch, 3);
    ck_assert(b.step.view_changed);
    ck_assert_int_eq(eep_maps_get(eep)->physical_to_logical_map[0], 1);
    end(false);
}
END_TEST

/* ---- a new process in the old one's place ---- */

START_TEST(attached_again_the_gate_still_holds)
{
    attach();
    give_regions(1);
    join();
    begin(false, -1, EEP_STEP_RUN);
    end(false);
    agent_store(&agent, PAGE_GATE, 2);
    eep_detach(eep);
    records_expect(&agent.events, AE_ENGINE_DETACHED);
    attach();
    ck_assert_uint_eq(atomic_load(&agent.page->gate), 2);
    agent_do(&agent, (struct agent_action){.type = AA_ENGINE_REGIONS});
    records_expect(&said, EEP_EVENT_REGIONS);
    begin(true, 0, EEP_STEP_IDLE); /* no view yet */
    struct view *view = view_make(1, 2, 0, 1, 0);
    send_commit(view, 1);
    view_unref(view);
    struct beginner b;
    beginner_start(&b, true, -1);
    agent_expect_state(&agent, PAGE_ENGINE_HELD);
    agent_store(&agent, PAGE_GATE, GATE_OPEN);
    agent_wake(&agent);
    beginner_join(&b, EEP_STEP_RUN);
    ck_assert_uint_eq(b.step.step, 2);
    ck_assert(b.step.view_changed && b.step.map_changed);
    ck_assert_uint_gt(b.step.held_ns, 0);
    end(false);
}
END_TEST

/* ---- no system call ---- */

START_TEST(a_boundary_with_nothing_pending_makes_no_system_call)
{
    attach();
    join();
    begin(false, -1, EEP_STEP_RUN);
    end(true);
    struct eep_stats before, after;
    eep_stats_get(eep, &before);
    for (int i = 0; i < 10000; i++) {
        begin(true, 0, EEP_STEP_RUN);
        end(true);
    }
    eep_stats_get(eep, &after);
    ck_assert_uint_eq(after.steps - before.steps, 10000);
    ck_assert_uint_eq(after.boundary_syscalls, before.boundary_syscalls);
    ck_assert_uint_gt(before.boundary_syscalls, 0); /* the counter counts: the flip rang the bell */
}
END_TEST

/* ---- many maps, flips and revokes against a running engine: for the thread sanitizer ---- */

static atomic_bool storm_over;

static void *storm_main(void *user)
{
    uint64_t *steps = user;
    struct eep_step s;
    while (!atomic_load(&storm_over)) {
        int rc = eep_step_begin(eep, NULL, true, 10, &s);
        if (rc != EEP_STEP_RUN)
            continue;
        (*steps)++;
        if (s.view->n == 0 || eep_maps_get(eep)->physical_to_logical_map[0] < 0)
            abort();
        if (eep_revoked(eep))
            eep_step_failed(eep);
        else
            eep_step_end(eep, NULL, true);
    }
    return NULL;
}

START_TEST(a_storm_of_changes)
{
    attach();
    give_regions(1);
    join();
    pthread_t thread;
    uint64_t steps = 0, version = 1;
    atomic_store(&storm_over, false);
    ck_assert_int_eq(pthread_create(&thread, NULL, storm_main, &steps), 0);
    for (int i = 0; i < 1000 && atomic_load(&agent.page->cur_view) != 1; i++)
        sleep_ms(1);
    for (uint64_t epoch = 2; epoch < 30; epoch++) { /* one flip at a time */
        version++;
        send_map(version, (unsigned)version);
        if (epoch % 3 == 0)
            do_revoke(epoch - 1);
        version++;
        struct view *view = view_make(epoch, 2, 0, version, (unsigned)version);
        uint64_t step = atomic_load(&agent.page->intent) + 5;
        send_commit(view, step);
        view_unref(view);
        write_flip((struct flip){.epoch = epoch, .step = step, .next_step = epoch % 3 == 0 ? step : 0});
        for (int i = 0; i < 2000 && atomic_load(&agent.page->cur_view) != epoch; i++)
            sleep_ms(1);
        ck_assert_uint_eq(atomic_load(&agent.page->cur_view), epoch);
    }
    atomic_store(&storm_over, true);
    eep_wake(eep);
    pthread_join(thread, NULL);
    ck_assert_uint_gt(steps, 30);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("libeep steps");
    TCase *tc = group(suite, "views");
    tcase_add_test(tc, prepare_commit_and_flip_at_the_step);
    tcase_add_test(tc, a_view_beyond_max_ranks_is_declined);
    tcase_add_test(tc, a_flip_waits_for_its_view);
    tcase_add_test(tc, a_map_only_flip_keeps_the_communicators);
    tcase_add_test(tc, leave_release_and_join_again);
    tcase_add_test(tc, attached_again_the_gate_still_holds);
    tc = group(suite, "steps");
    tcase_add_test(tc, a_hold_is_waited_out_and_measured);
    tcase_add_test(tc, an_aborted_promise_lets_the_engine_go_on);
    tcase_add_test(tc, idle_waves_and_wake_ups);
    tcase_add_test(tc, a_done_step_rings_when_asked_to);
    tcase_add_test(tc, entries_repeat_a_slot);
    tcase_add_test(tc, maps_are_rewritten_in_place_at_boundaries);
    tcase_add_test(tc, a_boundary_with_nothing_pending_makes_no_system_call);
    tcase_add_test(tc, a_storm_of_changes);
    tc = group(suite, "revoke");
    tcase_add_test(tc, revoked_inside_a_step);
    tcase_add_test(tc, a_failed_step_waits_for_the_next_view);
    tcase_add_test(tc, revoked_while_idle_or_held);
    tcase_add_test(tc, revoked_step_that_ends_well);
    return suite_run(suite);
}
