/* The NCCL transport of a build that found no nccl.h.  Any thread. */
#include "agent/transport_nccl.h"

struct transport *transport_nccl_open(const struct transport_nccl_options *options, struct err *err)
{
    (void)options;
    err_set(err, ERR_UNSUPPORTED,
            "this build has no NCCL transport: no nccl.h was found (set NCCL_HOME and build again, or use --transport "
            "host)");
    return NULL;
}

struct transport_nccl_counts transport_nccl_counts(const struct transport *transport)
{
    (void)transport;
    return (struct transport_nccl_counts){0};
}

const char *transport_nccl_version(const struct transport *transport)
{
    (void)transport;
    return "not in this build";
}

bool transport_nccl_tune(struct transport *transport, const struct nccl_tuning *tuning)
{
    (void)transport, (void)tuning;
    return false;
}

struct nccl_tuning transport_nccl_tuned(const struct transport *transport)
{
    (void)transport;
    return (struct nccl_tuning){0};
}
