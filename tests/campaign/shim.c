/* Counts what a program asks of the files below a folder, and lets one of these operations fail or end the process.

   cc -shared -fPIC -O1 shim.c -o shim.so -ldl; LD_PRELOAD=shim.so; then, in the process, campaign_arm(folder, at, mode).
   Counted: opening with O_CREAT or O_TRUNC, writing, rename, link, unlink, mkdir, rmdir, fsync, truncate. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NONE, KILL, HALF, ENOSPC_ON, EIO_ONCE, INTERRUPT, TERMINATE };
#define MOST 65536
static char folder[PATH_MAX];
static long chosen = -1;
static int mode, armed;
static atomic_long count;
static char kinds[MOST]; /* a letter for each operation */

void campaign_arm(const char *path, long at, int what) {
    strncpy(folder, path, sizeof folder - 1);
    chosen = at;
    mode = what;
    count = 0;
    armed = 1;
}
long campaign_count(void) { return count; }
const char *campaign_kinds(void) { return kinds; }

static int below(const char *path) {
    char here[PATH_MAX];
    size_t length = strlen(folder);
    if (!armed || !path) return 0;
    if (path[0] == '/') return strncmp(path, folder, length) == 0;
    return getcwd(here, sizeof here) && strncmp(here, folder, length) == 0;
}
static int below_fd(int fd) {
    char link[64], path[PATH_MAX];
    if (!armed) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length <= 0) return 0;
    path[length] = 0;
    return path[0] == '/' && below(path);
}

/* 0 to go on, -1 with errno to fail, 1 to do half and die. */
static int act(char kind) {
    long number = atomic_fetch_add(&count, 1);
    if (number < MOST) kinds[number] = kind;
    int is_it = number == chosen;
    switch (mode) {
    case KILL:
        if (is_it) kill(getpid(), SIGKILL);
        break;
    case HALF:
        if (is_it) return 1;
        break;
    case ENOSPC_ON: /* what takes room */
        if (chosen >= 0 && number >= chosen && strchr("owml", kind)) { errno = ENOSPC; return -1; }
        break;
    case EIO_ONCE:
        if (is_it) { errno = EIO; return -1; }
        break;
    case INTERRUPT:
    case TERMINATE:
        if (is_it) kill(getpid(), mode == INTERRUPT ? SIGINT : SIGTERM);
        break;
    }
    return 0;
}

#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
#define GUARD(kind, test, failure) \
    if (test) { \
        int what = act(kind); \
        if (what < 0) return failure; \
        if (what > 0) kill(getpid(), SIGKILL); \
    }

ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    if (below_fd(fd)) {
        int what = act('w');
        if (what < 0) return -1;
        if (what > 0) { real(fd, data, size / 2); kill(getpid(), SIGKILL); }
    }
    return real(fd, data, size);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    REAL(pwrite64);
    if (below_fd(fd)) {
        int what = act('w');
        if (what < 0) return -1;
        if (what > 0) { real(fd, data, size / 2, at); kill(getpid(), SIGKILL); }
    }
    return real(fd, data, size, at);
}
ssize_t writev(int fd, const struct iovec *parts, int many) {
    REAL(writev);
    if (below_fd(fd)) {
        int what = act('w');
        if (what < 0) return -1;
        if (what > 0) { real(fd, parts, many > 1 ? many / 2 : 0); kill(getpid(), SIGKILL); }
    }
    return real(fd, parts, many);
}
ssize_t sendfile64(int out, int in, off64_t *at, size_t size) {
    extern ssize_t sendfile64(int, int, off64_t *, size_t);
    REAL(sendfile64);
    if (below_fd(out)) {
        int what = act('w');
        if (what < 0) return -1;
        if (what > 0) { real(out, in, at, 100); kill(getpid(), SIGKILL); }
    }
    return real(out, in, at, size);
}
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags) {
    REAL(copy_file_range);
    GUARD('w', below_fd(out), -1);
    return real(in, from, out, to, size, flags);
}

#define OPENED(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name); \
        va_list list; \
        va_start(list, flags); \
        mode_t bits = va_arg(list, int); \
        va_end(list); \
        GUARD('o', (flags & (O_CREAT | O_TRUNC)) && below(path), -1); \
        return real(path, flags, bits); \
    }
#define OPENED_AT(name) \
    int name(int at, const char *path, int flags, ...) { \
        REAL(name); \
        va_list list; \
        va_start(list, flags); \
        mode_t bits = va_arg(list, int); \
        va_end(list); \
        GUARD('o', (flags & (O_CREAT | O_TRUNC)) && below(path), -1); \
        return real(at, path, flags, bits); \
    }
OPENED(open)
OPENED(open64)
OPENED_AT(openat)
OPENED_AT(openat64)
FILE *fopen64(const char *path, const char *how) {
    REAL(fopen64);
    GUARD('o', how[0] != 'r' && below(path), NULL);
    return real(path, how);
}
int rename(const char *from, const char *to) { REAL(rename); GUARD('r', below(to), -1); return real(from, to); }
int renameat(int a, const char *from, int b, const char *to) {
    REAL(renameat);
    GUARD('r', below(to), -1);
    return real(a, from, b, to);
}
int link(const char *from, const char *to) { REAL(link); GUARD('l', below(to), -1); return real(from, to); }
int linkat(int a, const char *from, int b, const char *to, int flags) {
    REAL(linkat);
    GUARD('l', below(to), -1);
    return real(a, from, b, to, flags);
}
int unlink(const char *path) { REAL(unlink); GUARD('u', below(path), -1); return real(path); }
int unlinkat(int at, const char *path, int flags) {
    REAL(unlinkat);
    GUARD('u', path[0] == '/' ? below(path) : below_fd(at), -1);
    return real(at, path, flags);
}
int rmdir(const char *path) { REAL(rmdir); GUARD('u', below(path), -1); return real(path); }
int mkdir(const char *path, mode_t bits) { REAL(mkdir); GUARD('m', below(path), -1); return real(path, bits); }
int fsync(int fd) { REAL(fsync); GUARD('f', below_fd(fd), -1); return real(fd); }
int fdatasync(int fd) { REAL(fdatasync); GUARD('f', below_fd(fd), -1); return real(fd); }
int ftruncate64(int fd, off64_t size) { REAL(ftruncate64); GUARD('t', below_fd(fd), -1); return real(fd, size); }
