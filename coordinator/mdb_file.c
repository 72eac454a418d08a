/* An LMDB file of ours: opening, growing, and what its codes mean.  Any one thread at a time. */
#include "coordinator/mdb_file.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define MAP_BYTES_FIRST ((size_t)16 << 20)
#define MAP_BYTES_MAX ((size_t)64 << 30)
#define PATH_BYTES 4096
#define LOCK_BYTES 8192 /* of LMDB, with its 126 readers */

int mdb_file_err(struct err *err, int mdb, const char *file, const char *what)
{
    int code = ERR_IO;
    if (mdb == ENOMEM)
        code = ERR_NOMEM;
    else if (mdb == MDB_CORRUPTED || mdb == MDB_PAGE_NOTFOUND || mdb == MDB_INVALID || mdb == MDB_PANIC)
        code = ERR_CORRUPT;
    else if (mdb == MDB_VERSION_MISMATCH)
        code = ERR_UNSUPPORTED;
    const char *hint = "";
    if (mdb == ENOSPC || mdb == EDQUOT)
        hint = "; make room in the state folder, or name another with --state";
    else if (mdb == EROFS || mdb == EACCES || mdb == EPERM)
        hint = "; make the state folder writable for this user, or name another with --state";
    return err_set(err, code, "%s: %s: %s%s", file, what, mdb_strerror(mdb), hint);
}

int mdb_file_grow(MDB_env *env)
{
    MDB_envinfo info;
    int rc = mdb_env_info(env, &info);
    if (rc != 0)
        return rc;
    return info.me_mapsize >= MAP_BYTES_MAX ? MDB_MAP_FULL : mdb_env_set_mapsize(env, info.me_mapsize * 2);
}

/* LMDB maps its lock file and writes there: on a full disk that would be a SIGBUS, so its room is taken before.  0 or an
 * errno. */
static int lock_reserve(const char *path)
{
    char lock[PATH_BYTES + 32];
    struct stat st;
    snprintf(lock, sizeof lock, "%s-lock", path);
    int fd = open(lock, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0)
        return errno;
    int rc = fstat(fd, &st) < 0 ? errno : 0;
    if (rc == 0 && st.st_size < LOCK_BYTES)
        rc = posix_fallocate(fd, 0, LOCK_BYTES);
    close(fd);
    return rc;
}

static int env_open(const char *path, unsigned flags, MDB_env **ret_env, MDB_dbi *ret_dbi)
{
    MDB_env *env = NULL;
    MDB_txn *txn = NULL;
    int rc = flags & MDB_NOLOCK ? 0 : lock_reserve(path);
    if (rc == 0)
        rc = mdb_env_create(&env);
    if (rc == 0)
        rc = mdb_env_set_mapsize(env, MAP_BYTES_FIRST);
    if (rc == 0)
        rc = mdb_env_open(env, path, MDB_NOSUBDIR | flags, 0600);
    if (rc == 0)
        rc = mdb_txn_begin(env, NULL, MDB_RDONLY, &txn);
    if (rc == 0)
        rc = mdb_dbi_open(txn, NULL, 0, ret_dbi);
    if (txn && rc == 0)
        rc = mdb_txn_commit(txn);
    else if (txn)
        mdb_txn_abort(txn);
    if (rc != 0) {
        if (env)
            mdb_env_close(env);
        return rc;
    }
    *ret_env = env;
    return 0;
}

/* Touches every key and value of a database. */
static int database_walk(MDB_txn *txn, MDB_dbi dbi)
{
    MDB_cursor *cursor;
    MDB_val key, value;
    volatile uint8_t sum = 0;
    int rc = mdb_cursor_open(txn, dbi, &cursor);
    while (rc == 0 && (rc = mdb_cursor_get(cursor, &key, &value, MDB_NEXT)) == 0) {
        for (size_t i = 0; i < key.mv_size; i++)
            sum = (uint8_t)(sum + ((const uint8_t *)key.mv_data)[i]);
        for (size_t i = 0; i < value.mv_size; i++)
            sum = (uint8_t)(sum + ((const uint8_t *)value.mv_data)[i]);
    }
    return rc == MDB_NOTFOUND ? 0 : rc;
}

