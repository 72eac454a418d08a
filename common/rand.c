/* Random numbers from getrandom(2).  Any thread. */
#include "common/rand.h"

#include <errno.h>
#include <string.h>
#include <sys/random.h>

int rand_u64(uint64_t *ret_value, struct err *err)
{
    uint64_t value = 0;
    while (value == 0) {
        /* Up to 256 bytes come whole or not at all. */
        ssize_t n = getrandom(&value, sizeof value, 0);
        if (n == (ssize_t)sizeof value)
            continue;
        value = 0;
        if (n < 0 && errno != EINTR)
            return err_set(err, ERR_IO, "cannot get random bytes from the kernel: %s", strerror(errno));
    }
    *ret_value = value;
    return 0;
}
