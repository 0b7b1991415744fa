/* Backend by name. */
#include "../cuda/glm_cuda.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- the CUDA library, opened when its first backend is made and never closed */

struct device_name {
    char library[8]; /* "cuda" or "emu" */
    int device;
    enum glm_dtype compute;
};

/* "cuda", "cuda:1", "emu/float16", "cuda:0/bfloat16"; 0 when it is not such a name */
static int parse_device(struct device_name *out, const char *name)
{
    static const struct {
        const char *name;
        enum glm_dtype dtype;
    } types[] = {
        {"", GLM_F32}, {"/float32", GLM_F32}, {"/float16", GLM_F16}, {"/bfloat16", GLM_BF16}};
    const size_t library = strcspn(name, ":/");
    *out = (struct device_name){.compute = GLM_F32};
    if (library >= sizeof out->library)
        return 0;
    memcpy(out->library, name, library);
    if (strcmp(out->library, "cuda") != 0 && strcmp(out->library, "emu") != 0)
        return 0;
    name += library;
    if (*name == ':') {
        char *end;
        const long device = strtol(name + 1, &end, 10);
        if (end == name + 1 || name[1] < '0' || name[1] > '9' || device > 1 << 16)
            return 0;
        out->device = (int)device;
        name = end;
    }
    for (size_t i = 0; i < sizeof types / sizeof types[0]; i++)
        if (strcmp(name, types[i].name) == 0) {
            out->compute = types[i].dtype;
            return 1;
        }
    return 0;
}

/* The folder that this module lies in, with its slash; "" where that is not known. */
static void own_folder(char *out, size_t n)
{
    Dl_info self;
    const char *file = dladdr((void *)glm_backend_create, &self) ? self.dli_fname : NULL;
    const char *end = file ? strrchr(file, '/') : NULL;
    snprintf(out, n, "%.*s", end ? (int)(end + 1 - file) : 0, file ? file : "");
}

/* Where the library of "cuda" or "emu" is: GLMLORA_CUDA_LIBRARY, or beside this module: what a
 * wheel brings (libglm_cuda.so, of the CUDA version of whoever built it, or libglm_cuda12.so), or
 * what `python cuda/build.py` leaves in a checkout. 0: nowhere. */
static int find_library(char path[4096], const char *kind)
{
    static const char *const places[2][4] = {
        {"libglm_cuda.so", "libglm_cuda12.so", "../build/cuda/libglm_cuda.so",
         "../build/cuda/libglm_cuda12.so"},
        {"../build/cuda/emu/libglm_cuda_emu.so", "", "", ""},
    };
    const char *named = getenv("GLMLORA_CUDA_LIBRARY");
    char folder[3072];
    if (named && *named) {
        snprintf(path, 4096, "%s", named);
        return 1;
    }
    own_folder(folder, sizeof folder);
    for (int i = 0; i < 4; i++) {
        const char *place = places[strcmp(kind, "emu") == 0][i];
        snprintf(path, 4096, "%s%s", folder, place);
        if (*place && access(path, R_OK) == 0)
            return 1;
    }
    return 0;
}

/* The library's functions; a library of the other kind is refused by the name it says. */
static glm_status open_library(void **library, char path[4096], const struct device_name *which,
                               const char *name, struct glm_error *err)
{
    if (!find_library(path, which->library))
        return glm_fail(err, GLM_EVALUE,
                        "backend '%s': this build has no library for it: build one with "
                        "`python cuda/build.py %s` in the sources, or name one in "
                        "GLMLORA_CUDA_LIBRARY",
                        name, strcmp(which->library, "emu") == 0 ? "emu" : "here");
    *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!*library)
        return glm_fail(err, GLM_EVALUE, "backend '%s': %s", name, dlerror());
    int (*abi)(void);
    const char *(*kind)(void);
    *(void **)&abi = dlsym(*library, "glm_cuda_abi");
    *(void **)&kind = dlsym(*library, "glm_cuda_kind");
    if (!abi || !kind || abi() != GLM_CUDA_ABI)
        return glm_fail(err, GLM_EVALUE,
                        "backend '%s': %s has interface %d, expected %d: build it anew", name, path,
                        abi ? abi() : 0, GLM_CUDA_ABI);
    if (strcmp(kind(), which->library) != 0)
        return glm_fail(err, GLM_EVALUE, "backend '%s': %s is the library of '%s'", name, path,
                        kind());
    return GLM_OK;
}

