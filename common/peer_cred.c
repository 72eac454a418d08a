/* SO_PEERCRED and SO_PEERGROUPS: see peer_cred.h. */
#include "common/peer_cred.h"

#include <stdbool.h>
#include <stddef.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define GROUPS_MAX 1024

/* The group of the file that the listener is bound to. */
static bool socket_group(int fd, gid_t *ret_group)
{
    struct sockaddr_un un = {0};
    socklen_t len = sizeof un;
    struct stat st;
    if (getsockname(fd, (struct sockaddr *)&un, &len) != 0 || len <= offsetof(struct sockaddr_un, sun_path) ||
        len >= sizeof un || !un.sun_path[0] || stat(un.sun_path, &st) != 0)
        return false;
    *ret_group = st.st_gid;
    return true;
}

static bool in_group(int fd, const struct ucred *peer, gid_t group)
{
    gid_t groups[GROUPS_MAX];
    socklen_t len = sizeof groups;
    if (peer->gid == group)
        return true;
    if (getsockopt(fd, SOL_SOCKET, SO_PEERGROUPS, groups, &len) != 0)
        return false;
    for (size_t i = 0; i < len / sizeof groups[0]; i++) {
        if (groups[i] == group)
            return true;
    }
    return false;
}

int peer_cred_check(int fd, struct err *err)
{
    struct sockaddr_storage self;
    struct ucred peer;
    socklen_t self_len = sizeof self, len = sizeof peer;
    gid_t group = (gid_t)-1;
    if (getsockname(fd, (struct sockaddr *)&self, &self_len) == 0 && self.ss_family != AF_UNIX)
        return 0;
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &len) != 0)
        return err_set(err, ERR_DENIED, "who is at the other end of the unix socket is not known");
    if (peer.uid == 0 || peer.uid == geteuid() || (socket_group(fd, &group) && in_group(fd, &peer, group)))
        return 0;
    return err_set(
        err, ERR_DENIED,
        "user %u may not use this unix socket: it is for root, for user %u, and for members of its group (%d)",
        (unsigned)peer.uid, (unsigned)geteuid(), (int)group);
}
