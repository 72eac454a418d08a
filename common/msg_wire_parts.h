/* Inside common/msg_wire*.c: the bodies of messages, each way.  Pure. */
#ifndef EEP_COMMON_MSG_WIRE_PARTS_H
#define EEP_COMMON_MSG_WIRE_PARTS_H

#include "agent.pb-c.h"
#include "common/msg.h"

#define MSG_BLOB_MAX 65536 /* a group's unique id; the largest known has 128 bytes */

/* NULL: out of memory, or a type that does not go this way (checked before).  The result is freed with pb_free. */
Pb__AgentUp *msg_to_up(const struct msg *msg);
Pb__AgentDown *msg_to_down(const struct msg *msg);
int msg_from_up(const Pb__AgentUp *up, struct msg *ret_msg, struct err *err) MUST_CHECK;
int msg_from_down(const Pb__AgentDown *down, struct msg *ret_msg, struct err *err) MUST_CHECK;

/* strdup that remembers failure in *ok. */
char *msg_text(const char *text, bool *ok);
bool msg_blob_to_bytes(const struct blob *blob, protobuf_c_boolean *ret_has, ProtobufCBinaryData *ret_bytes);
int msg_blob_from_bytes(const ProtobufCBinaryData *bytes, struct blob **ret_blob, struct err *err) MUST_CHECK;

#endif
