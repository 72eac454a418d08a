/* Between the structs of common/msg.h and common/topology.h and the messages of proto/.
 *
 * Everything that comes in is checked here, so that the cores see only messages that are well-formed: array sizes
 * against shapes, ids by length and characters, at most RANKS_MAX ranks, enums known, slots and parties inside their
 * ranges.  Whether a message makes sense now is the cores' business.  Pure, any thread. */
#ifndef EEP_COMMON_MSG_WIRE_H
#define EEP_COMMON_MSG_WIRE_H

#include <stddef.h>
#include <stdint.h>

#include "common/msg.h"

/* One frame's payload: AgentUp or AgentDown by the type of the message.  *ret_data is malloc'ed. */
int msg_pack(const struct msg *msg, uint8_t **ret_data, size_t *ret_len, struct err *err) MUST_CHECK;
/* budget: memory for unpacking, 0 = rpc_budget(len).  ERR_PROTOCOL names what is wrong.  msg_done frees *ret_msg. */
int msg_unpack_up(const uint8_t *data, size_t len, size_t budget, struct msg *ret_msg, struct err *err) MUST_CHECK;
int msg_unpack_down(const uint8_t *data, size_t len, size_t budget, struct msg *ret_msg, struct err *err) MUST_CHECK;

#endif
