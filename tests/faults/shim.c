/* File operations below one folder: counted, killed at the n-th, failed once at the n-th, recorded with their data.
 *
 * Preloaded (LD_PRELOAD) into a process that calls the C library for every operation, as Python does. A descriptor's file
 * is asked of /proc at each operation, so that renamed files, copied descriptors and inherited ones are followed.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

/* The kinds of operations, in the order of shim.py's KINDS. */
enum { OPEN, CREATE, WRITE, SYNC, RENAME, UNLINK, LINK, TRUNCATE, MKDIR, RMDIR };

/* Written to the trace before what it describes, which has taken place: both paths and the data follow. */
struct record {
    int32_t kind, count;
    uint64_t file; /* the inode */
    int64_t offset, size, first, second; /* of the data, and of the paths, in bytes */
};

static char under[PATH_MAX];  /* the folder; empty: the shim does nothing */
static size_t under_length;
static unsigned kinds;        /* a bit for each kind that counts */
static long kill_at, fail_at; /* the number of an operation, from 1; 0: none */
static long kill_delay;       /* microseconds after it; -1: before it, a write being half done */
static int fail_errno;
static int trace = -1;
static long count;
static __thread long number; /* of this thread's last operation that counted */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* Takes effect at once. trace_path: where to record, or empty. */
void faults_set(const char *folder, unsigned which, long kill_number, long delay, long fail_number, int error,
                const char *trace_path) {
    pthread_mutex_lock(&lock);
    if (trace >= 0) syscall(SYS_close, trace);
    trace = *trace_path ? syscall(SYS_openat, AT_FDCWD, trace_path, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0644) : -1;
    kinds = which, kill_at = kill_number, kill_delay = delay, fail_at = fail_number, fail_errno = error, count = 0;
    strncpy(under, folder, sizeof under - 1);
    under_length = strlen(under);
    pthread_mutex_unlock(&lock);
}

long faults_count(void) { return count; }

/* Other processes of a run inherit the environment: only the first of them has faults. */
__attribute__((constructor)) static void from_environment(void) {
    const char *given = getenv("FAULTS"), *rank = getenv("LOCAL_RANK");
    unsigned which;
    long kill_number, delay, fail_number;
    int error, length;
    if (!given || (rank && strcmp(rank, "0"))) return;
    if (sscanf(given, "%u %ld %ld %ld %d %n", &which, &kill_number, &delay, &fail_number, &error, &length) == 5)
        faults_set(given + length, which, kill_number, delay, fail_number, error, "");
}

static int is_below(const char *path) {
    return under_length && !strncmp(path, under, under_length) && (path[under_length] == '/' || !path[under_length]);
}

/* The path of a descriptor; whether it is below the folder. */
static int path_of(int fd, char *path) {
    char link[64];
    if (!under_length) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length > 0 ? length : 0] = 0;
    return is_below(path);
}

/* The absolute path of a name, without looking at what it names. */
static int resolve(int folder, const char *name, char *path) {
    if (!under_length || !name) return 0;
    if (*name == '/') {
        snprintf(path, PATH_MAX, "%s", name);
    } else {
        char base[PATH_MAX];
        if (folder != AT_FDCWD) path_of(folder, base);
        else if (!getcwd(base, sizeof base)) return 0;
        snprintf(path, PATH_MAX, "%.2000s/%.2000s", base, name);
    }
    if (strstr(path, "/../")) {
        char above[PATH_MAX], *last = strrchr(path, '/');
        *last = 0;
        if (!realpath(path, above)) return 0;
        *last = '/';
        snprintf(path, PATH_MAX, "%.2000s/%.2000s", above, strrchr(name, '/') + 1);
    }
    return is_below(path);
}

static void *kill_later(void *unused) {
    usleep(kill_delay);
    kill(getpid(), SIGKILL);
    return unused;
}

/* Counts an operation and does to it what was asked for: nothing (0), fail (-1, errno set), or kill before it ends (1). */
static int fault(int kind) {
    if (!(kinds >> kind & 1)) return 0;
    number = __atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST);
    if (number == fail_at) {
        errno = kind == OPEN || kind == CREATE || fail_errno != EMFILE ? fail_errno : EIO;
        return -1;
    }
    if (number == kill_at && kill_delay < 0) {
        if (kind == WRITE) return 1;
        kill(getpid(), SIGKILL);
    }
    if (number == kill_at) {
        pthread_t thread;
        pthread_create(&thread, NULL, kill_later, NULL);
    }
    return 0;
}

static void put(const void *data, size_t size) {
    while (size) {
        ssize_t written = syscall(SYS_write, trace, data, size);
        if (written <= 0) _exit(99);
        data = (const char *)data + written, size -= written;
    }
}

