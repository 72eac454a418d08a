/* The engine's half of the commit protocol: the gate loop on the control page, one atomic step at a time.
 *
 * libeep's step begin is
 *     do gate_announce(); while (gate_check() == GATE_HELD && wait);
 * and the simulator calls the same functions with other actors in between.  Pure: the page and a local struct.
 *
 *   if not (running or has_work or n < run_to): idle
 *   intent = n
 *   if n >= gate: intent = n-1; wait; start over
 *   if next_step > n: n = next_step; intent = n; look at the gate again
 *   if a flip is pending and n >= flip_step: switch view; cur_view = its epoch
 *   if that view is revoked, or there is none: intent = n-1; wait; start over
 *
 * What the agent must keep to: flip_step, flip_wave and next_step are stored before flip_view, flip_view before gate;
 * revoked is stored before flip_view is taken back.  Steps are counted from 1, so that 0 is "none" in every word. */
#ifndef EEP_LIBEEP_GATE_H
#define EEP_LIBEEP_GATE_H

#include <stdbool.h>

#include "common/page.h"

struct gate_local {
    uint64_t next;     /* n: the step that would begin next */
    bool running;      /* inside a wave */
    uint64_t view;     /* epoch of the view in use; 0 = none yet */
    uint64_t wave;     /* current_wave */
    uint64_t map;      /* map_version in use */
};

enum gate_verdict {
    GATE_IDLE,    /* nothing to run: wait for work or a wake-up */
    GATE_HELD,    /* at the gate: wait for a wake-up, then start over */
    GATE_RUN,     /* step `next` has begun */
};

/* Takes over next_step, applies nothing else; decides idle or announces intent = next. */
enum gate_verdict gate_announce(struct control_page *page, struct gate_local *local, bool has_work);
/* After gate_announce returned GATE_RUN: GATE_RUN (begun; *ret_flip tells that view `local->view` is new with this
 * step, *ret_wave_start that this rank starts a wave others must be told of) or GATE_HELD. */
enum gate_verdict gate_check(struct control_page *page, struct gate_local *local, bool *ret_flip, bool *ret_wave_start);
/* A (re-)attached engine takes up the page where the last one left it: a step that may have begun is not run again. */
void gate_attach(struct control_page *page, struct gate_local *local);
/* gate_complete in two halves, for engines that launch step n+1 while n still runs on the device. */
void gate_launched(struct control_page *page, struct gate_local *local, bool any_work);
void gate_done(struct control_page *page, uint64_t step);
/* The step that gate_check began has completed on the device; any_work: some rank of the view still has work. */
void gate_complete(struct control_page *page, struct gate_local *local, bool any_work);
/* The step failed (revoked): its number is never run again.  gate_left is all of it but gate_done, for work that the
 * device has not come to the end of. */
void gate_left(struct control_page *page, struct gate_local *local);
void gate_fail(struct control_page *page, struct gate_local *local);
/* At a boundary: is a map pending?  If so the caller applies version *ret_version and calls gate_map_applied. */
bool gate_map_pending(struct control_page *page, const struct gate_local *local, uint64_t *ret_version);
void gate_map_applied(struct control_page *page, struct gate_local *local, uint64_t version);

#endif
