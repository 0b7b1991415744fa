/* Backend by name. */
#include "../cuda/glm_cuda.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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

static glm_status cuda_create(struct glm_backend **out, const struct device_name *which,
                              const char *name, struct glm_error *err)
{
    const char *path = getenv("GLMLORA_CUDA_LIBRARY");
    if (!path || !*path)
        return glm_fail(err, GLM_EVALUE,
                        "backend '%s': there is no CUDA library: GLMLORA_CUDA_LIBRARY names none",
                        name);
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library)
        return glm_fail(err, GLM_EVALUE, "backend '%s': %s", name, dlerror());
    int (*abi)(void);
    glm_status (*create)(struct glm_backend **, int, enum glm_dtype, struct glm_error *);
    *(void **)&abi = dlsym(library, "glm_cuda_abi");
    *(void **)&create = dlsym(library, "glm_cuda_create");
    if (!abi || !create || abi() != GLM_CUDA_ABI)
        return glm_fail(err, GLM_EVALUE,
                        "backend '%s': %s has interface %d, expected %d: build it anew", name, path,
                        abi ? abi() : 0, GLM_CUDA_ABI);
    GLM_TRY(create(out, which->device, which->compute, err));
    if (strncmp((*out)->name, which->library, strlen(which->library)) == 0)
        return GLM_OK;
    const glm_status status = glm_fail(err, GLM_EVALUE, "backend '%s': %s is the library of '%s'",
                                       name, path, (*out)->name);
    (*out)->destroy(*out);
    *out = NULL;
    return status;
}

/* ---- names */

void glm_backend_name(char full[64], const char *name)
{
    static const char *const types[] = {"float32", "float16", "bfloat16"};
    const char *forced = getenv("GLMLORA_ISA");
    const char *variants = forced && *forced ? forced : glm_cpu_variants();
    struct device_name device;
    if (strncmp(name, "cpu", 3) == 0 && (!name[3] || name[3] == ':' || name[3] == '/')) {
        const char *isa = name[3] == ':' ? name + 4 : variants, *type = strchr(name, '/');
        if (type && strcmp(type, "/float32") == 0)
            type = NULL;
        snprintf(full, 64, "cpu:%.*s%.20s", (int)strcspn(isa, ",/"), isa, type ? type : "");
    } else if (parse_device(&device, name))
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
    if (strcmp(name, "plan") == 0)
        return glm_plan_create(out, err);
    if (strcmp(name, "ref_f32") == 0)
        return glm_ref_f32_create(out, err);
    if (strcmp(name, "ref_f64") == 0)
        return glm_ref_f64_create(out, err);
    if (parse_device(&device, name))
        return cuda_create(out, &device, name, err);
    return glm_fail(
        err, GLM_EVALUE,
        "backend '%s': expected cpu[:generic|:avx2|:avx512|:avx512bf16][/float32|/bfloat16|"
        "/int8], plan, ref_f32, ref_f64 or cuda[:N][/float32|/float16|/bfloat16]",
        name);
}
