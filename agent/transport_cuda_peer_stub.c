/* Stands in for the transport over GPU memory of one host in a build without CUDA's headers. */
#include "agent/transport_gpu.h"

struct transport *transport_cuda_peer_open(const char *device, struct err *err)
{
    (void)device;
    err_set(err, ERR_UNSUPPORTED, "transport \"cuda_peer\" is not in this build; use \"host\"");
    return NULL;
}

bool transport_cuda_peer_tune(struct transport *transport, const struct peer_tuning *tuning)
{
    (void)transport, (void)tuning;
    return false;
}
