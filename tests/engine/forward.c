/* The layers of a step.  See forward.h.  Stepping thread. */
#include "tests/engine/forward.h"

#include <stdlib.h>

int forward_run(struct compute *compute, const struct forward_token *tokens, uint32_t n, forward_moe_fn *moe,
                void *user, struct err *err)
{
    size_t hidden = compute->model->config.hidden;
    float *h = malloc((n * 2 * hidden + 1) * sizeof *h);
    if (!h)
        return err_set(err, ERR_NOMEM, "out of memory for a step of %u tokens", n);
    float *y = h + n * hidden;
    int rc = compute->begin(compute, tokens, n, err);
    for (uint32_t layer = 0; layer < compute->model->config.layers && rc == 0; layer++) {
        rc = compute->attend(compute, layer, h, err);
        if (rc == 0)
            rc = moe(user, layer, n, h, y);
        if (rc == 0)
            rc = compute->add(compute, y, err);
    }
    if (rc == 0)
        rc = compute->logits(compute, err);
    free(h);
    return rc;
}
