/* arc4random and arc4random_buf over getrandom(2), for programs that carry a static libevent.
 *
 * A libevent.a that was built on glibc 2.36 or newer asks for the two, which an older glibc does not have.  Only
 * `make bundle` compiles this file: any other build takes libevent's shared library, whose needs are its own affair.
 * Hidden, so that what the program loads later (NCCL, say) keeps to its libc's.  Any thread; blocks only in early
 * boot. */
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/random.h>

#define HIDDEN __attribute__((visibility("hidden")))

/* stdlib.h has them from glibc 2.36 on */
HIDDEN uint32_t arc4random(void);
HIDDEN void arc4random_buf(void *buf, size_t size);

void arc4random_buf(void *buf, size_t size)
{
    for (size_t have = 0; have < size;) {
        ssize_t n = getrandom((char *)buf + have, size - have, 0);
        if (n > 0)
            have += (size_t)n;
        else if (errno != EINTR)
            abort(); /* the callers take no error, and must not go on with what was in the buffer (glibc ends too) */
    }
}

uint32_t arc4random(void)
{
    uint32_t value;
    arc4random_buf(&value, sizeof(value));
    return value;
}
