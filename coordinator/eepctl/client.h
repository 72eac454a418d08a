/* eepctl's connection to the coordinator.  Blocks; one thread.  Connects at the first call. */
#ifndef EEP_COORDINATOR_EEPCTL_CLIENT_H
#define EEP_COORDINATOR_EEPCTL_CLIENT_H

#include "common/control_methods.h"
#include "common/rpc.h"
#include "coordinator/eepctl/ctl.h"

#define CLIENT_CONNECT_MS 5000
#define CLIENT_CALL_MS 30000 /* of calls that are answered at once */

/* Connects unless it is connected. */
int client_connect(struct ctl *ctl, struct err *err) MUST_CHECK;
void client_drop(struct ctl *ctl);
/* One call; the reply is freed with rpc_unpack_free.  timeout_ms -1 = none. */
int client_call(struct ctl *ctl, enum control_method method, const ProtobufCMessage *request, int timeout_ms,
                ProtobufCMessage **ret_reply, struct err *err) MUST_CHECK;
/* The same, for calls without a request's fields. */
int client_ask(struct ctl *ctl, enum control_method method, ProtobufCMessage **ret_reply, struct err *err) MUST_CHECK;

#endif
