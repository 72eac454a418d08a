/* Admission, planning and advance of sequences.  See batch.h.  Stepping thread. */
#include "tests/engine/batch.h"

#include <stdlib.h>
#include <string.h>

static uint32_t positions_of(const struct request *r)
{
    return r->n_prompt + r->max_tokens; /* the last token's own position is never computed, but it is little */
}

static void sequence_drop(struct batch *b, uint32_t i, const struct decoder_config *c)
{
    struct sequence *s = &b->sequence[i];
    if (c)
        b->kv_used -= decoder_kv_bytes(c, s->kv.positions);
    b->compute->kv_done(b->compute, &s->kv);
    free(s->tokens);
    free(s->logits);
    memmove(s, s + 1, (--b->n - i) * sizeof *s);
    if (b->n == 0)
        b->kv_used = 0;
}

static int sequence_begin(struct batch *b, struct request *r, const struct decoder_config *c)
{
    struct sequence s = {.request = r};
    s.tokens = malloc(positions_of(r) * sizeof *s.tokens);
    s.logits = malloc(c->vocab * sizeof *s.logits);
    if (!s.tokens || !s.logits || b->compute->kv_init(b->compute, positions_of(r), &s.kv, NULL)) {
        free(s.tokens);
        free(s.logits);
        return ERR_NOMEM;
    }
    memcpy(s.tokens, r->prompt, r->n_prompt * sizeof *s.tokens);
    s.n_tokens = r->n_prompt;
    b->kv_used += decoder_kv_bytes(c, positions_of(r));
    b->sequence[b->n++] = s;
    return 0;
}

/* NULL, or why this request can never run here. */
static const char *impossible(const struct batch *b, const struct request *r, const struct decoder_config *c)
{
    if (positions_of(r) > c->max_positions)
        return "too long for the model";
    if (decoder_kv_bytes(c, positions_of(r)) > b->kv_budget)
        return "too long for the cache";
    for (uint32_t i = 0; i < r->n_prompt; i++) {
        if ((uint32_t)r->prompt[i] >= c->vocab)
            return "token out of range";
    }
    return NULL;
}

void batch_admit(struct batch *b, const struct decoder_config *c)
{
    for (uint32_t i = b->n; i-- > 0;) {
        if (request_gone(b->sequence[i].request)) {
            request_free(b->sequence[i].request);
            sequence_drop(b, i, c);
        }
    }
    while (b->n < b->max) {
        struct request *r = b->waiting ? b->waiting : server_take(b->server);
        b->waiting = NULL;
        if (!r)
            break;
        const char *why = impossible(b, r, c);
        if (request_gone(r)) {
            request_free(r);
        } else if (why) {
            request_refuse(b->server, r, why);
        } else if (b->kv_used + decoder_kv_bytes(c, positions_of(r)) > b->kv_budget) {
            b->waiting = r;
            break;
        } else if (sequence_begin(b, r, c)) {
            request_refuse(b->server, r, "out of memory");
        }
    }
    server_flush(b->server);
}

bool batch_has_work(const struct batch *b)
{
    return b->n > 0;
}

int batch_plan(struct batch *b, bool *ret_more, struct err *err)
{
    bool more = b->waiting != NULL;
    if (b->room < b->max * b->prefill) {
        struct forward_token *tokens = realloc(b->tokens, (size_t)b->max * b->prefill * sizeof *tokens);
        if (!tokens)
            return err_set(err, ERR_NOMEM, "out of memory for a step's tokens");
        b->tokens = tokens;
        b->room = b->max * b->prefill;
    }
    b->n_tokens = 0;
    for (uint32_t i = 0; i < b->n; i++) {
        struct sequence *s = &b->sequence[i];
        uint32_t left = s->n_tokens - s->done;
        s->chunk = left < b->prefill ? left : b->prefill;
        for (uint32_t k = 0; k < s->chunk; k++) {
            uint32_t at = s->done + k;
            b->tokens[b->n_tokens++] =
                (struct forward_token){s->tokens[at], at, &s->kv, at + 1 == s->n_tokens ? s->logits : NULL};
        }
        more |= s->chunk < left || s->n_tokens + 1 < s->request->n_prompt + s->request->max_tokens;
    }
    *ret_more = more;
    return 0;
}

void batch_advance(struct batch *b, const struct decoder_config *c)
{
    for (uint32_t i = 0; i < b->n;) {
        struct sequence *s = &b->sequence[i];
        struct request *r = s->request;
        s->done += s->chunk;
        if (s->done == s->n_tokens) {
            int32_t token = decoder_argmax(s->logits, c->vocab);
            s->tokens[s->n_tokens++] = token;
            request_token(b->server, r, token, s->n_tokens - 1 - r->n_prompt);
        }
        if (s->n_tokens == r->n_prompt + r->max_tokens) {
            request_finish(b->server, r);
            sequence_drop(b, i, c);
        } else {
            i++;
        }
    }
    server_flush(b->server);
}

void batch_hand_back(struct batch *b, const char *why)
{
    while (b->n > 0) {
        struct sequence *s = &b->sequence[0];
        struct request *r = s->request;
        request_hand_back(b->server, r, s->tokens + r->n_prompt, s->n_tokens - r->n_prompt);
        sequence_drop(b, 0, NULL);
    }
    struct request *r = b->waiting ? b->waiting : server_take(b->server);
    b->waiting = NULL;
    for (; r; r = server_take(b->server))
        request_refuse(b->server, r, why);
    server_flush(b->server);
}

void batch_done(struct batch *b)
{
    while (b->n > 0) {
        request_free(b->sequence[0].request);
        sequence_drop(b, 0, NULL);
    }
    if (b->waiting)
        request_free(b->waiting);
    b->waiting = NULL;
    free(b->tokens);
    b->tokens = NULL;
    b->room = 0;
}
