/* See network.h. */
#include "tests/harness/network.h"

#include <fcntl.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SUBNET "10.77.0"

__attribute__((format(printf, 1, 2))) static int run(const char *fmt, ...)
{
    char command[1024];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(command, sizeof command, fmt, ap);
    va_end(ap);
    int rc = system(command);
    if (rc != 0)
        fprintf(stderr, "failed: %s\n", command);
    return rc == 0 ? 0 : -1;
}

bool network_possible(void)
{
    return geteuid() == 0 && system("command -v ip >/dev/null && command -v nft >/dev/null && "
                                    "ip netns add eepprobe$$ 2>/dev/null && "
                                    "{ ip netns exec eepprobe$$ nft 'add table inet probe' 2>/dev/null; rc=$?; "
                                    "ip netns del eepprobe$$; exit $rc; }") == 0;
}

static void host_name(const char *name, int host, char ret[32])
{
    if (host == NETWORK_COORDINATOR)
        snprintf(ret, 32, "%sc", name);
    else
        snprintf(ret, 32, "%s%d", name, host);
}

void network_address(int host, char ret_address[24])
{
    snprintf(ret_address, 24, SUBNET ".%d", host == NETWORK_COORDINATOR ? 1 : 10 + host);
}

static int host_start(const struct network *n, int host)
{
    char ns[32], address[24];
    host_name(n->name, host, ns);
    network_address(host, address);
    return run("ip netns add %s && ip -n %ss link add p%d type veth peer name eth0 netns %s && "
               "ip -n %ss link set p%d master br0 up && ip -n %s link set lo up && ip -n %s addr add %s/24 dev eth0 && "
               "ip -n %s link set eth0 up",
               ns, n->name, host + 1, ns, n->name, host + 1, ns, ns, address, ns);
}

int network_start(struct network *n, int agents)
{
    if (!n->name[0])
        snprintf(n->name, sizeof n->name, "eep%d-", (int)getpid() % 100000);
    n->agents = agents;
    network_stop(n); /* what a test left that failed */
    int rc = run("ip netns add %ss && ip -n %ss link add br0 type bridge && ip -n %ss link set br0 up", n->name,
                 n->name, n->name);
    for (int host = NETWORK_COORDINATOR; host < agents && rc == 0; host++)
        rc = host_start(n, host);
    if (rc < 0)
        network_stop(n);
    return rc;
}

void network_stop(struct network *n)
{
    char ns[32];
    for (int host = NETWORK_COORDINATOR; host < n->agents; host++) {
        host_name(n->name, host, ns);
        (void)run("ip netns del %s 2>/dev/null || true", ns);
    }
    (void)run("ip netns del %ss 2>/dev/null || true", n->name);
}

int network_enter(const char *name, int host)
{
    char ns[32], path[64];
    host_name(name, host, ns);
    snprintf(path, sizeof path, "/var/run/netns/%s", ns);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    int rc = fd < 0 ? -1 : setns(fd, CLONE_NEWNET);
    if (fd >= 0)
        close(fd);
    return rc;
}

static void host_rules(const struct network *n, int host, const char *in, const char *out)
{
    char ns[32];
    host_name(n->name, host, ns);
    if (run("ip netns exec %s nft -f - <<'END'\n"
            "table inet cut\n"
            "delete table inet cut\n"
            "table inet cut {\n"
            "  chain in { type filter hook input priority 0; %s; }\n"
            "  chain out { type filter hook output priority 0; %s; }\n"
            "}\n"
            "END",
            ns, in, out) < 0)
        abort();
}

void network_cut(const struct network *n, int host, enum network_cut cut)
{
    static const char *const pass = "accept", *const drop = "meta oif != lo drop",
                             *const drop_in = "meta iif != lo drop";
    static const char *const to_coordinator = "ip daddr " SUBNET ".1 drop";
    host_rules(n, host, cut == NETWORK_CUT || cut == NETWORK_CUT_IN ? drop_in : pass,
               cut == NETWORK_CUT || cut == NETWORK_CUT_OUT ? drop
               : cut == NETWORK_CUT_OUT_TO_COORDINATOR      ? to_coordinator
                                                            : pass);
}

void network_loss(const struct network *n, int host, unsigned percent)
{
    char rule[64];
    snprintf(rule, sizeof rule, "numgen random mod 100 < %u drop", percent);
    host_rules(n, host, percent ? rule : "accept", "accept");
}
