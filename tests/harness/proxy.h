/* A proxy between two unix sockets that delays what passes, both ways: latency where the kernel has no netem.
 *
 * A child process of the caller, which dies with it. */
#ifndef EEP_TESTS_HARNESS_PROXY_H
#define EEP_TESTS_HARNESS_PROXY_H

#include <sys/types.h>

/* Every byte is handed on delay_ms to delay_ms + jitter_ms after it came, in order.  The process, or -1. */
pid_t proxy_start(const char *listen_path, const char *target_path, int delay_ms, int jitter_ms);

#endif
