/* The layers of a step, token by token.  See forward.h.  Stepping thread. */
#include "tests/engine/forward.h"

#include <stdlib.h>

static int forward_layer(const struct decoder *m, uint32_t layer, const struct forward_token *tokens, uint32_t n,
                         float *x, float *h, float *y, float *q, forward_moe_fn *moe, void *user)
{
    uint32_t hidden = m->config.hidden, q_width = m->config.heads * m->config.head_dim;
    /* All keys before any attention: a prompt's tokens see one another. */
    for (uint32_t i = 0; i < n; i++)
        decoder_qkv(m, layer, x + (size_t)i * hidden, tokens[i].position, tokens[i].kv, q + (size_t)i * q_width);
    for (uint32_t i = 0; i < n; i++) {
        if (decoder_attend(m, layer, q + (size_t)i * q_width, tokens[i].position, tokens[i].kv, x + (size_t)i * hidden))
            return ERR_NOMEM;
        decoder_moe_input(m, layer, x + (size_t)i * hidden, h + (size_t)i * hidden);
    }
    int rc = moe(user, layer, n, h, y);
    if (rc)
        return rc;
    for (size_t i = 0; i < (size_t)n * hidden; i++)
        x[i] += y[i];
    return 0;
}

int forward_run(const struct decoder *m, const struct forward_token *tokens, uint32_t n, forward_moe_fn *moe,
                void *user, struct err *err)
{
    size_t hidden = m->config.hidden, q_width = (size_t)m->config.heads * m->config.head_dim;
    float *x = malloc(((size_t)n * (3 * hidden + q_width) + 1) * sizeof *x);
    if (!x)
        return err_set(err, ERR_NOMEM, "out of memory for a step of %u tokens", n);
    float *h = x + n * hidden, *y = h + n * hidden, *q = y + n * hidden;
    int rc = 0;
    for (uint32_t i = 0; i < n; i++)
        decoder_embed(m, tokens[i].token, x + i * hidden);
    for (uint32_t l = 0; l < m->config.layers && rc == 0; l++)
        rc = forward_layer(m, l, tokens, n, x, h, y, q, moe, user);
    for (uint32_t i = 0; i < n && rc == 0; i++) {
        if (tokens[i].logits)
            decoder_logits(m, x + i * hidden, tokens[i].logits);
    }
    free(x);
    return rc;
}
