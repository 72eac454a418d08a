/* What the tests of the store of the real coordinator share: one daemon whose address stays the same over restarts, and calls
 * on it. */
#ifndef EEP_TESTS_ITEST_STORE_H
#define EEP_TESTS_ITEST_STORE_H

#include <check.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/control_methods.h"
#include "common/rpc.h"
#include "control.pb-c.h"
#include "tests/harness/daemon.h"
#include "tests/harness/suite.h"

static struct daemon_process d;
static char socket_address[128];

static void setup(void)
{
    signal(SIGPIPE, SIG_IGN);
    daemon_process_init(&d);
    snprintf(socket_address, sizeof socket_address, "unix:%s/sock", d.dir);
    d.extra[0] = "--listen"; /* an address that stays the same over restarts */
    d.extra[1] = socket_address;
}

static void teardown(void)
{
    daemon_process_done(&d);
}

static inline char *log_text(void)
{
    static char text[65536];
    char path[80];
    snprintf(path, sizeof path, "%s/log", d.dir);
    FILE *f = fopen(path, "r");
    size_t n = f ? fread(text, 1, sizeof text - 1, f) : 0;
    text[n] = '\0';
    if (f)
        fclose(f);
    return text;
}

static void start(void)
{
    ck_assert_msg(daemon_process_start(&d), "the coordinator did not start: %s", log_text());
}

static inline struct rpc_client *client_open(int timeout_ms)
{
    struct rpc_identity self = {.role = RPC_ROLE_OPERATOR};
    struct rpc_client *client = NULL;
    return rpc_client_connect(socket_address, &self, &pb__control__descriptor, timeout_ms, &client, NULL) == 0 ? client
                                                                                                           : NULL;
}

static inline int kv_set(struct rpc_client *c, const char *key, const void *data, size_t len)
{
    Pb__KvSetRequest request = PB__KV_SET_REQUEST__INIT;
    ProtobufCMessage *reply = NULL;
    request.key = (char *)key;
    request.value.data = (uint8_t *)data;
    request.value.len = len;
    int rc = rpc_client_call(c, CONTROL_KV_SET, &request.base, 10000, &reply, NULL);
    rpc_unpack_free(reply);
    return rc;
}

/* 1: *ret_value; 0: missing. */
static inline int kv_get(struct rpc_client *c, const char *key, uint32_t *ret_value)
{
    Pb__KvGetRequest request = PB__KV_GET_REQUEST__INIT;
    ProtobufCMessage *reply = NULL;
    request.key = (char *)key;
    int rc = rpc_client_call(c, CONTROL_KV_GET, &request.base, 10000, &reply, NULL);
    if (rc == 0) {
        const ProtobufCBinaryData *value = &((Pb__KvValue *)reply)->value;
        *ret_value = 0;
        memcpy(ret_value, value->data, value->len < 4 ? value->len : 4);
        rpc_unpack_free(reply);
    }
    return rc == 0 ? 1 : rc == ERR_NOTFOUND ? 0 : rc;
}

#endif