static glm_status cuda_create(struct glm_backend **out, const struct device_name *which,
                              const char *name, struct glm_error *err)
{
    void *library;
    char path[4096];
    glm_status (*create)(struct glm_backend **, int, enum glm_dtype, struct glm_error *);
    GLM_TRY(open_library(&library, path, which, name, err));
    *(void **)&create = dlsym(library, "glm_cuda_create");
    return create(out, which->device, which->compute, err);
}

glm_status glm_device_info(const char *name, struct glm_device *out, struct glm_error *err)
{
    struct device_name which;
    void *library;
    char path[4096];
    glm_status (*info)(int, struct glm_device *, struct glm_error *);
    *out = (struct glm_device){0};
    if (!parse_device(&which, name))
        return glm_fail(err, GLM_EVALUE, "device '%s': expected cuda[:N] or emu[:N]", name);
    GLM_TRY(open_library(&library, path, &which, name, err));
    *(void **)&info = dlsym(library, "glm_cuda_info");
    return info(which.device, out, err);
}

glm_status glm_device_library(const char *name, struct glm_library *out, struct glm_error *err)
{
    struct device_name which;
    void *library;
    const char *(*about)(char *, size_t);
    if (!parse_device(&which, name))
        return glm_fail(err, GLM_EVALUE, "device '%s': expected cuda[:N] or emu[:N]", name);
    GLM_TRY(open_library(&library, out->path, &which, name, err));
    *(void **)&about = dlsym(library, "glm_cuda_about");
    out->built = about(out->cublas, sizeof out->cublas);
    return GLM_OK;
}

/* ---- names */

void glm_backend_name(char full[64], const char *name)
{
    static const char *const types[] = {"float32", "float16", "bfloat16"};
    const char *forced = getenv("GLMLORA_ISA");
    char sets[64];
    const char *variants = forced && *forced ? forced : glm_cpu_variants(sets);
    struct device_name device;
    if (strncmp(name, "cpu", 3) == 0 && (!name[3] || name[3] == ':' || name[3] == '/')) {
        const char *isa = name[3] == ':' ? name + 4 : variants, *type = strchr(name, '/');
        if (type && strcmp(type, "/float32") == 0)
            type = NULL;
        snprintf(full, 64, "cpu:%.*s%.20s", (int)strcspn(isa, ",/"), isa, type ? type : "");
    } else if (strncmp(name, "plan:", 5) == 0 && parse_device(&device, name + 5))
        snprintf(full, 64, "plan:%s/%s", device.library, types[device.compute]);
    else if (parse_device(&device, name))
        snprintf(full, 64, "%s:%d/%s", device.library, device.device, types[device.compute]);
    else
        snprintf(full, 64, "%.63s", name);
}

glm_status glm_backend_create(struct glm_backend **out, const char *name, struct glm_error *err)
{
    struct device_name device;
    *out = NULL;
    if (strncmp(name, "cpu:", 4) == 0)
        return glm_cpu_create(out, name, err);
    if (strcmp(name, "plan") == 0 || strcmp(name, "plan/int16") == 0)
        return glm_plan_create(out, name, 0, GLM_F32, err);
    if (strcmp(name, "plan/bfloat16") == 0 || strcmp(name, "plan/int8") == 0)
        return glm_plan_create(out, name, 0, GLM_BF16, err);
    if (strncmp(name, "plan:", 5) == 0 && parse_device(&device, name + 5))
        return glm_plan_create(out, name, 1, device.compute, err);
    if (strcmp(name, "ref_f32") == 0)
        return glm_ref_f32_create(out, err);
    if (strcmp(name, "ref_f64") == 0)
        return glm_ref_f64_create(out, err);
    if (parse_device(&device, name))
        return cuda_create(out, &device, name, err);
    return glm_fail(err, GLM_EVALUE,
                    "backend '%s': expected cpu[:ISA][/float32|/bfloat16|/int16|/int8], ref_f32, "
                    "ref_f64, cuda[:N][/float32|/float16|/bfloat16], "
                    "plan[/bfloat16|/int16|/int8] or "
                    "plan:cuda..",
                    name);
}