/* Ours, and LMDB's own list of free pages, which is database 0.  What cannot be opened is for env_open to tell. */
static int file_walk(const char *path)
{
    MDB_env *env;
    MDB_dbi dbi;
    MDB_txn *txn;
    if (env_open(path, MDB_RDONLY | MDB_NOLOCK, &env, &dbi) != 0)
        return 0;
    int rc = mdb_txn_begin(env, NULL, MDB_RDONLY, &txn);
    if (rc == 0)
        rc = database_walk(txn, 0);
    return rc == 0 ? database_walk(txn, dbi) : rc;
}

/* A new file is made under another name and renamed when it is whole: whoever is killed in between leaves nothing behind
 * that could not be opened. */
static int file_make(const char *path, struct err *err)
{
    char fresh[PATH_BYTES + 16], lock[PATH_BYTES + 32];
    MDB_env *env;
    MDB_dbi dbi;
    snprintf(fresh, sizeof fresh, "%s.new", path);
    snprintf(lock, sizeof lock, "%s-lock", fresh);
    (void)unlink(fresh);
    int rc = env_open(fresh, 0, &env, &dbi);
    if (rc != 0)
        return mdb_file_err(err, rc, fresh, "cannot make it");
    rc = mdb_env_sync(env, 1);
    mdb_env_close(env);
    (void)unlink(lock);
    if (rc != 0)
        return mdb_file_err(err, rc, fresh, "cannot write it");
    return rename(fresh, path) == 0 ? 0 : err_set(err, ERR_IO, "cannot name %s: %s", path, strerror(errno));
}

/* In a process of its own, which a damaged page may end. */
static int probe(const char *path, struct err *err)
{
    struct stat file;
    if (stat(path, &file) < 0)
        return errno == ENOENT ? file_make(path, err) : err_set(err, ERR_IO, "%s: %s", path, strerror(errno));
    pid_t child = fork();
    if (child < 0)
        return err_set(err, ERR_NOMEM, "cannot look through %s: fork: %s", path, strerror(errno));
    if (child == 0) {
        signal(SIGSEGV, SIG_DFL);
        signal(SIGBUS, SIG_DFL);
        int null = open("/dev/null", O_WRONLY);
        if (null >= 0)
            dup2(null, 2); /* LMDB's assertions talk */
        _exit(file_walk(path) == 0 ? 0 : 1);
    }
    int status;
    while (waitpid(child, &status, 0) < 0 && errno == EINTR)
        ;
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0)
        return 0;
    return err_set(err, ERR_CORRUPT, "%s is %s; restore it from a backup, or start with an empty state folder", path,
                   WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS ? "cut off: pages are missing at its end"
                                                                     : "damaged: its pages cannot be walked");
}

static int folder_sync(const char *path, struct err *err)
{
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int rc = fd < 0 || fsync(fd) < 0 ? err_set(err, ERR_IO, "cannot sync the folder %s: %s", path, strerror(errno)) : 0;
    if (fd >= 0)
        close(fd);
    return rc;
}

int mdb_file_open(const char *dir, const char *name, unsigned flags, MDB_env **ret_env, MDB_dbi *ret_dbi,
                  struct err *err)
{
    char path[PATH_BYTES];
    if ((size_t)snprintf(path, sizeof path, "%s/%s", dir, name) >= sizeof path)
        return err_set(err, ERR_INVALID, "the path of the state folder is too long");
    int rc = probe(path, err);
    if (rc < 0)
        return rc;
    MDB_env *env;
    rc = env_open(path, flags, &env, ret_dbi);
    if (rc != 0)
        return mdb_file_err(err, rc, path, "cannot open it");
    rc = folder_sync(dir, err);
    if (rc < 0) {
        mdb_env_close(env);
        return rc;
    }
    *ret_env = env;
    return 0;
}
