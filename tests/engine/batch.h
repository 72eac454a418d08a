/* The sequences that run on this rank: continuous batching, with prompts taken in chunks.
 *
 * A sequence's position advances only when a step has completed; a failed step is planned again as it was.
 * Stepping thread. */
#ifndef EEP_TESTS_ENGINE_BATCH_H
#define EEP_TESTS_ENGINE_BATCH_H

#include "tests/engine/forward.h"
#include "tests/engine/server.h"

#define BATCH_MAX 256

struct sequence {
    struct request *request; /* owned */
    struct decoder_kv kv;
    int32_t *tokens;   /* prompt, then what was generated; room for all */
    uint32_t n_tokens; /* known */
    uint32_t done;     /* positions whose keys and values are there */
    uint32_t chunk;    /* of the present step */
    float *logits;     /* [vocab] */
};
struct batch {
    struct server *server;       /* borrowed */
    struct compute *compute;     /* borrowed: whose memory keys and values lie in; constant while there are sequences */
    uint32_t max, prefill;       /* sequences at once; tokens of a prompt per step */
    uint64_t kv_budget, kv_used; /* bytes */
    struct sequence sequence[BATCH_MAX];
    uint32_t n;
    struct request *waiting;      /* taken from the server, finds no room yet */
    struct forward_token *tokens; /* of the planned step */
    uint32_t n_tokens, room;
};
/* Takes requests from the server while there is room.  Drops sequences whose client is gone. */
void batch_admit(struct batch *b, const struct decoder_config *c);
bool batch_has_work(const struct batch *b);
/* Fills b->tokens for the next step.  *ret_more: there will be work after it. */
int batch_plan(struct batch *b, bool *ret_more, struct err *err) MUST_CHECK;
/* The planned step has completed: tokens go out, finished sequences end. */
void batch_advance(struct batch *b, const struct decoder_config *c);
/* Gives every sequence and every waiting request back; `why` is said to those that were not begun. */
void batch_hand_back(struct batch *b, const char *why);
void batch_done(struct batch *b); /* drops everything without a word */

#endif
