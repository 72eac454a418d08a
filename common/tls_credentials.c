/* Credentials of the systemd unit as our certificate: see tls.h.  systemd copies them when the unit starts. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/tls.h"

#define ABSENT "none" /* what the unit sets where there is no file */

static bool is_there(const char *path)
{
    char text[sizeof ABSENT] = "";
    FILE *f = fopen(path, "re");
    if (!f)
        return false;
    size_t n = fread(text, 1, sizeof text - 1, f);
    fclose(f);
    return n > 0 && strcmp(text, ABSENT) != 0;
}

int tls_take_credentials(struct tls_files *files, struct tls_credentials *ret_paths, struct err *err)
{
    static const char *const names[] = {"tls-cert", "tls-key", "tls-ca"};
    const char *folder = getenv("CREDENTIALS_DIRECTORY");
    if (!folder || files->cert || files->key || files->ca)
        return 0;
    for (size_t i = 0; i < 3; i++) {
        char *path = ret_paths->path[i];
        int n = snprintf(path, sizeof ret_paths->path[i], "%s/%s", folder, names[i]);
        if (n < (int)sizeof ret_paths->path[i] && is_there(path))
            continue;
        if (i == 0)
            return 0;
        return err_set(
            err, ERR_INVALID,
            "the unit has a credential tls-cert, but no %s: put all of its three files where its LoadCredential= "
            "looks for them (systemctl cat), or none",
            names[i]);
    }
    *files = (struct tls_files){.cert = ret_paths->path[0], .key = ret_paths->path[1], .ca = ret_paths->path[2]};
    return 0;
}

bool tls_has_credentials(const struct tls_files *files)
{
    const char *folder = getenv("CREDENTIALS_DIRECTORY");
    return folder && files->cert && strncmp(files->cert, folder, strlen(folder)) == 0;
}
