/* Makes file system calls below a folder fail; tests/faults/injected.py compiles it, preloads it and sets INJECT_*.

   The n-th call of one kind fails; with INJECT_STAYS, so does from then on every call of the kinds in INJECT_KINDS. All
   processes of a start count together, in a file that they map. */

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind { OPEN, CREATE, READ, WRITE, FSYNC, RENAME, CLOSE, MKDIR, STAT, STATVFS, UNLINK, LIST, LOCK, MAP, TRUNCATE, KINDS };

/* injected.py reads it. */
struct tally {
    long calls[KINDS];
    long struck;
    char first[512];
};

static struct {
    const char *under;
    size_t length;
    struct tally *tally;
    int error, kind, stays;
    long at;
    unsigned kinds;
} plan;

static long number(const char *name) {
    const char *text = getenv(name);
    return text ? atol(text) : 0;
}

/* Reads the plan; called again in a fork, whose variables are its own. */
__attribute__((constructor)) void inject_begin(void) {
    const char *under = getenv("INJECT_UNDER"), *file = getenv("INJECT_TALLY");
    if (!under || !file) {
        unsetenv("LD_PRELOAD"); /* what this process starts is not disturbed */
        return;
    }
    int fd = syscall(SYS_openat, AT_FDCWD, file, O_RDWR);
    if (fd < 0)
        abort();
    void *map = mmap(NULL, sizeof(struct tally), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    syscall(SYS_close, fd);
    plan.length = strlen(under);
    plan.error = number("INJECT_ERRNO");
    plan.kind = number("INJECT_KIND");
    plan.at = number("INJECT_AT");
    plan.stays = number("INJECT_STAYS");
    plan.kinds = number("INJECT_KINDS");
    plan.tally = map;
    plan.under = strdup(under);
}

static int is_below(const char *path) {
    return !strncmp(path, plan.under, plan.length) && (path[plan.length] == '/' || !path[plan.length]);
}

static void name_of(int fd, char *out) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    long n = syscall(SYS_readlinkat, AT_FDCWD, link, out, PATH_MAX - 1);
    out[n < 0 ? 0 : n] = 0;
}

/* Writes where a path leads, without following links. */
static void place(int dir, const char *path, char *out) {
    int fd;
    *out = 0;
    if (!path || !*path)
        name_of(dir, out);
    else if (sscanf(path, "/proc/self/fd/%d", &fd) == 1)
        name_of(fd, out);
    else if (*path == '/')
        snprintf(out, PATH_MAX, "%s", path);
    else {
        if (dir == AT_FDCWD)
            syscall(SYS_getcwd, out, PATH_MAX);
        else
            name_of(dir, out);
        size_t n = strlen(out);
        snprintf(out + n, PATH_MAX - n, "/%s", path);
    }
}

/* Whether this call fails; sets errno. */
static int fails(enum kind kind, int dir, const char *path) {
    int before = errno, strikes = 0;
    char full[PATH_MAX];
    if (!plan.under)
        return 0;
    place(dir, path, full);
    if (is_below(full)) {
        struct tally *t = plan.tally;
        long n = __atomic_add_fetch(&t->calls[kind], 1, __ATOMIC_SEQ_CST);
        int first = plan.at && (int)kind == plan.kind && n == plan.at;
        strikes = first || (plan.stays && t->struck && plan.kinds >> kind & 1);
        if (first)
            snprintf(t->first, sizeof t->first, "%.511s", full);
        if (strikes)
            __atomic_add_fetch(&t->struck, 1, __ATOMIC_SEQ_CST);
    }
    errno = strikes ? plan.error : before;
    return strikes;
}

#define REAL(name)                                   \
    static __typeof__(&name) real;                   \
    if (!real)                                       \
        real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define CALL(kind, dir, path, failed, type, name, parameters, arguments) \
    type name parameters {                                               \
        REAL(name);                                                      \
        return fails(kind, dir, path) ? failed : real arguments;         \
    }

#define OPENING(name)                                                                     \
    int name(const char *path, int flags, ...) {                                          \
        REAL(name);                                                                       \
        va_list more;                                                                     \
        va_start(more, flags);                                                            \
        mode_t mode = va_arg(more, mode_t);                                               \
        va_end(more);                                                                     \
        return fails(kind_of(AT_FDCWD, path, flags), AT_FDCWD, path) ? -1 : real(path, flags, mode); \
    }

#define OPENING_AT(name)                                                                  \
    int name(int dir, const char *path, int flags, ...) {                                 \
        REAL(name);                                                                       \
        va_list more;                                                                     \
        va_start(more, flags);                                                            \
        mode_t mode = va_arg(more, mode_t);                                               \
        va_end(more);                                                                     \
        return fails(kind_of(dir, path, flags), dir, path) ? -1 : real(dir, path, flags, mode); \
    }

/* A file that is there needs no inode. */
static enum kind kind_of(int dir, const char *path, int flags) {
    int before = errno;
    int there = !(flags & O_CREAT) || !syscall(SYS_faccessat, dir, path, F_OK);
    errno = before;
    return (flags & O_TMPFILE) == O_TMPFILE || !there ? CREATE : OPEN;
}

