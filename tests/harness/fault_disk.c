/* Preloaded into a coordinator: faults at the edges of LMDB's writing.  For tests only.
 *
 * EEP_FAULT=FILE:CALL:N:WHAT   FILE is in the path of the file concerned; CALL is write or sync; the N-th such call (from
 * 1, counted over the life of the process) fails by WHAT:
 *     kill-before, kill-after   the process is killed before, or after, the call
 *     short                     half the bytes are written, and that is said
 *     torn                      half the bytes are written, then the process is killed
 *     enospc, eio, erofs        the call fails; so do all later ones
 *     stall                     the call does not return; nor do later ones */
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static struct {
    bool known;
    char file[64], call[16], what[16];
    unsigned n;
} fault;
static unsigned calls;

static void fault_read(void)
{
    const char *text = getenv("EEP_FAULT");
    fault.known = true;
    if (text && sscanf(text, "%63[^:]:%15[^:]:%u:%15s", fault.file, fault.call, &fault.n, fault.what) != 4)
        abort();
}

/* 0: this is no failure of the call. */
static int error_of(const char *what)
{
    return strcmp(what, "enospc") == 0 ? ENOSPC : strcmp(what, "eio") == 0 ? EIO : strcmp(what, "erofs") == 0 ? EROFS : 0;
}

/* "" = go on as usual. */
static const char *fault_of(int fd, const char *call)
{
    char link[64], path[512];
    if (!fault.known)
        fault_read();
    if (!fault.n || strcmp(call, fault.call) != 0)
        return "";
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t len = readlink(link, path, sizeof path - 1);
    if (len < 0)
        return "";
    path[len] = '\0';
    if (!strstr(path, fault.file)) /* also while it is made, under another name */
        return "";
    unsigned now = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
    bool stays = error_of(fault.what) || strcmp(fault.what, "stall") == 0;
    return now == fault.n || (stays && now > fault.n) ? fault.what : "";
}

static void die(void)
{
    kill(getpid(), SIGKILL);
    pause();
}

/* true: the call fails. */
static bool fails(const char *what)
{
    if (strcmp(what, "kill-before") == 0)
        die();
    while (strcmp(what, "stall") == 0)
        pause();
    errno = error_of(what);
    return errno != 0;
}

ssize_t pwrite(int fd, const void *data, size_t len, off_t at);
ssize_t pwrite(int fd, const void *data, size_t len, off_t at)
{
    ssize_t (*real)(int, const void *, size_t, off_t);
    *(void **)&real = dlsym(RTLD_NEXT, "pwrite");
    const char *what = fault_of(fd, "write");
    if (*what && fails(what))
        return -1;
    bool half = strcmp(what, "short") == 0 || strcmp(what, "torn") == 0;
    ssize_t n = real(fd, data, half ? len / 2 : len, at);
    if (strcmp(what, "torn") == 0 || strcmp(what, "kill-after") == 0)
        die();
    return n;
}

ssize_t pwritev(int fd, const struct iovec *v, int n_v, off_t at);
ssize_t pwritev(int fd, const struct iovec *v, int n_v, off_t at)
{
    ssize_t (*real)(int, const struct iovec *, int, off_t);
    *(void **)&real = dlsym(RTLD_NEXT, "pwritev");
    const char *what = fault_of(fd, "write");
    if (*what && fails(what))
        return -1;
    bool half = strcmp(what, "short") == 0 || strcmp(what, "torn") == 0;
    ssize_t n = real(fd, v, half && n_v > 1 ? n_v / 2 : n_v, at);
    if (strcmp(what, "torn") == 0 || strcmp(what, "kill-after") == 0)
        die();
    return n;
}

int fdatasync(int fd)
{
    int (*real)(int);
    *(void **)&real = dlsym(RTLD_NEXT, "fdatasync");
    const char *what = fault_of(fd, "sync");
    if (*what && fails(what))
        return -1;
    int rc = real(fd);
    if (strcmp(what, "kill-after") == 0)
        die();
    return rc;
}
