/* Stands in for the transport over GPU memory of one host in a build without CUDA's headers. */
#include "agent/transport_gpu.h"

struct transport *transport_cuda_peer_open(const char *device, struct err *err)
{
    (void)device;
    err_set(err, ERR_UNSUPPORTED, "transport \"cuda_peer\" is not in this build; use \"host\"");
    return NULL;
}

int transport_cuda_peer_card(struct transport *transport, uint8_t ret_card[TRANSPORT_CARD_BYTES], struct err *err)
{
    (void)transport, (void)ret_card;
    return err_set(err, ERR_UNSUPPORTED, "transport \"cuda_peer\" is not in this build");
}

bool transport_cuda_peer_reaches(struct transport *transport, const uint8_t card[TRANSPORT_CARD_BYTES])
{
    (void)transport, (void)card;
    return false;
}

bool transport_cuda_peer_tune(struct transport *transport, const struct peer_tuning *tuning)
{
    (void)transport, (void)tuning;
    return false;
}

struct peer_tuning transport_cuda_peer_tuned(const struct transport *transport)
{
    (void)transport;
    return (struct peer_tuning){0};
}
