/* The parties of an NCCL group talk to each other beside NCCL: one socket for each pair, made by the host transport.
 *
 * NCCL alone cannot say which party did not come, does not notice that two plans differ (it hangs, or mixes bytes up),
 * and where bytes go by NVLink it never learns that a peer has died.  So there is a plan to compare before the bytes
 * go, a beat every 50 ms while they go, a word when they are there, and a closed connection when a party is gone.
 *
 *     every pair that has bytes for each other, once a call:
 *         PLAN{bytes, shape} <-> PLAN   BEAT{groups done} ... <-> BEAT ...   DONE <-> DONE
 *     when a group is created, all first tell each other by WORDs whether they still have a communicator that will do;
 *     if not all have, party 0 sends SECRET{NCCL's unique id}
 *     a party that gives up says LEAVE{who is to blame, why}, so that the others blame the same one, not this one;
 *     at the group's end each says LEAVE without a reason
 *
 * Worker thread.  No CUDA, no NCCL in here. */
#ifndef EEP_AGENT_TRANSPORT_NCCL_CONTROL_H
#define EEP_AGENT_TRANSPORT_NCCL_CONTROL_H

#include "agent/transport.h"

#define CONTROL_SECRET_BYTES 128u

struct control;

/* Connects all pairs through `mesh` (a host transport); names the party that does not come. */
int control_open(struct transport *mesh, const struct blob *id, const struct member *parties, uint32_t n, uint32_t self,
                 const struct transport_call *call, struct control **ret_control, struct err *err) MUST_CHECK;
/* rc: 0, or the error that ends the group, of which the others are told.  Takes NULL. */
void control_close(struct control *c, int rc);

/* A call begins.  doing: "moving weights", for sentences; lives until the next begin.  Nobody is watched yet. */
void control_begin(struct control *c, const char *doing);
/* This peer has a part in the call: its end, its silence and its plan are looked at from now on. */
void control_watch(struct control *c, uint32_t peer);

/* What one direction of a pair carries; shape is a digest of the lengths in order. */
struct control_plan {
    uint64_t bytes, shape;
};
/* Exchanges plans with the watched peers ([n] each: what goes out, what is to come in).  ERR_PROTOCOL when they
 * differ.  Blocks until all have come to this call. */
int control_agree(struct control *c, const struct control_plan *out, const struct control_plan *in,
                  const struct transport_call *call, struct err *err) MUST_CHECK;

/* Party 0 gives the secret, the others get it.  Everybody must be watched. */
int control_secret(struct control *c, uint8_t secret[CONTROL_SECRET_BYTES], const struct transport_call *call,
                   struct err *err) MUST_CHECK;

/* Everybody tells everybody a word (CONTROL_WORDS of them while a group is created, counted from 0); ret_words[n] is
 * what they said.  Everybody must be watched. */
#define CONTROL_WORDS 2u
int control_word(struct control *c, uint32_t which, uint64_t mine, uint64_t *ret_words, const struct transport_call *call,
                 struct err *err) MUST_CHECK;
/* Says it without waiting for the others; control_word with the same one then only waits. */
void control_word_say(struct control *c, uint32_t which, uint64_t mine);
/* Whether somebody has said this by now. */
bool control_word_said(const struct control *c, uint32_t which, uint64_t word);

/* Sleeps for at most wait_us, keeping beats going.  An error when cancelled, late, or when a watched peer that has not
 * said DONE is gone.  Reports progress of others by call->progress, which renews deadlines. */
int control_wait(struct control *c, uint64_t wait_us, const struct transport_call *call, struct err *err) MUST_CHECK;

/* Own progress, told to the others with the beats and to the caller by call->progress. */
void control_progress(struct control *c, uint64_t received, const struct transport_call *call);

/* Says that all of this call is done here, and waits until the watched peers have said so as well. */
int control_finish(struct control *c, const struct transport_call *call, struct err *err) MUST_CHECK;

/* The group is over here, in order.  After that only control_ended and control_close may be called, by any one thread.
 */
void control_end(struct control *c);
/* Whether the others have come to their end as well, or are gone; waits for at most wait_ms for news of it. */
bool control_ended(struct control *c, uint32_t wait_ms);

/* After control_ended: whether all have left in order, and nobody has closed the connection since.  Returns after at most
 * wait_ms, or when wake_fd becomes readable. */
bool control_all_there(struct control *c, int wake_fd, uint32_t wait_ms);

/* After an error that NCCL reported: waits a moment for the connection of a dead peer to close, which tells its name.
 * Returns it, or NULL. */
const char *control_culprit(struct control *c);

#endif
