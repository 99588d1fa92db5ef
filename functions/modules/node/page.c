// The part of the module that JavaScript cannot do: maps the generation page for the JavaScript of
// each thread, and has OpenSSL ask the kernel for every random number, so that it keeps no state
// that instances could share. Works with every Node from 18 on: Node-API and RAND_METHOD are stable.
// Their declarations are repeated here, so that a C compiler is all that building takes.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <unistd.h>

typedef struct napi_env__ *napi_env;
typedef struct napi_value__ *napi_value;
typedef int napi_status;
typedef void (*napi_finalize)(napi_env env, void *data, void *hint);
extern napi_status napi_create_external_arraybuffer(napi_env env, void *data, size_t length,
                                                    napi_finalize finalize, void *hint,
                                                    napi_value *result);
extern napi_status napi_set_named_property(napi_env env, napi_value object, const char *name,
                                           napi_value value);
extern napi_status napi_throw_error(napi_env env, const char *code, const char *message);

// RAND_set_rand_method(3)
struct rand_method {
    int (*seed)(const void *bytes, int length);
    int (*bytes)(unsigned char *bytes, int length);
    void (*cleanup)(void);
    int (*add)(const void *bytes, int length, double entropy);
    int (*pseudorand)(unsigned char *bytes, int length);
    int (*status)(void);
};

enum { PAGE = 4096 };

static int from_kernel(unsigned char *bytes, int length) {
    while (length > 0) {
        ssize_t got = getrandom(bytes, (size_t)length, 0);
        if (got < 0 && errno != EINTR) return 0;
        if (got > 0) {
            bytes += got;
            length -= (int)got;
        }
    }
    return 1;
}

static int take(const void *bytes, int length) { return 1; }
static int take_weighed(const void *bytes, int length, double entropy) { return 1; }
static int ready(void) { return 1; }

static const struct rand_method kernel_method = {
    .seed = take,
    .bytes = from_kernel,
    .add = take_weighed,
    .pseudorand = from_kernel,
    .status = ready,
};

static bool openssl_asks_the_kernel(void) {
    int (*set)(const struct rand_method *);
    *(void **)&set = dlsym(RTLD_DEFAULT, "RAND_set_rand_method");
    return set && set(&kernel_method) == 1;
}

static void unmap(napi_env env, void *page, void *hint) { munmap(page, PAGE); }

__attribute__((visibility("default"))) napi_value napi_register_module_v1(napi_env env,
                                                                          napi_value exports) {
    if (!openssl_asks_the_kernel()) {
        napi_throw_error(env, NULL, "this Node's OpenSSL does not let its generator be replaced");
        return NULL;
    }
    const char *path = getenv("TRENV_GENERATION");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    void *page = MAP_FAILED;
    if (file >= 0) {
        page = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, file, 0);
        close(file);
    }
    if (page == MAP_FAILED) {
        napi_throw_error(env, NULL, strerror(errno));
        return NULL;
    }
    napi_value buffer;
    if (memcmp(page, "TRENVGEN", 8) != 0 ||
        napi_create_external_arraybuffer(env, page, PAGE, unmap, NULL, &buffer) != 0) {
        munmap(page, PAGE);
        napi_throw_error(env, NULL, "it is no generation page, or Node takes no foreign memory");
        return NULL;
    }
    napi_set_named_property(env, exports, "page", buffer);
    return exports;
}