static void note(int kind, uint64_t file, int64_t offset, const char *first, const char *second, const void *data,
                 int64_t size) {
    if (trace < 0) return;
    int saved = errno;
    struct record record = {kind, kinds >> kind & 1 ? number : 0, file, offset, size, strlen(first), strlen(second)};
    pthread_mutex_lock(&lock);
    put(&record, sizeof record);
    put(first, record.first);
    put(second, record.second);
    if (data) put(data, size);
    pthread_mutex_unlock(&lock);
    errno = saved;
}

static uint64_t inode(int fd) {
    struct stat status;
    return fstat(fd, &status) ? 0 : status.st_ino;
}

static int open_any(int folder, const char *name, int flags, mode_t mode) {
    char path[PATH_MAX];
    struct stat status;
    if (!resolve(folder, name, path) || (flags & O_TMPFILE) == O_TMPFILE)
        return syscall(SYS_openat, folder, name, flags, mode);
    int is_new = flags & O_CREAT && lstat(path, &status), kind = is_new ? CREATE : OPEN;
    if (fault(kind)) return -1;
    int fd = syscall(SYS_openat, folder, name, flags, mode);
    if (fd >= 0) {
        note(kind, inode(fd), 0, path, "", NULL, 0);
        if (flags & O_TRUNC && !is_new) note(TRUNCATE, inode(fd), 0, path, "", NULL, 0);
    }
    return fd;
}

#define OPEN_LIKE(name)                                                                                                \
    int name(const char *path, int flags, ...) {                                                                       \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;                                        \
        va_end(rest);                                                                                                  \
        return open_any(AT_FDCWD, path, flags, mode);                                                                  \
    }
#define OPENAT_LIKE(name)                                                                                              \
    int name(int folder, const char *path, int flags, ...) {                                                           \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;                                        \
        va_end(rest);                                                                                                  \
        return open_any(folder, path, flags, mode);                                                                    \
    }
OPEN_LIKE(open)
OPEN_LIKE(open64)
OPENAT_LIKE(openat)
OPENAT_LIKE(openat64)
int creat(const char *path, mode_t mode) { return open_any(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return open_any(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }

/* A write at an offset, or where the descriptor stands (-1). */
static ssize_t write_any(int fd, const void *data, size_t size, off_t offset) {
    char path[PATH_MAX];
    int below = path_of(fd, path), what = below ? fault(WRITE) : 0;
    if (what < 0) return -1;
    if (what > 0) size /= 2;
    int64_t place = offset;
    if (below && trace >= 0 && offset < 0) {
        struct stat status;
        place = fcntl(fd, F_GETFL) & O_APPEND && !fstat(fd, &status) ? status.st_size : lseek(fd, 0, SEEK_CUR);
    }
    ssize_t done = offset < 0 ? syscall(SYS_write, fd, data, size) : syscall(SYS_pwrite64, fd, data, size, offset);
    if (what > 0) kill(getpid(), SIGKILL);
    if (below && done > 0) note(WRITE, inode(fd), place, path, "", data, done);
    return done;
}

ssize_t write(int fd, const void *data, size_t size) { return write_any(fd, data, size, -1); }
ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) { return write_any(fd, data, size, offset); }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) { return write_any(fd, data, size, offset); }

/* Of several buffers only the first is written where the operation counts, as the C library may. */
ssize_t writev(int fd, const struct iovec *buffers, int many) {
    char path[PATH_MAX];
    if (!path_of(fd, path)) return syscall(SYS_writev, fd, buffers, many);
    while (many > 1 && !buffers->iov_len) buffers++, many--;
    return many ? write_any(fd, buffers->iov_base, buffers->iov_len, -1) : 0;
}
ssize_t pwritev(int fd, const struct iovec *buffers, int many, off_t offset) {
    while (many > 1 && !buffers->iov_len) buffers++, many--;
    return many ? write_any(fd, buffers->iov_base, buffers->iov_len, offset) : 0;
}
ssize_t pwritev64(int fd, const struct iovec *buffers, int many, off64_t offset) {
    return pwritev(fd, buffers, many, offset);
}

/* Copies inside the kernel are made to look impossible below the folder: programs then read and write. */
ssize_t sendfile(int out, int in, off_t *offset, size_t size) {
    char path[PATH_MAX];
    if (path_of(out, path)) return errno = ENOTSOCK, -1;
    return syscall(SYS_sendfile, out, in, offset, size);
}
ssize_t sendfile64(int out, int in, off64_t *offset, size_t size) { return sendfile(out, in, offset, size); }
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags) {
    char path[PATH_MAX];
    if (path_of(out, path)) return errno = EXDEV, -1;
    return syscall(SYS_copy_file_range, in, from, out, to, size, flags);
}

