/* TCPStore's commands as bytes.  Pure, any thread. */
#include "coordinator/tcpstore_parse.h"

#include <string.h>

/* Fields: 4 = u32, 8 = i64, k = key, v = value; after a * (a count) the rest is repeated. */
static const struct {
    const char *name, *fields;
} queries[TCPSTORE_QUERIES] = {
    [TCPSTORE_VALIDATE] = {"VALIDATE", "4"},
    [TCPSTORE_SET] = {"SET", "kv"},
    [TCPSTORE_COMPARE_SET] = {"COMPARE_SET", "kvv"},
    [TCPSTORE_GET] = {"GET", "k"},
    [TCPSTORE_ADD] = {"ADD", "k8"},
    [TCPSTORE_CHECK] = {"CHECK", "*k"},
    [TCPSTORE_WAIT] = {"WAIT", "*k"},
    [TCPSTORE_GETNUMKEYS] = {"GETNUMKEYS", ""},
    [TCPSTORE_DELETE_KEY] = {"DELETE_KEY", "k"},
    [TCPSTORE_APPEND] = {"APPEND", "kv"},
    [TCPSTORE_MULTI_GET] = {"MULTI_GET", "*k"},
    [TCPSTORE_MULTI_SET] = {"MULTI_SET", "*kv"},
    [TCPSTORE_CANCEL_WAIT] = {"CANCEL_WAIT", ""},
    [TCPSTORE_PING] = {"PING", "4"},
    [TCPSTORE_QUEUE_PUSH] = {"QUEUE_PUSH", "kv"},
    [TCPSTORE_QUEUE_POP] = {"QUEUE_POP", "k"},
    [TCPSTORE_QUEUE_LEN] = {"QUEUE_LEN", "k"},
    [TCPSTORE_LIST_KEYS] = {"LIST_KEYS", ""},
    [TCPSTORE_BARRIER] = {"BARRIER", "k8"},
};

const char *tcpstore_query_name(unsigned query)
{
    return query < TCPSTORE_QUERIES ? queries[query].name : "unknown";
}

static uint64_t get(const uint8_t *p, size_t n)
{
    uint64_t value = 0;
    for (size_t i = 0; i < n; i++)
        value |= (uint64_t)p[i] << (8 * i);
    return value;
}

static int field_check(const char *name, char field, uint64_t number, struct err *err)
{
    uint64_t max = field == 'k' ? TCPSTORE_KEY_MAX : field == 'v' ? TCPSTORE_VALUE_MAX : TCPSTORE_KEYS_MAX;
    const char *what = field == 'k' ? "bytes of a key" : field == 'v' ? "bytes of a value" : "keys";
    if (field == '4' || field == '8' || number <= max)
        return 0;
    return err_set(err, ERR_LIMIT, "TCPStore %s with %llu %s; at most %llu are allowed", name,
                   (unsigned long long)number, what, (unsigned long long)max);
}

int tcpstore_scan(struct tcpstore_scan *scan, const uint8_t *data, size_t len, size_t *ret_need, struct err *err)
{
    if (len == 0) {
        *ret_need = 1;
        return 0;
    }
    if (data[0] >= TCPSTORE_QUERIES)
        return err_set(err, ERR_PROTOCOL, "TCPStore command %u is not known here", data[0]);
    const char *name = queries[data[0]].name, *fields = queries[data[0]].fields;
    if (scan->at == 0)
        scan->at = 1;
    while (fields[scan->place]) {
        char field = fields[scan->place];
        size_t left = len - scan->at, head = field == '4' ? 4 : 8;
        if (left < head) {
            *ret_need = scan->at + head;
            return 0;
        }
        uint64_t number = get(data + scan->at, head);
        int rc = field_check(name, field, number, err); /* before it is used as a length */
        if (rc < 0)
            return rc;
        size_t bytes = field == 'k' || field == 'v' ? head + (size_t)number : head;
        if (scan->at + bytes > TCPSTORE_COMMAND_MAX)
            return err_set(err, ERR_LIMIT, "TCPStore %s is longer than %u bytes", name, TCPSTORE_COMMAND_MAX);
        if (left < bytes) {
            *ret_need = scan->at + bytes;
            return 0;
        }
        scan->at += bytes;
        scan->place++;
        if (field == '*') {
            scan->left = (uint32_t)number;
            if (!number)
                break;
        } else if (!fields[scan->place] && fields[0] == '*' && --scan->left) {
            scan->place = 1;
        }
    }
    return 1;
}

/* ---- reading ---- */

enum tcpstore_query tcpstore_read_query(struct tcpstore_reader *reader)
{
    return (enum tcpstore_query)*reader->at++;
}

uint32_t tcpstore_read_u32(struct tcpstore_reader *reader)
{
    uint32_t value = (uint32_t)get(reader->at, 4);
    reader->at += 4;
    return value;
}

uint64_t tcpstore_read_u64(struct tcpstore_reader *reader)
{
    uint64_t value = get(reader->at, 8);
    reader->at += 8;
    return value;
}

struct tcpstore_bytes tcpstore_read_bytes(struct tcpstore_reader *reader)
{
    struct tcpstore_bytes bytes = {.len = (size_t)tcpstore_read_u64(reader)};
    bytes.data = reader->at;
    reader->at += bytes.len;
    return bytes;
}
