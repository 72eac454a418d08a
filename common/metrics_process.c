/* What is the same for every process: its version, CPU time, memory, descriptors, start. */
#include <dirent.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "common/metrics_http.h"
#include "common/version.h"

static double cpu_seconds(void)
{
    struct rusage u;
    if (getrusage(RUSAGE_SELF, &u) != 0)
        return 0;
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) + (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1e6;
}

static unsigned open_descriptors(void)
{
    unsigned n = 0;
    DIR *dir = opendir("/proc/self/fd");
    while (dir && readdir(dir))
        n++;
    if (dir)
        closedir(dir);
    return n > 3 ? n - 3 : 0; /* ".", ".." and that of the folder */
}

/* Fields of /proc/self/stat after the name: 22 is the start in ticks since the boot, 23 and 24 bytes and pages. */
static bool process_stat(unsigned long long *ret_start, unsigned long long *ret_virtual, long *ret_pages)
{
    char line[1024];
    FILE *f = fopen("/proc/self/stat", "re");
    size_t n = f ? fread(line, 1, sizeof line - 1, f) : 0;
    if (f)
        fclose(f);
    line[n] = '\0';
    const char *at = strrchr(line, ')');
    for (int field = 2; at && field < 22; field++)
        at = strchr(at + 1, ' ');
    return at && sscanf(at, "%llu %llu %ld", ret_start, ret_virtual, ret_pages) == 3;
}

/* In seconds since 1970; found once, so that it does not waver when the clock is set.  (/proc/stat may be hidden.) */
static double boot_time(void)
{
    static double boot;
    struct timespec now, up;
    if (boot <= 0 && clock_gettime(CLOCK_REALTIME, &now) == 0 && clock_gettime(CLOCK_BOOTTIME, &up) == 0)
        boot = (double)(now.tv_sec - up.tv_sec) + (double)(now.tv_nsec - up.tv_nsec) / 1e9;
    return boot;
}

void metrics_process_write(struct metrics_text *t, const char *daemon)
{
    struct rlimit limit = {0};
    unsigned long long start = 0, virtual_bytes = 0;
    long pages = 0;
    metrics_family(t, "eep_build_info", METRICS_GAUGE, "The daemon and its version; always 1.");
    metrics_value(t, 1, "daemon", daemon, "version", EEP_SOFTWARE, NULL);
    metrics_family(t, "process_cpu_seconds_total", METRICS_COUNTER, "CPU time, of user and system, in seconds.");
    metrics_value(t, cpu_seconds(), NULL);
    metrics_family(t, "process_open_fds", METRICS_GAUGE, "Open descriptors.");
    metrics_value(t, open_descriptors(), NULL);
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
        metrics_family(t, "process_max_fds", METRICS_GAUGE, "As many descriptors may be open.");
        metrics_value(t, (double)limit.rlim_cur, NULL);
    }
    if (!process_stat(&start, &virtual_bytes, &pages))
        return;
    metrics_family(t, "process_resident_memory_bytes", METRICS_GAUGE, "Resident memory.");
    metrics_value(t, (double)pages * (double)sysconf(_SC_PAGESIZE), NULL);
    metrics_family(t, "process_virtual_memory_bytes", METRICS_GAUGE, "Virtual memory.");
    metrics_value(t, (double)virtual_bytes, NULL);
    metrics_family(t, "process_start_time_seconds", METRICS_GAUGE, "When the process began, in seconds since 1970.");
    metrics_value(t, boot_time() + (double)start / (double)sysconf(_SC_CLK_TCK), NULL);
}