/* A disk that gets full takes a part of what is written. */
#define WRITING(name, parameters, some, all)                                                       \
    ssize_t name parameters {                                                                      \
        REAL(name);                                                                                \
        long before = plan.under ? plan.tally->struck : 0;                                         \
        if (!fails(WRITE, fd, NULL))                                                               \
            return real all;                                                                       \
        return !before && size > 1 && (plan.error == ENOSPC || plan.error == EDQUOT) ? real some : -1; \
    }

OPENING(open)
OPENING(open64)
OPENING_AT(openat)
OPENING_AT(openat64)
WRITING(write, (int fd, const void *from, size_t size), (fd, from, size / 2), (fd, from, size))
WRITING(pwrite, (int fd, const void *from, size_t size, off_t at), (fd, from, size / 2, at), (fd, from, size, at))
WRITING(pwrite64, (int fd, const void *from, size_t size, off64_t at), (fd, from, size / 2, at), (fd, from, size, at))
WRITING(sendfile, (int fd, int in, off_t *at, size_t size), (fd, in, at, size / 2), (fd, in, at, size))
WRITING(sendfile64, (int fd, int in, off64_t *at, size_t size), (fd, in, at, size / 2), (fd, in, at, size))
CALL(WRITE, fd, NULL, -1, ssize_t, writev, (int fd, const struct iovec *from, int n), (fd, from, n))
CALL(READ, fd, NULL, -1, ssize_t, read, (int fd, void *into, size_t size), (fd, into, size))
CALL(READ, fd, NULL, -1, ssize_t, pread, (int fd, void *into, size_t size, off_t at), (fd, into, size, at))
CALL(READ, fd, NULL, -1, ssize_t, pread64, (int fd, void *into, size_t size, off64_t at), (fd, into, size, at))
CALL(FSYNC, fd, NULL, -1, int, fsync, (int fd), (fd))
CALL(FSYNC, fd, NULL, -1, int, fdatasync, (int fd), (fd))
CALL(RENAME, AT_FDCWD, new, -1, int, rename, (const char *old, const char *new), (old, new))
CALL(RENAME, to, new, -1, int, renameat, (int from, const char *old, int to, const char *new), (from, old, to, new))
CALL(MKDIR, AT_FDCWD, path, -1, int, mkdir, (const char *path, mode_t mode), (path, mode))
CALL(MKDIR, dir, path, -1, int, mkdirat, (int dir, const char *path, mode_t mode), (dir, path, mode))
CALL(UNLINK, AT_FDCWD, path, -1, int, unlink, (const char *path), (path))
CALL(UNLINK, AT_FDCWD, path, -1, int, rmdir, (const char *path), (path))
CALL(UNLINK, dir, path, -1, int, unlinkat, (int dir, const char *path, int flags), (dir, path, flags))
CALL(STAT, AT_FDCWD, path, -1, int, stat, (const char *path, struct stat *into), (path, into))
CALL(STAT, AT_FDCWD, path, -1, int, stat64, (const char *path, struct stat64 *into), (path, into))
CALL(STAT, AT_FDCWD, path, -1, int, lstat, (const char *path, struct stat *into), (path, into))
CALL(STAT, AT_FDCWD, path, -1, int, lstat64, (const char *path, struct stat64 *into), (path, into))
CALL(STAT, fd, NULL, -1, int, fstat, (int fd, struct stat *into), (fd, into))
CALL(STAT, fd, NULL, -1, int, fstat64, (int fd, struct stat64 *into), (fd, into))
CALL(STAT, dir, path, -1, int, fstatat, (int dir, const char *path, struct stat *into, int f), (dir, path, into, f))
CALL(STAT, dir, path, -1, int, fstatat64, (int dir, const char *path, struct stat64 *into, int f), (dir, path, into, f))
CALL(STAT, dir, path, -1, int, statx, (int dir, const char *path, int f, unsigned m, struct statx *into), (dir, path, f, m, into))
CALL(STATVFS, AT_FDCWD, path, -1, int, statvfs, (const char *path, struct statvfs *into), (path, into))
CALL(STATVFS, AT_FDCWD, path, -1, int, statvfs64, (const char *path, struct statvfs64 *into), (path, into))
CALL(STATVFS, fd, NULL, -1, int, fstatvfs, (int fd, struct statvfs *into), (fd, into))
CALL(STATVFS, fd, NULL, -1, int, fstatvfs64, (int fd, struct statvfs64 *into), (fd, into))
CALL(LIST, AT_FDCWD, path, NULL, DIR *, opendir, (const char *path), (path))
CALL(LIST, fd, NULL, NULL, DIR *, fdopendir, (int fd), (fd))
CALL(LOCK, fd, NULL, -1, int, flock, (int fd, int how), (fd, how))
CALL(MAP, fd, NULL, MAP_FAILED, void *, mmap64, (void *at, size_t n, int p, int f, int fd, off64_t o), (at, n, p, f, fd, o))
CALL(TRUNCATE, fd, NULL, -1, int, ftruncate, (int fd, off_t size), (fd, size))
CALL(TRUNCATE, fd, NULL, -1, int, ftruncate64, (int fd, off64_t size), (fd, size))

/* The descriptor is gone, whatever close returns. */
int close(int fd) {
    REAL(close);
    int failed = fails(CLOSE, fd, NULL);
    int done = real(fd);
    if (failed)
        errno = plan.error;
    return failed ? -1 : done;
}
