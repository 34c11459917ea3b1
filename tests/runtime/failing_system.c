// Preloaded before libc: the n-th large allocation, or the n-th call that opens, reads or maps a file of the model, fails.
// `arm(kind, n, always, path)` begins to count, `disarm()` ends it and returns how many calls failed. Libraries in Rust end
// the process when an allocation fails, which nobody can prevent, so theirs do not count.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <unistd.h>

enum { NOTHING, ALLOCATIONS, READS };
static const size_t LARGE = 1 << 10;  // bytes: most of what the engine allocates, and few of Python's own objects
static atomic_int kind, counted, failed, at, always;
static char prefix[4096];

static int fails(int of) {
    if (atomic_load(&kind) != of) return 0;
    const int n = atomic_fetch_add(&counted, 1) + 1;
    if (n != at && !(always && n > at)) return 0;
    atomic_fetch_add(&failed, 1);
    return 1;
}

// Whether an allocation by the code at `caller` fails.
static int refused(size_t size, void* caller) {
    Dl_info from;
    if (size < LARGE || atomic_load(&kind) != ALLOCATIONS) return 0;
    if (dladdr(caller, &from) && (strstr(from.dli_fname, "tokenizers") || strstr(from.dli_fname, "safetensors"))) return 0;
    return fails(ALLOCATIONS);
}

void arm(int of, int n, int persistent, const char* path) {
    strncpy(prefix, path, sizeof prefix - 1);
    at = n;
    always = persistent;
    counted = failed = 0;
    atomic_store(&kind, of);
}

int disarm(void) {
    atomic_store(&kind, NOTHING);
    return failed;
}

#define NEXT(type, name)                                      \
    static type next;                                         \
    if (!next) next = (type)dlsym(RTLD_NEXT, name)

static int of_model(int file) {
    char link[64], path[4096];
    if (atomic_load(&kind) != READS || file < 0) return 0;
    strcpy(link, "/proc/self/fd/");
    char digits[12];
    int n = 0, f = file;
    do digits[n++] = '0' + f % 10; while (f /= 10);
    char* end = link + strlen(link);
    while (n) *end++ = digits[--n];
    *end = 0;
    const ssize_t size = readlink(link, path, sizeof path);
    return size > 0 && !strncmp(path, prefix, strlen(prefix));
}

typedef void* (*Malloc)(size_t);
void* malloc(size_t size) {
    NEXT(Malloc, "malloc");
    if (refused(size, __builtin_return_address(0))) return errno = ENOMEM, NULL;
    return next(size);
}

typedef void* (*Realloc)(void*, size_t);
void* realloc(void* old, size_t size) {
    NEXT(Realloc, "realloc");
    if (refused(size, __builtin_return_address(0))) return errno = ENOMEM, NULL;
    return next(old, size);
}

typedef void* (*Aligned)(size_t, size_t);
void* aligned_alloc(size_t alignment, size_t size) {
    NEXT(Aligned, "aligned_alloc");
    if (refused(size, __builtin_return_address(0))) return errno = ENOMEM, NULL;
    return next(alignment, size);
}

typedef int (*Memalign)(void**, size_t, size_t);
int posix_memalign(void** to, size_t alignment, size_t size) {
    NEXT(Memalign, "posix_memalign");
    if (refused(size, __builtin_return_address(0))) return ENOMEM;
    return next(to, alignment, size);
}

typedef void* (*Map)(void*, size_t, int, int, int, off_t);
void* mmap(void* where, size_t size, int protection, int flags, int file, off_t offset) {
    NEXT(Map, "mmap");
    if (flags & MAP_ANONYMOUS ? refused(size, __builtin_return_address(0)) : of_model(file) && fails(READS))
        return errno = ENOMEM, MAP_FAILED;
    return next(where, size, protection, flags, file, offset);
}
void* mmap64(void* where, size_t size, int protection, int flags, int file, off_t offset) {
    return mmap(where, size, protection, flags, file, offset);
}

typedef ssize_t (*Read)(int, void*, size_t);
ssize_t read(int file, void* to, size_t size) {
    NEXT(Read, "read");
    if (of_model(file) && fails(READS)) return errno = EIO, -1;
    return next(file, to, size);
}

typedef int (*Open)(const char*, int, ...);
static int opened(const char* name, const char* path, int flags, mode_t mode) {
    if (atomic_load(&kind) == READS && !strncmp(path, prefix, strlen(prefix)) && fails(READS)) return errno = EMFILE, -1;
    return ((Open)dlsym(RTLD_NEXT, name))(path, flags, mode);
}
int open(const char* path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    const mode_t mode = va_arg(more, mode_t);
    va_end(more);
    return opened("open", path, flags, mode);
}
int open64(const char* path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    const mode_t mode = va_arg(more, mode_t);
    va_end(more);
    return opened("open64", path, flags, mode);
}
