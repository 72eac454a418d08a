/* eepctl's connection: made late, so that mistakes in the arguments are told first. */
#include "coordinator/eepctl/client.h"

#include <string.h>

#include "common/version.h"

int client_connect(struct ctl *ctl, struct err *err)
{
    if (ctl->client)
        return 0;
    struct rpc_identity self = {.role = RPC_ROLE_OPERATOR};
    snprintf(self.software, sizeof self.software, "eepctl %s", EEP_SOFTWARE);
    struct tls *tls = NULL;
    int rc = tls_open(&ctl->tls, &tls, err);
    if (rc < 0)
        return rc;
    if (tls && !tls_self_is(tls, "operator"))
        self.role = RPC_ROLE_READER;
    rc = rpc_client_connect_tls(ctl->coordinator, &self, &pb__control__descriptor, tls, "coordinator", CLIENT_CONNECT_MS, &ctl->client,
                                err);
    tls_free(tls);
    if (rc == ERR_UNREACHABLE || rc == ERR_TIMEOUT || rc == ERR_NOTFOUND) { /* not found: the host's name */
        struct err why = *err;
        return err_set(err, ERR_UNREACHABLE,
                       "the coordinator cannot be reached at %s: %s; is eep-coordinator running there? "
                       "(-c ADDR or $EEP_COORDINATOR names another place)",
                       ctl->coordinator, why.text);
    }
    return rc;
}

void client_drop(struct ctl *ctl)
{
    rpc_client_free(ctl->client);
    ctl->client = NULL;
}

int client_call(struct ctl *ctl, enum control_method method, const ProtobufCMessage *request, int timeout_ms,
                ProtobufCMessage **ret_reply, struct err *err)
{
    int rc = client_connect(ctl, err);
    if (rc < 0)
        return rc;
    rc = rpc_client_call(ctl->client, (unsigned)method, request, timeout_ms, ret_reply, err);
    if (rc == ERR_TIMEOUT && timeout_ms == CLIENT_CALL_MS)
        return err_set(err, ERR_UNREACHABLE, "the coordinator at %s did not answer within %d s", ctl->coordinator,
                       timeout_ms / 1000);
    return rc;
}

int client_ask(struct ctl *ctl, enum control_method method, ProtobufCMessage **ret_reply, struct err *err)
{
    Pb__Empty empty = PB__EMPTY__INIT;
    return client_call(ctl, method, &empty.base, CLIENT_CALL_MS, ret_reply, err);
}
