/* Fuzz target: TCPStore's commands.  A command that arrives in pieces is the same as one that arrives whole; its fields lie
 * inside it; what is asked for before it is complete is bounded. */
#include <stdlib.h>
#include <string.h>

#include "coordinator/tcpstore_parse.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void inside(const uint8_t *begin, size_t len, struct tcpstore_bytes bytes)
{
    if (bytes.data < begin || bytes.data > begin + len || bytes.len > (size_t)(begin + len - bytes.data))
        abort();
}

/* Reads the fields as the server does. */
static void fields(const uint8_t *command, size_t len)
{
    static const char *const shapes[TCPSTORE_QUERIES] = {"4", "kv", "kvv", "k", "k8", "*k", "*k", "", "k", "kv", "*k",
                                                         "*kv", "", "4", "kv", "k", "k", "", "k8"};
    struct tcpstore_reader reader = {.at = command};
    const char *shape = shapes[tcpstore_read_query(&reader)];
    uint64_t repeat = *shape == '*' ? tcpstore_read_u64(&reader) : 1;
    if (*shape == '*')
        shape++;
    for (uint64_t i = 0; i < repeat; i++)
        for (const char *f = shape; *f; f++) {
            if (*f == '4')
                (void)tcpstore_read_u32(&reader);
            else if (*f == '8')
                (void)tcpstore_read_u64(&reader);
            else
                inside(command, len, tcpstore_read_bytes(&reader));
        }
    if (reader.at != command + len)
        abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    size_t at = 0;
    for (;;) {
        struct tcpstore_scan whole = {0}, pieces = {0};
        size_t need = 0, need_pieces = 0;
        int rc = tcpstore_scan(&whole, data + at, size - at, &need, NULL), rc_pieces = 0;
        for (size_t len = 0, step = 1; rc_pieces == 0 && len <= size - at; len += step) {
            rc_pieces = tcpstore_scan(&pieces, data + at, len, &need_pieces, NULL);
            step = len < 64 ? 1 : 97; /* every cut at the start, then a few */
        }
        if (rc_pieces == 0)
            rc_pieces = tcpstore_scan(&pieces, data + at, size - at, &need_pieces, NULL);
        if (rc_pieces != rc)
            abort();
        if (rc == 0 && (need <= size - at || need > TCPSTORE_COMMAND_MAX + 8))
            abort();
        if (rc != 1)
            return 0;
        if (whole.at != pieces.at || whole.at > size - at)
            abort();
        fields(data + at, whole.at);
        at += whole.at;
    }
}
