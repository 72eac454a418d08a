/* What the transports share.  Worker thread. */
#include "agent/transport.h"

#include <errno.h>
#include <string.h>
#include <sys/random.h>

int transport_secret(size_t bytes, struct blob **ret_id, struct err *err)
{
    uint8_t id[64];
    if (bytes > sizeof(id))
        return err_set(err, ERR_LIMIT, "a group id has at most %zu bytes", sizeof(id));
    if (getrandom(id, bytes, 0) != (ssize_t)bytes)
        return err_set(err, ERR_IO, "cannot get random bytes for a group id: %s", strerror(errno));
    struct blob *blob = blob_new(id, bytes);
    explicit_bzero(id, sizeof(id));
    if (!blob)
        return err_set(err, ERR_NOMEM, "out of memory");
    *ret_id = blob;
    return 0;
}
