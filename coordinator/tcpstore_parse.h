/* The protocol of torch.distributed.TCPStore (libuv), as bytes: where a command ends, and what its fields are.
 *
 * A command is a byte (enum tcpstore_query) and its fields, without separators, everything little-endian:
 *     key, value   u64 length, bytes        at most 8 KiB, 8 MiB
 *     number       i64;  u32 for VALIDATE (magic) and PING (nonce)
 *     list         u64 count, then so many keys (or keys with values)
 * Pure, any thread. */
#ifndef EEP_COORDINATOR_TCPSTORE_PARSE_H
#define EEP_COORDINATOR_TCPSTORE_PARSE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/err.h"

#define TCPSTORE_MAGIC 0x3c85f7ceu
#define TCPSTORE_KEY_MAX 8192u
#define TCPSTORE_VALUE_MAX (8u << 20)
#define TCPSTORE_KEYS_MAX (128u * 1024)
#define TCPSTORE_COMMAND_MAX (64u << 20) /* bytes of one command; TCPStore itself has no such limit */

enum tcpstore_query {
    TCPSTORE_VALIDATE,
    TCPSTORE_SET,
    TCPSTORE_COMPARE_SET,
    TCPSTORE_GET,
    TCPSTORE_ADD,
    TCPSTORE_CHECK,
    TCPSTORE_WAIT,
    TCPSTORE_GETNUMKEYS,
    TCPSTORE_DELETE_KEY,
    TCPSTORE_APPEND,
    TCPSTORE_MULTI_GET,
    TCPSTORE_MULTI_SET,
    TCPSTORE_CANCEL_WAIT,
    TCPSTORE_PING,
    TCPSTORE_QUEUE_PUSH, /* PyTorch 2.8 */
    TCPSTORE_QUEUE_POP,
    TCPSTORE_QUEUE_LEN,
    TCPSTORE_LIST_KEYS, /* 2.10 */
    TCPSTORE_BARRIER,   /* after 2.11 */
    TCPSTORE_QUERIES
};

/* How far a command that arrives in pieces has been looked through.  Zeroed for a new command. */
struct tcpstore_scan {
    size_t at;      /* bytes looked at */
    uint32_t place; /* in the list of fields */
    uint32_t left;  /* of a list */
};
/* Looks on through the first len bytes (the command's, from its start; those seen before must be unchanged).
 * 1: the command is complete and has scan->at bytes.  0: at least *ret_need bytes are needed.  ERR_PROTOCOL, ERR_LIMIT. */
int tcpstore_scan(struct tcpstore_scan *scan, const uint8_t *data, size_t len, size_t *ret_need,
                  struct err *err) MUST_CHECK;

/* Reads the fields of a complete command, in their order.  Pointers go into the command. */
struct tcpstore_reader {
    const uint8_t *at;
};
struct tcpstore_bytes {
    const uint8_t *data;
    size_t len;
};
enum tcpstore_query tcpstore_read_query(struct tcpstore_reader *reader);
uint32_t tcpstore_read_u32(struct tcpstore_reader *reader);
uint64_t tcpstore_read_u64(struct tcpstore_reader *reader);
struct tcpstore_bytes tcpstore_read_bytes(struct tcpstore_reader *reader);
const char *tcpstore_query_name(unsigned query); /* "SET" */

#endif
