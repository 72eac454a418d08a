/* Preloaded into agents: a signal at the very moment of a transition of the agent's state machine.  For tests only.
 *
 * Every transition is one line of the log, written before anything that follows from it.  $EEP_FAULT_EDGE names a file;
 * when it is there while such a line is written, its lines say: TEXT     what the line must contain: "agent gpu0:
 * PREPARE --GROUP_DONE--> PREPARE" ROLE     and this: "role=new" SIGNAL   number PID      of the victim; 0 = this
 * process It is renamed to FILE.fired first, so that it happens once. */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static bool edge_matches(const char *path, const char *line, size_t len, int *ret_signal, int *ret_pid)
{
    char text[512], edge[160], role[40];
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    ssize_t n = read(fd, text, sizeof text - 1);
    close(fd);
    if (n <= 0)
        return false;
    text[n] = '\0';
    return sscanf(text, "%159[^\n]\n%39[^\n]\n%d\n%d", edge, role, ret_signal, ret_pid) == 4 &&
           memmem(line, len, edge, strlen(edge)) && memmem(line, len, role, strlen(role));
}

static void edge_check(const char *line, size_t len)
{
    const char *path = getenv("EEP_FAULT_EDGE");
    char fired[512];
    int signal_number, pid;
    if (!path || !memmem(line, len, " event=transition ", 18) || !edge_matches(path, line, len, &signal_number, &pid))
        return;
    snprintf(fired, sizeof fired, "%s.fired", path);
    if (rename(path, fired) == 0)
        kill(pid ? pid : getpid(), signal_number);
}

ssize_t write(int fd, const void *data, size_t len)
{
    static ssize_t (*real)(int, const void *, size_t);
    if (!real)
        *(void **)&real = dlsym(RTLD_NEXT, "write");
    ssize_t n = real(fd, data, len);
    int saved = errno;
    if (fd == STDERR_FILENO && n > 0)
        edge_check(data, len);
    errno = saved;
    return n;
}
