/* Preloaded into daemons: a wall clock that is wrong.  For tests only.
 *
 * $EEP_FAULT_CLOCK names a file with a number of seconds, which is added to the wall clock as long as it is there. */
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

int clock_gettime(clockid_t clock, struct timespec *ret)
{
    static int (*real)(clockid_t, struct timespec *);
    char text[32] = "";
    if (!real)
        *(void **)&real = dlsym(RTLD_NEXT, "clock_gettime");
    int rc = real(clock, ret);
    const char *path = clock == CLOCK_REALTIME ? getenv("EEP_FAULT_CLOCK") : NULL;
    int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd < 0)
        return rc;
    if (read(fd, text, sizeof text - 1) > 0)
        ret->tv_sec += strtol(text, NULL, 10);
    close(fd);
    return rc;
}
