/* A temporary folder of a test. */
#ifndef EEP_TESTS_HARNESS_FOLDER_H
#define EEP_TESTS_HARNESS_FOLDER_H

#include <check.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>

#define FOLDER_MAX 64

/* Makes /tmp/eep-NAME-XXXXXX. */
static inline void folder_make(const char *name, char ret_folder[FOLDER_MAX])
{
    snprintf(ret_folder, FOLDER_MAX, "/tmp/eep-%s-XXXXXX", name);
    ck_assert_ptr_nonnull(mkdtemp(ret_folder));
}

static inline int folder_remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
    (void)st, (void)type, (void)ftw;
    return remove(path);
}

/* With all that is in it; one that is not there is fine. */
static inline void folder_remove(const char *folder)
{
    nftw(folder, folder_remove_one, 8, FTW_DEPTH | FTW_PHYS);
}

#endif