static int sync_any(int fd, long call) {
    char path[PATH_MAX];
    if (!path_of(fd, path)) return syscall(call, fd);
    if (fault(SYNC)) return -1;
    /* What was written in ways that are not seen here, by the C library's own streams or through memory, is safe now. */
    struct stat status;
    if (trace >= 0 && !fstat(fd, &status) && S_ISREG(status.st_mode) && status.st_size) {
        char *all = malloc(status.st_size), name[64];
        snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
        int again = syscall(SYS_openat, AT_FDCWD, name, O_RDONLY | O_CLOEXEC, 0);
        long saved = number;
        number = 0;
        if (all && pread(again, all, status.st_size, 0) == status.st_size)
            note(WRITE, status.st_ino, 0, path, "", all, status.st_size);
        number = saved;
        syscall(SYS_close, again);
        free(all);
    }
    /* The disk's own sync takes milliseconds and changes nothing that a process sees. */
    note(SYNC, inode(fd), 0, path, "", NULL, 0);
    return 0;
}
int fsync(int fd) { return sync_any(fd, SYS_fsync); }
int fdatasync(int fd) { return sync_any(fd, SYS_fdatasync); }

static int truncate_any(int fd, off_t size) {
    char path[PATH_MAX];
    int below = path_of(fd, path);
    if (below && fault(TRUNCATE)) return -1;
    int result = syscall(SYS_ftruncate, fd, size);
    if (below && !result) note(TRUNCATE, inode(fd), size, path, "", NULL, 0);
    return result;
}
int ftruncate(int fd, off_t size) { return truncate_any(fd, size); }
int ftruncate64(int fd, off64_t size) { return truncate_any(fd, size); }
int truncate(const char *name, off_t size) {
    int fd = open_any(AT_FDCWD, name, O_WRONLY, 0);
    int result = fd < 0 ? -1 : truncate_any(fd, size);
    if (fd >= 0) syscall(SYS_close, fd);
    return result;
}
int truncate64(const char *name, off64_t size) { return truncate(name, size); }
int posix_fallocate(int fd, off_t offset, off_t size) {
    char path[PATH_MAX];
    struct stat status;
    if (!path_of(fd, path)) return syscall(SYS_fallocate, fd, 0, offset, size) ? errno : 0;
    if (fstat(fd, &status) || (status.st_size < offset + size && truncate_any(fd, offset + size))) return errno;
    return 0;
}
int posix_fallocate64(int fd, off64_t offset, off64_t size) { return posix_fallocate(fd, offset, size); }
int fallocate(int fd, int mode, off_t offset, off_t size) {
    char path[PATH_MAX];
    if (path_of(fd, path)) return errno = EOPNOTSUPP, -1;
    return syscall(SYS_fallocate, fd, mode, offset, size);
}
int fallocate64(int fd, int mode, off64_t offset, off64_t size) { return fallocate(fd, mode, offset, size); }

/* An operation on the names in a folder. */
static int names(int kind, long call, int from, const char *old, int to, const char *new, int flags) {
    char first[PATH_MAX] = "", second[PATH_MAX] = "";
    int below = resolve(from, old, first);
    if (new) below |= resolve(to, new, second);
    if (below && fault(kind)) return -1;
    int result = call == SYS_unlinkat || call == SYS_mkdirat ? syscall(call, from, old, flags)
                                                             : syscall(call, from, old, to, new, flags);
    if (below && !result) note(kind, 0, flags, first, second, NULL, 0);
    return result;
}
int rename(const char *old, const char *new) { return names(RENAME, SYS_renameat2, AT_FDCWD, old, AT_FDCWD, new, 0); }
int renameat(int from, const char *old, int to, const char *new) {
    return names(RENAME, SYS_renameat2, from, old, to, new, 0);
}
int renameat2(int from, const char *old, int to, const char *new, unsigned flags) {
    return names(RENAME, SYS_renameat2, from, old, to, new, flags);
}
int link(const char *old, const char *new) { return names(LINK, SYS_linkat, AT_FDCWD, old, AT_FDCWD, new, 0); }
int linkat(int from, const char *old, int to, const char *new, int flags) {
    return names(LINK, SYS_linkat, from, old, to, new, flags);
}
int unlink(const char *name) { return names(UNLINK, SYS_unlinkat, AT_FDCWD, name, 0, NULL, 0); }
int unlinkat(int folder, const char *name, int flags) {
    return names(flags & AT_REMOVEDIR ? RMDIR : UNLINK, SYS_unlinkat, folder, name, 0, NULL, flags);
}
int rmdir(const char *name) { return names(RMDIR, SYS_unlinkat, AT_FDCWD, name, 0, NULL, AT_REMOVEDIR); }
int remove(const char *name) {
    struct stat status;
    return !lstat(name, &status) && S_ISDIR(status.st_mode) ? rmdir(name) : unlink(name);
}
int mkdir(const char *name, mode_t mode) { return names(MKDIR, SYS_mkdirat, AT_FDCWD, name, 0, NULL, mode); }
int mkdirat(int folder, const char *name, mode_t mode) { return names(MKDIR, SYS_mkdirat, folder, name, 0, NULL, mode); }
